"""Linear layers through oneDNN, for CPUs where PyTorch's own float32 linear runs at half speed."""

import functools
import platform
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .torch_private import forward_mode, has_onednn_linear, onednn_linear

# PyTorch's float32 linear is MKL's, which uses 256-bit code on AMD CPUs. On a Zen 5 that is 108 of 230 GF/s per core
# (T = 1576, 384 -> 1536); on a Zen 3, which has no wider units, MKL reaches 90 GF/s and oneDNN 80 (T = 3152). So only
# AMD CPUs with AVX-512 are candidates, and a measurement of a few milliseconds decides there.
MIN_GAIN = 1.15
PROBE = (512, 384, 384)  # tokens, channels in, channels out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` through oneDNN, forward and backward.

    x `[..., I]`, weight `[O, I]`, bias `[O]` -> `[..., O]`. Differentiable any number of times. Other dtypes than
    float32, other devices, autocast, tracing and torch.compile take `F.linear`.
    """
    if not _usable(x, weight, bias):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _Linear.apply(x, weight, bias)
    return onednn_linear(x, weight, bias)


class OneDnnLinear(nn.Linear):
    """nn.Linear whose float32 forward and backward on a CPU run in oneDNN; same parameters, same state dict.

    `function(x, weight, bias)` is what it runs, for layers that have its weights but are not of its class.
    """

    function = staticmethod(linear)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


@functools.cache
def prefer_onednn() -> bool:
    """Whether oneDNN's float32 linear is at least MIN_GAIN times as fast as PyTorch's here; decided once a process."""
    if not _is_amd() or torch.backends.cpu.get_cpu_capability() != "AVX512" or not has_onednn_linear():
        return False
    tokens, channels, outputs = PROBE
    x, w, b = (
        torch.ones(tokens, channels, dtype=torch.float32, device="cpu"),
        torch.ones(outputs, channels, dtype=torch.float32, device="cpu"),
        torch.ones(outputs, dtype=torch.float32, device="cpu"),
    )
    ours = _fastest(lambda: onednn_linear(x, w, b))
    return _fastest(lambda: F.linear(x, w, b)) >= MIN_GAIN * ours


class _Linear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return onednn_linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        # oneDNN reads strided views slower than a contiguous copy costs to make.
        grad_x = linear(grad, weight.t().contiguous()) if need_x else None
        grad_weight = None
        if need_weight:
            columns = x.reshape(-1, x.shape[-1]).t().contiguous()
            grad_weight = linear(rows.t().contiguous(), columns)
        return grad_x, grad_weight, rows.sum(0) if need_bias else None


def _usable(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"):
        return False
    if forward_mode():  # oneDNN's linear has no rule for tangents and would drop them
        return False
    if type(x) not in (Tensor, nn.Parameter) or type(weight) not in (Tensor, nn.Parameter):
        return False
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if any(t.dtype != torch.float32 or t.device.type != "cpu" for t in tensors):
        return False
    return x.dim() >= 2 and x.numel() > 0 and weight.numel() > 0 and has_onednn_linear()


def _is_amd() -> bool:
    info = Path("/proc/cpuinfo")
    vendor = info.read_text(errors="replace")[:4096] if info.exists() else platform.processor()
    return "AuthenticAMD" in vendor


def _fastest(run, repeats: int = 5) -> float:
    """Seconds of the fastest of a few runs, after one to warm up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)

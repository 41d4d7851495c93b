"""Every private function of PyTorch that p3b_ext uses: names that a new PyTorch may change are in this file only.

Plain aliases where a call costs enough to show in front of a small attention.
"""

import functools

import torch
from torch import Tensor
from torch.autograd import forward_ad

# A context in which ops skip autograd's dispatch keys: for calls that need no gradient, and inside a Function of ours.
below_autograd = torch._C._AutoDispatchBelowAutograd
# Whether autocast is on for any device: one call instead of one per device.
autocast_enabled = torch._C._is_any_autocast_enabled
# torch.jit.is_tracing without its Python wrapper.
jit_tracing = torch._C._is_tracing
# How many TorchDispatchModes are active (fake tensors, FLOP counters): each must see the op through the dispatcher.
dispatch_modes = torch._C._len_torch_dispatch_stack
# Whether one of torch.func's transforms is active.
transforms_active = torch._C._are_functorch_transforms_active
# has_kernel(op, key): whether an op has a kernel registered for a dispatch key.
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key

# Ops without a formula in torch.utils.flop_counter; None where this PyTorch lacks them.
CPU_ATTENTION = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
CPU_ATTENTION_BACKWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)

_innermost_transform = torch._C._functorch.peek_interpreter_stack
_FUNCTIONALIZE = torch._C._functorch.TransformType.Functionalize


def forward_mode() -> bool:
    """Whether forward-mode differentiation is active (torch.autograd.forward_ad.dual_level)."""
    return forward_ad._current_level >= 0


def differentiating_transform() -> bool:
    """Whether a transform is active that needs a rule of every op: all but functionalize, as the ops are functional."""
    if transforms_active():
        return _innermost_transform().key() != _FUNCTIONALIZE
    return forward_ad._current_level >= 0


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` in oneDNN; float32 on the CPU. It has no gradient of its own."""
    return ONEDNN_LINEAR(x, weight, bias, "none", [], "")  # type: ignore[misc]  # asked for only where there is one


@functools.cache
def has_onednn_linear() -> bool:
    """Whether this PyTorch was built with oneDNN and has its linear."""
    return torch.backends.mkldnn.is_available() and ONEDNN_LINEAR is not None

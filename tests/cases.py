"""Sample inputs and error budgets that the tests share."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from p3b_ext import reference


def acc(dtype: torch.dtype) -> torch.dtype:
    return reference.acc_dtype(dtype)


@dataclass(frozen=True)
class AttentionCase:
    """One call of masked_attention; odd sizes on purpose."""

    B: int
    H: int
    N: int
    D: int
    layout: str = (
        "packed"  # "packed": views of [B, N, 3, H, D]; "contiguous" [B, H, N, D]; "sliced": rows of a larger one
    )
    mask: str = ""  # "" | "some" | "all" (image 0 has no key left)
    sizes: float = 0.0  # largest token size; 0 = none
    gate: str = ""  # "" | "D" | "HD" | "pruned" (head 0 all zero, every third channel zero)
    logits: float = 1.0  # factor on q

    def __str__(self):
        parts = [f"B{self.B}-H{self.H}-N{self.N}-D{self.D}-{self.layout}"]
        parts += [f"mask_{self.mask}"] if self.mask else []
        parts += [f"sizes{self.sizes:g}"] if self.sizes else []
        parts += [f"gate_{self.gate}"] if self.gate else []
        parts += [f"logits{self.logits:g}"] if self.logits != 1 else []
        return "-".join(parts)

    def inputs(self, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> dict:
        """q, k, v, key_mask, token_size, channel_gate; q, k, v are views with the wanted strides."""
        g = torch.Generator().manual_seed(seed)
        B, H, N, D = self.B, self.H, self.N, self.D
        qkv = torch.randn(B, N, 3, H, D, generator=g, dtype=torch.float64)
        qkv[:, :, 0] *= self.logits
        qkv = qkv.to(dtype).to(device)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.layout == "contiguous":
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        if self.layout == "sliced":
            q, k, v = (_sliced(t) for t in (q, k, v))
        if self.layout == "expanded":
            q, k, v = (t[:1].expand_as(t) for t in (q, k, v))
        key_mask = token_size = gate = None
        if self.mask:
            key_mask = torch.rand(B, N, generator=g) < 0.7
            key_mask[:, 0] = True
            if self.mask == "all" and B:
                key_mask[0] = False
            key_mask = key_mask.to(device)
        if self.sizes:
            token_size = 1 + torch.rand(B, N, generator=g, dtype=torch.float64) * (self.sizes - 1)
            token_size = token_size.to(acc(dtype)).to(device)
        if self.gate:
            shape = (D,) if self.gate == "D" else (H, D)
            gate = 0.5 + torch.rand(shape, generator=g, dtype=torch.float64)
            if self.gate == "pruned":
                gate[0] = 0
                gate[:, ::3] = 0
            gate = gate.to(acc(dtype)).to(device)
        return dict(q=q, k=k, v=v, key_mask=key_mask, token_size=token_size, channel_gate=gate)


def _sliced(t: Tensor) -> Tensor:
    big = t.new_zeros(*t.shape[:-1], t.shape[-1] + 5)
    big[..., 2 : 2 + t.shape[-1]] = t
    return big[..., 2 : 2 + t.shape[-1]]


ATTENTION = [
    AttentionCase(2, 3, 17, 24),
    AttentionCase(1, 1, 1, 8),
    AttentionCase(1, 2, 2, 16, "contiguous"),
    AttentionCase(2, 2, 50, 64, mask="some"),
    AttentionCase(2, 2, 50, 40, "sliced", mask="all", sizes=5, gate="HD"),
    AttentionCase(1, 3, 197, 64, sizes=1e4),
    AttentionCase(2, 1, 197, 64, mask="some", sizes=9, gate="D"),
    AttentionCase(3, 2, 33, 80, "contiguous", gate="pruned"),
    AttentionCase(2, 2, 19, 128, "expanded", sizes=3),
    AttentionCase(1, 2, 31, 56, mask="all", sizes=1e4, gate="pruned"),
    AttentionCase(2, 1, 23, 13, gate="HD"),
    AttentionCase(1, 1, 577, 64, mask="some"),
    AttentionCase(1, 2, 65, 32, logits=1e4 / 32**0.5),
    AttentionCase(1, 1, 9, 1),
]


def float64(inputs: dict) -> dict:
    return {name: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for name, t in inputs.items()}


def budget(truth: Tensor, torch_result: Tensor, dtype: torch.dtype) -> float:
    """Twice the error of PyTorch in the same dtype, plus four roundings of the largest value (64 in float64, where the
    truth is rounded as well) and of a sum of terms around 1 that cancel."""
    if not truth.numel():
        return 0.0
    roundings = 64 if dtype == torch.float64 else 4
    limit = 2 * (torch_result.double() - truth).abs().max().item()
    return limit + roundings * (torch.finfo(dtype).eps * truth.abs().max().item() + torch.finfo(acc(dtype)).eps)


def assert_within(
    name: str, result: Tensor, truth: Tensor, torch_result: Tensor, dtype: torch.dtype, slack: float = 0.0
) -> None:
    """result is at most `budget` away from truth, plus `slack` times the largest value."""
    assert result.shape == truth.shape, f"{name}: shape {list(result.shape)}, wanted {list(truth.shape)}"
    if not truth.numel():
        return
    finite = truth.isfinite()
    assert torch.equal(result[~finite].double(), truth[~finite]), f"{name}: wrong infinities"
    assert result[finite].isfinite().all(), f"{name}: not finite where the truth is"
    if finite.any():
        limit = budget(truth[finite], torch_result[finite], dtype) + slack * truth[finite].abs().max().item()
        error = (result[finite].double() - truth[finite]).abs().max().item()
        assert error <= limit, f"{name}: error {error:.3g}, allowed {limit:.3g}"


def in_float64(model: nn.Module, x: Tensor) -> Tensor:
    """What a copy of the model gives in float64."""
    return copy.deepcopy(model).double()(x.double())


def assert_same_to_rounding(ours: Tensor, theirs: Tensor, truth: Tensor, name: str = "") -> None:
    """Two ways to compute one thing through the layers of a small model: ours is at most twice as far from float64 as
    theirs, plus 32 roundings of the largest value, some for each layer."""
    assert ours.dtype == theirs.dtype and truth.dtype == torch.float64
    assert_within(name, ours, truth, theirs, theirs.dtype, 32 * torch.finfo(theirs.dtype).eps)


def assert_near(ours: Tensor, theirs: Tensor, roundings: int = 256) -> None:
    """Equal up to so many roundings of the largest value: where there is no truth, as float64 may choose other tokens
    or draw other numbers."""
    limit = roundings * torch.finfo(theirs.dtype).eps * float(theirs.detach().abs().max())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=limit)

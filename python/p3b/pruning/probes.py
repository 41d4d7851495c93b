# SPDX-License-Identifier: MIT
"""Probes: small classifiers on the residual stream before and after every sub-block, whose losses say how well the
classes can be told apart there.

All probes of one kind are one batched module: one matrix product or grouped convolution serves the S = 2L
sub-blocks and both their sides. Letters as everywhere: B images, N tokens, C model channels, K classes; P
patch tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

BATCH_NORM_EPSILON = 1e-5
# A step of Adam changes a layer's output by about lr * sqrt(inputs). The cheaper patch probes have fewer inputs than a
# 3x3 convolution, so at its learning rate they converge later, and their benefit measures their own progress.
PATCH_LEARNING_RATE = {"conv": 1.0, "pointwise": 10.0, "linear": 10.0}  # times probe_lr; docs/results/probes.md


def _both_sides(stack: Tensor) -> Tensor:
    """`[S + 1, B, ...]` -> `[S, 2B, ...]`: row i is the input of probe i, before and after its sub-block. A view:
    neighbours overlap."""
    stack = stack.contiguous()
    count, images, *rest = stack.shape
    return stack.as_strided((count - 1, 2 * images, *rest), stack.stride())


class _BatchedLinear(nn.Module):
    """S Linears of one shape on channel-first columns: `[S, C, M]` -> `[S, K, M]`, initialised as nn.Linear."""

    def __init__(self, count: int, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(
            torch.empty(count, outputs, inputs, dtype=torch.float32, device="cpu").uniform_(-bound, bound)
        )
        self.bias = (
            nn.Parameter(torch.empty(count, outputs, 1, dtype=torch.float32, device="cpu").uniform_(-bound, bound))
            if bias
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(self.weight, x) if self.bias is None else torch.baddbmm(self.bias, self.weight, x)


def _batch_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Batch norm of `[B, C, ...]` with the statistics of this batch, or of the equal batches of all processes."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return F.batch_norm(x, None, None, scale, shift, training=True, eps=BATCH_NORM_EPSILON)
    axes = [axis for axis in range(x.ndim) if axis != 1]
    world = dist.get_world_size()
    centred = x - all_reduce(x.mean(axes, keepdim=True)) / world
    variance = all_reduce(centred.square().mean(axes, keepdim=True)) / world
    shape = variance.shape
    return centred * torch.rsqrt(variance + BATCH_NORM_EPSILON) * scale.view(shape) + shift.view(shape)


class LinearProbe(nn.Module):
    """Linear layers on one vector per image: the class token, or the mean of the patch tokens."""

    def __init__(self, count: int, channels: int, classes: int) -> None:
        super().__init__()
        self.head = _BatchedLinear(count, channels, classes)

    def forward(self, stack: Tensor) -> Tensor:
        """`[S + 1, B, C]` -> logits `[S, K, 2B]`."""
        return self.head(_both_sides(stack).transpose(1, 2))


class PointwiseProbe(nn.Module):
    """1x1 convolution, batch norm, ReLU, mean over tokens, linear: cheaper, for any number of patches."""

    def __init__(self, count: int, channels: int, width: int, classes: int) -> None:
        super().__init__()
        self.expand = _BatchedLinear(count, channels, width, bias=False)
        self.scale = nn.Parameter(torch.ones(count * width, dtype=torch.float32, device="cpu"))
        self.shift = nn.Parameter(torch.zeros(count * width, dtype=torch.float32, device="cpu"))
        self.head = _BatchedLinear(count, width, classes)

    def forward(self, stack: Tensor) -> Tensor:
        """`[S + 1, B, P, C]` -> logits `[S, K, 2B]`."""
        probes, patches = stack.shape[0] - 1, stack.shape[2]
        x = self.expand(_both_sides(stack).flatten(1, 2).transpose(1, 2))  # [S, width, 2B * P]
        # channels first: the norm's statistics and the mean over patches then run along contiguous memory
        x = _batch_norm(x.flatten(0, 1)[None], self.scale, self.shift).relu_()
        return self.head(x.unflatten(2, (-1, patches)).mean(-1).unflatten(1, (probes, -1))[0])


class ConvProbe(nn.Module):
    """The published form: twice 3x3 convolution, batch norm, ReLU on the patch grid; mean; linear. Always with batch
    statistics."""

    def __init__(self, count: int, channels: int, width: int, classes: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.count, self.grid = count, grid
        sizes = (channels, width, width)
        self.convs = nn.ModuleList(
            nn.Conv2d(count * a, count * b, 3, padding=1, bias=False, groups=count, dtype=torch.float32, device="cpu")
            for a, b in itertools.pairwise(sizes)
        )
        self.scales = nn.ParameterList(torch.ones(count * width, dtype=torch.float32, device="cpu") for _ in self.convs)
        self.shifts = nn.ParameterList(
            torch.zeros(count * width, dtype=torch.float32, device="cpu") for _ in self.convs
        )
        self.head = _BatchedLinear(count, width, classes)

    def forward(self, stack: Tensor) -> Tensor:
        """`[S + 1, B, P, C]` -> logits `[S, K, 2B]`."""
        x = _both_sides(stack).permute(1, 0, 3, 2)  # [2B, S, C, P]
        x = x.reshape(x.shape[0], -1, *self.grid)
        for conv, scale, shift in zip(self.convs, self.scales, self.shifts, strict=True):
            x = _batch_norm(conv(x), scale, shift).relu()
        return self.head(x.mean((2, 3)).t().unflatten(0, (self.count, -1)))


class Probes(nn.Module):
    """The class and patch probes of a model. `forward(stream, loss)` gives their losses
    `{"cls": [S, 2], "patch": [S, 2]}` in nats.

    The class probe is left out where the model has no class token or `alpha` is 0, the patch probe where
    `alpha` is 1.
    """

    def __init__(
        self, model: VisionTransformer, *, alpha: float = 0.5, form: str = "pointwise", width: int = 0
    ) -> None:
        super().__init__()
        count, channels, classes = 2 * len(model.blocks), model.embed_dim, model.num_classes
        self.form = form
        self.prefix = model.num_prefix_tokens
        self.has_cls = bool(getattr(model, "has_class_token", self.prefix > 0)) and alpha > 0
        self.grid = tuple(model.patch_embed.grid_size)
        self.cls = LinearProbe(count, channels, classes) if self.has_cls else None
        self.patch: nn.Module | None = None
        if alpha < 1 or not self.has_cls:
            if form == "linear":
                self.patch = LinearProbe(count, channels, classes)
            elif form == "pointwise":
                self.patch = PointwiseProbe(count, channels, width or max(8, channels // 4), classes)
            else:
                self.patch = ConvProbe(count, channels, width or channels, classes, self.grid)

    @property
    def criteria(self) -> tuple[str, ...]:
        """Names of what is measured: "cls", "patch" or both."""
        return tuple(name for name, probe in (("cls", self.cls), ("patch", self.patch)) if probe is not None)

    def forward(self, stream: list[Tensor], loss: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """stream: 2L + 1 tensors `[B, N, C]`; loss: logits `[R * B, K]` -> loss per row, the B targets
        repeating R times."""
        losses = {}
        if self.cls is not None:
            losses["cls"] = self._mean_losses(self.cls(torch.stack([x[:, 0].float() for x in stream])), loss)
        if self.patch is not None:
            if isinstance(self.patch, LinearProbe):
                stack = torch.stack([x[:, self.prefix :].float().mean(1) for x in stream])
            else:
                counts = {x.shape[1] - self.prefix for x in stream}
                if len(counts) > 1 or (isinstance(self.patch, ConvProbe) and counts != {math.prod(self.grid)}):
                    raise ValueError(
                        f"probes: every block must have all {self.grid[0]}x{self.grid[1]} patches, "
                        f'got {sorted(counts)}; patch_probe="linear" reads any number of tokens'
                    )
                stack = torch.stack([x[:, self.prefix :].float() for x in stream])
            losses["patch"] = self._mean_losses(self.patch(stack), loss)
        return losses

    @staticmethod
    def _mean_losses(logits: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
        return loss(logits.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(logits), 2, -1)).mean(-1)

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, object]]:
        """Optimizer groups: weights decay, biases and batch norms do not; cheap patch probes learn faster."""
        groups = []
        for probe, rate in ((self.cls, lr), (self.patch, lr * PATCH_LEARNING_RATE[self.form])):
            if probe is None:
                continue
            decays: list[nn.Parameter] = []
            others: list[nn.Parameter] = []
            for name, parameter in probe.named_parameters():
                (decays if name.endswith("weight") else others).append(parameter)
            groups += [
                {"params": decays, "lr": rate, "weight_decay": weight_decay},
                {"params": others, "lr": rate, "weight_decay": 0.0},
            ]
        return groups

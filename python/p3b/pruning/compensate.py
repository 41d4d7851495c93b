# SPDX-License-Identifier: MIT
"""Mean-activation compensation: the mean activation of removed channels is added to the next layer's bias.

Variance-Based Pruning (2025) does so for hidden neurons; here also for the inputs of the attention's projection, of qkv
and of the MLP. Exact where a channel is constant, correct on average elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..models import mlp as mlps
from .gates import Gates
from .sub_blocks import SubBlock

Batches = Iterable[Tensor | tuple[Tensor, Tensor]]


@torch.no_grad()
def activation_means(model: VisionTransformer, batches: Batches) -> dict[str, dict[str, Tensor]]:
    """Mean over images and tokens of the activations at a model's gates, before the gates, under the current masks.

    model: one under gates per sub-block (`p3b.gates.attach`); it is run in eval mode. batches: images `[B, C, H, W]`,
    alone or with targets, on the model's device. Returns, by sub-block, "in" `[C]` (output of the norm) and "inner"
    (hidden channels, or the attention's output `[H * D]` before its projection), float32. Raises NotImplementedError
    for a norm behind an inner gate, whose statistics change with the masks, for a shared embedding and for a Linear
    without bias.
    """
    gates = checked_gates(model)
    sums = {block.name: {"in": 0.0, "inner": 0.0} for block in gates.blocks}
    handles: list[Any] = []
    training, count = model.training, 0
    model.eval()
    try:
        for block in gates.blocks:
            handles += _watch(model, block, gates, sums[block.name])
        for batch in batches:
            images = batch if isinstance(batch, Tensor) else batch[0]
            model(images)
            count += len(images)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    if count == 0:
        raise ValueError("activation_means: batches must give at least one image, got none")
    return {name: {gate: total / count for gate, total in both.items()} for name, both in sums.items()}


@torch.no_grad()
def compensate(
    model: VisionTransformer, means: dict[str, dict[str, Tensor]], old_values: Tensor, new_values: Tensor
) -> None:
    """Adds to the bias after every gate the mean of what its change removes: `W[:, j] * mean_j * (old_j - new_j)`.

    model: under gates; means: from `activation_means`; old_values, new_values: masks `[G]`, before and after. The masks
    themselves are not set. Removed output channels have no bias after them and are not compensated.
    """
    gates = checked_gates(model)
    for name, values in (("old_values", old_values), ("new_values", new_values)):
        if values.shape != gates.values.shape:
            raise ValueError(
                f"compensate: {name} must be of shape {list(gates.values.shape)}, got {list(values.shape)}"
            )
    change = (old_values - new_values).to(gates.values)
    for block in gates.blocks:
        *readers, last = _linears(model, block)
        reads, _, inner = block.slices()
        for first in readers:
            first.bias += first.weight @ (means[block.name]["in"] * change[reads]).to(first.weight.dtype)
        spread = _spread(model, block, change[inner])
        last.bias += last.weight @ (means[block.name]["inner"] * spread).to(last.weight.dtype)


def checked_gates(model: VisionTransformer) -> Gates:
    """The gates of a model that can be compensated. Raises ValueError or NotImplementedError where it cannot."""
    gates = getattr(model, "p3b_gates", None)
    if gates is None:
        raise ValueError("compensate: the model has no gates; p3b.gates.attach puts some on")
    if gates.embedding is not None:
        raise NotImplementedError(
            "compensate: not available for a method that prunes channels of the embedding (savit)"
        )
    for block in gates.blocks:
        branch = getattr(model.blocks[block.block], block.kind)
        if not isinstance(branch.norm, nn.Identity):
            raise NotImplementedError(
                f"compensate: {block.name} has a norm after its inner gate, which is not supported"
            )
        if any(linear.bias is None for linear in _linears(model, block)):
            raise NotImplementedError(
                f"compensate: {block.name} has a Linear layer without bias, which is not supported"
            )
    return gates


def _linears(model: VisionTransformer, block: SubBlock) -> list[nn.Linear]:
    """The layers that read the norm's output, and last the one that writes to the residual stream."""
    branch = getattr(model.blocks[block.block], block.kind)
    return [branch.qkv, branch.proj] if block.kind == "attn" else [*mlps.readers(branch), branch.fc2]


def _spread(model: VisionTransformer, block: SubBlock, inner: Tensor) -> Tensor:
    """The inner gate of every column of the sub-block's last Linear."""
    if block.kind == "mlp":
        return inner
    attn = model.blocks[block.block].attn
    return inner.repeat(attn.num_heads) if block.granularity == "channels" else inner.repeat_interleave(attn.head_dim)


def _watch(model: VisionTransformer, block: SubBlock, gates: Gates, sums: dict[str, Any]) -> list[Any]:
    """Hooks that sum a sub-block's activations before its gates: mean over tokens, sum over images."""
    layer = model.blocks[block.block]
    norm = layer.norm1 if block.kind == "attn" else layer.norm2
    first, *_, last = _linears(model, block)

    def add(gate: str, x: Tensor) -> None:
        sums[gate] = sums[gate] + x.float().mean(1).sum(0)

    def see_norm(module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        add("in", module._ungated_class.forward(module, args[0]))

    if block.kind == "mlp":  # the gate is on fc2's columns, so fc2 reads the plain activation
        return [
            norm.register_forward_hook(see_norm),
            last.register_forward_pre_hook(lambda _, args: add("inner", args[0])),
        ]

    third = first.out_features // 3
    inner = _spread(model, block, gates.values[block.slices()[2]])

    def plain_values(module: nn.Linear, args: tuple[Tensor], out: Tensor) -> Tensor:
        # a value channel whose gate is 0 would give no mean: here it is ungated, and gated after the attention
        values = F.linear(args[0], module.weight[2 * third :], module.bias[2 * third :])
        return torch.cat((out[..., : 2 * third], values.to(out.dtype)), -1)

    def see_output(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        add("inner", args[0])
        return (args[0] * inner.to(args[0].dtype),)

    return [
        norm.register_forward_hook(see_norm),
        first.register_forward_hook(plain_values),
        last.register_forward_pre_hook(see_output),
    ]

"""Settings from a target: token counts and multiplications of a model, `solve_r` for a wanted cost, `calibrate` for a
wanted share of pruned images."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import timm.layers
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .patch import patch, reducing_blocks
from .plan import score_spread, token_scores
from .reducing_blocks import RECORD, ROLE
from .reduction import PPT, EViT, Reduction, ToMe, TopK


def token_counts(model: nn.Module, reduction: Reduction | None = None) -> list[tuple[int, int]]:
    """How many tokens the attention and the MLP of each block see, prefix included, at the model's image size.

    Args:
        model: a timm VisionTransformer, patched or not.
        reduction: as if patched with this one; None: with the one that it is patched with, if any.

    Raises:
        NotImplementedError: another model. TypeError, ValueError: a reduction that is none, or not one for this model.
    """
    _check_model("token_counts", model)
    if reduction is not None and not isinstance(reduction, Reduction):
        raise TypeError(
            f"token_counts: reduction must be ToMe, PPT, EViT, TopK or None, got {type(reduction).__name__}"
        )
    record = model.__dict__.get(RECORD)
    if reduction is None and record is not None:
        reduction = record.reduction
    n = model.patch_embed.num_patches + model.num_prefix_tokens
    depth, counts = len(model.blocks), []
    active = [] if reduction is None else reducing_blocks(model, reduction)
    for block in range(depth):
        before = n
        if block in active:
            n = reduction.tokens_after(block, depth, n, model.num_prefix_tokens)
        counts.append((before, n))
    return counts


def count_macs(model: nn.Module, reduction: Reduction | None = None) -> int:
    """Multiply-adds of one image, by the shapes of the weights and the tokens of each block.

    `N0 * patch_embed + sum over blocks of [n_a * (qkv + proj) + 2 n_a^2 * H * D + n_m * mlp] + heads` (and what an
    attention pooling needs), where a layer's name stands for its number of weights, n_a and n_m for the tokens in
    attention and MLP. DeiT-S: 4.599 G dense, 2.94 G with PPT (r = 50), 2.70 G with ToMe (r = 13). Pruned models count
    with the shapes that they have.
    Arguments as `token_counts`.
    """
    embed = model.patch_embed.num_patches * _weights(model.patch_embed)
    heads = sum(_weights(m) for name, m in model.named_children() if name.startswith("head"))
    total = embed + heads + pool_macs(model, reduction)
    for block, (in_attention, in_mlp) in zip(model.blocks, token_counts(model, reduction), strict=True):
        inside = 0
        for module in block.modules():
            if isinstance(module, timm.layers.Attention):
                weights = _weights(module)
                inside += weights
                total += in_attention * weights + 2 * in_attention**2 * module.num_heads * module.head_dim
        total += in_mlp * (_weights(block) - inside)
    return total


def pool_macs(model: nn.Module, reduction: Reduction | None = None) -> int:
    """Multiply-adds of an attention pooling for one image, 0 for a model without. Arguments as `token_counts`."""
    pool = getattr(model, "attn_pool", None)
    if pool is None:
        return 0
    tokens = token_counts(model, reduction)[-1][1] - (0 if model.pool_include_prefix else model.num_prefix_tokens)
    if not isinstance(pool, timm.layers.AttentionPoolLatent):  # AttentionPoolPrr: every token asks, nothing is learned
        return 2 * tokens**2 * pool.num_heads * pool.head_dim
    queries = sum(_weights(part) for part in (pool.q, pool.proj, pool.mlp) if part is not None)
    attention = 2 * tokens * pool.num_heads * pool.head_dim
    return tokens * _weights(pool.kv) + pool.latent_len * (queries + attention)


def solve_r(model: nn.Module, macs_ratio: float, reduction: Reduction | None = None) -> int:
    """The smallest r whose cost is at most `macs_ratio` of the dense model's, by `count_macs`.

    Args:
        model: a timm VisionTransformer, patched or not.
        macs_ratio: wanted over dense MACs, in (0, 1]; above 1 it is read as dense over wanted, so 1.7 means 1 / 1.7.
        reduction: a ToMe or PPT whose other settings hold. None: the one that the model is patched with, else ToMe().

    Raises:
        ValueError: a ratio that no r reaches, with the smallest that one does. TypeError: a reduction without r.
        NotImplementedError: another model.
    """
    op = "solve_r"
    _check_model(op, model)
    if reduction is None:
        record = model.__dict__.get(RECORD)
        reduction = record.reduction if record is not None and record.reduction is not None else ToMe()
    if not isinstance(reduction, ToMe | PPT):
        raise TypeError(f"{op}: reduction must be ToMe or PPT, got {type(reduction).__name__}; see at_cost")
    high = model.patch_embed.num_patches
    return _cheapest_step(op, model, macs_ratio, high, lambda r: _with_r(reduction, r))


def at_cost(model: nn.Module, macs_ratio: float, reduction: Reduction) -> Reduction:
    """`reduction` with the r (ToMe, PPT) or keep rate (EViT, TopK) that brings the model to a wanted cost.

    Keep rates are tried in steps of one patch of the full grid. Arguments and errors as `solve_r`.
    """
    op = "at_cost"
    _check_model(op, model)
    if isinstance(reduction, ToMe | PPT):
        return _with_r(reduction, solve_r(model, macs_ratio, reduction))
    if not isinstance(reduction, EViT | TopK):
        raise TypeError(f"{op}: reduction must be ToMe, PPT, EViT or TopK, got {type(reduction).__name__}")
    patches = model.patch_embed.num_patches

    def with_fewer(count: int) -> Reduction:
        return dataclasses.replace(reduction, keep_rate=(patches - count) / patches)

    return with_fewer(_cheapest_step(op, model, macs_ratio, patches - 1, with_fewer))


def calibrate(
    model: nn.Module, loader: Iterable, prune_share: float, *, per_block: bool = False
) -> float | tuple[float, ...]:
    """PPT's threshold for a wanted share of pruned images, measured on images.

    What an earlier block does changes the scores of the later ones, so the loader is read once for each block that
    reduces. The model keeps its PPT, with the new threshold.

    Args:
        model: patched with a PPT.
        loader: iterable (no iterator), read several times, of images `[B, 3, H, W]` or of tuples that start with them.
        prune_share: in [0, 1], of the (image, block) pairs that are to be pruned and not merged.
        per_block: one threshold for each block of the PPT, found block by block, so that each prunes that share of the
            images; else one number for all, for which blocks differ in their share, and which is met less exactly.

    Raises:
        ValueError: the model is not patched with a PPT, an empty loader, a share outside [0, 1].
        TypeError: a loader that is none, or that can be read only once.
    """
    op = "calibrate"
    record = getattr(model, "__dict__", {}).get(RECORD)
    if record is None or not isinstance(record.reduction, PPT):
        raise ValueError(f"{op}: model must be patched with a PPT; call patch(model, PPT(...)) first")
    if isinstance(prune_share, bool) or not isinstance(prune_share, int | float) or not 0 <= prune_share <= 1:
        raise ValueError(f"{op}: prune_share must be a number in [0, 1], got {prune_share!r}")
    if not isinstance(loader, Iterable) or isinstance(loader, Iterator):
        raise TypeError(
            f"{op}: loader must be an iterable that can be read several times, got {type(loader).__name__}; "
            "give a list or a DataLoader"
        )
    ppt: PPT = record.reduction
    if per_block:
        thresholds = [float("inf")] * len(ppt.blocks)
        for block in sorted(ppt.blocks):
            place = ppt.blocks.index(block)
            spreads = score_spreads(model, loader, dataclasses.replace(ppt, threshold=thresholds))
            thresholds[place] = _quantile(spreads[block], prune_share)
        found = tuple(thresholds)
    else:
        found = float("inf")
        for _ in ppt.blocks:
            spreads = score_spreads(model, loader, dataclasses.replace(ppt, threshold=found))
            found = _quantile(torch.cat(list(spreads.values())), prune_share)
    patch(model, dataclasses.replace(ppt, threshold=found), trace=record.trace, linear=record.linear)
    return found


def _check_model(op: str, model: nn.Module) -> None:
    if not isinstance(model, VisionTransformer):
        raise NotImplementedError(f"{op}: model must be a timm VisionTransformer, got {type(model).__name__}")


def _weights(module: nn.Module) -> int:
    """Entries of the matrices: biases, norms and scales multiply nothing that counts."""
    return sum(p.numel() for p in module.parameters() if p.dim() >= 2)


def _with_r(reduction: ToMe | PPT, r: int) -> Reduction:
    if isinstance(reduction, ToMe) and isinstance(reduction.r, tuple):
        return dataclasses.replace(reduction, r=(r, reduction.r[1]))
    return dataclasses.replace(reduction, r=r)


def _cheapest_step(op: str, model: nn.Module, macs_ratio: float, high: int, make: Callable[[int], Reduction]) -> int:
    """The smallest step in [0, high] whose reduction costs at most macs_ratio of the dense model."""
    if isinstance(macs_ratio, bool) or not isinstance(macs_ratio, int | float):
        raise TypeError(f"{op}: macs_ratio must be a number, got {macs_ratio!r}")
    if not macs_ratio > 0:
        raise ValueError(f"{op}: macs_ratio must be above 0, got {macs_ratio}")
    wanted = 1 / macs_ratio if macs_ratio > 1 else macs_ratio
    dense = count_macs(model, ToMe(0))

    def share(step: int) -> float:
        return count_macs(model, make(step)) / dense

    if share(high) > wanted:
        raise ValueError(f"{op}: macs_ratio must be at least {share(high):.3f} for this model, got {wanted:.3f}")
    low = 0
    while low < high:  # the cost falls with every step
        middle = (low + high) // 2
        low, high = (low, middle) if share(middle) <= wanted else (middle + 1, high)
    return low


def _quantile(spread: Tensor, prune_share: float) -> float:
    """A threshold that round(prune_share * S) of the S values reach: half-way to the next value."""
    spread = spread.sort(descending=True).values.double()
    count = round(prune_share * len(spread))
    if count == 0:
        return float("inf")
    return 0.0 if count == len(spread) else float((spread[count - 1] + spread[count]) / 2)


@torch.no_grad()
def score_spreads(model: nn.Module, loader: Iterable, ppt: PPT) -> dict[int, Tensor]:
    """The spread (`score_spread`, in `ppt.criterion`) of every image's token scores in every block of a PPT.

    Args:
        model: patched with a reduction in the blocks of `ppt`, which serves in its place while this runs.
        loader: iterable of images `[B, 3, H, W]` or of tuples that start with them.

    Returns:
        block -> float32 `[images]`, in the loader's order; at `ppt.threshold` of that block and above, PPT prunes.

    Raises:
        ValueError: an empty loader, NaN scores.
    """
    seen: dict[int, list[Tensor]] = {block: [] for block in ppt.blocks}

    class Recorder(PPT):
        def plan(self, block, depth, aux, metric, num_prefix):
            spread = score_spread(token_scores(aux, self.score, num_prefix), self.criterion)
            seen[block].append(spread.cpu())
            return super().plan(block, depth, aux, metric, num_prefix)

    recorder = Recorder(**{f.name: getattr(ppt, f.name) for f in dataclasses.fields(ppt)})
    parameter = next(model.parameters())
    roles = [block.__dict__[ROLE] for block in model.blocks if ROLE in block.__dict__]
    before, training = [role.reduction for role in roles], model.training
    model.eval()
    try:
        for role in roles:
            role.reduction = recorder
        for batch in loader:
            images = batch[0] if isinstance(batch, tuple | list) else batch
            if not isinstance(images, Tensor):
                raise TypeError(
                    f"calibrate: loader must give images or tuples that start with them, got {type(images).__name__}"
                )
            model(images.to(parameter.device, parameter.dtype))
    finally:
        for role, reduction in zip(roles, before, strict=True):
            role.reduction = reduction
        model.train(training)
    if not all(seen.values()):
        raise ValueError("calibrate: loader must give at least one batch of images, got none")
    return {block: torch.cat(spreads) for block, spreads in seen.items()}

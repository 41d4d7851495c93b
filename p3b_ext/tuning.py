"""Settings from a target: token counts and multiplications of a model, `solve_r` for a wanted cost, `calibrate` for a
wanted share of pruned images."""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, overload

import torch
from torch import Tensor, nn

from .models import family_of
from .patch import current_reduction
from .plan import score_spread, token_scores
from .reducing_blocks import Model, blocks_that_reduce, depth_of, override, record_of, reducing
from .reduction import PPT, EViT, Reduction, ToMe, TopK


def token_counts(model: nn.Module, reduction: Reduction | None = None) -> list[tuple[int, int]]:
    """How many tokens the attention and the MLP of each block see, prefix included, at the model's image size.

    Args:
        model: a timm VisionTransformer, patched or not.
        reduction: as if patched with this one; None: with the one that it is patched with, if any.

    Raises:
        NotImplementedError: another model. TypeError, ValueError: a reduction that is none, or not one for this model.
    """
    family_of("token_counts", model)
    if reduction is not None and not isinstance(reduction, Reduction):
        raise TypeError(
            f"token_counts: reduction must be ToMe, PPT, EViT, TopK or None, got {type(reduction).__name__}"
        )
    if reduction is None:
        reduction = current_reduction(model)
    vit: Model = model
    n, depth, counts = vit.patch_embed.num_patches + vit.num_prefix_tokens, depth_of(vit), []
    active = [] if reduction is None else blocks_that_reduce(vit, reduction)
    for block in range(depth):
        before = n
        if reduction is not None and block in active:
            n = reduction.tokens_after(block, depth, n, vit.num_prefix_tokens)
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
    return family_of("count_macs", model).count_macs(model, token_counts(model, reduction))


def pool_macs(model: nn.Module, reduction: Reduction | None = None) -> int:
    """Multiply-adds of an attention pooling for one image, 0 for a model without. Arguments as `token_counts`."""
    return family_of("pool_macs", model).pool_macs(model, token_counts(model, reduction)[-1][1])


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
    family_of(op, model)
    if reduction is None:
        reduction = current_reduction(model) or ToMe()
    if not isinstance(reduction, ToMe | PPT):
        raise TypeError(f"{op}: reduction must be ToMe or PPT, got {type(reduction).__name__}; see at_cost")
    high = _patches(model)
    return _cheapest_step(op, model, macs_ratio, high, lambda r: _with_r(reduction, r))


def at_cost(model: nn.Module, macs_ratio: float, reduction: Reduction) -> Reduction:
    """`reduction` with the r (ToMe, PPT) or keep rate (EViT, TopK) that brings the model to a wanted cost.

    Keep rates are tried in steps of one patch of the full grid. Arguments and errors as `solve_r`.
    """
    op = "at_cost"
    family_of(op, model)
    if isinstance(reduction, ToMe | PPT):
        return _with_r(reduction, solve_r(model, macs_ratio, reduction))
    if not isinstance(reduction, EViT | TopK):
        raise TypeError(f"{op}: reduction must be ToMe, PPT, EViT or TopK, got {type(reduction).__name__}")
    patches = _patches(model)

    def with_fewer(count: int) -> Reduction:
        return dataclasses.replace(reduction, keep_rate=(patches - count) / patches)

    return with_fewer(_cheapest_step(op, model, macs_ratio, patches - 1, with_fewer))


@overload
def calibrate(
    model: nn.Module, loader: Iterable, prune_share: float, *, per_block: Literal[False] = False
) -> float: ...


@overload
def calibrate(
    model: nn.Module, loader: Iterable, prune_share: float, *, per_block: Literal[True]
) -> tuple[float, ...]: ...


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
    record = record_of(model) if isinstance(model, nn.Module) else None
    ppt = None if record is None else record.shared.settings.reduction
    if record is None or not isinstance(ppt, PPT):
        raise ValueError(f"{op}: model must be patched with a PPT; call patch(model, PPT(...)) first")
    if isinstance(prune_share, bool) or not isinstance(prune_share, int | float) or not 0 <= prune_share <= 1:
        raise ValueError(f"{op}: prune_share must be a number in [0, 1], got {prune_share!r}")
    if not isinstance(loader, Iterable) or isinstance(loader, Iterator):
        raise TypeError(
            f"{op}: loader must be an iterable that can be read several times, got {type(loader).__name__}; "
            "give a list or a DataLoader"
        )
    shared = record.shared
    found: float | tuple[float, ...] = float("inf")
    if per_block:
        thresholds = [float("inf")] * len(ppt.blocks)
        for block in sorted(ppt.blocks):
            place = ppt.blocks.index(block)
            spreads = _spreads(op, model, loader, dataclasses.replace(ppt, threshold=thresholds))
            thresholds[place] = _quantile(spreads[block], prune_share)
        found = tuple(thresholds)
    else:
        for _ in ppt.blocks:
            spreads = _spreads(op, model, loader, dataclasses.replace(ppt, threshold=found))
            found = _quantile(torch.cat(list(spreads.values())), prune_share)
    shared.settings = dataclasses.replace(shared.settings, reduction=dataclasses.replace(ppt, threshold=found))
    return found


def _patches(model: Model) -> int:
    return model.patch_embed.num_patches


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


def score_spreads(model: nn.Module, loader: Iterable, ppt: PPT) -> dict[int, Tensor]:
    """The spread (`plan.score_spread`, in `ppt.criterion`) of every image's token scores in every block of a PPT.

    Args:
        model: patched with a reduction in the blocks of `ppt` and no others. `ppt` takes its place for the forwards of
            this thread while this runs; the model is in eval mode meanwhile.
        loader: iterable of images `[B, 3, H, W]` or of tuples that start with them.

    Returns:
        block -> float32 `[images]`, in the loader's order; at `ppt.threshold` of that block and above, PPT prunes.

    Raises:
        ValueError: the model is not patched with a reduction in these blocks, an empty loader, NaN scores.
        TypeError: ppt is no PPT, the loader gives something else than images.
    """
    op = "score_spreads"
    if not isinstance(ppt, PPT):
        raise TypeError(f"{op}: ppt must be a PPT, got {type(ppt).__name__}")
    record = record_of(model) if isinstance(model, nn.Module) else None
    vit: Model = model
    reduces = [] if record is None else [i for i, block in enumerate(vit.blocks) if reducing(block)]
    if sorted(ppt.blocks) != reduces:
        raise ValueError(f"{op}: model must be patched with a reduction in blocks {list(ppt.blocks)}, got {reduces}")
    return _spreads(op, model, loader, ppt)


@torch.no_grad()
def _spreads(op: str, model: nn.Module, loader: Iterable, ppt: PPT) -> dict[int, Tensor]:
    seen: dict[int, list[Tensor]] = {block: [] for block in ppt.blocks}

    class Recorder(PPT):
        def plan(self, block, depth, aux, metric, num_prefix):
            spread = score_spread(token_scores(aux, self.score, num_prefix), self.criterion)
            seen[block].append(spread.cpu())
            return super().plan(block, depth, aux, metric, num_prefix)

    recorder = Recorder(**{f.name: getattr(ppt, f.name) for f in dataclasses.fields(ppt)})
    parameter = next(model.parameters())
    with _evaluating(model), override(model, reduction=recorder):
        for batch in loader:
            images = batch[0] if isinstance(batch, tuple | list) else batch
            if not isinstance(images, Tensor):
                raise TypeError(
                    f"{op}: loader must give images or tuples that start with them, got {type(images).__name__}"
                )
            model(images.to(parameter.device, parameter.dtype))
    if not all(any(len(spread) for spread in spreads) for spreads in seen.values()):
        raise ValueError(f"{op}: loader must give at least one image, got none")
    return {block: torch.cat(spreads) for block, spreads in seen.items()}


_lock = threading.Lock()
_evaluated: dict[int, tuple[int, list[nn.Module]]] = {}  # id of a model -> threads in _evaluating, modules to set back


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode in the `with` block; the last thread to leave gives each module its mode back."""
    with _lock:
        count, training = _evaluated.get(id(model), (0, []))
        if count == 0:
            training = [module for module in model.modules() if module.training]
            model.eval()
        _evaluated[id(model)] = count + 1, training
    try:
        yield
    finally:
        with _lock:
            count, training = _evaluated.pop(id(model))
            if count > 1:
                _evaluated[id(model)] = count - 1, training
            else:
                for module in training:
                    module.training = True

"""ToMe, PPT, EViT, TopK: small objects that turn an attention's scores and keys into a TokenPlan for each block.

They hold settings and no state. `patch(model, reduction)` asks them, per block, whether tokens go there, which side
outputs the attention should give for it, and then for the plan.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

from torch import Tensor

from .ops.attention import AttentionAux
from .ops.select import keep_tokens
from .plan import (
    CLASS_SCORES,
    CRITERIA,
    SCORES,
    SPREAD_ROUNDING,
    TokenPlan,
    plan_fuse,
    plan_merge,
    plan_ppt,
    plan_prune,
    raw_scores,
    token_scores,
)

PPT_THRESHOLD = 7e-5  # variance of "cls_value" scores, for models used without fine-tuning (PPT)
BLOCKS = (3, 6, 9)  # where PPT and EViT reduce a 12-block model


class Reduction:
    """The interface of a token reduction, as `patch` uses it. Blocks are counted from 0."""

    proportional = False  # later attention adds the log of the token sizes to its logits
    merges = False  # tokens come to stand for several patches, so that sizes must be kept
    needs_metric: bool | str = False  # plan reads the keys averaged over heads; "heads": the keys, for it to average

    @property
    def aux(self) -> tuple[str, ...]:
        """Side outputs of the attention that plan reads."""
        return ()

    def validate(self, depth: int, has_class_token: bool) -> None:
        """Raise ValueError where a model of `depth` blocks cannot be reduced so."""
        raise NotImplementedError

    def reduces(self, block: int, depth: int) -> bool:
        """Whether tokens go in this block."""
        raise NotImplementedError

    def tokens_after(self, block: int, depth: int, n: int, num_prefix: int) -> int:
        """How many of n tokens this block's MLP sees."""
        raise NotImplementedError

    def plan(self, block: int, depth: int, aux: AttentionAux, metric: Tensor | None, num_prefix: int) -> TokenPlan:
        """The plan for one block that reduces."""
        raise NotImplementedError

    def reduce(
        self,
        block: int,
        depth: int,
        x: Tensor,
        size: Tensor | None,
        aux: AttentionAux,
        metric: Tensor | None,
        num_prefix: int,
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, N, C] and its sizes [B, N] (None: 1 each) after the plan, for a block whose plan is not needed itself;
        the sizes may be None where tokens do not merge."""
        return self.plan(block, depth, aux, metric, num_prefix).apply(x, size)


@dataclass(frozen=True)
class ToMe(Reduction):
    """Merge similar tokens in every block (Bolya et al., ICLR 2023).

    r: tokens per block: an int; (r, inflection), which goes linearly from r (1 - inflection) in the first block to
        r (1 + inflection) in the last; or a list with one int per block, zeros behind its end. Never more than half of
        the tokens after the prefix, as published.
    proportional: later attention counts a token as often as it stands for a patch; for models trained without merging.
    source: None, or ToMe's variants, as in `plan_merge`: an int k or "random".
    """

    r: int | tuple[int, float] | list[int] = 13
    proportional: bool = True
    source: int | str | None = None

    merges = True
    needs_metric = "heads"

    def __post_init__(self) -> None:
        name = "ToMe"
        if isinstance(self.r, tuple):
            if len(self.r) != 2:
                raise ValueError(f"{name}: r must be an int, (r, inflection) or a list, got a tuple of {len(self.r)}")
            _check_int(name, "r", self.r[0])
            _check_real(name, "inflection", self.r[1], -1.0, 1.0)
        elif isinstance(self.r, list):
            for r in self.r:
                _check_int(name, "r", r)
        else:
            _check_int(name, "r", self.r)
        _check_flag(name, "proportional", self.proportional)
        if isinstance(self.source, str) and self.source != "random":
            raise ValueError(f"{name}: source must be None, an int or 'random', got {self.source!r}")
        if self.source is not None and not isinstance(self.source, str):
            _check_int(name, "source", self.source, 2)

    def schedule(self, depth: int) -> list[int]:
        """Tokens to merge in each of `depth` blocks."""
        if isinstance(self.r, list):
            return [*self.r, *[0] * (depth - len(self.r))]
        r, inflection = self.r if isinstance(self.r, tuple) else (self.r, 0.0)
        low = int(r * (1.0 - inflection))
        step = 2 * (r - low) / max(depth - 1, 1)
        return [int(low + step * block) for block in range(depth)]

    def validate(self, depth: int, has_class_token: bool) -> None:
        if isinstance(self.r, list) and len(self.r) > depth:
            raise ValueError(
                f"ToMe: r must have at most {depth} entries for a model of {depth} blocks, got {len(self.r)}"
            )

    def reduces(self, block: int, depth: int) -> bool:
        return self.schedule(depth)[block] > 0

    def tokens_after(self, block: int, depth: int, n: int, num_prefix: int) -> int:
        r, free = self.schedule(depth)[block], n - num_prefix
        if self.source is None:
            return n - min(r, free // 2)
        if isinstance(self.source, str):
            return n - min(r, max(free - 1, 0))
        destinations = n // self.source - num_prefix // self.source
        return n - (min(r, free - destinations) if destinations else 0)

    def plan(self, block: int, depth: int, aux: AttentionAux, metric: Tensor | None, num_prefix: int) -> TokenPlan:
        r = self.schedule(depth)[block]
        return plan_merge(metric, r, num_prefix, source=self.source)  # type: ignore[arg-type]  # needs_metric


@dataclass(frozen=True)
class PPT(Reduction):
    """Per image, drop unimportant tokens where the scores differ much, else merge similar ones (Wu et al., 2023).

    r: tokens per block of `blocks`, an int or one int for each.
    threshold: images with a spread of scores of at least this are pruned; a number, or one for each block.
        None: 7e-5 for "cls_value" in variance, as published; for anything else give one or let `calibrate` find it.
    score: as in `token_scores`. criterion: "variance" as published, or "cv2" (see `plan_ppt`).
    proportional: as in ToMe.
    """

    r: int | Sequence[int] = 50
    blocks: Sequence[int] = BLOCKS
    threshold: float | Sequence[float] | None = None
    score: str = "cls_value"
    proportional: bool = True
    criterion: str = "variance"

    merges = True
    needs_metric = "heads"

    def __post_init__(self) -> None:
        name = "PPT"
        _freeze(self, "blocks", "r", "threshold")
        _check_blocks(name, self.blocks)
        for r in _each(name, "r", self.r, self.blocks):
            _check_int(name, "r", r)
        _check_score(name, self.score)
        _check_flag(name, "proportional", self.proportional)
        if self.criterion not in CRITERIA:
            raise ValueError(f"{name}: criterion must be one of {', '.join(CRITERIA)}, got {self.criterion!r}")
        if self.threshold is not None:
            for threshold in _each(name, "threshold", self.threshold, self.blocks):
                _check_real(name, "threshold", threshold, -math.inf, math.inf)

    @property
    def aux(self) -> tuple[str, ...]:
        return SCORES[self.score]

    def validate(self, depth: int, has_class_token: bool) -> None:
        _check_depth("PPT", self.blocks, depth)
        _check_class_token("PPT", self.score, has_class_token)

    def reduces(self, block: int, depth: int) -> bool:
        return block in self.blocks

    def tokens_after(self, block: int, depth: int, n: int, num_prefix: int) -> int:
        return n - min(self._r(block), (n - num_prefix) // 2) if block in self.blocks else n

    def plan(self, block: int, depth: int, aux: AttentionAux, metric: Tensor | None, num_prefix: int) -> TokenPlan:
        scores, threshold = token_scores(aux, self.score, num_prefix), self.threshold_of(block)
        r = self._r(block)
        return plan_ppt(scores, metric, r, threshold, num_prefix, criterion=self.criterion)  # type: ignore[arg-type]

    def prunes(self, block: int, spread: Tensor) -> Tensor:
        """Whether images of these spreads of scores `[images]` (`p3b_ext.score_spreads`) are pruned in one of `blocks`,
        bool `[images]`; the others merge."""
        return spread * (1 + SPREAD_ROUNDING) >= self.threshold_of(block)

    def threshold_of(self, block: int) -> float:
        """The threshold in one of `blocks`; ValueError where there is none yet."""
        if self.threshold is not None:
            return _each("PPT", "threshold", self.threshold, self.blocks)[self.blocks.index(block)]
        if self.score == "cls_value" and self.criterion == "variance":
            return PPT_THRESHOLD
        raise ValueError(
            f"PPT: threshold must be given for score {self.score!r} by {self.criterion!r}, got None; "
            "p3b_ext.calibrate(model, loader, prune_share) finds one"
        )

    def _r(self, block: int) -> int:
        return _each("PPT", "r", self.r, self.blocks)[self.blocks.index(block)]


@dataclass(frozen=True)
class _KeepBest(Reduction):
    """Keep a share of the tokens after the prefix, the ones with the highest scores."""

    keep_rate: float | Sequence[float] = 0.7
    blocks: Sequence[int] = BLOCKS

    def __post_init__(self) -> None:
        name = type(self).__name__
        _freeze(self, "blocks", "keep_rate")
        _check_blocks(name, self.blocks)
        for rate in _each(name, "keep_rate", self.keep_rate, self.blocks):
            _check_number(name, "keep_rate", rate)
            if not 0 < rate <= 1:
                raise ValueError(f"{name}: keep_rate must be in (0, 1], got {rate}")

    def reduces(self, block: int, depth: int) -> bool:
        return block in self.blocks

    def keep(self, block: int, n: int) -> int:
        """How many of n tokens after the prefix stay: ceil(keep_rate n), as EViT publishes."""
        rate = _each(type(self).__name__, "keep_rate", self.keep_rate, self.blocks)[self.blocks.index(block)]
        return math.ceil(rate * n - 1e-9)  # 0.55 * 100 is a little more than 55


@dataclass(frozen=True)
class EViT(_KeepBest):
    """Keep the tokens that the class token attends to most and fuse all others into one more (Liang et al., ICLR 2022).

    keep_rate: in (0, 1], of the tokens after the prefix; a number, or one for each block of `blocks`.
    fuse: the fused token is the sum of the others weighted by the class token's attention; False drops them.
    """

    fuse: bool = True

    aux = ("cls_attention",)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_flag("EViT", "fuse", self.fuse)

    def validate(self, depth: int, has_class_token: bool) -> None:
        _check_depth("EViT", self.blocks, depth)
        _check_class_token("EViT", "cls", has_class_token)

    def tokens_after(self, block: int, depth: int, n: int, num_prefix: int) -> int:
        if block not in self.blocks:
            return n
        keep = self.keep(block, n - num_prefix)
        return num_prefix + keep + (1 if self.fuse and keep < n - num_prefix else 0)

    def plan(self, block: int, depth: int, aux: AttentionAux, metric: Tensor | None, num_prefix: int) -> TokenPlan:
        # Not token_scores: the fused token is published with the attention as it is, not normalised over the patches.
        attention = aux.cls_attention.mean(1)[:, num_prefix:]  # type: ignore[union-attr]
        n = attention.shape[1]
        if self.fuse:
            return plan_fuse(attention, self.keep(block, n), num_prefix)
        return plan_prune(attention, n - self.keep(block, n), num_prefix)


@dataclass(frozen=True)
class TopK(_KeepBest):
    """Keep the tokens with the highest scores, drop the others.

    keep_rate: in (0, 1], of the tokens after the prefix; a number, or one for each block of `blocks`.
    score: as in `token_scores`.
    """

    score: str = "cls_value"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_score("TopK", self.score)

    @property
    def aux(self) -> tuple[str, ...]:
        return SCORES[self.score]

    def validate(self, depth: int, has_class_token: bool) -> None:
        _check_depth("TopK", self.blocks, depth)
        _check_class_token("TopK", self.score, has_class_token)

    def tokens_after(self, block: int, depth: int, n: int, num_prefix: int) -> int:
        return num_prefix + self.keep(block, n - num_prefix) if block in self.blocks else n

    def plan(self, block: int, depth: int, aux: AttentionAux, metric: Tensor | None, num_prefix: int) -> TokenPlan:
        scores = raw_scores("TopK", aux, self.score, num_prefix)
        return plan_prune(scores, scores.shape[1] - self.keep(block, scores.shape[1]), num_prefix)

    def reduce(
        self,
        block: int,
        depth: int,
        x: Tensor,
        size: Tensor | None,
        aux: AttentionAux,
        metric: Tensor | None,
        num_prefix: int,
    ) -> tuple[Tensor, Tensor | None]:
        if type(self).plan is not TopK.plan:  # a subclass that plans otherwise
            return super().reduce(block, depth, x, size, aux, metric, num_prefix)
        names = SCORES[self.score]
        value_norm = aux.value_norm if "value_norm" in names else None
        keep = self.keep(block, x.shape[1] - num_prefix)
        return keep_tokens(x, getattr(aux, names[0]), value_norm, keep, num_prefix)[0], None


# Checks --------------------------------------------------------------------------------------------------------------


def _freeze(reduction: Reduction, *names: str) -> None:
    """Lists become tuples, so that a reduction is hashable and cannot change later."""
    for name in names:
        value = getattr(reduction, name)
        if isinstance(value, Sequence) and not isinstance(value, str):
            object.__setattr__(reduction, name, tuple(value))


def _each(op: str, name: str, value, blocks: Sequence[int]) -> tuple:
    """One value for each block."""
    if not isinstance(value, tuple):
        return (value,) * len(blocks)
    if len(value) != len(blocks):
        raise ValueError(f"{op}: {name} must have one value for each of {len(blocks)} blocks, got {len(value)}")
    return value


def _check_int(op: str, name: str, value, low: int = 0) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{op}: {name} must be an int, got {value!r}")
    if value < low:
        raise ValueError(f"{op}: {name} must be at least {low}, got {value}")


def _check_number(op: str, name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{op}: {name} must be a number, got {value!r}")


def _check_real(op: str, name: str, value, low: float, high: float) -> None:
    _check_number(op, name, value)
    if not low <= value <= high:
        raise ValueError(f"{op}: {name} must be between {low} and {high}, got {value}")


def _check_flag(op: str, name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False, got {value!r}")


def _check_score(op: str, score: str) -> None:
    if not isinstance(score, str) or score not in SCORES:
        raise ValueError(f"{op}: score must be one of {', '.join(SCORES)}, got {score!r}")


def _check_blocks(op: str, blocks) -> None:
    if not isinstance(blocks, tuple):
        raise TypeError(f"{op}: blocks must be a sequence of ints, got {blocks!r}")
    for block in blocks:
        _check_int(op, "blocks", block)
    if len(set(blocks)) != len(blocks):
        raise ValueError(f"{op}: blocks must be different ones, got {list(blocks)}")


def _check_depth(op: str, blocks: Sequence[int], depth: int) -> None:
    for block in blocks:
        if block >= depth:
            raise ValueError(f"{op}: blocks must be between 0 and {depth - 1} for this model, got {block}")


def _check_class_token(op: str, score: str, has_class_token: bool) -> None:
    if score in CLASS_SCORES and not has_class_token:
        usable = ", ".join(name for name in SCORES if name not in CLASS_SCORES)
        raise ValueError(f"{op}: score must be one of {usable} for a model without class token, got {score!r}")

"""TokenPlan: one integer map for pruning, merging and fusing tokens; and the functions that make one.

Everything here has static shapes and reads nothing back to the host: it compiles with fullgraph=True and exports.
Letters: B batch, H heads, N tokens in, M tokens out, C model channels. Prefix: class, distillation, register tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .backends import check_values, positive_finite
from .ops.attention import AttentionAux
from .ops.checks import MOST_TOKENS, check_device, check_int, check_number, check_shape, check_tensor
from .ops.merge import check_metric, choose_for, match_or_prune, match_tokens, merge_tokens, unmerge_tokens
from .ops.select import ORDERS, prune_slots, select_tokens, topk_tokens
from .reference import acc_dtype

SCORES = {  # score -> the side outputs it is computed from
    "cls_value": ("cls_attention", "value_norm"),
    "entropy_value": ("entropy", "value_norm"),
    "cls": ("cls_attention",),
    "to_cls": ("to_cls",),
    "received": ("received",),
}
CLASS_SCORES = ("cls_value", "cls", "to_cls")  # these need a class token
CRITERIA = ("variance", "cv2")
# Thresholds are often the spread of a measured image; rounding, which differs by backend, must not decide its policy.
SPREAD_ROUNDING = 1e-5


@dataclass(frozen=True, eq=False)
class TokenPlan:
    """Where every token goes: input token n of image b to output row slot[b, n].

    slot: int32 `[B, N]`, -1 = dropped.
    num_out: M, the number of rows.
    weight: `[B, N]`, of the tokens within their row; None: their sizes.
    normalize: divide each row by the sum of its weights (a mean) or not (a sum).
    index: int64 `[B, M]`, the one token of each row, where the plan only selects.
    """

    slot: Tensor
    num_out: int
    weight: Tensor | None = None
    normalize: bool = True
    index: Tensor | None = None

    def apply(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Reduce x `[B, N, C]` and size `[B, N]` (None: 1 each) to y `[B, M, C]` and their sizes `[B, M]`.

        Equivalent, with w = weight, else size, to `y[b, m] = sum_{slot[b, n] = m} w x / sum w`; sizes are summed.
        Differentiable in x, size and weight. Sizes are float32 (float64 beside float64 x).

        Raises:
            ValueError: x is not of the batch and length that the plan was made for; sizes not > 0 and finite.
        """
        op = "TokenPlan.apply"
        check_tensor(op, "x", x, "B N C")
        if x.shape[:2] != self.slot.shape:
            raise ValueError(
                f"{op}: x must be [{self.slot.shape[0]}, {self.slot.shape[1]}, C] as the plan was made for, "
                f"got shape {list(x.shape)}"
            )
        if size is not None:
            check_tensor(op, "size", size, "B N", x)
            check_shape(op, "size", size, tuple(self.slot.shape))
        if self.index is None:
            return merge_tokens(x, self.slot, self.num_out, size, self.weight, self.normalize)
        y = select_tokens(x, self.index)
        dtype = acc_dtype(x.dtype)
        if size is None:
            return y, torch.ones(self.index.shape, dtype=dtype, device=x.device)
        check_values(op, "size", size, positive_finite, "> 0 and finite")  # no kernel checks it on this path
        return y, size.to(dtype).gather(1, self.index)

    def restore(self, y: Tensor, fill: float = 0.0) -> Tensor:
        """Bring y `[B, M, C]` back to `[B, N, C]`: every token gets its row, dropped tokens `fill`.

        Equivalent to `where(slot >= 0, y.gather(1, slot), fill)`. Differentiable in y.
        """
        check_tensor("TokenPlan.restore", "y", y, "B M C")
        fill = check_number("TokenPlan.restore", "fill", fill)
        if y.shape[:2] != (self.slot.shape[0], self.num_out):
            raise ValueError(
                f"TokenPlan.restore: y must be [{self.slot.shape[0]}, {self.num_out}, C] as the plan puts out, "
                f"got shape {list(y.shape)}"
            )
        return unmerge_tokens(y, self.slot, fill)

    def compose(self, then: "TokenPlan") -> "TokenPlan":
        """The plan that does this and then `then`: one map from this plan's input to that one's output.

        Equivalent to `where(slot >= 0, then.slot.gather(1, slot), -1)`.

        Raises:
            ValueError: `then` is for another batch or another number of tokens; slots outside [-1, M) (on a GPU only
                with P3B_EXT_CHECK=1).
            NotImplementedError: a mean of one plan inside a weighted sum of the other, which no single plan computes.
        """
        op = "TokenPlan.compose"
        if not isinstance(then, TokenPlan):
            raise TypeError(f"{op}: then must be a TokenPlan, got {type(then).__name__}")
        if then.slot.shape != (self.slot.shape[0], self.num_out):
            raise ValueError(
                f"{op}: then must be a plan for [{self.slot.shape[0]}, {self.num_out}] tokens, "
                f"got one for {list(then.slot.shape)}"
            )
        self._check_slots(op, "slot")
        then._check_slots(op, "then.slot")
        slot = follow(self.slot, then.slot)
        if self.index is not None and then.index is not None:
            return TokenPlan(slot, then.num_out, index=self.index.gather(1, then.index))
        if self.weight is None and then.weight is None:
            if all(plan.normalize or plan.index is not None for plan in (self, then)):
                return TokenPlan(slot, then.num_out)  # means of means weighted by size are means
        elif not any(plan.normalize and plan.index is None for plan in (self, then)):
            weight = _ones_or(then.weight, then.slot, self.weight).gather(1, self.slot.clamp_min(0).long())
            weight = torch.where(self.slot >= 0, weight * _ones_or(self.weight, self.slot, then.weight), 0)
            return TokenPlan(slot, then.num_out, weight, normalize=False)
        raise NotImplementedError(
            f"{op}: no single plan computes a mean inside a weighted sum; apply the plans one after the other"
        )

    def _check_slots(self, op: str, name: str) -> None:
        expected = f"between -1 and {self.num_out - 1}"
        check_values(op, name, self.slot, lambda s: (s >= -1) & (s < self.num_out), expected)


def follow(slot: Tensor, then: Tensor) -> Tensor:
    """Where tokens are after the map `then` [B, M], given where they were before it: slot [B, N]; -1 stays -1."""
    return torch.where(slot >= 0, then.gather(1, slot.clamp_min(0).long()), -1)


def _ones_or(weight: Tensor | None, slot: Tensor, like: Tensor | None) -> Tensor:
    """weight, or ones of the dtype of `like`: one of the two is a tensor."""
    if weight is not None:
        return weight
    return torch.ones(slot.shape, dtype=None if like is None else like.dtype, device=slot.device)


def token_scores(aux: AttentionAux, method: str, num_prefix: int = 1) -> Tensor:
    """How important each token after the prefix is, from the attention's side outputs; sums to 1 in every image.

    With A the attention `[B, H, N, N]`, v the values of all heads, E the entropy of each query's attention:

    - "cls_value": sum_h A[h, 0, i] |v_i| (ATS, ECCV 2022; PPT; the thesis's baseline)
    - "entropy_value": mean_h E[h, i] |v_i| (Kulboboev's thesis, diversity score)
    - "cls": mean_h A[h, 0, i] (EViT, ICLR 2022; the thesis's average score)
    - "to_cls": mean_h A[h, i, 0], attention paid to the class token
    - "received": mean_h mean_q A[h, q, i], attention received from all tokens (LTMP, MCTF)

    Args:
        aux: from `masked_attention(..., aux=...)` with the side outputs that `p3b_ext.plan.SCORES[method]` names.
        method: a name from above.
        num_prefix: tokens in front without a score. The class token is token 0.

    Returns:
        `[B, N - num_prefix]`, float32 (float64 for float64 inputs). All zero scores become equal ones.

    Raises:
        ValueError: an unknown method, a side output that is missing, a class score without a class token, more prefix
            tokens than there are tokens. TypeError: aux is something else.
    """
    score = raw_scores("token_scores", aux, method, num_prefix)
    total = score.sum(1, keepdim=True)
    return torch.where(total == 0, 1 / max(score.shape[1], 1), score / total)


def raw_scores(op: str, aux: AttentionAux, method: str, num_prefix: int) -> Tensor:
    """`token_scores` without the division by their sum, which changes no order."""
    if not isinstance(aux, AttentionAux):
        raise TypeError(
            f"{op}: aux must be an AttentionAux, got {type(aux).__name__}; masked_attention(..., aux=...) gives one"
        )
    if not isinstance(method, str) or method not in SCORES:
        raise ValueError(f"{op}: method must be one of {', '.join(SCORES)}, got {method!r}")
    needed = SCORES[method]
    missing = [name for name in needed if getattr(aux, name) is None]
    if missing:
        raise ValueError(f"{op}: aux must hold {', '.join(missing)} for {method!r}; ask masked_attention(aux={needed})")
    for name in needed:
        check_tensor(op, name, getattr(aux, name), "B N" if name == "value_norm" else "B H N", getattr(aux, needed[0]))
    norm = aux.value_norm if "value_norm" in needed else None
    if norm is not None:
        batch, _, tokens = getattr(aux, needed[0]).shape
        check_shape(op, "value_norm", norm, (batch, tokens))
    score = getattr(aux, needed[0]).mean(1)
    num_prefix = check_int(op, "num_prefix", num_prefix, 1 if method in CLASS_SCORES else 0, score.shape[1])
    if norm is not None:
        score = score * norm
    return score[:, num_prefix:]


def plan_prune(scores: Tensor, r: int, num_prefix: int = 1, order: str = "position") -> TokenPlan:
    """Drop the r tokens with the lowest scores.

    Args:
        scores: `[B, N - num_prefix]`.
        r: at most N - num_prefix tokens go; a larger r is lowered to that.
        num_prefix: tokens in front that always stay.
        order: "position", or "score": descending, as PPT publishes.

    Raises:
        ValueError: r negative, NaN scores, an unknown order. TypeError: r not an int.
    """
    op = "plan_prune"
    check_tensor(op, "scores", scores, "B N-num_prefix")
    r = check_int(op, "r", r, 0)
    num_prefix = check_int(op, "num_prefix", num_prefix, 0, MOST_TOKENS)
    keep = scores.shape[1] - min(r, scores.shape[1])
    index = topk_tokens(scores, keep, num_prefix, order)
    return _selection(index, scores.shape[1] + num_prefix)


def plan_fuse(scores: Tensor, keep: int, num_prefix: int = 1, weight: Tensor | None = None) -> TokenPlan:
    """Keep the best tokens and fuse all others into one extra token, the last: sum of weight_j x_j (EViT, ICLR 2022).

    Args:
        scores: `[B, N - num_prefix]`.
        keep: tokens after the prefix that stay; at N - num_prefix nothing is fused.
        weight: `[B, N - num_prefix]` of the fused tokens. Default: scores.
    """
    op = "plan_fuse"
    check_tensor(op, "scores", scores, "B N-num_prefix")
    batch, n = scores.shape
    keep = check_int(op, "keep", keep, 0, n)
    num_prefix = check_int(op, "num_prefix", num_prefix, 0, MOST_TOKENS)
    slot = prune_slots(scores, n - keep, num_prefix)
    if keep == n:
        return TokenPlan(
            slot,
            num_prefix + n,
            index=torch.arange(num_prefix + n, device=slot.device, dtype=torch.int64).expand_as(slot),
        )
    weight = scores if weight is None else weight
    check_tensor(op, "weight", weight, "B N-num_prefix", scores)
    check_shape(op, "weight", weight, (batch, n))
    weight = torch.cat([weight.new_ones(batch, num_prefix), weight], 1)
    fused = slot < 0
    slot = torch.where(fused, num_prefix + keep, slot)
    return TokenPlan(slot, num_prefix + keep + 1, torch.where(fused, weight, 1), normalize=False)


def plan_merge(
    metric: Tensor,
    r: int,
    num_prefix: int = 1,
    *,
    source: int | str | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> TokenPlan:
    """Merge r tokens into their most similar partner: bipartite soft matching (ToMe, ICLR 2023).

    Each source finds the destination with the highest cosine similarity of `metric`; the r best pairs merge. Prefix
    tokens never merge and come out first, then unmerged sources, then destinations, each by position. Published ToMe
    lists the unmerged sources of a model without a class token by descending similarity; here they stay by position, so
    that rows come in the same order for every prefix. The tokens in the rows are the same.

    Args:
        metric: `[B, N, D]`, as published the keys averaged over heads; or those keys `[B, H, N, D]`.
        r: a larger r than there are pairs is lowered, as published: to (N - num_prefix) // 2 by default.
        source: which tokens may merge into the others. None: even positions. An int k: all but every k-th position
            (ToMe's every-k-th variant, which merges all of them: give a large r). "random": r tokens of each image,
            drawn anew (ToMe's random variant). A bool tensor `[B, N]` with at least r sources and one destination per
            image.
        generator: for "random", on metric's device.

    Raises:
        ValueError: r negative, NaN in metric, a source mask with too few, a generator on another device.
        TypeError: r not an int, generator not a torch.Generator.
    """
    op = "plan_merge"
    check_metric(op, metric)
    batch, n = metric.shape[0], metric.shape[-2]
    r = check_int(op, "r", r, 0)
    num_prefix = check_int(op, "num_prefix", num_prefix, 0, n)
    _check_generator(op, generator, metric)
    free = n - num_prefix
    if source is None:
        r = min(r, free // 2)
        return TokenPlan(match_tokens(metric, r, num_prefix), n - r)
    if isinstance(source, Tensor):
        return TokenPlan(match_tokens(metric, r, num_prefix, source), n - r)
    if isinstance(source, str):
        if source != "random":
            raise ValueError(f"{op}: source must be None, an int, 'random' or a bool tensor, got {source!r}")
        r = min(r, max(free - 1, 0))
        # the overload with a generator knows no symbolic sizes
        own: dict[str, Any] = {} if generator is None else {"generator": generator}
        noise = torch.rand(batch, free, device=metric.device, dtype=torch.float32, **own)
        mask = noise.argsort(1).argsort(1) < r
    else:
        source = check_int(op, "source", source, 2)
        destination = torch.arange(num_prefix, n, device=metric.device, dtype=torch.int64) % source == source - 1
        count = n // source - num_prefix // source  # destinations after the prefix
        r = min(r, free - count) if count else 0
        mask = (~destination).expand(batch, -1)
    mask = torch.cat([mask.new_zeros(batch, num_prefix), mask], 1)
    return TokenPlan(match_tokens(metric, r, num_prefix, mask), n - r)


def _check_generator(op: str, generator: torch.Generator | None, metric: Tensor) -> None:
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"{op}: generator must be a torch.Generator or None, got {type(generator).__name__}")
    if generator.device.type != metric.device.type:
        raise ValueError(f"{op}: generator must be on {metric.device}, got one on {generator.device}")


def plan_ppt(
    scores: Tensor,
    metric: Tensor,
    r: int,
    threshold: float | Tensor,
    num_prefix: int = 1,
    *,
    criterion: str = "variance",
) -> TokenPlan:
    """Per image: drop the r lowest scores where their spread reaches the threshold, else merge r tokens (PPT).

    One map for a mixed batch: `where(spread >= threshold, prune, merge)`. Pruned images keep their tokens in the order
    of their scores, as published.

    Args:
        scores: `[B, N - num_prefix]`, as `token_scores` gives them.
        metric: `[B, N, D]`, or the keys `[B, H, N, D]`, as in `plan_merge`.
        r: lowered to (N - num_prefix) // 2, as published.
        threshold: of `score_spread(scores, criterion)`, a relative 1e-5 short of it counts (rounding); a number, or
            a tensor that broadcasts to `[B]`.
        criterion: "variance" as published, or "cv2", which depends neither on the number of tokens nor on the scale of
            the scores.

    Raises:
        ValueError: r negative, threshold NaN, NaN scores, unlike shapes.
        TypeError: r not an int, threshold not a number.
    """
    op = "plan_ppt"
    check_metric(op, metric)
    batch, n = metric.shape[0], metric.shape[-2]
    num_prefix = check_int(op, "num_prefix", num_prefix, 0, n)
    check_tensor(op, "scores", scores, "B N-num_prefix", metric)
    check_shape(op, "scores", scores, (batch, n - num_prefix))
    r = check_int(op, "r", r, 0)
    _check_threshold(op, threshold, scores)
    r = min(r, scores.shape[1] // 2)
    if choose_for(op, metric) == "cuda" and criterion in CRITERIA:
        check_values(op, "scores", scores, lambda s: ~s.isnan(), "numbers, not NaN", backend="cuda")
        check_values(op, "metric", metric, torch.isfinite, "finite, not NaN or infinite", backend="cuda")
        number, each = (0.0, threshold) if isinstance(threshold, Tensor) else (float(threshold), None)
        if each is not None:
            each = each.to(scores.device, torch.float32).expand(batch)
        slot = match_or_prune(metric, scores.float(), number, each, r, num_prefix, criterion == "cv2")
        return TokenPlan(slot, n - r)
    prune = score_spread(scores, criterion) * (1 + SPREAD_ROUNDING) >= threshold
    pruned = prune_slots(scores, r, num_prefix, "score")
    merged = match_tokens(metric, r, num_prefix)
    return TokenPlan(torch.where(prune[:, None], pruned, merged), n - r)


def _check_threshold(op: str, threshold: float | Tensor, scores: Tensor) -> None:
    if not isinstance(threshold, Tensor):
        threshold = check_number(op, "threshold", threshold)
        if threshold != threshold:  # NaN; math.isnan would break the graph at a symbolic float
            raise ValueError(f"{op}: threshold must be a number, got nan")
        return
    if threshold.dtype == torch.bool or threshold.is_complex():
        raise TypeError(f"{op}: threshold must hold real numbers, got {threshold.dtype}")
    batch = scores.shape[0]
    if threshold.dim() > 1 or (threshold.dim() == 1 and threshold.shape[0] not in (1, batch)):
        raise ValueError(f"{op}: threshold must be a number or [{batch}], got shape {list(threshold.shape)}")
    if threshold.dim():
        check_device(op, "threshold", threshold, scores)
    check_values(op, "threshold", threshold, lambda t: ~t.isnan(), "numbers, not NaN")


def score_spread(scores: Tensor, criterion: str = "variance") -> Tensor:
    """PPT's criterion `[B]` of scores `[B, S]`: their unbiased variance, or with "cv2" that over the squared mean.

    For scores that sum to 1, cv2 = variance * S ** 2. float32 (a variance of 1e-5 is subnormal in float16).
    """
    if criterion not in CRITERIA:
        raise ValueError(f"score_spread: criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}")
    scores = scores.detach().to(acc_dtype(scores.dtype))
    mean = scores.mean(1, keepdim=True)
    spread = (scores - mean).square().sum(1) / max(scores.shape[1] - 1, 1)
    return spread if criterion == "variance" else spread / mean.squeeze(1).square()


def _selection(index: Tensor, n: int) -> TokenPlan:
    """The plan that keeps the tokens at index [B, M] out of n."""
    batch, m = index.shape
    rows = torch.arange(m, dtype=torch.int32, device=index.device).expand(batch, m)
    slot = torch.full((batch, n), -1, dtype=torch.int32, device=index.device).scatter(1, index, rows)
    return TokenPlan(slot, m, index=index)


__all__ = ["CRITERIA", "ORDERS", "SCORES", "TokenPlan"]
__all__ += ["plan_fuse", "plan_merge", "plan_ppt", "plan_prune", "score_spread", "token_scores"]

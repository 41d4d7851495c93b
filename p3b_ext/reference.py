"""The meaning of every op in plain PyTorch: the oracle of the tests, and the backend that runs anywhere.

Functions have the signature of the op of the same name in csrc/library.cpp. They are differentiable (twice), work on
every device and dtype, and materialise whatever they like. Letters: B batch, H heads, N tokens in, M tokens out,
D head channels, C model channels; acc = float32, or float64 for float64 inputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Bits of the `aux` and `which` arguments, shared with csrc/attention.h and kernels/attention.py.
CLS_ATTENTION, ENTROPY, VALUE_NORM = 1, 2, 4
TO_CLS, RECEIVED = 1, 2
TOKEN_SIZE, CHANNEL_GATE = 1, 2


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums, sizes, gates and side outputs have beside tensors of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _gated(x: Tensor, gate: Tensor | None) -> Tensor:
    """x [B, H, N, D] in acc dtype, its channels multiplied by gate [D] or [H, D]."""
    x = x.to(acc_dtype(x.dtype))
    if gate is None:
        return x
    return x * (gate if gate.dim() == 1 else gate[:, None, :])


def _allowed(x: Tensor, key_mask: Tensor | None) -> Tensor:
    """x [B, H, N, D] with zeros at masked keys: 0 * NaN must reach neither a sum nor a gradient."""
    return x if key_mask is None else x.masked_fill(~key_mask[:, None, :, None], 0.0)


def _logits(q, k, key_mask, token_size, channel_gate, scale) -> Tensor:
    """scale * q k^T + log(token_size), -inf at masked keys; acc [B, H, N, N]."""
    k = _allowed(k, key_mask)
    s = _gated(q, channel_gate) @ _gated(k, channel_gate).transpose(-1, -2) * scale
    if token_size is not None:
        s = s + token_size.log()[:, None, None, :]
    if key_mask is not None:
        s = s.masked_fill(~key_mask[:, None, None, :], -torch.inf)
    return s


def _softmax(s: Tensor) -> tuple[Tensor, Tensor]:
    """softmax and log-sum-exp over the last axis; a row of -inf gives zeros and -inf, and no NaN in any gradient."""
    dead = s.amax(-1, keepdim=True) == -torch.inf
    alive = s.masked_fill(dead, 0.0)
    p = alive.softmax(-1).masked_fill(dead, 0.0)
    lse = alive.logsumexp(-1).masked_fill(dead.squeeze(-1), -torch.inf)
    return p, lse


def masked_attention(q, k, v, key_mask, token_size, channel_gate, scale: float, aux: int):
    """softmax(scale q k^T + log size) v over the keys that key_mask allows, and the side outputs."""
    if torch.compiler.is_exporting() and key_mask is None and channel_gate is None and not aux & ENTROPY:
        return _exported_attention(q, k, v, token_size, scale, aux)
    s = _logits(q, k, key_mask, token_size, channel_gate, scale)
    p, lse = _softmax(s)
    out = (p @ _gated(_allowed(v, key_mask), channel_gate)).transpose(1, 2).to(q.dtype).contiguous()  # [B, N, H, D]
    none = lse.new_empty(0)
    cls_attention = p[:, :, 0].detach() if aux & CLS_ATTENTION else none
    entropy = none
    if aux & ENTROPY:  # lse - sum_j p_ij s_ij; both relative to the row's largest logit, so that nothing cancels
        z = torch.where(lse[..., None] == -torch.inf, 0.0, s - s.amax(-1, keepdim=True))  # NaN stays NaN
        pz = torch.where(p > 0, p * z, 0.0).sum(-1)
        entropy = torch.where(lse == -torch.inf, 0.0, z.exp().sum(-1).log() - pz).clamp_min(0.0).detach()
    value_norm = _gated(v, channel_gate).detach().square().sum((1, 3)).sqrt() if aux & VALUE_NORM else none
    return out, lse.detach(), cls_attention, entropy, value_norm


def _exported_attention(q, k, v, token_size, scale: float, aux: int):
    """The same through the one operator that every runtime knows and fuses; a graph without dead code has no lse."""
    bias = None if token_size is None else token_size.log()[:, None, None, :].to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).transpose(1, 2).contiguous()
    lse = _logits(q, k, None, token_size, None, scale).logsumexp(-1).detach()
    cls_attention = value_norm = none = q.new_empty(0, dtype=acc_dtype(q.dtype))
    if aux & CLS_ATTENTION:
        cls_attention = _logits(q[:, :, :1], k, None, token_size, None, scale).softmax(-1)[:, :, 0].detach()
    if aux & VALUE_NORM:
        value_norm = _gated(v, None).detach().square().sum((1, 3)).sqrt()
    return out, lse, cls_attention, none, value_norm


def attention_columns(q, k, lse, key_mask, token_size, channel_gate, scale: float, which: int):
    """Each query's attention to key 0, and the attention each key receives (mean over queries)."""
    s = _logits(q, k, key_mask, token_size, channel_gate, scale)
    p = torch.where(lse[..., None] == -torch.inf, 0.0, (s - lse[..., None]).exp()).detach()
    none = lse.new_empty(0)
    to_cls = p[..., 0].contiguous() if which & TO_CLS else none
    received = p.mean(2) if which & RECEIVED else none
    return to_cls, received


def _rank(scores: Tensor) -> Tensor:
    """Positions by descending score, lower index first among equals, NaN last; int64 [B, S]."""
    s = scores.detach().to(acc_dtype(scores.dtype))
    order = s.masked_fill(s.isnan(), -torch.inf).argsort(dim=-1, descending=True, stable=True)
    nan = s.isnan().gather(1, order)
    return order.gather(1, nan.to(torch.int8).argsort(dim=-1, stable=True))  # -inf before NaN


def topk_tokens(scores: Tensor, keep: int, num_prefix: int, by_score: bool) -> Tensor:
    """Positions of the prefix and of the `keep` best tokens, by position or by descending score."""
    best = _rank(scores)[:, :keep]
    if not by_score:
        best = best.sort(-1).values
    prefix = torch.arange(num_prefix, device=scores.device, dtype=torch.int64).expand(scores.shape[0], -1)
    return torch.cat([prefix, best + num_prefix], 1)


def prune_slots(scores: Tensor, r: int, num_prefix: int, by_score: bool) -> Tensor:
    """Output row of every token when the `r` lowest scores are dropped (-1)."""
    batch, n = scores.shape
    index = topk_tokens(scores, n - r, num_prefix, by_score)
    slot = torch.full((batch, n + num_prefix), -1, dtype=torch.int32, device=scores.device)
    rows = torch.arange(index.shape[1], dtype=torch.int32, device=scores.device).expand_as(index)
    return slot.scatter(1, index, rows)


def select_tokens(x: Tensor, index: Tensor) -> Tensor:
    """x.gather(1, index): rows `index` of each image."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def match_tokens(metric: Tensor, r: int, num_prefix: int, source: Tensor | None) -> Tensor:
    """Bipartite soft matching (ToMe, ICLR 2023): each source token finds the most similar other token, the r best
    pairs share an output row. Rows: prefix, unmerged sources, destinations, each by position."""
    batch, n, _ = metric.shape
    x = metric.detach().to(acc_dtype(metric.dtype))
    x = x / x.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-12)
    position = torch.arange(n, device=metric.device, dtype=torch.int64)
    if source is None:
        source = (position % 2 == 0).expand(batch, n)
    prefix = (position < num_prefix).expand(batch, n)
    is_source, is_destination = source & ~prefix, ~source & ~prefix
    similarity = x @ x.transpose(1, 2)
    similarity = similarity.masked_fill(~is_destination[:, None, :], -torch.inf)
    best = similarity.amax(-1)
    # The lowest of equal maxima on every device, which argmax alone does not promise.
    partner = torch.where(similarity == best[..., None], position, n - 1).amin(-1)
    best = best.masked_fill(~is_source, -torch.inf)
    rank = best.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    merged = (rank < r) & is_source
    stays = ~merged
    # Stable sort by class (prefix 0, unmerged source 1, destination 2, merged 3) gives the published row order.
    kind = torch.where(prefix, 0, torch.where(merged, 3, torch.where(is_source, 1, 2)))
    row = kind.argsort(dim=-1, stable=True).argsort(-1)
    return torch.where(stays, row, row.gather(1, partner)).to(torch.int32)


def _slot_matrix(slot: Tensor, num_out: int, dtype: torch.dtype) -> Tensor:
    """One-hot [B, M, N] of slot; dropped tokens have no row."""
    rows = torch.arange(num_out, device=slot.device, dtype=slot.dtype)
    return (slot[:, None, :] == rows[None, :, None]).to(dtype)


def merge_tokens(x: Tensor, slot: Tensor, num_out: int, size: Tensor | None, weight: Tensor | None, normalize: bool):
    """Weighted sum of the tokens of each slot, divided by the sum of their weights where `normalize`."""
    dtype = acc_dtype(x.dtype)
    matrix = _slot_matrix(slot, num_out, dtype)
    ones = torch.ones(slot.shape, dtype=dtype, device=x.device)
    sizes = ones if size is None else size
    size_out = (matrix @ sizes[..., None]).squeeze(-1)
    w = weight if weight is not None else sizes
    y = matrix @ (x.to(dtype) * w[..., None])
    if normalize:
        total = matrix @ w[..., None]
        y = y / torch.where(total == 0, 1.0, total)
    return y.to(x.dtype), size_out


def unmerge_tokens(y: Tensor, slot: Tensor, fill: float) -> Tensor:
    """Every token gets the row of its slot, dropped tokens `fill`."""
    index = slot.clamp_min(0).long()[..., None].expand(-1, -1, y.shape[-1])
    return torch.where((slot >= 0)[..., None], y.gather(1, index), torch.full((), fill, dtype=y.dtype, device=y.device))

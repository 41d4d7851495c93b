"""nn.Module wrappers: the drop-in Attention."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import backends
from .ops.attention import AttentionAux, masked_attention, packed_attention, scaled_dot_product_attention


class AttentionOutput(NamedTuple):
    """What `Attention` gives when asked for side outputs."""

    x: Tensor  # [B, N, C]
    aux: AttentionAux  # the side outputs asked for
    metric: Tensor | None  # [B, N, D] keys averaged over heads, what ToMe compares, or the keys [B, H, N, D]


@timm.layers.register_notrace_module  # a leaf for timm's feature extraction by torch.fx, so that its ops stay ours
class Attention(timm.layers.Attention):
    """timm.layers.Attention on the fused kernels: same constructor, same state dict, same output to rounding.

    Use: `timm.create_model(name, attn_layer=p3b_ext.Attention)`, or `p3b_ext.patch(model)` for an existing model.

    Without q/k norm the kernel reads qkv packed, in place. Attention dropout in training, causal and full attention
    masks run in PyTorch's scaled_dot_product_attention.

    No attention map is computed, so hooks on `attn_drop` are not called. To see maps, run the model with
    `fused_attn = False` on its attentions under `p3b_ext.backend("reference")`: timm's own forward then runs.
    """

    def forward(  # type: ignore[override]  # an AttentionOutput where side outputs are asked for
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        token_size: Tensor | None = None,
        aux: Sequence[str] | None = None,
        metric: bool | str = False,
    ) -> Tensor | AttentionOutput:
        """x `[B, N, C]` -> `[B, N, dim_out]`.

        Args:
            attn_mask, is_causal: as timm. Key masks, bool `[B, 1, 1, N]`, run fused.
            token_size: `[B, N]` > 0, adds log(size) to the logits (proportional attention).
            aux: names of side outputs of `masked_attention`, or () for none: the result is then an AttentionOutput.
            metric: with `aux`, also the keys averaged over heads; "heads": the keys as they are.

        Raises:
            NotImplementedError: token_size or aux together with a causal or full mask.
        """
        if token_size is None and aux is None and not self.fused_attn and backends.forced() == "reference":
            causal: dict[str, Any] = {"is_causal": True} if is_causal else {}  # timm 1.0.23 does not know it
            return super().forward(x, attn_mask=attn_mask, **causal)
        batch, n, _ = x.shape
        gate = getattr(self, "gate", None)  # since timm 1.0.29
        gate = None if gate is None else gate(x).sigmoid()
        qkv = self.qkv(x).reshape(batch, n, 3, self.num_heads, self.head_dim)
        packed = isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if not packed:
            q, k = self.q_norm(q), self.k_norm(k)

        dropout = self.attn_drop.p if self.training else 0.0
        plain = token_size is None and not aux
        side = AttentionAux()
        if dropout > 0 or (plain and (attn_mask is not None or is_causal)):
            x, side = self._by_pytorch(q, k, v, attn_mask, is_causal, dropout, token_size, aux)
        else:
            mask = _key_mask(attn_mask, is_causal, batch, n)
            asked: dict[str, Any] = {"key_mask": mask, "token_size": token_size, "aux": aux}
            found: Any = packed_attention(qkv, **asked) if packed else masked_attention(q, k, v, **asked)
            x, side = (found, side) if aux is None else found

        x = self.norm(x.transpose(1, 2).reshape(batch, n, self.attn_dim))
        if gate is not None:
            x = x * gate
        x = self.proj_drop(self.proj(x))
        if aux is None:
            return x
        keys = k.detach() if metric == "heads" else k.detach().mean(1) if metric else None
        return AttentionOutput(x, side, keys)

    def _by_pytorch(self, q, k, v, attn_mask, is_causal, dropout, token_size, aux) -> tuple[Tensor, AttentionAux]:
        """Attention by PyTorch, for dropout and general masks; side outputs come from a fused pass without gradient."""
        if dropout == 0:
            return scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal), AttentionAux()
        side = AttentionAux()
        if token_size is not None or aux:
            batch, _, n, _ = q.shape
            key_mask = _key_mask(attn_mask, is_causal, batch, n)
            if aux:
                with torch.no_grad():
                    _, side = masked_attention(q, k, v, key_mask=key_mask, token_size=token_size, aux=aux)
            if token_size is not None:
                bias = token_size.log()[:, None, None, :].to(q.dtype)
                attn_mask = bias if key_mask is None else bias.masked_fill(~key_mask[:, None, None], -torch.inf)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, is_causal)
        return out, side


def _key_mask(attn_mask: Tensor | None, is_causal: bool, batch: int, n: int) -> Tensor | None:
    """The bool [B, N] that attn_mask [B or 1, 1, 1, N] holds."""
    if is_causal:
        raise NotImplementedError("Attention: is_causal must be False together with token_size or aux, got True")
    if attn_mask is None:
        return None
    shape = tuple(attn_mask.shape)
    if attn_mask.dtype != torch.bool or shape not in ((batch, 1, 1, n), (1, 1, 1, n)):
        raise NotImplementedError(
            f"Attention: attn_mask must be bool [{batch}, 1, 1, {n}] together with token_size or aux, "
            f"got {attn_mask.dtype} {list(shape)}"
        )
    return attn_mask[:, 0, 0].expand(batch, n)

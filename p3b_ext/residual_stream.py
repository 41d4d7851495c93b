"""ResidualStream: what goes from sub-block to sub-block of a Vision Transformer, recorded while it runs."""

import contextlib
import threading

import torch
from torch import Tensor, nn

from .models import family_of
from .ops.merge import unmerge_tokens
from .reducing_blocks import ROLE, Model, Shared, Tokens, override


class ResidualStream:
    """Records the residual stream during a forward pass: before the blocks, then after every attention and every MLP.

    `with ResidualStream(model) as recorded: model(images)`; then `recorded.stream` is a list of 2L + 1 detached tensors
    `[rows, N, C]`, the first `rows` images (None: all). Later forward passes in the same `with` block append to it;
    `begin` empties it. Only forward passes of the thread that entered the block are recorded.

    Under a token reduction every tensor still has all N tokens, so that both sides of a sub-block can be compared: a
    merged token stands in the place of each of its patches (their mean is the mean weighted by size), and in the place
    of a dropped patch stands the mean of the patches that are left.

    Raises:
        NotImplementedError: another model than a timm VisionTransformer, or blocks without a norm before their MLP.
    """

    def __init__(self, model: nn.Module, rows: int | None = None) -> None:
        self._family = family_of("ResidualStream", model)
        self.stream: list[Tensor] = []
        self.rows = rows
        self._model: Model = model
        self._thread = threading.local()
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "ResidualStream":
        blocks = self._model.blocks
        readers = [self._family.reader_of_attention(block) for block in blocks]
        self._thread.records = True
        self._hook(blocks[0].register_forward_pre_hook(lambda _, args: self._keep(args[0])))
        for block, reader in zip(blocks, readers, strict=True):
            self._hook(reader.register_forward_pre_hook(lambda _, args: self._keep(args[0])))
            role = block.__dict__.get(ROLE)
            if role is None:
                self._hook(block.register_forward_hook(lambda _, args, out: self._keep(out)))
                continue
            shared = role.shared
            self._hook(block.register_forward_hook(lambda _, args, out, shared=shared: self._keep_reduced(out, shared)))
        self._open.enter_context(override(self._model, trace=True))  # blocks then keep the token maps
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
        self._thread.records = False

    def begin(self, rows: int) -> None:
        """Forgets what was recorded; the coming forward passes record their first `rows` images, none for 0."""
        self.rows = rows
        self.stream.clear()

    def _hook(self, handle: torch.utils.hooks.RemovableHandle) -> None:
        self._open.callback(handle.remove)

    def _records(self) -> bool:
        return self.rows != 0 and getattr(self._thread, "records", False)

    def _keep(self, x: Tensor | Tokens) -> None:
        if self._records():
            self.stream.append((x.x if isinstance(x, Tokens) else x).detach()[: self.rows])

    def _keep_reduced(self, out: Tensor | Tokens, shared: Shared) -> None:
        """What a block of a reduced model puts out; its tokens are where they were after its attention."""
        if not self._records():
            return
        slots = out.slots if isinstance(out, Tokens) else shared.last_slots()
        slot = slots[-1][: self.rows]
        self._keep(out)
        for side in (-2, -1):
            self.stream[side] = _on_the_grid(self.stream[side], slot, self._model.num_prefix_tokens)


def _on_the_grid(x: Tensor, slot: Tensor, prefix: int) -> Tensor:
    """Tokens `[B, M, C]` at the places that they came from, `[B, N, C]`; slot: int32 `[B, N]`, -1 where dropped."""
    full = unmerge_tokens(x.contiguous(), slot)
    gone = (slot < 0)[:, :, None]
    kept = (~gone[:, prefix:]).sum(1, keepdim=True)
    return torch.where(gone, full[:, prefix:].sum(1, keepdim=True) / kept, full)

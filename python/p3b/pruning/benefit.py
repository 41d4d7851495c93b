# SPDX-License-Identifier: MIT
"""Block benefit: by how much each sub-block lowers the probes' loss, accumulated over training steps; and the
importance that follows from it."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from . import budget


class Benefit:
    """Sums of the loss before minus the loss after each sub-block, per criterion, in one tensor on the device; nothing
    is read back to the host per step."""

    def __init__(self, criteria: tuple[str, ...], count: int, device: torch.device | str) -> None:
        self.criteria = criteria
        self.sums = torch.zeros(len(criteria), count, device=device, dtype=torch.float32)
        self.count = torch.zeros((), device=device, dtype=torch.float32)
        self.older = [torch.zeros_like(self.sums), torch.zeros_like(self.count)]

    def add(self, losses: dict[str, Tensor]) -> None:
        """Adds the probe losses of one step, `{criterion: [S, 2]}`; a step with a non-finite loss does not count."""
        both = torch.stack([losses[name].detach() for name in self.criteria])  # [criteria, S, 2]
        difference = both[..., 0] - both[..., 1]
        finite = torch.isfinite(difference).all()
        self.sums += torch.where(finite, difference, torch.zeros_like(difference))
        self.count += finite

    def gathered(self, include_previous: bool = False) -> Tensor:
        """The sums since the last call (and the one before), for `take`: `[criteria * S + 1]` on the device. The sums
        are then reset."""
        sums, count = self.sums, self.count
        if include_previous:
            sums, count = sums + self.older[0], count + self.older[1]
        packed = torch.cat((sums.flatten(), count[None]))
        self.older[0].copy_(self.sums)
        self.older[1].copy_(self.count)
        self.sums.zero_()
        self.count.zero_()
        return packed

    def take(self, include_previous: bool = False, gathered: Tensor | None = None) -> dict[str, Tensor] | None:
        """Mean benefit `{criterion: [S]}` since the last call (and the one before); None if nothing was measured. The
        sums are then reset. gathered: the result of `gathered`, where it is on the host already."""
        packed = self.gathered(include_previous).cpu() if gathered is None else gathered
        if packed[-1] == 0:
            return None
        means = packed[:-1].double().view(len(self.criteria), -1) / packed[-1]
        return dict(zip(self.criteria, means, strict=True))

    def state(self) -> list[Tensor]:
        """The sums, for `load_state`."""
        return [self.sums, self.count, *self.older]

    def load_state(self, state: list[Tensor]) -> None:
        for own, saved in zip((self.sums, self.count, *self.older), state, strict=True):
            own.copy_(saved)


class Importance:
    """Running importance of the sub-blocks: `budget.importance` per criterion, averaged over updates, mixed
    over criteria.

    rule "published": benefit per parameter kept so far, running mean with weight `gamma` for the newest. Its fixed
    point is keep ratio ~ sqrt(f / w), reached with damped oscillations. rule "sqrt" averages benefit per full
    parameter count and takes the root: the same fixed point without the oscillations.
    """

    def __init__(
        self,
        full: Tensor,
        *,
        alpha: float = 0.5,
        gamma: float = 0.2,
        temperature: float = 10.0,
        rule: str = "published",
        min_kept_share: float = 0.05,
    ) -> None:
        self.full, self.alpha, self.gamma, self.temperature, self.rule = (
            full.double(),
            alpha,
            gamma,
            temperature,
            rule,
        )
        self.min_kept_share = min_kept_share
        self.running: dict[str, Tensor] = {}

    def update(self, benefit: dict[str, Tensor] | None, kept: Tensor) -> Tensor:
        """Importance `[S]`, float64, mean about 1, after one more measurement.

        benefit: `{criterion: [S]}` or None where nothing was measured. kept: `[S]` cost now kept in each
        sub-block. A criterion with no positive benefit keeps its previous importance (uniform at first, with
        a warning).
        """
        size = self.full if self.rule == "sqrt" else torch.maximum(kept.double(), self.min_kept_share * self.full)
        for name, values in (benefit or {}).items():
            previous = self.running.get(name)
            if not values.max() > 0:
                warnings.warn(
                    f'importance: no sub-block has a positive "{name}" benefit; '
                    + ("all get the same importance" if previous is None else "the previous importance is kept"),
                    stacklevel=2,
                )
                if previous is None:
                    self.running[name] = torch.ones_like(self.full)
                continue
            newest = budget.importance(values, size, self.temperature)
            self.running[name] = newest if previous is None else self.gamma * newest + (1 - self.gamma) * previous
        return self.mixed()

    def mixed(self) -> Tensor:
        """The criteria's running importances in proportion alpha (class) to 1 - alpha (patches)."""
        if not self.running:
            return torch.ones_like(self.full)
        weights = {"cls": self.alpha, "patch": 1 - self.alpha}
        total = sum(weights[name] for name in self.running) or 1.0
        mixed = torch.stack([weights[name] / total * values for name, values in self.running.items()]).sum(0)
        return mixed if self.rule == "published" else (mixed.sqrt() / mixed.sqrt().mean())

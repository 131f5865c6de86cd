"""Optimizer steps that a NaN or an infinity cannot reach.

Whether the loss and the gradient's norm are finite is known on the device, the same on every rank, and the optimizer reads it there: it
leaves weights and moments as they are. The host learns of it where it waits for the step anyway.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from actial_fast.ops.ranges import named
from actial_fast.train.dist import Agreed
from actial_fast.train.shortage import over


class NonFinite(Agreed):
    """Too many optimizer steps in a row had a NaN or infinite loss or gradient; or a weight or a moment is, and was not written."""


class Guard:
    """Steps of one optimizer (fused, with the protocol of torch.amp.GradScaler), skipped while loss or gradient are not finite.

    limit: so many in a row end the run.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, limit: int):
        self._optimizer, self._limit = optimizer, limit
        self._bad: list[Tensor] = []
        self.in_a_row = 0
        """Steps skipped since the last one that was made."""

    def step(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Make the step and drop the gradients. loss, norm: scalars on the device, over all ranks. Returns, there, if it was made."""
        bad = ~(loss.isfinite() & norm.isfinite())
        self._optimizer.found_inf, self._optimizer.grad_scale = bad.float(), None  # type: ignore[attr-defined]  # GradScaler sets these
        with named("optimizer"), over(lambda: "the optimizer's step", "optimizer"):
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        self._bad.append(bad)
        return ~bad

    def skipped(self) -> list[int]:
        """Which of the steps since the last call were skipped, by their order. Waits for the device."""
        flags = torch.stack(self._bad).tolist() if self._bad else []
        self._bad.clear()
        for bad in flags:
            self.in_a_row = self.in_a_row + 1 if bad else 0
        return [k for k, bad in enumerate(flags) if bad]

    def check(self, rows: Sequence[str]) -> None:
        """Raises NonFinite once `limit` steps in a row were skipped. rows: names of the rows in the last of them."""
        if self.in_a_row >= self._limit:
            some = ", ".join(rows[:5]) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")
            raise NonFinite(
                f"{self.in_a_row} optimizer steps in a row had a NaN or infinite loss or gradient and were skipped; the last held {some}. "
                "Lower optim.lr or optim.clip_norm, or look at these rows with `actial data inspect`"
            )

"""Being asked to stop, and ending without losing what was done.

A signal only sets a flag. Ranks act on it together, where all of them look at the same point: after sampling, between the forward passes
of a sharded step, before gradients are summed. Until the first optimizer step of a step nothing has changed, so the step is given up and
the weights of the one before it are saved at once, however long a step is; after it, the step is finished first.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, Self, TypeVar

import torch

from actial_fast.train.dist import World

T = TypeVar("T")


class Stopped(SystemExit):
    """The run was asked to stop (Ctrl-C or SIGTERM) and has saved what it had. signal: the number of what asked."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.signal = number


class GivenUp(Exception):
    """Every rank leaves the step that was begun; no weight has changed in it."""


class Stop:
    """Whether somebody has asked this run to stop. As a context manager it listens to SIGINT and SIGTERM; a second Ctrl-C interrupts at
    once."""

    def __init__(self, where: World):
        self.asked = False
        """True once this rank was asked; other ranks may not know yet, so only what `agreed` tells may lead to where they must be met."""
        self._number = signal.SIGTERM  # of a rank that only hears of it from another
        self._where = where
        self._before: dict[int, Any] = {}

    def agreed(self) -> bool:
        """True when any rank was asked, the same on all. Every rank calls; the host waits for the other hosts, not for a device."""
        agreed = self._where.max(self.asked) > 0
        self.asked = self.asked or agreed  # asked while it waited, it says so the next time
        return agreed

    def leave(self) -> None:
        """Raises GivenUp on every rank when any was asked. Every rank calls."""
        if self.agreed():
            raise GivenUp

    def until(self, rounds: Iterable[T], *, together: bool) -> Iterator[T]:
        """The rounds of a pass, as long as nobody asks; what was made of them is then worthless, so `leave` comes next.

        together: every rank makes the same number of rounds, and waits for the others in each (sharded weights), so all must end at once.
        """
        for each in rounds:
            yield each
            if self.agreed() if together else self.asked:
                return

    def stopped(self, message: str) -> Stopped:
        """The exception to end with; rank 0 says why."""
        return Stopped(message if self._where.main else "", self._number)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked, self._number = True, signal.Signals(number)

    def __enter__(self) -> Self:
        try:
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: the caller's business
            self._before = {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


NEVER = Stop(World(0, 1, torch.device("cpu")))  # for passes that nobody may stop: no rank is asked

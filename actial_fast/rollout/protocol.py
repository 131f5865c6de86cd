"""What both loops and evaluation ask of an engine that replies to prompts: token ids in, token ids and log-probs out.

An engine sleeps, with as little memory as it can, until `awake`; then it holds the weights of one version, the step that made them, and
generates. In a loop: `with awake(engine, step - 1): engine.generate(...)`. All methods are called by every rank, each with prompts of its
own, and each rank has an engine of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from actial_fast.data.sources.stream import Example
from actial_fast.packing.batch import Sequence


@dataclass(frozen=True)
class Reply:
    """One sampled reply. ids (n,) int64, with the token that ended it; logprobs (n,) float32 at the sampling temperature over the whole
    vocabulary, as the trainer computes them; finished is False where the length limit cut it. text: what a server wrote, whose ids and
    log-probs nobody here knows (-1 and NaN, as many as it counts); None where the ids say it. why: the reason that a server's text is none.
    An episode (episodes.py) is one reply: own (n,) bool is False where its environment spoke, whose log-probs are 0; images: the keys of
    what it showed. None and () in others."""

    ids: np.ndarray
    logprobs: np.ndarray
    finished: bool
    text: str | None = None
    why: str = ""
    own: np.ndarray | None = None
    images: tuple[str, ...] = ()

    @property
    def drawn(self) -> int:
        """Tokens that the model drew."""
        return len(self.ids) if self.own is None else int(self.own.sum())

    @property
    def turns(self) -> list[np.ndarray]:
        """The ids of each turn that the model took; all where there is one."""
        if self.own is None:
            return [self.ids]
        edges = np.flatnonzero(np.diff(np.concatenate([[False], self.own, [False]]).astype(np.int8))).tolist()
        return [self.ids[start:end] for start, end in list(pairwise(edges))[::2]]


@dataclass(frozen=True)
class Draw:
    """How replies are drawn. n: to each prompt; temperature: 0 is greedy; max_new_tokens: the longest reply; kv_tokens: as
    sampling.kv_tokens in a recipe."""

    n: int = 1
    temperature: float = 1.0
    max_new_tokens: int = 1024
    kv_tokens: int = 0


def nobody() -> bool:
    """Nobody has asked for an end."""
    return False


def never(index: int) -> bool:
    """No group is to be given up."""
    return False


@dataclass(frozen=True)
class Watch:
    """What a caller sees of replies while they are drawn, and says to it.

    have: replies by their prompt's index that were drawn before, and are returned as they are. drawn: called with replies by index, a
    prompt's all at once, as soon as they are complete, in turn with the drawing. asked: looked at between tokens; once it is true nothing
    more is drawn. dropped: looked at in the same places, with an index; once it is true that prompt's replies are not drawn any further.
    short: called when memory ran short, before what is left is drawn with half of it.
    failed: called with an index and why its prompt got no replies, where that is this prompt's misfortune and not the engine's; without
    it, that is an error.
    """

    have: Mapping[int, list[Reply]] | None = None
    drawn: Callable[[dict[int, list[Reply]]], None] | None = None
    asked: Callable[[], bool] = nobody
    dropped: Callable[[int], bool] = never
    failed: Callable[[int, str], None] | None = None
    short: Callable[[], None] | None = None


UNWATCHED = Watch()


class Reader(Protocol):
    """Rows into prompts and replies into text; a Processor, for engines that take token ids."""

    def encode_prompt(self, example: Example) -> Sequence:
        """The prompt of a row to reply to; BadRow where it cannot be made."""

    def decode(self, ids: np.ndarray) -> str:
        """The text of a reply's ids."""


class Engine(Protocol):
    """Replies to prompts."""

    own: bool
    """Whether replies' log-probs are the trainer's own but for rounding, since the same code computed them, with the trainer's module.
    Where not, with rollout.ahead, `generate` is called in a thread while the trainer updates: it then has weights of its own, and waits for
    other ranks in groups of its own only."""
    version: int
    """The step whose weights it holds; -1 before the first `sync`."""

    def generate(self, prompts: Many[Sequence], draw: Draw, keys: Many[tuple[int, ...]], watch: Watch = ...) -> list[list[Reply]]:
        """draw.n replies to each prompt; empty lists for prompts that `watch` ended or dropped.

        keys: one tuple of non-negative integers per prompt that fixes its random numbers: replies do not depend on how prompts are batched
        or spread over ranks. They never hold a vision token, nor an id that the tokenizer does not know.
        """

    def sync(self, version: int) -> None:
        """Take over the policy's weights as they are now, those of step `version`; a no-op for the version that it holds."""

    def sleep(self) -> None:
        """Give back the memory that only `generate` needs."""

    def wake(self) -> None:
        """Take it again."""

    def recover(self) -> None:
        """After `generate` raised: make it possible to go on. Every rank calls."""

    def close(self) -> None:
        """End; nothing is called after it."""


@contextlib.contextmanager
def awake(engine: Engine, version: int) -> Iterator[Engine]:
    """The engine with the weights of step `version`, until the block ends."""
    engine.wake()
    try:
        engine.sync(version)
        yield engine
    finally:
        engine.sleep()

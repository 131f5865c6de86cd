"""Which groups a step learns from: functions of positions in the stream and of rewards alone, so that neither time nor the number of ranks
changes them."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actial_fast import ops
from actial_fast.data.sources.stream import Stream
from actial_fast.settings.recipe import GRPORecipe
from actial_fast.settings.sampling import GateConfig, OverlongConfig
from actial_fast.train.dist import World

LOOK = 0.2  # seconds between looks at what other ranks and slow rewards have told


def fines(lengths: Sequence[int], overlong: OverlongConfig, limit: int) -> np.ndarray:
    """What replies of these lengths are fined, (n,) float32 from -1 to 0: -clip((length - (limit - buffer)) / buffer, 0, 1)."""
    return -np.clip((np.array(lengths) - (limit - overlong.buffer)) / overlong.buffer, 0, 1).astype(np.float32)


def weights_of(recipe: GRPORecipe) -> np.ndarray:
    """Weights of the columns of a table of rewards, float32 (R,): the recipe's rewards, and the fine behind them where there is one."""
    fine = [recipe.overlong.penalty] if recipe.overlong.buffer else []
    return np.array([*(r.weight for r in recipe.rewards), *fine], np.float32)


def totals_of(rewards: np.ndarray, recipe: GRPORecipe) -> np.ndarray:
    """The weighted sums (N,) of rewards (N, R), group by group; NaN where none could score a reply."""
    return np.where(np.isnan(rewards).all(1), np.nan, np.nansum(_filled(rewards, recipe) * weights_of(recipe), axis=1))


def _filled(rewards: np.ndarray, recipe: GRPORecipe) -> np.ndarray:
    """The rewards (N, R) with their group's mean where a term could not score a reply that another one could: a judge that fails for one
    reply neither punishes nor favours it. A term that scored none of a group stays NaN, which counts 0 for all of them."""
    groups = rewards.reshape(-1, min(recipe.sampling.n, len(rewards)), rewards.shape[1])
    scored = ~np.isnan(groups)
    means = np.where(scored, groups, 0).sum(1, keepdims=True) / np.maximum(scored.sum(1, keepdims=True), 1)
    lacking = ~scored & scored.any(1, keepdims=True) & scored.any(2, keepdims=True)
    return np.where(lacking, means, groups).reshape(rewards.shape).astype(np.float32)


def differ(rewards: np.ndarray, recipe: GRPORecipe) -> bool:
    """Whether a group with the rewards (n, R) teaches something: some reply has another reward than the others, NaN left aside. It is the
    sum that counts or, where each reward is normalised for itself, any one with a weight."""
    alone = recipe.advantages.combine == "normalize_then_sum"
    parts = rewards[:, weights_of(recipe) != 0] if alone else totals_of(rewards, recipe)[:, None]
    return any(len(set(column[~np.isnan(column)].tolist())) > 1 for column in parts.T)


def advantages_of(rewards: np.ndarray, recipe: GRPORecipe) -> Tensor:
    """The advantages (N,) of all ranks' replies, group by group in the order of the stream, from their rewards (N, R)."""
    owner = torch.arange(len(rewards)) // recipe.sampling.n
    if recipe.advantages.combine != "normalize_then_sum":  # which leaves out what is lacking, term by term
        rewards = _filled(rewards, recipe)
    return ops.group_advantages(torch.from_numpy(rewards), owner, recipe.advantages, weights=torch.from_numpy(weights_of(recipe)))


def chosen(tables: Mapping[int, np.ndarray], recipe: GRPORecipe) -> tuple[list[int], int]:
    """The positions that make the step, ascending, of those with these rewards (n, R), and how many of them have rewards that differ.

    Dynamic sampling: the first `prompts` that differ; while there are fewer, the first of the others fill the step.
    """
    positions = sorted(tables)
    good = [p for p in positions if differ(tables[p], recipe)]
    if not recipe.sampling.oversample:
        return positions, len(good)
    good = good[: recipe.prompts]
    rest = sorted(set(positions).difference(good))
    return sorted([*good, *rest[: recipe.prompts - len(good)]]), len(good)


def next_size(drawn: int, good: int, recipe: GRPORecipe) -> int:
    """Prompts of a step's next draw, when `good` of the `drawn` groups have rewards that differ: as many more as should do, at most as many
    as in the first draw."""
    first = math.ceil(recipe.sampling.oversample * recipe.prompts) if recipe.sampling.oversample else recipe.prompts
    if not good:
        return first
    return min(first, math.ceil(recipe.sampling.oversample * (recipe.prompts - good) * drawn / good))


class Race:
    """Which groups can no longer be among the first `wanted` in the stream that qualify, as far as this rank knows. Ranks tell each other
    without waiting: who knows less gives up less, and the choice is the same."""

    def __init__(self, wanted: int, board: str, where: World):
        self._wanted, self._board, self._where = wanted, board, where
        self._known: set[int] = set()
        self._last, self._looked = math.inf, -math.inf

    def enter(self, positions: Collection[int]) -> None:
        """These qualify, on this rank."""
        if new := set(positions) - self._known:
            self._where.show(self._board, "".join(f"{p} " for p in sorted(new)))
            self._narrow(new)

    def due(self) -> bool:
        """Whether it is time to look again; looks at what other ranks have entered when it is."""
        if time.monotonic() - self._looked < LOOK:
            return False
        self._looked = time.monotonic()
        self._narrow(map(int, self._where.shown(self._board).split()))
        return True

    def lost(self, position: int) -> bool:
        """Whether `wanted` groups in front of this one qualify."""
        return position > self._last

    def _narrow(self, positions: Iterable[int]) -> None:
        self._known.update(positions)
        if len(self._known) >= self._wanted:
            self._last = sorted(self._known)[self._wanted - 1]


class Gate:
    """Running pass rates by source, and which sources are closed for now. state: what `state` gave, in a run that goes on."""

    def __init__(self, config: GateConfig, recipe: GRPORecipe, stream: Stream, state: Mapping[str, Any] | None = None):
        self._config, self._stream = config, stream
        stems = [Path(source.path).stem for source in recipe.data.sources]
        self._names = [stem if stems.count(stem) == 1 else f"{stem}#{k + 1}" for k, stem in enumerate(stems)]
        self._column = [r.name for r in recipe.rewards].index(config.reward)
        self._rate: list[float] = [*(state["rate"] if state else [0.0] * len(stems))]
        self._seen: list[int] = [*(state["seen"] if state else [0] * len(stems))]

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; JSON gives it back to the last bit."""
        return {"rate": [*self._rate], "seen": [*self._seen]}

    @property
    def closed(self) -> set[int]:
        """Sources of which `window` groups or more were seen and whose pass rate is outside of the bounds."""
        low, high, window = self._config.low, self._config.high, self._config.window
        return {k for k, rate in enumerate(self._rate) if self._seen[k] >= window and not low <= rate <= high}

    def admits(self, position: int) -> bool:
        """Whether a position is drawn: its source is open, or it is the source's turn to be tried."""
        source, before = self._stream.turn(position)
        return source not in self.closed or before % self._config.retry == 0

    def learn(self, tables: Mapping[int, np.ndarray]) -> None:
        """From the rewards (n, R) of groups by position, in the order of the stream. Groups that could not be scored do not count."""
        for position in sorted(tables):
            values = tables[position][:, self._column]
            if np.isnan(values).all():
                continue
            source, _ = self._stream.turn(position)
            self._seen[source] += 1
            self._rate[source] += (float(np.nanmean(values)) - self._rate[source]) / min(self._seen[source], self._config.window)

    def figures(self) -> dict[str, float]:
        """pass_rate/NAME of every source that was seen, and how many are closed."""
        rates = {f"pass_rate/{name}": self._rate[k] for k, name in enumerate(self._names) if self._seen[k]}
        return rates | {"sampling/closed_sources": len(self.closed)}

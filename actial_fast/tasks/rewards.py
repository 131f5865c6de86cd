"""Rewards: what a sampled response is worth. The recipe's default is 0.5 * format + 0.5 * accuracy.

A reward is `reward(response: str, row: Row) -> float | None`; None or NaN means that this response cannot be scored by it (it is left out
of the group's statistics). Every built-in reads the response once, left to right, whatever a model writes.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from actial_fast.data.sources.row import Row
from actial_fast.data.sources.tags import is_well_formed, same_answer, tagged_answer

Reward = Callable[[str, Row], float | None]


@dataclass(frozen=True)
class RewardConfig:
    """One term of the reward."""

    name: str
    """format, accuracy, or module:function for your own `reward(response: str, row: Row) -> float | None`."""
    weight: float = 1.0
    """Factor of this term in the total."""


def format_reward(response: str, row: Row) -> float:
    """1 when the response is well formed (see is_well_formed), else 0."""
    return float(is_well_formed(response))


def accuracy_reward(response: str, row: Row) -> float | None:
    """1 when the text inside <answer> equals the row's truth (see same_answer), else 0; None for a row without a truth."""
    if not row.truth:
        return None
    answer = tagged_answer(response)
    return float(answer is not None and same_answer(answer, row.truth))


REWARDS = MappingProxyType({"format": format_reward, "accuracy": accuracy_reward})
DEFAULT_REWARDS = (RewardConfig("format", 0.5), RewardConfig("accuracy", 0.5))


def find_reward(name: str) -> Reward:
    """The function behind a reward's name: a built-in, or `module:function` from the import path. ValueError when there is none."""
    if name in REWARDS:
        return REWARDS[name]
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(f"unknown reward {name!r}; use {', '.join(REWARDS)}, or module:function for your own")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward {name!r} cannot be imported ({error}); is the module on PYTHONPATH?") from error
    if not callable(found):
        raise ValueError(f"reward {name!r} is a {type(found).__name__}, not a function of (response, row)")
    return found


def score(responses: Sequence[str], rows: Sequence[Row], rewards: Sequence[RewardConfig] = DEFAULT_REWARDS) -> np.ndarray:
    """Score n responses to their n rows with k rewards.

    Returns float32 (n, k), one column a reward, not weighted; NaN where a reward cannot score the response.
    Raises ValueError for an unknown reward, and for one that fails or returns something that is not a finite number or None, naming the
    reward and the row: a silent 0 would train on a bug.
    """
    assert len(responses) == len(rows), f"{len(responses)} responses for {len(rows)} rows"
    out = np.empty((len(responses), len(rewards)), np.float32)
    for k, config in enumerate(rewards):
        function = find_reward(config.name)
        for i, (response, row) in enumerate(zip(responses, rows, strict=True)):
            try:
                value = function(response, row)
                out[i, k] = math.nan if value is None else float(value)
            except Exception as error:
                raise ValueError(
                    f"reward {config.name!r} failed on row {row.where or row.id!r}: {type(error).__name__}: {error}"
                ) from error
            if math.isinf(out[i, k]):
                raise ValueError(f"reward {config.name!r} gave {value} on row {row.where or row.id!r}; return a finite number, or None")
    return out

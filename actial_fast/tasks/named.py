"""The rewards that ship, and how the others are found. Each reads the response once, left to right, whatever a model writes."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

from actial_fast.data.sources.answers import is_right
from actial_fast.data.sources.plugins import find
from actial_fast.data.sources.row import Row
from actial_fast.data.sources.tags import tagged_answer
from actial_fast.data.sources.task import is_right_by_task, task_of

Reward = Callable[..., Any]  # what it takes and gives depends on RewardConfig.call


def format_reward(response: str, row: Row) -> float:
    """1 when the response has the form that the row's task asks for (without one: see is_well_formed), else 0."""
    return float(task_of(row).formed(response, row))


def accuracy_reward(response: str, row: Row, strict: bool = False) -> float | None:
    """1 when the reply has full marks by the metric of the row's task (without one: when answers.is_right), else 0; None where it cannot be
    scored. strict: only inside one pair of <answer> tags, and only if that is the truth up to case; None without a truth."""
    if not strict:
        return is_right_by_task(response, row)
    if not row.truth:
        return None
    return float(is_right(response, row, strict=True) and tagged_answer(response) is not None)


def task_reward(response: str, row: Row) -> float | None:
    """What the reply is worth to the row's task: its reward, or its metric where it has none."""
    task = task_of(row)
    return (task.reward or task.metric)(response, row)


SHIPPED = MappingProxyType({name: f"actial_fast.tasks.named:{name}_reward" for name in ("format", "accuracy", "task")})


def find_reward(name: str) -> Reward:
    """The function behind a reward's name: one that ships, a package's, or `module:function`. ValueError when there is none."""
    found = find("reward", name, SHIPPED)
    if not callable(found):
        raise ValueError(f"reward {name!r} is a {type(found).__name__}, not a function of (response, row)")
    return found

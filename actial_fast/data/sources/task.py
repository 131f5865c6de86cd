"""What rows are for: a task says how they are read, how they ask, what a reply is worth, when it is right, and who answers it.

A source names its task (`data.sources.N.task`, `eval.sources.N.task`), one that ships or module:object. Without one a row is a question
with an answer: right by answers.is_right, well formed with <think> and <answer> tags. docs/tasks.md shows how to write one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from actial_fast.data.sources.answers import is_right
from actial_fast.data.sources.plugins import find
from actial_fast.data.sources.row import IMAGE_TAG, BadRow, Row
from actial_fast.data.sources.tags import is_well_formed

SHIPPED = {  # imported on first use
    "jigsaw": "actial_fast.tasks.jigsaw:JIGSAW",
    "jigsaw_turns": "actial_fast.tasks.jigsaw:TURNS",
    "sparkle": "actial_fast.tasks.sparkle:SPARKLE",
    "boxes": "actial_fast.tasks.boxes:BOXES",
}

Judge = Callable[[str, Row], float | None]


@dataclass(frozen=True)
class Observation:
    """What an environment answers. text: with `<image>` where a picture belongs; images: uint8 (H, W, 3), a file or its bytes, in the order
    of the tags."""

    text: str
    images: tuple[np.ndarray | Path | bytes, ...] = ()

    def __post_init__(self) -> None:
        if (tags := self.text.count(IMAGE_TAG)) != len(self.images):
            raise ValueError(f"an environment's answer has {tags} {IMAGE_TAG} tags but {len(self.images)} images")


class Environment(Protocol):
    """One episode: what becomes of a row under a model's replies. Made anew for each of them.

    What it answers depends on the row and the replies alone, since a run that goes on plays kept replies to it again.
    """

    def step(self, reply: str) -> Observation | None:
        """The answer to a reply, which the model's next one follows; None when the episode is over."""
        ...


class Transcript(str):
    """A model's last reply in an episode. replies: all of them, in order."""

    replies: tuple[str, ...]

    def __new__(cls, replies: tuple[str, ...]) -> Transcript:
        made = super().__new__(cls, replies[-1])
        made.replies = replies
        return made


def replies_of(response: str) -> tuple[str, ...]:
    """A model's replies in an episode, or the one reply to a row without turns."""
    return response.replies if isinstance(response, Transcript) else (response,)


@dataclass(frozen=True)
class Task:
    """What a source's rows are for. In every function a response is the reply's text, in an episode a Transcript."""

    metric: Judge
    """What an evaluation counts, from 0 to 1, which is right; None for a row that it cannot score."""
    reward: Judge | None = None
    """What the reward named `task` gives; None takes the metric."""
    formed: Callable[[str, Row], bool] = lambda response, row: is_well_formed(response)
    """Whether a reply has the form that the row asks for: the reward named `format`, and an evaluation's share."""
    prompt: Callable[[Row], Row] | None = None
    """How a row asks, where it is not as it stands: the row with other turns. BadRow for one that the task cannot use."""
    format: str = "auto"
    """The format of a source whose config says auto: a name, or module:Reader."""
    environment: Callable[[Row], Environment] | None = None
    """Begins an episode with a row; None where one reply is all."""
    turns: int = 1
    """Most replies of an episode; after the last one the environment is not asked."""

    def __post_init__(self) -> None:
        if self.turns < 1 or (self.turns > 1 and self.environment is None):
            raise ValueError(f"turns: at least 1, and above 1 only with an environment, got {self.turns}")


def _answered(response: str, row: Row) -> float | None:
    return float(is_right(response, row)) if row.truth else None


QUESTION = Task(metric=_answered)


@functools.cache
def find_task(name: str) -> Task:
    """The task behind a name, '' for a question with an answer. ValueError when there is none."""
    if not name:
        return QUESTION
    found = find("task", name, SHIPPED)
    if not isinstance(found, Task):
        raise ValueError(f"task {name!r} is a {type(found).__name__}, not a Task of actial_fast.data.sources.task")
    return found


def task_of(row: Row) -> Task:
    """The task of a row."""
    return find_task(row.task)


def begun(row: Row) -> Environment | None:
    """The row's environment, at its beginning; None where one reply is all. BadRow where the task cannot begin with the row."""
    task = task_of(row)
    if task.environment is None:
        return None
    try:
        return task.environment(row)
    except BadRow:
        raise
    except Exception as error:
        raise BadRow(row.where, f"the environment of task {row.task} cannot begin: {type(error).__name__}: {error}") from error


def score_of(response: str, row: Row) -> float | None:
    """What the row's metric says of a reply, from 0 to 1; None where it cannot score the row. ValueError for anything else that it says."""
    value = task_of(row).metric(response, row)
    if value is None:
        return None
    if isinstance(value, bool | int | float | np.number) and 0 <= value <= 1:
        return float(value)
    raise ValueError(f"{row.where}: the metric of task {row.task!r} gave {value!r}; a number from 0 to 1 is wanted, or None")


def is_right_by_task(response: str, row: Row) -> float | None:
    """1 for a reply with the metric's full marks, else 0; None where it cannot score the row."""
    score = score_of(response, row)
    return None if score is None else float(score == 1)


def prepared(row: Row, name: str) -> Row:
    """The row as its task asks it. BadRow where the task cannot use it, whatever its prompt raises."""
    task, row = find_task(name), row.of_task(name)
    if task.prompt is None:
        return row
    try:
        return task.prompt(row).check()
    except BadRow:
        raise
    except Exception as error:
        raise BadRow(row.where, f"task {name}: {type(error).__name__}: {error}") from error


def needed(row: Row, key: str, task: str) -> Any:
    """What a task needs of a row's meta; BadRow where it is not there."""
    if key not in row.meta:
        raise BadRow(row.where, f"{task} needs {key!r} in the row's meta, which has {', '.join(sorted(map(str, row.meta))) or 'nothing'}")
    return row.meta[key]

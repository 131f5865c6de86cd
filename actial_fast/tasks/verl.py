"""The rewards of a recipe as verl calls them: one reply at a time, by the text and by what its row's extra_info holds.

Everything that a reward may ask of a row travels with it, as JSON in extra_info.row; the truth is verl's own reward_model.ground_truth, so
that it can be changed there. Needs numpy alone, so it runs in verl's environment, whose transformers the rest of this package cannot use.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from actial_fast.data.sources.answers import is_right
from actial_fast.data.sources.row import BadRow, Row, Turn
from actial_fast.data.sources.task import score_of
from actial_fast.tasks.rewards import RewardConfig, Scorer

ComputeScore = Callable[..., dict[str, float]]


def written(row: Row) -> str:
    """What rewards may ask of a row but its truth and its images, as JSON. BadRow for a meta that JSON cannot hold."""
    told = {
        "messages": [[turn.role, turn.content] for turn in row.turns],
        "accepted": row.accepted,
        "kind": row.kind,
        "choices": row.choices,
        "id": row.id,
        "where": row.where,
        "meta": dict(row.meta),
        "task": row.task,
    }
    try:
        return json.dumps(told, default=_plain)
    except (TypeError, ValueError) as error:
        raise BadRow(
            row.where, f"its meta cannot be written as JSON ({error}), as verl's rows have it; leave the key at fault out"
        ) from None


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__}")


def read(truth: str, text: str) -> Row:
    """The row that `written` wrote, with this truth and without images."""
    told = json.loads(text)
    return Row(
        turns=tuple(Turn(*turn) for turn in told["messages"]),
        truth=truth,
        kind=told["kind"],
        choices=tuple(told["choices"]),
        id=told["id"],
        where=told["where"],
        meta=told["meta"],
        accepted=tuple(told["accepted"]),
        task=told["task"],
    )


def score_function(rewards: Sequence[RewardConfig], strict: bool = False) -> ComputeScore:
    """compute_score(data_source, solution_str, ground_truth, extra_info) for verl's reward.custom_reward_function.

    It gives {"score": the weighted sum of the rewards, in float32 as the loop has it, "acc": what an evaluation counts, from 0 to 1, NaN
    for a row that cannot be scored}. A reward that cannot score a reply counts 0, which is the loop's result where it can score none to
    that prompt, since a group's advantages do not know of what all of it share. strict: as eval.strict. It may be called from several
    threads. Raises ValueError, when made, for rewards that cannot be used and, when called, for one that fails and for an extra_info that
    is not from an export.
    """
    with Scorer(rewards):
        pass
    weights = np.array([reward.weight for reward in rewards], np.float32)
    at = threading.local()

    def compute_score(
        data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, Any] | None = None, **_: Any
    ) -> dict[str, float]:
        if not extra_info or "row" not in extra_info:
            raise ValueError(f"extra_info of a row of {data_source!r} has no `row`; write the rows by `actial export verl`")
        row = read(ground_truth, extra_info["row"])
        if not hasattr(at, "scorer"):
            at.scorer = Scorer(rewards)
        at.scorer.submit(row.id, [solution_str], row)
        given = at.scorer.results().groups[row.id][0]
        return {"score": float(np.nansum(given * weights, dtype=np.float32)), "acc": _counted(solution_str, row, strict)}

    return compute_score


def _counted(response: str, row: Row, strict: bool) -> float:
    """What an evaluation says of a reply; NaN where it cannot score the row."""
    if row.task or row.truth:
        score = score_of(response, row) if row.task else float(is_right(response, row, strict=strict))
        return math.nan if score is None else score
    return math.nan

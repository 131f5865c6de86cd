"""Boxes: think, look, answer, and rewards for all three, after DIP-R1 (arXiv 2505.23179).

A row's meta has `boxes`: [[x1, y1, x2, y2], ...] in the unit that the question asks for. A reply is
<think>...</think><look>regions</look><answer>boxes</answer>. Rewards: the form (`format`); `look`, for regions in which the group's replies
disagree; precision and recall of the answer, each weighted by how well boxes fit (`task`). Marks are the F1 at an overlap of one half.
The paper's exact formulas were not at hand: these follow its description.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from actial_fast.data.sources.row import BadRow, Row
from actial_fast.data.sources.task import Task, needed

FIT = 0.5  # overlap (intersection over union) from which a box is found
WIDEST = 4.0  # times a box's area up to which a region looks at it, and not at everything
PRECISION = 0.5  # weight of the precision; the recall has the rest
MOST = 200  # boxes of an answer
PARTS = ("think", "look", "answer")
TAG = re.compile(r"</?(?:think|look|answer)>", re.IGNORECASE | re.ASCII)
NUMBER = r"\s*(-?[0-9]{1,6}(?:\.[0-9]{1,6})?)\s*"
BOX = re.compile(rf"[\[(]{NUMBER},{NUMBER},{NUMBER},{NUMBER}[\])]")


def parts_of(response: str) -> dict[str, str] | None:
    """The texts of <think>, <look> and <answer>, when the response is these three, once and in this order, and nothing else."""
    tags = list(TAG.finditer(response))
    if [tag.group().lower() for tag in tags] != [f"<{end}{name}>" for name in PARTS for end in ("", "/")]:
        return None
    edges = [0, *(edge for tag in tags for edge in tag.span()), len(response)]
    outside = [response[edges[k] : edges[k + 1]] for k in range(0, len(edges), 4)]
    if any(text.strip() for text in outside):
        return None
    return {name: response[tags[2 * k].end() : tags[2 * k + 1].start()] for k, name in enumerate(PARTS)}


def boxes_in(text: str) -> np.ndarray:
    """The boxes that a text names, float64 (N, 4), corners in order; those without area are left out, and all where there are too many."""
    found = np.array([[float(edge) for edge in box] for box in BOX.findall(text)], np.float64).reshape(-1, 4)
    found = np.concatenate([np.minimum(found[:, :2], found[:, 2:]), np.maximum(found[:, :2], found[:, 2:])], axis=1)
    found = found[(found[:, 2:] > found[:, :2]).all(1)]
    return found if len(found) <= MOST else found[:0]


def answered(response: str) -> np.ndarray:
    """The boxes (N, 4) of a reply's <answer>, or of all of it where it has no tags; none where tags are not as they should be."""
    parts = parts_of(response)
    if parts is not None:
        return boxes_in(parts["answer"])
    inside = re.findall(r"<answer>(.*?)</answer>", response, re.IGNORECASE | re.DOTALL) if response.lower().count("<answer>") == 1 else []
    return boxes_in(inside[0]) if inside else boxes_in("" if TAG.search(response) else response)


def overlaps(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of boxes (N, 4) and (M, 4): their shared areas and the areas of their unions, (N, M)."""
    low, high = np.maximum(one[:, None, :2], other[None, :, :2]), np.minimum(one[:, None, 2:], other[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(-1)
    return shared, areas(one)[:, None] + areas(other)[None] - shared


def areas(boxes: np.ndarray) -> np.ndarray:
    """Of boxes (N, 4), (N,)."""
    return (boxes[:, 2:] - boxes[:, :2]).prod(-1)


def matches(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """For each true box (M, 4) how well the found one (N, 4) fits that it is paired with, (M,); 0 below FIT. Pairs are those that fit best
    in all, each box in one."""
    from scipy.optimize import linear_sum_assignment

    fits = np.zeros(len(truth))
    if len(found) and len(truth):
        shared, union = overlaps(found, truth)
        fit = np.where(shared / union >= FIT, shared / union, 0)
        rows, cols = linear_sum_assignment(fit, maximize=True)
        fits[cols] = fit[rows, cols]
    return fits


def f1(response: str, row: Row) -> float:
    """The F1 of the answered boxes at an overlap of FIT; 1 where there is nothing to find and nothing was named."""
    found, truth = answered(response), _truth(row)
    if not len(found) and not len(truth):
        return 1.0 if _says_none(response) else 0.0
    return 2.0 * int((matches(found, truth) > 0).sum()) / (len(found) + len(truth))


def precision_recall(response: str, row: Row) -> float:
    """PRECISION * precision + (1 - PRECISION) * recall, in which a box that was found counts as much as it fits."""
    found, truth = answered(response), _truth(row)
    if not len(found) or not len(truth):
        return f1(response, row)
    fits = matches(found, truth).sum()
    return float(PRECISION * fits / len(found) + (1 - PRECISION) * fits / len(truth))


def look(responses: Sequence[str], row: Row) -> list[float]:
    """For a group's replies to one prompt (call: group): the share of uncertain boxes that their <look> regions are about.

    A true box counts by the variance, over the group, of whether it is found: what all find, or none, is not uncertain; where no box is,
    all count alike. A region is about a box when it has half of it or more, and is at most WIDEST times as large.
    """
    truth = _truth(row)
    if not len(truth):
        return [1.0] * len(responses)
    found = np.array([matches(answered(response), truth) > 0 for response in responses])  # (replies, boxes)
    weights = found.var(0)
    if not weights.any():
        weights = np.ones(len(truth))
    seen = [_about(boxes_in((parts_of(response) or {"look": ""})["look"]), truth) for response in responses]
    return [float(weights @ each / weights.sum()) for each in seen]


def thought_looked_answered(response: str, row: Row) -> bool:
    """Whether the reply thinks, looks and answers, in this order and with nothing else."""
    return parts_of(response) is not None


def _about(regions: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Which true boxes any of the regions is about, bool (M,)."""
    if not len(regions):
        return np.zeros(len(truth), bool)
    shared, _ = overlaps(regions, truth)
    about: np.ndarray = (shared >= areas(truth) / 2) & (areas(regions)[:, None] <= WIDEST * areas(truth))
    return np.any(about, axis=0)


def _says_none(response: str) -> bool:
    parts = parts_of(response)
    return (parts["answer"] if parts else response).strip().casefold() in ("", "none", "[]", "none.")


def _truth(row: Row) -> np.ndarray:
    return np.array(row.meta["boxes"], np.float64).reshape(-1, 4)


def _checked(row: Row) -> Row:
    given = needed(row, "boxes", "boxes")
    try:
        boxes = np.array(given, np.float64).reshape(-1, 4)
    except (TypeError, ValueError):
        boxes = np.full((1, 4), np.nan)
    if not (np.isfinite(boxes).all() and (boxes[:, 2:] > boxes[:, :2]).all()):
        raise BadRow(row.where, f"boxes: a list of [x1, y1, x2, y2] with x1 < x2 and y1 < y2 is wanted, got {given!r}")
    return row


BOXES = Task(metric=f1, reward=precision_recall, formed=thought_looked_answered, prompt=_checked)

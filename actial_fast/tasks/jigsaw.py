"""Jigsaws, in one reply or in turns: a board's pieces are to be put where they belong (AGILE, arXiv 2510.01304).

A row's meta has `grid` (rows and columns of pieces) and `order` (for each place of the whole picture, the place that shows its piece). In
one reply the model writes the order. In turns it writes `swap A B`, sees the board as it then is, and ends with `done`. Marks are the
share of pieces that are where they belong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from actial_fast.data.made.jigsaw import exchanged, observed, swapped, turns_question
from actial_fast.data.sources.picture import decode
from actial_fast.data.sources.row import IMAGE_TAG, BadRow, Row, Turn
from actial_fast.data.sources.tags import extract_answer
from actial_fast.data.sources.task import Observation, Task, needed, replies_of

LONGEST = 1000  # characters of an answer
MOST = 8  # replies of an episode
SWAP = re.compile(r"\W*swap\W+(?:places?\W+|pieces?\W+)?([0-9]{1,2})\W+(?:and\W+|with\W+)?([0-9]{1,2})\W*", re.IGNORECASE)
DONE = re.compile(r"\W*done\W*", re.IGNORECASE)


def parse_order(answer: str, pieces: int) -> list[int] | None:
    """The order that an answer gives, as numbers with anything but letters between them, or as digits alone up to nine pieces; None for
    what is no order of 1 to `pieces`."""
    text = answer.strip()
    if len(text) > LONGEST or re.search(r"[^\W\d_]", text):
        return None
    found = re.findall(r"[0-9]+", text)
    if len(found) == 1 and pieces <= 9:
        found = list(found[0])
    numbers = [int(each) for each in found if len(each) <= 2]
    return numbers if len(numbers) == len(found) and sorted(numbers) == list(range(1, pieces + 1)) else None


def placed(response: str, row: Row) -> float:
    """The share of places that an answered order names rightly; 0 for what is no order."""
    order = row.meta["order"]
    found = parse_order(extract_answer(response), len(order))
    return 0.0 if found is None else sum(a == b for a, b in zip(found, order, strict=True)) / len(order)


def parse_move(reply: str, pieces: int) -> tuple[int, int] | str | None:
    """What a reply in turns does: the two places that it swaps, 'done', or None for neither. It stands in <answer> tags, or is all."""
    text = extract_answer(reply)
    if len(text) > LONGEST:
        return None
    if DONE.fullmatch(text):
        return "done"
    found = SWAP.fullmatch(text)
    places = (int(found.group(1)), int(found.group(2))) if found else (0, 0)
    return places if places[0] != places[1] and all(1 <= place <= pieces for place in places) else None


def solved(response: str, row: Row) -> float:
    """The share of pieces that are where they belong when the episode ends."""
    order = list(row.meta["order"])
    for reply in replies_of(response):
        move = parse_move(reply, len(order))
        if not isinstance(move, tuple):
            break
        order = exchanged(order, *move)
    return sum(place == shown for place, shown in enumerate(order, 1)) / len(order)


def well_played(response: str, row: Row) -> bool:
    """Whether every reply is a move, and the last one says done."""
    moves = [parse_move(reply, len(row.meta["order"])) for reply in replies_of(response)]
    return None not in moves and moves[-1] == "done"


class Board:
    """An episode with one board; see Environment."""

    def __init__(self, row: Row):
        self._rows, self._cols = row.meta["grid"]
        self._board = decode(row.images[0], row.where)

    def step(self, reply: str) -> Observation | None:
        """The board after a swap; None after anything else."""
        move = parse_move(reply, self._rows * self._cols)
        if not isinstance(move, tuple):
            return None
        self._board = swapped(self._board, *move, self._rows, self._cols)
        return Observation(observed(*move), (self._board,))


def _checked(row: Row) -> Row:
    """The row, if its board can be told from its meta; BadRow otherwise."""
    grid, order = needed(row, "grid", "jigsaw"), needed(row, "order", "jigsaw")
    if not (_whole(grid) and len(grid) == 2 and all(1 <= side <= 9 for side in grid)):
        raise BadRow(row.where, f"grid: two numbers from 1 to 9, rows and columns, are wanted, got {grid!r}")
    if not (_whole(order) and sorted(order) == list(range(1, grid[0] * grid[1] + 1))):
        raise BadRow(row.where, f"order: the numbers 1 to {grid[0] * grid[1]}, each once, are wanted, got {order!r}")
    if not row.images:
        raise BadRow(row.where, "a jigsaw without its picture")
    meta: Mapping[str, Any] = {**row.meta, "grid": [int(side) for side in grid], "order": [int(place) for place in order]}
    return replace(row, meta=meta)


def _whole(values: Any) -> bool:
    return isinstance(values, Sequence) and all(isinstance(each, int | float) and each == int(each) for each in values)


def _in_turns(row: Row) -> Row:
    """The board alone, asked for in turns, whatever the row asks; a row that has been played keeps its turns."""
    row = _checked(row)
    if sum(turn.role == "assistant" for turn in row.turns) > 1:
        return row
    system = tuple(turn for turn in row.turns if turn.role == "system" and IMAGE_TAG not in turn.content)
    return replace(row, turns=(*system, Turn("user", IMAGE_TAG + turns_question(*row.meta["grid"]))), images=row.images[:1])


JIGSAW = Task(metric=placed, prompt=_checked)
TURNS = Task(metric=solved, formed=well_played, prompt=_in_turns, environment=Board, turns=MOST)

"""The pairs behind viewpoint questions: one chain of thought is written about a pair, as in the paper, and stored under its questions.

A pair is a row too, of kind PAIR: its images, its truth "right, left, left" (the camera's move from its own and from the object's
perspective, the camera's turn) and the poses of its questions' meta. A chain about it speaks in words, since its questions do not share
their letters.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from actial_fast.data.cot.judge import KINDS, NAMES, Truths
from actial_fast.data.sources.row import IMAGE_TAG, BadRow, Row, Turn
from actial_fast.data.sources.source import Source

PAIR = "viewpoint_pair"
NONE = {"ego_translation": "no movement", "object_translation": "no movement", "ego_rotation": "no rotation"}
ANSWER = re.compile(
    r"\b(left|right|no|none|not|without)(?:wards?)?\b(?: (?:horizontal )?(?:movement|rotation|translation|turn|move))?", re.IGNORECASE
)
CLOSING = 'This question asks for {name}: "{choice}", so the answer is {truth}.'


class Pairs:
    """A source whose rows are the pairs of another one's viewpoint rows, in the order in which these first name them.

    Args:
        source: rows of the viewpoint builder (or with its meta). ValueError where a row that can be read has no poses.
        seed, every: which questions of a pair get its chain: one, drawn by seed and pair, or every one.
    """

    def __init__(self, source: Source, *, seed: int = 0, every: bool = False):
        self._source, self._seed, self._every = source, seed, every
        found: dict[Any, list[int]] = {}
        for index in range(len(source)):
            try:
                row = source[index]
            except BadRow:
                found[index] = [index]
                continue
            if row.kind not in KINDS or Truths.of(row.meta) is None:
                raise ValueError(
                    f"{row.where or row.id}: kind {row.kind!r} with meta {sorted(row.meta)} is no viewpoint row; write chains by question"
                )
            found.setdefault((str(row.meta.get("object")), *map(str, row.meta.get("pair", (index,)))), []).append(index)
        self._rows = list(found.values())
        self._index: dict[str, int] = {}  # of the pairs that were asked for, by their ids

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        """The pair as a row; BadRow where its first question is one."""
        first = self._source[self._rows[index][0]]
        truth = ", ".join(first.meta[kind] for kind in KINDS)
        name = (first.id or first.where).removesuffix(f"/{first.kind}")
        turn = Turn("user", IMAGE_TAG * len(first.images))
        row = Row((turn,), first.images, truth, PAIR, (), name, first.where, first.meta)
        self._index[name] = index
        return row

    def questions(self, row: Row) -> list[Row]:
        """The questions that get the chain of a pair that this source gave."""
        numbers = self._rows[self._index[row.id]]
        if not self._every:
            numbers = [random.Random(f"{self._seed}/{row.id}").choice(numbers)]
        return [self._source[number] for number in numbers]


def viewpoints_only(source: Source) -> bool:
    """Whether a source's first good row is a viewpoint row with poses: then chains are written by pair unless told otherwise."""
    for index in range(len(source)):
        try:
            row = source[index]
        except BadRow:
            continue
        return row.kind in KINDS and Truths.of(row.meta) is not None
    return False


def answers_in(text: str) -> tuple[str, ...]:
    """The sides that a pair's answer names, in order: left, right or none each."""
    return tuple(side if (side := found[1].casefold()) in ("left", "right") else "none" for found in ANSWER.finditer(text))


def told(meta: Mapping[str, Any]) -> str:
    """All that the poses say of a pair, as its writer is told."""
    ego, other, turn = (meta[kind] if meta[kind] in ("left", "right") else "" for kind in KINDS)
    moves = [f"moved to the {side}" if side else "did not move sideways" for side in (ego, other)]
    turned = f"rotated to the {turn} by about {abs(meta['yaw_deg']):.0f} degrees" if turn else "did not rotate"
    around = f" It went about {abs(meta['azimuth_change_deg']):.0f} degrees around the object, " if ego else ""
    sense = ("counterclockwise" if meta["azimuth_change_deg"] > 0 else "clockwise") + " as seen from above." if ego else ""
    return (
        f"From the camera's own perspective, the camera {moves[0]} between the two images; from the perspective of the object, which faces "
        f"the first camera, it {moves[1]}; about its own vertical axis it {turned}.{around}{sense}"
    )


def answered(row: Row, thought: str) -> Row:
    """A pair's question with the pair's chain and its own answer. BadRow where its truth is not what the poses say."""
    choice = row.meta[row.kind] if row.meta[row.kind] in ("left", "right") else NONE[row.kind]
    letter = chr(ord("A") + row.choices.index(choice)) if choice in row.choices else ""
    if row.truth not in (letter, choice) or not letter:
        raise BadRow(row.where or row.id, f"the truth is {row.truth!r} but the poses say {choice!r}, option {letter!r}")
    closing = CLOSING.format(name=NAMES[row.kind], choice=choice, truth=row.truth)
    reply = f"<think>{thought}\n{closing}</think>\n<answer>{row.truth}</answer>"
    return replace(row, turns=(*row.prompt, Turn("assistant", reply)))

"""SAT (spatial aptitude training) rows: parquet with image_bytes, question, answers, question_type, correct_answer.

One row becomes: user "<image>... question, then the options in one line", assistant the correct answer's text, which is also the truth.
With lettered options they are "A. ...", "B. ..." on lines of their own, and the answer and the truth are the letter. The options are shown
in an order drawn from the row's number and question: a file that always lists the correct one first would teach a position.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase

import pyarrow as pa

from actial_fast.data.sources.row import IMAGE_TAG, BadRow, Row, Turn
from actial_fast.data.sources.table import Table

IMAGE_COLUMNS = ("image_bytes", "images", "image")
CHOICE_COLUMNS = ("answers", "answer_choices")
OPTIONS = "Answer with one of these options: "


def lettered(choices: Sequence[str]) -> str:
    """The choices as lettered lines: "A. first", "B. second"."""
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False))


def options_line(choices: Sequence[str]) -> str:
    """The line that offers the choices: "Answer with one of these options: a, b or c"."""
    return OPTIONS + (", ".join(choices[:-1]) + " or " + choices[-1] if len(choices) > 1 else choices[0])


class SatSource:
    """Random access to the rows of a SAT table; `letters` offers the options by letter instead of by text."""

    def __init__(self, path: Path, *, letters: bool = False):
        self._table, self._letters = Table(path), letters
        names = set(self._table.column_names)
        if len(self._table) and not {"question", "correct_answer"} <= names:
            raise ValueError(f"{path}: SAT needs the columns question and correct_answer; it has {sorted(names)}")
        self._images = next((name for name in IMAGE_COLUMNS if name in names), None)
        self._choices = next((name for name in CHOICE_COLUMNS if name in names), None)
        self._typed = "question_type" in names

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Row:
        """Row `index`; BadRow when the question or answer is missing, or the answer is not among the choices."""
        record, where = self._table[index], self._table.where(index)
        question, answer = record["question"], record["correct_answer"]
        if not isinstance(question, str) or not question.strip():
            raise BadRow(where, "empty question")
        if answer is None or not str(answer).strip():
            raise BadRow(where, "empty answer")
        answer = str(answer).strip()
        offered = (record[self._choices] if self._choices else None) or []
        if not isinstance(offered, list):
            raise BadRow(where, f"{self._choices} is not a list")
        choices = [str(choice).strip() for choice in offered]
        if choices and answer not in choices:
            raise BadRow(where, f"the correct answer {answer!r} is not among the choices {choices}")
        random.Random(f"{index} {question}").shuffle(choices)
        images = self._table.images(record[self._images] if self._images else None, index)
        text = question.strip() if IMAGE_TAG in question else IMAGE_TAG * len(images) + question.strip()
        if self._letters and choices:
            if len(choices) > len(ascii_uppercase):
                raise BadRow(where, f"{len(choices)} choices are more than there are letters")
            text, answer = f"{text}\n{lettered(choices)}", ascii_uppercase[choices.index(answer)]
        elif choices:
            text = f"{text}\n{options_line(choices)}"
        return Row(
            turns=(Turn("user", text), Turn("assistant", answer)),
            images=images,
            truth=answer,
            kind=self.kind(index),
            choices=tuple(choices),
            id=str(record.get("id") or ""),
            where=where,
        ).check()

    def kind(self, index: int) -> str:
        """The question type of row `index`."""
        return str(self._table.value(index, "question_type") or "") if self._typed else ""

    def images(self, index: int) -> tuple[pa.Scalar, ...]:
        """The images of row `index` as Table.cell has them."""
        return self._table.cell(index, self._images) if self._images else ()

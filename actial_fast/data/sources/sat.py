"""SAT (spatial aptitude training) rows: parquet with image_bytes, question, answers, question_type, and correct_answer (array/SAT) or
correct_answer_idx, its number among the answers from 0 (nv-njb/SAT).

One row becomes: user "<image>... question, then the options in one line", assistant the correct answer's text, which is also the truth.
With lettered options they are "A. ...", "B. ..." on lines of their own, and the answer and the truth are the letter. The options are shown
in an order drawn from the row's number and question: a file that always lists the correct one first would teach a position.
Other columns are what a reward sees as `row.meta`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from actial_fast.data.sources.fields import IMAGE_KEYS, absent, contents, images_of, name_of, rest, text, texts, whole
from actial_fast.data.sources.reader import Reader
from actial_fast.data.sources.row import IMAGE_TAG, BadRow, Row, Turn, shortened

CHOICE_COLUMNS = ("answers", "answer_choices")
TRUTHS = ("correct_answer", "correct_answer_idx")
OPTIONS = "Answer with one of these options: "


def lettered(choices: Sequence[str]) -> str:
    """The choices as lettered lines: "A. first", "B. second"."""
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False))


def options_line(choices: Sequence[str]) -> str:
    """The line that offers the choices: "Answer with one of these options: a, b or c"."""
    return OPTIONS + (", ".join(choices[:-1]) + " or " + choices[-1] if len(choices) > 1 else choices[0])


class SatSource(Reader):
    """Random access to the rows of a SAT table; `letters` offers the options by letter instead of by text."""

    name = "SAT"
    image_keys = ("image_bytes", *IMAGE_KEYS)
    kind_keys = ("question_type",)

    def __init__(self, path: Path, *, letters: bool = False, split: str = ""):
        super().__init__(path, split=split)
        names = self.records.column_names
        if names and not ("question" in names and set(names) & set(TRUTHS)):
            raise ValueError(f"{path}: SAT needs the columns question and correct_answer (or correct_answer_idx); it has {sorted(names)}")
        self._letters = letters

    def row(self, record: Mapping[str, Any], where: str, index: int) -> Row:
        """A question, its images and its options; BadRow when the question or answer is missing, or the answer is not among the options."""
        meta = rest(record, ("question", *TRUTHS, *CHOICE_COLUMNS, *self.image_keys, *self.kind_keys, "id"), where)
        said = record.get("question")
        question, parts = ("", []) if absent(said) else contents(said, "question", where)
        if not question.replace(IMAGE_TAG, "").strip():
            raise BadRow(where, "empty question")
        choices = next((list(texts(record[key], key, where)) for key in CHOICE_COLUMNS if not absent(record.get(key))), [])
        answer = text(record.get("correct_answer"), "correct_answer", where).strip() or _numbered(record, choices, where)
        if not answer:
            raise BadRow(where, "empty answer")
        if choices and answer not in choices:
            raise BadRow(where, f"the correct answer {answer!r} is not among the choices {choices}")
        if len(set(choices)) < len(choices):
            raise BadRow(where, f"a choice is offered twice: {choices}")
        random.Random(f"{index} {question}").shuffle(choices)
        key = next((key for key in self.image_keys if not absent(record.get(key))), None)
        images = images_of({"images": record[key]} if key else {}, self.records.folder, where, parts=parts)
        if not images and any(key in record for key in self.image_keys):
            raise BadRow(where, "no image")
        asked = question.strip() if IMAGE_TAG in question else IMAGE_TAG * len(images) + question.strip()
        if self._letters and choices:
            if len(choices) > len(ascii_uppercase):
                raise BadRow(where, f"{len(choices)} choices are more than there are letters")
            asked, answer = f"{asked}\n{lettered(choices)}", ascii_uppercase[choices.index(answer)]
        elif choices:
            asked = f"{asked}\n{options_line(choices)}"
        return Row(
            turns=(Turn("user", asked), Turn("assistant", answer)),
            images=images,
            truth=answer,
            kind=self.kind(index),
            choices=tuple(choices),
            id=name_of(record.get("id"), "id", where),
            where=where,
            meta=meta,
        ).check()


def _numbered(record: Mapping[str, Any], choices: Sequence[str], where: str) -> str:
    """The choice whose number the record gives; '' when it gives none."""
    given = record.get("correct_answer_idx")
    if absent(given):
        return ""
    number = whole(given)
    if number is None or not 0 <= number < len(choices):
        raise BadRow(where, f"correct_answer_idx is {shortened(given, 40)}; there are {len(choices)} choices, counted from 0")
    return choices[number]

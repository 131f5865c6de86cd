"""What a benchmark is made of: items that are asked, verdicts on replies, figures made of scores, and the set that knows how for its own.

opened = open_set("blink")                             # of catalogue.py; or "blink=/data/BLINK", or a file
for item in opened.items: ...                          # item.prompt and item.images are sent, a reply comes back
verdict = opened.set.judge(item, reply)                # Verdict("B", 1.0, "bold")
opened.set.figures(items, scores)                      # [Figure("Counting", 0.61, 120, 0), ..., Figure("accuracy", 0.54, 1901, 0)]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal, overload

from actial_fast.data.sources.row import IMAGE_TAG, BadRow, Row, Turn

Form = Literal["letter", "option", "yes-no", "number", "text"]
Measure = Literal["equal", "mra", "length"]


@dataclass(frozen=True)
class Item:
    """One question of a benchmark, as it is asked.

    id: its name in the set, unique there.
    prompt: what the user's turn says, with `<image>` where an image belongs.
    images: paths or encoded bytes, one a tag, in order.
    answer: what is right, in the form that `form` says.
    options: the options' texts without letters, in the order A, B, ...; () for open questions.
    category: the question type that figures are told by.
    group: questions that count as one (rotations of the options, mirrored pictures) share it; '' for one that stands alone.
    cluster: what an interval counts as one draw: the pair, the object or the scene; '' for one of its own.
    meta: whatever else a set's figures need.
    form: letter (of an option), option (its text, where no letters are shown), yes-no, number (with a unit or not) or text.
    measure: how near a number must be. equal: up to `tolerance`; mra: VSI-Bench's mean relative accuracy; length: within a factor of two.
    tolerance: largest relative difference of a number that counts as equal.
    accepted: other answers that are as right.
    before: the turns ahead of the question, a system prompt among them.
    where: `file:row`, for messages.
    """

    id: str
    prompt: str
    images: tuple[Path | bytes, ...]
    answer: str
    options: tuple[str, ...] = ()
    category: str = ""
    group: str = ""
    cluster: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
    form: Form = "letter"
    measure: Measure = "equal"
    tolerance: float = 0.0
    accepted: tuple[str, ...] = ()
    before: tuple[Turn, ...] = ()
    where: str = ""

    @property
    def letters(self) -> str:
        """The letters of its options; the whole alphabet where the options are not known."""
        return ascii_uppercase[: len(self.options) or None]

    def row(self, system: str = "") -> Row:
        """The row that samplers take, under the system prompt `system` if it is not empty; BadRow where it cannot be asked."""
        return (
            Row(
                turns=(*self.before, Turn("user", self.prompt)),
                images=self.images,
                truth=self.answer,
                kind=self.category,
                choices=self.options,
                id=self.id,
                where=self.where,
                meta=self.meta,
                accepted=self.accepted,
            )
            .with_system(system)
            .check()
        )

    def check(self) -> Item:
        """The item itself, or BadRow: a question, an answer that can be right, as many images as tags."""
        if not self.prompt.replace(IMAGE_TAG, "").strip():
            raise BadRow(self.where, "empty question")
        if not self.answer.strip():
            raise BadRow(self.where, "no answer; a split whose answers its owner keeps to itself cannot be scored here")
        if self.form == "letter" and not (len(self.answer) == 1 and self.answer in self.letters):
            raise BadRow(self.where, f"the answer {self.answer!r} is none of the letters {', '.join(self.letters)}")
        if self.form == "option" and self.answer not in self.options:
            raise BadRow(self.where, f"the answer {self.answer!r} is not among the options {self.options}")
        if self.form == "yes-no" and self.answer not in ("yes", "no"):
            raise BadRow(self.where, f"the answer {self.answer!r} is neither yes nor no")
        self.row()
        return self


@dataclass(frozen=True)
class Found:
    """What a reply answers: in the item's form, None where it says no such thing; rule: which rule found it, '' where none did."""

    text: str | None
    rule: str = ""


@dataclass(frozen=True)
class Verdict:
    """What was found in a reply and what it is worth.

    extracted: the letter, "yes" or "no", the number or the text; None when no rule found one. score: in [0, 1]. rule: the rule that found
    it, '' when none did.
    """

    extracted: str | None
    score: float
    rule: str


@dataclass(frozen=True)
class Figure:
    """One figure of a set. name: as in the table. value: a share in [0, 1]. n: the items behind it. groups: the groups behind it, 0 where
    every item counts for itself."""

    name: str
    value: float
    n: int
    groups: int = 0


class Items(Sequence[Item]):
    """Random access to the items of an opened set: `items[i]` is checked, or BadRow; iterating stops at the first bad one."""

    def __init__(self, path: Path, length: int, get: Callable[[int], Item]) -> None:
        self.path, self._length, self._get = path, length, get

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Items: ...
    def __getitem__(self, index: int | slice) -> Item | Items:
        if isinstance(index, slice):
            chosen = range(self._length)[index]
            return Items(self.path, len(chosen), lambda i: self._get(chosen[i]))
        if not -self._length <= index < self._length:
            raise IndexError(index)
        return self._get(index % self._length).check()

    def __iter__(self) -> Iterator[Item]:
        return (self[index] for index in range(self._length))


Extract = Callable[[Item, str], Found]
Metric = Callable[[Sequence[Item], Sequence[float]], list[Figure]]
Opener = Callable[[Path | None], Items]
Worth = Callable[[Item, str], float]


@dataclass(frozen=True)
class BenchmarkSet:
    """A benchmark: where its owner publishes it, how its files are read, how replies are scored and which figures are told.

    name: as on the command line.
    title: as in tables.
    page: where its owner publishes it.
    open: the items of a file or folder, or with None of a copy on this machine; ValueError where there is none, saying `page`.
    extract: what a reply answers, by this project's rules. owner: the same as the set's own script has it.
    worth: the score, in [0, 1], of what was found.
    figures: of items and their scores, in the order of the table; ValueError for none. A figure with a part that has no items is left out.
    headline: the figure that stands for the set.
    published: model -> figure -> per cent, as printed in a paper.
    max_new_tokens: longest reply by default. system: system prompt by default, '' for the items' own.
    """

    name: str
    title: str
    page: str
    open: Opener
    extract: Extract
    owner: Extract
    worth: Worth
    figures: Metric
    headline: str
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    max_new_tokens: int = 8192
    system: str = ""

    def judge(self, item: Item, reply: str, extract: Extract | None = None) -> Verdict:
        """The verdict on a reply. extract: another rule than the set's, such as extraction.find_extractor gives."""
        found = (extract or self.extract)(item, reply)
        return Verdict(found.text, 0.0 if found.text is None else self.worth(item, found.text), found.rule)


@dataclass(frozen=True)
class Opened:
    """A set and its items."""

    set: BenchmarkSet
    items: Items

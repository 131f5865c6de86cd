"""What a benchmark is made of: items that are asked, verdicts on replies, figures made of scores, and the set that knows how for its own.

    opened = catalogue.open_set("blink")                   # or "blink=/data/BLINK", or a file
    for item in opened.items: ...                          # item.prompt and item.images are sent, a reply comes back
    verdict = opened.set.judge(item, reply)                # Verdict("B", 1.0, "bold")
    opened.set.figures(items, scores)                      # [Figure("Counting", 0.61, 120, 0), ..., Figure("average", 0.54, 1901, 0)]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, overload

from actial_fast.data.sources.row import IMAGE_TAG, BadRow, Row, Turn

Form = Literal["letter", "yes-no", "number", "text"]


@dataclass(frozen=True)
class Item:
    """One question of a benchmark, as it is asked.

    id: its name in the set, unique there. prompt: what the user's turn says, with `<image>` where an image belongs. images: paths or encoded
    bytes, one a tag, in order. answer: the option's letter, "yes" or "no", a number as text, or a text; by `form`. options: the options' texts
    without letters, in the order A, B, ...; () for open questions. category: the question type that figures are told by. group: questions that
    count as one (rotations of the options, mirrored pictures) share it; '' for one that stands alone. cluster: what an interval counts as one
    draw: the pair, the object or the scene. form: what an answer looks like. system: the item's own system prompt. accepted: other answers that
    are as right. meta: whatever else a set's figures need. where: `file:row`, for messages.
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
    system: str = ""
    accepted: tuple[str, ...] = ()
    where: str = ""

    def row(self, system: str = "") -> Row:
        """The row that samplers take, under the system prompt `system` or else the item's own; BadRow where the prompt cannot be asked."""
        head = (Turn("system", system or self.system),) if system or self.system else ()
        return Row(
            turns=(*head, Turn("user", self.prompt)),
            images=self.images,
            truth=self.answer,
            kind=self.category,
            choices=self.options,
            id=self.id,
            where=self.where,
            meta=self.meta,
            accepted=self.accepted,
        ).check()

    def check(self) -> Item:
        """The item itself, or BadRow: a question, an answer that can be right, as many images as tags."""
        if not self.prompt.replace(IMAGE_TAG, "").strip():
            raise BadRow(self.where, "empty question")
        if not self.answer.strip():
            raise BadRow(self.where, "no answer; a split whose answers its owner keeps cannot be scored here")
        letters = [chr(ord("A") + n) for n in range(len(self.options))]
        if self.form == "letter" and self.options and self.answer not in letters:
            raise BadRow(self.where, f"the answer {self.answer!r} is none of the letters {', '.join(letters)}")
        self.row()
        return self


@dataclass(frozen=True)
class Verdict:
    """What was found in a reply and what it is worth.

    extracted: the letter, "yes" or "no", the number or the text; None when no rule found one. score: in [0, 1]. rule: the rule that found it,
    '' when none did.
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


Judge = Callable[[Item, str], Verdict]
Metric = Callable[[Sequence[Item], Sequence[float]], list[Figure]]
Opener = Callable[[Path | None], Items]


@dataclass(frozen=True)
class BenchmarkSet:
    """A benchmark: where its owner publishes it, how its files are read, how replies are scored and which figures are told.

    name: as on the command line. title: as in tables. page: where its owner publishes it. open: the items of a file or folder, or with None
    of a copy on this machine; ValueError where there is none, saying `page`. judge: the verdict on a reply to an item. figures: of items and
    their scores (as many, each in [0, 1]). headline: the figure that stands for the set. published: model -> figure -> per cent, as printed in
    a paper. max_new_tokens: longest reply by default. system: system prompt by default, '' for none.
    """

    name: str
    title: str
    page: str
    open: Opener
    judge: Judge
    figures: Metric
    headline: str
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    max_new_tokens: int = 8192
    system: str = ""


@dataclass(frozen=True)
class Opened:
    """A set and its items."""

    set: BenchmarkSet
    items: Items

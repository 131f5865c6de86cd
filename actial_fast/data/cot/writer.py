"""Pseudo chains of thought for the hybrid cold start: whoever writes them, they are checked and stored as rows.

A `Writer` writes them for many rows at a time. `one_by_one(geometric_cot)` is one (the poses give every statement), EngineWriter of
rollout/thoughts.py another (a strong model that is told the truth). No text is stored before a check (checking.py) has passed it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from PIL import Image

from actial_fast.data.cot.checking import check_cot, reasoning
from actial_fast.data.cot.pairs import Pairs, answered
from actial_fast.data.sources.files import writing
from actial_fast.data.sources.jsonl import recover
from actial_fast.data.sources.picture import decode
from actial_fast.data.sources.row import BadRow, Row, Turn
from actial_fast.data.sources.source import Source
from actial_fast.data.sources.tags import TAG

Check = Callable[[str, Row], str | None]  # why a text cannot be used for a row: "what: where"
MAX_FAILURES = 20  # rows in a row without a reply: the model is gone, not the row
CHUNK = 256  # rows that a writer has at a time


@dataclass(frozen=True)
class _Finished:
    """A row, the rows to store for it (none with a reason), its text, and why it is rejected. kept: it was there before."""

    row: Row
    stored: tuple[Row, ...] = ()
    text: str | None = None
    reason: str | None = None
    kept: bool = False


class WriterError(Exception):
    """A writer got no text for a row, for a reason that is not the row's (its server timed out, say)."""


class NoText(Exception):
    """A writer got a reply to a row that is no text, or not all of one: the model refused, called a tool, or was cut off. Says which."""

    def __init__(self, reason: str, text: str | None = None):
        super().__init__(reason)
        self.text = text


Written = str | BadRow | WriterError | NoText  # a text, or why there is none


class Writer(Protocol):
    """Writes a chain of thought for each of some rows."""

    def __call__(self, rows: Sequence[Row], rngs: Sequence[random.Random], done: Callable[[int, Written], None]) -> None:
        """Calls done(i, text) once for every row, in any order, as soon as its text is final. rngs: one a row, for all that is random."""


def one_by_one(write: Callable[[Row, random.Random], str]) -> Writer:
    """The writer that writes row after row: write(row, rng) gives a text or raises BadRow, WriterError or NoText."""

    def writer(rows: Sequence[Row], rngs: Sequence[random.Random], done: Callable[[int, Written], None]) -> None:
        for i, (row, rng) in enumerate(zip(rows, rngs, strict=True)):
            text: Written
            try:
                text = write(row, rng)
            except (BadRow, WriterError, NoText) as error:
                text = error
            done(i, text)

    return writer


@dataclass(frozen=True)
class CotSummary:
    """What `write_cot` did, in rows, or in pairs where the source has these. written: added; kept: there before; rejected: by reason."""

    written: int
    kept: int
    rejected: dict[str, int]


def rows_drawn(source: Source, seed: int, count: int) -> Sequence[int]:
    """The rows that `write_cot` takes, in order. ValueError for a count above the number of rows."""
    if count > len(source):
        raise ValueError(f"count is {count}, but there are only {len(source)} rows")
    return sorted(random.Random(seed).sample(range(len(source)), count)) if count else range(len(source))


def write_cot(
    source: Source,
    out: Path,
    writer: Writer,
    *,
    seed: int = 0,
    count: int = 0,
    check: Check = check_cot,
    progress: Callable[[int, int], None] | None = None,
) -> CotSummary:
    """Write the rows of `source` with a chain of thought in place of the answer to `out`, as JSON Lines (row.py).

    Rows keep their order. Continues where an earlier call stopped: rows whose id is in `out` stay as they are, rejected ones are tried
    again. Every other row ends up in `out` or, with its reason and text, in `out`.rejects.jsonl. Embedded images are written to files
    beside `out`. Of `Pairs`, the questions of a pair that get its chain are written, and it is there when one of them is.

    Args:
        source: rows with a truth; an id that occurs twice is an error.
        out: the file to write or continue.
        writer: given CHUNK rows at a time, each with an rng that depends on seed and id only.
        seed: chooses the rows (with count) and the wordings.
        count: draw this many rows of the source; 0 takes all.
        check: says why a text cannot be used for a row; by default check_cot, a checking.Check to have a run's rules and copies found.
        progress: called with (rows done, rows in all).

    Raises ValueError for a count above the number of rows, a repeated id, and after MAX_FAILURES rows in a row without a reply (run it
    again to go on).
    """
    indices = rows_drawn(source, seed, count)
    out.parent.mkdir(parents=True, exist_ok=True)
    done = {record["id"] for record in recover(out)}
    number = kept = written = failures = 0
    rejected: Counter[str] = Counter()
    with writing(out), open(out, "a", encoding="utf-8") as good, open(rejects_of(out), "w", encoding="utf-8") as bad:

        def store(each: _Finished) -> None:
            nonlocal number, kept, written, failures
            number += 1
            if progress:
                progress(number, len(indices))
            if each.kept:
                kept += 1
            elif each.reason is None:
                good.write("".join(json.dumps(row.to_json(out.parent)) + "\n" for row in each.stored))
                good.flush()
                written += 1
            else:
                rejected[each.reason.partition(":")[0]] += 1
                bad.write(json.dumps({"id": each.row.id, "where": each.row.where, "reason": each.reason, "text": each.text}) + "\n")
                bad.flush()
            failures = failures + 1 if each.reason and each.reason.startswith("no reply") else 0
            if failures >= MAX_FAILURES:
                raise ValueError(f"the last {failures} rows got no reply ({each.reason}); {written} are written, run it again to go on")

        finish = _Finisher(source, out, check)
        for chunk in _chunks(source, indices):
            _write_chunk(chunk, writer, seed, done, finish, store)
    return CotSummary(written, kept, dict(rejected))


def rejects_of(out: Path) -> Path:
    """The file of what was rejected for `out`."""
    return out.with_suffix(".rejects.jsonl")


def stored_chains(out: Path) -> Iterator[tuple[str, str]]:
    """The ids and chains that are in a file of write_cot's already."""
    for record in recover(out):
        yield record["id"], record["messages"][-1]["content"]


def rejected_before(out: Path) -> dict[str, tuple[str, str]]:
    """The text and the reason of each row that was rejected for `out`, by id; without those that have no text."""
    path = rejects_of(out)
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return {record["id"]: (record["text"], record["reason"]) for record in records if record["text"]}


def unwritten(source: Source, out: Path, seed: int = 0, count: int = 0) -> Iterator[Row]:
    """The rows that write_cot would have written, without those that cannot be read."""
    done = {record["id"] for record in recover(out)}
    finisher = _Finisher(source, out, check_cot)
    for chunk in _chunks(source, rows_drawn(source, seed, count)):
        for row in chunk:
            if isinstance(row, Row) and not done.intersection(finisher.ids(row)):
                yield row


def _chunks(source: Source, indices: Sequence[int]) -> Iterator[list[Row | BadRow]]:
    """The rows in order, each with an id."""
    seen: set[str] = set()
    for start in range(0, len(indices), CHUNK):
        chunk: list[Row | BadRow] = []
        for index in indices[start : start + CHUNK]:
            try:
                row = source[index]
            except BadRow as error:
                chunk.append(error)
                continue
            row = replace(row, id=row.id or row.where)
            if row.id in seen:
                raise ValueError(f"{row.where}: the id {row.id!r} occurs twice; ids must be unique to continue a run")
            seen.add(row.id)
            chunk.append(row)
        yield chunk


def _write_chunk(
    chunk: Sequence[Row | BadRow],
    writer: Writer,
    seed: int,
    done: set[str],
    finisher: _Finisher,
    store: Callable[[_Finished], None],
) -> None:
    """Have a chunk written, and store each row once all before it are stored."""
    finished: dict[int, _Finished] = {}
    stored = 0

    def finish(place: int, each: _Finished) -> None:
        nonlocal stored
        assert place not in finished, "a row is written once"
        finished[place] = each
        while stored in finished:
            stored += 1
            store(finished[stored - 1])

    wanted: list[tuple[int, Row]] = []
    for place, row in enumerate(chunk):
        if isinstance(row, BadRow):
            finish(place, _Finished(Row((), where=row.where), reason=f"bad row: {row.reason}"))
        elif done.intersection(finisher.ids(row)):
            finish(place, _Finished(row, kept=True))
        else:
            wanted.append((place, row))
    if wanted:
        rngs = [random.Random(f"{seed}/{row.id}") for _, row in wanted]
        writer([row for _, row in wanted], rngs, lambda i, text: finish(wanted[i][0], finisher(wanted[i][1], text)))
    assert stored == len(chunk), "a writer finishes every row"


class _Finisher:
    """What becomes of a row and the text that was written for it."""

    def __init__(self, source: Source, out: Path, check: Check):
        self._pairs = source if isinstance(source, Pairs) else None
        self._out, self._check = out, check

    def ids(self, row: Row) -> list[str]:
        """Under which ids a row's chain stands in the file."""
        return [each.id or each.where for each in self._pairs.questions(row)] if self._pairs else [row.id]

    def __call__(self, row: Row, text: Written) -> _Finished:
        if isinstance(text, WriterError):
            return _Finished(row, reason=f"no reply: {text}")
        if isinstance(text, NoText):
            return _Finished(row, text=text.text, reason=str(text))
        try:
            if isinstance(text, BadRow):
                raise text
            if reason := self._check(text, row):
                return _Finished(row, text=text, reason=reason)
            images = tuple(image if isinstance(image, Path) else _to_file(image, row.where, self._out) for image in row.images)
            if self._pairs:
                stored = [answered(each, reasoning(text)) for each in self._pairs.questions(row)]
            else:
                opened = [tag.end() for tag in TAG.finditer(text)][2]
                # "B." is right, and what is trained is the truth as the row has it
                text = f"{text[:opened]}{row.truth}</answer>"
                stored = [replace(row, turns=(*row.prompt, Turn("assistant", text)))]
        except BadRow as error:
            return _Finished(row, reason=f"bad row: {error.reason}")
        return _Finished(row, tuple(replace(each, id=each.id or each.where, images=images) for each in stored), text)


def _to_file(image: bytes, where: str, out: Path) -> Path:
    """The path of a file with these bytes, in a folder beside `out`; BadRow when they are no image."""
    decode(image, where)
    suffix = (Image.open(io.BytesIO(image)).format or "img").lower()
    path = out.with_suffix("") / f"{hashlib.sha256(image).hexdigest()[:16]}.{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        temporary = path.with_suffix(f".{os.getpid()}.{id(image)}.tmp")
        temporary.write_bytes(image)
        os.replace(temporary, path)
    return path

"""Pseudo chains of thought for the hybrid cold start: written from a row's poses, checked, and stored as rows.

A `Writer` writes them for many rows at a time. `one_by_one(geometric_cot)` is one (the poses give every statement), EngineWriter of
rollout/thoughts.py another (a strong model that is told the truth). Whoever wrote it, no text is stored before `check_cot` has passed it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from PIL import Image

from actial_fast.data.sources.answers import is_right
from actial_fast.data.sources.files import writing
from actial_fast.data.sources.jsonl import recover
from actial_fast.data.sources.picture import decode
from actial_fast.data.sources.row import IMAGE_TAG, BadRow, Row, Turn
from actial_fast.data.sources.source import Source
from actial_fast.data.sources.tags import TAG, is_well_formed

_Finished = tuple[Row, str | None, str | None]  # a row, its text, why it is rejected
_Store = Callable[[Row, str | None, str | None], None]
MAX_FAILURES = 20  # rows in a row without a reply: the model is gone, not the row
CHUNK = 256  # rows that a writer has at a time

SHORT = {  # one wording a kind and no figures: a tiny model has to learn these from a few hundred rows
    "ego_translation": "The camera moved to the {ego}. So the answer is {letter}.",
    "object_translation": "The camera moved to the {ego}. For the object that is the {object}. So the answer is {letter}.",
    "ego_rotation": "The camera turned to the {turn}. So the answer is {letter}.",
}
SHORT_SPATIAL = {  # of captures/spatial.py; the answer, which the poses decided, says it all
    "facing_side": "We see the {choice}. So the answer is {letter}.",
    "turn_size": "The camera travelled {choice} round the object. So the answer is {letter}.",
}
IDENTIFY = (
    "The first image shows the object from one viewpoint and the second shows the same object from another. The object stands still, so "
    "every difference between them comes from the camera.",
    "I have two photos of one object. Nothing but the camera changes between them, so I can read its motion from how the view changes.",
    "Image 1 is the starting view and image 2 the view after the move. It is the same object both times, and it has not moved.",
)
COMPARE_CAMERA = (
    "From the camera's perspective: the flank of the object that lay towards the {ego} in the first image faces the camera more in the "
    "second, and the flank towards the {other} turns away.",
    "As the camera sees it, more of what was on the object's {ego}-hand edge in image 1 has come round to the front in image 2, while the "
    "{other}-hand edge has gone out of sight.",
    "Looking through the camera, image 2 shows more of the side that was at the {ego} of the object in image 1 and less of the side at its "
    "{other}.",
)
COMPARE_OBJECT = (
    "From the object's perspective: it faces the first camera, so what the camera calls {ego} is the object's own {object}.",
    "Seen by the object, which looks back at the first camera, the sides are swapped: the camera's {ego} is its {object}.",
    "If I stand in the object's place and look at the first camera, the camera's {ego}-hand side is at my {object}.",
)
ANALYSE = {
    "ego_translation": (
        "Position of the camera: to see more of that flank it must stand further to the {ego} than before, so its position moved {ego}.",
        "For the camera's own translation I need the side to which its position shifted. Coming to see the {ego} flank takes a step to the "
        "{ego}.",
    ),
    "object_translation": (
        "The camera stepped to its own {ego}. Told from the object, which faces it, this step goes to the {object}.",
        "For the object's account I swap sides: a camera that moves to its {ego} moves to the {object} of an object that looks at it.",
    ),
    "ego_rotation": (
        "Orientation of the camera: compared with the first image its viewing direction is turned to the {turn}, about {yaw} degrees.",
        "For the rotation only the viewing direction counts, not the place: it swung by about {yaw} degrees to the {turn}.",
    ),
}
WHY_TURN = (
    "Having moved to the {ego}, it has to turn {turn} to keep the object in view.",
    "That fits the move: from further {ego}, the object is found by looking more to the {turn}.",
)
SYNTHESISE = (
    "Together: the camera went about {angle} degrees {sense} around the object as seen from above, moved to its own {ego}, which is the "
    "object's {object}, and turned {turn}.",
    "Putting it together, this is a move of about {angle} degrees {sense} around the object (seen from above): position to the {ego}, "
    "viewing direction to the {turn}; for the object, a move to the {object}.",
)
CONCLUDE = (
    'So the question is answered by "{choice}", which is option {letter}.',
    'This makes the answer {letter}, "{choice}".',
    'The option that says "{choice}" is {letter}, so the answer is {letter}.',
)
LEAK = re.compile(r"\b(?:given|true|provided|supplied|told)\s+(?:the\s+)?(?:true\s+)?answer\b", re.IGNORECASE)


def geometric_cot(row: Row, rng: random.Random, style: str = "full") -> str:
    """A chain of thought for a viewpoint row, in which the poses make every statement true; in short also for some spatial rows.

    Args:
        row: as viewpoint.rows gives it: kind, choices, truth (a letter) and the pair's `meta`. Or a row of SAT's with a kind of
            SHORT_SPATIAL and answered by letter.
        rng: chooses the wordings.
        style: "full" follows the paper's steps (identify the images, compare from the camera's and the object's perspective, analyse
            the movement asked about, synthesise, answer); "short" is two or three fixed sentences from SHORT, without figures.

    Returns "<think>...</think><answer>LETTER</answer>" (short) or with a line break between the two (full).
    Raises BadRow when the row is no viewpoint row or its truth is not what its poses say.
    """
    assert style in ("full", "short"), style
    meta = row.meta
    if style == "short" and row.kind in SHORT_SPATIAL:
        index = ord(row.truth) - ord("A") if len(row.truth) == 1 else -1
        if not 0 <= index < len(row.choices):
            raise BadRow(row.where or row.id, f"the truth is {row.truth!r}, no letter of {len(row.choices)} choices; open it with letters")
        thought = SHORT_SPATIAL[row.kind].format(choice=row.choices[index], letter=row.truth)
        return f"<think>{thought}</think><answer>{row.truth}</answer>"
    if row.kind not in SHORT or not {"azimuth_change_deg", "yaw_deg", *SHORT} <= set(meta):
        raise BadRow(row.where or row.id, f"kind {row.kind!r} with meta {sorted(meta)} is no viewpoint row; its poses are needed")
    choice = meta[row.kind]
    letter = chr(ord("A") + row.choices.index(choice)) if choice in row.choices else ""
    if letter != row.truth:
        raise BadRow(row.where or row.id, f"the truth is {row.truth!r} but the poses say {choice!r}, option {letter!r}")
    facts = {
        "ego": meta["ego_translation"],
        "object": meta["object_translation"],
        "other": "left" if meta["ego_translation"] == "right" else "right",
        "turn": meta["ego_rotation"],
        "angle": round(abs(meta["azimuth_change_deg"])),
        "yaw": round(abs(meta["yaw_deg"])),
        "sense": "counterclockwise" if meta["azimuth_change_deg"] > 0 else "clockwise",
        "choice": choice,
        "letter": letter,
    }
    if style == "short":
        return f"<think>{SHORT[row.kind].format(**facts)}</think><answer>{letter}</answer>"
    steps = [rng.choice(IDENTIFY), rng.choice(COMPARE_CAMERA) + " " + rng.choice(COMPARE_OBJECT), rng.choice(ANALYSE[row.kind])]
    if row.kind == "ego_rotation" and facts["turn"] != facts["ego"]:  # a camera that turned the other way did not keep the object in view
        steps[-1] += " " + rng.choice(WHY_TURN)
    steps += [rng.choice(SYNTHESISE), rng.choice(CONCLUDE)]
    return f"<think>{chr(10).join(steps).format(**facts)}</think>\n<answer>{letter}</answer>"


def check_cot(text: str, row: Row) -> str | None:
    """Why `text` may not train a model to answer `row`, or None when it may.

    Tags must be well formed (as the format reward wants them), the reasoning not empty, without an image tag and without talk of an answer
    it was given, the answer right (answers.is_right), and neither the last "answer is X" / "option X" nor the last sentence of the
    reasoning may name another choice.
    """
    if not row.truth:
        return "row has no truth"
    if not is_well_formed(text):
        return "malformed tags"
    if not is_right(text, row):
        return "wrong answer"
    opened, closed, *_ = TAG.finditer(text)
    thought = text[opened.end() : closed.start()].strip()
    if not thought:
        return "no reasoning"
    if IMAGE_TAG in text:
        return "image tag in the text"
    if LEAK.search(thought):
        return "talks of a given answer"
    if _contradicts(thought, row):
        return "reasoning contradicts the answer"
    return None


def _contradicts(thought: str, row: Row) -> bool:
    right = {row.truth.casefold()}
    for labels in ({chr(ord("a") + i), choice.casefold()} for i, choice in enumerate(row.choices)):
        if right & labels:
            right = labels
            break
    texts = "|".join(re.escape(choice) for choice in sorted(row.choices, key=len, reverse=True)) or r"(?!)"
    claim = rf"(?i:\b(?:answer|option|choice)(?:\s+(?:is|must be|would be|should be))?)\s*:?\s*[\"'(*]*(\b[A-Z]\b|(?i:\b(?:{texts})\b))"
    if (claims := re.findall(claim, thought)) and claims[-1].casefold() not in right:
        return True
    last = [sentence for sentence in re.split(r"(?<=[.!?])\s+|\n", thought) if sentence.strip()][-1]
    named = {found.casefold() for found in re.findall(rf"(?i:\b(?:{texts})\b)", last)}
    return len(named) == 1 and not named & right


class WriterError(Exception):
    """A writer got no text for a row, for a reason that is not the row's (its server timed out, say)."""


Written = str | BadRow | WriterError  # a text, or why there is none


class Writer(Protocol):
    """Writes a chain of thought for each of some rows."""

    def __call__(self, rows: Sequence[Row], rngs: Sequence[random.Random], done: Callable[[int, Written], None]) -> None:
        """Calls done(i, text) once for every row, in any order, as soon as its text is final. rngs: one a row, for all that is random."""


def one_by_one(write: Callable[[Row, random.Random], str]) -> Writer:
    """The writer that writes row after row: write(row, rng) gives a text or raises BadRow or WriterError."""

    def writer(rows: Sequence[Row], rngs: Sequence[random.Random], done: Callable[[int, Written], None]) -> None:
        for i, (row, rng) in enumerate(zip(rows, rngs, strict=True)):
            text: Written
            try:
                text = write(row, rng)
            except (BadRow, WriterError) as error:
                text = error
            done(i, text)

    return writer


@dataclass(frozen=True)
class CotSummary:
    """What `write_cot` did. written: rows added; kept: rows that were there before; rejected: rows left out, by reason."""

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
    progress: Callable[[int, int], None] | None = None,
) -> CotSummary:
    """Write the rows of `source` with a chain of thought in place of the answer to `out`, as JSON Lines (row.py).

    Rows keep their order. Continues where an earlier call stopped: rows whose id is in `out` stay as they are, rejected ones are tried
    again. Every other row ends up in `out` or, with its reason and text, in `out`.rejects.jsonl. Embedded images are written to files
    beside `out`.

    Args:
        source: rows with a truth; an id that occurs twice is an error.
        out: the file to write or continue.
        writer: given CHUNK rows at a time, each with an rng that depends on seed and id only.
        seed: chooses the rows (with count) and the wordings.
        count: draw this many rows of the source; 0 takes all.
        progress: called with (rows done, rows in all).

    Raises ValueError for a count above the number of rows, a repeated id, and after MAX_FAILURES rows in a row without a reply (run it
    again to go on).
    """
    indices = rows_drawn(source, seed, count)
    out.parent.mkdir(parents=True, exist_ok=True)
    done = {record["id"] for record in recover(out)}
    number = kept = written = failures = 0
    rejected: Counter[str] = Counter()
    with writing(out), open(out, "a", encoding="utf-8") as good, open(out.with_suffix(".rejects.jsonl"), "w", encoding="utf-8") as bad:

        def store(row: Row, text: str | None, reason: str | None) -> None:
            """text and reason are None for a row that was there before."""
            nonlocal number, kept, written, failures
            number += 1
            if progress:
                progress(number, len(indices))
            if reason is None and text is None:
                kept += 1
            elif reason is None:
                good.write(json.dumps(row.to_json(out.parent)) + "\n")
                good.flush()
                written += 1
            else:
                rejected[reason.partition(":")[0]] += 1
                bad.write(json.dumps({"id": row.id, "where": row.where, "reason": reason, "text": text}) + "\n")
                bad.flush()
            failures = failures + 1 if reason and reason.startswith("no reply") else 0
            if failures >= MAX_FAILURES:
                raise ValueError(f"the last {failures} rows got no reply ({reason}); {written} are written, run it again to go on")

        for chunk in _chunks(source, indices):
            _write_chunk(chunk, writer, seed, done, out, store)
    return CotSummary(written, kept, dict(rejected))


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
    out: Path,
    store: Callable[[Row, str | None, str | None], None],
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
            store(*finished[stored - 1])

    wanted: list[tuple[int, Row]] = []
    for place, row in enumerate(chunk):
        if isinstance(row, BadRow):
            finish(place, (Row((), where=row.where), None, f"bad row: {row.reason}"))
        elif row.id in done:
            finish(place, (row, None, None))
        else:
            wanted.append((place, row))
    if wanted:
        rngs = [random.Random(f"{seed}/{row.id}") for _, row in wanted]
        writer([row for _, row in wanted], rngs, lambda i, text: finish(wanted[i][0], _checked(wanted[i][1], text, out)))
    assert stored == len(chunk), "a writer finishes every row"


def _checked(row: Row, text: Written, out: Path) -> _Finished:
    if isinstance(text, WriterError):
        return row, None, f"no reply: {text}"
    try:
        if isinstance(text, BadRow):
            raise text
        if reason := check_cot(text, row):
            return row, text, reason
        images = tuple(image if isinstance(image, Path) else _to_file(image, row.where, out) for image in row.images)
    except BadRow as error:
        return row, None, f"bad row: {error.reason}"
    opened = [tag.end() for tag in TAG.finditer(text)][2]
    text = f"{text[:opened]}{row.truth}</answer>"  # "B." is right, and what is trained is the truth as the row has it
    return replace(row, turns=(*row.prompt, Turn("assistant", text)), images=images), text, None


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

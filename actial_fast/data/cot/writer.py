"""Pseudo chains of thought for the hybrid cold start: written from a row's poses, checked, and stored as rows.

A writer is `writer(row, rng) -> str`. `geometric_cot` is one (the poses give every statement), endpoint.EndpointWriter another (a strong
model that is told the truth). Whoever wrote it, no text is stored before `check_cot` has passed it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from actial_fast.data.sources.jsonl import recover
from actial_fast.data.sources.row import IMAGE_TAG, BadRow, Row, Turn, decode
from actial_fast.data.sources.source import Source
from actial_fast.data.sources.tags import TAG, is_well_formed, same_answer, tagged_answer

Writer = Callable[[Row, random.Random], str]
_Finished = tuple[Row, str | None, str | None]  # a row, its text, why it is rejected
MAX_FAILURES = 20  # rows in a row without a reply: the endpoint is gone, not the row

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
    it was given, the answer equal to the truth, and neither the last "answer is X" / "option X" nor the last sentence of the reasoning may
    name another choice.
    """
    if not row.truth:
        return "row has no truth"
    if not is_well_formed(text):
        return "malformed tags"
    if not same_answer(tagged_answer(text) or "", row.truth):
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
    """A writer got no text for a row, for a reason that is not the row's (the endpoint timed out, say)."""


@dataclass(frozen=True)
class CotSummary:
    """What `write_cot` did. written: rows added; kept: rows that were there before; rejected: rows left out, by reason."""

    written: int
    kept: int
    rejected: dict[str, int]


def write_cot(
    source: Source,
    out: Path,
    writer: Writer,
    *,
    seed: int = 0,
    count: int = 0,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> CotSummary:
    """Write the rows of `source` with a chain of thought in place of the answer to `out`, as JSON Lines (row.py).

    Rows keep their order. Continues where an earlier call stopped: rows whose id is in `out` stay as they are, rejected ones are tried
    again. Every other row ends up in `out` or, with its reason and text, in `out`.rejects.jsonl. Embedded images are written to files
    beside `out`.

    Args:
        source: rows with a truth; an id that occurs twice is an error.
        out: the file to write or continue.
        writer: called as writer(row, rng) with an rng that depends on seed and id only; several at a time when workers > 1.
        seed: chooses the rows (with count) and the wordings.
        count: draw this many rows of the source; 0 takes all.
        workers: threads that call the writer.
        progress: called with (rows done, rows in all).

    Raises ValueError for a count above the number of rows, a repeated id, and after MAX_FAILURES rows in a row without a reply (run it
    again to go on).
    """
    if count > len(source):
        raise ValueError(f"count is {count}, but there are only {len(source)} rows")
    indices = sorted(random.Random(seed).sample(range(len(source)), count)) if count else range(len(source))
    out.parent.mkdir(parents=True, exist_ok=True)
    done = {record["id"] for record in recover(out)}
    kept = written = failures = 0
    rejected: Counter[str] = Counter()
    with open(out, "a") as good, open(out.with_suffix(".rejects.jsonl"), "w") as bad:
        for number, (row, text, reason) in enumerate(_texts(source, indices, writer, seed, done, workers, out), 1):
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
    return CotSummary(written, kept, dict(rejected))


def _texts(
    source: Source, indices: Sequence[int], writer: Writer, seed: int, done: set[str], workers: int, out: Path
) -> Iterator[_Finished]:
    """(finished row, text, reason it is rejected) in order; text and reason are None for a row that was there before."""

    def work(row: Row) -> _Finished:
        try:
            text = writer(row, random.Random(f"{seed}/{row.id}"))
            if reason := check_cot(text, row):
                return row, text, reason
            images = tuple(image if isinstance(image, Path) else _to_file(image, row.where, out) for image in row.images)
        except BadRow as error:
            return row, None, f"bad row: {error.reason}"
        except WriterError as error:
            return row, None, f"no reply: {error}"
        return replace(row, turns=(*row.prompt, Turn("assistant", text)), images=images), text, None

    seen: set[str] = set()
    todo = iter(indices)
    ahead: deque[Future[_Finished]] = deque()
    with ThreadPoolExecutor(workers, "cot") as pool:
        try:
            while True:
                while len(ahead) < 2 * workers and (index := next(todo, None)) is not None:
                    future: Future[_Finished] = Future()
                    try:
                        row = source[index]
                        row = replace(row, id=row.id or row.where)
                    except BadRow as error:
                        future.set_result((Row((), where=error.where), None, f"bad row: {error.reason}"))
                        ahead.append(future)
                        continue
                    if row.id in seen:
                        raise ValueError(f"{row.where}: the id {row.id!r} occurs twice; ids must be unique to continue a run")
                    seen.add(row.id)
                    if row.id in done:
                        future.set_result((row, None, None))
                    ahead.append(future if row.id in done else pool.submit(work, row))
                if not ahead:
                    return
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


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

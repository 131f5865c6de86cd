"""Rows that teach random weights what a pretrained model knows: where a camera stands, which way it moved, how a question reads.

A stand-in for pretraining, used by the quickstart only. Three kinds, made from the viewpoint builder's rows (its training rows, so that no
test object is touched) and from the front that `actial data render` records in scene.json:

    azimuth  one image        -> where the camera stands about the object, in steps of 15 degrees
    move     two images     -> whether the camera moved to its left, to its right or not at all
    letter   text alone       -> a move told in words, a viewpoint question and its options -> the letter
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from actial_fast.data.captures.questions import NO_MOVE
from actial_fast.data.sources.files import writing
from actial_fast.data.sources.own import JsonlSource
from actial_fast.data.sources.row import IMAGE_TAG, Row, Turn

STEP = 15
AZIMUTH_QUESTION = "From which side was the photo taken?"
MOVE_QUESTION = "How did the camera move?"
MOVED = {"left": "The camera moved to the left.", "right": "The camera moved to the right.", NO_MOVE: "The camera did not move."}
FACING_FRONT = 90.0  # degrees from the front within which a camera stands on the front half of the ring


def azimuth_name(degrees: float) -> str:
    """The words for a camera's azimuth about the object's front, counterclockwise seen from above, rounded to STEP degrees."""
    step = round(degrees / STEP) * STEP
    step = (step + 180) % 360 - 180
    if step == 0:
        return "from the front"
    return "from behind" if step == -180 else f"{abs(step)} degrees to the {'right' if step > 0 else 'left'} of the front"


def write_basics(viewpoint: Path, captures: Path, out: Path, *, front: bool, seed: int) -> dict[str, int]:
    """Write the three kinds of rows for every training pair in `viewpoint` (a JSONL of the viewpoint builder) into `out`.

    front: only pairs whose cameras both stand on the front half of the ring. Returns the number of rows of each kind. Raises ValueError
    when a capture has no scene.json or no pair is left.
    """
    rng = random.Random(seed)
    source = JsonlSource(viewpoint)
    counts: dict[str, int] = {}
    temporary = out.with_name(out.name + ".tmp")
    with writing(temporary), open(temporary, "w", encoding="utf-8") as file:
        for i in range(len(source)):
            for row in _rows(source[i], captures, front, rng):
                counts[row.kind] = counts.get(row.kind, 0) + 1
                file.write(json.dumps(row.to_json(out.parent), ensure_ascii=False) + "\n")
    if not counts:
        raise ValueError(f"{viewpoint}: no pair has both cameras on the front half; render more objects or views")
    temporary.replace(out)
    return counts


def _rows(row: Row, captures: Path, front: bool, rng: random.Random) -> Iterator[Row]:
    azimuths = scene_azimuths(captures / row.meta["object"])
    if not azimuths.keys() >= set(row.meta["pair"]):
        raise ValueError(f"{row.where}: scene.json knows no {row.meta['pair'][0]}; the basics need whole photographs, crops=0")
    angles = [azimuths[name] for name in row.meta["pair"]]
    if front and any(abs(angle) > FACING_FRONT for angle in angles):
        return
    move = row.meta["ego_translation"]
    question = row.turns[0].content.replace(IMAGE_TAG, "")
    yield _row(row, "letter", f"{MOVED[move]}\n{question}", row.truth, (), row.choices)
    # half of the time behind a viewpoint question, so that the move is also seen from further down the prompt
    asked = rng.choice(("", f"{question}\n")) + MOVE_QUESTION
    yield _row(row, "move", f"{IMAGE_TAG}{IMAGE_TAG}{asked}", MOVED[move], row.images, tuple(MOVED.values()))
    if row.kind == "ego_translation":  # the three rows of a pair share its images: the rest is said once
        which = rng.randrange(2)
        yield _row(row, "azimuth", f"{IMAGE_TAG}{AZIMUTH_QUESTION}", azimuth_name(angles[which]), row.images[which : which + 1])


def _row(origin: Row, kind: str, question: str, answer: str, images: Sequence[Path | bytes], choices: Sequence[str] = ()) -> Row:
    turns = (Turn("user", question), Turn("assistant", answer))
    return Row(turns=turns, images=tuple(images), truth=answer, kind=kind, choices=tuple(choices), id=f"{origin.id}/{kind}").check()


@functools.cache
def scene_azimuths(capture: Path) -> dict[str, float]:
    """Each image's azimuth about the object's front in degrees, in (-180, 180], as `actial data render` recorded it."""
    try:
        scene = json.loads((capture / "scene.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{capture}: no scene.json; the basics need captures made by `actial data render`") from None
    names = sorted(path.name for path in (capture / "images").iterdir())
    return dict(zip(names, scene["azimuth_deg"], strict=True))

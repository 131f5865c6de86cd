"""What is asked about a pair of photographs: three questions, in several wordings, and the rows that they become."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from actial_fast.data.sources.row import IMAGE_TAG, Row, Turn

KINDS = ("ego_translation", "object_translation", "ego_rotation")
LETTERS = "ABC"
NO_MOVE, NO_TURN = "no movement", "no rotation"
OPTIONS = {
    "ego_translation": ("left", "right", NO_MOVE),
    "object_translation": ("left", "right", NO_MOVE),
    "ego_rotation": ("left", "right", NO_TURN),
}
QUESTIONS = {
    "ego_translation": (
        "These two photos show one object that stays still. From the camera's own perspective, which way did its position move between the "
        "first photo and the second?",
        "A camera took the first photo, changed its place and took the second. As the camera sees it, to which side did it move?",
        "Imagine holding the camera of the first photo. To which side did you walk to take the second photo?",
        "Relative to the camera's position and view in the first photo, on which side is the position from which the second was taken?",
        "Seen by the photographer at the first photo, in which direction does the camera's place shift before the second photo?",
    ),
    "object_translation": (
        "These two photos show one object that stays still. From the perspective of the object, which faces the camera of the first photo, "
        "which way did the camera move between the two photos?",
        "Suppose the object could look straight back at the camera of the first photo. To which of its own sides did the camera then move?",
        "Imagine standing in the object's place, facing the first camera. To your left or to your right is the camera of the second photo?",
        "Told from the object's point of view as it faces the first camera, to which side did the camera's position move?",
        "If the object had eyes on the side shown in the first photo, to which side would it see the camera go before the second photo?",
    ),
    "ego_rotation": (
        "These two photos show one object that stays still. About its own vertical axis, which way did the camera turn from the first "
        "photo to the second?",
        "Compare the directions in which the camera looked. From its own perspective, did it turn to the left or to the right after the "
        "first photo?",
        "Imagine holding the camera of the first photo. To which side must you turn your view to look the way the second photo does?",
        "Leave the camera's position aside: to which side did its viewing direction rotate between the first photo and the second?",
        "Seen by the photographer, in which direction did the camera pan from the first photo to the second?",
    ),
}
# These take a move for granted, which a pair without one does not have.
PRESUMING = QUESTIONS["ego_translation"][1:3]
REQUEST = "Answer with the letter of the right option only."
SIDES = {1: "right", -1: "left"}
OPPOSITE = {"left": "right", "right": "left"}


def reverse(pair: dict[str, Any]) -> dict[str, Any]:
    """The same pair with the second image first: every side and sign swaps; no move, or turn, stays none."""
    return {
        **pair,
        **{key: pair[key][::-1] for key in ("pair", "azimuth_deg", "poses", "centre", "cameras") if key in pair},
        **{key: -pair[key] for key in ("azimuth_change_deg", "yaw_deg")},
        **{kind: OPPOSITE.get(pair[kind], pair[kind]) for kind in KINDS},
    }


def rows(pair: dict[str, Any], folder: Path, seed: int, ask_letter: bool = False, presuming: bool = True) -> list[Row]:
    """The three rows of a pair, in the order of KINDS. Wording and order of the options are drawn from seed and pair.

    pair: as from pairs() or reverse(). folder: that its images are in. ask_letter: as in ViewpointConfig. presuming: whether wordings may
    take a move for granted; where some pairs of a set have none, no question of the set may, or it would tell."""
    name = f"{pair['object']}/{'-'.join(Path(n).with_suffix('').as_posix() for n in pair['pair'])}"
    images = tuple(folder / n for n in pair["pair"])
    out = []
    for kind in KINDS:
        draw = random.Random(f"{seed}/{name}/{kind}")
        question = draw.choice([text for text in QUESTIONS[kind] if presuming or text not in PRESUMING])
        choices = draw.sample(OPTIONS[kind], 3)
        letter = LETTERS[choices.index(pair[kind])]
        options = "\n".join(f"{a}. {text}" for a, text in zip(LETTERS, choices, strict=True))
        request = f"\n{REQUEST}" if ask_letter else ""
        turns = (Turn("user", f"{IMAGE_TAG}{IMAGE_TAG}{question}\n{options}{request}"), Turn("assistant", letter))
        out.append(Row(turns, images, letter, kind, tuple(choices), f"{name}/{kind}", meta=pair))
    return out

"""What a single clause says by its own words: whose left and right it tells of, whether of a move or a turn, and who moves."""

from __future__ import annotations

import re

from actial_fast.data.cot import vocabulary as v
from actial_fast.data.cot.wording import Clause, Sentence


def frame_of(text: str) -> str:
    """Whose left and right a clause tells of by its own words: camera, object, faced (an object that looks at the camera is
    named) or ""; the last word on it counts."""
    found = [(m.end(), "camera") for pattern in (v.OWN_CAMERA, v.FRAME_CAMERA) for m in pattern.finditer(text)]
    if not v.MOVE.search(text):
        text = v.THEIR_SIDE.sub(" ", text)  # "its left side is visible"
    found += [(m.end(), "object") for pattern in (v.OWN_OBJECT, v.FRAME_OBJECT, v.SEES) for m in pattern.finditer(text)]
    return max(found)[1] if found else "faced" if v.FACES.search(text) else ""


def kind_at(text: str, place: int, bare: bool = False) -> str:
    """What is talked about at a place of a clause: move or turn by the nearest word before it, else after it; "inherit" for a bare side."""
    found = [(m.start(), kind) for kind, pattern in (("turn", v.TURN), ("move", v.MOVE)) for m in pattern.finditer(text)]
    if before := [each for each in found if each[0] < place]:
        start, kind = max(before)
        turned = v.TURNING.match(text) if v.WEAK.match(text, start) else v.FURTHER.match(text, start) and v.TURN.search(text[: start + 7])
        return "turn" if turned else kind
    if found:
        return min(found)[1]
    if v.SECOND.search(text):
        return "move"
    return "inherit" if bare else ""


def stated(kind: str, frame: str, side: str, below: bool) -> tuple[str, str]:
    """What a side of a move or turn is a statement about, and its value there. below: it is seen from below."""
    if side.endswith("clockwise"):
        if kind == "move":
            return "orbit", v.OTHER_SENSE[side] if below else side
        side = "left" if (side == "counterclockwise") != below else "right"
    if kind == "turn":
        return "ego_rotation", side
    return ("object_translation" if frame == "object" else "ego_translation"), side


def without_places(text: str) -> str:
    """A clause without the sides that only say where something is."""
    text = re.sub(rf"({v.MOVE.pattern}.{{0,15}}\bto(?:wards?)? (?:the |its |my |the \w+'s )?(?:own )?(?:left|right)) side\b", r"\1", text)
    text = re.sub(v.ADJECTIVE, " ", text)
    text = re.sub(rf"\b(left|right) (?!(?:{v.FOLLOWS})\b)(?=[a-z])", " ", text)
    if not v.SECOND.search(text) and not v.SEES.search(text):
        text = re.sub(r"\b(?:on|at|near|in) (?:the |its |my |our |your )?(?:far |very |own )?(?:left|right)\b", " ", text)
    if not (v.MOVE.search(text) or v.TURN.search(text) or v.SECOND.search(text)):
        text = re.sub(
            r"\b(?:was|were|lay|lies|are|lying|sits?|far)\b.{0,12}\b(?:left|right)\b"
            r"|\bto(?:wards?)? the (?:left|right) of (?!where|its |the (?:first|old|previous|original))",
            " ",
            text,
        )
    return re.sub(
        r"\b(?:to|on) the (?:left|right) of (?!camera|where|its (?:old|first|former))(?=(?:the|a|it)\b)",
        lambda m: " " if not v.MOVE.search(text[: m.start()]) else m.group(),
        text,
    )


def is_bare(text: str) -> bool:
    """Whether a clause is a side and words that say nothing."""
    return not re.sub(rf"\b(?:{v.SIDES[1:-1]}|{v.FILLS})\b|[^a-z]", "", text)


def by_camera(text: str, place: int, before: str) -> bool:
    """Whether what moves or turns at a place of a clause is the camera: nothing else is named ahead of it. before: the clause before, whose
    subject this one shares if it has none."""
    subject = subject_of(text, place)
    if before and not v.CAMERAS.search(subject) and not v.DETERMINED.match(subject) and not v.SEES.search(text):
        subject = subject_of(before, len(before))
    return not v.NOUN.search(subject) or bool(v.CAMERAS.search(subject) or v.FROM.search(text) or v.SAYS.search(subject))


def of_the_first(sentence: Sentence, text: str) -> bool:
    """Whether a clause only says where the camera stands in the first image."""
    if not v.FIRST.search(sentence.plain) or v.OTHERS.search(sentence.plain):
        return False
    return not [m for pattern in (v.MOVE, v.TURN) for m in pattern.finditer(text) if not v.PLACES.match(m.group())]


def it_is_the_camera(text: str, place: int, sentence: Sentence) -> bool:
    """Whether "it", where that is all that is named ahead of a place, can be the camera: nothing else is in its sentence."""
    subject = subject_of(text, place)
    if not v.PRONOUN.search(subject) or v.NAMED.search(subject):
        return True
    ahead = sentence.plain[: max(0, sentence.plain.find(text))]
    return bool(v.NAMED.search(ahead)) or not v.NOUN.search(ahead)


def subject_of(text: str, place: int) -> str:
    """What stands before the last word of moving or turning that is not behind `place`."""
    cues = [m.start() for pattern in (v.TURN, v.MOVE) for m in pattern.finditer(text) if m.start() <= place]
    return v.FRAME_OBJECT.sub(" ", v.FRAME_CAMERA.sub(" camera ", text[: max(cues, default=place)]))


def told_of(text: str) -> list[str]:
    """The translations that a clause speaks of by its frames."""
    both = v.FRAME_OBJECT.search(text), v.FRAME_CAMERA.search(text) or re.search(rf"\b{v.OWNERS}'s (?:or|and|nor)\b", text)
    return [about for about, said in zip(("object_translation", "ego_translation"), both, strict=True) if said]


def only_frame(clause: Clause) -> bool:
    """Whether a clause only says whose left and right were told of."""
    none = v.MOVE.search(clause.text) or v.TURN.search(clause.text) or re.search(rf"\b{v.SIDES}\b", clause.text)
    return not none and not clause.label and frame_of(clause.text) in ("camera", "object")


def number_of(text: str) -> float:
    """A number in figures or words."""
    return float(text) if text[0].isdigit() else float(v.NUMBERS[text.replace(" ", "-")])

"""What a question says of itself, for formats that have no fields for it: the options it offers, and of a viewpoint question its kind."""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_uppercase

from actial_fast.data.sources.answers import lettered_options

LISTED = re.compile(r"(?is)\b(?:options|choices)\s*:\s*(.+)$")
REQUEST = re.compile(
    r"[.,;]?\s+(?:Please|Select|Choose|Pick|Answer|Output)\b[^\n]*\b(?:option|letter|answer)\b[^\n]*$"
)  # behind the options
FROM_OBJECT = re.compile(
    r"(?i)\b(?:object|item)(?:'s|\u2019s)?\s+(?:own\s+)?(?:perspective|point of view|viewpoint)|\bperspective of the object"
)
FROM_CAMERA = re.compile(
    r"(?i)\b(?:camera|photographer)(?:'s|\u2019s)?\s+(?:own\s+)?(?:perspective|point of view|viewpoint)|\bperspective of the camera"
)
TURNED = re.compile(r"(?i)\b(?:orientation|rotat\w+)\b")
MOVED = re.compile(r"(?i)\b(?:position|move[ds]?|movement|moving|translat\w+)\b")


def lettered(question: str) -> tuple[str, ...]:
    """The texts of the options that a question offers by letter ("A: left B: right", in lines or in one), without the request behind
    them."""
    options = [option.rstrip(",;").strip() for option in lettered_options(question)]
    if options:
        options[-1] = REQUEST.sub("", options[-1]).strip()
    return tuple(options) if all(options) else ()


def offered(question: str, truths: Sequence[str]) -> tuple[str, ...]:
    """The options' texts that a question offers: by letter, or listed behind "options:" ("left, right or back"). () where there are none,
    or the truth is not among them, so that chance would be told wrong.

    truths: the accepted answers, as a letter or as an option's text."""
    if options := lettered(question):
        letters = ascii_uppercase[: len(options)]
        if any((len(truth) == 1 and truth.upper() in letters) or truth in options for truth in truths):
            return options
    if listed := LISTED.search(question):
        line = listed.group(1).strip().split("\n")[0].rstrip(" .?")
        options = tuple(part.strip(" '\"") for part in re.split(r",\s*or\s+|\s+or\s+|,\s*", line))
        if len(options) > 1 and all(options) and any(truth in options for truth in truths):
            return options
    return ()


def viewpoint_kind(question: str) -> str:
    """The kind of a question about the camera's move between two photographs, as the viewpoint builder names them; '' for any other.

    Told by whose perspective it names and by whether it asks for the position or for the orientation, as the paper's own questions do."""
    asked = re.split(r"(?:^|\s)\(?A[.:)]\s", question)[0]
    if "camera" not in asked.lower():
        return ""
    if FROM_OBJECT.search(asked):
        return "object_translation" if MOVED.search(asked) and not TURNED.search(asked) else ""
    if FROM_CAMERA.search(asked):
        return "ego_rotation" if TURNED.search(asked) else "ego_translation" if MOVED.search(asked) else ""
    return ""

"""Whether what a chain of thought says of two viewpoints is true, by the poses.

reading.py finds the statements; here each is held against the pair's truths. A false one is named with its sentence. What cannot be decided
(whose left it is, what is denied) is counted apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from actial_fast.data.cot.reading import Statement, read, speaks_of

ANGLE = 15.0  # degrees that an angle may be off
KINDS = ("ego_translation", "object_translation", "ego_rotation")
OPPOSITE = {"left": "right", "right": "left", "none": "none"}
NAMES = {
    "ego_translation": "the camera's move from its own perspective",
    "object_translation": "the camera's move from the object's perspective",
    "ego_rotation": "the camera's turn",
}


@dataclass(frozen=True)
class Truths:
    """What the poses say of a pair. ego, object, turn: left, right or none; azimuth, yaw: degrees, counterclockwise positive."""

    ego: str
    object: str
    turn: str
    azimuth: float
    yaw: float

    @classmethod
    def of(cls, meta: Mapping[str, Any]) -> Truths | None:
        """Those in a viewpoint row's meta; None where it is none."""
        degrees = [meta.get("azimuth_change_deg"), meta.get("yaw_deg")]
        if not set(KINDS) <= set(meta) or not all(isinstance(each, int | float) for each in degrees):
            return None
        sides = [meta[kind] if meta[kind] in ("left", "right") else "none" for kind in KINDS]
        return cls(sides[0], sides[1], sides[2], float(meta["azimuth_change_deg"]), float(meta["yaw_deg"]))

    def side(self, kind: str) -> str:
        """Of one of KINDS."""
        return {"ego_translation": self.ego, "object_translation": self.object, "ego_rotation": self.turn}[kind]


@dataclass(frozen=True)
class Verdict:
    """false, undecided: why, with the sentence; stated: which of KINDS something true is said of, or something that was not read as a
    statement."""

    false: tuple[str, ...]
    undecided: tuple[str, ...]
    stated: frozenset[str]

    @property
    def missing(self) -> tuple[str, ...]:
        """What nothing is said of."""
        return tuple(NAMES[kind] for kind in KINDS if kind not in self.stated)


def judge(thought: str, truths: Truths) -> Verdict:
    """Hold every statement of a chain of thought against the truths."""
    false, undecided, stated, wrong = [], [], set(), []
    for statement, holds in weighed(thought, truths):
        if holds is None:
            undecided.append(f"cannot be decided: {statement.said!r}")
        elif not holds:
            wrong.append(statement.about)
            false.append(f"{_why(statement, truths)}: {statement.said!r}")
        elif statement.about in KINDS and not statement.denied:
            stated.add(statement.about)
    if both := [i for i, about in enumerate(wrong) if about in stated]:
        false[both[0]] = f"contradicts itself; {false[both[0]]}"
    return Verdict(tuple(dict.fromkeys(false)), tuple(dict.fromkeys(undecided)), frozenset(stated | speaks_of(thought)))


def weighed(thought: str, truths: Truths) -> list[tuple[Statement, bool | None]]:
    """The statements of a chain of thought that count, in order, and whether each is true; None where it cannot be decided."""
    found = read(thought)
    return [(each, _holds(each, truths)) for each in found if each.given is None or _holds(each.given, truths) is True]


def _holds(statement: Statement, truths: Truths) -> bool | None:
    """None where it cannot be decided."""
    about = statement.about
    if about == "picture":
        return False
    if about == "angle":
        near = [abs(truths.yaw)] if statement.of == "turn" else [abs(truths.yaw), abs(truths.azimuth)]
        return any(statement.low - ANGLE <= value <= statement.high + ANGLE for value in near) and statement.high - statement.low <= 360
    if about == "frames":
        return (statement.value == "swapped") != statement.denied
    if about == "orbit":
        right = truths.ego != "none" and statement.value == ("counterclockwise" if truths.azimuth > 0 else "clockwise")
    elif about in ("gain", "loss"):
        seen = truths.ego if statement.of == "camera" else truths.object
        right = seen != "none" and statement.value == (seen if about == "gain" else OPPOSITE[seen])
    else:
        right = truths.side(about) == statement.value
    if statement.unclear:
        return None
    if statement.denied:
        return not right
    if not right and statement.loose and truths.ego == statement.value:
        return None
    return right


def _why(statement: Statement, truths: Truths) -> str:
    about = statement.about
    if about == "picture":
        return "argues from positions in the picture"
    if about == "angle":
        return f"the angle is {abs(truths.yaw if statement.of == 'turn' else truths.azimuth):.0f} degrees"
    if about == "frames":
        return "for an object that faces the camera left and right swap"
    if about == "orbit":
        return "the camera went " + ("nowhere" if truths.ego == "none" else "counterclockwise" if truths.azimuth > 0 else "clockwise")
    if about in ("gain", "loss"):
        return f"the camera moved {truths.ego}, which shows the other flank" if truths.ego != "none" else "no flank came into view"
    return f"{NAMES[about]} is {truths.side(about)}"

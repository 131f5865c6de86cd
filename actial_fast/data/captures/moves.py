"""Pairs of a capture's photographs and what the camera did between them, from its poses alone.

    walk    moved, and turned against the move: the object stays in view
    strafe  moved without a turn
    away    moved, and turned to the same side
    pan     turned on the spot
    static  neither moved nor turned; tilted, rolled or cropped otherwise at most

A pair is used only where each of its three answers is clear: a move or turn is far from none, or is next to none. The paper's composition
has walks alone, so that the turn is the mirror of the move, and neither is ever none. The balanced one takes nines: one photograph, and
for each of left, right and no move with each of left, right and no turn another one. Whatever is seen in the one that they share, all
answers are then as likely, and knowing the move says nothing of the turn; what goes to either side goes about as far.

That the shared photograph tells nothing has its price: it is taken amid a walk, the others lie to either side, and show it (on an arc by
where they are, on any walk by how far from the middle the object is). Pairs that lead everywhere from everywhere do not exist there.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from actial_fast.data.captures.capture import Capture
from actial_fast.data.captures.frame import angle_errors
from actial_fast.data.captures.geometry import Motion, motion, qvec
from actial_fast.data.captures.questions import NO_MOVE, NO_TURN, SIDES, reverse
from actial_fast.data.captures.settings import ViewpointConfig

NINE = 9  # pairs in one of the balanced composition
UNCLEAR = 2  # of a side: neither clearly one nor clearly none
MIRROR = 10.0  # degrees by which the angles of mirrored pairs may differ
BAND = 20.0  # degrees of a band of angles; each is taken as often, as far as there are pairs
CELLS = tuple(product((-1, 0, 1), (-1, 0, 1)))  # (move, turn), right +


def pairs(capture: Capture, config: ViewpointConfig) -> list[dict[str, Any]]:
    """Usable pairs of the capture in random order, none twice, each a row's meta; [] where there are none.

    paper: at most pairs_per_object, first image name < second. balanced: nines, one after the other, of which the order matters."""
    return _paper(capture, config) if config.composition == "paper" else _balanced(capture, config)


def _paper(capture: Capture, config: ViewpointConfig) -> list[dict[str, Any]]:
    first, second = np.triu_indices(len(capture.names), 1)
    there, move, turn = _sides(capture, first, second, config)
    usable = (np.abs(move) == 1) & (np.abs(turn) == 1) & _far_enough(there, np.full(len(first), True), config)
    if config.max_angle_error:
        usable &= _sure(capture, first, second, config)
    found = np.nonzero(usable)[0].tolist()
    chosen = random.Random(f"{config.seed}/{capture.object}").sample(found, min(config.pairs_per_object, len(found)))
    ways = _Ways(first[found], second[found], there.azimuth[found])
    metas = [_meta(capture, first[m], second[m], there, m, move[m], turn[m]) for m in chosen]
    return [meta | {"centre": ways.both_sides(first[m], second[m], there.azimuth[m])} for meta, m in zip(metas, chosen, strict=True)]


def _sides(capture: Capture, first: np.ndarray, second: np.ndarray, config: ViewpointConfig) -> tuple[Motion, np.ndarray, np.ndarray]:
    """The motion of each pair, and the sides of its move and of its turn: right 1, left -1, none 0, UNCLEAR where it is none of these or
    not the same in both orders."""
    pose = (capture.rotations, capture.centers, capture.center, capture.up)
    there, back = motion(*pose, first, second), motion(*pose, second, first)
    moved = np.full(len(first), True)
    for one in (there, back):
        moved &= (np.abs(one.ego) >= config.min_translation) & (np.abs(one.object) >= config.min_translation)
        moved &= np.sign(one.ego) == -np.sign(one.object)  # a camera that looks past the object may see it otherwise
    step = np.linalg.norm(capture.centers[second] - capture.centers[first], axis=-1)
    offset = capture.centers - capture.center
    away = np.linalg.norm(offset - (offset @ capture.up)[:, None] * capture.up, axis=-1)
    still = step <= config.max_still_translation * np.minimum(away[first], away[second])
    yaw = np.degrees(np.abs(there.yaw))
    turned, straight = (yaw >= config.min_yaw) & (yaw <= 180 - config.min_yaw), yaw <= config.max_still_yaw
    move = np.where(moved, np.sign(there.ego), np.where(still, 0, UNCLEAR)).astype(int)
    turn = np.where(turned, -np.sign(there.yaw), np.where(straight, 0, UNCLEAR)).astype(int)
    return there, move, turn


def _far_enough(there: Motion, walk: np.ndarray, config: ViewpointConfig) -> np.ndarray:
    """Which pairs have an angle about the object in the config's range, of which the lower end is for walks."""
    angle = np.degrees(np.abs(there.azimuth))
    return (angle <= config.max_angle) & ((angle >= config.min_angle) | ~walk)


def _sure(capture: Capture, first: np.ndarray, second: np.ndarray, config: ViewpointConfig) -> np.ndarray:
    errors = angle_errors(capture.rotations, capture.centers, capture.frame, first, second)
    return np.degrees(errors) <= config.max_angle_error


@dataclass(frozen=True, eq=False)
class _From:
    """The usable pairs (M,) of one photograph as the first: the second ones, the motion to each, and the sides of its move and turn."""

    second: np.ndarray
    there: Motion
    move: np.ndarray
    turn: np.ndarray

    def leads(self, azimuth: float) -> bool:
        """Whether one of them goes about that far round the object, radians."""
        return bool((self.move != 0)[np.degrees(np.abs(self.there.azimuth - azimuth)) <= MIRROR].any())


def _from(capture: Capture, i: int, config: ViewpointConfig) -> _From:
    round_it = np.abs(np.angle(np.exp(1j * (capture.azimuth - capture.azimuth[i]))))
    second = np.flatnonzero((round_it <= np.radians(config.max_angle)) & (np.arange(len(capture.names)) != i))
    first = np.full(len(second), i)
    there, move, turn = _sides(capture, first, second, config)
    usable = (move != UNCLEAR) & (turn != UNCLEAR) & _far_enough(there, (move * turn) == -1, config)
    if config.max_angle_error:
        clear = np.flatnonzero(usable)
        usable[clear] = _sure(capture, first[clear], second[clear], config)
    some = Motion(*(side[usable] for side in (there.azimuth, there.yaw, there.ego, there.object)))
    return _From(second[usable], some, move[usable], turn[usable])


def _balanced(capture: Capture, config: ViewpointConfig) -> list[dict[str, Any]]:
    """As many nines as pairs_per_object holds, one at least if there is one, each about another photograph."""
    draw = random.Random(f"{config.seed}/{capture.object}")
    taken: set[frozenset[int]] = set()
    out: list[dict[str, Any]] = []
    for i in draw.sample(range(len(capture.names)), len(capture.names)):
        if len(out) >= NINE * max(1, config.pairs_per_object // NINE):
            break
        ways = _from(capture, i, config)
        free = np.array([frozenset((i, int(j))) not in taken for j in ways.second], bool)
        nine = _nine(ways, np.flatnonzero(free), draw)
        turned_round = config.anchor == "either" and draw.random() < 0.5
        for m in nine:
            j = int(ways.second[m])
            taken.add(frozenset((i, j)))
            meta = _meta(capture, i, j, ways.there, m, ways.move[m], ways.turn[m])
            # The nine has the shared photograph's other ways.
            meta["centre"] = [True, not ways.move[m] or _from(capture, j, config).leads(ways.there.azimuth[m])]
            out.append(reverse(meta) if turned_round else meta)
    return out


def _nine(ways: _From, free: np.ndarray, draw: random.Random) -> list[int]:
    """One pair of every cell, of the numbers `free`, in random order, with mirrored ones of about the same angle; [] where that cannot
    be."""
    cells = {cell: free[(ways.move[free] == cell[0]) & (ways.turn[free] == cell[1])] for cell in CELLS}
    if not all(map(len, cells.values())):
        return []
    chosen = [int(draw.choice(cells[0, 0]))]
    for cell in CELLS[CELLS.index((0, 0)) + 1 :]:
        angle = np.degrees(np.abs(ways.there.azimuth if cell[0] else ways.there.yaw))
        couple = _mirrored(cells[cell], cells[-cell[0], -cell[1]], angle, draw)
        if not couple:
            return []
        chosen += couple
    return draw.sample(chosen, len(chosen))


def _mirrored(here: np.ndarray, there: np.ndarray, angle: np.ndarray, draw: random.Random) -> list[int]:
    """One of each whose angles differ by at most MIRROR degrees, the angle from a band drawn of those there are; [] where there is none."""
    alike = np.argwhere(np.abs(angle[here][:, None] - angle[there]) <= MIRROR)
    if not len(alike):
        return []
    bands = (angle[here][alike[:, 0]] // BAND).astype(int)
    in_band = alike[bands == draw.choice(np.unique(bands).tolist())]
    a, b = in_band[draw.randrange(len(in_band))]
    return [int(here[a]), int(there[b])]


class _Ways:
    """From which photographs a capture has moves to either side. first, second, azimuth (M,): its usable pairs, azimuth in radians."""

    def __init__(self, first: np.ndarray, second: np.ndarray, azimuth: np.ndarray):
        self._from, self._change = np.concatenate([first, second]), np.degrees(np.concatenate([azimuth, -azimuth]))

    def both_sides(self, first: int, second: int, azimuth: float) -> list[bool]:
        """Of each photograph of a pair: whether from there, too, the camera could have gone about as far to the other side."""
        steps = ((first, np.degrees(azimuth)), (second, -np.degrees(azimuth)))
        return [bool((np.abs(self._change[self._from == view] + step) <= MIRROR).any()) for view, step in steps]


def name_of(move: int, turn: int) -> str:
    """What a camera with these sides did, as at the top of this file; right +, none 0."""
    if not move:
        return "pan" if turn else "static"
    return "walk" if turn == -move else "away" if turn else "strafe"


def _meta(capture: Capture, i: int, j: int, there: Motion, m: int, move: int, turn: int) -> dict[str, Any]:
    ego, other, yaw = (SIDES.get(int(side), none) for side, none in ((move, NO_MOVE), (-move, NO_MOVE), (turn, NO_TURN)))
    return {
        "object": capture.object,
        "pair": [capture.names[i], capture.names[j]],
        "azimuth_deg": rounded(np.degrees(capture.azimuth[[i, j]])),
        "azimuth_change_deg": rounded(np.degrees(there.azimuth[m])),
        "yaw_deg": rounded(np.degrees(there.yaw[m])),
        "ego_translation": ego,
        "object_translation": other,
        "ego_rotation": yaw,
        "move": name_of(int(move), int(turn)),
        "up": rounded(capture.up),
        "center": rounded(capture.center),
        "poses": [{"qvec": rounded(qvec(capture.rotations[k])), "tvec": rounded(capture.translations[k])} for k in (i, j)],
    }


def rounded(x: np.ndarray) -> Any:
    """Floats at 7 significant digits, as a number or a list."""
    return [float(f"{v:.7g}") for v in x] if np.ndim(x) else float(f"{x:.7g}")

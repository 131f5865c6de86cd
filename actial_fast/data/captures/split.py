"""Which objects are for tests, which of their pairs are taken, in which order, and how many of each sort that makes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actial_fast.data.captures.moves import NINE
from actial_fast.data.captures.questions import KINDS, OPPOSITE, reverse
from actial_fast.data.captures.settings import ViewpointConfig

Pair = dict[str, Any]
BAND = 20  # degrees of the bands that pairs are counted in


def split(good: Mapping[str, list[Pair]], config: ViewpointConfig, captures: Path) -> dict[str, list[Pair]]:
    """The pairs of each split, at most one partial pair more than the rows asked for, taken evenly over the split's objects.

    good: {object: its pairs}. ValueError where there are fewer objects than splits that are asked for."""
    objects = _shuffled(sorted(good), config)
    asked = {"test": config.test_examples, "validation": config.validation_examples}
    held = {name: -(-rows // len(KINDS)) for name, rows in asked.items() if rows}
    if len(objects) < 1 + len(held):
        keys = " and ".join(f"{name}_examples=0" for name in held)
        number = "one usable object" if len(objects) == 1 else f"{len(objects)} usable objects"
        raise ValueError(
            f"{captures} has {number}, which cannot be split by object into train, {', '.join(held)}; add captures or set {keys}"
        )
    most = max(1, min(int(config.max_test_fraction * len(objects)), (len(objects) - 1) // max(1, len(held))))
    unit = 1 if config.composition == "paper" else NINE
    taken: dict[str, list[Pair]] = {"train": [], "test": []}
    for name, wanted in held.items():
        count = min(most, -(-wanted // max(unit, config.test_pairs_per_object)))
        while count < most and sum(len(good[each]) for each in objects[:count]) < wanted:
            count += 1
        taken[name] = _evenly(good, objects[:count], wanted, unit)
        objects = objects[count:]
    train = None if config.examples is None else -(-config.examples // len(KINDS))
    taken["train"] = _evenly(good, objects, train, unit)
    return taken


def class_of(name: str) -> str:
    """An object's class: the folders above its own."""
    return name.rpartition("/")[0]


def _shuffled(objects: list[str], config: ViewpointConfig) -> list[str]:
    """The objects in random order. Balanced: any number of the first ones has every class by its share, as far as whole objects allow."""
    draw = random.Random(f"{config.seed}/split")
    draw.shuffle(objects)
    if config.composition == "paper":
        return objects
    sizes, seen = Counter(map(class_of, objects)), Counter[str]()
    place = {}
    for name in objects:
        place[name] = (seen[class_of(name)] + draw.random()) / sizes[class_of(name)]
        seen[class_of(name)] += 1
    return sorted(objects, key=place.__getitem__)


def _evenly(good: Mapping[str, list[Pair]], objects: list[str], wanted: int | None, unit: int) -> list[Pair]:
    """The first `wanted` pairs, dealt round by round, `unit` of them at once: no object gives more before every object that can has given
    as many."""
    rounds = max((len(good[name]) for name in objects), default=0)
    dealt = [pair for r in range(0, rounds, unit) for name in objects for pair in good[name][r : r + unit]]
    return dealt[:wanted]


def ordered(chosen: Sequence[Pair], config: ViewpointConfig, name: str) -> list[Pair]:
    """A split's pairs in the order of its file. Nines are shuffled; the paper's pairs are turned round so that their sides are balanced."""
    draw = random.Random(f"{config.seed}/order/{name}")
    return balance(chosen, draw) if config.composition == "paper" else draw.sample(list(chosen), len(chosen))


def balance(chosen: Sequence[Pair], draw: random.Random) -> list[Pair]:
    """The pairs shuffled, each in the order that makes as many ego translations left as right (+- 1), and nearly so the other types."""
    # Usually left-moving cameras turn right. The rare pairs where they do not are dealt apart, or they could tip the rotations' balance.
    mixed = sorted(draw.sample(list(chosen), len(chosen)), key=lambda pair: pair["ego_translation"] == pair["ego_rotation"])
    side = draw.choice(("left", "right"))
    out = []
    for pair in mixed:
        out.append(pair if pair["ego_translation"] == side else reverse(pair))
        side = OPPOSITE[side]
    draw.shuffle(out)
    return out


def strata(chosen: Sequence[Pair]) -> dict[str, Any]:
    """How many pairs there are of each move, of each band of angles about the object (of pairs that move), and of each class.

    turn_follows_move: of pairs that both move and turn, the share whose two sides are the same; None where there is none."""
    bands = Counter(int(abs(pair["azimuth_change_deg"]) // BAND) * BAND for pair in chosen if pair["ego_translation"] in OPPOSITE)
    both = [pair for pair in chosen if pair["ego_translation"] in OPPOSITE and pair["ego_rotation"] in OPPOSITE]
    same = sum(pair["ego_translation"] == pair["ego_rotation"] for pair in both)
    return {
        "move": dict(sorted(Counter(pair["move"] for pair in chosen).items())),
        "angle_deg": {f"{low} to {low + BAND}": bands[low] for low in sorted(bands)},
        "class": dict(sorted(Counter(class_of(pair["object"]) for pair in chosen).items())),
        "turn_follows_move": round(same / len(both), 4) if both else None,
    }

"""What `actial data viewpoint` is told."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

COMPOSITIONS = ("paper", "balanced")
ANCHORS = ("first", "either")


@dataclass(frozen=True)
class ViewpointConfig:
    """What `actial data viewpoint` builds."""

    seed: int = 0
    """decides the split, the pairs, their order, the wordings and the order of the options"""
    examples: int | None = None
    """rows in train.jsonl, three a pair; none: all there are"""
    test_examples: int = 1000
    """rows in test.jsonl, from objects that train.jsonl has none of; 0: no test set"""
    validation_examples: int = 0
    """rows in validation.jsonl, from objects that neither of the other two has: what stages stop on; 0: no such file"""
    max_test_fraction: float = 0.1
    """at most this share of the objects, and at least one, goes to the test set, and as many to validation; fewer rows if they have few"""
    composition: str = "paper"
    """paper: pairs that walk round the object and turn towards it, as in the paper; balanced: nines of one photograph and another
    one for every mixture of left, right and no move with left, right and no turn"""
    anchor: str = "first"
    """balanced: the photograph that the pairs of a nine share. first: that one tells nothing, and the second more than it would have to;
    either: the first in one half of the nines, the second in the other, so that each tells about half as much"""
    pairs_per_object: int = 10
    """pairs drawn per object at most; balanced: as many whole nines as that holds, but one at least"""
    test_pairs_per_object: int = 3
    """pairs per test object as long as max_test_fraction leaves enough objects; more objects say more than more pairs of the same"""
    min_angle: float = 20.0
    """smallest horizontal angle about the object between the two cameras of a pair that turns against its move, degrees"""
    max_angle: float = 100.0
    """largest horizontal angle about the object between the two cameras, degrees"""
    max_angle_error: float = 3.0
    """pairs whose angle about the object, or turn, may be further off than this are left out, degrees (95 per cent sure); 0: none are"""
    min_translation: float = 0.1
    """smallest sideways move in units of the camera's horizontal distance from the object; less is neither left nor right"""
    min_yaw: float = 10.0
    """smallest turn, degrees; less (or as close to half a turn) is neither left nor right"""
    max_still_translation: float = 0.02
    """balanced: largest distance, in the same units, between cameras of which it is said that there was no movement"""
    max_still_yaw: float = 2.0
    """balanced: largest turn of which it is said that there was no rotation, degrees"""
    crops: float = 0.0
    """balanced: a share of a photograph's width and height. Every picture is a crop of that size, as the camera would have taken it had it
    been panned, so that photographs of an ordinary walk have all nine; 0: pairs of whole photographs"""
    min_images: int = 4
    """captures with fewer usable images are rejected"""
    max_elevation: float = 60.0
    """views from, or looking, steeper up or down than this are left out, degrees"""
    verify: str = "tracks"
    """tracks: reject mirrored and broken worlds by their tracks, and models without; off: trust the poses"""
    ask_letter: bool = True
    """every question ends with a request for the option's letter, without which a model that was not trained on it is scored on form"""
    probes: bool = True
    """try how often small models that see one part of a question guess right on objects they were not fitted to, and write it into
    build.json (needs scikit-learn)"""
    max_leak: float = 5.0
    """points by which such a model may be better than chance before the build warns"""
    workers: int = 0
    """processes that read captures; 0: up to one per core, as far as starting them pays. The output does not depend on it"""

    def __post_init__(self) -> None:
        if not 0 < self.min_angle < self.max_angle < 180:
            raise ValueError(f"min_angle={self.min_angle}, max_angle={self.max_angle}: need 0 < min_angle < max_angle < 180 degrees")
        if not 0 <= self.max_angle_error < math.inf:
            raise ValueError(f"max_angle_error={self.max_angle_error}: must be at least 0 and finite, degrees")
        if not 0 <= self.max_test_fraction < 1:
            raise ValueError(f"max_test_fraction={self.max_test_fraction}: need a share in [0, 1)")
        if self.pairs_per_object < 1 or self.test_pairs_per_object < 1:
            raise ValueError("pairs_per_object and test_pairs_per_object must be at least 1")
        if min(self.test_examples, self.validation_examples) < 0 or (self.examples is not None and self.examples < 1):
            asked = f"examples={self.examples}, test_examples={self.test_examples}, validation_examples={self.validation_examples}"
            raise ValueError(f"{asked}: ask for at least one row")
        if not 0 <= self.min_yaw < 90 or self.min_translation < 0:
            raise ValueError(f"min_yaw={self.min_yaw} must be in [0, 90) degrees, min_translation={self.min_translation} at least 0")
        if self.composition not in COMPOSITIONS:
            raise ValueError(f"composition={self.composition!r}; expected {' or '.join(map(repr, COMPOSITIONS))}")
        if self.anchor not in ANCHORS:
            raise ValueError(f"anchor={self.anchor!r}; expected {' or '.join(map(repr, ANCHORS))}")
        defaults = {field.name: field.default for field in fields(self)}
        for name in ("anchor", "max_still_translation", "max_still_yaw", "crops"):
            if self.composition != "balanced" and getattr(self, name) != defaults[name]:
                raise ValueError(f"{name}={getattr(self, name)}: has a meaning with composition=balanced only")
        if not 0 <= self.crops < 1:
            raise ValueError(f"crops={self.crops}: need a share below 1 of a photograph's width and height")
        for name, above in (("max_still_translation", "min_translation"), ("max_still_yaw", "min_yaw")):
            if self.composition == "balanced" and not 0 <= getattr(self, name) < getattr(self, above):
                raise ValueError(f"{name}={getattr(self, name)}: need at least 0 and less than {above}={getattr(self, above)}")
        if not self.probes and self.max_leak != defaults["max_leak"]:
            raise ValueError(f"max_leak={self.max_leak}: has a meaning with probes=true only")
        if not 0 <= self.max_leak < 100:
            raise ValueError(f"max_leak={self.max_leak}: need points in [0, 100)")
        if self.verify not in ("tracks", "off"):
            raise ValueError(f"verify={self.verify!r}; expected 'tracks' or 'off'")

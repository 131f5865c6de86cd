"""Viewpoint questions: `viewpoint` is the test set that `actial data viewpoint` builds, `viewpoint-100k` the paper's, as it was released.

Both are asked as their rows have it. An interval counts pairs of pictures, or objects where the rows name them: the three questions of
a pair are one bit for a model that sees which way the camera went. Rows with the builder's meta are also told by what the camera did, by
the angle about the object, and by the object's class."""

from __future__ import annotations

from collections.abc import Sequence

from actial_fast.evaluation.figures import Key, each, meta, micro, together
from actial_fast.evaluation.items import Figure, Item, Metric
from actial_fast.evaluation.rows import row_opener
from actial_fast.evaluation.sets.paper import BASE, BOTH, HUMANS, SFT, table
from actial_fast.evaluation.specs import benchmark

PAGE = "https://huggingface.co/datasets/INno0o/Viewpoint-100K"
KINDS = ("ego_translation", "object_translation", "ego_rotation")

BAND = 20  # degrees
MOST_STRATA = 30  # that a table has room for


def angle(item: Item) -> str:
    """The band that the angle about the object is in; '' where the camera did not move, or its meta does not say."""
    change = item.meta.get("azimuth_change_deg")
    if not isinstance(change, int | float) or item.meta.get("ego_translation") not in ("left", "right"):
        return ""
    low = int(abs(change) // BAND) * BAND
    return f"{low} to {low + BAND} degrees"


def object_class(item: Item) -> str:
    """The folders above the object's own, of the builder's rows; '' where there is none."""
    return str(item.meta.get("object", "")).rpartition("/")[0] if "azimuth_change_deg" in item.meta else ""


def strata(key: Key, name: str, order: Sequence[str] = ()) -> Metric:
    """A mean for each value of a key; nothing where there is one value only, or more than a table has room for."""
    of_each = each(key, name, order)

    def figures(items: Sequence[Item], scores: Sequence[float]) -> list[Figure]:
        found = of_each(items, scores)
        return found if 1 < len(found) <= MOST_STRATA else []

    return figures


STRATA = (
    strata(meta("move"), "move: {}", ("walk", "strafe", "away", "pan", "static")),
    strata(angle, "angle: {}", [f"{low} to {low + BAND} degrees" for low in range(0, 180, BAND)]),
    strata(object_class, "class: {}"),
)

VIEWPOINT = benchmark(
    "viewpoint",
    "Viewpoint test",
    "https://github.com/GAP-LAB-CUHK-SZ/MVImgNet (captures, from which `actial data viewpoint` makes it)",
    row_opener("Viewpoint test", "https://github.com/GAP-LAB-CUHK-SZ/MVImgNet", files=["test.jsonl"]),
    together(each(order=KINDS), micro(), *STRATA),
    "accuracy",
)

VIEWPOINT_100K = benchmark(
    "viewpoint-100k",
    "Viewpoint-100K test",
    PAGE,
    row_opener(
        "Viewpoint-100K test",
        PAGE,
        format="sharegpt",
        repos=["INno0o/Viewpoint-100K"],
        files=["*test*.json", "*test*.jsonl", "*test*.parquet", "data/*test*.parquet"],
    ),
    together(each(order=KINDS), micro()),
    "accuracy",
    published=table(("accuracy",), {BASE: (12.9,), SFT: (92.2,), BOTH: (81.4,), HUMANS: (97.67,)}),
)

"""Viewpoint questions: `viewpoint` is the test set that `actial data viewpoint` builds, `viewpoint-100k` the paper's, as it was released.

Both are asked as their rows have it. An interval counts pairs of pictures, or objects where the rows name them: the three questions of
a pair are one bit for a model that sees which way the camera went."""

from __future__ import annotations

from actial_fast.evaluation.figures import each, micro, together
from actial_fast.evaluation.rows import row_opener
from actial_fast.evaluation.sets.paper import BASE, BOTH, HUMANS, SFT, table
from actial_fast.evaluation.specs import benchmark

PAGE = "https://huggingface.co/datasets/INno0o/Viewpoint-100K"
KINDS = ("ego_translation", "object_translation", "ego_rotation")

VIEWPOINT = benchmark(
    "viewpoint",
    "Viewpoint test",
    "https://github.com/GAP-LAB-CUHK-SZ/MVImgNet (captures, from which `actial data viewpoint` makes it)",
    row_opener("Viewpoint test", "https://github.com/GAP-LAB-CUHK-SZ/MVImgNet", files=["test.jsonl"]),
    together(each(order=KINDS), micro()),
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

"""3DSRBench: 3D relations in single pictures, each question also with its options rotated and its picture mirrored.

A question's id is `XXXXXXXX[-flip][-N]`: -flip with the mirrored picture, -N with the N-th rotation. Right are, of the products: "flip" a
question and its mirror image, "circular" all rotations, "flip and circular" all of them. The 12 categories make four classes. The paper
says only that its figures are by the official script; they stand beside the circular ones, because the same table has LLaVA at 38,
which plain accuracy of two options exceeds and a product of four does not reach: an inference. Source: VLMEvalKit, image_mcq.py; lmms-
eval, tasks/3dsrbench."""

from __future__ import annotations

import re

from actial_fast.evaluation.figures import each, micro, products, together
from actial_fast.evaluation.items import Item
from actial_fast.evaluation.records import Record, opener
from actial_fast.evaluation.sets.paper import BASE, BOTH, GRPO, SFT, table
from actial_fast.evaluation.specs import benchmark, vlmevalkit

PAGE = "https://huggingface.co/datasets/ccvl/3DSRBench"
QID = re.compile(r"(.+?)(-flip)?(-\d+)?")
CLASSES = ("height", "location", "orientation", "multi_object")


def parts(item: Item) -> tuple[str, str, str]:
    """A question's own id, "-flip" or "", "-N" or ""."""
    match = QID.fullmatch(item.meta.get("qid", "") or item.id)
    assert match is not None  # the pattern matches every id
    return match.group(1), match.group(2) or "", match.group(3) or ""


def main_class(item: Item) -> str:
    """The class of one of the 12 categories: their names begin with it."""
    return next((name for name in CLASSES if item.category.startswith(name)), item.category)


def base(record: Record) -> str:
    """The id that all variants of a question share."""
    match = QID.fullmatch(record.text("qid", "index"))
    return match.group(1) if match else ""


THREEDSR = benchmark(
    "3dsrbench",
    "3DSRBench",
    PAGE,
    opener(
        "3DSRBench",
        PAGE,
        [vlmevalkit(group=base, cluster=base)],
        repos=["ccvl/3DSRBench"],
        files=["3dsrbench_v1_vlmevalkit_circular.tsv", "3DSRBench.tsv", "**/*circular*.parquet", "**/test*.parquet"],
        tsv=["3DSRBench.tsv"],
    ),
    together(
        each(),
        each(main_class, "class {}", CLASSES),
        micro(),
        products("flip", lambda item: "".join((parts(item)[0], parts(item)[2]))),
        products("circular", lambda item: "".join(parts(item)[:2]), main_class),
        products("flip and circular", lambda item: parts(item)[0], main_class),
    ),
    "circular",
    published=table(
        ("circular", *(f"circular: {name}" for name in CLASSES)),
        {
            BASE: (45.8, 42.8, 59.3, 39.3, 38.8),
            SFT: (46.6, 47.1, 63.3, 27.9, 41.2),
            GRPO: (47.6, 44.9, 57.2, 39.4, 44.1),
            BOTH: (47.7, 46.4, 60.3, 35.5, 43.0),
        },
    ),
)

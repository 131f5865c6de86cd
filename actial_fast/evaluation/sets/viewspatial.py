"""ViewSpatial-Bench: 5,712 questions of five types, from the camera's and from a person's view, with 1 to 32 pictures each.

Source: ZJU-REAL/ViewSpatial-Bench, eval/ViewSpatial-Bench.json and evaluate.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from actial_fast.evaluation.figures import each, micro, together
from actial_fast.evaluation.items import Item
from actial_fast.evaluation.owners import viewspatial
from actial_fast.evaluation.records import Layout, Record, opener, unlettered
from actial_fast.evaluation.specs import benchmark, choices_item, vlmevalkit

PAGE = "https://huggingface.co/datasets/lidingm/ViewSpatial-Bench"


def ask(record: Record, options: Sequence[str]) -> str:
    """The owner's prompt; `options` stand in it as the file has them."""
    choices = "\n".join(record.texts("choices") or record.texts("candidates"))
    return f"Question: {record.needed('question')}\nChoices: {choices}\nReply only to the corresponding option.\nAnswer:"


def item(record: Record) -> Item:
    """Of the owner's JSON, which names no question: its place does."""
    options = unlettered(record.texts("choices"))
    return choices_item(
        record,
        id=str(record.number),
        prompt=ask(record, options),
        images=["image_path", "images"],
        options=options,
        answer=record.needed("answer"),
        category=record.text("question_type"),
        cluster=record.text("image_path") if isinstance(record.values.get("image_path"), str) else " ".join(record.texts("image_path")[:1]),
    )


VIEWSPATIAL = benchmark(
    "viewspatial",
    "ViewSpatial-Bench",
    PAGE,
    opener(
        "ViewSpatial-Bench",
        PAGE,
        [
            Layout(("question_type", "question", "answer", "choices"), item),
            vlmevalkit(ask, category=lambda record: record.text("question_type", "category")),
        ],
        repos=["lidingm/ViewSpatial-Bench"],
        files=["ViewSpatial-Bench.json", "eval/ViewSpatial-Bench.json", "test*.parquet", "data/test*.parquet"],
        tsv=["ViewSpatialBench.tsv"],
    ),
    together(each(), micro()),
    "accuracy",
    owner=viewspatial,
)

"""BLINK: 14 visual tasks, 1,901 labelled questions (the val split; the answers of test are hidden).

The prompt is the owner's. Official is the mean over the 14 tasks; VLMEvalKit's accuracy is over all questions; the paper's "BLINK avg"
is the mean of three tasks. Source: zeyofu/BLINK_Benchmark, eval/; VLMEvalKit, image_mcq.py."""

from __future__ import annotations

from actial_fast.evaluation.figures import Mean, average, each, macro, micro, together
from actial_fast.evaluation.items import Item
from actial_fast.evaluation.records import Layout, Record, opener, unlettered
from actial_fast.evaluation.sets.paper import BASE, BOTH, GRPO, SFT, table
from actial_fast.evaluation.specs import benchmark, choices_item, vlmevalkit

PAGE = "https://huggingface.co/datasets/BLINK-Benchmark/BLINK"
THREE = ("Multi-view_Reasoning", "Relative_Depth", "Spatial_Relation")


def item(record: Record) -> Item:
    """Of the owner's parquet."""
    return choices_item(
        record,
        id=record.needed("idx"),
        prompt=record.needed("prompt"),
        images=[f"image_{n}" for n in range(1, 5)],
        options=unlettered(record.texts("choices")),
        answer=record.needed("answer"),
        category=record.text("sub_task"),
    )


BLINK = benchmark(
    "blink",
    "BLINK",
    PAGE,
    opener(
        "BLINK",
        PAGE,
        [
            Layout(("idx", "prompt", "choices", "answer", "image_1"), item),
            vlmevalkit(category=lambda record: record.text("category").replace(" ", "_")),
        ],
        repos=["BLINK-Benchmark/BLINK"],
        files=["*/val-*.parquet", "val-*.parquet"],
        tsv=["BLINK.tsv"],
    ),
    together(each(), average("BLINK avg (three tasks)", Mean(*THREE)), macro("mean of tasks"), micro()),
    "BLINK avg (three tasks)",
    published=table(
        (*THREE, "BLINK avg (three tasks)"),
        {
            BASE: (53.3, 78.2, 88.8, 73.4),
            SFT: (99.2, 79.0, 81.8, 86.6),
            GRPO: (55.6, 83.8, 85.3, 74.9),
            BOTH: (99.2, 79.0, 84.6, 87.6),
        },
    ),
)

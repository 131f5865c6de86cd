"""All-Angles Bench: 2,132 questions of six types about a scene that several cameras see at once.

Source: Chenyu-Wang567/All-Angles-Bench, VLMEvalkit/vlmeval/dataset/image_mcq.py; its data.json has the pictures' paths.
"""

from __future__ import annotations

from actial_fast.evaluation.figures import each, macro, micro, together
from actial_fast.evaluation.items import Item
from actial_fast.evaluation.records import Layout, Record, opener
from actial_fast.evaluation.specs import benchmark, choices_item, letters_of_columns, vlmevalkit, vlmevalkit_prompt

PAGE = "https://huggingface.co/datasets/ch-chenyu/All-Angles-Bench"


def item(record: Record) -> Item:
    """Of the owner's data.json."""
    options = letters_of_columns(record)
    return choices_item(
        record,
        id=record.needed("index"),
        prompt=vlmevalkit_prompt(record, options),
        images=["image_path"],
        options=options,
        answer=record.needed("answer"),
        category=record.text("category"),
        cluster=record.text("folder"),
        meta={"sourced_dataset": record.text("sourced_dataset"), "pair_idx": record.text("pair_idx")},
    )


ALL_ANGLES = benchmark(
    "all-angles",
    "All-Angles Bench",
    PAGE,
    opener(
        "All-Angles Bench",
        PAGE,
        [Layout(("index", "question", "answer", "image_path", "folder"), item), vlmevalkit(cluster=lambda record: record.text("folder"))],
        repos=["ch-chenyu/All-Angles-Bench"],
        files=["data.json", "bench_tsv/all_angles_bench_huggingface.tsv", "*.parquet"],
        tsv=["All_Angles_Bench.tsv"],
    ),
    together(each(), micro(), macro()),
    "accuracy",
)

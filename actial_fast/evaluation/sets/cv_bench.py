"""CV-Bench: 2,638 questions about relations, counts, depth order and distance.

The prompt is the owner's. Cambrian's average is 1/2 ((ADE20K + COCO) / 2 + Omni3D), by source of the pictures; the paper's is the mean
of the four tasks. Source: the dataset's page; lmms-eval, tasks/cv_bench; VLMEvalKit, image_mcq.py."""

from __future__ import annotations

from actial_fast.evaluation.figures import Mean, average, each, meta, micro, together
from actial_fast.evaluation.items import Item
from actial_fast.evaluation.owners import start
from actial_fast.evaluation.records import Layout, Record, opener, unlettered
from actial_fast.evaluation.sets.paper import BASE, BOTH, GRPO, SFT, table
from actial_fast.evaluation.specs import benchmark, choices_item, own_prompt, vlmevalkit

PAGE = "https://huggingface.co/datasets/nyu-visionx/CV-Bench"
TASKS = ("Relation", "Count", "Distance", "Depth")
AVERAGE = "CV-Bench avg (four tasks)"


def item(record: Record) -> Item:
    """Of the owner's parquet."""
    return choices_item(
        record,
        id=f"{record.text('type')}/{record.needed('idx')}".lstrip("/"),
        prompt=record.needed("prompt"),
        images=["image"],
        options=unlettered(record.texts("choices")),
        answer=record.needed("answer"),
        category=record.needed("task"),
        meta={"source": record.text("source"), "type": record.text("type")},
    )


CV_BENCH = benchmark(
    "cv-bench",
    "CV-Bench",
    PAGE,
    opener(
        "CV-Bench",
        PAGE,
        [
            Layout(("idx", "task", "question", "choices", "answer", "prompt", "image"), item),
            vlmevalkit(
                own_prompt,
                id=lambda record: f"{record.text('split')}/{record.needed('index')}".lstrip("/"),  # two files, each from 0
                category=lambda record: record.text("task", "category"),
            ),
        ],
        repos=["nyu-visionx/CV-Bench"],
        files=["test_[23]d.parquet", "test*.parquet", "data/test*.parquet"],
        tsv=["CV-Bench-2D.tsv", "CV-Bench-3D.tsv"],
    ),
    together(
        each(order=TASKS),
        average(AVERAGE, Mean(*TASKS)),
        average("Cambrian's average", Mean(Mean("ADE20K", "COCO"), "Omni3D"), meta("source")),
        micro(),
    ),
    AVERAGE,
    owner=start,
    published=table(
        (*TASKS, AVERAGE),
        {
            BASE: (79.3, 56.9, 79.6, 69.1, 71.2),
            SFT: (88.6, 61.5, 59.0, 83.5, 73.1),
            GRPO: (90.3, 71.5, 84.8, 86.1, 83.1),
            BOTH: (91.2, 68.7, 85.6, 88.5, 83.5),
        },
    ),
)

"""MMSI-Bench: 1,000 questions of 11 types about several pictures each; `mmsi-circular` asks each with every rotation of its options.

The prompt asks for the letter in backticks. The paper's figure is plain accuracy over all questions; the circular one counts a question
only if all its rotations are right. Source: InternRobotics/MMSI-Bench, README; VLMEvalKit, mmsibench.py; lmms-eval, tasks/mmsi_bench."""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_uppercase

from actial_fast.data.sources.asked import lettered
from actial_fast.evaluation.figures import each, micro, products, together
from actial_fast.evaluation.items import Item
from actial_fast.evaluation.owners import mmsi
from actial_fast.evaluation.records import Layout, Record, opener
from actial_fast.evaluation.sets.paper import BASE, BOTH, ONE_STAGE, table
from actial_fast.evaluation.specs import LETTER, benchmark, choices_item, vlmevalkit

PAGE = "https://huggingface.co/datasets/RunsenXu/MMSI-Bench"
ENCLOSE = f"{LETTER} Enclose the option's letter within ``."
TYPES = (
    "Cam.-Cam.",
    "Obj.-Obj.",
    "Reg.-Reg.",
    "Cam.-Obj.",
    "Obj.-Reg.",
    "Cam.-Reg.",
    "Meas.",
    "Appr.",
    "Motion-Cam.",
    "Motion-Obj.",
    "MSR",
)


def short(name: str) -> str:
    """A question type as the paper calls it, of "Positional Relationship (Cam.-Cam.)" and of VLMEvalKit's "Pos-Cam-Cam"; others as they
    are."""
    words = re.findall(r"(?<![A-Za-z])(Cam|Obj|Reg|Meas|Appr|Motion|MSR)", name)
    if "MSR" in words or "Multi-Step" in name:
        return "MSR"
    found = "-".join(word if word == "Motion" else f"{word}." for word in words)
    return found if found in TYPES else name


def item(record: Record) -> Item:
    """Of the owner's parquet."""
    return choices_item(
        record,
        id=record.needed("id"),
        prompt=f"{record.needed('question')}\n{ENCLOSE}",
        images=["images"],
        options=lettered(record.text("question")),
        answer=record.needed("answer"),
        category=short(record.text("question_type")),
    )


def ask(record: Record, options: Sequence[str]) -> str:
    """The owner's prompt, from VLMEvalKit's columns."""
    hint = f"Hint: {record.text('hint')}\n" if record.has("hint") else ""
    offered = ", ".join(f"{letter}: {option}" for letter, option in zip(ascii_uppercase, options, strict=False))
    listed = f"Options: {offered}\n" if record.has("A") else ""
    return f"{hint}{record.needed('question')}\n{listed}{ENCLOSE}"


LAYOUTS = [
    Layout(("id", "images", "question_type", "question", "answer"), item),
    vlmevalkit(ask, category=lambda record: short(record.text("category", "question_type"))),
]

MMSI = benchmark(
    "mmsi",
    "MMSI-Bench",
    PAGE,
    opener(
        "MMSI-Bench",
        PAGE,
        LAYOUTS,
        repos=["RunsenXu/MMSI-Bench"],
        files=["MMSI_Bench.parquet", "*.parquet", "data/*.parquet"],
        tsv=["MMSIBench_wo_circular.tsv"],
    ),
    together(each(order=TYPES), micro()),
    "accuracy",
    owner=mmsi,
    published=table(
        (*TYPES, "accuracy"),
        {
            BASE: (23.7, 24.5, 19.8, 25.6, 32.9, 33.7, 42.2, 24.2, 18.9, 30.3, 23.2, 26.5),
            ONE_STAGE: (19.4, 29.8, 27.2, 31.4, 30.6, 34.9, 29.7, 19.7, 25.7, 25.0, 26.3, 27.2),
            BOTH: (29.0, 31.9, 28.4, 41.9, 28.2, 33.7, 31.3, 22.7, 27.0, 32.9, 20.7, 28.9),
        },
    ),
    max_new_tokens=32768,
)

MMSI_CIRCULAR = benchmark(
    "mmsi-circular",
    "MMSI-Bench, circular",
    PAGE,
    opener("MMSI-Bench, circular", PAGE, LAYOUTS[1:], tsv=["MMSIBench_circular.tsv"]),
    together(each(order=TYPES), micro(), products("circular", lambda item: item.group, lambda item: item.category)),
    "circular",
    owner=mmsi,
    max_new_tokens=32768,
)

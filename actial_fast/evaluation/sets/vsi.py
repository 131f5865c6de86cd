"""VSI-Bench: questions about indoor videos, six types with options and four with a number for an answer.

The frames of a video are given as pictures: in a column `frames` or `images`, or as files in the folder frames/DATASET/SCENE (or
DATASET/SCENE) beside the table, of which 32 are taken, evenly spaced, by name. Numbers get mean relative accuracy. Overall is the mean
of eight tasks, the three difficulties of relative direction being one. Source: lmms-eval, tasks/vsibench; VLMEvalKit, vsibench.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from actial_fast.data.sources.row import IMAGE_TAG, BadRow
from actial_fast.evaluation.figures import Mean, average, each, micro, together
from actial_fast.evaluation.items import Item
from actial_fast.evaluation.owners import vsi
from actial_fast.evaluation.records import Layout, Record, letter_of, opener, unlettered
from actial_fast.evaluation.specs import LETTER, benchmark

PAGE = "https://huggingface.co/datasets/nyu-visionx/VSI-Bench"
FRAMES = 32
PICTURES = (".jpg", ".jpeg", ".png", ".webp")
NUMBERS = ("object_abs_distance", "object_counting", "object_size_estimation", "room_size_estimation")
DIRECTIONS = tuple(f"object_rel_direction_{hard}" for hard in ("easy", "medium", "hard"))
CHOICES = ("object_rel_distance", "route_planning", "obj_appearance_order")


def frames(record: Record) -> tuple[Path | bytes, ...]:
    """The frames of a record's video; BadRow where there are none."""
    for key in ("frames", "images"):
        if record.has(key):
            return record.images(key)
    place = Path(record.text("dataset"), record.needed("scene_name", "video"))
    for folder in (folder / below / place.with_suffix("") for folder in record.folders for below in ("frames", "")):
        if found := sorted(file for file in folder.glob("*") if file.suffix.lower() in PICTURES):
            chosen = np.linspace(0, len(found) - 1, min(FRAMES, len(found)), dtype=int)
            return tuple(found[n] for n in chosen)
    raise BadRow(
        record.where,
        f"no frames of the video {place}: give them in a column `frames`, or as pictures in {record.folders[0] / 'frames' / place} "
        f"(ffmpeg -i {place.name}.mp4 %05d.jpg writes them)",
    )


def item(record: Record) -> Item:
    """Of the owner's table."""
    kind, pictures = record.needed("question_type"), frames(record)
    options = unlettered(record.texts("options") or record.texts("candidates"))
    number, answer = kind in NUMBERS, record.needed("ground_truth", "answer")
    offered = "".join(f"\n{chr(ord('A') + n)}. {option}" for n, option in enumerate(options))
    asked = "Please answer the question using a single word or phrase." if number else f"Options:{offered}\n{LETTER}"
    return Item(
        id=record.text("id", "index") or str(record.number),
        prompt=IMAGE_TAG * len(pictures) + f"These are frames of a video.\n{record.needed('question')}\n{asked}",
        images=pictures,
        answer=answer if number else letter_of(answer, options, record.where),
        options=() if number else options,
        category=kind,
        cluster=record.text("scene_name", "video"),
        form="number" if number else "letter",
        measure="mra" if number else "equal",
        where=record.where,
    )


VSI = benchmark(
    "vsi-bench",
    "VSI-Bench",
    PAGE,
    opener(
        "VSI-Bench",
        PAGE,
        [
            Layout(("question_type", "question", "ground_truth", "options"), item),
            Layout(("question_type", "question", "answer", "candidates"), item),
        ],
        repos=["nyu-visionx/VSI-Bench"],
        files=["test.jsonl", "full/test-*.parquet", "test-*.parquet", "data/test-*.parquet", "test.parquet"],
        tsv=["VSI-Bench.tsv"],
    ),
    together(
        each(order=(*NUMBERS, *DIRECTIONS, *CHOICES)), average("overall", Mean(*NUMBERS, Mean(*DIRECTIONS), *CHOICES)), micro("mean of all")
    ),
    "overall",
    owner=vsi,
)

"""MindCube: questions about a scene seen from a few places. `mindcube` is its tinybench of 1,050 questions, `mindcube-full` all of them.

The prompt is the owner's where the file has it (`input_prompt`, with the pictures' places), else the question and a request for the letter.
The setting is in the id; "translation" does not count for the overall figure. Source: mll-lab-nu/MindCube, src/evaluation/core.
"""

from __future__ import annotations

from collections.abc import Sequence

from actial_fast.data.sources.asked import lettered
from actial_fast.data.sources.row import IMAGE_TAG
from actial_fast.evaluation.figures import each, micro, together
from actial_fast.evaluation.items import BenchmarkSet, Item
from actial_fast.evaluation.owners import mindcube
from actial_fast.evaluation.records import Layout, Record, opener
from actial_fast.evaluation.specs import LETTER, benchmark, choices_item, vlmevalkit

PAGE = "https://huggingface.co/datasets/MLL-Lab/MindCube"
SETTINGS = ("rotation", "among", "around")


def setting(name: str) -> str:
    """The setting that an id, or a category, names."""
    return next((each for each in ("around", "rotation", "translation", "among") if each in name.lower()), "other")


def counted(item: Item) -> str:
    """The setting, '' for the one that the overall figure leaves out."""
    return "" if item.category == "translation" else item.category


def ask(record: Record, options: Sequence[str]) -> str:
    """The owner's prompt, or the question with a request for the letter."""
    return record.text("input_prompt") or f"{record.needed('question')}\n{LETTER}"


def item(record: Record) -> Item:
    """Of the owner's JSON Lines."""
    question = record.needed("question")
    return choices_item(
        record,
        id=record.needed("id"),
        prompt=ask(record, ()),
        images=["images"],
        options=lettered(question.replace(IMAGE_TAG, " ")),
        answer=record.needed("gt_answer", "grounded_output"),
        category=setting(record.text("id")),
    )


def _set(name: str, title: str, stem: str, tsv: str) -> BenchmarkSet:
    files = [
        f"{folder}{stem}{rest}.jsonl"
        for rest in ("_raw_qa", "")
        for folder in ("", "raw/", "data/raw/", "prompts/general/", "data/prompts/general/")
    ]
    tables = vlmevalkit(ask, category=lambda record: setting(record.text("category") or record.text("index")))
    layouts = [Layout(("id", "question", "images", "gt_answer"), item), tables]
    return benchmark(
        name,
        title,
        PAGE,
        opener(title, PAGE, layouts, repos=["MLL-Lab/MindCube"], files=files, tsv=[tsv]),
        together(each(order=SETTINGS), micro("overall", counted)),
        "overall",
        owner=mindcube,
    )


MINDCUBE = _set("mindcube", "MindCube (tinybench)", "MindCube_tinybench", "MindCubeBench_tiny_raw_qa.tsv")
MINDCUBE_FULL = _set("mindcube-full", "MindCube", "MindCube", "MindCubeBench_raw_qa.tsv")

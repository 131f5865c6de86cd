"""SpatialScore, version 0: questions of 13 sources, with a letter, yes or no, or a number for an answer.

The request ahead of the question depends on the source; the owner's script sends it as a turn of the assistant's, here it opens the user's.
Lengths are right within a factor of two, VSI-Bench's numbers get its mean relative accuracy, other numbers must be equal. Source:
haoningwu3639/SpatialScore, version_0/test_qwen.py and utils/util.py.
"""

from __future__ import annotations

from actial_fast.data.sources.asked import lettered
from actial_fast.data.sources.row import IMAGE_TAG
from actial_fast.evaluation.figures import each, meta, micro, together
from actial_fast.evaluation.items import Item, Measure
from actial_fast.evaluation.numbers import quantity
from actial_fast.evaluation.owners import spatialscore
from actial_fast.evaluation.records import Layout, Record, letter_of, opener
from actial_fast.evaluation.specs import LETTER_FORM, benchmark, open_answer

PAGE = "https://huggingface.co/datasets/haoningwu/SpatialScore"
EQUAL: Measure = "equal"
LETTERS = ("cvbench", "MMIU", "BLINK", "3DSRBench", "MMVP")
LENGTHS = ("QSpatialBench-Plus", "QSpatialBench-ScanNet", "VGBench")
ASK_LETTER = (
    "**Please select the most appropriate answer from options (A), (B), (C), (D), (E), or (F).**\n"
    "**Respond ONLY with the letter and its parentheses, for example: (A)**\n\nQuestion: "
)
ASK_SHORT = "**Answer concisely with a single word, number, or option (e.g., yes, no, 5, 2.2, A).**\n\nQuestion: "
ASK_LENGTH = (
    "You will be provided with a question and a 2D image. The question involves measuring the precise distance in 3D space through a 2D "
    "image. You will answer the question by providing a numeric answer consisting of a scalar and a distance unit in the format of "
    "**\\scalar{scalar} \\distance_unit{distance unit}** at the end of your response.\nLet's think step by step and start by finding good "
    "reference objects or object parts in the image.\n\nQuestion:"
)


def item(record: Record) -> Item:
    """Of the owner's JSON."""
    question, source, kind = record.needed("question"), record.text("source"), record.text("question_type").lower()
    answer, options = record.needed("answer"), lettered(record.text("question"))
    form, measure = LETTER_FORM, EQUAL
    if kind == "multi-choice":
        answer = letter_of(answer, options, record.where)
    elif source == "RealWorldQA" and kind != "judgment":
        form = "text"
    else:
        length = quantity(answer)
        measure = "mra" if source.startswith("VSI-Bench") else "length" if length and length.metres is not None else EQUAL
        answer, form = open_answer(answer)
    ask = ASK_LETTER if source in LETTERS else ASK_LENGTH if source in LENGTHS and kind == "open-ended" else ASK_SHORT
    images = record.images("img_paths")
    return Item(
        id=record.text("id") or str(record.number),
        prompt=IMAGE_TAG * len(images) + ask + question.replace(IMAGE_TAG, "").strip(),
        images=images,
        answer=answer,
        options=options if form == "letter" else (),
        category=record.text("category"),
        meta={key: record.text(key) for key in ("source", "subcategory", "question_type", "input_modality")},
        form=form,
        measure=measure,
        where=record.where,
    )


SPATIALSCORE = benchmark(
    "spatialscore",
    "SpatialScore (version 0)",
    PAGE,
    opener(
        "SpatialScore",
        PAGE,
        [Layout(("question_type", "source", "question", "answer", "img_paths"), item)],
        repos=["haoningwu/SpatialScore"],
        files=["SpatialScore.json", "dataset/SpatialScore.json", "**/SpatialScore.json"],
    ),
    together(each(), each(meta("source"), "from {}"), micro()),
    "accuracy",
    owner=spatialscore,
)

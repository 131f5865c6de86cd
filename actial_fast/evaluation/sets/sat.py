"""SAT, spatial aptitude training: the test questions about real pictures, with lettered options, of array/SAT or nv-njb/SAT.

The options are shown in an order drawn from the question (data/sources/sat.py), so that their order in the file teaches nothing. The prompt
is the question, the options by letter, and lmms-eval's request for the letter alone. Source: arijitray1993/SAT,
custom_datasets/dataloaders.py; lmms-eval, tasks/sat.
"""

from __future__ import annotations

from dataclasses import replace

from actial_fast.data.sources.row import Row
from actial_fast.evaluation.figures import each, macro, micro, together
from actial_fast.evaluation.items import Item
from actial_fast.evaluation.owners import sat
from actial_fast.evaluation.rows import item_of, row_opener
from actial_fast.evaluation.specs import benchmark

PAGE = "https://huggingface.co/datasets/array/SAT"


def item(row: Row, number: int) -> Item:
    """Of a row with lettered options."""
    found = item_of(row, number)
    return replace(found, prompt=f"{found.prompt}\n\nOnly output the letter of the correct option and nothing else.")


SAT = benchmark(
    "sat",
    "SAT",
    PAGE,
    row_opener(
        "SAT",
        PAGE,
        item,
        format="sat",
        letters=True,
        repos=["array/SAT", "nv-njb/SAT"],
        files=["SAT_test.parquet", "*test*.parquet", "data/test*.parquet"],
    ),
    together(each(), micro(), macro()),
    "accuracy",
    owner=sat,
)

"""Benchmarks for the tests of runs: a few questions about the lab's pictures, and servers that answer them."""

from pathlib import Path

from actial_fast.data.sources.own import JsonlSource
from actial_fast.evaluation import figures
from actial_fast.evaluation.extraction import rules
from actial_fast.evaluation.items import BenchmarkSet, Item, Items, Opened


def items_from(path: Path, count: int) -> Items:
    """The first rows of a file of ours as items, clustered by pair."""
    rows = JsonlSource(path)

    def get(index: int) -> Item:
        row = rows[index]
        pair = row.id.rpartition("/")[0]
        return Item(
            row.id, row.prompt[-1].content, row.images, row.truth, row.choices, row.kind, cluster=pair, meta=dict(row.meta), where=row.where
        )

    return Items(path, count, get)


def benchmark(name: str = "pairs", **changes: object) -> BenchmarkSet:
    """A set of letters with a figure a category and one for all."""

    def nowhere(path):
        raise ValueError("published nowhere")

    settings = {
        "title": "Pairs",
        "page": "nowhere",
        "open": nowhere,
        "extract": rules,
        "owner": rules,
        "worth": lambda item, answer: float(answer == item.answer),
        "figures": figures.together(figures.each(), figures.micro()),
        "headline": "accuracy",
        "published": {"Somebody": {"accuracy": 41.5}},
        "max_new_tokens": 6,
        **changes,
    }
    return BenchmarkSet(name=name, **settings)


def pairs(lab, count: int = 12, **changes: object) -> Opened:
    """The lab's test questions as a set."""
    path = lab.questions / "test.jsonl"
    return Opened(benchmark(**changes), items_from(path, count))


def always_a(reply: str, item: Item) -> str:
    """A user's rule."""
    return "A"

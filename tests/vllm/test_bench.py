"""A benchmark put to vLLM in this process: greedy replies in float32 are the embedded engine's."""

import json

import numpy as np

from actial_fast.evaluation.bench import Scoring, bench
from actial_fast.evaluation.items import Item, Items, Opened
from actial_fast.evaluation.run import Asking
from tests.conftest import png
from tests.evaluation.kit import benchmark


def test_replies_are_those_of_the_embedded_engine(model, tmp_path):
    rng = np.random.default_rng(0)
    pictures = [png(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((56, 28), (84, 112), (28, 220))]
    asked = [("<image>Which way?", pictures[:1]), ("First <image>, then <image>: left?", pictures[1:]), ("Left?", [])]
    items = [Item(str(k), text, tuple(images), "A", ("left", "right")) for k, (text, images) in enumerate(asked)]
    opened = Opened(benchmark(), Items(tmp_path, len(items), items.__getitem__))
    found = {}
    for engine in ("embedded", "vllm"):
        asking = Asking(str(model), engine, engine=engine, max_new_tokens=12, max_prompt=200, max_pixels=16 * 28**2, min_pixels=2 * 28**2)
        bench({"pairs": opened}, [asking], tmp_path, Scoring(errors=0))
        lines = (tmp_path / "pairs" / engine / "replies.jsonl").read_text().splitlines()
        found[engine] = [(r["id"], r["text"], r["tokens"], r["finish"]) for r in map(json.loads, lines)]
    assert len(found["vllm"]) == 3 and found["vllm"] == found["embedded"]

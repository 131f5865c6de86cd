"""What a source holds, in figures: rows, kinds, answers, pictures, lengths, and what stands in the rows' meta.

Everything is read once, a row at a time, and of pictures the headers alone (`actial data check` decodes them).
"""

from __future__ import annotations

import math
import numbers
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actial_fast.data.sources.picture import size
from actial_fast.data.sources.row import IMAGE_TAG, BadRow, Row
from actial_fast.data.sources.source import Source, outline

BINS = 30
QUANTILES = {"p5": 0.05, "median": 0.5, "p95": 0.95, "p99": 0.99}
COMMON = 12  # values of a text that are named
VARIED = 1000  # different texts under a key of meta, above which they are not counted one by one


@dataclass(frozen=True)
class Lengths:
    """Tokens of a row as a model reads it. prompt: of everything that is not trained on, the `images` of its pictures among them; reply: of
    what is; patches: of its distinct pictures."""

    prompt: int
    images: int
    reply: int
    patches: int


Measure = Callable[[Row, int], Lengths]


def stats(source: Source, indices: Iterable[int], measure: Measure | None = None, *, progress: Callable[[int], None] | None = None) -> Any:
    """The figures of these rows of a source, as an object of JSON.

    measure: how long a row becomes, called with it and its number; a BadRow that it raises makes the row a bad one. Without it lengths are
    told in characters only. Distributions are of good rows: {count, mean, min, p5, median, p95, p99, max, edges, counts}, the last two a
    histogram. Pictures that are missing are counted as files, in however many rows they are.
    """
    rows, reasons, meta = 0, Counter[str](), _Meta()
    kinds, truths, offered, per_row = Counter[str](), Counter[str](), Counter[int](), Counter[int]()
    values: defaultdict[str, list[float]] = defaultdict(list)
    sizes: dict[Path, tuple[int, int]] = {}
    missing: set[Path] = set()
    embedded = 0
    for rows, index in enumerate(indices, start=1):
        try:
            row = source[index]
            for image in row.images:
                if isinstance(image, Path) and image not in sizes and not image.exists():
                    missing.add(image)
            seen = [sizes.get(image) if isinstance(image, Path) else None for image in row.images]
            found = [known or size(image, row.where) for known, image in zip(seen, row.images, strict=True)]
            lengths = measure(row, index) if measure else None
        except BadRow as error:
            reasons[outline(error.reason)] += 1
        else:
            for image, (height, width) in zip(row.images, found, strict=True):
                if isinstance(image, Path) and image in sizes:
                    continue
                if isinstance(image, Path):
                    sizes[image] = height, width
                embedded += not isinstance(image, Path)
                values["image_width"].append(width)
                values["image_height"].append(height)
            kinds[row.kind] += 1
            truths[row.truth] += bool(row.truth)
            offered[len(row.choices)] += 1
            per_row[len(row.images)] += 1
            values["question_characters"].append(sum(len(t.content.replace(IMAGE_TAG, "")) for t in row.turns if t.role != "assistant"))
            values["reply_characters"].append(sum(len(t.content) for t in row.turns if t.role == "assistant"))
            meta.add(row.meta)
            if lengths:
                values["prompt_tokens"].append(lengths.prompt)
                values["image_tokens"].append(lengths.images)
                values["reply_tokens"].append(lengths.reply)
                values["sequence_tokens"].append(lengths.prompt + lengths.reply)
                values["patches"].append(lengths.patches)
        if progress:
            progress(rows)
    good = sum(kinds.values())
    return {
        "rows": len(source),
        "looked_at": rows,
        "good": good,
        "bad": rows - good,
        "reasons": dict(reasons.most_common()),
        "kinds": dict(sorted(kinds.items())),
        "choices": {str(n): count for n, count in sorted(offered.items())},
        "answers": common(+truths),
        "images": {
            "per_row": {str(n): count for n, count in sorted(per_row.items())},
            "shown": sum(n * count for n, count in per_row.items()),
            "files": len(sizes),
            "embedded": embedded,
            "missing": len(missing),
            "missing_files": sorted(map(os.path.normpath, missing))[:COMMON],
        },
        "lengths": {name: distribution(of) for name, of in values.items()},
        "meta": meta.figures(),
    }


def distribution(values: Sequence[float]) -> dict[str, Any]:
    """Count, mean, quantiles and a histogram of finite values; whole numbers of a small range have a bar each."""
    of = np.sort(np.asarray(values, np.float64))
    low, high = float(of[0]), float(of[-1])
    whole = bool((of == np.floor(of)).all())
    step = max(1, math.ceil((high - low + 1) / BINS)) if whole else (high - low) / BINS or 1.0
    edges = low + step * np.arange((math.ceil((high - low + 1) / step) if whole else BINS) + 1)
    counts, _ = np.histogram(of, np.append(edges[:-1], np.inf))  # rounding must not lose the highest
    plain = int if whole else float
    quantiles = {name: plain(np.quantile(of, q, method="inverted_cdf")) for name, q in QUANTILES.items()}
    return {
        "count": len(of),
        "mean": float(of.mean()),
        "min": plain(low),
        **quantiles,
        "max": plain(high),
        "edges": edges.tolist(),
        "counts": counts.tolist(),
    }


def common(counts: Counter[str]) -> dict[str, Any]:
    """How many different texts there are, and how often each of the commonest is there."""
    return {"different": len(counts), "commonest": dict(counts.most_common(COMMON))}


class _Meta:
    """What stands under each key of the rows' meta; objects within by dotted names."""

    def __init__(self) -> None:
        self._numbers: defaultdict[str, list[float]] = defaultdict(list)
        self._texts: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def add(self, meta: Mapping[str, Any], prefix: str = "") -> None:
        for key, value in meta.items():
            name = f"{prefix}{key}"
            if isinstance(value, Mapping):
                self.add(value, f"{name}.")
            elif isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_):
                if math.isfinite(value):
                    self._numbers[name].append(float(value))
            elif isinstance(value, str | bool | np.bool_):
                known = self._texts[name]
                known[str(value) if len(known) < VARIED or str(value) in known else "..."] += 1

    def figures(self) -> dict[str, Any]:
        found = {name: distribution(values) for name, values in self._numbers.items()}
        return dict(sorted((found | {name: common(counts) for name, counts in self._texts.items() if name not in found}).items()))

"""Rows as verl's RLHFDataset reads them: parquet with data_source, prompt, images, ability, reward_model and extra_info.

Images are encoded bytes with the pixel limits beside them, which verl's process_vision_info takes; a `<image>` tag stands in the prompt
where each belongs. What is read is what a run would read: filters, system prompts and tasks are applied. `actial` itself opens these files
again (format verl).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from actial_fast.data.sources.files import writing
from actial_fast.data.sources.picture import encoded
from actial_fast.data.sources.row import BadRow, Row
from actial_fast.data.sources.source import Source, SourceConfig
from actial_fast.tasks.verl import written

GROUP_BYTES = 1 << 26  # of images in a row group: what a reader holds at once
GROUP_ROWS = 1000
MOST_COPIES = 32  # of a file in the list of those that make up a mixture
IMAGE = pa.struct([("bytes", pa.binary()), ("min_pixels", pa.int64()), ("max_pixels", pa.int64())])
SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("images", pa.list_(IMAGE)),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
        (
            "extra_info",
            pa.struct(
                [
                    ("split", pa.string()),
                    ("index", pa.int64()),
                    ("question_type", pa.string()),
                    ("choices", pa.list_(pa.string())),
                    ("row", pa.string()),
                ]
            ),
        ),
    ]
)


@dataclass
class Written:
    """What `write` wrote. rows: how many; images: with how many images in all; bad: the rows left out."""

    rows: int
    images: int
    bad: list[BadRow]


@dataclass(frozen=True)
class Limits:
    """Of images. pixels: fewest and most after resizing; most: of an image before, more are a row-level error."""

    pixels: tuple[int, int]
    most: int


def named(sources: Sequence[SourceConfig]) -> list[str]:
    """A data_source for each, by which verl tells figures apart: its file's name, the folder's before it where two have the same, and a
    number where these have too."""
    paths = [Path(source.path).expanduser().resolve() for source in sources]
    stems = [path.stem for path in paths]
    names = [stem if stems.count(stem) == 1 else f"{path.parent.name}-{stem}" for path, stem in zip(paths, stems, strict=True)]
    return [name if names.count(name) == 1 else f"{name}-{i}" for i, name in enumerate(names, 1)]


def write(
    file: Path,
    sources: Mapping[str, Source],
    limits: Limits,
    *,
    split: str,
    limit: int = 0,
    skip: bool = False,
    advance: Callable[[int], None] = lambda done: None,
) -> Written:
    """Write the rows of these sources, each under its name, one behind the other, to one parquet file.

    limit: of rows of each source, 0 = all; skip: leave bad rows out and list them, instead of raising the first as BadRow. advance: is
    told the rows looked at. Raises ValueError for a source without a row that can be used.
    """
    done, seen = Written(0, 0, []), 0
    with writing(file), pq.ParquetWriter(file, SCHEMA) as writer:
        for name, source in sources.items():
            held: list[dict[str, Any]] = []
            size, before = 0, done.rows
            for index in range(min(limit or len(source), len(source))):
                try:
                    held.append(_record(source[index], name, index, split, limits))
                except BadRow as error:
                    if not skip:
                        raise
                    done.bad.append(error)
                else:
                    done.rows += 1
                    done.images += len(held[-1]["images"])
                    size += sum(len(image["bytes"]) for image in held[-1]["images"])
                seen += 1
                advance(seen)
                if size > GROUP_BYTES or len(held) == GROUP_ROWS:
                    writer.write_table(pa.Table.from_pylist(held, SCHEMA))
                    held, size = [], 0
            if held:
                writer.write_table(pa.Table.from_pylist(held, SCHEMA))
            if done.rows == before:
                raise ValueError(f"data source {name} has no row that can be handed over; of the first: {done.bad[0]}")
    return done


def _record(row: Row, name: str, index: int, split: str, limits: Limits) -> dict[str, Any]:
    fewest, most = limits.pixels
    return {
        "data_source": name,
        "prompt": [{"role": turn.role, "content": turn.content} for turn in row.prompt],
        "images": [{"bytes": _bytes(image, row.where, limits.most), "min_pixels": fewest, "max_pixels": most} for image in row.images],
        "ability": row.kind,
        "reward_model": {"style": "rule", "ground_truth": row.truth},
        "extra_info": {"split": split, "index": index, "question_type": row.kind, "choices": list(row.choices), "row": written(row)},
    }


def _bytes(image: Path | bytes, where: str, most: int) -> bytes:
    """The image as whoever opens it sees it; BadRow for what is none."""
    if isinstance(image, bytes):
        return encoded(image, where, most)[0]
    try:
        return _of_file(image, most)
    except BadRow as error:
        raise BadRow(where, error.reason) from None


@functools.lru_cache(maxsize=64)  # rows about the same images stand together
def _of_file(image: Path, most: int) -> bytes:
    return encoded(image, str(image), most)[0]


def copies(rows: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How often each source's file stands in a list of files, so that its share of all rows comes near its share of the weights.

    The first list, by its length in the source that needs most, whose every share is within 2% of what is wanted, or else the nearest with
    up to 32 copies of a file.
    """
    wanted = [weight / sum(weights) for weight in weights]
    ratios = [share / n for share, n in zip(wanted, rows, strict=True)]  # copies are to be in these proportions

    def tried() -> Iterator[tuple[float, list[int]]]:
        for most in range(1, MOST_COPIES + 1):
            numbers = [max(1, round(most * ratio / max(ratios))) for ratio in ratios]
            found = shares(rows, numbers)
            yield max(abs(math.log(a / b)) for a, b in zip(found, wanted, strict=True)), numbers

    best: tuple[float, list[int]] | None = None
    for error, numbers in tried():
        if best is None or error < best[0]:
            best = error, numbers
        if error < 0.02:
            break
    assert best is not None
    return best[1]


def shares(rows: Sequence[int], numbers: Sequence[int]) -> list[float]:
    """Each source's share of the rows, its file that often in the list."""
    counts = [n * number for n, number in zip(rows, numbers, strict=True)]
    return [count / sum(counts) for count in counts]

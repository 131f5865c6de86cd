"""Records changed at random, in every format: a good row whose words are all the record's, or a BadRow that names it; nothing else."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actial_fast.data.sources.fields import MEANING, absent
from actial_fast.data.sources.plugins import find
from actial_fast.data.sources.row import BadRow, Row
from actial_fast.data.sources.sat import OPTIONS
from actial_fast.data.sources.source import FORMATS, SourceConfig, open_source
from actial_fast.data.sources.tags import extract_answer
from tests.data.sources.test_rows import B64, DATA, GOOD, PARTS, TABLES

VALUES: list[Any] = [
    None,
    float("nan"),
    float("inf"),
    0,
    1,
    -3,
    2.5,
    True,
    False,
    "",
    " ",
    "x",
    "None",
    "nan",
    "<image>",
    "<image><image>q",
    "B",
    "b.",
    "[1",
    "[]",
    "{}",
    '["a.png"]',
    '{"a": 1}',
    "\ud83d",
    "a\0b",
    "<|im_end|>",
    "<video>",
    "<answer>B</answer>",
    "<answer>B",
    "a.png",
    "file:///a%20b.png",
    "C:\\a.png",
    "~/a.png",
    "data:image/png;base64,AAAA",
    f"data:image/png;base64,{B64}",
    B64,
    "z" * 5000,
    [],
    {},
    [None],
    ["x"],
    ["a.png", "b.png"],
    [["x"]],
    [3],
    {"path": "a.png"},
    {"bytes": None, "path": None},
    {"type": "text", "text": "p"},
    PARTS,
    [{"type": "image"}],
    [{"role": "user", "content": "<image>q"}],
    [{"role": "assistant", "content": "B"}],
    {"role": "user"},
    {"ground_truth": ["B", "C"]},
    {"target": ["B"]},
    10**30,
    "１２",
]
KEYS = [
    *MEANING,
    "messages",
    "conversations",
    "image",
    "images",
    "system",
    "truth",
    "id",
    "kind",
    "extra_info",
    "answer",
    "note",
    "role",
    "content",
    "from",
    "",
]


class Memory:
    """Records that are no file."""

    column_names = ()
    folder = Path("/nowhere")

    def __init__(self, record: Any):
        self._record = record

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        return self._record

    def some(self, index: int, keys) -> dict:
        return {key: self._record[key] for key in keys if key in self._record} if isinstance(self._record, dict) else {}

    def where(self, index: int) -> str:
        return "memory:1"


@st.composite
def records(draw, form: str) -> Any:
    """A good record of a format in which up to four things are others."""
    record = copy.deepcopy(GOOD[form])
    for _ in range(draw(st.integers(0, 4))):
        place: Any = record
        while True:  # walk to somewhere
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and draw(st.booleans()):
                place = place[key]
                continue
            break
        what = draw(st.sampled_from(("replace", "drop", "add", "double")))
        if what == "replace" and keys:
            place[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
        elif what == "drop" and keys:
            del place[key]
        elif what == "add" and isinstance(place, dict):
            place[draw(st.sampled_from(KEYS))] = copy.deepcopy(draw(st.sampled_from(VALUES)))
        elif what == "double" and isinstance(place, list) and keys:
            place.append(copy.deepcopy(place[key]))
    return record


def words(value: Any) -> set[str]:
    """Every text in a record, also in JSON that is stored as text."""
    if isinstance(value, str):
        found = {value, value.strip(), extract_answer(value)}
        if value.lstrip()[:1] in ("[", "{"):
            try:
                found |= words(json.loads(value))
            except ValueError:
                return found
        return found
    if isinstance(value, dict):
        return set().union(*(words(each) for each in value.values()), {""})
    if isinstance(value, list):
        return set().union(*map(words, value), {""})
    return {""}


def said_in(text: str, known: set[str], form: str) -> bool:
    """Whether a text consists of what the record says."""
    left = text.replace("<image>", "")
    if form == "sat":
        for own in (OPTIONS, ", ", " or "):
            left = left.replace(own, "")
    for word in sorted((word.replace("<image>", "") for word in known), key=len, reverse=True):
        if word:
            left = left.replace(word, "")
    return not left.strip()


def check(form: str, record: Any) -> bool:
    """Whether the row is good; what it must not be fails."""
    cls = find("format", form, FORMATS)
    source = cls.__new__(cls)
    source.records, source._letters = Memory(record), False
    try:
        row = source[0]
    except BadRow as error:
        assert error.where == "memory:1" and 0 < len(error.reason) <= 400 and error.reason.isprintable(), error
        return False
    assert isinstance(row, Row) and row.check() is row and all(isinstance(image, Path | bytes) for image in row.images)
    known = words(record)
    for text in (*(turn.content for turn in row.turns), row.truth, *row.accepted, *row.choices):
        assert isinstance(text, str) and said_in(text, known, form), (text, record)
    number = isinstance(record.get("id"), int) or isinstance((record.get("extra_info") or {}), dict)
    assert row.id in known or number
    for key in ("weight", "tools", "rejected", "videos", "loss"):
        neutral = absent(record.get(key)) or record[key] in ("[]", "{}", "null", "None", 1)
        assert neutral, (key, record)
    return True


def fuzz(form: str, examples: int) -> None:
    good = 0

    @settings(max_examples=examples, deadline=None)
    @given(records(form))
    def run(record) -> None:
        nonlocal good
        good += check(form, record)

    run()
    assert examples / 100 < good, f"{good} of {examples} rows were good"


@pytest.mark.parametrize("form", GOOD)
def test_changed_records(form):
    fuzz(form, 150)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("form", GOOD)
def test_ten_thousand_changed_records(form):
    fuzz(form, 10_000)


def opened(path: Path, form: str) -> None:
    """Read everything of a damaged file: ValueError for the file, BadRow for a row."""
    try:
        source = open_source(SourceConfig(str(path), format=form))
    except ValueError as error:
        assert str(path) in str(error) and len(str(error)) < 2000
        return
    for index in range(len(source)):
        for look in (source.__getitem__, source.kind, source.images):
            try:
                look(index)
            except BadRow as error:
                assert error.where.startswith(str(path))


@pytest.mark.parametrize("form", GOOD)
def test_damaged_json_files(tmp_path, form):
    rng = np.random.default_rng(len(form))
    text = "".join(json.dumps(GOOD[form]) + "\n" for _ in range(4)).encode()
    array = json.dumps([GOOD[form]] * 4).encode()
    for trial in range(120):
        data = bytearray((text, array)[trial % 2])
        for _ in range(rng.integers(1, 6)):
            data[rng.integers(len(data))] = rng.integers(256)
        path = tmp_path / f"{trial}.json"
        path.write_bytes(data[: rng.integers(1, len(data))] if trial % 3 == 0 else data)
        opened(path, form)


@pytest.mark.parametrize("form", TABLES)
def test_damaged_tables(tmp_path, form, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(len(form))
    record = {key: value for key, value in GOOD[form].items() if key not in ("images", "image_bytes")}
    pq.write_table(pa.Table.from_pylist([{**record, "image_bytes" if form == "sat" else "images": [DATA]}] * 4), tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    for trial in range(40):
        data = bytearray(whole)
        for _ in range(rng.integers(1, 6)):
            data[rng.integers(len(data))] = rng.integers(256)
        path = tmp_path / f"{trial}.parquet"
        path.write_bytes(data[: rng.integers(1, len(data))] if trial % 3 == 0 else data)
        opened(path, form)

"""Sources: each format gives the rows it should, every malformed row is named, and nothing is read before it is asked for."""

import io
import json
import os
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from actial_fast.data.captures import questions
from actial_fast.data.sources.jsonl import JsonRecords
from actial_fast.data.sources.picture import decode
from actial_fast.data.sources.row import BadRow, Row, Turn
from actial_fast.data.sources.sat import options_line
from actial_fast.data.sources.source import Rejects, SourceConfig, open_source, runs, scan
from actial_fast.data.sources.table import Table


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def encoded(value: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((6, 8, 3), value, np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def row(**changes) -> dict:
    plain = {
        "id": "r0",
        "messages": [{"role": "user", "content": "<image>Which side?"}, {"role": "assistant", "content": "B"}],
        "images": ["a.png"],
        "truth": "B",
        "kind": "side",
        "choices": ["left", "right"],
    }
    return {**plain, **changes}


def write_lines(path: Path, records: list, end: str = "\n") -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + end)
    return path


# --- JSON records


@given(
    records=st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=8) | st.integers() | st.none(), max_size=3), max_size=8),
    gap=st.sampled_from(["", " ", "\n", "\r\n  ", "\t"]),
    ascii_only=st.booleans(),
    bom=st.booleans(),
    array=st.booleans(),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_records_are_found_wherever_they_lie(tmp_path, records, gap, ascii_only, bom, array):
    lines = [json.dumps(record, ensure_ascii=ascii_only) for record in records]
    text = gap + "[" + gap + f"{gap},{gap}".join(lines) + gap + "]" + gap if array else "".join(line + "\n" + gap for line in lines)
    path = tmp_path / "file.json"
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + text.encode())
    if not array and gap in ("", " ", "\t"):  # white space before a record belongs to its line
        assert [JsonRecords(path).where(i) for i in range(len(records))] == [f"{path}:{i + 1}" for i in range(len(records))]
    assert list(iter_records(JsonRecords(path))) == records


def iter_records(records):
    return (records[i] for i in range(len(records)))


def test_lines_keep_their_numbers_and_one_bad_line_costs_one_row(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ['{"a": 1}', "", "  ", '{"a": 2', '{"a": "\u00e9"}'], end="")
    records = JsonRecords(path)
    assert len(records) == 3 and records[0] == {"a": 1} and records[2] == {"a": "\u00e9"}
    with pytest.raises(BadRow, match=r"a\.jsonl:4: not JSON"):
        records[1]
    path.write_bytes(b'{"a": "\xff"}\n' + b"[" * 100_000 + b"\n")
    path.rename(tmp_path / "b.jsonl")
    for i in range(2):
        with pytest.raises(BadRow, match="not JSON"):
            JsonRecords(tmp_path / "b.jsonl")[i]


def test_a_key_that_is_there_twice(tmp_path):
    line = '{"messages": [{"role": "user", "content": "q"}], "truth": "A", "truth": "B"}\n'
    (tmp_path / "r.jsonl").write_text(line + '{"messages": [], "K": 1, "K": 2}\n'.replace("K", "x" * 9000))
    source = open_source(SourceConfig(str(tmp_path / "r.jsonl"), format="jsonl"))
    for index, key in enumerate(("truth", "xxx")):
        with pytest.raises(BadRow, match=f"the key '{key}.*is there twice") as raised:
            source[index]
        assert len(str(raised.value)) < 400


@pytest.mark.parametrize("text", ['[{"a": 1}', '[{"a": 1}, ', '[{"a": 1} {"a": 2}]', '[{"a": 1},]', '[{"a": 1}] 2', '[{"a": 1', "["])
def test_damaged_array(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json"):
        JsonRecords(tmp_path / "a.json")


# --- our own rows


def test_jsonl_rows(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(7))
    path = write_lines(tmp_path / "rows.jsonl", [row(meta={"yaw_deg": 3.5}), row(id="r1", images=[], messages=row()["messages"][1:])])
    source = open_source(SourceConfig(str(path)))
    first = source[0]
    assert first.turns == (Turn("user", "<image>Which side?"), Turn("assistant", "B"))
    assert (first.truth, first.kind, first.choices, first.id, first.where) == ("B", "side", ("left", "right"), "r0", f"{path}:1")
    assert first.meta == {"yaw_deg": 3.5} and first.to_json(tmp_path) == row(meta={"yaw_deg": 3.5})
    assert decode(first.images[0], "")[0, 0].tolist() == [7, 7, 7]
    with pytest.raises(BadRow, match=r"rows\.jsonl:2: no user message"):
        source[1]


@pytest.mark.parametrize(
    "bad, reason",
    [
        (row(messages=None), "messages"),
        ([1], "not a JSON object"),
        ("3", "not a JSON object"),
        (row(images=["a.png", "a.png"]), "1 <image> tags but 2 images"),
        (row(images=[]), "1 <image> tags but 0 images"),
        (row(images=5), "image 1 is a number"),
        (row(choices=1), "choices is a number"),
        (row(messages=[{"role": "user", "content": "<image>"}, {"role": "assistant", "content": " \n"}]), "empty answer"),
        (row(messages=[{"role": "tool", "content": "<image>"}]), "unknown role 'tool'"),
        (row(messages=[{"role": "user"}]), "no `role` and `content`"),
    ],
)
def test_malformed_jsonl(tmp_path, bad, reason):
    path = write_lines(tmp_path / "rows.jsonl", [row(), bad])
    with pytest.raises(BadRow, match=rf"rows\.jsonl:2: .*{reason}"):
        open_source(SourceConfig(str(path), format="jsonl"))[1]


# --- ShareGPT


def test_sharegpt_spellings_agree(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(1))
    messages = [("system", "Think."), ("user", "<image>Which side?"), ("assistant", "<think>t</think>\n<answer> B </answer>")]
    spoken = {"system": "system", "user": "human", "assistant": "gpt"}
    one = {"messages": [{"role": r, "content": c} for r, c in messages], "images": ["a.png"], "question_type": "side"}
    variants = [
        one,
        {**one, "images": "a.png"},
        {"conversations": [{"from": spoken[r], "value": c} for r, c in messages], "image": "a.png", "type": "side"},
        {"conversations": [{"from": r, "value": c} for r, c in messages[1:]], "system": "Think.", "images": ["a.png"], "category": "side"},
        {**one, "images": [str(tmp_path / "a.png")]},
    ]
    (tmp_path / "a.json").write_text(json.dumps(variants, indent=1))
    write_lines(tmp_path / "a.jsonl", variants)
    want = open_source(SourceConfig(str(tmp_path / "a.json")))[0]
    assert want.turns == tuple(Turn(r, c) for r, c in messages)
    assert (want.truth, want.kind, want.images) == ("B", "side", (tmp_path / "a.png",))
    for name in ("a.json", "a.jsonl"):
        source = open_source(SourceConfig(str(tmp_path / name), format="sharegpt"))
        for i in range(len(variants)):
            got = source[i]
            assert (got.turns, got.truth, got.kind, got.images) == (want.turns, want.truth, want.kind, want.images)
            assert got.where == f"{tmp_path / name}:{i + 1}"


def test_sharegpt_bare_answer_is_the_truth_of_the_last_turn(tmp_path):
    turns = [("human", "Pick."), ("gpt", "A"), ("human", "Again."), ("gpt", " right \n")]
    write_lines(tmp_path / "a.jsonl", [{"conversations": [{"from": r, "value": c} for r, c in turns]}])
    got = open_source(SourceConfig(str(tmp_path / "a.jsonl")))[0]
    assert got.truth == "right" and [t.role for t in got.prompt] == ["user", "assistant", "user"] and got.images == ()


@pytest.mark.parametrize(
    "bad, reason",
    [
        ({"text": "hello"}, "none of messages, conversations"),
        ({"messages": "hello"}, "`messages` is not a list"),
        ({"messages": [{"who": "human", "value": "q"}]}, "message 1 has no `role`"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 1's `content` is not text"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": ""}]}, "empty answer"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "observation", "value": "x"}]}, "unknown role 'observation'"),
        ({"conversations": [{"from": "human", "value": "<image>q"}], "images": []}, "1 <image> tags but 0"),
        ({"conversations": [{"from": "human", "value": "q"}], "images": [{"width": 3}]}, "image 1 is null"),
        ({"conversations": [{"from": "human", "value": "q"}], "videos": ["a.mp4"]}, "videos"),
        ({"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "q"}], "system": "b"}, "more than one system"),
        ("[1]", "not a JSON object"),
    ],
)
def test_malformed_sharegpt(tmp_path, bad, reason):
    path = write_lines(tmp_path / "a.jsonl", ["{}", bad])
    with pytest.raises(BadRow, match=rf"a\.jsonl:2: .*{reason}"):
        open_source(SourceConfig(str(path), format="sharegpt"))[1]


# --- parquet


def sat(i: int, **changes) -> dict:
    return {
        "image_bytes": [encoded(i), encoded(i + 1, "JPEG")],
        "question": f"Where is it ({i})?",
        "answers": ["left", "right", "behind it"],
        "question_type": "move" if i % 2 else "place",
        "correct_answer": "right",
        **changes,
    }


def verl(i: int, **changes) -> dict:
    return {
        "data_source": "sat",
        "ability": "spatial",
        "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": "<image>Which side?"}],
        "images": [{"bytes": encoded(i), "path": None}],
        "reward_model": {"style": "rule", "ground_truth": "right"},
        "extra_info": {"index": i},
        **changes,
    }


def parquet(path: Path, rows: list[dict], **options) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def test_sat(tmp_path):
    path = parquet(tmp_path / "sat.parquet", [sat(i) for i in range(20)])
    source = open_source(SourceConfig(str(path)))
    assert len(source) == 20
    orders = set()
    for i in range(20):
        got = source[i]
        assert got.turns[0].content == f"<image><image>Where is it ({i})?\n{options_line(got.choices)}"
        assert got.turns[1:] == (Turn("assistant", "right"),) and got.truth == "right"
        assert sorted(got.choices) == ["behind it", "left", "right"] and got.kind == ("move" if i % 2 else "place")
        assert got.where == f"{path}:{i + 1}"
        assert [int(decode(image, "")[0, 0, 0]) for image in got.images] == [i, i + 1]
        orders.add(got.choices)
    assert len(orders) > 3  # the right option has no fixed place
    assert [source[i].choices for i in range(20)] == [open_source(SourceConfig(str(path)))[i].choices for i in range(20)]
    assert options_line(("a", "b", "c")).endswith(": a, b or c") and options_line(("a",)).endswith(": a")


def test_sat_variants(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(9))
    base = sat(0)
    base.pop("answers")
    one = {**base, "answer_choices": ["right", "left"], "image_bytes": {"bytes": encoded(9), "path": "x.png"}}
    named = {**base, "answer_choices": ["right", "left"], "image_bytes": {"bytes": None, "path": "a.png"}, "question": "<image>Here?"}
    free = {**base, "answer_choices": None, "image_bytes": {"bytes": encoded(9), "path": None}}
    source = open_source(SourceConfig(str(parquet(tmp_path / "s.parquet", [one, named, free]))))
    assert [int(decode(source[i].images[0], "")[0, 0, 0]) for i in range(3)] == [9, 9, 9]
    assert source[1].images == (tmp_path / "a.png",) and source[1].turns[0].content.startswith("<image>Here?\n")
    assert source[2].choices == () and source[2].turns[0].content == "<image>Where is it (0)?"


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"correct_answer": "up"}, "'up' is not among the choices"),
        ({"correct_answer": None}, "empty answer"),
        ({"correct_answer": " "}, "empty answer"),
        ({"question": ""}, "empty question"),
        ({"image_bytes": [None]}, "image 1 is null"),
        ({"image_bytes": None}, "no image"),
        ({"question": "<image>one tag, two images"}, "1 <image> tags but 2 images"),
    ],
)
def test_malformed_sat(tmp_path, changes, reason):
    path = parquet(tmp_path / "sat.parquet", [sat(0), sat(1, **changes)])
    with pytest.raises(BadRow, match=rf"sat\.parquet:2: .*{reason}"):
        open_source(SourceConfig(str(path)))[1]


def test_verl(tmp_path):
    source = open_source(SourceConfig(str(parquet(tmp_path / "v.parquet", [verl(0), verl(1)]))))
    got = source[1]
    assert got.turns == (Turn("system", "Think."), Turn("user", "<image>Which side?")) == got.prompt
    assert (got.truth, got.kind, got.id) == ("right", "sat/spatial", "1") and decode(got.images[0], "")[0, 0, 0] == 1
    mine = open_source(SourceConfig(str(tmp_path / "v.parquet"), system="Mine."))[0]
    assert mine.turns == (Turn("system", "Mine."), Turn("user", "<image>Which side?"))


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"reward_model": {"style": "rule", "ground_truth": None}}, "empty answer"),
        ({"reward_model": None}, "empty answer"),
        ({"prompt": [{"role": "user", "content": "no tag"}]}, "0 <image> tags but 1 images"),
        ({"prompt": [{"role": "user", "content": None}]}, "is not text but null"),
        ({"prompt": None}, "not a list of messages"),
        ({"prompt": []}, "no messages"),
    ],
)
def test_malformed_verl(tmp_path, changes, reason):
    path = parquet(tmp_path / "v.parquet", [verl(0), verl(1, **changes)])
    with pytest.raises(BadRow, match=rf"v\.parquet:2: .*{reason}"):
        open_source(SourceConfig(str(path)))[1]


def test_table_random_access_over_batches_and_shards(tmp_path):
    rows = [{"question": f"q{i}", "correct_answer": str(i)} for i in range(1500)]
    (tmp_path / "shards").mkdir()
    parquet(tmp_path / "shards" / "train-00000.parquet", rows[:1000], row_group_size=300)
    parquet(tmp_path / "shards" / "train-00001.parquet", rows[1000:])
    table = Table(tmp_path / "shards")
    order = random.Random(0).sample(range(1500), 1500)
    assert len(table) == 1500 and [table[i] for i in order] == [rows[i] for i in order]
    assert [table.some(i, ["correct_answer", "x"]) for i in order] == [{"correct_answer": str(i)} for i in order]
    with pytest.raises(IndexError):
        table[1500]
    parquet(tmp_path / "shards" / "train-00002.parquet", [{"question": "q"}])
    with pytest.raises(ValueError, match=r"train-00002\.parquet: columns \['question'\], but .*00000"):
        Table(tmp_path / "shards")


def test_converted_copy_follows_the_file(tmp_path):
    path = parquet(tmp_path / "s.parquet", [{"question": "old", "correct_answer": "a"}])
    assert Table(path)[0]["question"] == "old" and Table(path)[0]["question"] == "old"
    assert len(list((tmp_path / "cache" / "actial_fast").iterdir())) == 1
    size = path.stat().st_size
    parquet(path, [{"question": "new", "correct_answer": "a"}])
    os.utime(path, ns=(0, 12345))  # the same size, so only the time tells
    assert path.stat().st_size == size and Table(path)[0]["question"] == "new"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"s\.parquet: cannot be read as parquet"):
        Table(path)
    assert not list((tmp_path / "cache" / "actial_fast").glob("*.part"))


def test_folder_of_the_datasets_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "image_bytes": datasets.List(datasets.Image()),
            "question": datasets.Value("string"),
            "answers": datasets.List(datasets.Value("string")),
            "question_type": datasets.Value("string"),
            "correct_answer": datasets.Value("string"),
        }
    )
    records = [sat(i) for i in range(30)]
    ours = datasets.Dataset.from_list(records, features=features)
    ours.save_to_disk(tmp_path / "saved", num_shards=2)
    ours.shuffle(seed=1).save_to_disk(tmp_path / "shuffled")
    datasets.DatasetDict({"train": ours, "test": ours.select(range(7))}).save_to_disk(tmp_path / "splits")
    source = open_source(SourceConfig(str(tmp_path / "saved")))
    assert [source[i].turns[0].content.splitlines()[0] for i in range(30)] == [f"<image><image>Where is it ({i})?" for i in range(30)]
    assert decode(source[29].images[0], "")[0, 0, 0] == 29
    mixed = open_source(SourceConfig(str(tmp_path / "shuffled")))
    wanted = [record["question"] for record in ours.shuffle(seed=1).select_columns("question")]
    assert [mixed[i].turns[0].content.splitlines()[0].removeprefix("<image>" * 2) for i in range(30)] == wanted
    with pytest.raises(ValueError, match=r"several splits: train \(train\); test \(test\); set split to one of them"):
        open_source(SourceConfig(str(tmp_path / "splits")))
    assert len(open_source(SourceConfig(str(tmp_path / "splits"), split="test"))) == 7
    assert len(open_source(SourceConfig(str(tmp_path / "splits" / "train")))) == 30


# --- opening


def test_filters(tmp_path):
    path = write_lines(tmp_path / "r.jsonl", [row(id=str(i), kind="ab"[i % 2]) for i in range(10)] + ["not json"])
    every = open_source(SourceConfig(str(path)))
    assert len(every) == 11 and len(open_source(SourceConfig(str(path), limit=4))) == 4
    odd = open_source(SourceConfig(str(path), kinds=("b",)))
    assert [odd[i].id for i in range(5)] == list("13579") and len(odd) == 6  # the unreadable row stays, to be reported
    assert [open_source(SourceConfig(str(path), kinds=("b",), limit=2))[i].id for i in range(2)] == ["1", "3"]
    rest, held = (open_source(SourceConfig(str(path), kinds=("b",), **words)) for words in ({"skip": 2}, {"limit": 2}))
    assert [[view[i].id for i in range(n)] for view, n in ((rest, 3), (held, 2))] == [["5", "7", "9"], ["1", "3"]] and len(rest) == 4
    assert [open_source(SourceConfig(str(path), skip=4, limit=2))[i].id for i in range(2)] == ["4", "5"]
    with pytest.raises(ValueError, match=r"no row of kind c; it has 'a', 'b'"):
        open_source(SourceConfig(str(path), kinds=("a", "c")))
    sat_path = parquet(tmp_path / "sat.parquet", [sat(i) for i in range(6)])
    assert [open_source(SourceConfig(str(sat_path), kinds=("move",)))[i].kind for i in range(3)] == ["move"] * 3


def test_opening_errors_say_what_to_do(tmp_path):
    write_lines(tmp_path / "r.jsonl", [row()])
    (tmp_path / "r.csv").write_text("a,b")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "folder").mkdir()
    write_lines(tmp_path / "either.jsonl", [{"messages": row()["messages"]}])
    write_lines(tmp_path / "broken.jsonl", ["{"])
    write_lines(tmp_path / "number.jsonl", ["3"])
    parquet(tmp_path / "other.parquet", [{"x": 1}])
    for config, problem in (
        (SourceConfig(str(tmp_path / "missing.jsonl")), "missing.jsonl does not exist"),
        (
            SourceConfig(str(tmp_path / "r.jsonl"), format="llava"),
            "unknown format 'llava'; use jsonl, sharegpt, sat, verl, easyr1",
        ),
        (SourceConfig(str(tmp_path / "r.jsonl"), limit=-1), "limit is -1"),
        (SourceConfig(str(tmp_path / "r.jsonl"), skip=-1), "skip is -1"),
        (SourceConfig(str(tmp_path / "r.jsonl"), skip=1), "has no rows behind the 1 that skip leaves out; it has 1"),
        (SourceConfig(str(tmp_path / "r.csv")), "suffix '.csv' does not tell the format; set format"),
        (SourceConfig(str(tmp_path / "empty.jsonl"), format="jsonl"), "has no rows"),
        (SourceConfig(str(tmp_path / "folder")), "neither .parquet files nor"),
        (SourceConfig(str(tmp_path / "either.jsonl")), "may be rows of ours or ShareGPT's; set format"),
        (SourceConfig(str(tmp_path / "broken.jsonl")), "first record is not JSON"),
        (SourceConfig(str(tmp_path / "number.jsonl")), "first record is not an object"),
        (SourceConfig(str(tmp_path / "other.parquet")), r"columns \['x'\] are no format"),
        (SourceConfig(str(tmp_path / "other.parquet"), format="sat"), "SAT needs the columns question and correct_answer"),
        (SourceConfig(str(tmp_path / "other.parquet"), format="verl"), "needs the columns prompt and reward_model"),
    ):
        with pytest.raises(ValueError, match=problem):
            open_source(config)


# --- runs of rows with the same images


def starts(path: Path, **config) -> list[int]:
    return runs(open_source(SourceConfig(str(path), **config))).tolist()


def test_runs_of_our_rows(tmp_path):
    pairs = [["a.png", "b.png"]] * 3 + [["b.png", "a.png"]] + [["a.png"]] * 2 + [[], []] + [["a.png"]]
    records = [row(images=images, kind=str(i % 3)) for i, images in enumerate(pairs)]
    path = write_lines(tmp_path / "r.jsonl", records)
    assert starts(path) == [0, 3, 4, 6, 7, 8, 9]
    assert starts(path, limit=2) == [0, 2] and starts(path, limit=5) == [0, 3, 4, 5]
    assert starts(path, kinds=("0", "2")) == [0, 2, 3, 4, 5, 6]  # rows 0 2 | 3 | 5 | 6 | 8: without the row between them, neighbours


def test_the_questions_about_a_viewpoint_pair_are_a_run(tmp_path):
    sides = {"ego_translation": "left", "object_translation": "right", "ego_rotation": "right"}
    pairs = [{"object": "car/1", "pair": names, **sides} for names in (["a.png", "b.png"], ["b.png", "c.png"], ["c.png", "b.png"])]
    records = [each.to_json(tmp_path) for pair in pairs for each in questions.rows(pair, tmp_path / "car" / "1", seed=0)]
    path = write_lines(tmp_path / "train.jsonl", records)
    assert starts(path) == [0, 3, 6, 9]
    assert starts(path, kinds=("ego_translation", "ego_rotation")) == [0, 2, 4, 6] and starts(path, limit=7) == [0, 3, 6, 7]


def test_a_row_that_cannot_be_read_is_a_run_of_its_own(tmp_path):
    same = row(images=["a.png"])
    bad = ["{", "[1]", "3", row(images=5), row(images=None)]
    records = [same, same, *[one for each in bad for one in (each, each)], same, same]
    path = write_lines(tmp_path / "r.jsonl", records)
    assert starts(path, format="jsonl") == [0, *range(2, 13), 14]
    share = write_lines(tmp_path / "s.jsonl", records)
    assert starts(share, format="sharegpt") == [0, *range(2, 13), 14]


@pytest.mark.parametrize("name", ["s.json", "s.jsonl"])
def test_runs_of_sharegpt(tmp_path, name):
    said = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]
    images = [{"image": "a.png"}, {"images": ["a.png"]}, {"images": "a.png"}, {"images": ["b.png"]}, {}, {"images": []}, {"image": "b.png"}]
    records = [{"conversations": said, **each} for each in images]
    (tmp_path / name).write_text(json.dumps(records) if name == "s.json" else "\n".join(map(json.dumps, records)))
    assert starts(tmp_path / name) == [0, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("form", ["list", "dict", "bytes"])
def test_runs_of_embedded_images(tmp_path, form):
    """Rows 254 to 257 lie on both sides of a border between batches (table.BATCH)."""

    def images(value: int, size: int = 100):
        data = bytes([value]) * size
        return {"list": [data, data], "dict": [{"bytes": data, "path": None}], "bytes": data}[form]

    rows = [sat(0, image_bytes=images(i % 250)) for i in range(300)]
    for i in (255, 256, 257):
        rows[i] = sat(0, image_bytes=images(4))  # as row 254
    rows[7], rows[8] = (sat(0, image_bytes=images(7, size)) for size in (100, 101))
    rows[10], rows[11] = (sat(0, image_bytes=None) for _ in range(2))
    path = parquet(tmp_path / "s.parquet", rows)
    assert starts(path) == [i for i in range(301) if i not in (255, 256, 257)]


def test_runs_of_tables(tmp_path):
    cells = [[None], [None], [], [], [{"bytes": b"x", "path": None}]] + [[{"bytes": b"y", "path": "y.png"}]] * 2
    assert starts(parquet(tmp_path / "s.parquet", [sat(i, image_bytes=cell) for i, cell in enumerate(cells)])) == [0, 1, 2, 3, 4, 5, 7]
    assert starts(parquet(tmp_path / "v.parquet", [verl(i // 2) for i in range(5)])) == [0, 2, 4, 5]
    without = [{key: value for key, value in verl(0).items() if key != "images"}] * 3
    assert starts(parquet(tmp_path / "w.parquet", without)) == [0, 1, 2, 3]
    named = parquet(tmp_path / "n.parquet", [sat(i, image_bytes=[f"{i // 3}.png"]) for i in range(7)])
    assert starts(named) == [0, 3, 6, 7]
    assert starts(parquet(tmp_path / "t.parquet", [{"question": "q", "correct_answer": "a"}] * 2), format="sat") == [0, 1, 2]


# --- bad images, scanning, rejects


def bad_images(folder: Path) -> dict[str, str]:
    """File name -> reason, for images that must be refused; good.png is fine."""
    (folder / "good.png").write_bytes(encoded(5))
    photo = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(photo, "JPEG")
    (folder / "cut.jpg").write_bytes(photo.getvalue()[: len(photo.getvalue()) // 2])
    (folder / "text.png").write_bytes(b"not an image")
    (folder / "empty.png").write_bytes(b"")
    Image.new("1", (20_000, 10_000)).save(folder / "bomb.png")
    Image.new("1", (12_000, 11_000)).save(folder / "large.png")
    assert (folder / "bomb.png").stat().st_size < 100_000
    return {
        "cut.jpg": "truncated|cannot be decoded",
        "text.png": "is text, not a picture",
        "empty.png": "is empty",
        "bomb.png": "20000x10000, over 128000000 pixels",
        "large.png": "12000x11000",
        "gone.png": "does not exist",
    }


def test_scan_reports_every_bad_row(tmp_path):
    names = bad_images(tmp_path)
    records = [row(images=[name]) for name in ["good.png", *names]]
    records += ["{", row(images=[]), row(messages=[{"role": "user", "content": "<image>"}, {"role": "assistant", "content": ""}])]
    records += [row(images=["good.png"]), row(images=["gone2.png"])]
    seen = []
    result = scan(open_source(SourceConfig(str(write_lines(tmp_path / "r.jsonl", records)))), progress=seen.append)
    assert result.rows == len(records) == seen[-1] and result.kinds == {"side": 2}
    assert [error.where.rsplit(":", 1)[1] for error in result.bad] == [str(i) for i in (*range(2, 11), 12)]
    for error, reason in zip(result.bad, names.values(), strict=False):
        assert any(part in error.reason for part in reason.split("|")), (error, reason)
    assert sum(result.reasons.values()) == 10 and result.reasons["image does not exist"] == 2
    fast = scan(open_source(SourceConfig(str(tmp_path / "r.jsonl"))), lambda row, index: None)
    assert [error.where.rsplit(":", 1)[1] for error in fast.bad] == ["8", "9", "10"]


def test_scan_of_embedded_images(tmp_path):
    path = parquet(tmp_path / "sat.parquet", [sat(0), sat(1, image_bytes=[encoded(1), encoded(1)[:40]])])
    assert [error.where for error in scan(open_source(SourceConfig(str(path)))).bad] == [f"{path}:2"]


def test_rejects_are_written_once_and_survive_a_kill(tmp_path):
    path = tmp_path / "out" / "rejects.jsonl"
    first = Rejects(path)
    for where in ("f:1", "f:2", "f:1"):
        first.add(BadRow(where, "because"))
    with open(path, "a") as file:
        file.write('{"where": "f:3", "rea')
    again = Rejects(path)
    for where in ("f:2", "f:3", "f:3"):
        again.add(BadRow(where, "because"))
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["where"] for record in records] == ["f:1", "f:2", "f:3"] and records[0]["reason"] == "because"
    Rejects(path, rank=3, world=8).add(BadRow("f:9", "because"))
    assert (tmp_path / "out" / "rejects.rank3.jsonl").exists()
    Rejects(None).add(BadRow("f:1", "because"))


def test_row_type_is_shared(tmp_path):
    """Every format yields the same type, so that downstream needs no second path."""
    (tmp_path / "a.png").write_bytes(encoded(1))
    paths = [
        write_lines(tmp_path / "ours.jsonl", [row()]),
        write_lines(tmp_path / "share.jsonl", [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}]),
        parquet(tmp_path / "sat.parquet", [sat(0)]),
        parquet(tmp_path / "verl.parquet", [verl(0)]),
    ]
    for path in paths:
        got = open_source(SourceConfig(str(path)))[0]
        assert type(got) is Row and got.truth and got.prompt and all(isinstance(image, Path | bytes) for image in got.images)

"""Rows as the world has them: each kind that was met, in every format where it can occur, read as it is meant or refused, never changed."""

from __future__ import annotations

import base64
import io
import json
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from actial_fast.data.sources import fields
from actial_fast.data.sources.overlap import overlaps
from actial_fast.data.sources.picture import decode
from actial_fast.data.sources.row import BadRow, Row, Turn
from actial_fast.data.sources.source import SourceConfig, open_source, runs
from actial_fast.data.sources.table import Table
from actial_fast.data.sources.told import Told

PNG = io.BytesIO()
Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)).save(PNG, "PNG")
DATA = PNG.getvalue()
B64 = base64.b64encode(DATA).decode()

GOOD = {  # a good row of each format; images are read from a.png
    "jsonl": {
        "id": "r",
        "messages": [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "B"}],
        "images": ["a.png"],
        "truth": "B",
        "kind": "k",
        "choices": ["left", "right"],
    },
    "sharegpt": {"messages": [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "B"}], "images": ["a.png"]},
    "sat": {"image_bytes": ["a.png"], "question": "q", "answers": ["B", "C"], "question_type": "k", "correct_answer": "B"},
    "verl": {
        "prompt": [{"role": "user", "content": "<image>q"}],
        "images": ["a.png"],
        "reward_model": {"style": "rule", "ground_truth": "B"},
    },
    "easyr1": {"problem": "<image>q", "answer": "B", "images": ["a.png"]},
}
TABLES = ("sat", "verl", "easyr1", "sharegpt")


def read(tmp_path: Path, form: str, record: dict, table: bool = False) -> Row:
    (tmp_path / "a.png").write_bytes(DATA)
    path = tmp_path / ("r.parquet" if table else "r.jsonl")
    if table:
        pq.write_table(pa.Table.from_pylist([GOOD[form], record])[1:], path)
    else:
        path.write_text(json.dumps(record) + "\n")
    return open_source(SourceConfig(str(path), format=form))[0]


def changed(form: str, **changes) -> dict:
    return {**GOOD[form], **changes}


def said(form: str, **changes) -> dict:
    """A row in whose conversation the user, the assistant or the truth says something else."""
    record = json.loads(json.dumps(GOOD[form]))
    if "user" in changes:
        if form in ("jsonl", "sharegpt"):
            record["messages"][0]["content"] = changes["user"]
        elif form == "verl":
            record["prompt"][0]["content"] = changes["user"]
        else:
            record["problem" if form == "easyr1" else "question"] = changes["user"]
    if "truth" in changes:
        where = {"jsonl": record, "sat": record, "verl": record.get("reward_model"), "easyr1": record}[form]
        where[{"jsonl": "truth", "sat": "correct_answer", "verl": "ground_truth", "easyr1": "answer"}[form]] = changes["truth"]
    return record


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("form", GOOD)
def test_good_rows(tmp_path, form, table):
    if table and form not in TABLES:
        return
    row = read(tmp_path, form, GOOD[form], table)
    assert row.truth == "B" and row.images == (tmp_path / "a.png",) and "<image>q" in row.prompt[-1].content


# ---- absent is absent, text is text


@pytest.mark.parametrize("form", ["jsonl", "sat", "verl", "easyr1"])
@pytest.mark.parametrize("value", [None, float("nan"), "", "  ", [], {}])
def test_an_absent_truth_is_no_word(tmp_path, form, value):
    record = said(form, truth=value)
    if form == "jsonl":
        assert read(tmp_path, form, record).truth == ""
    else:
        with pytest.raises(BadRow, match="empty answer"):
            read(tmp_path, form, record)


@pytest.mark.parametrize("form", ["sat", "verl", "easyr1"])
def test_null_in_a_table(tmp_path, form):
    with pytest.raises(BadRow, match="empty answer"):
        read(tmp_path, form, said(form, truth=None), table=True)


@pytest.mark.parametrize("form", ["jsonl", "sat", "verl", "easyr1"])
@pytest.mark.parametrize("value", [3, 3.5, True, ["B", 3], [None], {"text": "B"}])
def test_a_truth_that_is_no_text_is_refused(tmp_path, form, value):
    if form == "verl" and isinstance(value, dict):
        return
    with pytest.raises(BadRow, match=r"r\.jsonl:1: .*(not text|is empty)"):
        read(tmp_path, form, said(form, truth=value))


@pytest.mark.parametrize("form", ["jsonl", "sharegpt", "verl", "sat", "easyr1"])
@pytest.mark.parametrize("value", [None, 3, True, {"text": "q"}, float("nan"), ""])
def test_a_question_that_is_no_text_is_refused(tmp_path, form, value):
    with pytest.raises(BadRow, match=r"not text|empty"):
        read(tmp_path, form, said(form, user=value))


@pytest.mark.parametrize("key", ["id", "kind", "choices", "meta", "images"])
def test_null_fields_of_our_rows(tmp_path, key):
    record = changed("jsonl", **{key: None})
    if key == "images":
        record["messages"] = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "B"}]
    row = read(tmp_path, "jsonl", record)
    assert "None" not in repr((row.id, row.kind, row.choices, row.images)) and not row.meta


@pytest.mark.parametrize(
    "changes",
    [
        {"choices": ["left", None]},
        {"choices": "left"},
        {"choices": [1, 2]},
        {"kind": ["k"]},
        {"id": {"a": 1}},
        {"meta": "x"},
        {"images": [None]},
    ],
)
def test_fields_of_the_wrong_kind(tmp_path, changes):
    with pytest.raises(BadRow, match=r"r\.jsonl:1: "):
        read(tmp_path, "jsonl", changed("jsonl", **changes))


def test_the_words_of_programs_are_words_where_someone_wrote_them(tmp_path):
    assert read(tmp_path, "jsonl", said("jsonl", truth="None")).truth == "None"
    assert read(tmp_path, "jsonl", changed("jsonl", id=7)).id == "7"


def test_a_truth_in_tags_is_what_a_reply_says(tmp_path):
    for form in ("jsonl", "verl", "easyr1"):
        assert read(tmp_path, form, said(form, truth="<think>x</think>\n<answer> 3 </answer>")).truth == "3"
        with pytest.raises(BadRow, match="not one pair"):
            read(tmp_path, form, said(form, truth="<answer>3"))


def test_several_accepted_answers(tmp_path):
    for form, value in (
        ("jsonl", ["7", "seven", "7"]),
        ("verl", ["7", "seven"]),
        ("verl", {"target": ["7", "seven"]}),
        ("easyr1", ["7", "seven"]),
    ):
        row = read(tmp_path, form, said(form, truth=value))
        assert (row.truth, row.accepted) == ("7", ("seven",))
    row = read(tmp_path, "jsonl", said("jsonl", truth=["7", "seven"]))
    assert row.to_json(tmp_path)["truth"] == ["7", "seven"]


# ---- keys and media that change the meaning


@pytest.mark.parametrize("form", GOOD)
@pytest.mark.parametrize(
    "key, value",
    [
        ("weight", 0),
        ("weight", 0.5),
        ("loss", False),
        ("tools", [{"name": "f"}]),
        ("chosen", "x"),
        ("rejected", "x"),
        ("videos", ["a.mp4"]),
        ("audios", ["a.wav"]),
        ("rejected_response", "x"),
        ("kto_tag", True),
        ("objects", {"bbox": [[0, 0, 1, 1]]}),
        ("loss_scale", 2),
        ("ignore", True),
        ("label", False),
    ],
)
def test_keys_that_change_the_meaning_are_refused(tmp_path, form, key, value):
    with pytest.raises(BadRow, match=key):
        read(tmp_path, form, changed(form, **{key: value}))


@pytest.mark.parametrize("form", GOOD)
@pytest.mark.parametrize(
    "key, value",
    [("weight", 1), ("loss", True), ("tools", None), ("tools", "[]"), ("videos", []), ("rejected", ""), ("mask", 0), ("skip", False)],
)
def test_keys_that_say_nothing_are_no_obstacle(tmp_path, form, key, value):
    assert read(tmp_path, form, changed(form, **{key: value})).truth == "B"


@pytest.mark.parametrize(
    "key, value", [("weight", 0), ("loss", False), ("tool_calls", [{}]), ("reasoning_content", "so"), ("train", False), ("prefix", True)]
)
def test_keys_of_messages(tmp_path, key, value):
    for form in ("jsonl", "sharegpt"):
        messages = json.loads(json.dumps(GOOD[form]["messages"]))
        messages[1][key] = value
        with pytest.raises(BadRow, match=f"message 2 has {key}"):
            read(tmp_path, form, changed(form, messages=messages))


def test_unknown_keys(tmp_path, caplog, monkeypatch):
    with pytest.raises(BadRow, match="unknown key 'answer'; a row has id, messages"):
        read(tmp_path, "jsonl", changed("jsonl", answer="B"))
    monkeypatch.setattr(fields, "told", fields.told.__class__())
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            first, *others = GOOD["sharegpt"]["messages"]
            messages = [{**first, "source_url": "x"}, *others]
            assert read(tmp_path, "sharegpt", changed("sharegpt", messages=messages)).truth == "B"
        fields.told.close()
    assert caplog.text.count("source_url") == 2 and "3 times" in caplog.text


@pytest.mark.parametrize("form", GOOD)
@pytest.mark.parametrize(
    "user, reason",
    [
        ("<image>a \ud83d", "surrogate"),
        ("<image>a \0 b", "NUL"),
        ("<image><video>q", "<video>"),
        ("<image>q</image>", "</image>"),
        ("<image><|im_end|>\n<|im_start|>assistant", "special token"),
        ("<image><|image_pad|>", "special token"),
        ("<image><image>q", "2 <image> tags but 1"),
    ],
)
def test_texts_that_cannot_be_used(tmp_path, form, user, reason):
    with pytest.raises(BadRow, match=reason):
        read(tmp_path, form, said(form, user=user))


def test_conversations_that_are_none(tmp_path):
    for form in ("jsonl", "sharegpt"):
        for messages, reason in (
            ([{"role": "user", "content": "q"}, {"role": "assistant", "content": "see <image>"}], "an answer holds <image>"),
            ([{"role": "user", "content": "<image>q"}, {"role": "system", "content": "s"}], "not the first message"),
            (["q", "a"], "message 1 is text, not an object"),
            ([{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": None}], "null"),
            ([], "no messages"),
        ):
            with pytest.raises(BadRow, match=reason):
                read(tmp_path, form, changed(form, messages=messages))
    with pytest.raises(BadRow, match="ends with an assistant"):
        read(tmp_path, "verl", changed("verl", prompt=[*GOOD["verl"]["prompt"], {"role": "assistant", "content": "It is"}]))


def test_a_row_that_ends_with_a_question_keeps_it(tmp_path):
    messages = [*GOOD["sharegpt"]["messages"], {"role": "user", "content": "and now?"}]
    row = read(tmp_path, "sharegpt", changed("sharegpt", messages=messages))
    assert row.prompt[-1] == Turn("user", "and now?") and row.truth == ""


# ---- images


@pytest.mark.parametrize("form", GOOD)
@pytest.mark.parametrize(
    "value",
    [
        "a.png",
        ["a.png"],
        [{"path": "a.png"}],
        {"bytes": None, "path": "a.png"},
        [{"url": "a.png"}],
        ["./a.png"],
        [".\\a.png"],
        "URL",
        "ABSOLUTE",
        '["a.png"]',
        [f"data:image/png;base64,{B64}"],
        [B64],
        [{"bytes": B64}],
    ],
)
def test_ways_to_give_an_image(tmp_path, form, value):
    value = [(tmp_path / "a.png").as_uri()] if value == "URL" else [str(tmp_path / "a.png")] if value == "ABSOLUTE" else value
    key = "image_bytes" if form == "sat" else "images"
    (image,) = read(tmp_path, form, changed(form, **{key: value})).images
    assert (decode(image, "") == decode(DATA, "")).all()
    if form != "sat":
        record = {name: each for name, each in changed(form, image=value).items() if name != "images"}
        assert read(tmp_path, form, record).images == (image,)


@pytest.mark.parametrize(
    "value, reason",
    [
        (["http://x.org/a.png"], "address on a network"),
        (["s3://bucket/a.png"], "address on a network"),
        (["C:\\data\\a.png"], "drive of Windows"),
        ([f"data:image/png;base64,%%%{'x' * 1_300_000}"], "data URL without readable data"),
        (["data:nothing"], "data URL without readable data"),
        (["y" * 100_000], "neither a path nor an encoded picture"),
        ([3], "image 1 is a number"),
        ([["a.png"]], "image 1 is a list"),
        (["a.png", None], "image 2 is null"),
        (["a\0.png"], "NUL"),
        (["\ud800.png"], "surrogate"),
        (["a.png", "a.png"], "1 <image> tags but 2 images"),
        ('["a.png"', "begins as JSON"),
    ],
)
def test_what_is_no_image(tmp_path, value, reason):
    for form in ("jsonl", "sharegpt", "verl"):
        with pytest.raises(BadRow, match=reason) as raised:
            read(tmp_path, form, changed(form, images=value))
        assert len(str(raised.value)) < 700


def test_image_and_images(tmp_path):
    assert len(read(tmp_path, "sharegpt", changed("sharegpt", image="a.png")).images) == 1  # both name the same
    with pytest.raises(BadRow, match="different images"):
        read(tmp_path, "sharegpt", changed("sharegpt", image="b.png"))


def test_bytes_of_a_table(tmp_path):
    for value in ([DATA], [{"bytes": DATA, "path": None}], [{"bytes": DATA, "path": "gone.png"}]):
        record = changed("sat", image_bytes=value)
        pq.write_table(pa.Table.from_pylist([record]), tmp_path / "r.parquet")
        assert open_source(SourceConfig(str(tmp_path / "r.parquet")))[0].images == (DATA,)


# ---- OpenAI's parts, JSON in cells

PARTS = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{B64}"}}, {"type": "text", "text": "q"}]


@pytest.mark.parametrize("form", list(GOOD))
def test_content_in_parts(tmp_path, form):
    record = {key: value for key, value in said(form, user=PARTS).items() if key not in ("images", "image_bytes")}
    row = read(tmp_path, form, record)
    options = "\nAnswer with one of these options: C or B" if form == "sat" else ""
    assert sorted(row.prompt[-1].content) == sorted("<image>q" + options) and row.images == (DATA,)
    placeholders = said(form, user=[{"type": "text", "text": "q"}, {"type": "image"}])
    row = read(tmp_path, form, placeholders)
    assert row.prompt[-1].content.startswith("q<image>") and row.images == (tmp_path / "a.png",)
    for parts, reason in (
        ([{"type": "video", "video": "a.mp4"}], "neither a text nor an image"),
        ([{"type": "text", "text": 3}], "not text"),
        (["q"], "neither a text nor an image"),
        ([{"type": "text", "text": "<image>q"}], "beside parts"),
        (PARTS, "beside them"),
    ):
        with pytest.raises(BadRow, match=reason):
            read(tmp_path, form, said(form, user=parts))


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{B64}", "detail": "high"}}, DATA),
        ({"type": "image_url", "image_url": "a.png"}, "a.png"),
        ({"type": "image_url", "image_url": {"url": "FILE"}}, "a.png"),
        ({"type": "input_image", "image_url": "FILE", "detail": "auto"}, "a.png"),
        ({"type": "image", "image": "a.png"}, "a.png"),
        ({"type": "image", "path": "a.png", "text": None}, "a.png"),
        ({"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}, "an address on a network"),
        ({"type": "input_image", "file_id": "file-1"}, "a file on OpenAI's servers"),
    ],
)
def test_images_of_parts(image, expected, tmp_path):
    """OpenAI's two interfaces and transformers' template, two images a question: read by auto, told apart, known when trained on."""
    image = json.loads(json.dumps(image).replace("FILE", (tmp_path / "a.png").as_uri()))
    asked = [{"type": "input_text", "text": "First "}, image, {"type": "text", "text": " then "}, image, {"type": "text", "text": ""}]
    answer = {"role": "assistant", "content": [{"type": "output_text", "text": "B"}]}
    (tmp_path / "a.png").write_bytes(DATA)
    rows = [{"messages": [{"role": "user", "content": asked}, answer]}] * 2 + [{"messages": [{"role": "user", "content": "q"}, answer]}]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(SourceConfig(str(tmp_path / "r.jsonl")))
    if isinstance(expected, str) and " " in expected:
        with pytest.raises(BadRow, match=expected):
            source[0]
        return
    row = source[0]
    assert (row.turns[0].content, row.truth) == ("First <image> then <image>", "B")
    assert row.images == (tmp_path / expected if isinstance(expected, str) else expected,) * 2
    assert source.images(0) == source.images(1) != source.images(2) == () and runs(source).tolist() == [0, 2, 3]
    (tmp_path / "held.json").write_text(json.dumps([{"messages": [{"role": "user", "content": "<image>?"}, answer], "images": ["a.png"]}]))
    told = list(overlaps([SourceConfig(str(tmp_path / "r.jsonl"))], [("eval.sources", SourceConfig(str(tmp_path / "held.json")))]))
    assert bool(told) == isinstance(expected, str), "by their names"


@pytest.mark.parametrize("form", ["sat", "easyr1"])
@pytest.mark.parametrize("asked", ["", " ", [], [{"type": "text", "text": " "}]], ids=str)
def test_a_question_that_says_nothing(form, asked, tmp_path):
    with pytest.raises(BadRow, match="empty"):
        read(tmp_path, form, said(form, user=asked))


def test_a_question_of_a_picture_alone(tmp_path):
    """SAT's options follow a question, which its picture is none of."""
    alone = [{"type": "image_url", "image_url": {"url": "a.png"}}]
    with pytest.raises(BadRow, match="empty question"):
        read(tmp_path, "sat", {k: v for k, v in said("sat", user=alone).items() if k not in ("images", "image_bytes")})


def test_answers_in_parts(tmp_path):
    messages = [GOOD["sharegpt"]["messages"][0], {"role": "assistant", "content": [{"type": "text", "text": "B"}]}]
    row = read(tmp_path, "sharegpt", changed("sharegpt", messages=messages))
    assert row.turns[-1] == Turn("assistant", "B") and row.truth == "B"


def test_json_text_in_the_cells_of_a_table(tmp_path):
    (tmp_path / "a.png").write_bytes(DATA)
    record = {**GOOD["verl"], **{key: json.dumps(GOOD["verl"][key]) for key in ("prompt", "reward_model", "images")}}
    pq.write_table(pa.Table.from_pylist([{**record, "extra_info": '{"index": 4, "boxes": [[1, 2]]}'}]), tmp_path / "v.parquet")
    row = open_source(SourceConfig(str(tmp_path / "v.parquet")))[0]
    assert (row.truth, row.id, row.meta["boxes"], row.images) == ("B", "4", [[1, 2]], (tmp_path / "a.png",))
    share = {"messages": json.dumps(GOOD["sharegpt"]["messages"]), "images": '["a.png"]'}
    pq.write_table(pa.Table.from_pylist([share]), tmp_path / "s.parquet")
    assert open_source(SourceConfig(str(tmp_path / "s.parquet")))[0].truth == "B"
    pq.write_table(pa.Table.from_pylist([{**record, "reward_model": '{"ground_truth": '}]), tmp_path / "b.parquet")
    with pytest.raises(BadRow, match="reward_model is text that begins as JSON"):
        open_source(SourceConfig(str(tmp_path / "b.parquet")))[0]


def test_an_answer_may_begin_with_a_bracket(tmp_path):
    assert read(tmp_path, "easyr1", said("easyr1", truth="[0, 1)")).truth == "[0, 1)"


def test_cells_that_python_does_not_have(tmp_path):
    broken = pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())
    table = pa.table({"question": broken, "correct_answer": ["B"]})
    with pa.OSFile(str(tmp_path / "t.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(BadRow, match=r"t\.arrow:1: a value cannot be read"):
        open_source(SourceConfig(str(tmp_path / "t.arrow"), format="sat"))[0]


# ---- which format, which split, which copy


@pytest.mark.parametrize(
    "records, form",
    [
        ([GOOD["jsonl"]], "own"),
        ([{"id": 1, **GOOD["sharegpt"]}], None),
        ([GOOD["sharegpt"]], None),
        ([GOOD["sharegpt"], {"system": "s", **GOOD["sharegpt"]}], "sharegpt"),
        ([{"conversations": []}], "sharegpt"),
        ([GOOD["easyr1"]], "easyr1"),
        ([GOOD["verl"]], "verl"),
        ([GOOD["sat"]], "sat"),
        ([{"messages": [{"role": "user", "content": PARTS}]}], "sharegpt"),
        ([said("jsonl", user=PARTS)], "own"),
    ],
)
def test_the_format_is_told_or_asked_for(tmp_path, records, form):
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if form is None:
        with pytest.raises(ValueError, match="may be rows of ours or ShareGPT's; set format"):
            open_source(SourceConfig(str(tmp_path / "r.jsonl")))
    else:
        assert type(open_source(SourceConfig(str(tmp_path / "r.jsonl"))).source).__module__.endswith(form)


def table_of(path: Path, n: int = 2, **changes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([changed("sat", image_bytes=[DATA], **changes)] * n), path)
    return path


@pytest.mark.parametrize(
    "names",
    [
        ("SAT_train.parquet", "SAT_val.parquet", "SAT_test.parquet", "SAT_static.parquet"),
        ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test-00000-of-00001.parquet"),
        ("data.parquet", "data-validation.parquet"),
        ("train.parquet", "dev.parquet"),
    ],
)
@pytest.mark.parametrize("below", ["", "data"], ids=["folder", "snapshot of a hub"])
def test_a_folder_of_several_splits_is_refused_and_one_is_chosen(tmp_path, names, below):
    for n, name in enumerate(names, 1):
        table_of(tmp_path / below / name, n)
    (tmp_path / "README.md").write_text("---")
    with pytest.raises(ValueError, match=r"holds files of several splits: .*(test|validation).*set split to one of them"):
        open_source(SourceConfig(str(tmp_path)))
    for split, words in {"train": ("train",), "validation": ("val", "dev", "validation"), "test": ("test",)}.items():
        rows = sum(n for n, name in enumerate(names, 1) if any(word in name for word in words))
        if rows:
            assert len(open_source(SourceConfig(str(tmp_path), split=split))) == rows
        else:
            with pytest.raises(ValueError, match=f"has no split '{split}'; it holds "):
                open_source(SourceConfig(str(tmp_path), split=split))


def test_a_folder_of_one_split(tmp_path):
    for n in range(2):
        table_of(tmp_path / "train" / f"train-0000{n}-of-00002.parquet")
    for path, split in ((tmp_path / "train", ""), (tmp_path / "train", "train"), (tmp_path, ""), (tmp_path, "train")):
        assert len(open_source(SourceConfig(str(path), split=split))) == 4
    table_of(tmp_path / "test" / "0.parquet", 1)
    with pytest.raises(ValueError, match=r"several splits: test \(test\); train \(train\)"):
        open_source(SourceConfig(str(tmp_path)))
    assert len(open_source(SourceConfig(str(tmp_path), split="test"))) == 1
    with pytest.raises(ValueError, match="split is for folders"):
        open_source(SourceConfig(str(tmp_path / "test/0.parquet"), split="test"))
    table_of(tmp_path / "x/some/0.parquet")
    with pytest.raises(ValueError, match=f"neither .parquet files nor.*give {tmp_path / 'x/some'}"):
        open_source(SourceConfig(str(tmp_path / "x")))


def test_copies_follow_the_content_and_are_made_anew(tmp_path):
    import os

    path = table_of(tmp_path / "s.parquet", question="old")
    time = path.stat().st_mtime_ns
    assert Table(path)[0]["question"] == "old"
    size = path.stat().st_size
    table_of(path, question="new")
    os.utime(path, ns=(time, time))
    assert path.stat().st_size == size and Table(path)[0]["question"] == "new"
    copies = list((Path(os.environ["XDG_CACHE_HOME"]) / "actial_fast").glob("*.arrow"))
    for damage in (lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data[:-40] + bytes(40)):
        for copy in copies:
            copy.write_bytes(damage(copy.read_bytes()))
        assert Table(path)[1]["question"] == "new"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# ---- what sources have in common


def own(path: Path, names: list[str], **changes) -> SourceConfig:
    """Our rows, one a picture name, in `path`."""
    rows = [changed("jsonl", images=[name], **changes) for name in names]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceConfig(str(path))


def test_damage_in_the_middle_of_a_copy_is_seen_and_mended(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    rows = [changed("verl", images=[DATA + rng.bytes(400)], data_source=f"kind {n}", extra_info={"index": n}) for n in range(300)]
    rows[9]["prompt"] = None
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    wanted = list(read_all(tmp_path / "x.parquet"))
    assert len(set(wanted)) == 300 and wanted[9].startswith("BadRow")
    (copy,) = (tmp_path / "cache" / "actial_fast").glob("*.arrow")
    whole = copy.read_bytes()
    times = 0
    for place in [*range(1000, len(whole) - 1000, len(whole) // 9), *range(len(whole) // 2, len(whole) // 2 + 3000, 500)]:
        hurt = bytearray(whole)
        hurt[place : place + 8] = bytes(255 - byte for byte in hurt[place : place + 8])
        copy.write_bytes(hurt)
        caplog.clear()
        monkeypatch.setattr("actial_fast.data.sources.table.told", Told())
        assert list(read_all(tmp_path / "x.parquet")) == wanted, place
        if mended := copy.read_bytes() == whole:
            assert any("a damaged copy of a table: it is made anew" in record.getMessage() for record in caplog.records) or place < 2000
        times += mended
    assert times > 9  # elsewhere nothing lies


def read_all(path):
    source = open_source(SourceConfig(str(path), format="verl"))
    for n in range(len(source)):
        try:
            row = source[n]
            yield f"{row.turns} {row.kind} {row.id} {hash(row.images)}"
        except BadRow as error:
            yield f"BadRow {error}"


def test_what_sources_share_is_told(tmp_path):
    train = own(tmp_path / "train.jsonl", ["1.png", "2.png", "3.png"])
    again = own(tmp_path / "deep" / "again.jsonl", ["../3.png", "../4.png"])  # the same file, by another name
    other_answer = own(
        tmp_path / "cot.jsonl", ["1.png"], messages=[GOOD["jsonl"]["messages"][0], {"role": "assistant", "content": "It is B"}]
    )
    held = own(tmp_path / "test.jsonl", ["3.png", "9.png"])
    images = own(
        tmp_path / "images.jsonl", ["2.png"], messages=[{"role": "user", "content": "<image>other?"}, {"role": "assistant", "content": "B"}]
    )
    apart = own(tmp_path / "apart.jsonl", ["7.png"])
    assert list(overlaps([train, again], [])) == [f"data.sources: 1 of 2 rows of {again.path} are in {train.path} as well"]
    assert list(overlaps([train, other_answer], [("eval.sources", apart)])) == []
    (line,) = overlaps([train], [("eval.sources", held)])
    assert line == f"eval.sources: 1 of 2 rows of {held.path} are trained on, in {train.path}"
    (line,) = overlaps([train], [("eval.sources", images)])
    assert line == f"eval.sources: 1 of 1 rows of {images.path} show images that {train.path}, which is trained on, shows too"
    objects = [own(tmp_path / f"{name}.jsonl", [f"{name}.png"], meta={"object": "car/1"}) for name in "ab"]
    (line,) = overlaps(objects[:1], [("eval.sources", objects[1])])
    assert "1 of 1 objects" in line and "car/1" in line


def test_what_tables_share_is_told(tmp_path):
    one, two = (SourceConfig(str(table_of(tmp_path / f"{name}.parquet", 2))) for name in ("one", "two"))
    three = SourceConfig(str(table_of(tmp_path / "three.parquet", 1, question="other")))
    assert "2 of 2 rows" in next(overlaps([one], [("eval.sources", two)])) and "show images" in next(
        overlaps([one], [("eval.sources", three)])
    )

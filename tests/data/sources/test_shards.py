"""Tar shards in WebDataset's convention, patterns of files, and files from a network: the same rows as from a file, whatever is damaged."""

import io
import json
import tarfile

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from actial_fast.data.sources import places, shards, told
from actial_fast.data.sources.content import content
from actial_fast.data.sources.overlap import overlaps
from actial_fast.data.sources.row import BadRow
from actial_fast.data.sources.shards import ShardRecords
from actial_fast.data.sources.source import SourceConfig, detect_format, open_source, scan
from actial_fast.data.sources.stream import Stream

OPTIONS = "Which way?\nA. left\nB. right"


def picture(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def shard(path, members, form=tarfile.PAX_FORMAT):
    """members: names with bytes, text, or an object for JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as file:
        for name, data in members:
            data = data if isinstance(data, bytes) else data.encode() if isinstance(data, str) else json.dumps(data).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def ours(number: int, images: int = 2) -> dict:
    said = [{"role": "user", "content": "<image>" * images + OPTIONS}, {"role": "assistant", "content": "AB"[number % 2]}]
    return {"messages": said, "truth": "AB"[number % 2], "kind": "turn", "choices": ["left", "right"], "meta": {"n": number}}


def sample(number: int) -> list:
    key = f"{number:06}"
    return [(f"{key}.json", ours(number)), (f"{key}.0.png", picture(2 * number)), (f"{key}.1.png", picture(2 * number + 1))]


@pytest.fixture
def four(tmp_path):
    """Four shards of five samples each."""
    for k in range(4):
        shard(tmp_path / f"train-{k:03}.tar", [member for n in range(5 * k, 5 * k + 5) for member in sample(n)])
    return tmp_path


def rows(path, **more):
    source = open_source(SourceConfig(str(path), **more))
    return [source[i] for i in range(len(source))]


def record_of(tmp_path, members):
    return ShardRecords(shard(tmp_path / "one.tar", members))[0]


def test_rows_are_those_of_a_jsonl_file_with_the_same_pictures(four):
    folder = four / "files"
    folder.mkdir()
    with open(folder / "rows.jsonl", "w") as file:
        for n in range(20):
            names = [f"{n}.{k}.png" for k in range(2)]
            for k, name in enumerate(names):
                (folder / name).write_bytes(picture(2 * n + k))
            file.write(json.dumps(ours(n) | {"images": names, "id": f"{n:06}"}) + "\n")
    for path in (four, four / "train-{000..003}.tar", four / "train-*.tar", four / "train-00[0-3].tar"):
        found = rows(path)
        assert len(found) == 20
        for got, want in zip(found, rows(folder / "rows.jsonl"), strict=True):
            assert (got.turns, got.truth, got.kind, got.choices, got.meta, got.id) == (
                *(want.turns, want.truth, want.kind, want.choices),
                *(want.meta, want.id),
            )
            assert list(got.images) == [image.read_bytes() for image in want.images]
        assert found[7].where == f"{four}/train-001.tar:000007"
    assert open_source(SourceConfig(str(four))).kind(3) == "turn"


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["ustar", "gnu", "pax"])
def test_keys_and_suffixes_as_webdataset_has_them(tmp_path, form):
    long = "a folder/with.dots/" + "x" * 70
    path = shard(
        tmp_path / "one.tar",
        [
            ("README", "no suffix"),
            (".hidden.png", picture(0)),
            ("a/b.c/k.JSON", ours(0)),  # the key ends at the first dot of the name, behind the folders
            ("a/b.c/k.10.png", picture(10)),
            ("a/b.c/k.2.PNG", picture(2)),
            (f"{long}.json", ours(1)),
            (f"{long}.left.png", picture(3)),
            (f"{long}.right.png", picture(4)),
        ],
        form,
    )
    found = ShardRecords(path)
    assert [found.where(i).rpartition(":")[2] for i in range(len(found))] == ["a/b.c/k", long]
    assert found[0]["images"] == [picture(2), picture(10)] and found[1]["images"] == [picture(3), picture(4)]
    assert [row.truth for row in rows(path)] == ["A", "B"]


def test_pictures_that_a_record_names(tmp_path):
    members = [("7.json", {"images": ["7.b.png", "a.png"]}), ("7.a.png", picture(1)), ("7.b.png", picture(2))]
    assert record_of(tmp_path, members)["images"] == [picture(2), picture(1)]
    one = [("x/7.json", {"image": "somewhere/7.png"}), ("x/7.png", picture(1))]
    assert record_of(tmp_path, one)["image"] == [picture(1)]
    with pytest.raises(BadRow, match=r"one\.tar:7: image 8\.png is no member of its sample, which has \.png"):
        record_of(tmp_path, [("7.json", {"image": "8.png"}), ("7.png", picture(1))])


def test_texts_and_classes(tmp_path):
    path = shard(
        tmp_path / "pairs.tar",
        [
            *(("0.txt", OPTIONS), ("0.cls", "B"), ("0.jpg", picture(0)), ("0.json", {"source": "web", "width": 30})),
            *(("1.txt", "A red cup."), ("1.jpg", picture(1))),
            *(("2.cls", "3\n"), ("2.jpg", picture(2)), ("2.npy", b"123")),
            *(("3.jpg", picture(3)), ("4.txt", "no picture")),
        ],
    )
    assert detect_format(path) == "webdataset"
    source = open_source(SourceConfig(str(path)))
    first, second, third = (source[i] for i in range(3))
    assert (first.turns[0].content, first.truth, first.choices) == ("<image>" + OPTIONS, "B", ("left", "right"))
    assert first.meta == {"source": "web", "width": 30} and first.id == "0"
    assert (second.turns[0].content, second.turns[1].content, second.truth) == ("<image>", "A red cup.", "")
    assert (third.turns[1].content, third.truth) == ("3", "3")
    with pytest.raises(BadRow, match=r"pairs\.tar:3: neither \.txt nor \.cls says anything"):
        source[3]
    with pytest.raises(BadRow, match=r"pairs\.tar:4: no picture, and no question"):
        source[4]


@pytest.mark.parametrize(
    ("record", "form"),
    [
        ({"conversations": [{"from": "human", "value": "<image>Which?"}, {"from": "gpt", "value": "left"}]}, "sharegpt"),
        ({"messages": [{"role": "user", "content": "<image>Which?"}, {"role": "assistant", "content": "left"}]}, "sharegpt"),
        ({"question": "Which?", "answers": ["left", "right"], "correct_answer": "left", "question_type": "turn"}, "sat"),
        ({"prompt": [{"role": "user", "content": "<image>Which?"}], "reward_model": {"ground_truth": "left"}}, "verl"),
        ({"problem": "<image>Which?", "answer": "left"}, "easyr1"),
        ({"messages": [{"role": "user", "content": "<image>Which?"}], "truth": "left"}, "jsonl"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_format_may_be_in_a_shard(tmp_path, record, form):
    path = shard(tmp_path / "one.tar", [("k.json", record), ("k.webp", picture(0))])
    assert detect_format(path) == form
    (row,) = rows(path)
    assert row.truth == "left" and row.images == (picture(0),)


def test_fields_in_members_of_their_own(tmp_path):
    path = shard(
        tmp_path / "one.tar",
        [("k.problem.txt", "<image>Which?"), ("k.answer.txt", "left"), ("k.boxes.json", [[1, 2]]), ("k.png", picture(0))],
    )
    assert detect_format(path) == "easyr1"
    (row,) = rows(path)
    assert (row.turns[0].content, row.truth, row.meta) == ("<image>Which?", "left", {"boxes": [[1, 2]]})


def damaged(path, name: str, kind: str) -> None:
    """Damage in one member of a shard: its data, its header, or all behind its beginning."""
    with tarfile.open(path) as file:
        member = file.getmember(name)
    data = bytearray(path.read_bytes())
    if kind == "data":
        data[member.offset_data : member.offset_data + member.size] = b"?" * member.size
    elif kind == "header":
        data[member.offset : member.offset + 512] = bytes(range(256)) * 2
    else:
        del data[member.offset_data + member.size // 2 :]
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["data", "header", "cut"])
@pytest.mark.parametrize(("name", "bad"), [("000006.json", 1), ("000006.1.png", 1), ("000009.1.png", 1)])
def test_damage_in_a_member_costs_its_row(four, name, bad, kind, caplog):
    damaged(four / "train-001.tar", name, kind)
    source = open_source(SourceConfig(str(four / "train-{000..003}.tar")))
    found = scan(source)
    told.told.close()
    whole = 20 if kind != "cut" else 15 + int(name[5]) - 5 + 1
    assert found.rows == whole and len(found.bad) == bad
    assert found.bad[0].where == f"{four}/train-001.tar:{name[:6]}"
    others = [i for i in range(len(source)) if source.source.records.where(i) != found.bad[0].where]
    assert len(others) == whole - bad and all(source[i].truth == "AB"[int(source[i].id) % 2] for i in others)
    assert kind == "data" or any("shard" in record.message for record in caplog.records)


def test_what_is_no_shard_is_refused(tmp_path):
    for name, data in (("text.tar", b"some text" * 100), ("empty.tar", b""), ("one.tar.gz", b"\x1f\x8b"), ("one.tgz", b"\x1f\x8b")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=r"compressed.*decompress it" if "z" in name else "not a tar file"):
            open_source(SourceConfig(str(tmp_path / name)))
    with pytest.raises(ValueError, match="has no rows"):
        open_source(SourceConfig(str(shard(tmp_path / "none.tar", [])), "jsonl"))
    path = shard(tmp_path / "twice.tar", [("k.json", ours(0)), ("k.0.png", picture(0)), ("k.0.png", picture(1))])
    with pytest.raises(BadRow, match=r"two members \.0\.png"):
        open_source(SourceConfig(str(path), "jsonl"))[0]


def test_a_folder_of_several_splits(four):
    shard(four / "test-000.tar", sample(99))
    with pytest.raises(ValueError, match="holds files of several splits"):
        rows(four)
    assert [len(rows(four, split=split)) for split in ("train", "test")] == [20, 1]


def test_members_are_looked_for_once(four, monkeypatch):
    before = rows(four)
    monkeypatch.setattr(shards, "_walked", lambda file: pytest.fail("walked again"))
    assert rows(four) == before
    monkeypatch.undo()
    shard(four / "train-000.tar", sample(50))
    assert len(rows(four)) == 16, "a shard that has changed is another one"


def test_a_stream_resumes_and_is_shared_out(four):
    config = [SourceConfig(str(four / "train-{000..003}.tar"))]
    alone = Stream(config, seed=3, workers=0)
    want = [example.row.id for _ in range(10) for example in alone.next_batch(4)]
    assert sorted(want[:20]) == [f"{n:06}" for n in range(20)] and want[:20] != sorted(want[:20])
    later = Stream(config, seed=3, workers=0)
    later.seek(12)
    assert [e.row.id for _ in range(7) for e in later.next_batch(4)] == want[12:]
    ranks = [Stream(config, seed=3, workers=0, rank=r, world=2) for r in range(2)]
    assert [e.row.id for _ in range(10) for rank in ranks for e in rank.next_batch(4)] == want


def test_what_sources_have_in_common_is_told(four):
    shard(four / "test.tar", sample(3))
    (line,) = overlaps([SourceConfig(str(four / "train-*.tar"))], [("eval.sources", SourceConfig(str(four / "test.tar")))])
    assert line.startswith("eval.sources: 1 of 1 rows of")


# patterns


def test_braces():
    assert places.expanded("a-{008..011}.tar") == [f"a-{n:03}.tar" for n in range(8, 12)]
    assert places.expanded("{a,b}{3..1}") == ["a3", "a2", "a1", "b3", "b2", "b1"]
    assert places.expanded("x{one}{}y") == ["x{one}{}y"]
    with pytest.raises(ValueError, match="more than 100000 files"):
        places.expanded("{0..1000000}")


def test_patterns_of_files(four, tmp_path):
    with pytest.raises(ValueError, match=r"2 of its 6 files are not there, .*train-004\.tar the first"):
        rows(four / "train-{000..005}.tar")
    with pytest.raises(ValueError, match=r"does not exist .*or a pattern of files"):
        rows(four / "none-*.tar")
    (four / "a.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="a pattern is for parquet files and tar shards"):
        rows(four / "*.jsonl", format="jsonl")
    odd = shard(tmp_path / "odd" / "{a}[1].tar", sample(0))
    assert len(rows(odd)) == 1, "a name that looks like a pattern and is a file's is a file"
    before = content(four / "train-*.tar")
    shard(four / "train-003.tar", sample(50))
    assert content(four / "train-*.tar") != before


# files from a network


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """Two parquet files and a shard, on a file system that only fsspec reaches."""
    monkeypatch.setattr("datasets.config.DOWNLOADED_DATASETS_PATH", tmp_path / "downloads")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)  # benchmarks, which other tests import, set it
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    places._fetched.cache_clear()
    files = fsspec.filesystem("memory")
    for k in range(2):
        said, seen = [f"<image>Which? {k}{n}" for n in range(3)], [[picture(n)] for n in range(3)]
        columns = {"problem": said, "answer": ["left"] * 3, "images": seen}
        pa.parquet.write_table(pa.table(columns), sink := io.BytesIO())
        files.pipe(f"/set/data/train-{k}.parquet", sink.getvalue())
    files.pipe("/set/one.tar", shard(tmp_path / "one.tar", [*sample(0), *sample(1)]).read_bytes())
    yield files
    files.rm("/set", recursive=True)
    places._fetched.cache_clear()


def test_remote_files_are_fetched_once(remote, tmp_path, monkeypatch):
    for address in ("memory://set/data/train-{0..1}.parquet", "memory://set/data/*.parquet", "memory://set"):
        assert [row.turns[0].content for row in rows(address)] == [f"<image>Which? {k}{n}" for k in range(2) for n in range(3)]
    (one, two) = rows("memory://set/one.tar")
    assert (one.id, two.id) == ("000000", "000001") and one.where.endswith("one.tar:000000")
    remote.rm("/set/one.tar")
    places._fetched.cache_clear()
    assert len(rows("memory://set/one.tar")) == 2, "what was fetched before is read where there is nothing now"
    for link in (tmp_path / "cache").rglob("one.tar"):
        link.resolve().unlink()
    places._fetched.cache_clear()
    with pytest.raises(ValueError, match=r"data source memory://set/one\.tar: it cannot be fetched \(FileNotFoundError"):
        rows("memory://set/one.tar")
    with pytest.raises(ValueError, match="Unable to find"):
        rows("memory://set/none-*.parquet")
    with pytest.raises(ValueError, match=r"data source nosuch://x/a\.parquet: it cannot be fetched \(ValueError"):
        rows("nosuch://x/a.parquet")

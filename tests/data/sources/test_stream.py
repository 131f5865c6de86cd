"""The stream: exact shares in every window, a position that is the whole state, ranks that agree, bad rows that are never lost."""

import json
import threading
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from actial_fast.data.sources.mixing import interleave
from actial_fast.data.sources.picture import decode
from actial_fast.data.sources.row import BadRow
from actial_fast.data.sources.source import SourceConfig
from actial_fast.data.sources.stream import Example, Pass, Stream
from actial_fast.packing.images import ImageSettings, ImageStore

WINDOW = 1000


def make(folder: Path, name: str, rows: int, images: int = 8, bad: tuple[int, ...] = (), **config) -> SourceConfig:
    """A source of `rows` rows named name0, name1, ... with two images each; rows in `bad` name an image that is not there."""
    for i in range(images):
        if not (folder / f"{i}.png").exists():
            Image.fromarray(np.full((4, 5, 3), i, np.uint8)).save(folder / f"{i}.png")
    with open(folder / f"{name}.jsonl", "w") as file:
        for i in range(rows):
            messages = [{"role": "user", "content": "<image><image>?"}, {"role": "assistant", "content": "B"}]
            second = "gone.png" if i in bad else f"{(i + 1) % images}.png"
            file.write(json.dumps({"id": f"{name}{i}", "messages": messages, "images": [f"{i % images}.png", second], "truth": "B"}) + "\n")
    return SourceConfig(str(folder / f"{name}.jsonl"), **config)


def ids(examples) -> list[str]:
    return [example.row.id for example in examples]


# --- the mixture


def windows(pattern: np.ndarray, source: int, width: int) -> np.ndarray:
    """Draws of `source` in every window of `width` that starts within the first period, of the pattern repeated for ever."""
    repeated = np.resize(pattern, len(pattern) + width) == source
    total = np.concatenate([[0], np.cumsum(repeated)])
    return total[width:] - total[:-width]


def test_nine_to_one_is_exact_in_every_window():
    for weights in ((0.9, 0.1), (9, 1), (90, 10), (0.09, 0.01)):
        pattern, _, counts = interleave(weights)
        assert counts.tolist() == [9, 1]
        assert set(windows(pattern, 0, WINDOW)) == {900} and set(windows(pattern, 1, WINDOW)) == {100}


@given(st.lists(st.floats(0.01, 10) | st.integers(1, 30), min_size=1, max_size=6))
@settings(deadline=None, max_examples=15)
def test_every_prefix_is_within_one_draw_of_the_exact_share(weights):
    pattern, before, counts = interleave(weights)
    period = len(pattern)
    assert counts.sum() == period
    np.testing.assert_allclose(counts / period, np.array(weights) / sum(weights), atol=1.5e-4)
    for k in range(len(weights)):
        drawn = np.cumsum(pattern == k)
        assert np.array_equal(before[pattern == k], np.arange(counts[k]))
        lag = drawn * period - np.arange(1, period + 1) * counts[k]  # in units of 1 / period, exact
        assert abs(lag).max() < period and lag[-1] == 0


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -1], [1, float("nan")], [1, float("inf")], [1e9, 1]])
def test_weights_that_make_no_mixture(weights):
    with pytest.raises(ValueError, match=r"weight|at least one"):
        interleave(weights)


# --- position, shuffle, epochs


def test_each_epoch_sees_every_row_once_in_another_order(tmp_path):
    stream = Stream([make(tmp_path, "a", 50)], seed=3)
    assert stream.epoch_length == 50 and stream.sizes == (50,)
    epochs = [ids(stream.next_batch(50)) for _ in range(3)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 50 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])
    other = Stream([make(tmp_path, "a", 50)], seed=4)
    assert ids(other.next_batch(50)) != epochs[0]
    plain = Stream([make(tmp_path, "a", 50)], seed=3, shuffle=False)
    assert ids(plain.next_batch(60)) == [f"a{i % 50}" for i in range(60)]
    for each in (stream, other, plain):
        each.close()


def test_mixture_of_files(tmp_path):
    configs = [make(tmp_path, "a", 300, weight=0.9), make(tmp_path, "b", 7, weight=0.1)]
    stream = Stream(configs, seed=0)
    drawn = ids(stream.next_batch(700)) + ids(stream.next_batch(301))
    for start in range(2):
        assert Counter(name[0] for name in drawn[start : start + WINDOW]) == {"a": 900, "b": 100}
    smalls = [name for name in drawn if name[0] == "b"]
    for i in range(0, 98, 7):
        assert len(set(smalls[i : i + 7])) == 7
    stream.close()


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3), weights=st.lists(st.integers(1, 7), min_size=3, max_size=3))
@settings(deadline=None, max_examples=25)
def test_epoch_length_is_the_first_moment_all_is_seen(tmp_path_factory, sizes, weights):
    folder = tmp_path_factory.mktemp("epoch")
    configs = [make(folder, f"s{k}_", n, weight=w) for k, (n, w) in enumerate(zip(sizes, weights, strict=False))]
    stream = Stream(configs, seed=1, workers=0)
    seen, p = set(), 0
    while len(seen) < sum(sizes):
        seen.add(stream.locate(p))
        p += 1
    assert stream.epoch_length == p


def test_seek_gives_the_same_examples_as_reading_on(tmp_path):
    configs = [make(tmp_path, "a", 40, weight=3), make(tmp_path, "b", 9, weight=1)]
    whole = Stream(configs, seed=5)
    straight = [ids(whole.next_batch(16)) for _ in range(8)]
    assert whole.position == 128
    for step in (5, 0, 7, 3):
        fresh = Stream(configs, seed=5)
        fresh.next_batch(16)  # leaves something read ahead
        for each in (fresh, whole):
            each.seek(16 * step)
            assert [ids(each.next_batch(16)) for _ in range(2)][: 8 - step] == straight[step : step + 2]
        fresh.close()
    whole.seek(0)
    assert ids(whole.next_batch(8)) + ids(whole.next_batch(24)) == straight[0] + straight[1]  # a batch size changed under the read-ahead
    whole.close()


@given(world=st.integers(1, 9), n=st.integers(1, 20))
@settings(deadline=None, max_examples=20)
def test_ranks_share_a_batch(tmp_path_factory, world, n):
    config = make(tmp_path_factory.mktemp("ranks"), "a", 30)
    alone = Stream([config], seed=2, workers=0)
    ranks = [Stream([config], seed=2, rank=r, world=world, workers=0) for r in range(world)]
    for _ in range(3):
        parts = [stream.next_batch(n) for stream in ranks]
        want = alone.next_batch(n)
        joined = [example for part in parts for example in part]
        assert ids(joined) == ids(want) and [e.position for e in joined] == [e.position for e in want]
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert {stream.position for stream in ranks} == {alone.position}


@given(world=st.integers(1, 5), n=st.integers(1, 20))
@settings(deadline=None, max_examples=20)
def test_ranks_share_what_is_admitted_and_each_has_some_of_its_beginning(tmp_path_factory, world, n):
    config = make(tmp_path_factory.mktemp("spread"), "a", 30)
    alone = Stream([config], seed=2, workers=1)
    ranks = [Stream([config], seed=2, rank=r, world=world, workers=1, spread=True) for r in range(world)]
    for admit in (None, lambda p: p % 3 > 0, lambda p: p % 7 == 2):  # another rule than what was read ahead by
        parts = [stream.next_batch(n, admit) for stream in ranks]
        want = alone.next_batch(n, admit)
        assert all(admit is None or admit(e.position) for e in want) and len(want) == n
        assert [parts[i % world][i // world].position for i in range(n)] == [e.position for e in want]
        assert {stream.position for stream in ranks} == {alone.position} == {want[-1].position + 1}
    for each in (alone, *ranks):
        each.close()


# --- rows with the same images stay together


def asked(folder: Path, name: str, questions: list[int], **config) -> SourceConfig:
    """A source with questions[i] rows in a row about the image pair i; 0: one row without images. Ids are name<pair>.<number>."""
    with open(folder / f"{name}.jsonl", "w") as file:
        for pair, count in enumerate(questions):
            images = [f"{pair}a.png", f"{pair}b.png"] if count else []
            messages = [{"role": "user", "content": "<image>" * len(images) + "?"}, {"role": "assistant", "content": "B"}]
            for number in range(max(count, 1)):
                record = {"id": f"{name}{pair}.{number}", "messages": messages, "images": images, "truth": "B"}
                file.write(json.dumps(record) + "\n")
    return SourceConfig(str(folder / f"{name}.jsonl"), **config)


def drawn_by_units(units: list[list[list[int]]], weights: list[float], seed: int, count: int) -> list[tuple[int, int]]:
    """The oracle: (source, row) of the first `count` draws. Each epoch of a source permutes its units, which are lists of rows."""
    pattern, _, _ = interleave(weights)
    epochs, waiting, out = [0] * len(units), [[] for _ in units], []
    for position in range(count):
        k = int(pattern[position % len(pattern)])
        if not waiting[k]:
            order = np.random.default_rng([seed, k, epochs[k]]).permutation(len(units[k]))
            waiting[k] = [row for unit in order for row in units[k][unit]]
            epochs[k] += 1
        out.append((k, waiting[k].pop(0)))
    return out


@given(
    sources=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=12), min_size=1, max_size=3),
    seed=st.integers(0, 9),
    together=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_what_is_permuted(tmp_path_factory, sources, seed, together):
    """Runs of rows with the same images, or single rows: files of pairs with several questions, with one, and of text, by three weights."""
    folder, weights = tmp_path_factory.mktemp("runs"), [3, 1, 2][: len(sources)]
    configs = [asked(folder, f"s{k}_", questions, weight=weights[k]) for k, questions in enumerate(sources)]
    stream = Stream(configs, seed=seed, together=together, workers=0)
    units = []
    for questions in sources:
        rows = iter(range(sum(max(count, 1) for count in questions)))
        runs = [[next(rows) for _ in range(max(count, 1))] for count in questions]
        units.append(runs if together else [[row] for run in runs for row in run])
    count = 2 * stream.epoch_length + 5
    places = [stream.locate(p) for p in range(count)]
    assert places == drawn_by_units(units, weights, seed, count)
    assert len(set(places[: stream.epoch_length])) == sum(stream.sizes) > len(set(places[: stream.epoch_length - 1]))
    assert [stream.locate(p) for p in reversed(range(count))] == places[::-1]  # whatever was asked before
    assert stream.epoch_length == Stream(configs, seed=seed, together=not together, workers=0).epoch_length


def test_rows_without_shared_images_are_permuted_as_ever(tmp_path):
    for config in (make(tmp_path, "a", 60), asked(tmp_path, "b", [1, 0, 0, 1] * 15)):
        stream = Stream([config], seed=7, workers=0)
        permuted = [int(row) for epoch in range(3) for row in np.random.default_rng([7, 0, epoch]).permutation(60)]
        assert [stream.locate(p)[1] for p in range(180)] == permuted
    stream = Stream([asked(tmp_path, "c", [3] * 20)], seed=7, shuffle=False, workers=0)
    assert [stream.locate(p)[1] for p in range(90)] == [*range(60), *range(30)]


def test_runs_over_ranks_and_resumed(tmp_path):
    configs = [asked(tmp_path, "a", [3] * 20 + [1, 0, 2], weight=3), asked(tmp_path, "b", [2, 1, 1, 5], weight=1)]
    alone = Stream(configs, seed=1, workers=0)
    straight = [ids(alone.next_batch(14)) for _ in range(8)]
    ranks = [Stream(configs, seed=1, rank=r, world=3, workers=0) for r in range(3)]
    assert [[name for stream in ranks for name in ids(stream.next_batch(14))] for _ in range(8)] == straight
    for step in (5, 2):
        resumed = Stream(configs, seed=1)
        resumed.seek(14 * step)
        assert [ids(resumed.next_batch(14)) for _ in range(3)] == straight[step : step + 3]
        resumed.close()


@pytest.mark.parametrize("batch", [12, 32])
def test_neighbours_in_a_batch_share_their_images(tmp_path, batch):
    """Three questions a pair: two of three neighbours share, and a batch shows as few pairs as its borders allow."""
    config = asked(tmp_path, "a", [3] * 200)
    for together in (True, False):
        stream = Stream([config], seed=0, together=together, workers=0)
        shown = [[example.row.images for example in stream.next_batch(batch)] for _ in range(600 // batch)]
        shared = sum(one == other for images in shown for one, other in pairwise(images))
        part = shared / sum(len(images) - 1 for images in shown)
        pairs = max(len(set(images)) for images in shown)
        if together:
            assert part >= 0.64 and pairs <= -(-batch // 3) + 1
        else:
            assert part <= 0.05 and pairs > 0.8 * batch


# --- encode


def pixels(example: Example) -> tuple[np.ndarray, ...]:
    """The images of a row, decoded: an `encode` that finds bad images."""
    return tuple(decode(image, example.row.where) for image in example.row.images)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_encode_gets_the_row_with_its_images_still_encoded(tmp_path, workers):
    threads = set()

    def encode(example: Example):
        threads.add(threading.current_thread().name)
        assert example.encoded is None
        return example.position, example.row.images, pixels(example)

    stream = Stream([make(tmp_path, "a", 20)], seed=0, workers=workers, encode=encode)
    for example in stream.next_batch(20) + stream.next_batch(20):
        number, (position, images, decoded) = int(example.row.id[1:]), example.encoded
        assert position == example.position and images == example.row.images
        assert images == (tmp_path / f"{number % 8}.png", tmp_path / f"{(number + 1) % 8}.png")
        assert [int(p[0, 0, 0]) for p in decoded] == [number % 8, (number + 1) % 8]
    stream.close()
    assert threads and all(name.startswith("stream") == (workers > 0) for name in threads)


@pytest.mark.parametrize("workers", [0, 3])
def test_the_stream_decodes_nothing(tmp_path, workers):
    """Whether an image is any good is for `encode` to find out: without one, rows whose image is not there are rows like others."""
    config = make(tmp_path, "a", 10, bad=(2, 3))
    stream = Stream([config], seed=0, workers=workers)
    drawn = stream.next_batch(10)
    stream.close()
    assert len(drawn) == len(list(Pass(config, workers=workers))) == 10 and all(example.encoded is None for example in drawn)


def test_rows_that_share_an_image_decode_it_once_and_each_reports_it(tmp_path):
    store = ImageStore(ImageSettings(14, 2, 2, 56 * 56, 56 * 56, 3, (0.5,) * 3, (0.5,) * 3), tmp_path / "store")
    stream = Stream(
        [make(tmp_path, "a", 64, bad=(3, 4, 60))],
        seed=0,
        on_bad_row="skip",
        rejects=tmp_path / "r.jsonl",
        workers=4,
        encode=lambda example: tuple(store.put(image, example.row.where) for image in example.row.images),
    )
    drawn = stream.next_batch(64)
    stream.close()
    assert len(drawn) == 61 and len({example.encoded for example in drawn}) == 8 and store.decodes == 8
    assert {json.loads(line)["where"].rsplit(":")[-1] for line in (tmp_path / "r.jsonl").read_text().splitlines()} == {"4", "5", "61"}


# --- bad rows


def test_a_bad_row_is_an_error_that_names_it(tmp_path):
    stream = Stream([make(tmp_path, "a", 20, bad=(13,))], seed=0, shuffle=False, encode=pixels)
    assert len(stream.next_batch(10)) == 10
    for _ in range(2):  # the position stays: the stream does not step over a row that nobody has seen
        with pytest.raises(BadRow, match=r"a\.jsonl:14: image .*gone\.png does not exist"):
            stream.next_batch(10)
        assert stream.position == 10
    stream.close()


@pytest.mark.parametrize("world", [1, 3])
def test_skipping_leaves_the_slot_empty_and_keeps_the_record(tmp_path, world):
    config, rejects = make(tmp_path, "a", 20, bad=(3, 13)), tmp_path / "rejects.jsonl"
    clean = Stream([make(tmp_path, "b", 20)], seed=0)
    streams = [Stream([config], seed=0, on_bad_row="skip", rejects=rejects, rank=r, world=world, encode=pixels) for r in range(world)]
    for _ in range(6):
        parts = [stream.next_batch(10) for stream in streams]
        want = {e.position: e.row.id[1:] for e in clean.next_batch(10) if e.row.id not in ("b3", "b13")}
        assert {e.position: e.row.id[1:] for part in parts for e in part} == want
        assert {stream.position for stream in streams} == {clean.position}
    assert sum(stream.rejected for stream in streams) == 6  # two rows in three epochs
    for each in (clean, *streams):
        each.close()
    for file in tmp_path.glob("rejects*.jsonl"):
        places = [json.loads(line)["where"] for line in file.read_text().splitlines()]
        assert len(places) == len(set(places))
    written = {json.loads(line)["where"] for file in tmp_path.glob("rejects*.jsonl") for line in file.read_text().splitlines()}
    assert written == {f"{config.path}:4", f"{config.path}:14"}
    assert len(list(tmp_path.glob("rejects*.jsonl"))) <= world and (world > 1) != rejects.exists()


def test_a_bad_row_of_encode_keeps_its_name_and_order(tmp_path):
    def slow_to_fail(example: Example):  # so that the rows after it are done before
        time.sleep(0.1 * any(image.name == "gone.png" for image in example.row.images))
        return pixels(example)

    config = make(tmp_path, "a", 6, bad=(1, 2, 4))
    stream = Stream([config], seed=0, on_bad_row="skip", rejects=tmp_path / "r.jsonl", shuffle=False, workers=6, encode=slow_to_fail)
    assert ids(stream.next_batch(6)) == ["a0", "a3", "a5"]
    stream.close()
    assert [json.loads(line)["where"].rsplit(":")[-1] for line in (tmp_path / "r.jsonl").read_text().splitlines()] == ["2", "3", "5"]


def test_other_errors_of_encode_are_not_bad_rows(tmp_path):
    stream = Stream([make(tmp_path, "a", 6)], seed=0, on_bad_row="skip", encode=lambda example: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stream.next_batch(2)
    stream.close()


def test_an_image_that_is_mended_is_used_again(tmp_path):
    stream = Stream([make(tmp_path, "a", 4, bad=(0, 1, 2, 3))], seed=0, on_bad_row="skip", workers=0, encode=pixels)
    assert stream.next_batch(2) == []
    Image.new("RGB", (5, 4)).save(tmp_path / "gone.png")
    assert len(stream.next_batch(4)) == 4
    stream.close()


def test_a_source_without_a_good_row_ends_the_run(tmp_path):
    stream = Stream([make(tmp_path, "a", 5, bad=(0, 1, 2, 3, 4))], seed=0, on_bad_row="skip", encode=pixels)
    with pytest.raises(ValueError, match="no usable row in 10 draws"):
        for _ in range(10):
            stream.next_batch(2)
    stream.close()


def test_few_good_rows_do_not_end_the_run(tmp_path):
    stream = Stream([make(tmp_path, "a", 5, bad=(0, 1, 3, 4))], seed=0, on_bad_row="skip", encode=pixels)
    assert [len(stream.next_batch(5)) for _ in range(6)] == [1] * 6 and stream.rejected == 24
    stream.close()


def test_unknown_policy(tmp_path):
    for make_one in (
        lambda: Stream([make(tmp_path, "a", 5)], seed=0, on_bad_row="ignore"),
        lambda: Pass(make(tmp_path, "a", 5), on_bad_row="ignore"),
    ):
        with pytest.raises(ValueError, match="on_bad_row is 'ignore'; use \"error\""):
            make_one()


# --- the finite pass


@pytest.mark.parametrize("workers", [0, 2])
def test_pass_visits_each_row_once_in_order(tmp_path, workers):
    configs = [make(tmp_path, "a", 70, weight=5), make(tmp_path, "b", 40)]
    every = [f"a{i}" for i in range(70)] + [f"b{i}" for i in range(40)]
    once = Pass(configs, workers=workers)
    assert len(once) == 110 and ids(once) == every and ids(once) == every
    assert ids(Pass(configs, limit=75, workers=workers)) == every[:75] and len(Pass(configs, limit=500)) == 110
    parts = [Pass(configs, limit=75, rank=r, world=4, workers=workers) for r in range(4)]
    got = sorted((e.position, e.row.id) for part in parts for e in part)
    assert got == list(enumerate(every[:75])) and sum(len(part) for part in parts) == 75


def test_pass_meets_bad_rows(tmp_path):
    config = make(tmp_path, "a", 50, bad=(7, 40))
    with pytest.raises(BadRow, match=r"a\.jsonl:8"):
        list(Pass(config, encode=pixels))
    skipping = Pass(config, on_bad_row="skip", rejects=tmp_path / "r.jsonl", encode=pixels)
    assert len(list(skipping)) == 48 and skipping.rejected == 2 and len((tmp_path / "r.jsonl").read_text().splitlines()) == 2


def test_threads_end_with_the_stream(tmp_path):
    before = threading.active_count()
    stream = Stream([make(tmp_path, "a", 50)], seed=0, workers=3)
    stream.next_batch(8)
    abandoned = iter(Pass(make(tmp_path, "a", 50), workers=3))
    next(abandoned)
    assert threading.active_count() > before
    stream.close()
    abandoned.close()
    assert threading.active_count() == before

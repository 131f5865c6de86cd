"""The store's limit: least recently used images leave first, never one that somebody needs, and a killed process leaves no claim."""

import multiprocessing
import os
import pickle
import signal
import time

import numpy as np
import pytest

from actial_fast.data.sources import told
from actial_fast.packing import room
from actial_fast.packing.claims import Key
from actial_fast.packing.images import HEADER, ImageSettings, ImageStore

SETTINGS = ImageSettings(14, 2, 2, 1, 10**9, 3, mean=(0.5,) * 3, std=(0.3,) * 3)
SIDE = 56
EACH = HEADER.size + 3 * SIDE * SIDE
FORK = multiprocessing.get_context("fork")


def picture(seed: int, side: int = SIDE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def there(store: ImageStore, keys) -> list[bool]:
    return [room.place(store.folder, str(key)).exists() for key in keys]


def taken(store: ImageStore) -> int:
    return sum(file.bytes for one in room.stores(store.folder.parent) for file in room.kept(one))


@pytest.fixture
def store(tmp_path) -> ImageStore:
    return ImageStore(SETTINGS, tmp_path, most=10 * EACH)


def test_least_recently_used_images_leave_first(store):
    keys = []
    for seed in range(30):
        keys.append(str(store.put(picture(seed))))
        store.put(picture(0))  # it is used all the time
        assert taken(store) <= store.most
    assert there(store, keys) == [True, *[False] * 20, *[True] * 9]
    assert store.decodes == 30 and np.array_equal(store.pixels(keys[0]), picture(0))
    assert store.put(picture(5)) == keys[5] and store.decodes == 31, "one that has left is decoded again"


def test_room_is_made_for_many_at_a_time(tmp_path, monkeypatch):
    scans, plain = [0], room.stores
    monkeypatch.setattr(room, "stores", lambda root: scans.append(1) or plain(root))
    store = ImageStore(SETTINGS, tmp_path, most=200 * EACH)
    for seed in range(300):
        store.put(picture(seed))
    assert 5 <= sum(scans) <= 100 // (200 // room.SPARE) + 1 and taken(store) <= store.most


def test_what_is_needed_stays_and_is_told_when_it_is_too_much(store, caplog):
    keys = [store.put(picture(seed)) for seed in range(25)]
    assert all(there(store, keys)) and taken(store) == 25 * EACH
    told.told.close()
    assert [r.message for r in caplog.records if "told once" in r.message and "image_cache_gb" in r.message]
    del keys[:20]
    store.put(picture(100))
    assert all(there(store, keys)) and taken(store) <= store.most


def test_stores_of_one_folder_share_the_limit(store, tmp_path):
    other = ImageStore(ImageSettings(14, 2, 2, 1, 10**8, 3, mean=(0.5,) * 3, std=(0.3,) * 3), tmp_path, most=store.most)
    first = [str(store.put(picture(seed))) for seed in range(8)]
    held = store.put(picture(0))
    for seed in range(8):
        other.put(picture(seed))
        assert taken(store) <= store.most
    assert there(store, first)[0] and not all(there(store, first)) and np.array_equal(store.pixels(held), picture(0))


def test_without_a_limit_nothing_leaves_but_it_is_counted(tmp_path):
    unlimited = ImageStore(SETTINGS, tmp_path, most=0)
    for seed in range(30):
        unlimited.put(picture(seed))
    assert taken(unlimited) == 30 * EACH
    ImageStore(SETTINGS, tmp_path, most=10 * EACH).put(picture(30))
    assert taken(unlimited) <= 10 * EACH


def test_what_was_deleted_by_hand_is_no_longer_counted(store):
    keys = [str(store.put(picture(seed))) for seed in range(9)]
    for key in keys[:6]:
        room.place(store.folder, key).unlink()
    for seed in range(9, 14):
        store.put(picture(seed))
    assert all(there(store, keys[6:])) and not store.hold(Key(keys[0]))


def test_what_killed_writers_left_makes_room(store):
    left = room.place(store.folder, "ab" * 16)
    left.parent.mkdir()
    left.with_name(left.name + room.UNFINISHED).write_bytes(bytes(8 * EACH))
    os.utime(left.with_name(left.name + room.UNFINISHED), (0, 0))
    (store.folder.parent / room.TAKEN).write_bytes((8 * EACH).to_bytes(8, "little"))
    for seed in range(4):
        store.put(picture(seed))
    assert [file.path.name.endswith(room.UNFINISHED) for file in room.kept(store.folder)] == [False] * 4


def test_another_process_needs_it_until_it_is_killed(store):
    ready, asked = FORK.Event(), FORK.Event()

    def hold() -> None:
        key = store.put(picture(0))
        ready.set()
        asked.wait(60)
        os._exit(0 if np.array_equal(store.pixels(key), picture(0)) else 1)

    for end in ("asked", "killed"):
        ready.clear()
        child = FORK.Process(target=hold)
        child.start()
        assert ready.wait(60)
        key = str(store.put(picture(0)))
        for seed in range(1, 40):
            store.put(picture(seed))
        assert there(store, [key]) == [True]
        if end == "asked":
            asked.set()
        else:
            os.kill(child.pid, signal.SIGKILL)
        child.join(60)
        assert child.exitcode == (0 if end == "asked" else -signal.SIGKILL)
        asked.clear()
    for seed in range(40, 60):
        store.put(picture(seed))
    assert there(store, [key]) == [False]


def test_a_key_sent_to_another_rank_is_held_there(store):
    sent = pickle.loads(pickle.dumps([store.put(picture(0))] * 2))
    assert isinstance(sent[0], Key) and sent[0] is sent[1] and sent[0].claim is None
    assert store.hold(sent[0])
    for seed in range(1, 40):
        store.put(picture(seed))
    assert np.array_equal(store.pixels(sent[0]), picture(0))
    gone = str(sent.pop())
    sent.clear()
    for seed in range(1, 40):
        store.put(picture(seed))
    assert not store.hold(Key(gone))
    with pytest.raises(KeyError, match="no sound image"):
        store.pixels(gone)


def test_two_keys_of_an_image_hold_it_until_the_last(store):
    first, second = store.put(picture(0)), store.put(picture(0))
    del first
    for seed in range(1, 40):
        store.put(picture(seed))
    assert np.array_equal(store.pixels(second), picture(0))


def test_processes_under_pressure_always_find_what_they_hold(store, tmp_path):
    """Far more images than room, from four processes at once, one of which is killed again and again."""

    def work(seed: int, end: float) -> None:
        rng, held = np.random.default_rng(seed), []
        while time.monotonic() < end:
            chosen = int(rng.integers(0, 60))
            held = [*held[-2:], (store.put(picture(chosen)), chosen)]
            for key, number in held:
                assert np.array_equal(store.pixels(key), picture(number))

    end = time.monotonic() + 2
    children = [FORK.Process(target=work, args=(seed, end)) for seed in range(3)]
    for child in children:
        child.start()
    while time.monotonic() < end - 0.3:
        victim = FORK.Process(target=work, args=(9, end))
        victim.start()
        time.sleep(0.2)
        os.kill(victim.pid, signal.SIGKILL)
        victim.join(60)
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 3
    store.put(picture(1000))
    room.prune(tmp_path, store.most)
    assert 0 < taken(store) <= store.most
    assert room.prune(tmp_path, 0) == 0, "no one holds any"


def test_pruning_by_age(store, tmp_path):
    keys = [str(store.put(picture(seed))) for seed in range(6)]
    for key in keys[:3]:
        os.utime(room.place(store.folder, key), (1000, 1000))
    assert room.prune(tmp_path, 0, before=2000) == 3 * EACH and there(store, keys) == [False] * 3 + [True] * 3


def test_a_store_that_may_only_be_read_gives_what_it_holds(store, monkeypatch):
    """As on a file system that is mounted read-only, for root too."""
    key = str(store.put(picture(0)))
    plain = os.open

    def read_only(path, flags, *args, **kwargs):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", read_only)
    later = pickle.loads(pickle.dumps(store))
    assert later.put(picture(0)) == key and np.array_equal(later.pixels(key), picture(0))
    with pytest.raises(ValueError, match=r"cannot keep an image \(Permission denied\)"):
        later.put(picture(1))

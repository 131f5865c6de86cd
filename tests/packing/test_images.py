"""Images once: the store on disk, patches from its pixels, and features shared by micro-batches."""

import contextlib
import errno
import gc
import io
import multiprocessing
import os
import pickle
import signal
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from actial_fast.data.sources.row import BadRow
from actial_fast.kernels import patchify as kernel
from actial_fast.model.features import Features
from actial_fast.packing import images, native, packed_ops, room
from actial_fast.packing.images import ImageSettings, ImageStore

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROCESSOR = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 40})
SETTINGS = ImageSettings.of(PROCESSOR)
SIZES = [(28, 28), (84, 56), (33, 150), (400, 300)]  # height, width; the last two are resized


def picture(size=(60, 90), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def encoded(size=(60, 90), seed: int = 0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(size, seed)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def store(tmp_path) -> ImageStore:
    return ImageStore(SETTINGS, tmp_path)


def again(store: ImageStore) -> ImageStore:
    """The same store as another process, or the next run, opens it."""
    return pickle.loads(pickle.dumps(store))


# the store


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_and_grid_are_the_image_processors(store, size):
    key = store.put(encoded(size))
    theirs = PROCESSOR(images=[picture(size)], return_tensors="np", input_data_format="channels_last")
    assert store.grid(key) == tuple(theirs["image_grid_thw"][0])
    ours = packed_ops.patchify(packed_ops.collect(store, [key]))
    np.testing.assert_allclose(ours.numpy(), theirs["pixel_values"], atol=2e-6)


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([(14, 2), (16, 2), (7, 3)]), st.integers(1, 4000), st.integers(1, 900))
def test_sizes_are_those_of_transformers(height, width, cut, largest, smallest):
    side = cut[0] * cut[1]
    limits = {"min_pixels": min(smallest, largest) * 784, "max_pixels": largest * 784}
    settings = replace(SETTINGS, patch=cut[0], merge=cut[1], **limits)
    try:
        theirs = smart_resize(height, width, side, **limits)
    except ValueError:
        with pytest.raises(ValueError, match="one side must not be more than 200 times"):
            settings.size(height, width)
    else:
        assert settings.size(height, width) == theirs


def test_an_image_is_decoded_once(store, tmp_path):
    path, copy = tmp_path / "a.png", tmp_path / "b.png"
    path.write_bytes(encoded())
    copy.write_bytes(encoded())
    keys = {store.put(x) for x in (path, copy, encoded(), path)}
    assert len(keys) == 1 and (store.decodes, store.hits) == (1, 3)
    same = {store.put(x) for x in (picture(), Image.fromarray(picture()), Image.fromarray(picture()).convert("RGBA"))}
    assert len(same) == 1 and (store.decodes, store.hits) == (2, 5), "pixels are an encoding of their own"
    path.write_bytes(encoded(seed=1))
    assert store.put(path) not in keys | same and store.decodes == 3


def test_the_next_run_decodes_nothing(store):
    keys = [store.put(encoded(seed=i)) for i in range(3)]
    later = again(store)
    assert [later.put(encoded(seed=i)) for i in range(3)] == keys and (later.decodes, later.hits) == (0, 3)
    assert all(np.array_equal(later.pixels(key), store.pixels(key)) for key in keys)


def test_a_file_that_has_not_changed_is_not_read_again(store, tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(encoded())
    key = store.put(path)
    monkeypatch.setattr(type(path), "read_bytes", lambda self: pytest.fail("read again"))
    assert store.put(path) == key and store.hits == 1


def test_settings_have_stores_of_their_own(store, tmp_path):
    other = ImageStore(replace(SETTINGS, max_pixels=28 * 28 * 4), tmp_path)
    a, b = store.put(encoded((200, 200))), other.put(encoded((200, 200)))
    assert a != b and store.pixels(a).shape == (168, 168, 3) and other.pixels(b).shape == (56, 56, 3)
    assert ImageStore(replace(SETTINGS, mean=(0.0, 0.0, 0.0)), tmp_path).put(encoded((200, 200))) == a, "pixels know no mean"


def test_two_openings_see_each_other(store):
    other = again(store)
    for i in range(6):
        key = (store, other)[i % 2].put(encoded(seed=i))
        assert np.array_equal(store.pixels(key), other.pixels(key))
    assert (store.decodes, other.decodes, store.hits, other.hits) == (3, 3, 0, 0)


def test_threads_decode_each_image_once(store):
    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(lambda i: store.put(encoded(seed=i % 5)), range(60)))
    assert len(set(keys)) == 5 and (store.decodes, store.hits) == (5, 55)


def forked(work, *arguments) -> int:
    """The exit code of work(*arguments) in a forked child; negative: the signal that ended it."""
    child = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    child.start()
    child.join(60)
    return child.exitcode


def test_processes_decode_each_image_once(store, tmp_path):
    def slow(*args):  # so that writers would meet if nothing kept them apart
        time.sleep(0.005)
        return room.add(*args)

    def work(i: int) -> None:
        images.add = slow
        keys = [store.put(encoded((120, 90), seed)) for seed in np.random.default_rng(i).permutation(12)]
        assert len({store.pixels(key).tobytes() for key in keys}) == 12
        (tmp_path / f"decodes{i}").write_text(str(store.decodes))

    context = multiprocessing.get_context("fork")
    children = [context.Process(target=work, args=(i,)) for i in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 4
    assert sum(int((tmp_path / f"decodes{i}").read_text()) for i in range(4)) == 12
    for seed in range(12):
        assert np.array_equal(store.pixels(store.put(encoded((120, 90), seed))), SETTINGS.fit(picture((120, 90), seed), ""))
    assert store.decodes == 0


@pytest.mark.parametrize("moment", ["before the file", "in the pixels", "before its name", "behind its name"])
def test_a_killed_writer_leaves_nothing_half_done(store, moment):
    first = store.put(encoded(seed=0))

    def work() -> None:
        def killed(*_):
            os.kill(os.getpid(), signal.SIGKILL)

        if moment == "before the file":
            room._take = killed
        elif moment == "in the pixels":
            room.os.replace = killed
            whole, images._packed = images._packed, lambda key, image: (whole(key, image)[0], whole(key, image)[1][:1000])
        elif moment == "before its name":
            room.os.replace = killed
        else:
            images.add = lambda *args: (room.add(*args), killed())
        store.put(encoded(seed=1))

    assert forked(work) == -signal.SIGKILL
    for later in (store, again(store)):  # one that was open, one that was not
        key = later.put(encoded(seed=1))
        assert np.array_equal(later.pixels(key), SETTINGS.fit(picture(seed=1), ""))
        assert np.array_equal(later.pixels(first), SETTINGS.fit(picture(seed=0), ""))
    assert store.decodes == (1 if moment == "behind its name" else 2) and later.decodes == 0
    assert not list(store.folder.glob("*/*.part"))


@pytest.mark.parametrize("damage", ["pixels", "size", "key", "cut off", "cut off in its head", "longer", "empty"])
def test_damage_is_found_and_repaired(store, damage):
    keys = [store.put(encoded(seed=i)) for i in range(3)]
    file = room.place(store.folder, keys[1])
    data = bytearray(file.read_bytes())
    for name, at in {"pixels": 1000, "size": 17, "key": 3}.items():
        data[at] ^= 8 * (name == damage)
    cut = {"cut off": -1, "cut off in its head": images.HEADER.size - 1, "empty": 0}.get(damage, len(data))
    file.write_bytes(bytes(data[:cut]) + b"x" * (damage == "longer"))
    later = again(store)
    with pytest.raises(KeyError, match="no sound image"):
        later.pixels(keys[1])
    with pytest.raises(KeyError, match="no sound image"):
        later.copy(keys[1], np.empty(store.pixels(keys[0]).size, np.uint8))
    for _ in range(2):
        assert [later.put(encoded(seed=i)) for i in range(3)] == keys and later.decodes == 1
    last = again(store)
    for i, key in enumerate(keys):
        assert np.array_equal(later.pixels(key), SETTINGS.fit(picture(seed=i), "")) and np.array_equal(last.pixels(key), later.pixels(key))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"not an image", "f:3: image of 12 embedded bytes is text, not a picture"),
        (encoded()[:-200], r"f:3: image of \d+ embedded bytes cannot be decoded"),
        (
            np.zeros((28, 28 * 300, 3), np.uint8),
            "f:3: image of 8400x28 pixels: one side must not be more than 200 times the other; crop it",
        ),
        (np.zeros((0, 28, 3), np.uint8), "f:3: image of 28x0 pixels"),
    ],
    ids=["no image", "truncated", "strip", "empty"],
)
def test_bad_images_name_the_row(store, image, message):
    for _ in range(2):  # and are not kept
        with pytest.raises(BadRow, match=message):
            store.put(image, "f:3")
    assert store.decodes == store.hits == 0


def test_bad_files_name_the_row_and_the_file(store, tmp_path):
    with pytest.raises(BadRow, match=r"f:3: image .*gone\.png does not exist"):
        store.put(tmp_path / "gone.png", "f:3")
    with pytest.raises(BadRow, match=r"f:3: image .* cannot be read"):
        store.put(tmp_path, "f:3")
    (tmp_path / "x.png").write_bytes(b"text")
    with pytest.raises(BadRow, match=r"f:3: image .*x\.png is text, not a picture"):
        store.put(tmp_path / "x.png", "f:3")
    (tmp_path / "x.png").write_bytes(encoded())
    assert store.put(tmp_path / "x.png", "f:3") == store.put(encoded())


def test_a_full_disk(store, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(ValueError, match=r"cannot keep an image .*No space left.*; free space there.*data.image_cache_gb"):
            store.put(encoded())
    assert not list(store.folder.glob("*/*")), "what was written of it is taken away"
    assert np.array_equal(store.pixels(store.put(encoded())), SETTINGS.fit(picture(), ""))


def test_a_cache_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/.*: cannot be made .*; set XDG_CACHE_HOME"):
        ImageStore(SETTINGS, tmp_path / "file")


def test_it_lives_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = ImageStore(SETTINGS)
    assert store.folder.parent == tmp_path / "actial_fast" / "images"
    store.put(encoded())
    assert ImageStore(SETTINGS).put(encoded()) and len(list(store.folder.glob("*/*"))) == 1


def test_unknown_key(store):
    with pytest.raises(KeyError, match="no sound image of this key"):
        store.grid("00" * 16)


# patches


def patches(batch, dtype=torch.float32, on_kernel=True) -> torch.Tensor:
    batch = batch.to(DEVICE if on_kernel else "cpu")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(packed_ops, "_on_gpu", lambda x: on_kernel)
        return packed_ops.patchify(batch, dtype).cpu()


@pytest.mark.parametrize(("patch", "merge", "frames"), [(14, 2, 2), (16, 2, 2), (14, 2, 1), (7, 1, 3), (4, 3, 1)], ids=str)
def test_kernel_equals_the_cpu_path(tmp_path, patch, merge, frames):
    """Any number of images of different sizes in one launch, at every alignment of a line; the order is exact, since pixels are noise."""
    side = patch * merge
    settings = replace(SETTINGS, patch=patch, merge=merge, frames=frames, min_pixels=1)
    store = ImageStore(settings, tmp_path)
    shapes = [(1, 1), (2, 3), (1, 4), (3, 1), (1, 1), (2, 2)]
    keys = [store.put(picture((h * side, w * side), i)) for i, (h, w) in enumerate(shapes)]
    batch = packed_ops.collect(store, [*keys, keys[1]])
    assert batch.grids[1] == (1, 2 * merge, 3 * merge) and batch.tokens == sum(h * w for h, w in shapes) + 6
    want = np.concatenate(
        [
            native.patchify(store.pixels(k), patch=patch, merge=merge, frames=frames, mean=SETTINGS.mean, std=SETTINGS.std)
            for k in [*keys, keys[1]]
        ]
    )
    for on_kernel in (True, False):
        np.testing.assert_allclose(patches(batch, on_kernel=on_kernel).numpy(), want, atol=1e-6)
    for dtype in (torch.float16, torch.bfloat16):
        got = patches(batch, dtype)
        assert got.dtype == dtype
        exact = torch.from_numpy(want).double()
        assert ((got.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + 2e-6).all()
    assert torch.equal(patches(batch, torch.bfloat16, on_kernel=False), torch.from_numpy(want).bfloat16())


def test_kernel_equals_transformers(store):
    keys = [store.put(picture(size, i)) for i, size in enumerate(SIZES[:3])]
    theirs = [picture(size, i) for i, size in enumerate(SIZES[:3])]
    theirs = PROCESSOR(images=theirs, return_tensors="np", input_data_format="channels_last")
    batch = packed_ops.collect(store, keys)
    assert batch.grids == tuple(map(tuple, theirs["image_grid_thw"].tolist()))
    got = patches(batch)
    assert got.shape == theirs["pixel_values"].shape
    assert np.abs(got.numpy() - theirs["pixel_values"]).max() < 2e-6 < 1 / 255


def test_many_images(tmp_path):
    """More than the kernel looks at together, and the last of another shape than the one before."""
    settings = replace(SETTINGS, patch=4, merge=1, frames=1, min_pixels=1)
    store = ImageStore(settings, tmp_path)
    keys = [store.put(picture((4, 4 + 4 * i), i)) for i in range(2)]
    batch = packed_ops.collect(store, [keys[0]] * kernel.SEARCH.value + [keys[1]])
    assert torch.equal(patches(batch), patches(batch, on_kernel=False))


def test_every_patch_is_written_and_nothing_beyond(store, monkeypatch):
    batch, buffers, empty = packed_ops.collect(store, [store.put(picture((56, 84)))]), [], torch.empty

    def poisoned(rows, columns, dtype, device):
        buffers.append(torch.full((rows * columns + 4096,), float("nan"), dtype=dtype, device=device))
        return buffers[-1][: rows * columns].view(rows, columns)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned(*a, **k) if "device" in k and len(a) == 2 else empty(*a, **k))
    batch = batch.to(DEVICE)
    scale = {"scale": (1.0, 2.0, 3.0), "shift": (0.0, 0.0, 0.0), "dtype": torch.float32}
    out = kernel.patchify(batch.pixels, batch.table, batch.tokens, patch=14, merge=2, frames=2, **scale)
    assert len(buffers) == 1 and out.isfinite().all() and buffers[0][out.numel() :].isnan().all()


def test_no_images(store):
    batch = packed_ops.collect(store, [])
    for on_kernel in (True, False):
        assert patches(batch, on_kernel=on_kernel).shape == (0, 1176)


def test_other_dtypes_are_refused(store):
    with pytest.raises(ValueError, match=r"dtype: expected float32, float16 or bfloat16, got torch\.float64"):
        packed_ops.patchify(packed_ops.collect(store, []), torch.float64)


# features

ROWS = {"a": 2, "b": 3, "c": 1, "d": 4}
USES = {
    "apart": [["a", "b"], ["c"], ["d"]],
    "an image in two micro-batches": [["a"], ["b", "a"], ["c"]],
    "all over": [["a", "b"], [], ["c", "a"], ["b", "d", "a"], ["a"]],
}


class Tower(nn.Module):
    """Stands in for a vision tower: what it makes of an image depends on all of its patches."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.embed, self.merge = nn.Linear(5, 7, dtype=dtype), nn.Linear(7, 6, dtype=dtype)
        self.inputs = {
            key: torch.randn(rows, 5, generator=torch.Generator().manual_seed(i)).to(dtype) for i, (key, rows) in enumerate(ROWS.items())
        }
        self.seen, self.recording = [], []

    def forward(self, keys):
        self.seen += keys
        self.recording.append(torch.is_grad_enabled())
        x = self.embed(torch.cat([self.inputs[key] for key in keys]))
        parts = torch.tanh(x).split([ROWS[key] for key in keys])
        return [self.merge(part + part.mean(0)) for part in parts]


def loss(features, i):
    """Of micro-batch i: not linear in the features, different for every micro-batch."""
    return 0.0 if features is None else ((i + 1.5) * features).sin().pow(2).sum()


@pytest.fixture
def tower() -> Tower:
    torch.manual_seed(0)
    return Tower()


def gradients(tower: Tower) -> list[torch.Tensor]:
    return [p.grad for p in tower.parameters()]


@pytest.mark.parametrize("uses", USES.values(), ids=list(USES))
def test_gradients_are_those_of_running_the_tower_every_time(tower, uses):
    total = sum(loss(torch.cat(tower(keys)), i) for i, keys in enumerate(uses) if keys)
    want = torch.autograd.grad(total, list(tower.parameters()))
    tower.seen.clear()
    value = 0.0
    with Features(tower, uses, trained=True) as features:
        for i, keys in enumerate(uses):
            with features.of(keys) as rows:
                assert rows is None if not keys else rows.shape == (sum(ROWS[key] for key in keys), 6)
                part = loss(rows, i)
                if keys:
                    part.backward()
                value += torch.as_tensor(part).item()
    unique = {key for keys in uses for key in keys}
    assert len(tower.seen) == len(unique) == features.images and set(tower.seen) == unique
    assert features.calls == sum(bool(set(keys) - set().union(*uses[:i])) for i, keys in enumerate(uses))
    assert value == pytest.approx(total.item(), rel=1e-12)
    for ours, exact in zip(gradients(tower), want, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


def test_a_missing_micro_batch_changes_the_gradient(tower):
    """The comparison above can fail."""
    uses = USES["all over"]
    want = torch.autograd.grad(sum(loss(torch.cat(tower(k)), i) for i, k in enumerate(uses) if k), list(tower.parameters()))
    with Features(tower, uses, trained=True) as features:
        for i, keys in enumerate(uses):
            with features.of(keys) as rows:
                if keys and i != 2:
                    loss(rows, i).backward()
    assert not torch.allclose(gradients(tower)[0], want[0], rtol=1e-3)


def test_an_image_without_a_loss_gets_zero(tower):
    with Features(tower, [["a", "b"]], trained=True) as features, features.of(["a", "b"]):
        pass
    assert all(grad is not None and not grad.any() for grad in gradients(tower))


@pytest.mark.parametrize("passes", [1, 3])
def test_a_frozen_tower_runs_once_for_all_passes(tower, passes):
    uses, seen = USES["all over"], []
    with Features(tower, uses * passes) as features:
        for _ in range(passes):
            for keys in uses:
                with features.of(keys) as rows:
                    assert rows is None or not rows.requires_grad
                    seen.append(rows)
    assert sorted(tower.seen) == list(ROWS) and not any(tower.recording) and gradients(tower) == [None] * 4
    for keys, rows in zip(uses * passes, seen, strict=True):
        assert rows is None if not keys else torch.allclose(rows, torch.cat(tower(keys)), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("trained", [False, True])
def test_features_go_after_their_last_use(tower, trained):
    alive = {}

    def watched(keys):
        outputs = [x.clone() for x in tower(keys)]  # storages of their own, as a frozen image's may go before its neighbours'
        alive.update({key: weakref.ref(x) for key, x in zip(keys, outputs, strict=True)})
        return outputs

    def left():
        gc.collect()
        return sorted(key for key, reference in alive.items() if reference() is not None)

    with Features(watched, [["a", "b"], ["a", "c"], ["c", "d"]], trained=trained) as features:
        with features.of(["a", "b"]) as rows:
            del rows
        assert left() == (["a", "b"] if trained else ["a"])  # a trained tower goes back once for all images of a call
        with features.of(["a", "c"]) as rows:
            del rows
        assert left() == ["c"]
        with features.of(["c", "d"]) as rows:
            del rows
        assert left() == []


def test_16_bit_gradients_add_up_in_float32():
    weight = torch.ones(1, 4, dtype=torch.bfloat16, requires_grad=True)
    n = 300
    with Features(lambda keys: [weight * 1], [["a"]] * n, trained=True) as features:
        for _ in range(n):
            with features.of(["a"]) as rows:
                assert rows.dtype == torch.bfloat16
                rows.sum().backward()
    assert weight.grad.tolist() == [[300.0] * 4], "in bfloat16 this sum would have stopped at 256"


def test_more_uses_than_announced(tower):
    with pytest.raises(AssertionError, match="image a is used more often than was announced"), Features(tower, [["a"]]) as features:
        for _ in range(2):
            with features.of(["a"]):
                pass


def test_fewer_uses_than_announced(tower):
    with pytest.raises(AssertionError, match="2 announced uses of images never came"), Features(tower, [["a"], ["a", "b"]]) as features:
        with features.of(["a"]):
            pass


def test_an_error_of_the_loop_is_told_and_nothing_goes_back(tower):
    with pytest.raises(RuntimeError, match="out of memory"), Features(tower, [["a"]], trained=True) as features:
        with features.of(["a"]) as rows:
            rows.sum().backward()
            raise RuntimeError("out of memory")
    assert gradients(tower) == [None] * 4


def test_a_trained_tower_needs_gradients(tower):
    with torch.no_grad(), pytest.raises(AssertionError, match="pass with gradients"), Features(tower, [["a"]], trained=True) as features:
        with features.of(["a"]):
            pass
    tower.requires_grad_(False)
    with pytest.raises(ValueError, match="pass trained=False for a frozen tower"), Features(tower, [["a"]], trained=True) as features:
        with features.of(["a"]):
            pass


def test_under_embed(tower):
    """From images to the model's input and back, two micro-batches that share an image and one that uses it twice."""
    table = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    micro_batches = [(["a", "b"], [0, 1, 2, 3, 4]), (["b", "c"], [0, 1, 2, 3, 0, 1, 2])]
    ids = torch.arange(12) % 9

    def run(features_of) -> None:
        for keys, rows in micro_batches:
            with features_of(keys) as features:
                slots = torch.arange(len(rows)) + 3
                packed_ops.embed(ids, table, features, slots, torch.tensor(rows)).cos().sum().backward()

    run(lambda keys: contextlib.nullcontext(torch.cat(tower(keys))))
    want = [x.grad.clone() for x in (*tower.parameters(), table)]
    for x in (*tower.parameters(), table):
        x.grad = None
    with Features(tower, [keys for keys, _ in micro_batches], trained=True) as features:
        run(features.of)
    for x, exact in zip((*tower.parameters(), table), want, strict=True):
        torch.testing.assert_close(x.grad, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("call", ["fcntl", "flock"])
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, call):
    def refused(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    store = ImageStore(SETTINGS, tmp_path)
    monkeypatch.setattr(f"fcntl.{call}", refused)
    with pytest.raises(ValueError, match=r"files there cannot be locked \(No locks available\).*data\.image_cache"):
        store.put(np.zeros((56, 56, 3), np.uint8))

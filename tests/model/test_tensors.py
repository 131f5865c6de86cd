"""Safetensors files: the same bytes as the safetensors package reads and writes, by rows and as a stream."""

import itertools
import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from actial_fast.model import tensors
from actial_fast.model.tensors import DTYPES, Stored, pieces, write


def some(dtype, *shape):
    value = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))) * 50
    return value > 0 if dtype is torch.bool else value.to(dtype)


TENSORS = {
    f"{name}/{'x'.join(map(str, shape)) or 'scalar'}": some(dtype, *shape)
    for name, dtype in DTYPES.items()
    for shape in ((), (5,), (3, 2, 4), (0, 3))
}


def layout(tensors):
    return {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}


def test_the_package_reads_what_is_written_and_the_reverse(tmp_path):
    asked = []
    narrow_first = layout(dict(reversed(TENSORS.items())))
    write(tmp_path / "ours.safetensors", narrow_first, lambda name: asked.append(name) or TENSORS[name])
    save_file(TENSORS, tmp_path / "theirs.safetensors")
    assert sorted(asked) == sorted(TENSORS) and not list(tmp_path.glob("*.part"))
    theirs, ours = load_file(tmp_path / "ours.safetensors"), Stored([tmp_path / "theirs.safetensors"])
    assert theirs.keys() == TENSORS.keys() == set(ours.names)
    for name, value in TENSORS.items():
        assert torch.equal(theirs[name], value) and theirs[name].dtype == value.dtype
        assert torch.equal(ours.rows(name), value) and ours.dtype(name) == value.dtype and ours.shape(name) == tuple(value.shape)
    with safe_open(tmp_path / "ours.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    header = (tmp_path / "ours.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", header[:8])
    assert length % 8 == 0
    for name, entry in json.loads(header[8 : 8 + length]).items():
        assert name == "__metadata__" or entry["data_offsets"][0] % TENSORS[name].element_size() == 0, "aligned"


@pytest.mark.parametrize("cuts", [(0, 7), (0, 3, 7), (0, 1, 1, 6, 7)])
def test_rows_over_several_files(cuts, tmp_path, monkeypatch):
    value = torch.arange(28.0).reshape(7, 4)
    for i, (start, stop) in enumerate(itertools.pairwise(cuts)):
        part = {"x": value[start:stop], f"own/{i}": torch.tensor(i)}
        write(tmp_path / f"{len(cuts) - i}.safetensors", layout(part), part.__getitem__, rows={"x": start, f"own/{i}": 0})
    stored = Stored(sorted(tmp_path.iterdir()))
    assert stored.shape("x") == (7, 4) and stored.rows("own/0") == 0
    for start in range(8):
        for stop in range(start, 8):
            assert torch.equal(stored.rows("x", start, stop), value[start:stop])
            low = torch.empty(stop - start, 4, dtype=torch.bfloat16)
            for chunk in (16, 40, 1 << 20):  # one row at a time, two, all
                monkeypatch.setattr(tensors, "CHUNK", chunk)
                stored.into(low.zero_(), "x", start)
                assert torch.equal(low, value[start:stop].bfloat16())


@pytest.mark.parametrize("starts", [(0, 4), (0, 2), (3, 6), (0, 0)])
def test_lost_or_doubled_rows_are_refused(starts, tmp_path):
    for start in starts:
        part = {"x": torch.ones(3, 2)}
        write(tmp_path / f"{start}{len(list(tmp_path.iterdir()))}.safetensors", layout(part), part.__getitem__, rows={"x": start})
    with pytest.raises(ValueError, match="rows of x are missing or there twice"):
        Stored(tmp_path.iterdir())


@pytest.mark.parametrize("size", [0, 5, 40, -1])
def test_cut_files_are_refused(size, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(9)}, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"x.safetensors: (not a whole safetensors file|has \d+ bytes, its header speaks of)"):
        pieces(path)


def test_other_files_and_dtypes_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"PK\x03\x04 a zip of pickles, with which somebody overwrote the file")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        pieces(path)
    save_file({"x": torch.ones(4).to(torch.float8_e4m3fn)}, path)
    with pytest.raises(ValueError, match="x is stored as F8_E4M3, which is not read here"):
        pieces(path)


def test_a_failed_write_leaves_nothing(tmp_path):
    def fail(name):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left on device") as error:
        write(tmp_path / "x.safetensors", {"x": (torch.float32, (2,))}, fail)
    assert error.value.filename == str(tmp_path / "x.safetensors") and not list(tmp_path.iterdir())

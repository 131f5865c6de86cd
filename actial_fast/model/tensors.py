"""Safetensors files read by rows and written as a stream, so that nobody holds more than the rows asked for, or one tensor to be written.

The safetensors package maps a file into memory, where every page read counts as resident, and builds a whole file in memory before it
writes it. Here a file is read with plain reads and written tensor after tensor behind a header made beforehand. A tensor may be cut by rows
(along its first dimension) over several files; where each piece begins stands in the header under DCP_SHARDING_INFO, as PyTorch's
distributed checkpoints have it: torch.distributed.checkpoint.HuggingFaceStorageReader reads such a folder, and the safetensors package
every file of it.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK = 1 << 25  # bytes read at a time where they must be converted or moved
LONGEST_HEADER = 100_000_000  # the format's own limit
SHARDING = "DCP_SHARDING_INFO"


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor in a file: their dtype and shape, the first row's index in the whole tensor, the first byte's in the file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    row: int
    byte: int

    @property
    def rows(self) -> int:
        """Rows; a scalar is one."""
        return self.shape[0] if self.shape else 1


class Stored:
    """The tensors of some files, by name; nothing but headers is held. ValueError for what is no whole safetensors file."""

    def __init__(self, files: Iterable[Path]):
        self._pieces: dict[str, list[Piece]] = {}
        for path in files:
            for name, piece in pieces(path).items():
                self._pieces.setdefault(name, []).append(piece)
        for name, found in self._pieces.items():
            found.sort(key=lambda piece: (piece.row, piece.rows))
            ends = [0, *(piece.row + piece.rows for piece in found)]
            if any(piece.row != end for piece, end in zip(found, ends, strict=False)):
                raise ValueError(
                    f"{found[0].path.parent}: rows of {name} are missing or there twice; a file of the folder was lost or added"
                )

    def __contains__(self, name: str) -> bool:
        return name in self._pieces

    @property
    def names(self) -> list[str]:
        """The tensors' names, in the order of the files."""
        return list(self._pieces)

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's shape."""
        found = self._pieces[name]
        return (found[-1].row + found[-1].rows, *found[0].shape[1:]) if found[0].shape else ()

    def dtype(self, name: str) -> torch.dtype:
        """The dtype it is stored in."""
        return self._pieces[name][0].dtype

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start:stop of a tensor (all of a scalar), on the CPU, in the stored dtype; no other rows are read."""
        shape = self.shape(name)
        stop = (shape[0] if shape else 1) if stop is None else stop
        out = torch.empty((stop - start, *shape[1:]) if shape else (), dtype=self.dtype(name))
        self.into(out, name, start)
        return out

    def into(self, out: Tensor, name: str, start: int = 0) -> None:
        """Fill `out` with rows of a tensor from `start` on, whatever its dtype and device; CHUNK bytes beside it at most, or one row."""
        rows = out.reshape(1) if out.ndim == 0 else out
        direct = out.device.type == "cpu" and out.dtype == self.dtype(name) and out.is_contiguous()
        for piece in self._pieces[name]:
            first, last = max(start, piece.row), min(start + len(rows), piece.row + piece.rows)
            if direct and first < last:
                _read(piece, first - piece.row, rows[first - start : last - start])
                continue
            each = max(1, CHUNK // max(1, math.prod(piece.shape[1:]) * piece.dtype.itemsize))
            for begin in range(first, last, each):
                end = min(begin + each, last)
                part = torch.empty((end - begin, *piece.shape[1:]), dtype=piece.dtype)
                _read(piece, begin - piece.row, part)
                rows[begin - start : end - start].copy_(part)


def pieces(path: Path) -> dict[str, Piece]:
    """What a file holds, by name, from its header alone. ValueError where it is not a whole safetensors file."""
    header, start = _header(path)
    offsets = json.loads(header.pop("__metadata__", {}).get(SHARDING, "{}"))
    found, end = {}, start
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path}: {name} is stored as {entry['dtype']}, which is not read here; known are {', '.join(DTYPES)}")
        begin, stop = (start + offset for offset in entry["data_offsets"])
        row = (offsets.get(name, {}).get("saved_offsets") or [0])[0]
        found[name] = Piece(path, DTYPES[entry["dtype"]], tuple(entry["shape"]), row, begin)
        end = max(end, stop)
    if (size := path.stat().st_size) != end:
        raise ValueError(f"{path}: has {size} bytes, its header speaks of {end}; copy or download it again")
    return found


def write(
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensor: Callable[[str], Tensor],
    *,
    rows: Mapping[str, int] | None = None,
) -> None:
    """Write a file of tensors of known dtypes and shapes, calling tensor(name) for one after the other and keeping none.

    rows: the index of each tensor's first row in the whole it is cut from, where the file holds pieces. The file appears under its name
    when all of it is on the disk. OSError, which names the path, where it cannot be written; what there is of it is then removed.
    """
    # the widest first, so that every tensor is aligned
    order = sorted(layout, key=lambda name: (-layout[name][0].itemsize, name))
    metadata = {"format": "pt"}
    if rows is not None:
        metadata[SHARDING] = json.dumps(
            {n: {"saved_offsets": [rows[n], *[0] * len(layout[n][1][1:])] if layout[n][1] else []} for n in order}
        )
    header: dict[str, object] = {"__metadata__": metadata}
    at = 0
    for name in order:
        dtype, shape = layout[name]
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb", buffering=0) as file:
            _write(file.write, memoryview(struct.pack("<Q", len(text)) + text))
            for name in order:
                _write(file.write, _bytes(_checked(name, tensor(name), layout[name])))
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def sync(path: Path, *, deep: bool = True) -> None:
    """Have a folder, and with `deep` all in it, on the disk before this returns."""
    for each in [*sorted(path.rglob("*"), reverse=True), path] if deep else [path]:
        handle = os.open(each, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _checked(name: str, value: Tensor, expected: tuple[torch.dtype, tuple[int, ...]]) -> Tensor:
    assert (value.dtype, tuple(value.shape)) == expected, f"{name}: {value.dtype} {tuple(value.shape)}, the header has {expected}"
    return value


def _header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The header, and where the data begins."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > LONGEST_HEADER:
                raise ValueError("its header is longer than the format allows")
            header = json.loads(file.read(length))
    except (struct.error, ValueError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
    return header, 8 + length


def _bytes(value: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU; of its own memory where it is contiguous."""
    return value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _read(piece: Piece, first: int, out: Tensor) -> None:
    """Rows of a piece, from its row `first` on, into `out`, which is contiguous."""
    into = _bytes(out)
    with open(piece.path, "rb", buffering=0) as file:
        file.seek(piece.byte + first * math.prod(piece.shape[1:]) * piece.dtype.itemsize)
        done = 0
        while done < len(into):  # one call gives 2 GiB at most
            count = file.readinto(into[done:])
            if not count:
                raise OSError(f"{piece.path}: ended before its header said")
            done += count


def _write(write: Callable[[memoryview], int | None], data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += write(data[done:]) or 0

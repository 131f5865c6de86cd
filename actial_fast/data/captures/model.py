"""The files of a COLMAP model: which of several is read, and whether they are whole.

pycolmap reads what is there. A file that is cut short, or has other bytes in it, may read as a count in the billions, over which it would
sit for minutes; the lengths of all records are therefore walked through first, which takes milliseconds.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

MAIN = ("images.bin", "images.txt")
PARAMETERS = (3, 4, 4, 5, 8, 8, 12, 5, 4, 5, 12, 16, 4, 5, 3, 4, 6, 2)  # numbers of a camera, by COLMAP's number of its model
_Walk = Callable[[bytes, int], int]


class Damaged(ValueError):
    """A file does not hold the records that it announces."""


def model_folder(sparse: Path) -> Path | None:
    """The folder with the model that has most images: sparse/ itself or one of its subfolders, the first by name of equal ones; None where
    there is no model."""
    folders = [sparse, *sorted(path for path in sparse.iterdir() if path.is_dir())] if sparse.is_dir() else []
    found = [folder for folder in folders if any((folder / name).is_file() for name in MAIN)]
    return max(found, key=_images, default=None)  # of equal ones max takes the first


def _images(folder: Path) -> int:
    """How many images a model announces; 0 for one that cannot be read."""
    try:
        if (binary := folder / MAIN[0]).is_file():
            with open(binary, "rb") as file:
                return int.from_bytes(file.read(8), "little")
        with open(folder / MAIN[1], errors="replace") as text:
            return sum(1 for line in text if not line.startswith("#")) // 2  # two lines an image
    except OSError:
        return 0


def check_files(folder: Path) -> None:
    """Damaged, naming the file, for a binary model one of whose files ends before its records do."""
    for name, walk in WALKS.items():
        file = folder / name
        if not file.is_file():
            continue
        data = file.read_bytes()
        try:
            count, at = struct.unpack_from("<Q", data)[0], 8
            if count * 8 > len(data):  # no record of any kind is shorter
                raise IndexError
            for _ in range(count):
                at = walk(data, at)
                if at > len(data):
                    raise IndexError
        except (struct.error, IndexError, ValueError):
            raise Damaged(f"{name} is {len(data)} bytes and cannot hold the records it announces") from None


def _camera(data: bytes, at: int) -> int:
    model = struct.unpack_from("<i", data, at + 4)[0]
    return at + 24 + 8 * (PARAMETERS[model] if 0 <= model < len(PARAMETERS) else 1)


def _image(data: bytes, at: int) -> int:
    end = data.index(0, at + 64) + 1  # id, pose and camera, then the name
    return end + 8 + 24 * struct.unpack_from("<Q", data, end)[0]


def _point(data: bytes, at: int) -> int:
    return at + 51 + 8 * struct.unpack_from("<Q", data, at + 43)[0]


def _rig(data: bytes, at: int) -> int:
    sensors = struct.unpack_from("<I", data, at + 4)[0]
    at += 8 + (8 if sensors else 0)
    for _ in range(sensors - 1 if sensors else 0):
        at += 9 + (56 if data[at + 8] else 0)  # with or without a pose
    return at


def _frame(data: bytes, at: int) -> int:
    return at + 68 + 16 * struct.unpack_from("<I", data, at + 64)[0]


WALKS: dict[str, _Walk] = {
    "cameras.bin": _camera,
    "images.bin": _image,
    "points3D.bin": _point,
    "rigs.bin": _rig,
    "frames.bin": _frame,
}

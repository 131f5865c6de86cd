"""Every image is decoded and resized once, and kept on disk as uint8 pixels.

`ImageStore` maps the content of an image to its pixels at their final size, for all threads, ranks and runs of a machine. They stay uint8
until they are on the device (packed_ops), and the vision tower sees each once (features).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import mmap
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from actial_fast.data.sources.cache import folder as cache_folder
from actial_fast.data.sources.picture import MAX_PIXELS, check_aspect, decode, read, shown

VERSION = 2  # of the files and of what is in them
RECORD = struct.Struct("<16sQIIII")  # key, first byte, height, width, checksum of the pixels, checksum of the record so far
ALIGN = 64  # bytes; images start at multiples of it
GROWTH = 64 << 20  # bytes by which the file of pixels grows, sparse, so that it is rarely mapped anew
LOCKS = 64


@dataclass(frozen=True)
class ImageSettings:
    """How pixels become patches: those of Qwen2-VL's image processor.

    patch: pixels a side; merge: patches a side of a merged token; frames: times an image is repeated; min_pixels, max_pixels: of the
    resized image; resample: PIL's filter; mean, std: per channel, of values in [0, 1].
    """

    patch: int
    merge: int
    frames: int
    min_pixels: int
    max_pixels: int
    resample: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @staticmethod
    def of(processor: Any) -> ImageSettings:
        """The settings of a transformers Qwen2VLImageProcessor."""
        size = processor.size
        return ImageSettings(
            patch=processor.patch_size,
            merge=processor.merge_size,
            frames=processor.temporal_patch_size,
            min_pixels=size["shortest_edge"],
            max_pixels=size["longest_edge"],
            resample=int(processor.resample),
            mean=tuple(processor.image_mean),
            std=tuple(processor.image_std),
        )

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing: multiples of patch * merge within the pixel limits, as transformers' smart_resize.

        ValueError for an empty image or one more than 200 times as long as wide (picture.check_aspect).
        """
        check_aspect(height, width, "image")
        side = self.patch * self.merge
        sizes = [round(x / side) * side for x in (height, width)]
        if math.prod(sizes) > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            sizes = [max(side, math.floor(x / shrink / side) * side) for x in (height, width)]
        elif math.prod(sizes) < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            sizes = [math.ceil(x * grow / side) * side for x in (height, width)]
        return sizes[0], sizes[1]

    def fit(self, pixels: np.ndarray, where: str) -> np.ndarray:
        """uint8 (H, W, 3) at the size the image processor would give it; BadRow for a shape that `size` refuses."""
        check_aspect(pixels.shape[0], pixels.shape[1], where)
        height, width = self.size(*pixels.shape[:2])
        if (height, width) == pixels.shape[:2]:
            return pixels
        return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling(self.resample)))


class ImageStore:
    """Images at their final size, each decoded once by whoever needs it first, in memory-mapped files.

    folder: where the stores of all settings live, default $XDG_CACHE_HOME/actial_fast/images (~/.cache without it). A store is a folder in
    it, named by the settings that change pixels: `pixels` holds 3 * height * width bytes an image (752,640 for 320 merged tokens of
    28 x 28), `index` 40 bytes. Both only grow; delete the folder when no run uses it. Threads and processes of one machine may share a
    store, forked ones included. What a killed writer left half done has no record, or one whose checksum fails, and is done again. A store
    that may only be read gives what it holds.

    limit: images with more pixels are refused.
    """

    def __init__(self, settings: ImageSettings, folder: Path | None = None, limit: int = MAX_PIXELS):
        self.settings, self.limit = settings, limit
        shape = (VERSION, settings.patch * settings.merge, settings.min_pixels, settings.max_pixels, settings.resample)
        self._salt = hashlib.blake2b(repr(shape).encode(), digest_size=8).digest()
        cache = cache_folder() / "images"
        self._root, self.folder = folder, (folder or cache) / self._salt.hex()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{self.folder}: cannot be made ({error}); set XDG_CACHE_HOME to a folder that can be written") from None
        self._mutex = threading.RLock()
        self._found: dict[str, tuple[int, int, int, int]] = {}  # key -> first byte, height, width, checksum
        self._sound: set[str] = set()  # keys whose checksum was seen to hold
        self._files: dict[Path, tuple[tuple[int, int], str]] = {}  # of files read: size and time, key
        self._read = self._end = 0  # bytes of the index that were read, bytes of pixels that these tell of
        self._map: mmap.mmap | bytes = b""
        self.decodes = 0
        """Images this object has decoded and resized."""
        self.hits = 0
        """Images it was given that had been decoded before."""

    def __reduce__(self) -> tuple[type[ImageStore], tuple[Any, ...]]:
        return ImageStore, (self.settings, self._root, self.limit)

    def put(self, image: Path | bytes | Image.Image | np.ndarray, where: str = "") -> str:
        """The key of an image, which is decoded, resized and kept if nobody has before.

        image: a file, its bytes, a PIL image, or uint8 (H, W, 3). Equal bytes have one key, and so have equal pixels. Raises BadRow, naming
        `where`, for one that is missing, cannot be decoded or has a shape that `size` refuses; ValueError when it cannot be kept.
        """
        data, key = self._content(image, where)
        if self._sound_entry(key) is None and self._keep(key, lambda: self.settings.fit(self._decode(data, image, where), where)):
            with self._mutex:
                self.decodes += 1
            return key
        with self._mutex:
            self.hits += 1
        return key

    def __contains__(self, key: str) -> bool:
        """Whether the store has an image of this key."""
        return self._sound_entry(key) is not None

    def keep(self, key: str, pixels: np.ndarray) -> None:
        """Keep an image that another store of the same settings has under this key: pixels (H, W, 3) uint8, as its `pixels` gives them.
        ValueError when it cannot be kept."""
        self._keep(key, lambda: pixels)

    def _keep(self, key: str, pixels: Callable[[], np.ndarray]) -> bool:
        """Keep what `pixels` gives unless the store has it, and whether that was so; whoever else wants this image waits for us."""
        try:
            with _locked(self.folder / f"lock{int(key[:8], 16) % LOCKS:02}"):
                if missing := self._sound_entry(key) is None:
                    self._append(key, pixels())
                return missing
        except OSError as error:
            raise ValueError(
                f"{self.folder}: cannot keep an image ({error.strerror}); free space there, or name another folder (data.image_cache, or "
                "XDG_CACHE_HOME)"
            ) from None

    def pixels(self, key: str) -> np.ndarray:
        """The image as uint8 (H, W, 3), a read-only view of the file. KeyError for a key that `put` did not give."""
        start, height, width, _ = self._entry(key)
        return np.frombuffer(self._mapped(start + 3 * height * width), np.uint8, 3 * height * width, start).reshape(height, width, 3)

    def grid(self, key: str) -> tuple[int, int, int]:
        """(frames, rows, columns) in patches, as transformers' image_grid_thw. KeyError for a key that `put` did not give."""
        _, height, width, _ = self._entry(key)
        return 1, height // self.settings.patch, width // self.settings.patch

    def _content(self, image: Path | bytes | Image.Image | np.ndarray, where: str) -> tuple[bytes | np.ndarray, str]:
        """What is decoded, and its key. A file that has not changed since it was last read is not read again."""
        stamp = None
        data: bytes | np.ndarray
        if isinstance(image, Path):
            with contextlib.suppress(OSError, ValueError):  # what is wrong is said by whoever reads it
                status = image.stat()
                stamp = status.st_size, status.st_mtime_ns
            known, key = self._files.get(image, (None, ""))
            if stamp and known == stamp and self._sound_entry(key):
                return b"", key
            data = read(image, where)
        elif isinstance(image, Image.Image):
            data = np.asarray(shown(image, where))
        else:
            data = image
        if isinstance(data, np.ndarray):
            assert data.dtype == np.uint8 and data.ndim == 3 and data.shape[2] == 3, "pixels are uint8 (H, W, 3)"
            data = np.ascontiguousarray(data)
        digest = hashlib.blake2b(digest_size=16, salt=self._salt)
        digest.update(repr(data.shape if isinstance(data, np.ndarray) else "encoded").encode())
        digest.update(data.reshape(-1).data if isinstance(data, np.ndarray) else data)
        key = digest.hexdigest()
        if stamp and isinstance(image, Path):
            self._files[image] = stamp, key
        return data, key

    def _decode(self, data: bytes | np.ndarray, image: Any, where: str) -> np.ndarray:
        if isinstance(data, np.ndarray):
            return data
        return decode(data, where, self.limit, file=image if isinstance(image, Path) else None)

    def _entry(self, key: str) -> tuple[int, int, int, int]:
        if (entry := self._sound_entry(key)) is None:
            raise KeyError(f"{key}: {self.folder} holds no sound image of this key; put it")
        return entry

    def _sound_entry(self, key: str) -> tuple[int, int, int, int] | None:
        """An entry whose pixels are what was written, or None; the pixels are read through once a process."""
        with self._mutex:
            if key not in self._found:
                with _locked(self.folder / "index", fcntl.LOCK_SH) as index:
                    self._refresh(index)
            entry = self._found.get(key)
            if entry and key not in self._sound:
                start, height, width, checksum = entry
                end = start + 3 * height * width
                whole = self._mapped(end)
                if len(whole) < end or zlib.crc32(memoryview(whole)[start:end]) != checksum:
                    del self._found[key]
                    return None
                self._sound.add(key)
            return entry

    def _refresh(self, index: int) -> None:
        """Reads the records that were added. A record that is incomplete or wrong was torn: it tells of nothing."""
        size = os.fstat(index).st_size
        data = os.pread(index, (size - self._read) // RECORD.size * RECORD.size, self._read)
        for at in range(0, len(data), RECORD.size):
            key, start, height, width, checksum, own = RECORD.unpack_from(data, at)
            if own == zlib.crc32(data[at : at + RECORD.size - 4]):
                self._found[key.hex()] = start, height, width, checksum
                self._end = max(self._end, start + 3 * height * width)
        self._read += len(data)

    def _append(self, key: str, pixels: np.ndarray) -> None:
        """Pixels first, then their record, so that a record is never ahead of them."""
        with self._mutex, _locked(self.folder / "index") as index:
            self._refresh(index)
            data = np.ascontiguousarray(pixels).data.cast("B")
            start = -(-self._end // ALIGN) * ALIGN
            end = start + len(data)
            with _opened(self.folder / "pixels") as file:
                if os.fstat(file).st_size < end:
                    os.ftruncate(file, -(-end // GROWTH) * GROWTH)
                _write(file, data, start)
            entry = start, *pixels.shape[:2], zlib.crc32(data)
            record = RECORD.pack(bytes.fromhex(key), *entry, 0)[:-4]
            _write(index, memoryview(record + struct.pack("<I", zlib.crc32(record))), self._read)
            self._read += RECORD.size
            self._found[key], self._end = entry, end
            self._sound.add(key)

    def _mapped(self, end: int) -> mmap.mmap | bytes:
        """The file of pixels in memory, mapped anew when it has grown; arrays on an older map keep that one."""
        with self._mutex:
            if len(self._map) < end:
                with _opened(self.folder / "pixels", read_only=True) as file:
                    self._map = mmap.mmap(file, 0, access=mmap.ACCESS_READ) if os.fstat(file).st_size else b""
            return self._map


@contextlib.contextmanager
def _opened(path: Path, read_only: bool = False) -> Iterator[int]:
    """The file, made where there is none. read_only: it may be one that cannot be written."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError:
        if not (read_only and path.exists()):
            raise
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield file
    finally:
        os.close(file)


@contextlib.contextmanager
def _locked(path: Path, how: int = fcntl.LOCK_EX) -> Iterator[int]:
    """The file, opened and locked against every other opening of it: another thread's, a forked child's, another process's."""
    with _opened(path, read_only=how == fcntl.LOCK_SH) as file:
        try:
            fcntl.flock(file, how)
        except OSError as error:
            raise ValueError(
                f"{path.parent}: files there cannot be locked ({error.strerror}), which keeping images needs; name a folder on another "
                "file system (data.image_cache, or XDG_CACHE_HOME)"
            ) from None
        yield file


def _write(file: int, data: memoryview, at: int) -> None:
    while data:
        written = os.pwrite(file, data, at)
        data, at = data[written:], at + written

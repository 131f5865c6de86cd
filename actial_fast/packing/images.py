"""Every image is decoded and resized once, and kept on disk as uint8 pixels.

`ImageStore` maps the content of an image to its pixels at their final size, for all threads, ranks and runs of a machine. They stay uint8
until they are on the device (packed_ops), and the vision tower sees each once (features).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import struct
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from actial_fast.data.sources.cache import folder as cache_folder
from actial_fast.data.sources.picture import MAX_PIXELS, check_aspect, decode, read, shown
from actial_fast.data.sources.told import told
from actial_fast.packing.claims import Claim, Claims, Key, alone
from actial_fast.packing.room import LOCKS, add, place

VERSION = 3  # of the files and of what is in them
HEADER = struct.Struct("<16sIII36x")  # of a file, before its pixels: key, height, width, checksum of the pixels
GB = 10**9
MOST = 200 * GB  # bytes of all stores by default: of two frames each at the recipes' sizes, 100,000 rows take half
UNLOCKABLE = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


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
    """Images at their final size, each decoded once by whoever needs it first, in a file each.

    folder: where the stores of all settings live, default $XDG_CACHE_HOME/actial_fast/images (~/.cache without it). A store is a folder in
    it, named by the settings that change pixels; an image takes 3 * height * width bytes (752,640 for 320 merged tokens of 28 x 28).
    Threads and processes of one machine may share a store, forked ones included. What a killed writer left half done has no name yet and
    is done again, and so is what is damaged: it has a checksum. A store that may only be read gives what it holds.

    limit: images with more pixels are refused. most: bytes that all stores of the folder may take; 0 is no limit. Beyond it those go that
    were not used for longest, but none whose key is alive in some process (claims.Key): where these alone are more, it is exceeded, and
    that is told.
    """

    def __init__(self, settings: ImageSettings, folder: Path | None = None, limit: int = MAX_PIXELS, most: int = MOST):
        self.settings, self.limit, self.most = settings, limit, most
        shape = (VERSION, settings.patch * settings.merge, settings.min_pixels, settings.max_pixels, settings.resample)
        self._salt = hashlib.blake2b(repr(shape).encode(), digest_size=8).digest()
        cache = cache_folder() / "images"
        self._root, self.folder = folder, (folder or cache) / self._salt.hex()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{self.folder}: cannot be made ({error}); set XDG_CACHE_HOME to a folder that can be written") from None
        self._claims = Claims(self.folder / LOCKS)
        self._sizes: dict[str, tuple[int, int]] = {}  # of images whose checksum was seen to hold: height, width, by the text of their key
        self._files: dict[Path, tuple[tuple[int, int], str]] = {}  # of files read: size and time, key
        self._mutex = threading.Lock()
        self.decodes = 0
        """Images this object has decoded and resized."""
        self.hits = 0
        """Images it was given that had been decoded before."""

    def __reduce__(self) -> tuple[type[ImageStore], tuple[Any, ...]]:
        return ImageStore, (self.settings, self._root, self.limit, self.most)

    def put(self, image: Path | bytes | Image.Image | np.ndarray, where: str = "") -> Key:
        """The key of an image, which is decoded, resized and kept if nobody has before. While the key is alive, so is the image.

        image: a file, its bytes, a PIL image, or uint8 (H, W, 3). Equal bytes have one key, and so have equal pixels. Raises BadRow, naming
        `where`, for one that is missing, cannot be decoded or has a shape that `size` refuses; ValueError when it cannot be kept.
        """
        data, key = self._content(image, where)
        made = not self.hold(key) and self._keep(key, lambda: self.settings.fit(self._decode(data, image, where), where))
        with self._mutex:
            self.decodes += made
            self.hits += not made
        return key

    def hold(self, key: str) -> bool:
        """Keep an image from being removed while this Key is alive, and whether there is one. ValueError where files cannot be locked."""
        if isinstance(key, Key) and key.claim is None:
            key.claim = self._claimed(key)
        if self._size(key) is not None:
            with contextlib.suppress(OSError):  # one that may only be read
                os.utime(place(self.folder, key))
            return True
        if isinstance(key, Key):
            key.claim = None
        return False

    def keep(self, key: str, pixels: np.ndarray) -> None:
        """Keep an image that another store of the same settings has under this key, and hold it: pixels (H, W, 3) uint8, as its `pixels`
        gives them. ValueError when it cannot be kept."""
        self._keep(key, lambda: pixels)

    def pixels(self, key: str) -> np.ndarray:
        """The image as uint8 (H, W, 3). KeyError for one that `put` has not given, or that was removed since its key was let go of."""
        if (found := self._read(key)) is None:
            raise KeyError(f"{key}: {self.folder} holds no sound image of this key; put it")
        return found

    def copy(self, key: str, out: np.ndarray) -> None:
        """Read the image into `out`, uint8 (3 * H * W,), contiguous. KeyError as `pixels`."""
        if self._read(key, out) is None:
            raise KeyError(f"{key}: {self.folder} holds no sound image of this key; put it")

    def grid(self, key: str) -> tuple[int, int, int]:
        """(frames, rows, columns) in patches, as transformers' image_grid_thw. KeyError as `pixels`."""
        height, width = self._sizes.get(key) or self.pixels(key).shape[:2]
        return 1, height // self.settings.patch, width // self.settings.patch

    def _claimed(self, key: str) -> Claim:
        try:
            return self._claims.claim(key)
        except OSError as error:
            raise self._unlockable(error) from None

    def _unlockable(self, error: OSError) -> ValueError:
        return ValueError(
            f"{self.folder}: files there cannot be locked ({error.strerror}), which keeping images needs; name a folder on another "
            "file system (data.image_cache, or XDG_CACHE_HOME)"
        )

    def _keep(self, key: str, pixels: Callable[[], np.ndarray]) -> bool:
        """Keep what `pixels` gives unless the store has it, and whether that was so; whoever else wants this image waits for us."""
        try:
            with alone(self.folder / LOCKS, key):
                if self.hold(key):
                    return False
                claim = self._claimed(key)  # from here on, so that no one takes the file away before it has its name
                if isinstance(key, Key):
                    key.claim = claim
                image = np.ascontiguousarray(pixels())
                over = add(self.folder, key, _packed(key, image), self.most)
        except OSError as error:
            if error.errno in UNLOCKABLE:
                raise self._unlockable(error) from None
            raise ValueError(
                f"{self.folder}: cannot keep an image ({error.strerror}); free space there, name another folder (data.image_cache, or "
                "XDG_CACHE_HOME), or let it take less (data.image_cache_gb)"
            ) from None
        self._sizes[str(key)] = image.shape[0], image.shape[1]
        if over:
            told(f"running steps need more images than the {self.most / GB:g} GB of data.image_cache_gb hold: exceeded", str(self.folder))
        return True

    def _size(self, key: str) -> tuple[int, int] | None:
        """Height and width of an image that is there, or None; its pixels are read through once a process."""
        if (known := self._sizes.get(key)) and place(self.folder, key).exists():
            return known
        self._sizes.pop(key, None)
        found = self._read(key)
        return None if found is None else (found.shape[0], found.shape[1])

    def _read(self, key: str, out: np.ndarray | None = None) -> np.ndarray | None:
        """The image, in `out` if given; None where there is none, or none that is whole."""
        try:
            file = open(place(self.folder, key), "rb")
        except FileNotFoundError:
            return None
        with file:
            head = file.read(HEADER.size)
            if len(head) < HEADER.size:
                return None
            name, height, width, checksum = HEADER.unpack(head)
            size = 3 * height * width
            if name.hex() != key or os.fstat(file.fileno()).st_size != HEADER.size + size:
                return None
            pixels = np.empty(size, np.uint8) if out is None else out
            if file.readinto(pixels.data) != size:
                return None
        if key not in self._sizes:
            if zlib.crc32(pixels.data) != checksum:
                return None
            self._sizes[str(key)] = height, width
        return pixels.reshape(height, width, 3)

    def _content(self, image: Path | bytes | Image.Image | np.ndarray, where: str) -> tuple[bytes | np.ndarray, Key]:
        """What is decoded, and its key. A file that has not changed since it was last read is not read again."""
        stamp = None
        data: bytes | np.ndarray
        if isinstance(image, Path):
            with contextlib.suppress(OSError, ValueError):  # what is wrong is said by whoever reads it
                status = image.stat()
                stamp = status.st_size, status.st_mtime_ns
            known, text = self._files.get(image, (None, ""))
            if stamp and known == stamp and self.hold(key := Key(text)):
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
        key = Key(digest.hexdigest())
        if stamp and isinstance(image, Path):
            self._files[image] = stamp, str(key)  # the text: a key would claim the image for ever
        return data, key

    def _decode(self, data: bytes | np.ndarray, image: Any, where: str) -> np.ndarray:
        if isinstance(data, np.ndarray):
            return data
        return decode(data, where, self.limit, file=image if isinstance(image, Path) else None)


def _packed(key: str, image: np.ndarray) -> tuple[bytes, memoryview]:
    """What the file of an image holds: its header and its pixels."""
    pixels = image.data.cast("B")
    return HEADER.pack(bytes.fromhex(key), *image.shape[:2], zlib.crc32(pixels)), pixels

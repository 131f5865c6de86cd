"""Claims on the images of a store: while one lives, no process removes its image.

A claim is a shared lock on a byte of a file, the byte that the image's key names (fcntl(2), of an open file description). The kernel lets
go of it when its process ends, whatever ends it, so that nothing is left behind that would have to be cleaned up. Who wants to remove an
image, or to make one, locks its byte for himself alone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import threading
import weakref
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path

MAKING = 1 << 61  # added to the byte of an image: who holds that makes the image, and others who want it wait
BUSY = (errno.EACCES, errno.EAGAIN)


class Key(str):
    """An image's key, and with it a claim: while it is alive, no process removes the image, however little room there is.

    Sent to another process it arrives as the text alone; ImageStore.hold claims it there.
    """

    claim: Claim | None = None

    def __reduce__(self) -> tuple[type[Key], tuple[str]]:
        return Key, (str(self),)


class Claim:
    """A share in a lock; it ends with this object. It has the key's text: a Key in its place would never end."""

    __slots__ = ("_claims", "_key", "_process")

    def __init__(self, claims: Claims, key: str):
        self._claims, self._key, self._process = claims, str(key), os.getpid()

    def __del__(self) -> None:
        if self._process == os.getpid():  # a forked child has its parent's objects, and no business with its locks
            self._claims.drop(self._key)


class Claims:
    """The claims of one process on the images of a store. Threads may share it.

    path: the file whose bytes are locked; where it can neither be written nor made, nothing is claimed, since nothing could be removed.
    """

    _process = 0

    def __init__(self, path: Path):
        self._path = path
        self._file: int | None = None
        self._begin()
        _ALL.add(self)

    def __del__(self) -> None:
        file, self._file = self._file, None  # claims may be collected after this
        if self._process == os.getpid() and file is not None:
            os.close(file)

    def claim(self, key: str) -> Claim:
        """A claim on an image, whether it is there or not. OSError where files cannot be locked."""
        key = str(key)
        with self._mutex:
            self._settle()
            if self._file is not None and not self._held[key]:
                lock(self._file, fcntl.F_RDLCK, key)
            self._held[key] += 1
        return Claim(self, key)

    def drop(self, key: str) -> None:
        """End a claim. It may be called at any moment, also by a thread that is just claiming: then that does it afterwards."""
        self._gone.append(key)
        if self._mutex.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._mutex.release()

    def _begin(self) -> None:
        """Of a new process, a forked one included: its own description of the file, and no claims yet."""
        if self._file is not None:
            os.close(self._file)
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError:
            self._file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC) if self._path.exists() else None
        self._mutex, self._held, self._gone, self._process = threading.Lock(), Counter[str](), deque[str](), os.getpid()

    def _settle(self) -> None:
        while self._gone:
            key = self._gone.popleft()
            self._held[key] -= 1
            if not self._held[key]:
                del self._held[key]
                if self._file is not None:
                    lock(self._file, fcntl.F_UNLCK, key)


_ALL: weakref.WeakSet[Claims] = weakref.WeakSet()


def _forked() -> None:
    for claims in list(_ALL):
        claims._begin()


os.register_at_fork(after_in_child=_forked)


@contextlib.contextmanager
def alone(path: Path, key: str) -> Iterator[None]:
    """In a with block nobody else, thread or process, makes this image. OSError where files cannot be locked."""
    with opened(path) as file:
        lock(file, fcntl.F_WRLCK, key, MAKING)
        yield


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """The file's descriptor, made where there is none, closed at the end, and with it its locks."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        yield file
    finally:
        os.close(file)


def lock(file: int, how: int, key: str, offset: int = 0, *, wait: bool = True) -> bool:
    """Lock the byte of an image, F_RDLCK, F_WRLCK or F_UNLCK; without `wait`, whether that could be done at once."""
    request = struct.pack("hhqqi4x", how, os.SEEK_SET, offset + int(key[:15], 16), 1, 0)  # struct flock of 64-bit Linux
    try:
        fcntl.fcntl(file, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, request)
    except OSError as error:
        if error.errno in BUSY and not wait:
            return False
        raise
    return True

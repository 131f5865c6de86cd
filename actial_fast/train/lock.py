"""One live run a stage's folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder is this process's while the block runs, and nobody's once the process is gone, however it ended.

    ValueError where another process has it, naming that one. Creates the folder. A file system without locks is used without.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise ValueError(f"run: {folder} is in use by {owner}; wait for it, stop it, or choose another run folder") from None
        except OSError:  # the file system has no locks
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield

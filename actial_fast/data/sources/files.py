"""Errors of files that say which file."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """In a with block that writes to `path`, errors of the disk name it: that of a full one, which comes with a write, names no file."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def reason(error: OSError) -> str:
    """What an error of the disk says, in a line: the file, where it names one, and what was wrong; of several, as a folder that was not
    copied raises them, the first."""
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list) and error.args[0]:
        return str(error.args[0][0][-1])
    if error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    return str(error).strip().split("\n")[0]  # transformers appends paragraphs of advice

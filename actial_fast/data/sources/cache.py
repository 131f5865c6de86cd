"""Where what is kept between runs lies: decoded images, converted tables, measured rates."""

from __future__ import annotations

import os
from pathlib import Path


def folder() -> Path:
    """$XDG_CACHE_HOME/actial_fast, or ~/.cache/actial_fast."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "actial_fast"

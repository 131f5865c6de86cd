"""Which model it was: a name made from a checkpoint's content, and the step it was made at."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from actial_fast.data.sources.content import content
from actial_fast.model.weights import resolve
from actial_fast.train.checkpoint import steps

COUNTED = ("*.safetensors", "*.json", "*.jinja", "*.txt")  # weights, configurations, tokenizer and chat template
DROPPED = ("model", "final")  # ends of a path that every stage's has


def label(path: str) -> str:
    """What a model is called in tables where nobody says: RUN/STAGE of a run's folder, a hub name as it is."""
    parts = Path(path).parts
    while len(parts) > 1 and parts[-1] in DROPPED:
        parts = parts[:-1]
    return "/".join(parts[-2:]).strip("/") or path


def identity(path: str) -> dict[str, Any]:
    """path: as given; content: the same for equal files of a checkpoint, wherever they lie; step: of a run's checkpoint, else None.

    ValueError where it is no checkpoint; a hub name is downloaded.
    """
    folder, digest = resolve(path), hashlib.blake2b(digest_size=12)
    for file in sorted({file for pattern in COUNTED for file in folder.glob(pattern)}):
        digest.update(f"{file.name}\0{content(file, here=False)}\0".encode())
    return {"path": path, "content": digest.hexdigest(), "step": _step(folder)}


def _step(folder: Path) -> int | None:
    if found := re.search(r"step-(\d+)", "/".join(folder.parts[-3:])):
        return int(found[1])
    last = steps(folder.parent.parent) if folder.name == "model" and folder.parent.name == "final" else []
    return last[-1] if last else None

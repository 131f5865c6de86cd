"""Replies of a step, on disk as soon as they are drawn, so that a run that is stopped or killed while it samples draws only the rest when
it goes on.

RUN/NAME/replies/step-000013-1f0c2b3a/00000052.safetensors   one batch of groups, named by its first prompt's position in the stream: for
                                                             each its replies' ids and log-probs end to end, their lengths, whether
                                                             each ended by itself, and of episodes which tokens are the model's own
They hold for the weights they were drawn with: those that step 13 begins with, or, with rollout.ahead, those of the step before. Files
appear whole or not at all.
"""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from actial_fast.rollout.protocol import Reply

PARTS = {"ids", "logprobs", "lengths", "finished"}
OWN = "own"  # of episodes, beside these


class Kept:
    """The replies of one step that a stage's folder keeps, by the step and a digest of the run: what other runs have there was drawn with
    other weights. Ranks share the folder, each writes its own groups."""

    def __init__(self, folder: Path, digest: str, step: int = 0):
        self._stage, self._digest = folder, digest
        self.folder = self._of(step)

    def _of(self, step: int) -> Path:
        return self._stage / "replies" / f"step-{step:06d}-{self._digest}"

    def at(self, step: int) -> Kept:
        """Those of a step."""
        return Kept(self._stage, self._digest, step)

    def forget(self, but: Collection[int] = ()) -> None:
        """Remove what there is of all steps and runs, but of these steps of this run."""
        for other in set((self._stage / "replies").glob("step-*")) - {self._of(step) for step in but}:
            shutil.rmtree(other, ignore_errors=True)

    def load(self, positions: Sequence[int], n: int) -> dict[int, list[Reply]]:
        """Position -> its n replies, for those positions that are there; episodes without their pictures (episodes.restored)."""
        wanted, found = set(positions), {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                tensors = load_file(path)
            except (OSError, SafetensorError):  # the disk lost it: it is drawn again
                continue
            groups: dict[int, dict[str, np.ndarray]] = defaultdict(dict)
            for name, value in tensors.items():
                position, _, part = name.partition("/")
                groups[int(position)][part] = value
            for place, parts in groups.items():
                if place in wanted and set(parts) - {OWN} == PARTS and len(parts["lengths"]) == n:
                    found[place] = _replies(parts)
        return found

    def add(self, groups: Mapping[int, Sequence[Reply]]) -> None:
        """Keep the replies of a batch by their prompts' positions. ValueError where the disk does not take them."""
        tensors = {}
        for position, replies in groups.items():
            tensors[f"{position}/ids"] = np.concatenate([r.ids for r in replies])
            tensors[f"{position}/logprobs"] = np.concatenate([r.logprobs for r in replies])
            tensors[f"{position}/lengths"] = np.array([len(r.ids) for r in replies], np.int64)
            tensors[f"{position}/finished"] = np.array([r.finished for r in replies], np.uint8)
            if own := [r.own for r in replies if r.own is not None]:
                tensors[f"{position}/{OWN}"] = np.concatenate(own).astype(np.uint8)
        path = self.folder / f"{min(groups):08d}.safetensors"
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, temporary)
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self.folder}: cannot keep replies ({error}); free space on the disk of the run") from None


def _replies(parts: Mapping[str, np.ndarray]) -> list[Reply]:
    ends = np.cumsum(parts["lengths"])[:-1]
    own = np.split(parts[OWN].astype(bool), ends) if OWN in parts else [None] * len(parts["lengths"])
    drawn = zip(np.split(parts["ids"], ends), np.split(parts["logprobs"], ends), parts["finished"].tolist(), own, strict=True)
    return [Reply(ids, logprobs, bool(finished), own=mine) for ids, logprobs, finished, mine in drawn]

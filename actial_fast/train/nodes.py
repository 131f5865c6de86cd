"""Ranks on several machines: what all of them must see alike, and images that only some of them have."""

from __future__ import annotations

import contextlib
import secrets
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch.distributed as dist

from actial_fast.data.sources.places import files_of, is_remote
from actial_fast.packing.images import ImageStore
from actial_fast.settings.recipe import GRPORecipe, SFTRecipe
from actial_fast.train.dist import World

PATIENCE = 10.0  # seconds that a file may take to be seen on another machine: network file systems remember for a while what was not there


def unseen(recipe: SFTRecipe | GRPORecipe, folder: Path, where: World) -> list[str]:
    """What this rank does not see as rank 0 does, one line each: the stage's folder, where every rank writes its part of a checkpoint; the
    model; the data. Every rank calls, once rank 0 has made the folder."""
    if where.mesh is None:
        return []
    mark, there = folder / f".tmp-seen-{secrets.token_hex(4)}", []
    read = (*recipe.data.sources, *recipe.eval.sources, *recipe.eval.loss_sources)
    sources = [source.path for source in read if not is_remote(source.path)]
    if where.main:
        with contextlib.suppress(OSError):  # told by who wanted to write there
            mark.mkdir(parents=True)
            there.append(str(mark))
        with contextlib.suppress(ValueError):  # told by who opens them
            there += [str(file) for path in (recipe.model.path, *sources) for file in files_of(Path(path))]
    try:
        marks = where.gather(there)  # as rank 0 names them
        found = where.gather([] if where.main else list(_missing(marks, folder)))  # a machine's ranks say the same
        return list(dict.fromkeys(found)) if where.main else []
    finally:
        if where.main and mark.exists():
            mark.rmdir()


def _missing(paths: Iterable[str], folder: Path) -> Iterator[str]:
    """Of paths that rank 0 has, those that are not here, in words."""
    end, host = time.monotonic() + PATIENCE, socket.gethostname()
    for path in paths:
        mark = Path(path).name.startswith(".tmp-seen-")
        here = folder / Path(path).name if mark else Path(path)
        while not here.exists() and mark and time.monotonic() < end:
            time.sleep(0.05)
        if not here.exists() and mark:
            yield f"run: {folder.resolve()} on {host} is not the folder that rank 0 has; name one on storage that all machines share"
        elif not here.exists():
            yield f"{path}: rank 0 has it, and {host} does not; put it on every machine, or on storage that all of them share"


def carry(keys: Iterable[str], store: ImageStore, where: World) -> None:
    """Hold the images of these keys, that other ranks know, and put those into this rank's store that it lacks: each machine may have a
    store of its own. Every rank calls, while the ranks that the keys come from still have theirs. Sequences that have changed their rank
    need it."""
    if where.mesh is None:
        return
    lacking = [key for key in keys if not store.hold(key)]
    wanted = where.gather([sorted(set(lacking))])
    if not (asked := sorted(set().union(*wanted))):
        return
    owners = where.gather([[key for key in asked if store.hold(key)]])
    owner = {key: rank for rank in reversed(range(where.size)) for key in owners[rank]}
    for source in sorted(set(owner.values())):
        parcels: list[dict[str, np.ndarray]] | None = None
        received: list[dict[str, np.ndarray]] = [{}]
        if source == where.rank:
            parcels = [{key: store.pixels(key) for key in keys if owner.get(key) == source} for keys in wanted]
        dist.scatter_object_list(received, parcels, src=source)
        for key in lacking:
            if key in received[0]:
                store.keep(key, received[0][key])

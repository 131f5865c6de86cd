"""Checkpoints: each rank writes its part behind the next steps, and a run goes on from them as if it had not stopped.

RUN/NAME/step-000100/            one checkpoint, made as .tmp-000100, fsynced and renamed: it is whole or absent
    rank-00000-of-00008.safetensors  rank 0's rows of everything trained: weight/NAME, the states of the optimizer (optim.py),
                                 exp_avg/NAME, step/NAME and so on, and its random-number states, rng/0/cpu and rng/0/cuda
    state.json                   step, ranks, what the loop wants back, and what the export must know
    model/, adapter/             configuration, tokenizer and image processor, for the export; no weights
RUN/NAME/final/model             once the stage is done: the folder that from_pretrained opens (export.py), with adapters merged;
RUN/NAME/final/adapter           and the adapters as PEFT keeps them

A rank holds its rows and, while a save is under way, one copy of them. Weights that are not trained are not in a checkpoint: they are read
from model.path again. Rows can be read by any number of ranks, sharded or not. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actial_fast.data.sources.files import reason
from actial_fast.model.policy import Policy, save_settings
from actial_fast.model.processor import Processor
from actial_fast.model.tensors import sync, write
from actial_fast.model.weights import copy_of, local, rows_of, share
from actial_fast.train.dist import World
from actial_fast.train.export import export, facts, open_ranks
from actial_fast.train.guard import NonFinite
from actial_fast.train.optim import empty_state

PREFIX = "step-"
PATIENCE = 20.0  # seconds that rank 0 waits for the others' files when a run ends with an error


class NotSaved(OSError):
    """A checkpoint could not be written (a full disk, say), as every rank tells; older ones are untouched."""

    agreed = True


def steps(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in a stage's folder, oldest first."""
    found = (p for p in folder.glob(PREFIX + "*") if p.name.removeprefix(PREFIX).isdecimal())  # not step-000004-best, someone's copy
    return sorted(int(p.name.removeprefix(PREFIX)) for p in found if (p / "state.json").exists())


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"{PREFIX}{step:06d}"


def newest(path: Path) -> Path:
    """A checkpoint, or the newest one of a stage's folder. ValueError where there is none."""
    if (path / "state.json").exists():
        return path
    if not (found := steps(path)):
        raise ValueError(f"{path}: no checkpoint (step-000100, say) and no folder of a stage that has one")
    return path_of(path, found[-1])


def final(folder: Path) -> Path | None:
    """The model folder of a finished stage, or None while it is not finished."""
    model = folder / "final" / "model"
    return model if model.exists() else None


class Saver:
    """Writes a stage's checkpoints and drops all but the newest `keep`. Every rank makes one and calls its methods at the same steps.

    At the end of a with block what is under way is finished; where the block ends with an error, other ranks need not answer any more, so
    that is tried for a while and nothing is said about it.
    """

    def __init__(self, folder: Path, where: World, keep: int):
        self.folder, self.where, self.keep = folder, where, max(keep, 1)
        self._thread: threading.Thread | None = None
        self._given_up = threading.Event()
        self._step = 0
        self._error = ""

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None:
            while self._thread.is_alive() and not self._file(self._step, self.where.rank).exists():
                self._thread.join(0.05)  # this rank's part
            self._thread.join(PATIENCE)  # rank 0: the others' parts
            self._given_up.set()
            self._thread.join()

    def save(
        self,
        step: int,
        policy: Policy,
        processor: Processor,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
    ) -> None:
        """Begin the checkpoint of `step`: on return a copy of this rank's part is made and is being written, and training may go on.

        An earlier save that is still under way is finished first. Raises NonFinite, or NotSaved for this or the earlier checkpoint, on all
        ranks.
        """
        self.wait()
        rows = _rows(policy, optimizer, self.where)
        temporary, error = self._temporary(step), ""
        if self.where.main:
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                save_settings(policy, temporary / "model", temporary / "adapter")
                processor.save(temporary / "model")
                about = {"step": step, "ranks": self.where.size, "model": facts(policy), "state": state}
                (temporary / "state.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
            except OSError as problem:
                error = _said(problem)
        told = self.where.gather([(_not_finite(rows), error)])
        if bad := sorted({name for names, _ in told for name in names}):
            self._discard(temporary)
            shown = ", ".join(bad[:5]) + (f" ({len(bad)} in all)" if len(bad) > 5 else "")
            raise NonFinite(f"step {step}: not finite: {shown}; no checkpoint of it was written, those in {self.folder} are untouched")
        if told[0][1]:
            self._fail(temporary, step, [told[0][1]])
        copies = {name: (value.to("cpu", copy=True), row) for name, (value, row) in rows.items()}
        self._step, self._error = step, ""
        self._given_up.clear()
        self._thread = threading.Thread(target=self._work, args=(copies,), name=f"checkpoint {step}")
        self._thread.start()

    @property
    def under_way(self) -> list[int]:
        """The step whose checkpoint is being written, if there is one."""
        return [self._step] if self._thread is not None else []

    def finish(self, step: int) -> None:
        """The stage is done at `step`, which has been saved: wait for that, and write RUN/NAME/final. Raises NotSaved on all ranks."""
        self.wait()
        _write_final(self.folder, step, self.where)

    def poll(self) -> None:
        """At a step's end: see whether the checkpoint under way is in place. Raises NotSaved on all ranks when one could not write."""
        if self._thread is None:
            return
        told = self.where.gather([(self._thread.is_alive(), self._error)])
        errors = [error for _, error in told if error]
        # rank 0 puts the checkpoint in place when it sees the others' files, which it would await for ever after an error
        if any(busy for busy, _ in (told[1:] if errors else told)):
            return
        self._given_up.set()
        self._thread.join()
        self._thread = None
        if errors:
            self._fail(self._temporary(self._step), self._step, errors)

    def wait(self) -> None:
        """Finish what is under way. Raises NotSaved on all ranks."""
        while self._thread is not None:
            self._thread.join(0.05)
            self.poll()

    def _temporary(self, step: int) -> Path:
        return self.folder / f".tmp-{step:06d}"

    def _file(self, step: int, rank: int) -> Path:
        return self._temporary(step) / f"rank-{rank:05d}-of-{self.where.size:05d}.safetensors"

    def _work(self, copies: dict[str, tuple[Tensor, int]]) -> None:
        """In a thread: write the copies, each dropped when it is on the disk; on rank 0, put the checkpoint in place when all is there."""
        try:
            layout = {name: (value.dtype, tuple(value.shape)) for name, (value, _) in copies.items()}
            rows = {name: row for name, (_, row) in copies.items()}
            write(self._file(self._step, self.where.rank), layout, lambda name: copies.pop(name)[0], rows=rows)
            if self.where.main and self._all_there():
                self._publish()
        except BaseException as error:  # told by whoever polls, on all ranks
            self._error = _said(error)

    def _all_there(self) -> bool:
        """Wait for the files of all ranks, which have their names when they are whole; False when they will not come."""
        files = [self._file(self._step, rank) for rank in range(self.where.size)]
        while not (there := all(file.exists() for file in files)) and not self._given_up.is_set():
            time.sleep(0.02)
        return there

    def _publish(self) -> None:
        temporary, target = self._temporary(self._step), path_of(self.folder, self._step)
        sync(temporary)
        if target.exists():  # no loop saves a step twice
            self._drop(target)
        os.replace(temporary, target)
        sync(self.folder, deep=False)
        for old in steps(self.folder)[: -self.keep]:
            with contextlib.suppress(OSError):  # tried again at the next save
                self._drop(path_of(self.folder, old))

    def _drop(self, path: Path) -> None:
        """Remove a checkpoint; cut short, it leaves debris and no half checkpoint."""
        doomed = path.with_name(f".tmp-old-{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(path, doomed)
        shutil.rmtree(doomed)

    def _discard(self, temporary: Path) -> None:
        if self.where.main:
            shutil.rmtree(temporary, ignore_errors=True)

    def _fail(self, temporary: Path, step: int, errors: Sequence[str]) -> None:
        self._discard(temporary)
        message = f"{path_of(self.folder, step)}: the checkpoint was not written: {errors[0]}; older ones are untouched"
        raise NotSaved(message)


def restore(folder: Path, step: int, policy: Policy, optimizer: torch.optim.Optimizer, where: World) -> dict[str, Any]:
    """Put weights, optimizer and random-number states of a checkpoint back; returns the state given to `save`. Every rank calls.

    Each rank reads its own rows, whatever the number of ranks that wrote them. ValueError where the checkpoint is of another model.
    """
    source = path_of(folder, step)
    stored = open_ranks(source)
    kinds = sorted({name.split("/")[0] for name in stored.names} - {"weight", "rng"})
    for name, parameter in policy.trained().items():
        if (key := f"weight/{name}") not in stored or stored.shape(key) != tuple(parameter.shape):
            raise ValueError(f"{source}: has no {name} of shape {tuple(parameter.shape)}; the checkpoint is of another model")
        start, _ = rows_of(parameter)
        stored.into(local(parameter), key, start)
        entry = {}
        for kind in kinds:  # none where no gradient had reached it yet
            if (key := f"{kind}/{name}") not in stored:
                continue
            entry[kind] = empty_state(optimizer, parameter, stored.shape(key), stored.dtype(key))
            stored.into(local(entry[kind]), key, start if stored.shape(key) else 0)
        if entry:
            optimizer.state[parameter] = entry
    prefix = f"rng/{where.rank}/"  # a run that goes on with more ranks has no old state for the new ones
    set_rng_states({name.removeprefix(prefix): stored.rows(name) for name in stored.names if name.startswith(prefix)})
    return json.loads((source / "state.json").read_text(encoding="utf-8"))["state"]


def _rows(policy: Policy, optimizer: torch.optim.Optimizer, where: World) -> dict[str, tuple[Tensor, int]]:
    """This rank's rows of everything that is saved, where they are, and the first one's index; what is replicated is shared out by rows."""
    out: dict[str, tuple[Tensor, int]] = {}
    for name, parameter in policy.trained().items():
        for kind, tensor in {"weight": parameter, **optimizer.state.get(parameter, {})}.items():
            value = local(tensor)
            start, stop = rows_of(parameter) if value.ndim else (0, 1)
            first, end = share(stop - start, *(copy_of(parameter, where.rank, where.size) if value.ndim else (where.rank, where.size)))
            if first < end:
                out[f"{kind}/{name}"] = (value[first:end] if value.ndim else value, start + first)
    return out | {f"rng/{where.rank}/{kind}": (value, 0) for kind, value in rng_states().items()}


def rng_states() -> dict[str, Tensor]:
    """This rank's random-number generators, by device type."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_rng_states(states: dict[str, Tensor]) -> None:
    """Put back what `rng_states` gave."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _not_finite(rows: dict[str, tuple[Tensor, int]]) -> list[str]:
    """Names of the tensors with a NaN or an infinity; the device is waited for once."""
    floats = {name: value for name, (value, _) in rows.items() if value.is_floating_point() and value.numel()}
    by_device: dict[torch.device, list[str]] = {}
    for name, value in floats.items():
        by_device.setdefault(value.device, []).append(name)
    bad: list[str] = []
    for names in by_device.values():
        # the largest magnitude, since a sum can overflow
        good = (
            torch.stack([torch.linalg.vector_norm(floats[name], float("inf"), dtype=torch.float32) for name in names]).isfinite().tolist()
        )
        bad += [name for name, fine in zip(names, good, strict=True) if not fine]
    return bad


def _write_final(folder: Path, step: int, where: World) -> None:
    """RUN/NAME/final from the checkpoint of `step`, every rank some of its files. Raises NotSaved on all ranks."""
    temporary, target = folder / ".tmp-final", folder / "final"

    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)

    def export_part() -> None:
        export(path_of(folder, step), temporary / "model", temporary / "adapter", rank=where.rank, ranks=where.size)

    def publish() -> None:
        sync(temporary)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        sync(folder, deep=False)

    for work, all_ranks in ((begin, False), (export_part, True), (publish, False)):
        error = ""
        try:
            if where.main or all_ranks:
                work()
        except Exception as problem:  # told on all ranks
            error = _said(problem)
        if errors := [error for error in where.gather([error]) if error]:
            if where.main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise NotSaved(f"{target}: not written: {errors[0]}; the same command tries it again, or `actial export {folder}`")


def _said(error: BaseException) -> str:
    if isinstance(error, OSError):
        return reason(error)
    return str(error) if isinstance(error, ValueError) else repr(error)

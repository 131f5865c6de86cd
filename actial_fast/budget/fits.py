"""What the loops ask before a model is loaded: whether this machine has the memory and the disk that the recipe takes."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from actial_fast.budget import gpus
from actial_fast.budget.gpus import GB, Machine
from actial_fast.budget.models import config_of, shapes_of
from actial_fast.budget.phases import Case, phases_of
from actial_fast.budget.plan import Plan
from actial_fast.budget.said import advice_line, verdict
from actial_fast.budget.shares import shares_of
from actial_fast.budget.trace import roughly
from actial_fast.budget.workload import assumed, looked_at
from actial_fast.model.processor import Processor
from actial_fast.model.weights import resolve
from actial_fast.settings.recipe import GRPORecipe, SFTRecipe
from actial_fast.train.dist import World
from actial_fast.train.preflight import FIRST, available_memory


def lacking(recipe: SFTRecipe | GRPORecipe, folder: Path, where: World, processor: Processor | None) -> list[str]:
    """What this machine is too small for, by how much, and what to change, a line each. With dist.fit: warn that is told on stderr, and
    nothing is returned. folder: the stage's; processor: reads the first rows, None where there is none."""
    found = list(_lacking(recipe, folder, where, processor))
    if recipe.dist.fit == "warn":
        for line in found:
            print(f"actial: {line}", file=sys.stderr)
        return []
    return found


def _lacking(recipe: SFTRecipe | GRPORecipe, folder: Path, where: World, processor: Processor | None) -> Iterator[str]:
    config = config_of(str(resolve(recipe.model.path)))
    shapes, machine = shapes_of(config, recipe.model), _here(where)
    shares, keep = shares_of(recipe, shapes, machine), recipe.save.keep
    needed = (keep + 1) * shares.checkpoint + shares.final
    there = sum(path.stat().st_size for path in folder.glob("step-*/*.safetensors"))
    if needed - there > (free := shutil.disk_usage(folder if folder.exists() else Path.cwd()).free):
        yield (
            f"run: {folder} has room for {free / GB:.1f} GB; {keep + 1} checkpoints of {shares.checkpoint / GB:.1f} GB (save.keep and one "
            f"under way) and the final model of {shares.final / GB:.1f} GB need {needed / GB:.1f}; name a run folder on a larger disk"
        )
    load = (looked_at(recipe, processor, FIRST) if processor is not None else None) or assumed(recipe)
    case = Case(recipe, shapes, machine, load)
    roomy = Plan(case, None, tuple(phases_of(case, held=roughly(config))))
    if roomy.fits:  # by bounds that need no tracing
        return
    made = Plan(case, None)
    if not made.fits:
        yield f"the recipe {verdict(made)}; {advice_line(made)}; `actial plan` shows all of it, dist.fit=warn goes on all the same"


def _here(where: World) -> Machine:
    """This machine, as this run has it."""
    host = available_memory()
    local = min(where.size, int(os.environ.get("LOCAL_WORLD_SIZE", where.size)))
    if where.device.type != "cuda":
        return Machine(where.size, 0.0, host=host, cuda=False)
    memory = float(torch.cuda.get_device_properties(where.device).total_memory)
    found = gpus.found()
    return Machine(where.size, memory, host=host * where.size / local, sheet=found.sheet if found else None)

"""What the loops ask before a model is loaded: whether this machine has the memory and the disk that the recipe takes."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from actial_fast.budget import gpus
from actial_fast.budget.gpus import GB, Machine
from actial_fast.budget.models import config_of, shapes_of
from actial_fast.budget.phases import Case, phases_of
from actial_fast.budget.plan import Plan
from actial_fast.budget.rates import rates_of
from actial_fast.budget.said import advice_line, opening, verdict
from actial_fast.budget.shares import shares_of
from actial_fast.budget.trace import roughly
from actial_fast.budget.workload import assumed, looked_at
from actial_fast.model.processor import Processor
from actial_fast.model.weights import resolve
from actial_fast.settings.recipe import GRPORecipe, SFTRecipe
from actial_fast.train.dist import World
from actial_fast.train.preflight import FIRST, available_memory


class Budget:
    """What a run takes of this machine: asked on rank 0 before its model is loaded, and told when it begins.

    plan: as it was asked, None before and on other ranks; bounds: whether bounds did, so that its memory is at most that.
    """

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.bounds = False

    def lacking(self, recipe: SFTRecipe | GRPORecipe, folder: Path, where: World, processor: Processor | None) -> list[str]:
        """What this machine is too small for, by how much, and what to change, a line each. With dist.fit: warn that is told on stderr,
        and nothing is returned. folder: the stage's; processor: reads the first rows, None where there is none."""
        found = list(self._lacking(recipe, folder, where, processor))
        if recipe.dist.fit == "warn":
            for line in found:
                print(f"actial: {line}", file=sys.stderr)
            return []
        return found

    def _lacking(self, recipe: SFTRecipe | GRPORecipe, folder: Path, where: World, processor: Processor | None) -> Iterator[str]:
        config = config_of(str(resolve(recipe.model.path)))
        shapes, machine = shapes_of(config, recipe.model), _here(where)
        shares, keep = shares_of(recipe, shapes, machine), recipe.save.keep
        needed = (keep + 1) * shares.checkpoint + shares.final
        there = sum(path.stat().st_size for path in folder.glob("step-*/*.safetensors"))
        if needed - there > (free := shutil.disk_usage(folder if folder.exists() else Path.cwd()).free):
            yield (
                f"run: {folder} has room for {free / GB:.1f} GB; {keep + 1} checkpoints of {shares.checkpoint / GB:.1f} GB (save.keep and "
                f"one under way) and the final model of {shares.final / GB:.1f} GB need {needed / GB:.1f}; name a run folder on a larger "
                "disk"
            )
        load = (looked_at(recipe, processor, FIRST) if processor is not None else None) or assumed(recipe)
        case, rates = Case(recipe, shapes, machine, load), rates_of(machine)
        self.plan, self.bounds = Plan(case, rates, tuple(phases_of(case, held=roughly(config)))), True
        if self.plan.fits:  # by bounds that need no tracing
            return
        self.plan, self.bounds = Plan(case, rates), False
        if not self.plan.fits:
            told = f"{verdict(self.plan)}; {advice_line(self.plan)}"
            yield f"the recipe {told}; `actial plan` shows all of it, dist.fit=warn goes on all the same"

    def opening(self, sizes: Sequence[int], device: str, start: int, total: int) -> list[str]:
        """The first lines of a run that goes on from step `start` of `total`: what it is, and what the plan expects of it; none on ranks
        without a plan. sizes: rows of each source; device: its name."""
        return [] if self.plan is None else list(opening(self.plan, sizes, device, start, total, bounds=self.bounds))


def _here(where: World) -> Machine:
    """This machine, as this run has it."""
    host = available_memory()
    local = min(where.size, int(os.environ.get("LOCAL_WORLD_SIZE", where.size)))
    if where.device.type != "cuda":
        return Machine(where.size, 0.0, host=host, cuda=False)
    memory = float(torch.cuda.get_device_properties(where.device).total_memory)
    found = gpus.found()
    return Machine(where.size, memory, host=host * where.size / local, sheet=found.sheet if found else None)

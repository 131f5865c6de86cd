"""What the tests of sharding run on ranks of their own: `python -m tests.train.sharded SCENE ARGS`; rank 0 prints what it found as JSON."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from actial_fast import grpo, sft
from actial_fast.model.policy import Policy, load_policy
from actial_fast.model.processor import Processor
from actial_fast.packing.images import ImageStore
from actial_fast.report.metrics import read_events, read_metrics
from actial_fast.settings.config import load_recipe
from actial_fast.settings.model import LoRAConfig, ModelConfig
from actial_fast.settings.recipe import GRPORecipe
from actial_fast.settings.running import DistConfig
from actial_fast.train import balance
from actial_fast.train.dist import World, clip_gradients, reduce_gradients, world
from actial_fast.train.rounds import Pass, passes
from actial_fast.train.sharding import shard
from bench.step.comm import Traffic
from tests.faults import leave, plant, run
from tests.loops import ALONE
from tests.train.test_rounds import samples_of

PROMPTS = [(2, 3), (0, 2), (1, 2), (1, 1), (0, 3), (2, 1), (1, 2)]  # images and replies
MODELS: dict[str, dict[str, Any]] = {
    "whole": {"checkpointing": "selective", "tower_checkpointing": "full"},
    "adapters": {"lora": LoRAConfig(rank=4), "checkpointing": "full"},
}


def gradients(policy: Policy, processor: Processor, where: World, *, packed: bool, share: slice) -> tuple[dict[str, Tensor], float]:
    """Of one optimizer step over all ranks' samples, whole, and their norm. share: this rank's samples."""
    samples = samples_of(processor, PROMPTS)
    recipe = GRPORecipe(packing="packed" if packed else "plain", pack_tokens=130, micro_batch=2)
    mine = samples[share]
    (rounds,) = passes([Pass(policy, [s.sequence for s in mine], trained=True)], recipe, processor, where)
    grpo._accumulate(policy, mine, (sum(map(len, samples)), len(samples)), rounds, recipe, where)
    parameters = list(policy.trained().values())
    reduce_gradients(parameters, where)
    norm = clip_gradients(parameters, 0)
    return {n: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for n, p in policy.trained().items()}, float(norm)


def perturb(policy: Policy) -> Policy:
    """Weights away from their small start, so that attention matters, the same for any sharding."""
    with torch.no_grad():
        for number, parameter in enumerate(policy.parameters()):
            noise = 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            if isinstance(parameter, DTensor):
                noise = torch.distributed.tensor.distribute_tensor(noise, parameter.device_mesh, parameter.placements)
            parameter += noise
    return policy


def ways(folder: Path, where: World, *runs: str) -> Any:
    """Each run: MODEL:KEYS:PACKING:RESHARD:REDUCE:REPLICATE. By run: how far gradients and their norm are from one rank's, the larger of
    two steps, and by kind and size of a group the collectives of a step."""
    found: dict[str, Any] = {}
    for name in runs:
        model, keys, packing, reshard, reduce, replicate = name.split(":")
        config, packed = ModelConfig(path=str(folder / model), **MODELS[keys]), packing == "packed"
        processor = Processor.load(config.path, min_pixels=28 * 28, max_pixels=28 * 28 * 40)
        alone = perturb(load_policy(config, ALONE.device, 0, packed=packed))
        expected, norm = gradients(alone, processor, ALONE, packed=packed, share=slice(None))
        way = DistConfig(fsdp=True, reshard=reshard, reduce=reduce, replicate=int(replicate))  # type: ignore[arg-type]
        policy = perturb(load_policy(config, where.device, 0, packed=packed, place=functools.partial(shard, where=where, config=way)))
        far: list[float] = []
        with Traffic() as traffic:
            for _ in range(2):  # the second step finds what the first one left behind
                got, own = gradients(policy, processor, where, packed=packed, share=slice(where.rank, None, where.size))
                assert all(isinstance(p, DTensor) for p in policy.parameters()), "something stayed gathered"
                assert got.keys() == expected.keys()
                far += [max(float((got[n] - expected[n]).abs().max()) for n in expected), abs(own / norm - 1)]
                for parameter in policy.parameters():
                    parameter.grad = None
        largest = max(float(x.abs().max()) for x in expected.values())
        calls = {f"{kind} {ranks}": count / 2 for (kind, ranks), count in traffic.calls.items()}
        found[name] = {"far": max(far), "largest": largest, "calls": calls}
    return found


def shortage(folder: Path, where: World, recipe: str) -> Any:
    """GRPO with memory that runs out on rank 1: by fault what became of it, its losses and its events; the last one ends the rank."""
    found: dict[str, Any] = {}
    grpo.world = lambda minutes: contextlib.nullcontext(where)  # type: ignore[assignment, misc]
    for number, faults in enumerate(("", "oom:sample:1:5", "oom:forward:1:1", "oom:sample:1:1 oom:sample:1:3", "oom:update:1:2")):
        with plant(faults, where.rank):
            outcome = run(grpo.train, load_recipe(recipe, [f"run={folder / str(number)}"]))
        if outcome["outcome"] == "OutOfMemory":
            print(outcome["said"], file=sys.stderr)
            leave()  # as a rank that ended with an error
        steps = read_metrics(folder / str(number)) if where.main and outcome["outcome"] == "finished" else []
        events = [e["kind"] for e in read_events(folder / str(number))] if where.main else []
        halved = [s.get("sampling/halved", 0) for s in steps]
        found[faults] = outcome | {"losses": [s["loss"] for s in steps], "halved": halved, "events": events}
    return found


def machines(folder: Path, where: World, recipe: str, shared: str) -> Any:
    """SFT with an image store for each rank, as on two machines, and one run folder or two: what became of it, its losses, and how
    many images each rank was sent."""
    os.environ["XDG_CACHE_HOME"] = str(folder / f"cache {where.rank}")
    sft.world = lambda minutes: contextlib.nullcontext(where)  # type: ignore[assignment, misc]
    home = folder / ("home" if shared == "shared" else f"home {where.rank}")
    home.mkdir(parents=True, exist_ok=True)
    os.chdir(home)
    balance.assign = lambda sizes, home, ranks, costs: (home + 1) % ranks  # everything changes its rank
    told: list[int] = []
    plain = ImageStore.keep
    ImageStore.keep = lambda self, key, pixels: told.append(len(pixels)) or plain(self, key, pixels)  # type: ignore[method-assign, func-returns-value]
    outcome = run(sft.train, load_recipe(recipe, ["run=run"]))
    losses = [m["loss"] for m in read_metrics(home / "run")] if where.main and outcome["outcome"] == "finished" else []
    return outcome | {"carried": where.gather([len(told)]), "losses": losses}


if __name__ == "__main__":
    with world() as here:
        made = globals()[sys.argv[1]](Path(sys.argv[2]), here, *sys.argv[3:])
        if here.main:
            print(json.dumps(made))
    leave()

"""What the tests of checkpoints share: a policy that has been trained a little, and scenes that run on ranks of their own.

python tests/train/saved.py SCENE FOLDER    with torchrun's environment; rank 0 prints what it found as JSON
"""

from __future__ import annotations

import ctypes
import errno
import functools
import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from actial_fast.model.policy import Policy, load_policy
from actial_fast.model.processor import Processor
from actial_fast.model.weights import local
from actial_fast.settings.model import LoRAConfig, ModelConfig
from actial_fast.settings.running import OptimConfig
from actial_fast.train import checkpoint
from actial_fast.train.dist import World, world
from actial_fast.train.optim import build_optimizer
from actial_fast.train.sharding import shard
from tests.faults import leave

ROOT = Path(__file__).parents[2]
BF16, EIGHT = {"dtype": "bfloat16"}, {"kind": "adamw8bit"}
KINDS = {  # what of the model, and which optimizer
    "full": ({}, {}),
    "frozen": ({"freeze": ("model.visual",), "frozen_dtype": "bfloat16"}, {}),
    "adapters": ({"lora": LoRAConfig(rank=4), "frozen_dtype": "bfloat16"}, {}),
    "host": ({}, {"offload": "always"}),
    "8 bits": ({}, EIGHT),
    "rounded": (BF16, {}),
    "rounded, 8 bits, host": (BF16, EIGHT | {"offload": "always"}),
    "master": (BF16, {"master": True}),
    "adapters, master, 8 bits": ({"lora": LoRAConfig(rank=4), "frozen_dtype": "bfloat16"} | BF16, EIGHT | {"master": True}),
    "dora": ({"lora": LoRAConfig(rank=4, rslora=True, dora=True, merger=True)}, {}),
    "nf4": ({"lora": LoRAConfig(rank=4, dora=True), "quantize": "nf4"}, {}),
}
SHARDED = ("full", "frozen", "adapters", "rounded, 8 bits, host", "adapters, master, 8 bits")  # those that ranks are started for


def config(model: Path, kind: str = "full") -> ModelConfig:
    return ModelConfig(path=str(model), **KINDS[kind][0])


def optim(kind: str = "full") -> OptimConfig:
    return OptimConfig(lr=1e-2, **KINDS[kind][1])


def whole(tensor: torch.Tensor, parameter: torch.Tensor | None = None) -> torch.Tensor:
    """A sharded tensor gathered; also one that is this rank's rows, as the parameter's are, and does not say so."""
    if isinstance(parameter, DTensor) and tensor.ndim and not isinstance(tensor, DTensor):
        shape = torch.Size([len(parameter), *tensor.shape[1:]])
        tensor = DTensor.from_local(tensor, parameter.device_mesh, parameter.placements, shape=shape, stride=torch.empty(shape).stride())
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def numbers(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Values that depend on the name and on the place in the whole tensor, and on nothing else."""
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(sum(name.encode())))


def trained(
    model: ModelConfig, where: World, config: OptimConfig | None = None, *, fsdp: bool = False, seed: int = 0
) -> tuple[Policy, torch.optim.Optimizer]:
    """A policy and its optimizer after one step along made-up gradients; the last trained tensor has had none."""
    place = functools.partial(shard, where=where) if fsdp else None
    policy = load_policy(model, where.device, seed, place=place)
    optimizer = build_optimizer(policy, config or optim(), seed)
    along(policy, optimizer)
    return policy, optimizer


def along(policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    """One step along made-up gradients."""
    for name, parameter in list(policy.trained().items())[:-1]:
        gradient = numbers(name, parameter)
        if isinstance(parameter, DTensor):
            gradient = torch.distributed.tensor.distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
        parameter.grad = gradient.to(parameter.dtype)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def everything(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """All weights and moments, whole."""
    out = {f"weight/{name}": whole(p) for name, p in policy.named_parameters()}
    for name, parameter in policy.trained().items():
        out |= {f"{key}/{name}": whole(value, parameter) for key, value in optimizer.state.get(parameter, {}).items()}
    return out


def sharded(folder: Path, where: World, model: str) -> Any:
    """Save and restore under FSDP, with each kind; also what one rank's failure and one rank's NaN do."""
    found: dict[str, Any] = {}
    processor = Processor.load(model)
    for kind in SHARDED:
        policy, optimizer = trained(config(Path(model), kind), where, optim(kind), fsdp=True)
        with checkpoint.Saver(folder / kind, where, 2) as saver:
            saver.save(1, policy, processor, optimizer, {"position": 7})
            saver.finish(1)
            before = everything(policy, optimizer)
        again = load_policy(config(Path(model), kind), where.device, 1, place=functools.partial(shard, where=where))
        new = build_optimizer(again, optim(kind))
        state = checkpoint.restore(folder / kind, 1, again, new, where)
        after = everything(again, new)
        found[kind] = [before.keys() == after.keys(), all(torch.equal(before[k], after[k]) for k in before), state]
        for each, its in ((policy, optimizer), (again, new)):
            along(each, its)
        goes_on = [everything(policy, optimizer), everything(again, new)]
        found[kind].append(all(torch.equal(goes_on[0][k], goes_on[1][k]) for k in goes_on[0]))
        save_file(goes_on[0], folder / f"{kind}-{where.rank}.safetensors")
    policy, optimizer = trained(config(Path(model)), where, fsdp=True)
    saver = checkpoint.Saver(folder / "full", where, 2)
    write = checkpoint.write
    if where.rank == 1:
        checkpoint.write = _full_disk
    try:
        saver.save(2, policy, processor, optimizer, {})
        saver.wait()
    except checkpoint.NotSaved as error:
        found["failed"] = str(error)
    checkpoint.write = write
    if where.rank == 1:
        parameter = next(iter(policy.trained().values()))
        parameter.detach().to_local()[-1] = float("nan")
    try:
        saver.save(2, policy, processor, optimizer, {})
    except checkpoint.NonFinite as error:
        found["not finite"] = str(error)
    told = where.gather([found])
    assert told[0] == told[1], "the ranks differ in what they were told"
    return found


def tied(folder: Path, where: World, model: str) -> Any:
    """One forward pass and one step with a head that is the embedding, sharded."""
    policy = load_policy(config(Path(model)), where.device, 0, place=functools.partial(shard, where=where))
    optimizer = build_optimizer(policy, OptimConfig(lr=1e-2))
    ids = torch.arange(12)[None] % 7 + 5
    logits = policy({"input_ids": ids}, lambda out, head: out.last_hidden_state @ head.T)
    logits.square().mean().backward()
    optimizer.step()
    with checkpoint.Saver(folder, where, 1) as saver:
        saver.save(1, policy, Processor.load(model), optimizer, {})
        saver.finish(1)
    return [len(policy.trained()), float(logits.detach().abs().sum())]


def memory(folder: Path, where: World, model: str, tiny: str) -> Any:
    """Peak resident bytes above those before, of loading, of saving, of the final folder and of restoring, beside what a rank must hold."""
    place, settings = functools.partial(shard, where=where), config(Path(model))
    _peak(lambda: trained(config(Path(tiny)), where, fsdp=True))  # what is loaded and allocated once
    found: dict[str, Any] = {}
    processor = Processor.load(model)
    policy, found["load"] = _peak(lambda: load_policy(settings, where.device, 0, place=place))
    weights = sum(local(p).numel() * 4 for p in policy.parameters())
    found |= {
        "shard": weights,
        "largest": max(p.numel() * 4 for p in policy.parameters()),
        "parameters": sum(p.numel() for p in policy.parameters()),
    }
    del policy
    policy, optimizer = trained(settings, where, fsdp=True)
    found["state"] = weights + sum(local(t).nbytes for entry in optimizer.state.values() for t in entry.values())
    saver = checkpoint.Saver(folder, where, 1)

    def save() -> None:
        saver.save(1, policy, processor, optimizer, {})
        saver.wait()

    _, found["save"] = _peak(save)
    _, found["final"] = _peak(lambda: saver.finish(1))
    del policy, optimizer
    policy = load_policy(settings, where.device, 0, place=place)
    optimizer = build_optimizer(policy, OptimConfig())
    _, found["restore"] = _peak(lambda: checkpoint.restore(folder, 1, policy, optimizer, where))
    return where.gather([found])


def _peak(work: Callable[[], Any]) -> tuple[Any, int]:
    """What `work` returns, and how far the resident memory of this process rose above what it was."""

    def resident(line: str) -> int:
        return next(int(each.split()[1]) * 1024 for each in Path("/proc/self/status").read_text().splitlines() if each.startswith(line))

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before and not given back would hide what is asked for now
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    before = resident("VmRSS:")
    result = work()
    return result, resident("VmHWM:") - before


def _full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with world() as where:
        result = {"sharded": sharded, "tied": tied, "memory": memory}[sys.argv[1]](Path(sys.argv[2]), where, *sys.argv[3:])
        if where.main:
            print(json.dumps(result))
    leave()

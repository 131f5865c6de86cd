"""What goes between the ranks in one optimizer step of Qwen2.5-VL-7B: every collective with its bytes, for each way of sharding.

    python -m bench.step.comm [--shape 7b] [--ranks 8] [--micro-batches 4] [--lora 0] [--json FILE]

The real policy, sharded by `train.sharding`, goes through a step's passes on fake tensors in a process group that only pretends, so every
call that a rank of so many would make is seen, with its size, and nothing is computed or sent. What travels does not depend on a batch's
rows: a micro-batch has a few tokens and an image of its own. Embedding, patches and attention, which look at numbers, are stood in for.

`seen`: the bytes of whole tensors that were gathered, scattered or summed. `sent`: what a rank sends of them in a ring, (n - 1) / n of a
gathered or reduced tensor and twice that of a summed one, over links within a group of ranks and between groups. `least`: the bytes that
the policy cannot do without, from the sizes of the weights alone: gathering each once for each time it may not be kept, and one sum of each
gradient for each time it has to be told. `extra`: GB that the policy holds on a device beyond those of the first one.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from actial_fast.model import policy as policies
from actial_fast.model.adapters import add_adapters
from actial_fast.model.attention import IMPLEMENTATION, attention_forward, use_packed_attention
from actial_fast.model.policy import ImageBatch, Policy
from actial_fast.model.vision import vision_arguments
from actial_fast.model.weights import materialise, parameters_on_meta
from actial_fast.packing.batch import PackedBatch, Segments
from actial_fast.settings.model import LoRAConfig, ModelConfig
from actial_fast.settings.running import DistConfig
from actial_fast.train.dist import World, reduce_gradients
from actial_fast.train.sharding import reduce_next, settle, shard
from bench.harness.timing import machine
from bench.step.shapes import SHAPES

CPU = torch.device("cpu")
KINDS = {"_allgather_base_": "gather", "_reduce_scatter_base_": "reduce", "allreduce_": "sum"}
ROWS = 8  # tokens of a micro-batch


@dataclass
class Traffic(TorchDispatchMode):
    """Collectives while it is on: by kind and ranks of the group, how many, and bytes of the whole tensors."""

    calls: dict[tuple[str, int], int] = field(default_factory=dict)
    bytes: dict[tuple[str, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        if func.namespace == "c10d" and name in KINDS:
            kind = KINDS[name]
            whole, group = {"gather": args[0], "reduce": args[1], "sum": args[0]}[kind], args[1 if kind == "sum" else 2]
            key = kind, dist.ProcessGroup.unbox(group).size()
            self.calls[key] = self.calls.get(key, 0) + 1
            self.bytes[key] = self.bytes.get(key, 0) + sum(x.nbytes for x in (whole if kind == "sum" else [whole]))
        return func(*args, **(kwargs or {}))


def sent(kind: str, ranks: int, whole: float) -> float:
    """Bytes that a rank sends in a ring."""
    return (2 if kind == "sum" else 1) * whole * (ranks - 1) / ranks


@contextlib.contextmanager
def pretended(ranks: int) -> Iterator[World]:
    """Rank 0 of so many, of which the others do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield World(0, ranks, CPU, init_device_mesh("cpu", (ranks,), mesh_dim_names=("data",)))
    finally:
        dist.destroy_process_group()


def build(shape: str, dtype: torch.dtype, lora: int) -> Policy:
    """The policy of a shape without memory, float32 where it is trained. lora: rank of adapters on weights of `dtype`, a frozen tower."""
    config = ModelConfig(lora=LoRAConfig(rank=lora))
    sizes = SHAPES[shape]
    about = Qwen2_5_VLConfig(text_config=sizes.text, vision_config=sizes.vision, tie_word_embeddings=False)
    with parameters_on_meta():
        model = Qwen2_5_VLForConditionalGeneration._from_config(about, dtype=dtype if lora else torch.float32, attn_implementation="sdpa")
    use_packed_attention(model)
    return Policy(add_adapters(model, config) if lora else model, dtype, config).train()


def step(policy: Policy, images: ImageBatch, micro_batches: int, *, update: bool = True) -> None:
    """The passes of one optimizer step in the order of train.rounds, each micro-batch with an image of its own. update: with gradients,
    else one pass without, as for a reference's log-probs."""
    tower = policy.trains_tower and update
    with torch.set_grad_enabled(update):
        for k in range(micro_batches):
            last = k + 1 == micro_batches
            with torch.set_grad_enabled(tower):
                features = policy(images)
            leaf = features.detach().requires_grad_(tower)
            reduce_next(policy, tower=False, last=last)
            loss = policy(_batch(leaf), lambda hidden, head: (hidden @ head.T).sum())
            if update:
                loss.backward()
            reduce_next(policy, tower=True, last=last)
            if tower:
                features.backward(torch.empty_like(features) if leaf.grad is None else leaf.grad)
    settle(policy)


def _batch(features: Tensor) -> PackedBatch:
    """A plain sequence of text behind an image, as long as its features and ROWS more."""
    rows = len(features) + ROWS
    none = Segments(torch.zeros(1, dtype=torch.int32), (), 0)
    one = Segments(torch.tensor([0, rows], dtype=torch.int32), (rows,), rows)
    slots, trained = torch.arange(len(features)), torch.zeros(ROWS, dtype=torch.int64)
    ids, positions = torch.zeros(rows, dtype=torch.int64), torch.zeros(3, rows, dtype=torch.int64)
    return PackedBatch(ids, positions, one, 0, 0, none, none, ("image",), slots, slots, trained, trained, features)


def _images(policy: Policy) -> ImageBatch:
    """One image of one merged token, whose pixels are only a number of patches."""
    config = policy.base.config.vision_config
    arguments = vision_arguments([(1, config.spatial_merge_size, config.spatial_merge_size)], config)
    return ImageBatch(arguments.patches, arguments)  # type: ignore[arg-type]


def _embed(ids: Tensor, table: Tensor, features: Tensor, slots: Tensor, rows: Tensor) -> Tensor:
    return nn.functional.embedding(ids, table).index_copy(0, slots, features[rows].to(table.dtype))


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """In attention's place, which looks at the numbers of its segments: everything reaches the output."""
    return query.transpose(1, 2) + key.mean() + value.mean(), None


def traced(policy: Policy, way: DistConfig, world: World, micro_batches: int, *, update: bool = True) -> Traffic:
    """What a step of the policy, which has no memory, makes a rank send."""
    if way.fsdp:
        shard(policy, world, way)
    config = policy.base.config.vision_config
    width = config.in_channels * config.temporal_patch_size * config.patch_size**2
    stands_in = {"embed": _embed, "patchify": lambda count, dtype: torch.empty(count, width, dtype=dtype)}
    images = _images(policy)
    AttentionInterface.register(IMPLEMENTATION, _attend)
    try:
        with mock.patch.multiple(policies, **stands_in), FakeTensorMode(allow_non_fake_inputs=True):
            materialise(policy, CPU)
            with Traffic() as traffic:
                step(policy, images, micro_batches, update=update)
                if update:
                    reduce_gradients(list(policy.trained().values()), world)
    finally:
        AttentionInterface.register(IMPLEMENTATION, attention_forward)
    return traffic


def least(policy: Policy, config: DistConfig, ranks: int, micro_batches: int, *, update: bool = True) -> dict[str, float]:
    """Bytes of whole tensors, by kind, that a step cannot do without under this policy."""
    base, trunk = policy.base, policy.base.model
    kept = {id(p) for module in (base.lm_head, trunk.language_model.norm) for p in module.parameters()}  # whole until a backward pass
    once = {id(p) for module in (trunk.get_input_embeddings(), base.lm_head, trunk.language_model.norm) for p in module.parameters()}
    tower, tower_trained = {id(p) for p in trunk.visual.parameters()}, policy.trains_tower
    gathered = summed = 0.0
    for p in policy.parameters():
        backward = update and id(p) not in once and (tower_trained or id(p) not in tower)
        times = 1 if config.reshard == "step" or (id(p) in kept and not update) else micro_batches * (2 if backward else 1)
        gathered += times * p.numel() * policy.compute_dtype.itemsize
        summed += 4.0 * p.numel() * (update and p.requires_grad)
    if not config.fsdp:
        return {"sum": summed} if summed else {}
    out = {"gather": gathered, "reduce": summed * (micro_batches if config.reduce == "pass" else 1)}
    if config.replicate > 1:
        out["sum"] = summed * config.replicate / ranks  # of a rank's share
    return {kind: size for kind, size in out.items() if size}


def extra(policy: Policy, config: DistConfig, ranks: int) -> dict[str, float]:
    """GB on a device: shares of weights, gradients and AdamW's moments, all float32 where trained; weights that are whole for a step;
    gradients that wait in float32 for its end."""
    sizes = [(p.numel(), p.requires_grad, p.element_size()) for p in policy.parameters()]
    of = config.replicate / ranks if config.fsdp else 1.0
    return {
        "shares": of * sum(n * (16 if trained else size) for n, trained, size in sizes) / 1e9,
        "gathered": sum(n for n, _, _ in sizes) * policy.compute_dtype.itemsize / 1e9 if config.reshard == "step" else 0.0,
        "waiting": 4 * sum(n for n, trained, _ in sizes if trained) / 1e9 if config.reduce == "step" else 0.0,
    }


def row(shape: str, lora: int, config: DistConfig, ranks: int, micro_batches: int, *, update: bool = True) -> dict[str, Any]:
    """Everything about one policy."""
    policy = build(shape, torch.bfloat16, lora)
    needed, held = least(policy, config, ranks, micro_batches, update=update), extra(policy, config, ranks)
    with pretended(ranks) as world:
        traffic = traced(policy, config, world, micro_batches, update=update)
    seen: dict[str, float] = {}
    for (kind, _), size in traffic.bytes.items():
        seen[kind] = seen.get(kind, 0) + size
    links = {"within": 0.0, "between": 0.0}
    for (kind, count), size in traffic.bytes.items():
        links["between" if config.replicate > 1 and kind == "sum" else "within"] += sent(kind, count, size)
    return {
        "pass": "update" if update else "without gradients",
        **{name: getattr(config, name) for name in ("fsdp", "reshard", "reduce", "replicate")},
        "calls": {kind: sum(n for (k, _), n in traffic.calls.items() if k == kind) for kind in seen},
        "seen_gb": {kind: size / 1e9 for kind, size in seen.items()},
        "least_gb": {kind: size / 1e9 for kind, size in needed.items()},
        "sent_gb": {link: size / 1e9 for link, size in links.items()},
        "device_gb": held,
    }


def policies_of(ranks: int) -> list[DistConfig]:
    """Replicas, and every way of sharding; two groups of ranks where there are enough."""
    ways = itertools.product(("block", "step"), ("pass", "step"), (1, 2) if ranks >= 4 and ranks % 2 == 0 else (1,))
    return [DistConfig(), *(DistConfig(fsdp=True, reshard=a, reduce=b, replicate=c) for a, b, c in ways)]  # type: ignore[arg-type]


def told(result: dict[str, Any]) -> str:
    """The rows as a table."""
    lines = [
        f"{result['what']}, {result['ranks']} ranks, {result['micro_batches']} micro-batches a step",
        "| pass | weights | reshard | reduce | replicate | calls | gathered GB (least) | reduced GB (least) | summed GB (least) "
        "| a rank sends GB | between groups GB | on a device: shares + gathered + waiting GB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for each in result["rows"]:
        both = [f"{each['seen_gb'].get(k, 0):.1f} ({each['least_gb'].get(k, 0):.1f})" for k in ("gather", "reduce", "sum")]
        keys = [each[k] for k in ("reshard", "reduce", "replicate")] if each["fsdp"] else ["-", "-", "-"]
        links, held = each["sent_gb"], each["device_gb"]
        cells = [each["pass"], "sharded" if each["fsdp"] else "copies", *keys, sum(each["calls"].values()), *both]
        cells += [
            f"{links['within']:.1f}",
            f"{links['between']:.1f}",
            " + ".join(f"{held[k]:.1f}" for k in ("shares", "gathered", "waiting")),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Trace, print, and write the JSON when asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.step.comm", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="7b", help="the model (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--micro-batches", type=int, default=4, help="of a step, on each rank (default: %(default)s)")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="adapters of this rank on bf16 weights, a frozen tower")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the figures to this file")
    args = parser.parse_args(argv)
    if args.ranks < 2 or args.micro_batches < 1:
        parser.error("at least 2 ranks and 1 micro-batch are needed")
    what = f"Qwen2.5-VL, shape {args.shape}, " + (f"adapters of rank {args.lora}, a frozen tower" if args.lora else "everything trained")
    result = {"machine": machine(), "what": what, "ranks": args.ranks, "micro_batches": args.micro_batches, "rows": []}
    for config in policies_of(args.ranks):
        result["rows"].append(row(args.shape, args.lora, config, args.ranks, args.micro_batches))
    reference = DistConfig(fsdp=True)
    result["rows"].append(row(args.shape, args.lora, reference, args.ranks, args.micro_batches, update=False))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(told(result))


if __name__ == "__main__":
    main()

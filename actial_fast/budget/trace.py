"""What a forward and a backward pass hold, found by running the model's own code on tensors without memory.

One and two layers of the model's widths, over two numbers of rows, under FakeTensorMode: every operator runs as far as shapes go, and each
storage is counted from when it is made until it is freed. Everything held is a line in the rows, so four runs give, of a whole model,

    after the forward pass   base + layers * layer          (with checkpoints a layer keeps its input alone)
    fullest moment forward   that + forward
    fullest moment backward  that + backward                (of one layer: what it computes again, and temporaries)

so that no deep backward pass has to be traced, in which operator modes keep alive what a run frees. Weights, their gradients and the head
are counted elsewhere. Matrices in NF4 are traced as they are multiplied, in 16 bits.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from actial_fast.budget.models import config_from, on_meta
from actial_fast.model.families.known import family_of
from actial_fast.model.paged import Pages
from actial_fast.model.policy import Policy
from actial_fast.model.trunk import Trunk
from actial_fast.model.vision import VisionArguments, encode_images, vision_arguments
from actial_fast.packing.batch import PackedBatch, Segments
from actial_fast.rollout.memory import kv_shape
from actial_fast.settings.model import ModelConfig

ROWS = 512, 1024  # traced; of patches four times as many


@dataclass(frozen=True)
class Line:
    """Bytes: so many, and so many for each row."""

    fixed: float = 0.0
    per_row: float = 0.0

    def __call__(self, rows: float) -> float:
        return max(0.0, self.fixed + self.per_row * rows) if rows else 0.0

    def __add__(self, other: Line) -> Line:
        return Line(self.fixed + other.fixed, self.per_row + other.per_row)

    def __mul__(self, by: float) -> Line:
        return Line(self.fixed * by, self.per_row * by)


@dataclass(frozen=True)
class Part:
    """Of the language model (rows: tokens) or of the tower (rows: patches), each outside of layers and by a layer: what is kept after the
    forward pass, and what its fullest moment holds beyond that (weights cast by autocast stay until it ends, so it may grow with the
    layers). backward: what the fullest moment of a layer's backward pass holds beyond what is kept."""

    base: Line = Line()
    layer: Line = Line()
    forward_base: Line = Line()
    forward_layer: Line = Line()
    backward: Line = Line()

    def kept(self, rows: float, layers: int) -> float:
        """Bytes after the forward pass."""
        return (self.base + self.layer * layers)(rows)

    def forward(self, rows: float, layers: int) -> float:
        """Further bytes at its fullest moment."""
        return (self.forward_base + self.forward_layer * layers)(rows)


@dataclass(frozen=True)
class Activations:
    """language, tower: of the pass that trains; reading: the fullest moment of reading a prompt's tokens for sampling; looking: of the
    tower without gradients, by patches."""

    language: Part
    tower: Part
    reading: Line
    looking: Line


def traced(config: Any, model: ModelConfig, *, packed: bool, low: bool, sharded: bool) -> Activations:
    """The activations of a recipe's model. low: computes in bfloat16, as on CUDA, else in float32; sharded: FSDP hands its layers weights
    that are in the dtype of the computation already. Takes a few seconds, once for each of these."""
    text, kept = config.to_json_string(), replace(model, path="", min_pixels=0, max_pixels=0, offload_activations=False)
    in_language, in_tower = replace(kept, tower_checkpointing="none"), replace(kept, checkpointing="none")
    dtype = torch.bfloat16 if low else torch.float32
    tower, looking = _of_tower(text, in_tower, dtype, sharded)
    reading = _of_reading(text, dtype)
    return Activations(_of_language(text, in_language, dtype, sharded, packed), tower, reading, looking)


def roughly(config: Any) -> Activations:
    """At least the activations of any recipe on a model, without tracing: about twice what layers hold in float32."""

    def part(hidden: int, inner: int, levels: int = 1) -> Part:
        layer, once = Line(0, 4.0 * (20 * hidden + 6 * inner)), Line(0, 64.0 * hidden * levels)
        return Part(once, layer, layer, Line(12.0 * hidden * inner, 0), Line(24.0 * hidden * inner, 2 * layer.per_row))

    text, family = config.text_config, family_of(config)
    language = part(text.hidden_size, text.intermediate_size)
    hidden, inner = family.tower_sizes(config.vision_config)
    tower = part(max(hidden, text.hidden_size), max(inner, text.intermediate_size), family.levels(config.vision_config))
    return Activations(language, tower, language.base + language.layer, tower.base + tower.layer)


@lru_cache(maxsize=64)
def _of_language(config: str, model: ModelConfig, dtype: torch.dtype, sharded: bool, packed: bool) -> Part:
    eyes = min(1, config_from(config).vision_config.depth)  # adapters of the tower need a block of it
    made = [_policy(config, model, dtype, sharded, layers, eyes, packed=packed) for layers in (1, 2)]
    with FakeTensorMode(allow_non_fake_inputs=True):
        for policy in made:
            policy.to_empty(device="cpu").train()
        return _part([[_language(policy, rows, packed=packed) for rows in ROWS] for policy in made], ROWS)


@lru_cache(maxsize=64)
def _of_tower(config: str, model: ModelConfig, dtype: torch.dtype, sharded: bool) -> tuple[Part, Line]:
    """The tower's part, nothing where none of it is trained, and the line of its passes without gradients. What it makes of further levels
    is counted outside of its blocks: for each, what a single one adds."""
    whole = config_from(config)
    vision = whole.vision_config
    patches = 4 * ROWS[0], 4 * ROWS[1]
    looked = {n: vision_arguments([(1, 32, n // 32)], vision) for n in patches}  # numbers, which are real
    depth = min(1, vision.depth)
    levels = family_of(whole).levels(vision) - 1
    made = [_policy(config, model, dtype, sharded, 1, depth * blocks, packed=True) for blocks in (1, 2)]
    made += [_policy(config, model, dtype, sharded, 1, depth, packed=True, levels=1)] if levels else []
    with FakeTensorMode(allow_non_fake_inputs=True):
        for policy in made:
            policy.to_empty(device="cpu").train()
        looks = [_line([sum(_tower(policy, looked[n], grad=False)[:2]) for n in patches], patches) for policy in (made[0], made[-1])]
        looking = looks[0] + (looks[1] + looks[0] * -1) * levels
        if not made[0].trains_tower:
            return Part(), looking
        held = [[_tower(policy, looked[n], grad=True) for n in patches] for policy in made]
        part = _part(held[:2], patches)
        if levels:
            further = _line([a[0] - b[0] for a, b in zip(held[2], held[0], strict=True)], patches)
            part = replace(part, base=part.base + further * levels)
        return part, looking


@lru_cache(maxsize=16)
def _of_reading(config: str, dtype: torch.dtype) -> Line:
    # float32 on a CPU would be read by the extension, which needs numbers
    wide, scale = (torch.float64, 0.5) if dtype == torch.float32 else (dtype, 1.0)
    policy = _policy(config, ModelConfig(), dtype, False, 1, 0, packed=True).to(wide)
    with FakeTensorMode(allow_non_fake_inputs=True):
        policy.to_empty(device="cpu").eval()
        return _line([_reading(policy, rows) for rows in ROWS], ROWS) * scale


def _policy(
    config: str, model: ModelConfig, dtype: torch.dtype, sharded: bool, layers: int, blocks: int, *, packed: bool, levels: int = 0
) -> Policy:
    whole = config_from(config)
    made = on_meta(family_of(whole).shallow(whole, layers, blocks, levels), model, packed=packed)
    made.compute_dtype = dtype
    return made.to(dtype) if sharded else made


def _line(values: list[float], rows: Iterable[int]) -> Line:
    (a, b), (m, n) = values, tuple(rows)
    slope = (b - a) / (n - m)
    return Line(a - slope * m, slope)


def _part(held: list[list[tuple[float, float, float]]], rows: tuple[int, ...]) -> Part:
    """From (kept, forward, backward), of one and of two layers, over two numbers of rows."""
    one, two = ([_line([run[k] for run in runs], rows) for k in range(3)] for runs in held)
    kept, forward = two[0] + one[0] * -1, two[1] + one[1] * -1
    return Part(one[0] + kept * -1, kept, one[1] + forward * -1, forward, one[2])


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that operators make, for as long as somebody has them; those of `known` tensors do not count."""

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self._seen = {x.untyped_storage()._cdata: 0 for x in known}
        self._known = list(known)  # a freed storage's address would be another's

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_iter(out):
            if isinstance(x, Tensor):
                self._count(x.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, storage._cdata)

    def _gone(self, address: int) -> None:
        self.now -= self._seen.pop(address, 0)


def _held(policy: Policy, run: Callable[[], Tensor], *, grad: bool) -> tuple[float, float, float]:
    """Bytes kept after a forward pass, and how many more its fullest moment and that of the backward pass have; gradients exist before."""
    known = [*policy.parameters(), *policy.buffers()]
    if grad:
        for p in policy.parameters():
            p.grad = torch.empty_like(p) if p.requires_grad else None
            known += [p.grad] if p.grad is not None else []
    live = Live(known)
    with torch.autocast("cpu", torch.bfloat16, enabled=policy.compute_dtype == torch.bfloat16), torch.set_grad_enabled(grad), live:
        out = run()
        if not grad:
            del out
            return live.now, live.peak - live.now, 0.0
    kept, forward = live.now, live.peak - live.now
    live.peak = live.now
    if out.requires_grad:
        with live:
            out.backward(torch.empty_like(out))
    return kept, forward, live.peak - kept


def _language(policy: Policy, rows: int, *, packed: bool) -> tuple[float, float, float]:
    trunk = policy.base.model
    like = trunk.get_input_embeddings().weight
    graph = like.requires_grad or policy.trains_tower
    positions = torch.empty(3, 1, rows, dtype=torch.int64)
    given: dict[str, Any] = {"attention_mask": None, "packed": _batch(rows)}
    if not packed:
        given = {"attention_mask": torch.empty(1, 1, rows, rows, dtype=torch.bool)}

    def run() -> Tensor:
        embeds = torch.empty(1, rows, like.shape[1], dtype=like.dtype).requires_grad_(graph)
        out: Tensor = trunk.language_model(inputs_embeds=embeds, position_ids=positions, use_cache=False, **given).last_hidden_state
        return out

    return _held(policy, run, grad=True)


def _tower(policy: Policy, arguments: VisionArguments, *, grad: bool) -> tuple[float, float, float]:
    visual, vision = policy.base.model.visual, policy.base.config.vision_config
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    dtype = visual.dtype if policy.compute_dtype == torch.float32 else policy.compute_dtype
    return _held(policy, lambda: encode_images(visual, torch.empty(arguments.patches, width, dtype=dtype), arguments), grad=grad)


def _reading(policy: Policy, rows: int) -> float:
    model, dtype = policy.base.model.language_model, next(policy.parameters()).dtype
    layers, heads, width = kv_shape(policy.base.config)
    pages = Pages.empty((layers, -(-rows // 16) + 1, 16, heads, width), dtype, torch.device("cpu"))
    slots, positions = torch.empty(rows, dtype=torch.int64), torch.empty(3, rows, dtype=torch.int64)
    trunk = Trunk(model, 1)
    live = Live([*policy.parameters(), *policy.buffers(), pages.keys, pages.values])
    with torch.no_grad(), live:
        trunk.read(torch.empty(rows, model.config.hidden_size, dtype=dtype), pages.at(slots, *trunk.turns(positions)), _batch(rows))
    return float(live.peak)


def _batch(rows: int) -> PackedBatch:
    """One sequence, as far as the attention reads a batch."""
    nothing, ids = Segments(torch.zeros(1, dtype=torch.int32), (), 0), torch.empty(0, dtype=torch.int64)
    segments = Segments(torch.empty(2, dtype=torch.int32), (rows,), rows)
    return PackedBatch(ids, ids, segments, 0, 0, nothing, nothing, (), ids, ids, ids, ids)


def mask_bytes(rows: int, longest: int) -> float:
    """Of the mask that padded rows are attended by: (B, 1, L, L) bool."""
    return math.ceil(rows / max(1, longest)) * float(longest) ** 2

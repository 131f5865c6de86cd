"""What a rank holds of the model whatever it does: weights, their masters, moments, gradients, a reference. Exact, in bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from actial_fast.budget.gpus import Machine
from actial_fast.budget.models import Shapes, Weight
from actial_fast.model.nf4 import BLOCK
from actial_fast.settings.recipe import GRPORecipe, SFTRecipe
from actial_fast.train import quantised

SCALES = 256  # of NF4, that share a scale where they are held in 8 bits themselves


@dataclass(frozen=True)
class Shares:
    """Bytes on one rank. cast: 16-bit copies of trained 32-bit weights, which autocast keeps during a pass on CUDA where FSDP does not hand
    the layers 16-bit ones; gathered: 16-bit weights of the whole model; block, ends: of the largest layer, and of the largest of what is
    no layer; tied: of a head that is the embedding, which stays gathered throughout a pass; whole_gradients: of the whole model in
    float32; checkpoint, final: on disk, of all ranks together; largest: tensor, in float32; matrix: the largest one of the layers, in 16
    bits, which NF4 unpacks."""

    weights: float
    masters: float
    moments: float
    gradients: float
    reference: float
    cast: float
    gathered: float
    block: float
    ends: float
    tied: float
    whole_gradients: float
    checkpoint: float
    final: float
    largest: float
    matrix: float


def shares_of(recipe: SFTRecipe | GRPORecipe, shapes: Shapes, machine: Machine) -> Shares:
    """The shares of a rank of this machine."""
    model, optim, dist = recipe.model, recipe.optim, recipe.dist
    parts = max(1, machine.count // dist.replicate) if dist.fsdp else 1
    compute = 2 if machine.cuda else 4
    sharded = dist.fsdp and machine.count > 1

    def total(of: Callable[[Weight], float]) -> float:
        return sum(map(of, shapes.weights))

    def packed(w: Weight) -> bool:
        return model.quantize == "nf4" and w.linear

    def stored(w: Weight) -> float:  # matrices in NF4 are no parameters: every rank has them whole
        return w.numel * (nf4(model.quantize_twice) if packed(w) else w.bytes / parts)

    def moments(w: Weight) -> float:
        return w.trained * moment_bytes(optim.kind, w.shape)

    masters = total(lambda w: 4.0 * w.numel * w.trained) if optim.master else 0.0
    in_32 = total(lambda w: 2.0 * w.numel * (w.trained and w.bytes == 4)) if machine.cuda and not sharded else 0.0
    groups: dict[str, int] = {}
    for w in shapes.weights:
        groups[w.group] = groups.get(w.group, 0) + w.numel * (not packed(w))
    layers = [n for name, n in groups.items() if name[-1].isdigit()]
    others = [n for name, n in groups.items() if not name[-1].isdigit()]
    moved = total(moments)
    return Shares(
        weights=total(stored),
        masters=masters / parts,
        moments=moved / parts,
        gradients=total(lambda w: w.numel * w.trained * w.bytes) / parts,
        reference=_reference(recipe, shapes) / parts,
        cast=in_32,
        gathered=compute * sum(groups.values()) if sharded else 0.0,
        block=compute * max(layers, default=0) if sharded else 0.0,
        ends=compute * max(others) if sharded else 0.0,
        tied=compute * groups["embedding"] if sharded and "head" not in groups else 0.0,
        whole_gradients=4.0 * shapes.trained if sharded else 0.0,
        checkpoint=total(lambda w: w.trained * w.numel * w.bytes) + masters + moved,
        final=4.0 * shapes.numel,
        largest=max(w.numel * 4.0 for w in shapes.weights),
        matrix=compute * max((w.numel for w in shapes.weights if w.linear), default=0),
    )


def nf4(twice: bool) -> float:
    """Bytes of a number in NF4: half of one, and its share of the scales, which `twice` are 8-bit numbers with scales of their own."""
    return 0.5 + (1 / BLOCK + 4 / (BLOCK * SCALES) if twice else 4 / BLOCK)


def moment_bytes(kind: str, shape: tuple[int, ...]) -> float:
    """Bytes of AdamW's two moments of a parameter: float32, or 8 bits and a float32 magnitude for every block of a row."""
    if kind == "adamw" or not quantised.fits(torch.Size(shape)):
        return 8.0 * math.prod(shape)
    return 2.0 * math.prod(shape) + 8.0 * shape[0] * quantised.blocks_of(math.prod(shape[1:]))


def _reference(recipe: SFTRecipe | GRPORecipe, shapes: Shapes) -> float:
    """Of the frozen copy of the starting weights, which a run with adapters does without."""
    if isinstance(recipe, SFTRecipe) or recipe.model.lora.rank or not (recipe.loss.beta > 0 or not recipe.skip_reference):
        return 0.0
    return shapes.numel * (2.0 if recipe.model.frozen_dtype == "bfloat16" else 4.0)

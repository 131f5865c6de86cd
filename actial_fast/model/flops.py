"""The FLOPs that packed passes of a step need, part by part: what MFU counts, and by which bench.step.ledger has its least.

A linear layer of W weights (each of an adapter's two is a layer of its own, kept apart from what it adapts) over R rows needs

    forward           2 W R
    weight gradient   2 W R   where its weights are trained
    input gradient    2 W R   where anything before it, in the order of the forward pass, is trained: how deep that must go, the first
                              trained layer decides

and attention over a number of pairs (a query and a key), with d the width of all query heads,

    forward           4 d pairs   two products
    backward         10 d pairs   flash attention's five, where anything up to its queries, keys and values is trained

Rows and pairs, for sequences in groups that begin alike, with U distinct images, and T predicted tokens:

    vision     patches of the U images (merged tokens in the merger); pairs within their windows, or in full layers within their frames
    language   of each group its longest common beginning once, c, and of each member i what follows, r_i, but its last token: it predicts
               nothing; pairs c (c + 1) / 2 + sum of r_i c + r_i (r_i + 1) / 2
    head       T

so a layer that is trained amid trained ones takes 6 W R, the patch embedding 4 W R, a frozen head 4 W R, a frozen tower its forward pass.
A pass without gradients needs the forward terms, and so does sampling: a prompt once, every token of a reply once. A tower of which nothing
is trained sees an image once for all passes of a step. bench.step.minimum has the sequences of a pass as one tree instead: rows and
predictions behind the same tokens once, however late sequences part. Every row counts in every layer, though rows that predict nothing need
of the last layer keys and values only. Norms, activations, softmax, embeddings and the optimizer are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from actial_fast.model.families.family import Aside, Layers
from actial_fast.model.families.known import family_of
from actial_fast.model.nf4 import NF4Linear
from actial_fast.packing.batch import Sequence

PARTS = ("vision_forward", "vision_backward", "language_forward", "language_backward", "head")


@dataclass(frozen=True)
class Work:
    """What sequences in groups need. predicted: tokens; tokens: what a path that shares nothing sees; images: grids of the
    distinct ones by their keys."""

    rows: int
    pairs: int
    predicted: int
    tokens: int
    images: dict[str, tuple[int, int, int]]


def work_of(groups: Iterable[tuple[int, Many[Sequence]]]) -> Work:
    """The rows, pairs and images of groups of sequences: how many tokens the members begin with alike, and the members.
    Pictures count once, whoever shows them."""
    rows = pairs = predicted = tokens = 0
    images: dict[str, tuple[int, int, int]] = {}
    for alike, members in groups:
        lengths = [len(s.ids) for s in members]
        common = min(alike, *lengths, min(lengths) - 1)  # a last token is no input
        rows += common
        pairs += common * (common + 1) // 2
        for length in lengths:
            rest = length - 1 - common
            rows += rest
            pairs += rest * common + rest * (rest + 1) // 2
        predicted += sum(int(np.count_nonzero(s.trained[1:])) for s in members)
        tokens += sum(lengths)
        for s in members:  # replies in turns may have been shown others
            images |= zip(s.images, s.grids, strict=True)
    return Work(rows, pairs, predicted, tokens, images)


def images_once(works: Many[Work]) -> list[Work]:
    """The works of a step's passes, in order, each with the images that none before it had: what a frozen tower sees."""
    seen: set[str] = set()
    out = []
    for work in works:
        out.append(replace(work, images={key: grid for key, grid in work.images.items() if key not in seen}))
        seen |= work.images.keys()
    return out


def minimum(model: Any, work: Work, *, backward: bool, adapters: bool = True) -> dict[str, int]:
    """FLOPs per part of one pass of a transformers model of a known family, adapters and what is frozen included, by the formulas above.

    backward: with gradients; adapters: on, where there are any.
    """
    tower, text, grids = model.model.visual, model.model.language_model, list(work.images.values())
    vision, tower_trained, added = _both(family_of(model).vision_layers(tower, grids), False, adapters)
    trained = (tower_trained and bool(grids)) or _trained(text.embed_tokens)
    language, trained, _ = _both(_language(text, work, added if grids else []), trained, adapters)
    (forward, gradients), _, _ = _both([Layers((model.lm_head,), work.predicted)], trained, adapters)
    return {
        "vision_forward": vision[0],
        "vision_backward": vision[1] * backward,
        "language_forward": language[0],
        "language_backward": language[1] * backward,
        "head": forward + gradients * backward,
    }


class Least:
    """The sum of `minimum` over its parts, for the passes of a run: what is trained stays so. The layers are looked at once, after which a
    step costs the host next to nothing: FLOPs are so many a row, a pair, a predicted token and an image of a size."""

    def __init__(self, model: Any):
        self._model = model
        self._found: dict[Any, int] = {}

    def __call__(self, work: Work, *, backward: bool, adapters: bool = True) -> int:
        """FLOPs of one pass."""
        grids, how = list(work.images.values()), (backward, adapters)
        total = sum(self._one(0, grid, how) for grid in grids)
        for unit, count in enumerate((work.rows, work.pairs, work.predicted)):
            total += count * self._one(unit + 1, grids[0] if grids else None, how)
        return total

    def _one(self, unit: int, grid: tuple[int, int, int] | None, how: tuple[bool, bool]) -> int:
        """Of one row, pair or predicted token (unit 1, 2, 3), given whether there are images, or of an image (0)."""
        key = unit, grid if unit == 0 else grid is not None, how
        if key not in self._found:
            images = {} if grid is None else {"": grid}
            rows, pairs, predicted = (int(unit == k) for k in (1, 2, 3))
            with_it, without = Work(rows, pairs, predicted, 0, images), Work(0, 0, 0, 0, images if unit else {})
            one, none = (sum(minimum(self._model, work, backward=how[0], adapters=how[1]).values()) for work in (with_it, without))
            self._found[key] = one - none
        return self._found[key]


def _language(text: Any, work: Work, added: Many[bool]) -> Iterator[Layers]:
    """added: of each further level of the features, whether anything that it comes from is trained; it is added behind a layer."""
    for number, layer in enumerate(text.layers):
        attention, mlp = layer.self_attn, layer.mlp
        width = attention.head_dim * text.config.num_attention_heads
        inside = tuple(getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name))
        heads = (attention.q_proj, attention.k_proj, attention.v_proj)
        fed = any(added[number - 1 : number]) if number else False
        yield Layers(heads, work.rows, width * work.pairs, layer.input_layernorm, inside, fed)
        yield Layers((attention.o_proj,), work.rows)
        yield Layers((mlp.gate_proj, mlp.up_proj), work.rows, norm=layer.post_attention_layernorm)
        yield Layers((mlp.down_proj,), work.rows)
    yield Layers((), work.rows, norm=text.norm, fed=any(added[: len(text.layers)]))


def _both(order: Iterable[Layers | Aside], trained: bool, adapters: bool) -> tuple[tuple[int, int], bool, list[bool]]:
    """FLOPs forward and backward of layers in the order of the forward pass, and whether anything up to their end is trained, given
    whether anything before them is; and the same of the end of each that stands aside."""
    forward = backward = 0
    aside: list[bool] = []
    for at in order:
        if isinstance(at, Aside):
            both, end, _ = _both(at.layers, trained, adapters)
            forward, backward = forward + both[0], backward + both[1]
            aside.append(end)
            continue
        trained |= at.fed or (at.norm is not None and _trained(at.norm))
        for layer in at.layers:
            for weights, learned, follows in _weights(layer, trained, adapters):
                forward += 2 * weights * at.rows
                backward += 2 * weights * at.rows * (learned + follows)
        trained |= any(map(_trained, (*at.layers, *at.inside)))
        forward += 4 * at.attended
        backward += 10 * at.attended * trained
    return (forward, backward), trained, aside


def _weights(layer: Any, trained: bool, adapters: bool) -> Iterator[tuple[int, bool, bool]]:
    """How many weights a layer and its adapters have, whether they are trained, and whether anything before each is, given whether anything
    before the layer is."""
    base = layer.base_layer if hasattr(layer, "base_layer") else layer
    if isinstance(base, NF4Linear):
        yield base.in_features * base.out_features, False, trained
    else:
        yield base.weight.numel(), base.weight.requires_grad, trained
    if adapters and hasattr(layer, "lora_A"):
        for down, up in zip(layer.lora_A.values(), layer.lora_B.values(), strict=True):
            yield down.weight.numel(), down.weight.requires_grad, trained
            yield up.weight.numel(), up.weight.requires_grad, trained or _trained(down)


def _trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())

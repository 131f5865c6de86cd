"""The work of one GRPO step: executed FLOPs, tower calls, image preparations and padding, beside the least that the step needs.

    python -m bench.ledger --recipe recipes/quickstart.yaml [run=... key=value ...] [--sides packed plain trl] [--json FILE]
    python -m bench.ledger --narrow [--prompts 1 --n 16 --mean 300] [--sides packed plain trl] [--json FILE]

With --recipe a real step is drawn and sampled from the stage's starting weights (those of a quickstart must be there); old and reference
log-probs are counted where the recipe asks for them. With --narrow it is the update of `bench.update`. TRL is counted at beta 0.

Executed FLOPs are counted at the dispatcher, operator by operator, during the real step on the CPU: products by PyTorch's own formulas,
attention by `attention_forward` and `attention_backward` below; everything else (norms, activations, softmax, optimizer) is left out.
Vision and language model are told apart by hooks; the rest, forward and backward together, is the head.

The minimum, with d the width of all query heads, W the weights of a part's linear layers, U distinct images, T predicted tokens:

    vision forward    2 W patches + 2 W_merger merged + 4 d (pairs within the windows or images of each layer)       over the U images
    language forward  2 W rows + 4 d layers pairs
        rows   of each group its longest common beginning once, c, and of each member i what follows, r_i, but its last token: it
               predicts nothing. pairs  c (c + 1) / 2 + sum of r_i c + r_i (r_i + 1) / 2
    backward          4 W per row (2 W for the patch embedding, whose input has no gradient); 10 d pairs: flash attention's five products
    head              2 T hidden vocabulary forward, as much again for each of its two gradients

A pass without gradients adds the forward terms. All weights are taken to be trained.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from actial_fast import grpo
from actial_fast.config import load_recipe
from actial_fast.grpo import Sample
from actial_fast.model import load_reference
from actial_fast.processor import Processor
from actial_fast.quickstart import _resolved
from actial_fast.recipe import GRPORecipe
from actial_fast.training import open_stage
from bench.timing import machine
from bench.update import WHERE, build, make_case

PARTS = ("vision_forward", "vision_backward", "language_forward", "language_backward", "head")
MERGE, PATCH = 2, 14


def attention_forward(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, causal: bool = False, **_: Any) -> int:
    """FLOPs of two products over the pairs of (B, H, n, D) and (B, H, m, D): all n m of them, n (n + 1) / 2 where causal. A mask given as
    a tensor spares nothing."""
    (batch, heads, n, dim), m = q.shape, k.shape[2]
    assert not causal or n == m, "a causal call over unequal lengths"
    return 4 * batch * heads * dim * (n * (n + 1) // 2 if causal else n * m)


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dropout: float = 0.0, causal: bool = False, **_: Any
) -> int:
    """FLOPs of the five products of flash attention's backward pass."""
    return attention_forward(q, k, v, dropout, causal) * 5 // 2


FORMULAS = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}


class Count(TorchDispatchMode):
    """Counts while it is active. flops: per part; tower_calls, images: of the vision tower; rows: through the language model, padding
    included."""

    def __init__(self, *models: nn.Module):
        super().__init__()
        self.flops, self.tower_calls, self.images, self.rows = dict.fromkeys(PARTS, 0), 0, 0, 0
        self._part = "head"
        self._handles = [handle for model in models for handle in self._watch(model.model)]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if (formula := FORMULAS.get(func._overloadpacket)) is not None:
            self.flops[self._part] += formula(*args, **(kwargs or {}), out_val=out)
        return out

    def __exit__(self, *error):
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def _watch(self, trunk: nn.Module) -> Iterator[Any]:
        def vision(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self._part = "vision_forward"
            self.tower_calls += 1
            self.images += len(kwargs["grid_thw"])

        def language(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self._part = "language_forward"
            self.rows += math.prod(kwargs["inputs_embeds"].shape[:2])

        def left(name: str, field: str) -> Callable[..., None]:
            def begin(grad: Tensor) -> None:
                self._part = name  # autograd runs backwards through the forward pass, so what follows is this module's

            def hook(module: nn.Module, args: tuple, out: Any) -> None:
                self._part = "head"
                if out[field].requires_grad:
                    out[field].register_hook(begin)

            return hook

        yield trunk.visual.register_forward_pre_hook(vision, with_kwargs=True)
        yield trunk.visual.register_forward_hook(left("vision_backward", "pooler_output"))
        yield trunk.language_model.register_forward_pre_hook(language, with_kwargs=True)
        yield trunk.language_model.register_forward_hook(left("language_backward", "last_hidden_state"))


@dataclass(frozen=True)
class Work:
    """What samples, in groups of n, need at the least. images: distinct ones' grids; tokens: what a path that shares nothing sees."""

    rows: int
    pairs: int
    predicted: int
    tokens: int
    images: tuple[tuple[int, int, int], ...]


def work_of(samples: list[Sample], n: int) -> Work:
    """The least rows, pairs and images of the samples, of which each n share a prompt."""
    rows = pairs = 0
    images: dict[str, tuple[int, int, int]] = {}
    for start in range(0, len(samples), n):
        group = [s.sequence for s in samples[start : start + n]]
        shortest = min(map(len, group)) - 1  # a last token is no input
        same = np.all([s.ids[:shortest] == group[0].ids[:shortest] for s in group], axis=0)
        common = shortest if same.all() else int(same.argmin())
        rest = [len(s) - 1 - common for s in group]
        rows += common + sum(rest)
        pairs += common * (common + 1) // 2 + sum(r * common + r * (r + 1) // 2 for r in rest)
        images |= zip(group[0].images, group[0].grids, strict=True)
    return Work(rows, pairs, sum(map(len, samples)), sum(len(s.sequence) for s in samples), tuple(images.values()))


def minimum(model: nn.Module, work: Work, *, backward: bool) -> dict[str, int]:
    """FLOPs per part, by the formulas above."""
    tower, text = model.model.visual, model.model.language_model
    vision, language = tower.config, text.config
    patches = sum(map(math.prod, work.images))
    embed, blocks = tower.patch_embed.proj.weight.numel(), _weights(tower.blocks)
    linear = blocks * patches + _weights(tower.merger) * (patches // MERGE**2)
    full = sum(t * (h * w) ** 2 for t, h, w in work.images)
    windows = sum(size**2 for grid in work.images for size in window_sizes(grid, vision.window_size // PATCH))
    layers = len(set(vision.fullatt_block_indexes) & set(range(vision.depth)))
    seen = vision.hidden_size * (layers * full + (vision.depth - layers) * windows)
    weights = _weights(text) * work.rows
    heads = language.num_attention_heads * (language.hidden_size // language.num_attention_heads)
    attended = heads * language.num_hidden_layers * work.pairs
    head = 2 * work.predicted * model.lm_head.weight.numel()
    return {
        "vision_forward": 2 * (embed * patches + linear) + 4 * seen,
        "vision_backward": (2 * embed * patches + 4 * linear + 10 * seen) * backward,
        "language_forward": 2 * weights + 4 * attended,
        "language_backward": (4 * weights + 10 * attended) * backward,
        "head": head * (3 if backward else 1),
    }


def window_sizes(grid: tuple[int, int, int], side: int) -> list[int]:
    """Patches in each attention window of an image (frames, rows, columns): squares of `side` patches, cut off at its edges."""
    frames, *sides = grid
    high, wide = ([min(side, length - at) for at in range(0, length, side)] for length in sides)
    return [a * b for a, b in itertools.product(high, wide)] * frames


def _weights(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


@dataclass(frozen=True)
class Step:
    """One side's step, ready to run. needed: the minimum over its passes; prepared: image preparations while the step was drawn."""

    models: tuple[nn.Module, ...]
    run: Callable[[], object]
    works: tuple[Work, ...]
    needed: dict[str, int]
    prepared: int | None = None


def narrow_step(args: argparse.Namespace, side: str, folder: str) -> Step:
    """The update of bench.update."""
    case = make_case(args.prompts, args.n, args.mean, folder)
    made = build({"packed": "ours"}.get(side, side), case, args.their_batch, folder)
    made.prepare()
    work = work_of(case.samples, case.n)
    return Step((made.model,), made.accumulate, (work,), minimum(made.model, work, backward=True))


def recipe_step(args: argparse.Namespace, side: str, folder: str) -> Step:
    """The first step of a recipe's GRPO stage: log-probs and gradients of samples drawn from its starting weights."""
    recipe = load_recipe(args.recipe, args.overrides)
    recipe = _resolved(recipe).grpo if recipe.kind == "quickstart" else recipe
    if not isinstance(recipe, GRPORecipe):
        raise ValueError(f"{args.recipe}: a recipe of kind {recipe.kind}; the ledger counts a GRPO step, so give a grpo or quickstart one")
    if recipe.model.freeze or recipe.model.lora.rank:
        raise ValueError(
            f"{args.recipe}: the ledger's minimum is that of a step that trains all weights; unset model.freeze and model.lora"
        )
    recipe = replace(recipe, packing=side, data=replace(recipe.data, workers=0, image_cache=folder))
    stage = open_stage(recipe, 0, WHERE, Processor.encode_prompt)
    policy, processor = stage.policy, stage.processor
    examples = stage.stream.next_batch(recipe.prompts)
    stage.stream.close()
    samples = grpo._sample(policy, processor, examples, recipe)
    reference = load_reference(recipe.model, WHERE.device, packed=side == "packed") if recipe.loss.beta > 0 else None

    minibatches = [[s for s in samples if s.minibatch == m] for m in range(recipe.prompts // recipe.minibatch)]
    counts = [(sum(map(len, each)), len(each)) for each in minibatches]

    def run() -> None:
        kept = [grpo._kept(each, recipe) for each in minibatches]
        ahead = grpo._passes(policy, reference, processor, kept, recipe, WHERE)
        ready = grpo._log_probs(policy, reference, kept, ahead, recipe)
        for each, count, rounds in zip(ready, counts, ahead.updates, strict=True):
            grpo._accumulate(policy, each, count, rounds, recipe, WHERE)

    kept = [grpo._kept(each, recipe) for each in minibatches]
    works = [(each, True) for each in kept]
    works += [([s for each in kept[1:] for s in each], False)] if len(kept) > 1 else []
    works += [([s for each in kept for s in each], False)] if reference else []
    passes = [(work_of(chosen, recipe.sampling.n), grad) for chosen, grad in works]
    minima = [minimum(policy.base, work, backward=grad) for work, grad in passes]
    works = tuple(work for work, _ in passes)
    models = (policy.base, *((reference.base,) if reference else ()))
    return Step(models, run, works, {part: sum(m[part] for m in minima) for part in PARTS}, processor.store.decodes)


def counted(step: Step) -> dict[str, Any]:
    """The step run under the counter, beside what it needs."""
    with Count(*step.models) as count:
        step.run()
    total, least = sum(count.flops.values()), sum(step.needed.values())
    work = step.works[0]
    return {
        "flops": count.flops,
        "minimum": step.needed,
        "ratio": {part: round(count.flops[part] / step.needed[part], 4) for part in PARTS if step.needed[part]},
        "total_flops": total,
        "total_minimum": least,
        "total_ratio": round(total / least, 4),
        "tower_calls": count.tower_calls,
        "tower_images": count.images,
        "distinct_images": sum(len(w.images) for w in step.works),
        "images_prepared": step.prepared,
        "rows": count.rows,
        "minimum_rows": sum(w.rows for w in step.works),
        "rows_without_sharing_or_padding": sum(w.tokens for w in step.works),
        "passes": len(step.works),
        "predicted_tokens": work.predicted,
    }


def told(result: dict[str, Any]) -> str:
    """The result as lines for a terminal."""
    about = result["machine"]
    lines = [f"{result['what']}; {about['date']}, commit {about['commit']}"]
    for name, row in result["sides"].items():
        lines.append(
            f"{name:<7} {row['total_flops'] / 1e9:10.2f} GFLOP, {row['total_ratio']:.3f} x the minimum; rows {row['rows']:,} "
            f"(least {row['minimum_rows']:,}); {row['tower_calls']} tower calls, {row['tower_images']} images "
            f"({row['distinct_images']} distinct)" + ("" if row["images_prepared"] is None else f", {row['images_prepared']} prepared")
        )
        lines.append("        " + "  ".join(f"{p} {row['flops'][p] / 1e9:.2f} ({row['ratio'].get(p, 0):.2f} x)" for p in PARTS))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Count, print, and write the JSON when asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.ledger", description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the recipe")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--recipe", help="a recipe of kind grpo or quickstart")
    what.add_argument("--narrow", action="store_true", help="the narrow model and lengths of bench.update")
    parser.add_argument("--sides", nargs="+", choices=("packed", "plain", "trl"), default=["packed", "plain"], help="default: packed plain")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the figures to this file")
    for name, value in (("prompts", 1), ("n", 16), ("their-batch", 4)):
        parser.add_argument(f"--{name}", type=int, default=value, help="--narrow: as in bench.update (default: %(default)s)")
    parser.add_argument("--mean", type=float, default=300, help="--narrow: as in bench.update (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.recipe and "trl" in args.sides:
        parser.error("--sides: TRL is counted with --narrow")
    if args.narrow and (min(args.prompts, args.n, args.their_batch) < 1 or args.prompts * args.n % args.their_batch):
        parser.error(f"--their-batch: {args.prompts} x {args.n} completions must be a multiple of it, got {args.their_batch}")

    shape = f"{args.prompts} prompts x {args.n} completions of mean {args.mean:g}"
    result = {"schema": 1, "machine": machine(), "what": args.recipe or f"narrow, {shape}", "overrides": args.overrides, "sides": {}}
    for side in args.sides:
        with tempfile.TemporaryDirectory() as folder:
            result["sides"][side] = counted((narrow_step if args.narrow else recipe_step)(args, side, folder))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(told(result))


if __name__ == "__main__":
    main()

"""The work of one GRPO step: executed FLOPs, tower calls, image preparations and padding, beside the least that the step needs.

    python -m bench.step.ledger --recipe recipes/quickstart.yaml [run=... key=value ...] [--sides packed plain trl] [--json FILE]
    python -m bench.step.ledger --narrow | --shape 7b [--lora 64] [--prompts 1 --n 16 --mean 300] [--sides packed plain trl] [--json FILE]

With --recipe a real step is drawn, sampled once for all sides from the stage's starting weights (those of a quickstart must be there);
old and reference log-probs are counted where the recipe asks for them. With --narrow it is the update of `bench.step.update`; with
--shape 7b its prompts go through the widths of Qwen2.5-VL-7B, the depth cut to 2 language layers and 2 vision blocks, one with full
attention. --lora: adapters of that rank on the language model in the place of its weights, the tower frozen.

Executed FLOPs are counted at the dispatcher, operator by operator, during the real step on the CPU: products by PyTorch's own formulas,
attention by `attention_forward` and `attention_backward` below; everything else (norms, activations, softmax, optimizer) is left out. At
the 7B's widths the step runs as it is, but for its products, which give zeros at once. Vision and language model are told apart by hooks;
the rest, forward and backward together, is the head. The minimum takes every row once, whichever sequences begin with it, by the formulas
of `actial_fast.model.flops`.

TRL does what the recipe asks by its own code, the reference pass included. It prepares images when it generates and is handed their patches
here, so its image preparations are not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from actial_fast import grpo
from actial_fast.grpo import Sample
from actial_fast.model.flops import PARTS, Work, images_once, minimum
from actial_fast.model.policy import Policy, load_policy, load_reference
from actial_fast.model.processor import Processor
from actial_fast.quickstart import _resolved
from actial_fast.rollout.embedded import Embedded
from actial_fast.rollout.groups import Groups
from actial_fast.settings.config import load_recipe
from actial_fast.settings.model import LoRAConfig, ModelConfig
from actial_fast.settings.recipe import GRPORecipe
from actial_fast.tasks.rewards import Scorer
from actial_fast.train.stage import open_stage
from bench.harness.timing import machine
from bench.step.minimum import work_of
from bench.step.models import config_of, narrow_model, with_adapters
from bench.step.shapes import SHAPES
from bench.step.update import WHERE, Case, make_case, our_side, trl_side

ABOUT = {"narrow": "narrow", "7b": "Qwen2.5-VL-7B's widths, 2 language layers, 2 vision blocks of which 1 has full attention"}


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
    included. compute: False to have zeros for the products and attention instead of computing them."""

    def __init__(self, *models: nn.Module, compute: bool = True):
        super().__init__()
        self.flops, self.tower_calls, self.images, self.rows = dict.fromkeys(PARTS, 0), 0, 0, 0
        self._part, self._compute = "head", compute
        self._handles = [handle for model in models for handle in self._watch(model.model)]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, formula = kwargs or {}, FORMULAS.get(func._overloadpacket)
        out = func(*args, **kwargs) if formula is None or self._compute else _zeros(func, args, kwargs)
        if formula is not None:
            self.flops[self._part] += formula(*args, **kwargs, out_val=out)
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


def _zeros(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What an operator gives for factors of zeros, as shaped on the meta device."""
    if (out := kwargs.get("out")) is not None:
        return out if out is args[0] else out.zero_()  # addmm in place adds nothing

    meta = tree_map_only(Tensor, lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta"), (args, kwargs))
    return tree_map_only(Tensor, _untouched, func(*meta[0], **meta[1]))


def _untouched(like: Tensor) -> Tensor:
    """Zeros on the CPU, shaped as `like`, in memory that is not taken before somebody writes to it (torch.zeros writes)."""
    flat = torch.from_numpy(np.zeros(like.untyped_storage().nbytes(), np.uint8)).view(like.dtype)
    return flat.as_strided(like.shape, like.stride())


@dataclass(frozen=True)
class Step:
    """One side's step, ready to run. works: of its passes; needed: the minimum over them; prepared: image preparations so far,
    None where they are not counted; compute: as of Count."""

    models: tuple[nn.Module, ...]
    run: Callable[[], object]
    works: list[Work]
    needed: dict[str, int]
    prepared: Callable[[], int | None] = lambda: None
    compute: bool = True


def shape_steps(args: argparse.Namespace, folder: str) -> Callable[[str], Step]:
    """The update of bench.step.update at the narrow or the 7B's widths, by the name of the side."""
    case = make_case(args.prompts, args.n, args.mean, folder)
    work = work_of(case.samples, case.image_token)

    def step(side: str) -> Step:
        model = _with_adapters(narrow_model(case.tokenizer) if args.shape == "narrow" else _wide_model(case.tokenizer), args.lora)
        made = trl_side(model, case, args.their_batch, folder) if side == "trl" else our_side(model, case, side, args.their_batch)
        made.prepare()
        needed = minimum(_base(model), work, backward=True)
        return Step((_base(model),), made.accumulate, [work], needed, compute=args.shape == "narrow")

    return step


def _wide_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLForConditionalGeneration:
    """A model of the 7B's widths, all weights 0."""
    with torch.device("meta"):
        text, vision = SHAPES["7b"].text | {"num_hidden_layers": 2}, SHAPES["7b"].vision | {"depth": 2, "fullatt_block_indexes": [1]}
        model = Qwen2_5_VLForConditionalGeneration(config_of(tokenizer, text, vision))
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(_untouched(parameter)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, _untouched(buffer))
    return model.train()


def _with_adapters(model: Qwen2_5_VLForConditionalGeneration, rank: int) -> Qwen2_5_VLForConditionalGeneration | PeftModel:
    return with_adapters(model, ModelConfig(lora=LoRAConfig(rank=rank))) if rank else model


def _base(model: Qwen2_5_VLForConditionalGeneration | PeftModel) -> Qwen2_5_VLForConditionalGeneration:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def recipe_steps(args: argparse.Namespace, folder: str) -> Callable[[str], Step]:
    """The first step of a recipe's GRPO stage, by the name of the side: log-probs and gradients of samples drawn from its starting weights.

    ValueError for a recipe without such a stage, and for TRL where one optimizer step has not all samples in whole micro-batches.
    """
    recipe = load_recipe(args.recipe, args.overrides)
    recipe = _resolved(recipe).grpo if recipe.kind == "quickstart" else recipe
    if not isinstance(recipe, GRPORecipe):
        raise ValueError(f"{args.recipe}: a recipe of kind {recipe.kind}; the ledger counts a GRPO step, so give a grpo or quickstart one")
    alone = replace(recipe, data=replace(recipe.data, workers=0, image_cache=folder))
    stage = open_stage(alone, 0, WHERE, Processor.encode_prompt, contextlib.ExitStack())
    processor = stage.processor
    with Scorer(recipe.rewards) as scorer:
        samples = Groups(Embedded(stage.policy, processor), processor, stage.stream, recipe, WHERE, scorer).of(1).samples
    stage.stream.close()
    minibatches = [[s for s in samples if s.minibatch == m] for m in range(recipe.prompts // recipe.minibatch)]

    def step(side: str) -> Step:
        policy = load_policy(recipe.model, WHERE.device, recipe.seed, packed=side == "packed")
        needed = passes_of(policy, minibatches, recipe, processor.image_token)
        if side != "trl":
            return _our_step(policy, minibatches, processor, replace(recipe, packing=side), needed)
        if len(minibatches) > 1 or len(samples) % recipe.micro_batch:
            raise ValueError(
                f"--sides: TRL is counted where one optimizer step has all samples in whole micro-batches; got {len(minibatches)} "
                f"mini-batches, and micro_batch {recipe.micro_batch} of {len(samples)} replies"
            )
        case = Case(processor.tokenizer, processor.store, samples, recipe.prompts, recipe.sampling.n)
        asked = {"beta": recipe.loss.beta, "temperature": recipe.sampling.temperature}
        made = trl_side(policy.model, case, recipe.micro_batch, folder, **asked)
        made.prepare()
        return Step((policy.base, *([made.reference] if made.reference else [])), made.accumulate, *needed)

    return step


def passes_of(policy: Policy, minibatches: list[list[Sample]], recipe: GRPORecipe, image_token: int) -> tuple[list[Work], dict[str, int]]:
    """The passes that a step needs, in order: old log-probs of late mini-batches, reference ones of all, each update; and their minimum."""
    kept = [grpo._kept(each, recipe) for each in minibatches]
    wanted = [([s for each in kept[1:] for s in each], {"backward": False})] if len(kept) > 1 else []
    if recipe.loss.beta > 0:
        wanted.append(([s for each in kept for s in each], {"backward": False, "adapters": False}))
    wanted += [(each, {"backward": True}) for each in kept]
    works = [work_of(samples, image_token) for samples, _ in wanted]
    works = works if policy.trains_tower else images_once(works)
    minima = [minimum(policy.base, work, **how) for work, (_, how) in zip(works, wanted, strict=True)]
    return works, {part: sum(each[part] for each in minima) for part in PARTS}


def _our_step(
    policy: Policy, minibatches: list[list[Sample]], processor: Processor, recipe: GRPORecipe, needed: tuple[list[Work], dict[str, int]]
) -> Step:
    reference = None
    if (recipe.loss.beta > 0 or not recipe.skip_reference) and not policy.adapted:
        reference = load_reference(recipe.model, WHERE.device, packed=recipe.packing == "packed")
    counts = [(sum(map(len, each)), len(each)) for each in minibatches]

    def run() -> None:
        kept = [grpo._kept(each, recipe) for each in minibatches]
        ahead = grpo._passes(policy, reference, processor, kept, recipe, WHERE)
        ready = grpo._log_probs(policy, reference, kept, ahead, recipe)
        for each, count, rounds in zip(ready, counts, ahead.updates, strict=True):
            grpo._accumulate(policy, each, count, rounds, recipe, WHERE)

    models = policy.base, *([reference.base] if reference else [])
    return Step(models, run, *needed, prepared=lambda: processor.store.decodes)


def counted(step: Step) -> dict[str, Any]:
    """The step run under the counter, beside what it needs."""
    with Count(*step.models, compute=step.compute) as count:
        step.run()
    total, least = sum(count.flops.values()), sum(step.needed.values())
    return {
        "flops": count.flops,
        "minimum": step.needed,
        "ratio": {part: round(count.flops[part] / step.needed[part], 4) for part in PARTS if step.needed[part]},
        "total_flops": total,
        "total_minimum": least,
        "total_ratio": round(total / least, 4),
        "tower_calls": count.tower_calls,
        "tower_images": count.images,
        "minimum_tower_images": sum(len(w.images) for w in step.works),
        "distinct_images": len({key for w in step.works for key in w.images}),
        "images_prepared": step.prepared(),
        "rows": count.rows,
        "minimum_rows": sum(w.rows for w in step.works),
        "rows_without_sharing_or_padding": sum(w.tokens for w in step.works),
        "passes": len(step.works),
    }


def told(result: dict[str, Any]) -> str:
    """The result as lines for a terminal."""
    about = result["machine"]
    lines = [f"{result['what']}; {about['date']}, commit {about['commit']}"]
    for name, row in result["sides"].items():
        prepared = "" if row["images_prepared"] is None else f"; {row['images_prepared']} prepared of {row['distinct_images']} distinct"
        lines.append(
            f"{name:<7} {row['total_flops'] / 1e9:10.2f} GFLOP, {row['total_ratio']:.3f} x the minimum; rows {row['rows']:,} "
            f"(least {row['minimum_rows']:,}); {row['tower_calls']} tower calls, {row['tower_images']} images "
            f"(least {row['minimum_tower_images']}){prepared}"
        )
        lines.append("        " + "  ".join(f"{p} {row['flops'][p] / 1e9:.2f} ({row['ratio'].get(p, 0):.2f} x)" for p in PARTS))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Count, print, and write the JSON when asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.step.ledger", description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the recipe")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--recipe", help="a recipe of kind grpo or quickstart")
    what.add_argument("--shape", choices=tuple(ABOUT), help="widths of the model that takes the prompts of bench.step.update")
    what.add_argument("--narrow", dest="shape", action="store_const", const="narrow", help="short for --shape narrow")
    parser.add_argument("--sides", nargs="+", choices=("packed", "plain", "trl"), default=["packed", "plain"], help="default: packed plain")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the figures to this file")
    for name, value in (("prompts", 1), ("n", 16), ("their-batch", 4)):
        parser.add_argument(f"--{name}", type=int, default=value, help="of a shape: as in bench.step.update (default: %(default)s)")
    parser.add_argument("--mean", type=float, default=300, help="of a shape: as in bench.step.update (default: %(default)s)")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="of a shape: adapters of this rank, a frozen tower")
    args = parser.parse_args(argv)
    if args.shape and (min(args.prompts, args.n, args.their_batch) < 1 or args.prompts * args.n % args.their_batch):
        parser.error(f"--their-batch: {args.prompts} x {args.n} completions must be a multiple of it, got {args.their_batch}")

    what = args.recipe
    if args.shape:
        adapters = f", adapters of rank {args.lora} on the language model and a frozen tower" if args.lora else ""
        what = f"{ABOUT[args.shape]}{adapters}; {args.prompts} prompts x {args.n} completions of mean {args.mean:g}"
    result = {"schema": 2, "machine": machine(), "what": what, "overrides": args.overrides, "sides": {}}
    with tempfile.TemporaryDirectory() as folder:
        step = (shape_steps if args.shape else recipe_steps)(args, folder)
        for side in args.sides:
            result["sides"][side] = counted(step(side))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(told(result))


if __name__ == "__main__":
    main()

"""What `actial plan` says that a run holds, beside what the process then held: largest resident memory on a CPU, shape by shape.

    python -m bench.step.memory [--cases REGEX] [--hidden 256] [--layers 6] [--json FILE]

Every case has a process of its own, a copy of one that has loaded the libraries. It loads a Qwen2.5-VL of random weights as a run does, and
makes two updates (loss, backward, AdamW; the first, of one sequence, so that there are gradients and moments; the second is measured) of a
prompt of about 800 tokens, two images in it, with a few replies; or draws replies with the embedded sampler: reading, several prompts and
few tokens each, or decoding, many tokens. Measured is VmHWM, set back before what is measured, over what the process held before the model
was loaded, when it had made the same with a small model (Linux). Predicted is the fullest moment of the budget's phase for the batch's own
size. The allocator gives memory back at once (MALLOC_MMAP_THRESHOLD_), one thread.

The result also has what the plan says of the shipped recipes on the machines that they are for; nothing of that is measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from actial_fast import grpo
from actial_fast.budget.gpus import GB, Machine, parse
from actial_fast.budget.models import config_of as widths_of
from actial_fast.budget.models import shapes_of
from actial_fast.budget.phases import Case, Phase, Size, phases_of
from actial_fast.budget.plan import Plan, plan
from actial_fast.budget.rates import rates_of
from actial_fast.budget.workload import Workload, assumed
from actial_fast.model.policy import load_policy
from actial_fast.packing.batch import Sequence
from actial_fast.rollout.embedded import Embedded
from actial_fast.rollout.protocol import Draw, awake
from actial_fast.settings.config import load_recipe, to_yaml
from actial_fast.settings.recipe import GRPORecipe, SFTRecipe
from actial_fast.train.optim import build_optimizer
from bench.harness.timing import machine
from bench.step.models import VOCABULARY, config_of, token_ids
from bench.step.shapes import narrow
from bench.step.update import WHERE, _status, make_case

ROOT = Path(__file__).parents[2]
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
SMALL = "small"  # a folder beside the checkpoint with another one
CLOSE = 0.10  # of what was measured: what a prediction may be off by
FULL = {"model.checkpointing": "full", "model.tower_checkpointing": "full"}
FROZEN = {"model.freeze": "[model.visual]"}
LORA = {"model.lora.rank": 16, **FROZEN}


@dataclass(frozen=True)
class Shape:
    """A case: keys of the recipe; prompts, with n replies of `mean` tokens each; draws: nothing is trained, replies are drawn."""

    keys: dict[str, Any] = field(default_factory=dict)
    prompts: int = 1
    n: int = 4
    mean: float = 250
    draws: bool = False


PLAIN = {"prompts": 1, "n": 2}
SHAPES = {
    "packed": Shape(),
    "packed, checkpoints": Shape(FULL),
    "packed, selective": Shape({"model.checkpointing": "selective", "model.tower_checkpointing": "full"}),
    "packed, frozen tower": Shape(FROZEN),
    "plain": Shape({"packing": "plain"}, **PLAIN),
    "plain, checkpoints": Shape({"packing": "plain", **FULL}, **PLAIN),
    "LoRA": Shape(LORA),
    "LoRA, checkpoints": Shape({**LORA, "model.checkpointing": "full"}),
    "LoRA, tower too": Shape({"model.lora.rank": 16, "model.lora.tower": True, "model.lora.merger": True}),
    "NF4": Shape({**LORA, "model.quantize": "nf4"}),
    "AdamW in 8 bits": Shape({"optim.kind": "adamw8bit", **FULL}),
    "moments on the host": Shape({"optim.offload": "always", **FULL}),
    "reading prompts": Shape(prompts=4, n=2, mean=2, draws=True),
    "decoding": Shape(prompts=1, n=128, mean=40, draws=True),
}


QLORA = ("model.path=Qwen/Qwen2.5-VL-7B-Instruct", "model.quantize=nf4")
ALL = ("model.lora.rank=0", "model.dtype=bfloat16", "model.tower_checkpointing=full", "optim.kind=adamw8bit", "optim.offload=always")
RECIPES = {  # recipe, machine, widths where the checkpoint is another stage's, keys
    "3B, LoRA": ("recipes/actial-1x24.yaml", "1x24", "", ()),
    "7B, QLoRA": ("recipes/actial-1x24.yaml", "1x24", "", QLORA),
    "7B, LoRA": ("recipes/actial-1x80.yaml", "1x80", "", ()),
    "7B, all weights, 8-bit moments on the host": ("recipes/actial-1x80.yaml", "1x80", "", ALL),
    "7B, 8-bit moments": ("recipes/actial-4x48.yaml", "4x48", "", ()),
    "7B, SFT, the paper's": ("recipes/actial-7b-sft.yaml", "8x80", "", ()),
    "7B, the paper's": ("recipes/actial-7b-grpo.yaml", "8x80", "7b", ()),
    "7B, larger micro-batches": ("recipes/actial-7b-grpo.yaml", "8x141", "7b", ("pack_tokens=65536", "pack_patches=131072")),
}


def recipe_of(shape: Shape, folder: Path) -> GRPORecipe:
    """The recipe of a case, on the checkpoint in `folder`."""
    keys = {"kind": "grpo", "model": {"path": str(folder)}, "loss": {"beta": 0.0}, "prompts": shape.prompts, "minibatch": shape.prompts}
    keys |= {"sampling": {"n": max(2, shape.n), "max_new_tokens": int(shape.mean)}, "micro_batch": shape.n, "pack_tokens": 1 << 20}
    keys |= {"pack_patches": 1 << 20, "eval": {"sources": []}}
    path = folder / "recipe.yaml"
    path.write_text(to_yaml(keys))
    recipe = load_recipe(path, [f"{key}={to_yaml(value) if not isinstance(value, str) else value}" for key, value in shape.keys.items()])
    assert isinstance(recipe, GRPORecipe)
    return recipe


def create(folder: Path, hidden: int, layers: int) -> None:
    """A checkpoint of random weights, and of so many layers and half as many tower blocks."""
    folder.mkdir(exist_ok=True)
    case = make_case(1, 1, 10, str(folder / "images"))
    text, vision = narrow(VOCABULARY, hidden)
    text |= {"num_hidden_layers": layers, "num_attention_heads": hidden // 32, "num_key_value_heads": hidden // 64}
    vision |= {"depth": layers // 2, "fullatt_block_indexes": [layers // 2 - 1]}
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config_of(case.tokenizer, text, vision)).save_pretrained(folder)


def one(name: str, folder: Path) -> dict[str, Any]:
    """A case: bytes measured in a process of its own, and predicted, with the fullest moment's items."""
    shape = SHAPES[name]
    measured, size = in_process(shape, folder)
    phase = predicted(shape, folder, Size(*size) if size else None)
    items = {item: round(held / 1e6, 1) for item, held in phase.device.items()}
    figures = {"measured_mb": round(measured / 1e6, 1), "predicted_mb": round(phase.held / 1e6, 1)}
    return {"case": name, **figures, "off": round(phase.held / measured - 1, 4), "items_mb": items}


def in_process(shape: Shape, folder: Path) -> tuple[float, list[int] | None]:
    """What `run` says, from a copy of this process, where libraries are loaded."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            small = replace(shape, prompts=1, n=2, mean=min(8, shape.mean))
            run(small, folder / SMALL)  # what libraries hold from their first use is theirs
            gc.collect()
            os.write(writing, json.dumps(run(shape, folder)).encode())
            status = 0
        except Exception:
            traceback.print_exc()
        os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = pipe.read()
    if os.waitpid(child, 0)[1] or not told:
        raise RuntimeError(f"{shape}: the process that was to be measured failed")
    measured, size = json.loads(told)
    return measured, size


def predicted(shape: Shape, folder: Path, size: Size | None) -> Phase:
    """The budget's phase of a case, for a micro-batch of this size."""
    case, recipe = _case(shape, folder), recipe_of(shape, folder)
    prompts = case.prompt_lengths[:: case.n]
    images = sum(s.sequence.patches for s in case.samples[:: case.n]) / 4
    load = Workload(sum(prompts) / case.prompts, images / case.prompts, shape.mean, longest=max(prompts), rows=case.prompts)
    about = Case(recipe, shapes_of(widths_of(str(folder)), recipe.model), Machine(1, 0.0, host=1e15, cuda=False), load)
    return next(phase for phase in phases_of(about, size) if phase.name == ("sample" if shape.draws else "update"))


def _case(shape: Shape, folder: Path) -> Any:
    return make_case(shape.prompts, shape.n, shape.mean, str(folder / "images"))


def run(shape: Shape, folder: Path) -> tuple[float, tuple[int, int, int, int] | None]:
    """Bytes that a case took, and the size of its micro-batch, None where replies were drawn."""
    recipe, case = recipe_of(shape, folder), _case(shape, folder)
    (image,) = token_ids(case.tokenizer, "image_pad")
    stop = [case.tokenizer.eos_token_id]
    processor = SimpleNamespace(image_token=image, pad=case.tokenizer.pad_token_id, merge=2, store=case.store, stop_tokens=stop)
    processor.never_sampled = lambda size: [image, *stop]
    before = _status("VmRSS")
    policy = load_policy(recipe.model, WHERE.device, 0, packed=recipe.packing == "packed")
    optimizer, peak, sizes = build_optimizer(policy, recipe.optim), 0.0, []
    patches = sum(s.sequence.patches for s in case.samples[:: case.n]) * (1 if recipe.packing == "packed" else case.n)
    for samples in (case.samples[:1], *([] if shape.draws else [case.samples])):  # behind the first there are gradients and moments
        (rounds,) = grpo._passes(policy, None, processor, [samples], recipe, WHERE).updates
        _set_back()

        def watched(rounds: Any = rounds) -> Iterator[Any]:
            for each in rounds:
                ids = each.batch.input_ids
                sizes.append((ids.numel(), patches, ids.shape[-1], len(each.batch.targets)))
                yield each

        grpo._accumulate(policy, samples, (sum(map(len, samples)), len(samples)), watched(), recipe, WHERE)
        optimizer.step()
        peak = _status("VmHWM")
        optimizer.zero_grad(set_to_none=shape.draws)  # a later micro-batch of a step finds gradients
    if shape.draws:
        whole = list(zip(case.samples, case.prompt_lengths, strict=True))[:: case.n]
        cut = [prompt_of(sample.sequence, size) for sample, size in whole]
        _set_back()
        with awake(Embedded(policy, processor), 0) as engine:
            engine.generate(cut, Draw(case.n, 1.0, int(shape.mean), 0), [(0, i) for i in range(case.prompts)])
        return (_status("VmHWM") - before) * 2**20, None
    assert len(sizes) == 2, "one micro-batch an update"
    return (peak - before) * 2**20, sizes[1]


def prompt_of(sequence: Sequence, size: int) -> Sequence:
    """The first `size` tokens, with all images."""
    return replace(sequence, ids=sequence.ids[:size], trained=sequence.trained[:size], positions=sequence.positions[:, :size])


def planned(name: str) -> Plan:
    """The plan of a shipped recipe, RECIPES by name, on the machine that it is for."""
    path, on, size, overrides = RECIPES[name]
    recipe, there = load_recipe(ROOT / path, list(overrides)), parse(on)
    assert isinstance(recipe, SFTRecipe | GRPORecipe)
    return plan(recipe, widths_of(recipe.model.path, size), there, assumed(recipe), rates_of(there))


def recipe_row(name: str) -> dict[str, Any]:
    """A shipped recipe's plan as figures."""
    made, (path, on, size, overrides) = planned(name), RECIPES[name]
    command = " ".join(["actial plan", path, f"--gpus {on}", *([f"--model {size}"] if size else []), *overrides])
    step = made.seconds["step"]
    return {
        "recipe": name,
        "command": command,
        "fits": made.fits,
        "usable_gb": round(made.case.machine.usable / GB, 1),
        "gb": {phase.name: round(phase.held / GB, 1) for phase in made.phases},
        "pack_tokens": made.pack_tokens,
        "kv_tokens": {phase.name: phase.kv_tokens for phase in made.phases if phase.kv_tokens is not None},
        "host_gb": round(max(sum(phase.host.values()) for phase in made.phases) / GB),
        "step_seconds": [round(step.low), round(step.high)],
    }


def _set_back() -> None:
    """VmHWM to what the process holds now."""
    Path("/proc/self/clear_refs").write_text("5")


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """The result as it goes into the JSON."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        create(Path(folder), args.hidden, args.layers)
        create(Path(folder) / SMALL, 64, 2)
        for name in (name for name in SHAPES if re.search(args.cases, name)):
            rows.append(one(name, Path(folder)))
            print(line(rows[-1]), flush=True)
    recipes = [] if args.cases else [recipe_row(name) for name in RECIPES]
    settings = {"hidden": args.hidden, "layers": args.layers, "close": CLOSE}
    return {"schema": 1, "machine": machine(), "settings": settings, "cases": rows, "recipes": recipes}


def line(row: dict[str, Any]) -> str:
    """A case for the terminal."""
    return f"{row['case']:<22} measured {row['measured_mb']:8,.0f} MB  predicted {row['predicted_mb']:8,.0f} MB  {row['off']:+6.1%}"


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and write the JSON when asked; 1 when a prediction is off by more than CLOSE."""
    parser = argparse.ArgumentParser(prog="python -m bench.step.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", metavar="REGEX", default="", help=f"those whose name has a match, of {', '.join(SHAPES)}")
    parser.add_argument("--hidden", type=int, default=256, help="width, a multiple of 64 (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=6, help="decoder layers, an even number (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the figures to this file")
    args = parser.parse_args(argv)
    if args.hidden < 64 or args.hidden % 64 or args.layers < 2 or args.layers % 2:
        parser.error("--hidden must be a multiple of 64, and --layers even")
    if ALLOCATOR.items() - os.environ.items():  # it reads them when a process begins
        os.execve(
            sys.executable, [sys.executable, "-m", "bench.step.memory", *(sys.argv[1:] if argv is None else argv)], os.environ | ALLOCATOR
        )
    torch.set_num_threads(1)
    result = measured(args)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(abs(row["off"]) > CLOSE for row in result["cases"]))


if __name__ == "__main__":
    sys.exit(main())

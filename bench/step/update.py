"""One GRPO update, whole: the packed path beside TRL's GRPOTrainer, as installed, or beside our own padded path.

    python -m bench.step.update --vs trl|plain [--lora RANK] [--json FILE] [--rounds 2] [--prompts 8 --n 16 --mean 300] [--their-batch 4]

The model is a narrow Qwen2.5-VL (hidden 128, 4 layers, vision depth 4, vocabulary 8,192; random weights, float32) at real lengths: prompts
of about 800 tokens of which two images take about 320 each, n completions, lognormal with mean 300, 40 to 1,000 tokens. Both sides get the
same weights, tokens, patches, advantages and threads, and do: loss (token mean, beta 0, on policy), backward, clipping, AdamW. Neither
needs a pass for old log-probs, because the update is on policy. Sampling, rewards and image preprocessing are not in it.

TRL runs its own `training_step` per micro-batch (split, shuffle, `_compute_loss`, backward); only its generation is replaced by the
completions at hand, in its own format: left-padded prompts, right-padded completions, pixels repeated for every completion.
--their-batch is its per_device_train_batch_size; gradient checkpointing off. --lora: both train adapters of that rank on the language model
in the place of its weights, PEFT's of the same numbers.

Each side lives in a process of its own, and they take turns. Before a figure is told, losses must agree within 1e-4 and gradients
(relative, all parameters together) within 1e-3. Seconds are of the wall, and of the processor over all threads, which say more on a machine
that others use. Peak memory is the largest resident set of a side's process, above what it held with model and samples loaded (Linux).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from actial_fast import grpo
from actial_fast.grpo import Sample
from actial_fast.model.attention import use_packed_attention
from actial_fast.model.policy import Policy
from actial_fast.model.tiny import build_tokenizer
from actial_fast.ops.spec import GRPOSpec
from actial_fast.packing.batch import Sequence, mrope_positions
from actial_fast.packing.images import ImageSettings, ImageStore
from actial_fast.packing.packed_ops import collect, patchify
from actial_fast.settings.model import LoRAConfig, ModelConfig
from actial_fast.settings.recipe import GRPORecipe
from actial_fast.train.dist import World
from bench.harness.timing import machine
from bench.step.models import VOCABULARY, narrow_model, token_ids, with_adapters

SETTINGS = ImageSettings(14, 2, 2, 1, 10**9, 3, mean=(0.5,) * 3, std=(0.3,) * 3)
LEARNING_RATE, CLIP_NORM = 1e-5, 1.0
LOSS_AGREES, GRADIENT_AGREES = 1e-4, 1e-3
WHERE = World(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Case:
    """What both sides update on. samples: n of each prompt in turn; store: has their images."""

    tokenizer: PreTrainedTokenizerFast
    store: ImageStore
    samples: list[Sample]
    prompts: int
    n: int

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def image_token(self) -> int:
        """Where an image stands in a prompt."""
        return token_ids(self.tokenizer, "image_pad")[0]

    @property
    def prompt_lengths(self) -> list[int]:
        """Of each sample, its prompt's tokens."""
        return [len(s.sequence) - len(s) for s in self.samples]


def make_case(prompts: int, n: int, mean: float, folder: str, seed: int = 0) -> Case:
    """Prompts with two images of about 320 merged tokens each (noise, kept in a store in `folder`) and n completions of `mean` tokens."""
    tokenizer, rng = build_tokenizer(["text"], 10), np.random.default_rng(seed)
    start, pad, end = token_ids(tokenizer, "vision_start", "image_pad", "vision_end")
    store, samples = ImageStore(SETTINGS, Path(folder)), []
    for _ in range(prompts):
        pieces, grids, images = [_text(rng, 60)], [], []
        for _ in range(2):
            grid = (1, 2 * int(rng.integers(16, 20)), 2 * int(rng.integers(16, 20)))
            grids.append(grid)
            images.append(store.put(rng.integers(0, 256, (14 * grid[1], 14 * grid[2], 3), dtype=np.uint8)))
            pieces += [np.array([start]), np.full(math.prod(grid) // 4, pad), np.array([end])]
        ids = np.concatenate([*pieces, _text(rng, int(rng.integers(60, 140)))]).astype(np.int64)
        prompt = Sequence(ids, np.zeros(len(ids), bool), mrope_positions(ids, grids, pad, 2), tuple(images), tuple(grids))
        lengths = rng.lognormal(math.log(mean) - 0.32, 0.8, n).clip(40, 1000).astype(int)
        advantages = rng.standard_normal(n)
        for length, advantage in zip(lengths, advantages - advantages.mean(), strict=True):
            reply = prompt.extended(_text(rng, length))
            nothing = np.zeros(length, np.float32)
            samples.append(Sample(reply, "", nothing, nothing[:1], 0.0, float(advantage), 0, True))
    return Case(tokenizer, store, samples, prompts, n)


def _text(rng: np.random.Generator, length: int) -> np.ndarray:
    return rng.integers(1000, VOCABULARY, length)


@dataclass(frozen=True)
class Side:
    """One way to make the update. prepare: builds its inputs, outside of the clock; accumulate: loss and backward, returns the loss.
    reference: the model it measures the KL against, where it is another."""

    name: str
    model: Qwen2_5_VLForConditionalGeneration | PeftModel
    prepare: Callable[[], None]
    accumulate: Callable[[], float]
    settings: dict[str, Any]
    reference: Qwen2_5_VLForConditionalGeneration | None = None


def our_side(model: Qwen2_5_VLForConditionalGeneration | PeftModel, case: Case, packing: str, micro_batch: int) -> Side:
    """`grpo._accumulate` of a float32 model on the CPU, on the packed or the padded path."""
    if packing == "packed":
        use_packed_attention(model)
    policy = Policy(model, torch.float32)
    recipe = GRPORecipe(packing=packing, micro_batch=micro_batch, loss=GRPOSpec(beta=0.0), prompts=case.prompts, minibatch=case.prompts)
    (image,) = token_ids(case.tokenizer, "image_pad")
    processor = SimpleNamespace(image_token=image, pad=case.tokenizer.pad_token_id, merge=2, store=case.store)

    def accumulate() -> float:
        (rounds,) = grpo._passes(policy, None, processor, [case.samples], recipe, WHERE).updates
        counts = sum(map(len, case.samples)), len(case)
        stats = grpo._accumulate(policy, case.samples, counts, rounds, recipe, WHERE).tolist()
        return float(dict(zip(grpo.ops.STATS, stats, strict=True))["loss"])

    about = (
        {"pack_tokens": recipe.pack_tokens, "pack_patches": recipe.pack_patches} if packing == "packed" else {"micro_batch": micro_batch}
    )
    return Side("ours" if packing == "packed" else "plain", model, lambda: None, accumulate, about)


def trl_side(model: Qwen2_5_VLForConditionalGeneration | PeftModel, case: Case, batch: int, folder: str, **settings: Any) -> Side:
    """The installed GRPOTrainer on a model of any dtype and device; `batch` completions a micro-batch, a divisor of the case's.

    settings: further fields of GRPOConfig (default: dapo, temperature 1, float32, no checkpointing). With beta > 0 the trainer makes its
    reference itself: the weights at the path that the model was loaded from, or the model without its adapters.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    steps = len(case) // batch
    fixed = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "num_generations": case.n}
    usual = {"loss_type": "dapo", "beta": 0.0, "temperature": 1.0, "bf16": False, "gradient_checkpointing": False}
    config = GRPOConfig(folder, **fixed, use_cpu=model.device.type == "cpu", report_to=[], **usual | settings)
    rows = Dataset.from_dict({"prompt": ["-"] * case.prompts})
    trainer = GRPOTrainer(model, lambda completions, **_: [0.0] * len(completions), config, rows, processing_class=case.tokenizer)
    trainer.current_gradient_accumulation_steps = steps  # as Trainer's own loop sets it
    inputs: dict[str, Any] = {}

    def generated(_: Any) -> dict[str, Any]:
        return inputs | ({"ref_per_token_logps": _trl_reference(trainer, inputs, batch)} if trainer.beta else {})

    def prepare() -> None:
        inputs.update({k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in _trl_inputs(case).items()})
        trainer._generate_and_score_completions = generated

    def accumulate() -> float:
        return sum(float(trainer.training_step(model, None, None)) for _ in range(steps))

    return Side("trl", model, prepare, accumulate, fixed | settings, trainer.ref_model)


@torch.no_grad()
def _trl_reference(trainer: Any, inputs: dict[str, Any], batch: int) -> torch.Tensor:
    """Log-probs under the trainer's reference, by its own function, called as its `_generate_and_score_completions` calls it."""
    whole = [torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], dim=1) for x in ("ids", "mask")]
    images = {k: inputs[k] for k in ("pixel_values", "image_grid_thw", "mm_token_type_ids", "num_images") if k in inputs}
    with contextlib.nullcontext() if trainer.ref_model is not None else trainer.model.disable_adapter():
        reference, keep = trainer.ref_model or trainer.model, inputs["completion_ids"].shape[1]
        return trainer._get_per_token_logps_and_entropies(reference, *whole, keep, batch_size=batch, **images)[0]


def _trl_inputs(case: Case) -> dict[str, Any]:
    """What GRPOTrainer._generate_and_score_completions returns for these samples."""
    sequences, sizes = [s.sequence for s in case.samples], case.prompt_lengths
    longest, longest_reply = max(sizes), max(map(len, case.samples))
    shape = (len(case), longest + longest_reply)
    ids, mask = torch.full(shape, case.tokenizer.pad_token_id), torch.zeros(shape, dtype=torch.int64)
    for b, (sequence, size) in enumerate(zip(sequences, sizes, strict=True)):
        span = slice(longest - size, longest - size + len(sequence))
        ids[b, span], mask[b, span] = torch.from_numpy(sequence.ids), 1
    (image,) = token_ids(case.tokenizer, "image_pad")
    images, grids = [key for s in sequences for key in s.images], [g for s in sequences for g in s.grids]
    shown = {"pixel_values": patchify(collect(case.store, images)), "image_grid_thw": torch.tensor(grids)} if images else {}
    return {
        "prompt_ids": ids[:, :longest],
        "prompt_mask": mask[:, :longest],
        "completion_ids": ids[:, longest:],
        "completion_mask": mask[:, longest:],
        "advantages": torch.tensor([s.advantage for s in case.samples]),
        "num_items_in_batch": mask[:, longest:].sum(),
        **shown,
        "mm_token_type_ids": (ids == image).long(),
        "num_images": [len(s.grids) for s in sequences],
    }


def build(name: str, case: Case, their_batch: int, folder: str, lora: int = 0) -> Side:
    """The side called ours, plain or trl."""
    model = narrow_model(case.tokenizer)
    if lora:
        model = with_adapters(model, ModelConfig(lora=LoRAConfig(rank=lora)))
        for name_, parameter in model.named_parameters():
            if ".lora_B." in name_:  # PEFT begins at zero, where A has no gradient to compare
                torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(len(name_)))
    if name == "trl":
        return trl_side(model, case, their_batch, folder)
    return our_side(model, case, {"ours": "packed"}.get(name, name), their_batch)


class Updater:
    """A side with its optimizer, loaded in a process of its own; memory counts from here on, inputs included."""

    def __init__(self, side: Side):
        self.side, self.first = side, True
        self.trained = [p for p in side.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        self.held = _status("VmRSS")
        side.prepare()

    def update(self) -> dict[str, Any]:
        """One update's loss and times; of the first also the gradient, kept outside of the clock."""
        parameters, gradient, load = self.trained, None, os.getloadavg()[0]
        began = time.perf_counter(), time.process_time()
        loss = self.side.accumulate()
        spent = time.perf_counter() - began[0], time.process_time() - began[1]
        peak = _status("VmHWM") - self.held
        if self.first:
            gradient, self.first = torch.cat([p.grad.flatten() for p in parameters]).numpy(), False
        began = time.perf_counter(), time.process_time()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        wall, cpu = spent[0] + time.perf_counter() - began[0], spent[1] + time.process_time() - began[1]
        taken = {"seconds": round(wall, 3), "cpu_seconds": round(cpu, 3), "load": round(load, 2), "peak_mib": round(peak, 1)}
        return {"loss": loss, "gradient": gradient, "taken": taken, "settings": self.side.settings}


def _status(field: str) -> float:
    """MiB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


class Worker:
    """A process that holds one side and makes an update when told to; idle, it waits without spinning."""

    def __init__(self, name: str, args: argparse.Namespace, folder: str):
        self.name, self.done = name, []
        options = name, args.prompts, args.n, args.mean, args.their_batch, args.threads, folder, args.lora
        self.pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_begin, initargs=options)

    def update(self) -> None:
        """One update, told on stderr."""
        self.done.append(self.pool.submit(_update).result())
        loss, taken = self.done[-1]["loss"], self.done[-1]["taken"]
        print(f"{self.name:<6} {', '.join(f'{k} {v}' for k, v in taken.items())}, loss {loss:+.6f}", file=sys.stderr, flush=True)


_updater: Updater | None = None  # in a worker's process


def _begin(name: str, prompts: int, n: int, mean: float, their_batch: int, threads: int, folder: str, lora: int) -> None:
    global _updater
    torch.set_num_threads(threads)
    _updater = Updater(build(name, make_case(prompts, n, mean, folder), their_batch, folder, lora))


def _update() -> dict[str, Any]:
    return _updater.update()


def compare(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, float]:
    """How far the sides' updates are apart; AssertionError where they are not the same."""
    loss = max(abs(a["loss"] - b["loss"]) for a, b in zip(ours, theirs, strict=True))
    mine, other = ours[0]["gradient"], theirs[0]["gradient"]
    assert np.linalg.norm(other) > 0, "a gradient of zero compares with anything"
    gradient = float(np.linalg.norm(mine - other) / np.linalg.norm(other))
    assert loss <= LOSS_AGREES, f"losses are apart by {loss:.1e}: not the same update"
    assert gradient <= GRADIENT_AGREES, f"gradients are apart by {gradient:.1e}, relative: not the same update"
    return {"loss_difference": loss, "gradient_difference": gradient}


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """The result as it goes into the JSON."""
    os.environ.update(OMP_WAIT_POLICY="PASSIVE", OMP_NUM_THREADS=str(args.threads))  # of the sides' processes: spinning is no work
    torch.set_num_threads(args.threads)
    about = machine()
    with tempfile.TemporaryDirectory() as folder:
        case = make_case(args.prompts, args.n, args.mean, folder)
        workers = [Worker(name, args, folder) for name in ("ours", args.vs)]
        for _ in range(args.rounds):
            for worker in workers:
                worker.update()
        for worker in workers:
            worker.pool.shutdown()
    differences = compare(*(worker.done for worker in workers))
    rows = []
    for worker in workers:
        updates = [each["taken"] for each in worker.done]
        row = {"side": worker.name, "settings": worker.done[0]["settings"], "updates": updates}
        for key in ("seconds", "cpu_seconds"):
            values = [each[key] for each in updates]
            row |= {f"{key}_min": min(values), f"{key}_median": round(statistics.median(values), 3)}
        rows.append(row | {"peak_mib": max(each["peak_mib"] for each in updates)})
    keys = ("seconds_min", "seconds_median", "cpu_seconds_min", "cpu_seconds_median", "peak_mib")
    return {
        "schema": 1,
        "machine": about,
        "settings": {name: getattr(args, name) for name in ("vs", "lora", "rounds", "prompts", "n", "mean", "their_batch", "threads")},
        "tokens": {
            "prompts": sum(case.prompt_lengths[:: case.n]),
            "completions": sum(map(len, case.samples)),
            "without_sharing": sum(len(s.sequence) for s in case.samples),
        },
        "patches": sum(s.sequence.patches for s in case.samples[:: case.n]),
        **differences,
        "sides": rows,
        "ratio": {key: round(rows[1][key] / rows[0][key], 2) for key in keys},
    }


def told(result: dict[str, Any]) -> str:
    """The result as lines for a terminal."""
    about, tokens = result["machine"], result["tokens"]
    lines = [
        f"{about['cpu']}, {about['cores']} cores, load {about['load_before'][0]}, {about['date']}, commit {about['commit']}",
        f"{tokens['prompts']:,} prompt tokens, {tokens['completions']:,} of completions, {result['patches']:,} patches; gradients apart by "
        f"{result['gradient_difference']:.1e}",
    ]
    for row in result["sides"]:
        lines.append(
            f"{row['side']:<6} {row['seconds_median']:8.2f} s (min {row['seconds_min']:.2f})  "
            f"{row['cpu_seconds_median']:8.2f} s of the processor (min {row['cpu_seconds_min']:.2f})  "
            f"peak {row['peak_mib']:,.0f} MiB"
        )
    return "\n".join([*lines, "ratios  " + "  ".join(f"{key} {value:.2f}" for key, value in result["ratio"].items())])


def main(argv: list[str] | None = None) -> None:
    """Measure, print, and write the JSON when asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.step.update", description=__doc__.splitlines()[0])
    parser.add_argument("--vs", choices=("trl", "plain"), default="trl", help="the other side (default: %(default)s)")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="train adapters of this rank (default: all weights)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the figures to this file")
    parser.add_argument("--rounds", type=int, default=2, help="updates of each side (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--n", type=int, default=16, help="completions of each prompt (default: %(default)s)")
    parser.add_argument("--mean", type=float, default=300, help="mean tokens of a completion (default: %(default)s)")
    parser.add_argument("--their-batch", type=int, default=4, help="completions in a micro-batch of the other side (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch, on both sides (default: %(default)s)")
    args = parser.parse_args(argv)
    if min(args.rounds, args.prompts, args.n, args.their_batch, args.threads) < 1 or not args.mean > 0 or args.lora < 0:
        parser.error("every size must be at least 1, and --lora at least 0")
    if args.prompts * args.n % args.their_batch:
        parser.error(f"--their-batch: {args.prompts} x {args.n} completions must be a multiple of it, got {args.their_batch}")
    result = measured(args)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(told(result))


if __name__ == "__main__":
    main()

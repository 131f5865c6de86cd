"""Sampling one step's replies: the embedded engine beside transformers' generate, and beside vLLM where it is installed.

    python -m bench.step.rollout [--model FOLDER --source ROWS] [--prompts 16 --n 8 --mean 20 --limit 40] [--rounds 5] [--json FILE]
    python -m bench.step.rollout --run FOLDER [--rounds 5] [--json FILE]

Without --model the weights are random, of the quickstart's width, prompts show two images of noise, and as many ids end a reply as make its
mean length --mean; with it, replies end as the model ends them. --run is a finished quickstart, from the folder it was run in: its model
after GRPO, the first prompts of that stage's stream, its numbers of prompts and replies. All sides get the same weights, prompts, threads
and limits, and take turns in one process. Before anything is timed, greedy replies of ours and of transformers must be equal (99 in 100: a
tie may round either way). transformers pads the prompts of a call on the left, and decodes until its longest reply ends; it gives no
log-probs here, the others do. Seconds are of the wall, and of the processor over all threads, which say more on a machine that others use:
the least of the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actial_fast.data.sources.row import Row, Turn
from actial_fast.data.sources.source import SourceConfig
from actial_fast.data.sources.stream import Example, Stream
from actial_fast.model import tiny
from actial_fast.model.policy import Policy, load_policy
from actial_fast.model.processor import Processor
from actial_fast.packing.batch import Sequence, collate
from actial_fast.rollout.embedded import Embedded
from actial_fast.rollout.protocol import Draw, Engine, awake
from actial_fast.settings.config import load_recipe
from actial_fast.settings.model import ModelConfig
from actial_fast.settings.recipe import RolloutConfig
from actial_fast.train.dist import World
from bench.harness.timing import machine

Replies = list[list[list[int]]]  # of each prompt, each reply's ids
Measured = dict[str, dict[str, float]]  # by side: seconds, cpu_seconds, tokens
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def noise_prompts(processor: Processor, count: int, seed: int = 0) -> list[Sequence]:
    """Prompts of about the quickstart's length, two images of noise each."""
    rng = np.random.default_rng(seed)
    rows = []
    for k in range(count):
        images = tuple(rng.integers(0, 256, (28, 28, 3), dtype=np.uint8) for _ in range(2))
        rows.append(Example(Row((Turn("user", f"<image><image>Which way? {'ab' * (k % 7)}"),), images=images, where=f"noise:{k}"), k))
    return [processor.encode_prompt(row) for row in rows]


def ours(policy: Policy, processor: Processor, prompts: list[Sequence], draw: Draw) -> Replies:
    """By the embedded engine."""
    with awake(Embedded(policy, processor), 0) as engine:
        return replies_of(engine, prompts, draw)


def replies_of(engine: Engine, prompts: list[Sequence], draw: Draw) -> Replies:
    """By an engine that is awake."""
    groups = engine.generate(prompts, draw, [(0, k) for k in range(len(prompts))])
    return [[reply.ids.tolist() for reply in group] for group in groups]


@torch.no_grad()
def theirs(policy: Policy, processor: Processor, prompts: list[Sequence], draw: Draw) -> Replies:
    """By transformers, all prompts in one padded batch."""
    batch = collate(prompts, processor.pad, processor.store, left=True).to(policy.device)
    images = {name: batch.model_inputs()[name] for name in ("pixel_values", "image_grid_thw")}
    out = policy.base.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        mm_token_type_ids=(batch.input_ids == processor.image_token).int(),
        **images,
        do_sample=draw.temperature > 0,
        temperature=draw.temperature or 1.0,
        top_k=None,
        top_p=1.0,
        num_return_sequences=draw.n,
        max_new_tokens=draw.max_new_tokens,
        suppress_tokens=list(processor.never_sampled(policy.base.lm_head.weight.shape[0])),
        eos_token_id=list(processor.stop_tokens),
        pad_token_id=processor.pad,
    )
    replies = [_ended(row, processor) for row in out[:, batch.input_ids.shape[1] :].tolist()]
    return [replies[k : k + draw.n] for k in range(0, len(replies), draw.n)]


@contextlib.contextmanager
def vllm(policy: Policy, processor: Processor, longest: int) -> Iterator[Engine | None]:
    """vLLM with the policy's weights, in this process; None where it is not installed."""
    if importlib.util.find_spec("vllm") is None:
        yield None
        return
    from actial_fast.rollout.vllm import VLLM

    engine = VLLM(policy, processor, RolloutConfig(engine="vllm"), World(0, 1, DEVICE), longest)
    try:
        with awake(engine, 0):
            yield engine
    finally:
        engine.close()


def _ended(ids: list[int], processor: Processor) -> list[int]:
    stops = [k for k, token in enumerate(ids) if token in processor.stop_tokens]
    return ids[: stops[0] + 1] if stops else ids


def measure(sides: dict[str, Callable[[], Replies]], rounds: int, after: Callable[[Measured], None]) -> Measured:
    """The least wall and processor seconds of each side's calls, in turns, after one that is not counted, and its tokens; what is known is
    handed to `after` with every round."""
    found: Measured = {}
    for name, side in sides.items():
        tokens = sum(len(reply) for group in side() for reply in group)
        found[name] = {"seconds": float("inf"), "cpu_seconds": float("inf"), "tokens": tokens}
    for _ in range(rounds):
        for name, side in sides.items():
            wall, cpu = time.perf_counter(), time.process_time()
            side()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            one = found[name]
            one["seconds"] = min(one["seconds"], time.perf_counter() - wall)
            one["cpu_seconds"] = min(one["cpu_seconds"], time.process_time() - cpu)
        after(found)
    return found


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Check, measure, print, and write the JSON when asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.step.rollout", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a checkpoint folder (default: random weights of the quickstart's shape)")
    parser.add_argument("--source", help="rows to reply to, with --model")
    parser.add_argument("--run", type=Path, help="a finished quickstart: its own model, prompts and limits")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--n", type=int, default=8, help="replies to each prompt (default: %(default)s)")
    parser.add_argument("--mean", type=int, default=20, help="mean length of a reply of random weights (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=40, help="longest reply (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    args = parser.parse_args(argv)
    if bool(args.model) != bool(args.source):
        parser.error("--model and --source come together")
    sources: tuple[SourceConfig, ...] = (SourceConfig(args.source),) if args.source else ()
    if args.run:
        recipe = load_recipe(args.run / "grpo" / "recipe.yaml")
        sources, args.model = recipe.data.sources, args.run / "grpo" / "final" / "model"
        args.prompts, args.n, args.limit = recipe.prompts, recipe.sampling.n, recipe.sampling.max_new_tokens
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or Path(folder, "model")
        if not args.model:
            shape = tiny.TinyConfig(vision_depth=0, image_size=28)
            tiny.create(model, ["Which way? A. left B. right"] * 2, shape, seed=0)
        processor = Processor.load(str(model), image_cache=folder)
        policy = load_policy(ModelConfig(path=str(model)), DEVICE, seed=0, packed=True).eval()
        if args.model:
            stream = Stream(sources, seed=0, workers=0, encode=processor.encode_prompt)
            prompts = [example.encoded for example in stream.next_batch(args.prompts)]
        else:
            prompts = noise_prompts(processor, args.prompts)
            known = len(processor.tokenizer)
            ends = np.random.default_rng(1).choice(known, max(1, known // args.mean), replace=False).tolist()
            processor.__dict__["stop_tokens"] = tuple(sorted({*processor.stop_tokens, *ends} - {*processor.banned_tokens}))
        greedy, sampled = Draw(1, 0.0, args.limit), Draw(args.n, 1.0, args.limit)
        a, b = ours(policy, processor, prompts, greedy), theirs(policy, processor, prompts, greedy)
        equal = sum(x == y for x, y in zip(a, b, strict=True)) / len(a)
        assert equal >= 0.99, f"{equal:.0%} of the greedy replies are equal: the sides do not compute the same"
        sides = {
            "ours": lambda: ours(policy, processor, prompts, sampled),
            "transformers": lambda: theirs(policy, processor, prompts, sampled),
        }
        with vllm(policy, processor, max(map(len, prompts)) + args.limit) as engine:
            if engine is not None:
                sides["vllm"] = lambda: replies_of(engine, prompts, sampled)
            result = {
                "machine": machine(),
                "threads": torch.get_num_threads(),
                "case": {"prompts": args.prompts, "n": args.n, "limit": args.limit, "prompt_tokens": [len(p) for p in prompts]},
                "greedy_equal": equal,
            }

            def after(sides: Measured) -> None:
                if args.json:  # after every round: a run that is cut off leaves what it has
                    args.json.parent.mkdir(parents=True, exist_ok=True)
                    args.json.write_text(json.dumps(result | {"sides": sides}, indent=1))

            result["sides"] = measure(sides, args.rounds, after)
    for name, one in result["sides"].items():
        print(
            f"{name:14s} {one['seconds']:8.3f} s wall {one['cpu_seconds']:8.3f} s processor {one['tokens']:7.0f} tokens "
            f"{one['tokens'] / one['seconds']:9.0f} tokens/s"
        )
    return result


if __name__ == "__main__":
    main()

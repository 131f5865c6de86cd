"""The planner's cost model, measured: seconds of packed micro-batches of many shapes, and the coefficients that explain them best.

    python -m bench.step.costs --recipe FILE [pack_tokens=16384 key=value ...] [--rounds 3] [--image 504] [--json FILE] [--rates]

Each shape is one micro-batch of random tokens and images of noise on this machine's device: a single sequence, many short ones, image
sequences with hardly any text, and a prompt with 16 replies, each at several shares of the recipe's pack_tokens and pack_patches. Timed is
what SFT does with it: packing on the host, vision tower, forward, fused loss on all tokens but prompts and images, backward. The model is
the recipe's, on one device, not sharded; gradients accumulate, as they do within a step.

The coefficients minimise the mean square of the relative errors, are never negative, and come in units of one token (linear = 1). A term
that explains no more than noise would is left out, by Schwarz's criterion (1978): its coefficient is 0. The largest shape takes as much
memory as the recipe's largest micro-batch, and on a CPU as long: give a smaller pack_tokens there.

--rates also keeps what `actial plan` says seconds by on this GPU: the slowest and the fastest of the shapes that fill their micro-batch, as
least FLOPs (actial_fast.model.flops) per second, and how fast its memory is copied.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actial_fast import sft
from actial_fast.budget import rates
from actial_fast.model import flops
from actial_fast.model.policy import Policy, load_policy
from actial_fast.model.processor import Processor
from actial_fast.packing.batch import Sequence, mrope_positions, share
from actial_fast.packing.native import plan
from actial_fast.packing.planning import Costs
from actial_fast.quickstart import QuickstartRecipe, _resolved
from actial_fast.settings.config import load_recipe
from actial_fast.settings.recipe import SFTRecipe
from actial_fast.train.balance import UNBOUNDED, Size, lengths_of
from actial_fast.train.dist import World
from bench.harness.timing import CUDA, DEVICE, Cache, machine, seconds_of

Shape = tuple[Size, ...]  # of the groups in one micro-batch
TERMS = ("linear", "quadratic", "vision", "constant")
SHORT, REPLIES, TEXT = 128, 16, 16  # tokens of a short sequence, replies to a prompt, tokens of text beside images
SHARES = (1, 2, 4, 8, 16)  # of the capacities, as divisors
SMALLEST = 1024  # tokens: below, a pass takes as long however little is in it
EXACT = 1e-3  # relative error that no clock tells from none


@dataclass(frozen=True)
class Fit:
    """What explains the seconds of S shapes. token_seconds: of one token, the unit of the costs; predicted (S,): seconds."""

    costs: Costs
    token_seconds: float
    predicted: np.ndarray


def shapes(tokens: int, patches: int, image_patches: int, merge: int) -> dict[str, Shape]:
    """Micro-batches of at most so many tokens and patches, by name. image_patches: of one image; merge: patches along a side of a token.

    ValueError when the capacities are too small to tell the terms of the cost model apart.
    """
    if tokens < SMALLEST:
        raise ValueError(f"pack_tokens: costs need at least {SMALLEST} tokens to show, got {tokens}")
    merged = image_patches // merge**2
    together = max(1, 256 // merged)  # small images come several in a sequence
    images = Size(together * merged + TEXT, (), together * image_patches)
    if images.prefix > tokens or images.patches > patches:
        raise ValueError(
            f"pack_tokens, pack_patches: expected at least {images.prefix} and {images.patches}, which images of this size take"
        )
    found: dict[str, Shape] = {}
    for divisor in SHARES:
        room, name = tokens // divisor, "" if divisor == 1 else f" / {divisor}"
        reply = (room - images.prefix) // REPLIES
        shown = min(room // images.prefix, patches // divisor // images.patches)
        found[f"one sequence{name}"] = (Size(room),)
        found[f"short sequences{name}"] = (Size(SHORT),) * (room // SHORT)
        found[f"images{name}"] = (images,) * shown
        found[f"a prompt and {REPLIES} replies{name}"] = (replace(images, suffixes=(reply,) * REPLIES),) * (reply > 1)
    return {name: shape for name, shape in found.items() if shape}


def work_of(shape: Shape) -> np.ndarray:
    """What the planner multiplies with each coefficient, (4,) float64: tokens, attention pairs, patches, and 1 for the micro-batch."""
    units = (Costs(**(dict.fromkeys(TERMS, 0.0) | {term: 1.0})) for term in TERMS)
    return np.array([plan(*lengths_of(shape), capacity=UNBOUNDED, costs=costs).totals("cost").item() for costs in units])


def measure(shapes: dict[str, Shape], run: Callable[[Shape], float], rounds: int) -> np.ndarray:
    """The fewest seconds of each shape, (S,), in `rounds` rounds over all of them, after one that does not count."""
    taken = []
    for k in range(rounds + 1):
        taken.append([run(shape) for shape in shapes.values()])
        print(f"{'warm-up' if not k else f'round {k}'}: {sum(taken[-1]):.1f} s", file=sys.stderr, flush=True)
    return np.array(taken[1:]).min(0)


def fit(work: np.ndarray, seconds: np.ndarray) -> Fit:
    """The coefficients for work (S, 4), rows as work_of gives them, that took seconds (S,). ValueError when tokens take no time."""
    relative, best = work / seconds[:, None], None
    for count in range(1, 1 + len(TERMS)):
        for used in map(list, itertools.combinations(range(len(TERMS)), count)):
            scale = relative[:, used].max(0)
            if not scale.all():
                continue
            found = np.linalg.lstsq(relative[:, used] / scale, np.ones(len(seconds)), rcond=None)[0] / scale
            error = np.square(relative[:, used] @ found - 1).mean()
            score = len(seconds) * math.log(error + EXACT**2) + count * math.log(len(seconds))
            if (found > 0).all() and (best is None or score < best[0]):
                best = score, used, found
    if best is None or 0 not in best[1]:
        raise ValueError(
            "the seconds do not grow with the tokens: measure with a larger pack_tokens, or while nobody else uses the machine"
        )
    _, used, found = best
    coefficients = {TERMS[k]: float(f"{x / found[0]:.3g}") for k, x in zip(used, found, strict=True)}
    return Fit(Costs(**(dict.fromkeys(TERMS, 0.0) | coefficients)), float(found[0]), work[:, used] @ found)


def sequences_of(shape: Shape, processor: Processor, image: tuple[int, int], rng: np.random.Generator) -> list[Sequence]:
    """Sequences of the shape's sizes: random tokens, and images of noise, (height, width) as resized, put into the processor's store."""
    special = set(processor.tokenizer.all_special_ids)
    known = np.array([i for i in range(len(processor.tokenizer)) if i not in special])
    out = []
    for size in shape:
        images, left = [], size.patches
        while left:
            images.append(processor.store.put(rng.integers(0, 256, (*image, 3), dtype=np.uint8)))
            left -= math.prod(processor.store.grid(images[-1]))
        grids = tuple(map(processor.store.grid, images))
        shown = np.repeat(processor.image_token, size.patches // processor.merge**2)
        ids = np.concatenate([shown, rng.choice(known, size.prefix - len(shown))])
        trained = ids != processor.image_token if not size.suffixes else np.zeros(len(ids), bool)
        prompt = Sequence(ids, trained, mrope_positions(ids, grids, processor.image_token, processor.merge), tuple(images), grids)
        out += [prompt.extended(rng.choice(known, n)) for n in size.suffixes] or [prompt]
    return out


def runner(policy: Policy, processor: Processor, image: tuple[int, int]) -> Callable[[Shape], float]:
    """A function that runs one micro-batch forward and backward, and says how many seconds it took."""
    recipe = SFTRecipe(packing="packed", pack_tokens=UNBOUNDED.tokens, pack_patches=UNBOUNDED.patches)
    where = World(0, 1, policy.device)
    made: dict[Shape, list[Sequence]] = {}

    def run(shape: Shape) -> float:
        if shape not in made:
            made[shape] = sequences_of(shape, processor, image, np.random.default_rng(len(made)))
        return seconds_of(lambda: sft._accumulate(policy, processor, made[shape], recipe, where))

    return run


def least_flops(policy: Policy, sequences: list[Sequence], image_token: int) -> int:
    """What one micro-batch of these sequences needs at the least, forward and backward."""
    groups = [(group.prefix, [sequences[i] for i in group.members]) for group in share(sequences, image_token)]
    return sum(flops.minimum(policy.base, flops.work_of(groups), backward=True).values())


def copied() -> float:
    """TB/s read and written by a copy within the device's memory, the best of five."""
    cache = Cache()
    cache.copy()
    return 2 * cache.source.nbytes / min(seconds_of(cache.copy) for _ in range(5)) / 1e12


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """The result as it goes into the JSON."""
    recipe, about = load_recipe(args.recipe, args.overrides), machine()
    recipe = _resolved(recipe).grpo if isinstance(recipe, QuickstartRecipe) else recipe
    policy = load_policy(recipe.model, torch.device(DEVICE), recipe.seed, packed=True)
    with tempfile.TemporaryDirectory() as folder:
        limits = {"min_pixels": recipe.model.min_pixels, "max_pixels": recipe.model.max_pixels}
        processor = Processor.load(recipe.model.path, **limits, image_cache=folder)
        settings = processor.store.settings
        image = settings.size(args.image, args.image)
        chosen = shapes(recipe.pack_tokens, recipe.pack_patches, math.prod(image) // settings.patch**2, settings.merge)
        seconds = measure(chosen, runner(policy, processor, image), args.rounds)
        made = [sequences_of(shape, processor, image, np.random.default_rng(k)) for k, shape in enumerate(chosen.values())]
        needed = [least_flops(policy, sequences, processor.image_token) for sequences in made]
    work = np.array([work_of(shape) for shape in chosen.values()])
    found = fit(work, seconds)
    rows = zip(chosen, work.tolist(), seconds.tolist(), found.predicted.tolist(), strict=True)
    return {
        "schema": 1,
        "machine": about,
        "recipe": args.recipe,
        "overrides": args.overrides,
        "settings": {"rounds": args.rounds, "image": list(image), "tokens": recipe.pack_tokens, "patches": recipe.pack_patches},
        "shapes": [
            {
                "shape": name,
                "tokens": int(t),
                "pairs": pairs,
                "patches": int(p),
                "seconds": took,
                "predicted": said,
                "error": said / took - 1,
            }
            for name, (t, pairs, p, _), took, said in rows
        ],
        "tflops": {name: n / s / 1e12 for name, n, s in zip(chosen, needed, seconds.tolist(), strict=True)},
        "copy_tb_s": copied(),
        "token_seconds": found.token_seconds,
        "costs": asdict(found.costs),
    }


def yaml_of(costs: dict[str, float]) -> str:
    """The line to put into a recipe; small numbers with a point, without which YAML reads a text."""
    written = (f"{name}: {x:.2e}" if 0 < x < 1e-3 else f"{name}: {x}" for name, x in costs.items())
    return f"costs: {{{', '.join(written)}}}"


def told(result: dict[str, Any]) -> str:
    """The result as lines for a terminal."""
    about = result["machine"]
    lines = [f"{about['gpu'] or about['cpu']}, load {about['load_before'][0]}, {about['date']}, commit {about['commit']}"]
    lines.append(f"{'shape':<34} {'tokens':>8} {'pairs':>12} {'patches':>8} {'seconds':>10} {'fitted':>10} {'error':>7}")
    for row in result["shapes"]:
        lines.append(
            f"{row['shape']:<34} {row['tokens']:>8,} {row['pairs']:>12.4g} {row['patches']:>8,} {row['seconds']:>10.4f} "
            f"{row['predicted']:>10.4f} {row['error']:>+7.1%}"
        )
    return "\n".join(
        [*lines, f"a token takes {1e6 * result['token_seconds']:.3g} microseconds; the others in its unit:", yaml_of(result["costs"])]
    )


def main(argv: list[str] | None = None) -> None:
    """Measure, print, and write the JSON when asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.step.costs", description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the recipe")
    parser.add_argument("--recipe", required=True, help="of a quickstart its GRPO stage; the model must be there")
    parser.add_argument("--rounds", type=int, default=3, help="rounds whose fastest counts (default: %(default)s)")
    parser.add_argument(
        "--image", type=int, default=504, metavar="PIXELS", help="side of an image before it is resized (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the figures to this file")
    parser.add_argument("--rates", action="store_true", help="also keep the rates of this GPU for `actial plan`")
    args = parser.parse_args(argv)
    if args.rates and not CUDA:
        parser.error("--rates: are those of a GPU, and there is none")
    if min(args.rounds, args.image) < 1:
        parser.error("rounds and image must be at least 1")
    result = measured(args)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(told(result))
    if args.rates:
        print(f"rates for `actial plan`: {keep_rates(result)}")


def keep_rates(result: dict[str, Any]) -> Path:
    """The file of this GPU's rates, by the shapes that fill their micro-batch."""
    full = [rate for name, rate in result["tflops"].items() if " / " not in name]
    about = result["machine"]
    command = f"python -m bench.step.costs --recipe {result['recipe']} {' '.join(result['overrides'])}"
    speeds = min(full), max(full)
    return rates.write(about["gpu"], update_tflops=speeds, copy_tb_s=result["copy_tb_s"], date=about["date"], command=command.strip())


if __name__ == "__main__":
    main()

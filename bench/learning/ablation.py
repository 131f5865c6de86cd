"""The paper's ablation at the quickstart's size: stage 1 alone, stage 2 alone, one stage on a mixture, both, both without the cold start.

    make quickstart && python -m bench.learning.ablation runs/quickstart [--json FILE] [--markdown FILE]

RUN is a finished quickstart. Its data, its model before stage 1 and its two stages are taken as they are; the other variants are trained in
RUN/ablation, where a run that was interrupted goes on. All have the keys of the quickstart's stages but for what the name says:

SFT only, two stages          the quickstart's own
GRPO only                     stage 2 from the model before stage 1
one stage, mixture            stage 1's settings on stage 2's sources, answered in bare letters: what is in both, without reinforcement
without cold start            stage 1 without chains of thought; then stage 2

Greedy accuracy on held-out objects, with 95% intervals by clusters of pictures, and the share of replies at temperature 1 that are right
and in tags. One seed is one run: what differs by less than the intervals differs by chance.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from actial_fast import grpo, sft
from actial_fast.data.sources.source import SourceConfig
from actial_fast.evaluation.evaluate import evaluate_checkpoint
from actial_fast.quickstart import QuickstartRecipe
from actial_fast.settings.config import load_recipe
from actial_fast.settings.recipe import GRPORecipe, SFTRecipe
from bench.harness.timing import machine

COLUMNS = ("viewpoint", "which side faces the camera", "how far it turned", "right and in tags, viewpoint", "right and in tags, other")


def main(argv: list[str] | None = None) -> int:
    """Train what is missing, evaluate every variant and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.learning.ablation", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of a finished quickstart")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    args = parser.parse_args(argv)
    if not (args.run / "grpo/final/model").is_dir():
        parser.error(f"{args.run}: no finished quickstart")
    recipe = load_recipe(args.run / "recipe.yaml")
    about = machine()
    found = {name: figures(recipe, model) for name, model in models(recipe).items()}
    table = markdown(found)
    print(table)
    if args.json:
        args.json.write_text(json.dumps({"machine": about, "seed": recipe.seed, "variants": found}, indent=1))
    if args.markdown:
        args.markdown.write_text(table + "\n")
    return 0


def models(recipe: QuickstartRecipe) -> dict[str, Path]:
    """The model of each variant; those that the quickstart has not made are trained."""
    root = Path(recipe.run)
    before = root / "ring/final/model"
    cold = tuple(source for source in recipe.sft.data.sources if not source.path.endswith("cot.jsonl"))
    unwarmed = _sft(recipe, "no-cold-start", cold)
    return {
        "before": before,
        "SFT only": root / "sft/final/model",
        "GRPO only": _grpo(recipe, "grpo-only", before),
        "one stage, mixture": _sft(recipe, "mixture", recipe.grpo.data.sources),
        "SFT only, without cold start": unwarmed,
        "two stages, without cold start": _grpo(recipe, "no-cold-start", unwarmed),
        "two stages": root / "grpo/final/model",
    }


def _sft(recipe: QuickstartRecipe, name: str, sources: tuple[SourceConfig, ...]) -> Path:
    stage: SFTRecipe = recipe.sft
    return sft.train(replace(stage, run=f"{recipe.run}/ablation/{name}", data=replace(stage.data, sources=sources)))


def _grpo(recipe: QuickstartRecipe, name: str, model: Path) -> Path:
    stage: GRPORecipe = recipe.grpo
    return grpo.train(replace(stage, run=f"{recipe.run}/ablation/{name}", model=replace(stage.model, path=str(model))))


def figures(recipe: QuickstartRecipe, model: Path) -> dict[str, Any]:
    """The columns of one variant: [share, low, high], or the share alone."""
    greedy = evaluate_checkpoint(model, recipe.test, recipe.seed)
    sampled = evaluate_checkpoint(model, recipe.sampled, recipe.seed)
    (view, other), (view_sampled, other_sampled) = greedy.values(), sampled.values()
    told = [view["overall"], other["kinds"]["facing_side"], other["kinds"]["turn_size"]]
    formed = [table["overall"]["well_formed_and_correct"] for table in (view_sampled, other_sampled)]
    return dict(zip(COLUMNS, [*([one["accuracy"], *one["interval"]] for one in told), *formed], strict=True))


def markdown(found: dict[str, dict[str, Any]]) -> str:
    """A row a variant, in percent."""
    lines = [f"| | {' | '.join(COLUMNS)} |", f"|---{'|--:' * len(COLUMNS)}|"]
    for name, row in found.items():
        cells = [
            f"{100 * x[0]:.1f} ({100 * x[1]:.1f} to {100 * x[2]:.1f})" if isinstance(x, list) else f"{100 * x:.1f}" for x in row.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

"""The main job from nothing, on a laptop: captures -> questions -> SFT with the hybrid cold start -> GRPO -> evaluation -> report.

Every step is the code that real data and a real model go through; the quickstart only chooses sizes and chains the steps. The two
stages `front` and `ring` stand in for the pretraining that a real Qwen2.5-VL brings. A step that is finished is not done again, and one
that was killed continues, so the same command goes on from wherever it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from actial_fast import grpo, sft
from actial_fast.data.captures.basics import write_basics
from actial_fast.data.captures.render import RenderConfig, render
from actial_fast.data.captures.settings import ViewpointConfig
from actial_fast.data.captures.spatial import SpatialConfig, spatial_questions, viewpoint_objects
from actial_fast.data.captures.viewpoint import build
from actial_fast.data.cot.poses import geometric_cot
from actial_fast.data.cot.writer import one_by_one, write_cot
from actial_fast.data.sources.row import IMAGE_TAG
from actial_fast.data.sources.source import SourceConfig, open_source
from actial_fast.evaluation.evaluate import evaluate_checkpoint
from actial_fast.evaluation.statistics import render_table
from actial_fast.model import tiny
from actial_fast.report.metrics import MetricLog
from actial_fast.report.page import write_report
from actial_fast.settings.config import to_yaml
from actial_fast.settings.recipe import EvalConfig, GRPORecipe, SFTRecipe
from actial_fast.train import checkpoint
from actial_fast.train.stopping import Stopped


@dataclass(frozen=True)
class QuickstartRecipe:
    """Everything the quickstart does. In the paths of its stages, `{run}` stands for the run folder."""

    kind: Literal["quickstart"] = "quickstart"
    """Which job this recipe is for."""
    run: str = "runs/quickstart"
    """Folder for data, checkpoints, metrics and the report."""
    seed: int = 0
    """Seed of everything: it replaces the seeds of the parts below."""
    render: RenderConfig = RenderConfig()
    """Captures of procedural objects."""
    viewpoint: ViewpointConfig = ViewpointConfig()
    """Viewpoint questions from the captures."""
    spatial: SpatialConfig = SpatialConfig()
    """Other spatial questions from the same captures, for the second stage."""
    cot_rows: int = 1000
    """Pseudo chain-of-thought rows for the cold start, of viewpoint questions."""
    spatial_cot_rows: int = 400
    """The same, of other spatial questions."""
    model: tiny.TinyConfig = tiny.TinyConfig()
    """The model, from random weights."""
    front: SFTRecipe = SFTRecipe(name="front")
    """Pretraining stand-in, cameras on the front half of the ring."""
    ring: SFTRecipe = SFTRecipe(name="ring")
    """Pretraining stand-in, cameras on the whole ring."""
    sft: SFTRecipe = SFTRecipe(name="sft")
    """Stage 1: viewpoint knowledge, with the hybrid cold start."""
    grpo: GRPORecipe = GRPORecipe(name="grpo")
    """Stage 2: reinforcement on viewpoint and other spatial questions."""
    test: EvalConfig = EvalConfig()
    """Evaluation after each of the two stages, greedy, on test objects: no stage trains on these, and none stops on them."""
    sampled: EvalConfig = EvalConfig(temperature=1.0)
    """The same, sampled at temperature 1: where the share of well-formed and correct replies is read."""


def run(recipe: QuickstartRecipe) -> dict[str, Any]:
    """Do, or go on with, the whole job; returns the summary that it also writes to RUN/summary.json."""
    recipe = _resolved(recipe)
    root = Path(recipe.run)
    root.mkdir(parents=True, exist_ok=True)
    (root / "recipe.yaml").write_text(to_yaml(recipe), encoding="utf-8")
    steps = _Steps(root / "steps.json")
    captures, questions = root / "captures", root / "viewpoint"
    train = questions / "train.jsonl"

    rendered = steps.do("render", lambda: render(captures, recipe.render))
    built = steps.do("viewpoint", lambda: build(captures, questions, recipe.viewpoint))
    test, validation = (viewpoint_objects(questions / f"{split}.jsonl") for split in ("test", "validation"))
    steps.do("spatial", lambda: spatial_questions(captures, root / "spatial", recipe.spatial, test, validation))
    spatial = SourceConfig(str(root / "spatial/train.parquet"), letters=True)
    steps.do("cot", lambda: _cold_start(SourceConfig(str(train)), root / "cot.jsonl", recipe.cot_rows, recipe.seed))
    steps.do("spatial cot", lambda: _cold_start(spatial, root / "spatial-cot.jsonl", recipe.spatial_cot_rows, recipe.seed))
    steps.do("basics", lambda: _basics(questions, captures, root, recipe.seed))
    steps.do("model", lambda: tiny.create(root / "model", _texts(root), recipe.model, recipe.seed))

    steps.do("front", lambda: sft.train(recipe.front))
    steps.do("ring", lambda: sft.train(recipe.ring))
    before = steps.do("test after ring", lambda: _test(recipe, "ring"))
    steps.do("sft", lambda: sft.train(recipe.sft))
    after_sft = steps.do("test after sft", lambda: _test(recipe, "sft"))
    steps.do("grpo", lambda: grpo.train(recipe.grpo))
    after_grpo = steps.do("test after grpo", lambda: _test(recipe, "grpo"))

    summary = _summary(recipe, steps.seconds, rendered, built, before, after_sft, after_grpo)
    _write_json(root / "summary.json", summary)
    summary["report"] = str(write_report(root))
    return summary


def _resolved(recipe: QuickstartRecipe) -> QuickstartRecipe:
    """The recipe with its run folder and seed handed to every part, and each stage starting where the one before ended."""

    def fill(value: Any) -> Any:
        if isinstance(value, SourceConfig):
            return replace(value, path=value.path.replace("{run}", recipe.run))
        if isinstance(value, tuple):
            return tuple(fill(v) for v in value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return replace(value, **{f.name: fill(getattr(value, f.name)) for f in dataclasses.fields(value)})
        return value

    parts = {name: replace(getattr(recipe, name), seed=recipe.seed) for name in ("render", "viewpoint", "spatial")}
    model = f"{recipe.run}/model"
    for name in ("front", "ring", "sft", "grpo"):
        stage = fill(getattr(recipe, name))
        parts[name] = replace(stage, name=name, run=recipe.run, seed=recipe.seed, model=replace(stage.model, path=model))
        model = f"{recipe.run}/{name}/final/model"
    return replace(recipe, test=fill(recipe.test), sampled=fill(recipe.sampled), **parts)


class _Steps:
    """Which steps are done, what they returned and how long they took, in a file that survives a kill."""

    def __init__(self, path: Path):
        self._path = path
        self._done: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    @property
    def seconds(self) -> dict[str, float]:
        """Wall seconds of each finished step, the parts that were interrupted by a signal included."""
        return {name: entry["seconds"] for name, entry in self._done.items()}

    def do(self, name: str, work: Callable[[], Any]) -> Any:
        """The step's result, from the file when it is finished."""
        entry = self._done.setdefault(name, {"seconds": 0.0, "finished": False})
        if not entry["finished"]:
            print(f"== {name}", flush=True)
            began = time.perf_counter()
            try:
                result = work()
            except (Stopped, KeyboardInterrupt):
                self._note(entry, began)
                raise
            entry |= {"finished": True, "result": result if isinstance(result, dict) else None}
            self._note(entry, began)
        return entry["result"]

    def _note(self, entry: dict[str, Any], began: float) -> None:
        entry["seconds"] += time.perf_counter() - began
        _write_json(self._path, self._done)


def _cold_start(train: SourceConfig, out: Path, rows: int, seed: int) -> dict[str, Any]:
    """Pseudo chains of thought written from the poses, for a sample of the training rows."""
    source = open_source(train)
    done = write_cot(source, out, one_by_one(partial(geometric_cot, style="short")), seed=seed, count=min(rows, len(source)))
    return dataclasses.asdict(done)


def _basics(questions: Path, captures: Path, root: Path, seed: int) -> dict[str, Any]:
    return {
        f"{ring}-{split}": write_basics(
            questions / f"{split}.jsonl", captures, root / f"{ring}-{split}.jsonl", front=ring == "front", seed=seed
        )
        for ring in ("front", "ring")
        for split in ("train", "validation")
    }


def _texts(root: Path) -> Iterator[str]:
    """All training texts, for the tokenizer."""
    spatial = SourceConfig(str(root / "spatial/train.parquet"), letters=True)
    paths = (root / name for name in ("viewpoint/train.jsonl", "cot.jsonl", "spatial-cot.jsonl", "ring-train.jsonl"))
    for source in map(open_source, (*(SourceConfig(str(path)) for path in paths), spatial)):
        for i in range(len(source)):
            for turn in source[i].turns:
                yield turn.content.replace(IMAGE_TAG, "")


def _test(recipe: QuickstartRecipe, stage: str) -> dict[str, Any]:
    """Greedy and sampled held-out tables of a finished stage, also noted for the report as that stage's last word."""
    folder = Path(recipe.run) / stage
    results = {
        "greedy": evaluate_checkpoint(folder / "final" / "model", recipe.test, recipe.seed),
        "sampled": evaluate_checkpoint(folder / "final" / "model", recipe.sampled, recipe.seed),
    }
    last = max(checkpoint.steps(folder))
    with MetricLog(Path(recipe.run), stage=stage, total=last, tensorboard=False, resume_step=last) as log:
        for tables in results.values():
            log.event("eval", tables, last)
    for tables in results.values():
        for name, table in tables.items():
            print(render_table(table, f"{name}, after {stage}"), flush=True)
    return results


def _summary(
    recipe: QuickstartRecipe,
    seconds: dict[str, float],
    rendered: dict[str, float],
    built: dict[str, Any],
    before: dict[str, Any],
    after_sft: dict[str, Any],
    after_grpo: dict[str, Any],
) -> dict[str, Any]:
    def accuracy(results: dict[str, Any]) -> dict[str, float]:
        return {kind: round(f["accuracy"], 4) for table in results["greedy"].values() for kind, f in table["kinds"].items()}

    def formed_and_right(results: dict[str, Any]) -> dict[str, float]:
        return {name.split(" ")[0]: round(t["overall"]["well_formed_and_correct"], 4) for name, t in results["sampled"].items()}

    return {
        "seed": recipe.seed,
        "accuracy_before_sft": accuracy(before),
        "accuracy_after_sft": accuracy(after_sft),
        "accuracy_after_grpo": accuracy(after_grpo),
        "well_formed_and_correct_before_grpo": formed_and_right(after_sft),
        "well_formed_and_correct_after_grpo": formed_and_right(after_grpo),
        "images_per_second": round(rendered["images_per_second"], 1),
        "examples_per_second": round(built["examples_per_second"], 1),
        "seconds": {name: round(s, 1) for name, s in seconds.items()},
        "total_seconds": round(sum(seconds.values()), 1),
    }


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")
    os.replace(temporary, path)

"""The walk of docs/photographs.md, command by command as they stand there, with a tiny model: from photographs to a model to serve."""

import json
import re
import shlex
from pathlib import Path

import pytest
from peft import PeftConfig
from PIL import Image
from safetensors.torch import load_file
from transformers import Qwen2_5_VLForConditionalGeneration

from actial_fast.cli.main import main
from actial_fast.report.metrics import read_events, read_metrics
from actial_fast.settings.config import load_recipe
from tests.photographs import photograph, walk_round

ROOT = Path(__file__).parents[1]
COMMANDS = re.findall(r"^actial (.*)$", (ROOT / "docs/photographs.md").read_text(), flags=re.M)
HELD = ["eval.limit=6", "eval.max_new_tokens=4", "data.workers=0", "model.max_pixels=3136"]
SMALLER = {  # what a command of the page is given besides, by its first words
    "data reconstruct": ["threads=1"],
    "data viewpoint": ["workers=1", "max_test_fraction=0.4"],
    "sft": ["model.path=tiny", "steps=2", "batch_size=6", *HELD],
    "grpo": ["steps=1", "prompts=2", "minibatch=2", "sampling.n=2", "sampling.max_new_tokens=8", *HELD],
    "eval": ["--limit", "6", "--max-new-tokens", "4"],
}
MODEL = ["image_size=56", "hidden=32", "heads=4", "layers=2", "vision_hidden=32"]


def walk(capsys, *, left_out: tuple[str, ...]) -> dict[str, str]:
    """What each command said, by its words; `left_out` ones are not given. Behind the questions a tiny model is made of their words."""
    said = {}
    for command in COMMANDS:
        words = shlex.split(command)
        if any(words[: len(name.split())] == name.split() for name in left_out):
            continue
        smaller = next((more for name, more in SMALLER.items() if command.startswith(name)), [])
        if "--server" in words:  # the engine that the page starts is not here: its weights are asked as they lie
            words = words[: words.index("--server")]
        capsys.readouterr()
        assert main([*words, *smaller]) == 0, command
        said[command] = capsys.readouterr().out
        if command.startswith("data viewpoint"):
            assert main(["tiny", "viewpoint/train.jsonl", "-o", "tiny", *MODEL]) == 0
    return said


def check(said: dict[str, str], objects: int) -> None:
    """What lies in the working folder behind the walk, and what was told on the way."""
    rows = {split: [json.loads(line) for line in Path(f"viewpoint/{split}.jsonl").read_text().splitlines()] for split in ("train", "test")}
    shown = {split: {row["meta"]["object"] for row in of} for split, of in rows.items()}
    assert shown["train"] and shown["test"] and shown["train"].isdisjoint(shown["test"]) and len(shown["train"] | shown["test"]) == objects
    assert min(Image.open("sheet.png").size) > 100
    sft, grpo = (load_recipe(f"recipes/photos-{kind}.yaml") for kind in ("sft", "grpo"))
    for kind, recipe in (("sft", sft), ("grpo", grpo)):
        told = next(text for command, text in said.items() if command.startswith(f"{kind} ")).splitlines()
        assert re.fullmatch(rf"{kind}: [\d,]+ parameters, [\d,]+ of them trained \([\d.]+%\), on CPU", told[0])
        assert told[1].startswith(f"{kind}: {len(rows['train'])} rows; ") and told[2].startswith(f"{kind}: expected: ")
        assert recipe.model.lora.rank and recipe.model.frozen_dtype == "bfloat16"
        before = load_file("tiny/model.safetensors" if kind == "sft" else "runs/photos/sft/final/model/model.safetensors")
        after = load_file(f"runs/photos/{kind}/final/model/model.safetensors")
        assert before.keys() == after.keys()
        config = PeftConfig.from_pretrained(f"runs/photos/{kind}/final/adapter")
        assert config.r == recipe.model.lora.rank
        assert config.base_model_name_or_path == ("tiny" if kind == "sft" else "runs/photos/sft/final/model")
    metrics, events = read_metrics(Path("runs/photos")), read_events(Path("runs/photos"))
    held = [(m["step"], m["eval/viewpoint/test/loss"]) for m in metrics if "eval/viewpoint/test/loss" in m]
    assert [step for step, _ in held] == [0, 2] and held[0][1] != held[1][1]
    assert [(e["stage"], e["step"]) for e in events if e["kind"] == "eval"] == [("sft", 0), ("sft", 2), ("grpo", 0), ("grpo", 1)]
    assert {m["stage"] for m in metrics if "reward/format" in m} == {"grpo"}
    page = Path("runs/photos/report.html").read_text()
    assert "before sft" in page and "after grpo" in page and "held-out rows" in page
    asked = [text for command, text in said.items() if command.startswith("eval ")]
    assert len(asked) == 3 and all("viewpoint/test" in text and "chance" in text for text in asked)
    Qwen2_5_VLForConditionalGeneration.from_pretrained("mine")
    assert PeftConfig.from_pretrained("mine/adapter").base_model_name_or_path == "runs/photos/sft/final/model"


def folder(tmp_path, monkeypatch) -> None:
    """An empty working folder with the system prompt that the page says to put there."""
    monkeypatch.chdir(tmp_path)
    Path("system.txt").write_text(load_recipe("recipes/photos-grpo.yaml").data.sources[0].system)


def test_the_walk_from_captures_on(tmp_path, monkeypatch, capsys):
    """With the renderer's poses in the place of COLMAP's; the pictures are a telephone's."""
    folder(tmp_path, monkeypatch)
    words = ["objects=3", "families=[vehicle]", "views=10", "image_size=56", "format=jpg", "workers=1"]
    assert main(["data", "render", "-o", "captures", *words]) == 0
    for path in Path("captures").rglob("images/*.jpg"):
        photograph(Image.open(path).copy(), path)
    check(walk(capsys, left_out=("data reconstruct", "plan")), objects=3)


@pytest.mark.slow
def test_the_whole_walk(tmp_path, monkeypatch, capsys):
    """From the photographs, which are stored in four orientations, by COLMAP; and both recipes fit the card that they are for."""
    walk_round(tmp_path)
    folder(tmp_path, monkeypatch)
    said = walk(capsys, left_out=())
    check(said, objects=2)
    assert "2 captures of 2 objects" in said["data reconstruct photos -o captures"]
    plans = [text for command, text in said.items() if command.startswith("plan ")]
    assert len(plans) == 2 and all("fits 1 x 24 GB" in text for text in plans)


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_the_recipes_go_together(kind):
    """The second begins where the first ends, and is asked what it was trained under."""
    recipe, first = (load_recipe(ROOT / f"recipes/photos-{name}.yaml") for name in (kind, "sft"))
    assert recipe.run == first.run and recipe.model.max_pixels == first.model.max_pixels
    assert {source.path for source in recipe.eval.sources} == {"viewpoint/test.jsonl"}
    if kind == "grpo":
        assert recipe.model.path == f"{first.run}/{first.name}/final/model"
        assert {source.system for source in (*recipe.data.sources, *recipe.eval.sources)} == {recipe.data.sources[0].system} != {""}

"""Whole plans: the shipped recipes on the machines that they are for, and what is told where one does not fit."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from actial_fast.budget import gpus, said
from actial_fast.budget.models import config_of
from actial_fast.budget.phases import phases_of
from actial_fast.budget.plan import changes, plan
from actial_fast.budget.rates import rates_of, write
from actial_fast.budget.workload import Workload, assumed
from actial_fast.cli.main import main
from actial_fast.settings.config import load_recipe
from bench.step.memory import RECIPES, planned

FOLDER = Path(__file__).parents[2] / "recipes"
QLORA = RECIPES["7B, QLoRA"][3]
QUICK = "3B, LoRA", "7B, the paper's"  # the others' traces take a few seconds each


def made(path, machine, size="", overrides=(), workload=None):
    recipe = load_recipe(FOLDER / f"{path}.yaml" if isinstance(path, str) else path, list(overrides))
    machine = gpus.parse(machine)
    return plan(recipe, config_of(recipe.model.path, size), machine, workload or assumed(recipe), rates_of(machine))


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES])
def test_a_recipe_fits_the_machine_that_it_is_for(name, capsys):
    each = planned(name)
    with capsys.disabled():
        print(f"\n{name}: {said.verdict(each)}")
    assert each.fits, said.text(each, name, advice=False)
    assert min(phase.spare for phase in each.phases) > 0.02 * each.case.machine.memory, "with a margin"
    assert each.pack_tokens >= each.case.recipe.pack_tokens


def test_what_a_share_is():
    """The 7B on 8x80, by hand: 8.292e9 parameters in float32 over 8 ranks, two moments, a reference in 16 bits."""
    phases = {phase.name: phase for phase in made("actial-7b-grpo", "8x80", "7b").phases}
    n = 8292166656
    update = phases["update"].device
    assert update["weights"] == update["gradients"] == 4 * n / 8 and update["moments"] == n and update["reference"] == n / 4
    assert phases["sync"].device["vLLM's weights"] == 2 * n
    assert phases["save"].host["the checkpoint being written"] == 12 * n
    assert phases["sample"].kv_tokens == int((0.6 * 80e9 - 2e9 - 2 * n) // 57344)
    assert phases["load"].device["weights"] == 4 * n / 8


@pytest.mark.slow  # a plan for every key that might do
def test_what_does_not_fit_is_told_with_what_would(capsys):
    """LoRA on a 7B in 16 bits, in micro-batches of twice the recipe's, is too much for 24 GB; in 4 bits it is not."""
    keys = [QLORA[0], "pack_tokens=16384"]
    each = made("actial-1x24", "1x24", overrides=keys)
    assert not each.fits
    single, together = changes(each)
    assert [list(change.keys) for change in single if "model.quantize" in change.keys], [c.keys for c in single]
    for change in [*single, *([together] if together else [])]:
        assert change.plan.fits
        again = made("actial-1x24", "1x24", overrides=[*keys, *(f"{key}={value}" for key, value in change.keys.items())])
        assert again.fits, change.keys
    text = said.text(each, "a recipe")
    assert "does not fit 1 x 24 GB, 22.4 GB of each usable: update needs" in text.splitlines()[0]
    assert "model.quantize=nf4" in text and "rounded to 4 bits" in text


def test_the_command_says_whether_it_fits(capsys):
    recipe = str(FOLDER / "actial-1x24.yaml")
    assert main(["plan", recipe, "--gpus", "1x24", "--host", "32"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{recipe}: fits 1 x 24 GB") and "not measured on this GPU: by the datasheet of the 4090" in text
    for word in (
        "load",
        "sample",
        "update",
        "save",
        "eval",
        "largest pack_tokens that fits",
        "host memory",
        "of 32.0 GB",
        "disk:",
        "a step:",
    ):
        assert word in text
    assert main(["plan", recipe, "--gpus", "1x24", "--host", "2"]) == 1 and "the host lacks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--gpus", "8*80"], "did you mean 8x80"),
        ([], "this machine has none that PyTorch finds"),
        (["--gpus", "1x24", "model.path=runs/nowhere"], "say which with --model 7b"),
        (["--gpus", "1x24", "--prompt", "0"], "--prompt, --images, --reply"),
        (["--gpus", "1x24", "--rates", "nowhere.json"], "--rates: nowhere.json"),
    ],
)
def test_mistakes_are_told_in_a_line(words, told, capsys, monkeypatch):
    monkeypatch.setattr(gpus, "found", lambda: None)
    assert main(["plan", str(FOLDER / "actial-1x24.yaml"), *words]) == 2
    assert told in capsys.readouterr().err


def test_a_quickstart_is_no_stage(capsys):
    assert main(["plan", str(FOLDER / "quickstart.yaml"), "--gpus", "1x24"]) == 2
    assert "plan one of kind sft or grpo" in capsys.readouterr().err


def test_measured_rates_are_called_so(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine = gpus.parse("8xH100")
    assert "not measured on this GPU" in rates_of(machine).about
    path = write("NVIDIA H100 80GB HBM3", update_tflops=(300.0, 500.0), copy_tb_s=2.8, date="2026-11-28", command="...")
    for rates in (rates_of(machine), rates_of(gpus.parse("3x64"), str(path))):
        assert rates.about == "measured on NVIDIA H100 80GB HBM3, 2026-11-28" and rates.tflops == (300e12, 500e12)
    assert "not measured" in rates_of(gpus.parse("8x80")).about, "a size alone may be another card"
    assert rates_of(gpus.parse("3x64")) is None
    path.write_text('{"gpu": "x", "update_tflops": [0, -1], "copy_tb_s": 1, "date": ""}')
    with pytest.raises(ValueError, match="rates that no GPU has"):
        rates_of(machine)


def test_the_more_ranks_the_less_each_holds_and_the_sooner_a_step_ends():
    recipe = load_recipe(FOLDER / "actial-7b-grpo.yaml")
    each = [plan(recipe, config_of("", "7b"), gpus.parse(f"{n}x80"), assumed(recipe), rates_of(gpus.parse("8x80"))) for n in (2, 4, 8)]
    held = [next(p.held for p in one.phases if p.name == "update") for one in each]
    assert held == sorted(held, reverse=True)
    times = [one.seconds["update"] for one in each]
    assert [t.low for t in times] == sorted((t.low for t in times), reverse=True) and all(0 < t.low < t.high for t in times)


def test_a_larger_micro_batch_holds_more():
    case = made("actial-7b-grpo", "8x80", "7b").case
    held = []
    for tokens in (8192, 16384, 32768):
        held.append(next(p.held for p in phases_of(replace(case, recipe=replace(case.recipe, pack_tokens=tokens))) if p.name == "update"))
    assert held == sorted(held) and held[2] > held[0]


def test_rows_that_are_known_fill_no_larger_batch_than_there_are():
    known = Workload(prompt=100, images=0, reply=20, longest=120, rows=16)
    each = made("actial-1x24", "1x24", workload=known)
    tight = made("actial-1x24", "1x24")
    by_name = [{p.name: p for p in one.phases} for one in (each, tight)]
    assert by_name[0]["update"].held < by_name[1]["update"].held
    assert re.search(r"means of 16 rows of the data", said.text(each, "x", advice=False))


def test_an_evaluation_takes_the_time_of_its_rows(tmp_path):
    """Sources of 40 and 30 rows; a limit of 10 for each, on 2 ranks; nothing where a source is not here and nothing limits it."""
    for name, rows in (("a", 40), ("b", 30)):
        row = {"id": "1", "messages": [{"role": "user", "content": "which?"}], "truth": "A"}
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row | {"id": str(k)}) + "\n" for k in range(rows)))

    def timed(limit, *names):
        sources = "[" + ", ".join(f"{{path: {tmp_path / name}.jsonl}}" for name in names) + "]"
        keys = [f"eval.sources={sources}", f"eval.limit={limit}", "eval.max_new_tokens=64"]
        return made("actial-7b-grpo", "8xH100", "7b", keys)

    assert [timed(limit, "a", "b").case.workload.evaluated for limit in (0, 35, 10)] == [70, 65, 20]
    assert timed(0, "a", "gone").case.workload.evaluated == 0 and "eval" not in timed(0, "a", "gone").seconds
    assert timed(10, "a", "gone").case.workload.evaluated == 20
    few, many = timed(10, "a", "b"), timed(0, "a", "b")
    assert 0 < few.seconds["eval"].low < few.seconds["eval"].high and few.seconds["eval"].high < many.seconds["eval"].high
    assert few.seconds["step"] == many.seconds["step"], "a step has none of it"
    assert "eval: 20 rows, replies as above, none over 64 tokens" in said.text(few, "r")

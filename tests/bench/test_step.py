"""The benchmark of one whole step: a tiny run of every side end to end, and what becomes of a side that cannot run, or is wrong."""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from bench import gate
from bench.harness.timing import CUDA
from bench.step import step, step_side
from bench.step.shapes import SHAPES

ROOT = Path(__file__).parents[2]
ROW = {
    "status": "measured",
    "settings": {"dtype": "float32"},
    "seconds": {"median": 2.0, "min": 1.9, "rounds": 3, "first": 5.0},
    "tokens_per_s": 1000.0,
    "mfu": 0.5,
    "peak_mib": 2048.0,
    "parts": dict.fromkeys(step.PARTS, 0.25),
    "ceiling": {"what": "the best torch.mm", "tflops": 700.0},
    "outside_kernels": 0.125,
}


@pytest.fixture
def here(monkeypatch):
    """Sides run in this process instead of one each, which takes as long as their imports."""

    def start(name, args, divide, seconds, folder):
        path = folder / "row.json"
        path.unlink(missing_ok=True)
        step.one(argparse.Namespace(one=name, shape=args.shape, rounds=args.rounds, divide=divide, budget=seconds, json=path))
        return json.loads(path.read_text())

    monkeypatch.setattr(step, "_start", start)


def rows_of(path: Path) -> dict[str, dict]:
    return {row["side"]: row for row in json.loads(path.read_text())["sides"]}


# ---- end to end


@pytest.mark.skipif(CUDA, reason="the tiny shape stands in for a GPU")
def test_a_tiny_step_end_to_end(here, tmp_path, monkeypatch, capsys):
    path, written, line = tmp_path / "results" / "r.json", [], step.line
    monkeypatch.setattr(step, "line", lambda row: written.append(len(rows_of(path)) if path.exists() else 0) or line(row))
    assert step.main(["--rounds", "1", "--json", str(path)]) == 0
    assert written == list(range(len(step.SIDES)))  # a line follows its side's file
    result, rows = json.loads(path.read_text()), rows_of(path)
    assert (
        set(result) == {"schema", "machine", "shape", "settings", "sides"} and result["shape"] == "tiny" and list(rows) == list(step.SIDES)
    )
    for name, row in rows.items():
        if step.missing(name):
            assert row["status"] == f"not installed: {step.missing(name)}"
        else:
            assert row["status"] == "measured", row
            figures_are_whole(row)
    same_work(rows)
    for text in (capsys.readouterr().out, path.with_suffix(".md").read_text()):
        assert all(f"| {name} |" in text for name in rows) and "| milliseconds | vision forward |" in text


def figures_are_whole(row):
    expected = {"side", "status", "took", "settings", "seconds", "host_seconds", "tokens", "tokens_per_s", "predicted_tokens", "images"}
    expected |= {"flops", "tflops", "ceiling", "mfu", "peak_mib", "loss", "gradient_norm", "parts", "gpu_before", "gpu_after", "profile"}
    assert expected | {"outside_kernels"} <= set(row) <= expected | {"outside_kernels", "gradient_apart"}
    seconds = row["seconds"]["median"]
    assert sum(row["parts"].values()) == pytest.approx(seconds, rel=0.05) and row["host_seconds"] <= seconds
    assert all(row["parts"][part] > 0 for part in step.PARTS if part != "vision_backward")
    assert row["mfu"] == pytest.approx(sum(row["flops"].values()) / seconds / 1e12 / row["ceiling"]["tflops"])
    assert row["tokens_per_s"] == pytest.approx(row["tokens"] / seconds) and row["gradient_norm"] > 0
    assert 0 < row["profile"]["busy_seconds"] and len(row["profile"]["longest"]) == 10
    assert row["settings"]["gradient_checkpointing"] and row["settings"].get("lora_rank") == (16 if "/lora/" in row["side"] else None)


def same_work(rows):
    for loop in ("grpo", "sft"):
        ours, plain = rows[f"{loop}/lora/ours"], rows[f"{loop}/lora/plain"]
        assert ours["gradient_apart"]["from"] == plain["side"] and 0 < ours["gradient_apart"]["relative"] < 1e-4
        assert ours["flops"] == plain["flops"] and ours["tokens"] == plain["tokens"] and ours["flops"]["vision_backward"] == 0
        assert ours["loss"] == pytest.approx(plain["loss"], abs=1e-5)
        assert ours["parts"]["vision_backward"] == 0, "the tower is frozen"
    assert rows["grpo/lora/ours"]["images"] == rows["sft/lora/ours"]["images"] == 2
    if not step.missing("grpo/lora/trl"):
        assert 0 < rows["grpo/lora/trl"]["gradient_apart"]["relative"] < 1e-4


@pytest.mark.skipif(CUDA, reason="the tiny shape stands in for a GPU")
def test_all_weights_are_trained_where_no_adapters_are(here, tmp_path, monkeypatch):
    """With AdamW in full precision, since bitsandbytes may not be here."""
    build, asked = step_side.optimizer_of, []

    def optimizer_of(parameters, *, eight_bit):
        asked.append((eight_bit, sum(p.numel() for p in parameters)))
        return build(parameters, eight_bit=False)

    monkeypatch.setattr(step_side, "optimizer_of", optimizer_of)
    monkeypatch.setattr(step, "missing", lambda name: None)
    assert step.main(["--sides", "full/(ours|plain)", "--rounds", "1", "--json", str(tmp_path / "r.json")]) == 0
    ours, plain = rows_of(tmp_path / "r.json").values()
    assert asked == 2 * [(True, asked[0][1])] and asked[0][1] > 1_000_000
    assert ours["status"] == plain["status"] == "measured" and 0 < ours["gradient_apart"]["relative"] < 1e-4
    assert ours["flops"]["vision_backward"] > ours["flops"]["vision_forward"] and ours["parts"]["vision_backward"] > 0
    assert ours["flops"]["head"] % 3 == 0 and "lora_rank" not in ours["settings"]


def test_a_side_has_a_process_of_its_own(tmp_path):
    """Which is ended when its time is up, and reads no package that a GPU machine may lack."""
    args = argparse.Namespace(shape="tiny", rounds=1)
    assert step._start("grpo/lora/ours", args, 1, 0.5, tmp_path) == {"side": "grpo/lora/ours", "status": "skipped: out of time"}
    absent = ("embreex", "pycolmap", "trimesh", "openai", "datasets", "trl", "liger_kernel", "bitsandbytes")
    code = f"import sys; sys.modules |= dict.fromkeys({absent!r}); from bench.step import step; step.main(sys.argv[1:])"
    options = ["--one", "sft/lora/ours", "--shape", "tiny", "--rounds", "1", "--budget", "60", "--json", str(tmp_path / "row.json")]
    subprocess.run([sys.executable, "-c", code, *options], cwd=ROOT, check=True, timeout=120)
    row = json.loads((tmp_path / "row.json").read_text())
    assert row["status"] == "measured" and row["side"] == "sft/lora/ours", row["status"]


# ---- sides that cannot run


def measuring(monkeypatch, measure):
    """Sides that do what `measure(name, divide, tell)` does."""
    monkeypatch.setattr(step, "missing", lambda name: None)
    monkeypatch.setattr(step_side, "measure", lambda name, shape, *, divide, tell, **_: measure(name, divide, tell))


def test_what_does_not_fit_is_tried_smaller(here, monkeypatch, tmp_path):
    tried = []

    def measure(name, divide, tell):
        tried.append((name, divide))
        if name.endswith("plain") or divide == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")
        tell(ROW | {"settings": {"divide": divide}})

    measuring(monkeypatch, measure)
    assert step.main(["--sides", "sft", "--json", str(tmp_path / "r.json")]) == 0
    rows = rows_of(tmp_path / "r.json")
    assert tried == [(f"sft/lora/{path}", divide) for path, divides in (("ours", (1, 2)), ("plain", (1, 2, 4))) for divide in divides]
    assert rows["sft/lora/ours"]["status"] == "measured" and rows["sft/lora/ours"]["settings"] == {"divide": 2}
    told = "out of memory, with micro-batches of 1 / 4 of the size: CUDA out of memory. Tried to allocate 20.00 GiB."
    assert rows["sft/lora/plain"]["status"] == told


def test_a_side_that_fails_is_a_row_and_fails_the_run_when_it_is_ours(here, monkeypatch, tmp_path):
    errors = {"plain": ModuleNotFoundError("No module named 'x'", name="x"), "trl": RuntimeError("no such kernel\nmore")}

    def measure(name, divide, tell):
        if error := errors.get(name.rsplit("/", 1)[1]):
            raise error
        tell(ROW)

    measuring(monkeypatch, measure)
    monkeypatch.setattr(step, "check", lambda rows, folder: None)
    command = ["--sides", "grpo/lora", "--json", str(tmp_path / "r.json")]
    assert step.main(command) == 0
    rows = rows_of(tmp_path / "r.json")
    assert (
        rows["grpo/lora/plain"]["status"] == "not installed: x"
        and rows["grpo/lora/trl"]["status"] == "failed: RuntimeError: no such kernel"
    )
    assert "| grpo/lora/trl | failed: RuntimeError: no such kernel |" in (tmp_path / "r.md").read_text()
    errors["ours"] = AssertionError("")
    assert step.main(command) == 1
    assert rows_of(tmp_path / "r.json")["grpo/lora/ours"]["status"] == "failed: AssertionError: "


def test_a_package_that_is_not_there_costs_no_time(monkeypatch, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("trl", "bitsandbytes") else found(name))
    assert step.main(["--sides", "trl|full/ours", "--json", str(tmp_path / "r.json")]) == 0
    statuses = [row["status"] for row in rows_of(tmp_path / "r.json").values()]
    assert statuses == ["not installed: trl", "not installed: bitsandbytes", "not installed: bitsandbytes"]


def test_a_process_that_dies_leaves_what_it_has_told(monkeypatch, tmp_path):
    def starting(code: str) -> dict:
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
        (tmp_path / "python").write_text(f"#!/bin/sh\nfor path; do :; done\n{code}\nkill -SEGV $$\n")  # the last argument is the row's file
        (tmp_path / "python").chmod(0o755)
        return step._start("grpo/lora/ours", argparse.Namespace(shape="tiny", rounds=1), 1, 10, tmp_path)

    assert starting("")["status"] == "failed: exit code -11"
    assert starting("""echo '{"status": "measured"}' > "$path" """)["status"] == "measured"


def test_the_budget_is_kept(monkeypatch, tmp_path):
    now, given = [0.0], []
    monkeypatch.setattr(step.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(step, "missing", lambda name: None)
    monkeypatch.setattr(step, "check", lambda rows, folder: None)

    def start(name, args, divide, seconds, folder):
        given.append(seconds)
        now[0] += 70
        return ROW | {"side": name}

    monkeypatch.setattr(step, "_start", start)
    step.main(["--budget", "240", "--json", str(tmp_path / "r.json")])
    assert given == [240, 170, 100, 30]
    rows = rows_of(tmp_path / "r.json")
    assert [row["status"] for row in rows.values()] == ["measured"] * 4 + ["skipped: out of time"] * 4


# ---- what is told


def test_a_wrong_gradient_is_told_instead_of_a_speed(tmp_path):
    truth = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    rows = [ROW | {"side": f"grpo/lora/{path}"} for path in ("ours", "trl")]
    for row, gradient in zip(rows, (truth, 1.01 * truth), strict=True):
        np.save(step.gradient_file(tmp_path, row["side"]), gradient)
    step.check(rows, tmp_path)  # without the plain path ours is what the others are held to
    assert rows[0]["status"] == "measured" and rows[1]["status"] == "wrong: gradient apart from grpo/lora/ours's by 1.0e-02, relative"
    rows.append(ROW | {"side": "grpo/lora/plain"})
    np.save(step.gradient_file(tmp_path, "grpo/lora/plain"), 1.01 * truth)
    step.check(rows, tmp_path)
    assert [row["status"].split(":")[0] for row in rows] == ["wrong", "measured", "measured"]
    for row in rows:
        row["settings"] = {"dtype": "bfloat16"}
    step.check(rows, tmp_path)
    assert [row["status"] for row in rows] == ["measured"] * 3
    np.save(step.gradient_file(tmp_path, "grpo/lora/ours"), np.nan * truth)
    step.check(rows, tmp_path)
    assert rows[0]["status"].startswith("wrong")


def test_the_table_says_who_is_faster_by_how_much():
    rows = [
        ROW | {"side": "grpo/lora/ours", "took": 1.0},
        ROW | {"side": "grpo/lora/trl", "took": 1.0, "seconds": ROW["seconds"] | {"median": 9.0}},
    ]
    machine = {"gpu": "A GPU", "torch": "2", "triton": "3", "date": "2026-01-02", "commit": "abc"}
    text = step.markdown({"machine": machine, "shape": "7b", "sides": rows})
    assert "| grpo/lora/ours | 2 s (3) | 1,000 | 50.0% | 2.0 GiB | 12.5% |  |" in text
    assert "| grpo/lora/trl | 9 s (3) | 1,000 | 50.0% | 2.0 GiB | 12.5% | 4.50x |" in text
    assert step.line(rows[0]).split("  ")[-1] == "12.5% outside"


def test_time_on_the_device_is_counted_once_and_waiting_not_at_all():
    events = [
        ("a", 100, 50),
        ("b", 120, 10),
        ("a", 140, 60),
        ("c", 400, 100),
        ("Context Sync", 0, 10_000),
        ("Stream Wait Event", 0, 10_000),
    ]
    told = step_side.summed(iter(events))
    assert told["busy_seconds"] == pytest.approx(200e-9) and told["kernels"] == 4
    assert [(x["name"], x["calls"], round(1e9 * x["seconds"])) for x in told["longest"]] == [("a", 2, 110), ("c", 1, 100), ("b", 1, 10)]


def test_the_7b_has_the_checkpoints_weights(tmp_path):
    """8.29 billion, and 128 a head, which M-RoPE's sections divide."""
    case, shape = step_side.make_case(1, 1, 40, str(tmp_path)), SHAPES["7b"]
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(step_side.config_of(case.tokenizer, shape.text, shape.vision))
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 2) == 8.29
    assert 2 * sum(shape.text["rope_parameters"]["mrope_section"]) == model.model.language_model.layers[0].self_attn.head_dim == 128


def test_the_gate_gives_the_step_its_time():
    (step,) = (step for step in gate.steps() if "bench.step.step" in step.command)
    assert step.budget(95) == ["--budget", "85"] and step.share >= 85
    assert step.absent is None and step.command[-1].endswith(".json")

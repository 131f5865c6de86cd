"""The microbenchmarks: what counts as a regression, that nothing wrong is timed and nothing left out in silence, and one run end to end."""

import copy
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.harness import compare, plot, table
from bench.harness.timing import CUDA, peak_mib
from bench.kernels import memcheck, ops, rounds, sides
from bench.kernels.problems import FLOOR, SPEC, Expected, Head, Wrong, check

ROOT = Path(__file__).parents[2]


def measured(name: str, ms: float, share: float, peak: float = 700.0) -> dict:
    times = {"median": ms, "min": 0.9 * ms, "rounds": 20}
    return {"side": name, "status": "measured", "ms": times, "rate": 790 * share, "share": share, "peak_mib": peak, "error": {"loss": 1e-4}}


def result_of(*sides: dict) -> dict:
    case = {
        "case": "linear_grpo_loss/trainable/T8192-H3584-V152064",
        "op": "linear_grpo_loss",
        "variant": "trainable",
        "T": 8192,
        "H": 3584,
        "V": 152064,
        "dtype": "bfloat16",
        "unit": "TFLOP/s",
        "floor": 3 * 2 * 8192 * 3584 * 152064,
        "ceiling": {"ms": {"median": 11.4, "min": 11.3, "rounds": 20}, "rate": 790.0},
        "gpu_after": {"sm_mhz": 1755.0, "power_w": 690.0, "celsius": 61.0},
        "seconds": 4.0,
        "sides": list(sides),
    }
    machine = {"slug": "a-gpu", "gpu": "A GPU", "torch": "2", "triton": "3", "date": "2026-01-02", "commit": "abc"}
    return {"schema": 1, "machine": machine, "settings": {"budget_seconds": 240.0}, "cases": [case]}


RESULT = result_of(
    measured("ours, 700 MB", 40.0, 0.85),
    measured("ours, 1400 MB", 38.0, 0.89, 1400.0),
    measured("torch", 70.0, 0.48, 21000.0),
    {"side": "quack", "status": "not installed"},
    {"side": "torch.compile", "status": "skipped: out of time"},
    measured("Liger GRPO", 400.0, 0.08, 4300.0),
)


# ---- comparison


@pytest.fixture
def files(tmp_path):
    """(run compare on a changed copy of RESULT) -> exit code; the baseline is that of RESULT."""
    baseline = tmp_path / "baseline.json"
    first = tmp_path / "first.json"
    first.write_text(json.dumps(RESULT))
    assert compare.main([str(first), "--baseline", str(baseline), "--save-baseline"]) == 0

    def run(change, *more: str) -> int:
        result = copy.deepcopy(RESULT)
        change(result["cases"][0]["sides"])
        (tmp_path / "second.json").write_text(json.dumps(result))
        return compare.main([str(tmp_path / "second.json"), "--baseline", str(baseline), *more])

    return run


def test_an_unchanged_result_passes(files, capsys):
    assert files(lambda sides: None) == 0
    assert "2 sides compared" in capsys.readouterr().out  # ours only


@pytest.mark.parametrize(
    ("share", "code", "told"),
    [(0.85 / 1.09, 0, "0 worse"), (0.85 / 1.12, 1, "regression"), (0.85 * 1.2, 0, "improved")],
)
def test_more_than_a_tenth_slower_is_a_regression(files, capsys, share, code, told):
    assert files(lambda sides: sides[0].update(share=share)) == code
    out = capsys.readouterr().out
    assert told in out and ("ours, 700 MB" in out) == (told != "0 worse")


def test_a_slower_clock_is_no_regression(files):
    assert files(lambda sides: [side.get("ms", {}).update(median=400.0) for side in sides]) == 0


def test_more_memory_is_a_regression(files, capsys):
    assert files(lambda sides: sides[0].update(peak_mib=780.0)) == 1
    assert "peak 700 MiB before, 780 MiB now" in capsys.readouterr().out
    assert files(lambda sides: sides[0].update(peak_mib=760.0)) == 0


def test_a_peer_may_get_slower_and_ours_may_not_break(files, capsys):
    assert files(lambda sides: sides[2].update(share=0.1)) == 0
    assert files(lambda sides: sides[1].update(status="wrong: logp is off")) == 1
    assert "broken      linear_grpo_loss/trainable/T8192-H3584-V152064: ours, 1400 MB: wrong: logp is off" in capsys.readouterr().out


def test_a_side_that_was_not_run_is_named(files, capsys):
    assert files(lambda sides: sides[0].update(status="skipped: out of time")) == 0
    assert files(lambda sides: sides.pop(0)) == 0
    out = capsys.readouterr().out
    assert "missing" in out and "skipped: out of time" in out and "not part of this run" in out


def test_launches_are_not_held_to_a_baseline():
    figures = compare.baseline_of(result_of(measured("ours", 0.02, 0.01)), "x.json")["figures"]
    assert figures == {}


def test_without_a_baseline_it_says_how_to_make_one(tmp_path, capsys):
    (tmp_path / "r.json").write_text(json.dumps(RESULT))
    assert compare.main([str(tmp_path / "r.json"), "--baseline", str(tmp_path / "none.json")]) == 0
    assert "--save-baseline" in capsys.readouterr().out


# ---- what is timed, and what is only listed


@pytest.fixture(scope="module")
def head() -> Head:
    return Head(64, 32, 500, torch.float32)


def test_the_truth_is_what_torch_computes(head):
    right = head.grpo(SPEC, head.advantages)
    torch_side = next(side for side in sides.linear_grpo_loss(frozen=False) if side.name == "torch")
    errors = check(torch_side.prepare(head)(), right)
    assert set(errors) == {"loss", "logp", "entropy", "grad_hidden", "grad_weight"} and max(errors.values()) < FLOOR[torch.float32]


CHANGES = {
    "zero": lambda x: 0 * x,
    "scaled": lambda x: 1.01 * x,
    "shuffled": lambda x: x.flip(0),
    "nan": lambda x: x * torch.nan,
    "transposed": lambda x: x[None],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["logp", "entropy", "grad_hidden", "grad_weight"])
def test_a_wrong_answer_is_not_timed(head, name, change):
    outputs = sides.linear_grpo_loss(frozen=False)[0].prepare(head)()
    with pytest.raises((Wrong, IndexError)):
        check(outputs | {name: CHANGES[change](outputs[name])}, head.grpo(SPEC, head.advantages))


@pytest.mark.parametrize("error", [0.01, torch.nan])
def test_a_wrong_loss_is_not_timed(head, error):
    outputs = sides.linear_grpo_loss(frozen=False)[0].prepare(head)()
    with pytest.raises(Wrong, match="loss is off by"):
        check(outputs | {"loss": outputs["loss"] + error}, head.grpo(SPEC, head.advantages))


def test_a_missing_gradient_is_wrong_and_a_missing_value_is_not(head):
    right = head.grpo(SPEC, head.advantages)
    outputs = sides.linear_grpo_loss(frozen=False)[0].prepare(head)()
    assert "entropy" not in check({k: v for k, v in outputs.items() if k != "entropy"}, right)
    with pytest.raises(Wrong, match="grad_weight missing"):
        check({k: v for k, v in outputs.items() if k != "grad_weight"}, right)
    with pytest.raises(Wrong, match="missing"):
        check({}, {"logp": right["logp"]})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"needs": "no_such_package"}, "not installed"),
        ({"needs": "torch.nn.functional.no_such_function"}, "does not have it"),
        ({"gpu": True}, None if CUDA else "needs a GPU"),
        ({}, None),
    ],
)
def test_why_a_side_cannot_run(changes, reason):
    told = replace(sides.linear_logprob(False)[0], **changes).unavailable()
    assert told is None if reason is None else reason in told


@pytest.mark.parametrize(("index", "share"), [(0, 1.0), (1, 0.5), (2, 0.0)])
def test_as_many_rows_have_a_gradient_as_the_side_says(head, index, share):
    gradient = sides.zero_rows()[index].prepare(head)()["grad_hidden"]
    assert sum(bool(row.any()) for row in gradient) == share * len(gradient)


class FakeBenchmark:
    """pytest-benchmark's pedantic mode, with a clock that counts."""

    skipped = False

    def pedantic(self, target, setup, rounds, warmup_rounds):
        self.calls = []
        for _ in range(rounds + warmup_rounds):
            (call,), _ = setup()
            self.calls.append(call)
            target(call)
        data = [0.001 * (1 + i % 3) for i in range(rounds)]
        self.stats = type("Metadata", (), {"stats": type("Stats", (), {"data": data})})


def test_every_side_is_listed_and_takes_turns_with_the_ceiling():
    def broken(p):
        raise RuntimeError("no such kernel\nmore")

    def lying(p):
        return lambda: {"logp": p.logp.float() + 1, "entropy": p.entropy.float()}

    ours, torch_side = sides.linear_logprob(False)[:2]
    listed = [
        ours,
        torch_side,
        replace(ours, name="absent", needs="no_such_package"),
        replace(ours, name="broken", prepare=broken),
        replace(ours, name="lying", prepare=lying),
        replace(torch_side, name="torch.compile", compiled=True),
    ]
    case = rounds.Case("linear_logprob", "no grad", 64, 32, 500, torch.float32, lambda: listed, gemms=1)
    run, benchmark = rounds.Run(cases=[case], rounds=(2, 2), compile=lambda case: "skipped: because"), FakeBenchmark()
    rounds.test_case(benchmark, case, run)
    by_name = {side["side"]: side for side in run.results[0]["sides"]}
    assert list(by_name) == [side.name for side in listed]
    assert [by_name[x]["status"] for x in ("absent", "broken", "torch.compile")] == [
        "not installed",
        "failed: RuntimeError: no such kernel",
        "skipped: because",
    ]
    assert by_name["lying"]["status"].startswith("wrong: logp is off by") and "ms" not in by_name["lying"]
    assert by_name["ours"]["ms"] == {"median": 2.0, "min": 2.0, "rounds": 2} and by_name["torch"]["ms"]["median"] == 3.0
    flop = 2 * 64 * 32 * 500
    assert run.results[0]["ceiling"]["ms"]["min"] == 1.0 and by_name["ours"]["share"] == pytest.approx(0.5)
    assert by_name["ours"]["rate"] == pytest.approx(flop / 0.002 / 1e12, rel=1e-3)
    assert benchmark.calls == benchmark.calls[:3] * 3  # ceiling, ours, torch, ceiling, ...
    assert ops.bad({"side": "ours", "status": "wrong: x"}) and not ops.bad({"side": "TRL", "status": "wrong: x"})


def test_what_does_not_fit_the_time_is_listed():
    case = rounds.Case("linear_logprob", "no grad", 64, 32, 500, torch.float32, lambda: sides.linear_logprob(False), gemms=1)
    run, benchmark = rounds.Run(cases=[case], deadline=0.0), FakeBenchmark()
    rounds.test_case(benchmark, case, run)
    statuses = {side["side"]: side["status"] for side in run.results[0]["sides"]}
    assert set(statuses) == {side.name for side in sides.linear_logprob(False)} and "ceiling" not in run.results[0]
    assert all(status in ("skipped: out of time", "not installed") for status in statuses.values()) and benchmark.skipped


def test_the_floor_is_the_ops_and_not_the_sides():
    found = {(case.op, case.variant): case for case in ops.cases()}
    size = 2 * found["linear_grpo_loss", "trainable"].rows
    case = found["linear_grpo_loss", "trainable"]
    gemm = size * case.hidden * case.vocab
    assert [
        found[key].work() // gemm
        for key in [("linear_grpo_loss", "trainable"), ("linear_grpo_loss", "frozen"), ("linear_logprob", "no grad")]
    ] == [3, 2, 1]
    assert [case.work(side) // gemm for side in sides.zero_rows()] == [3, 2, 1, 2]
    assert found["token_kl", "forward"].work() == 12 * found["token_kl", "forward"].rows
    assert len({case.name for case in ops.cases()}) == len(ops.cases())


@pytest.mark.skipif(CUDA, reason="counts the CPU's allocations")
def test_peak_memory_leaves_out_what_is_returned():
    x = torch.ones(512, 512)  # 1 MiB
    assert peak_mib(lambda: x + 1) == pytest.approx(0, abs=0.01)
    assert peak_mib(lambda: ((x + 1) * (x + 2)).sum()) == pytest.approx(3, abs=0.01)


# ---- end to end


def test_a_quick_run_end_to_end(tmp_path):
    """Without the peers whose import alone takes seconds; tests/ops/test_equal_to_trl.py and bench.kernels.accuracy run them."""
    path = tmp_path / "quick.json"
    command = [sys.executable, "-m", "bench.kernels.ops", "--quick", "--sides", "^ours|^torch|FLCE|quack", "--json", str(path)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(path.read_text())
    every_op_of_ours_is_measured(result)
    readers_find_what_they_rely_on(result)
    for text in (done.stdout, path.with_suffix(".md").read_text()):
        for case in result["cases"]:
            assert case["case"] in text and all(side["side"] in text for side in case["sides"])
        assert "backward with half of the rows" in text
    assert re.search(r"quack +(not installed|needs)", done.stdout)


def every_op_of_ours_is_measured(result):
    assert {case["op"] for case in result["cases"]} == {case.op for case in ops.cases()}
    statuses = [side["status"] for case in result["cases"] for side in case["sides"] if re.match("ours(?!, by quack)", side["side"])]
    assert len(statuses) >= 15 and set(statuses) == {"measured"}
    compiled = {side["status"] for case in result["cases"] for side in case["sides"] if side["side"] == "torch.compile"}
    assert compiled == {"skipped: --quick"}


def readers_find_what_they_rely_on(result):
    assert result["schema"] == ops.SCHEMA and set(result) == {"schema", "machine", "settings", "cases"}
    assert {"slug", "gpu", "cpu", "torch", "triton", "packages", "date", "commit"} <= set(result["machine"])
    for case in result["cases"]:
        assert {"case", "op", "variant", "T", "H", "V", "dtype", "unit", "floor", "ceiling", "gpu_after", "seconds", "sides"} == set(case)
        assert case["unit"] in ("TFLOP/s", "GB/s") and case["ceiling"]["rate"] > 0
        for side in case["sides"]:
            assert side["status"] != "measured" or {"ms", "rate", "share", "peak_mib", "error"} <= set(side)
            assert side["status"] != "measured" or side["share"] == pytest.approx(side["rate"] / case["ceiling"]["rate"], rel=0.01)


def test_the_list_says_why_a_side_cannot_run(capsys):
    assert ops.main(["--list", "--only", "cross_entropy"]) == 0
    out = capsys.readouterr().out
    assert "linear_cross_entropy/trainable/T" in out and "linear_grpo_loss" not in out
    assert CUDA or "Liger FLCE  (needs a GPU)" in out or "Liger FLCE  (not installed)" in out
    with pytest.raises(SystemExit):
        ops.main(["--only", "no such op"])


# ---- plot


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_plot_is_drawn_from_a_result(tmp_path, suffix):
    (tmp_path / "r.json").write_text(json.dumps(RESULT))
    out = tmp_path / f"plot{suffix}"
    assert plot.main([str(tmp_path / "r.json"), "--out", str(out)]) == 0
    assert out.stat().st_size > 5000 and out.read_bytes()[:4] in (b"\x89PNG", b"<?xm")


def test_the_plot_tells_what_is_not_drawn(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(plot.plt.Figure, "text", lambda self, x, y, text, **_: told.append(text))
    plot.draw(RESULT, "T8192-H3584-V152064", tmp_path / "p.png")
    assert "T = 8,192 rows, H = 3,584, V = 152,064, bfloat16, A GPU" in told
    assert "quack: not installed" in told and "torch.compile: skipped: out of time" in told
    with pytest.raises(ValueError, match=r"T1-H2-V3.*T8192-H3584-V152064"):
        plot.draw(RESULT, "T1-H2-V3", tmp_path / "p.png")


def test_the_markdown_says_who_is_fastest():
    text = table.markdown(RESULT)
    assert "| ours, 1400 MB: 38 ms | 89.0% | torch: 70 ms | 1.84x |" in text
    assert "| quack | not installed |" in text and "1755 MHz, 690 W, 61 °C" in text


def test_memcheck_runs_every_op(capsys):
    memcheck.main([])
    assert "every op ran" in capsys.readouterr().out


def test_an_expected_value_of_another_shape_is_wrong():
    with pytest.raises(Wrong, match="shape"):
        Expected(torch.ones(3), None, 1.0).error(torch.ones(3, 1))

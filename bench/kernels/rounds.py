"""The pytest-benchmark test that times one case: every side checked, then timed in turns. Run by `python -m bench.kernels.ops`.

A side is timed only after its answer is right. The rounds of one case go ceiling, side 1, side 2, ..., ceiling, side 1, ... in one
process, so that clocks and temperature drift for all of them alike, each after a flush of the cache.
"""

from __future__ import annotations

import itertools
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.harness.timing import Cache, gemm, gpu_state, peak_mib, release, seconds_of
from bench.kernels.problems import Head, Rewards, Wrong, check
from bench.kernels.sides import Side

CEILING = "ceiling"
OUT_OF_TIME = "skipped: out of time"


@dataclass(frozen=True)
class Case:
    """An op at a size. Floor: `gemms` products of 2*T*H*V FLOP or, without a matrix product, `bytes_per_row` of traffic."""

    op: str
    variant: str
    rows: int
    hidden: int
    vocab: int
    dtype: torch.dtype
    sides: Callable[[], list[Side]]
    gemms: float | None = None
    bytes_per_row: int | None = None

    @property
    def shape(self) -> str:
        return f"T{self.rows}-H{self.hidden}-V{self.vocab}" if self.vocab else f"N{self.rows}"

    @property
    def name(self) -> str:
        return f"{self.op}/{self.variant}/{self.shape}"

    def work(self, side: Side | None = None) -> float:
        """The floor: FLOP, or bytes read and written once."""
        if self.bytes_per_row is not None:
            return self.bytes_per_row * self.rows
        gemms = self.gemms if side is None or side.gemms is None else side.gemms
        return gemms * 2 * self.rows * self.hidden * self.vocab


@dataclass
class Run:
    """What the cases of one run share: its settings, the deadline, the inputs of the last case and the results so far."""

    cases: list[Case]
    wanted: re.Pattern[str] = field(default_factory=lambda: re.compile(""))
    rounds: tuple[int, int] = (5, 30)
    seconds: float = 3.0
    deadline: float = float("inf")
    compile: Callable[[Case], str | None] = lambda case: None  # why torch.compile is left out of a case
    after: Callable[[dict[str, Any]], None] = lambda result: None
    results: list[dict[str, Any]] = field(default_factory=list)
    _inputs: tuple[Any, Any] | None = None
    _cache: Cache | None = None

    @property
    def cache(self) -> Cache:
        self._cache = self._cache or Cache()
        return self._cache

    def inputs(self, case: Case) -> Head | Rewards:
        """Made once for consecutive cases of one shape."""
        key = (case.rows, case.hidden, case.vocab, case.dtype)
        if self._inputs is None or self._inputs[0] != key:
            self._inputs = None
            release()
            made = Head(case.rows, case.hidden, case.vocab, case.dtype) if case.vocab else Rewards(case.rows)
            self._inputs = (key, made)
        return self._inputs[1]

    def forget(self) -> None:
        """Drops what the last case alone needed of its inputs."""
        for name in ("logits", "reference_model"):
            if self._inputs:
                self._inputs[1].__dict__.pop(name, None)

    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def pytest_generate_tests(self, metafunc: Any) -> None:
        metafunc.parametrize(("case", "run"), [(case, self) for case in self.cases], ids=[case.name for case in self.cases])

    def pytest_report_teststatus(self, report: Any) -> tuple[str, str, str] | None:
        return ("passed", "", "") if report.passed else None  # the table is the progress


@dataclass
class Ready:
    """A side that gave the right answer."""

    side: Side
    call: Callable[[], Any]
    restore: Callable[[], object]
    estimate: float
    row: dict[str, Any]


def test_case(benchmark: Any, case: Case, run: Run) -> None:
    """Checks and times every side of one case; what is not timed is listed with the reason."""
    began = time.monotonic()
    result = {
        "case": case.name,
        "op": case.op,
        "variant": case.variant,
        "T": case.rows,
        "H": case.hidden,
        "V": case.vocab,
        "dtype": str(case.dtype).removeprefix("torch."),
        "unit": "TFLOP/s" if case.bytes_per_row is None else "GB/s",
        "floor": case.work(),
        "sides": [],
    }
    ready = _ready(case, run, result["sides"])
    if ready:
        try:
            _time(benchmark, case, run, ready, result)
        except torch.OutOfMemoryError:  # each fits alone
            for one in ready:
                one.row["status"] = "not timed: out of memory beside the other sides"
    else:
        benchmark.skipped = True
    result["gpu_after"] = gpu_state()
    result["seconds"] = round(time.monotonic() - began, 2)
    run.results.append(result)
    ready.clear()
    run.forget()
    if any(side["side"] == "torch.compile" and side["status"] == "measured" for side in result["sides"]):
        torch.compiler.reset()
    release()
    run.after(result)


def _ready(case: Case, run: Run, rows: list[dict[str, Any]]) -> list[Ready]:
    """Prepares, checks and measures the memory of every side that can run; writes down why one cannot."""
    ready, right = [], {}
    for side in (side for side in case.sides() if run.wanted.search(side.name)):
        row: dict[str, Any] = {"side": side.name, "status": "measured"}
        rows.append(row)
        reason = side.unavailable() or (OUT_OF_TIME if run.late() else None) or (run.compile(case) if side.compiled else None)
        if reason:
            row["status"] = reason
            continue
        try:
            inputs = run.inputs(case)
            if side.expect not in right:
                right[side.expect] = side.expect(inputs)
            prepared = side.prepare(inputs)
            call, restore = prepared if isinstance(prepared, tuple) else (prepared, lambda: None)
            outputs = call()
            row["error"] = check({k: v() if callable(v) else v for k, v in outputs.items()}, right[side.expect])
            del outputs
            restore()
            row["peak_mib"] = round(peak_mib(call), 1)
            restore()
            ready.append(Ready(side, call, restore, seconds_of(call), row))
            restore()
        except torch.OutOfMemoryError:
            row["status"] = "out of memory"
        except Wrong as wrong:
            row["status"] = f"wrong: {wrong}"
        except Exception as error:  # a peer may fail in any way; the reason is listed, and ours fails the run
            row["status"] = f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]
        if row["status"] != "measured":
            row.pop("peak_mib", None)
            outputs = call = prepared = None  # noqa: F841
            release()
    return ready


def _time(benchmark: Any, case: Case, run: Run, ready: list[Ready], result: dict[str, Any]) -> None:
    inputs = run.inputs(case)
    ceiling = gemm(inputs.hidden, inputs.weight) if case.bytes_per_row is None else run.cache.copy
    ceiling()
    ceiling_work = 2.0 * case.rows * case.hidden * case.vocab if case.bytes_per_row is None else 2.0 * run.cache.source.nbytes
    turns = [(ceiling, lambda: None), *((one.call, one.restore) for one in ready)]
    each = seconds_of(ceiling) + sum(one.estimate for one in ready)
    rounds = max(run.rounds[0], min(run.rounds[1], int(run.seconds / each)))
    order = itertools.cycle(turns)

    def setup() -> tuple[tuple[Callable[[], object]], dict[str, Any]]:
        call, restore = next(order)
        restore()
        run.cache.flush()
        return (call,), {}

    benchmark.pedantic(_call, setup=setup, rounds=rounds * len(turns), warmup_rounds=len(turns))
    for one in ready:  # leaves no accumulated buffer behind
        one.restore()
    durations = benchmark.stats.stats.data
    by_turn = [durations[i :: len(turns)] for i in range(len(turns))]
    scale = 1e12 if case.bytes_per_row is None else 1e9
    best = ceiling_work / min(by_turn[0])
    result["ceiling"] = {"ms": _milliseconds(by_turn[0]), "rate": _digits(best / scale)}
    for one, took in zip(ready, by_turn[1:], strict=True):
        rate = case.work(one.side) / statistics.median(took)
        one.row |= {"ms": _milliseconds(took), "rate": _digits(rate / scale), "share": _digits(rate / best)}
        if one.side.gemms is not None:
            one.row["floor"] = case.work(one.side)


def _call(call: Callable[[], object]) -> None:
    call()


def _milliseconds(seconds: list[float]) -> dict[str, float]:
    return {"median": _digits(1e3 * statistics.median(seconds)), "min": _digits(1e3 * min(seconds)), "rounds": len(seconds)}


def _digits(value: float) -> float:
    return float(f"{value:.5g}")

"""Where the time of a step goes, found without waiting for the device.

    with phases("update"):          # ranges may nest (the inner one's time is its own) and come back (they add up)
        ...
    phases.add("update", tokens=..., flops=...)
    float(loss)                     # the step's wait for the device
    figures = phases.metrics()

On a CPU a phase has the seconds of the host's clock. On CUDA a phase often only enqueues work, and the device gets to it later, so an event
is recorded wherever a phase begins or ends, and a phase has the seconds between its events: the time from when the device was done with all
that came before until it is done with the phase. Where the host waits inside a phase (sampling, scoring) that is the host's time as well;
host work that the device hides costs its phase nothing. Nothing is counted twice: the phases and `seconds/other`, what is in no phase,
add up to the step's seconds.

With several ranks the seconds are rank 0's, waiting for the others included; tokens and FLOPs are means over ranks, so tokens_per_s, tflops
and mfu are per device; peak memory is the largest.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from statistics import median
from typing import TypedDict

import torch

from actial_fast.ops.ranges import named
from actial_fast.train.dist import World
from actial_fast.train.shortage import told

# In the order of a step. data: rows, as far as the step waits for them; sync: weights to the sampler; plan: how passes are cut and shared
# out; old, reference: passes without gradients for log-probs; update: forward, backward and optimizer; log: what is written down.
PHASES = ("data", "sync", "sample", "score", "plan", "old", "reference", "update", "log", "save", "eval")
Timer = Callable[[str], contextlib.AbstractContextManager[None]]


def untimed(name: str) -> contextlib.AbstractContextManager[None]:
    """The phase of a caller that keeps no time."""
    return contextlib.nullcontext()


class Phases:
    """The clock of a loop. ceiling: TFLOP/s that the device reaches (see `measured_rate`), or 0 to have no MFU; keys: what a phase that
    runs out of memory tells to change (see `shortage.keys_of`).

    Keeps one window, from the last call of `metrics` (or from being made) to the next.
    """

    def __init__(self, where: World, ceiling: float = 0.0, keys: Mapping[str, str] | None = None):
        self._keys = keys or {}
        self._where, self._ceiling, self._cuda = where, ceiling, where.device.type == "cuda"
        self._inside: list[str] = []
        self._spare: list[torch.cuda.Event] = []
        self._restart(time.perf_counter())

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """The time of a with block is this phase's, one of PHASES."""
        assert name in PHASES, f"{name} is not a phase of {PHASES}"
        self._inside.append(name)
        self._mark()
        try:
            with named(f"phase {name}"), told(name, self._keys):
                yield
        finally:
            self._inside.pop()
            self._mark()

    def add(self, name: str, *, tokens: float = 0, flops: float = 0) -> None:
        """What this rank did in a phase: tokens, and the FLOPs they need."""
        assert name in PHASES, f"{name} is not a phase of {PHASES}"
        self._tokens[name] = self._tokens.get(name, 0.0) + tokens
        self._flops[name] = self._flops.get(name, 0.0) + flops

    @property
    def used(self) -> bool:
        """Whether the window has a checkpoint or an evaluation."""
        return any(name in ("save", "eval") for _, _, name in self._marks)

    def metrics(self) -> dict[str, float]:
        """The window's figures, and a new window. To be called where the host has just waited for the device; every rank calls.

        seconds: of the whole window; seconds/NAME, seconds/other; tokens_per_s/NAME; tflops/NAME and mfu/NAME of what had FLOPs, tflops and
        mfu of all of it over the whole window; peak_gib: most memory that was allocated on the device within the window, or, on a CPU,
        held by the process since it began.
        """
        assert not self._inside, f"inside phase {self._inside}"
        seconds = self._seconds()
        now = time.perf_counter()
        wall = now - self._began
        tokens, flops, peak = self._over_ranks()
        busy = sum(seconds.values())
        out = {"seconds": wall, **{f"seconds/{n}": s for n, s in seconds.items()}, "seconds/other": max(0.0, wall - busy)}
        out |= {f"tokens_per_s/{n}": count / seconds[n] for n, count in tokens.items() if seconds.get(n)}
        speeds = {f"/{n}": count / seconds[n] / 1e12 for n, count in flops.items() if seconds.get(n)}
        if flops and wall:
            speeds[""] = sum(flops.values()) / wall / 1e12
        out |= {f"tflops{n}": speed for n, speed in speeds.items()}
        if self._ceiling:
            out |= {f"mfu{n}": speed / self._ceiling for n, speed in speeds.items()}
        self._restart(now)
        return {**out, "peak_gib": peak}

    def _mark(self) -> None:
        """From here on the time is that of the innermost phase."""
        event = None
        if self._cuda:
            event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
            event.record()
        self._marks.append((time.perf_counter(), event, self._inside[-1] if self._inside else ""))

    def _restart(self, now: float) -> None:
        self._began = now
        self._marks: list[tuple[float, torch.cuda.Event | None, str]] = []
        self._tokens: dict[str, float] = {}
        self._flops: dict[str, float] = {}
        if self._cuda and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats(self._where.device)

    def _seconds(self) -> dict[str, float]:
        """Of each phase, in the order of PHASES."""
        if self._marks and (last := self._marks[-1][1]) is not None:
            last.synchronize()  # done already where the host has waited for the device
        total: dict[str, float] = {}
        for (before, start, name), (after, end, _) in pairwise(self._marks):
            if name:
                spent = after - before if start is None or end is None else start.elapsed_time(end) / 1e3
                total[name] = total.get(name, 0.0) + spent
        self._spare += [event for _, event, _ in self._marks if event is not None]
        return {name: total[name] for name in PHASES if name in total}

    def _over_ranks(self) -> tuple[dict[str, float], dict[str, float], float]:
        """Means of tokens and FLOPs by phase, those that there are, and the largest peak in GiB, in one message."""
        peaks = [0.0] * self._where.size
        peaks[self._where.rank] = self._peak()
        mine = [each.get(name, 0.0) for each in (self._tokens, self._flops) for name in PHASES]
        totals = self._where.total([*mine, *peaks])
        means = [total / self._where.size for total in totals[: len(mine)]]
        tokens, flops = (dict(zip(PHASES, part, strict=True)) for part in (means[: len(PHASES)], means[len(PHASES) :]))
        return {n: x for n, x in tokens.items() if x}, {n: x for n, x in flops.items() if x}, max(totals[len(mine) :])

    def _peak(self) -> float:
        if self._cuda:
            return torch.cuda.max_memory_allocated(self._where.device) / 2**30
        unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Rate(TypedDict):
    """A measured speed, and in words what was measured."""

    tflops: float
    what: str


def measured_rate(device: torch.device) -> Rate:
    """What MFU is a share of: the median speed of products (n, n) x (n, n) on this device, in the dtype that the model computes in (bf16 on
    CUDA, float32 on a CPU). Takes about 0.1 s on a GPU and at most about 0.05 s on a CPU."""
    cuda = device.type == "cuda"
    n, dtype, limit = (8192, torch.bfloat16, 0.1) if cuda else (384, torch.float32, 0.03)
    numbers = torch.Generator(device).manual_seed(0)  # of its own: a resumed run draws what the interrupted one would have
    a, b = (torch.randn(n, n, device=device, dtype=dtype, generator=numbers) for _ in range(2))
    out = torch.mm(a, b)

    def seconds() -> float:
        if cuda:
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        torch.mm(a, b, out=out)
        if cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    seconds()
    taken: list[float] = []
    while sum(taken) < limit and len(taken) < 50:
        taken.append(seconds())
    what = f"median of {len(taken)} torch.mm, {str(dtype).removeprefix('torch.')}, ({n}, {n}) x ({n}, {n})"
    return {"tflops": 2 * n**3 / median(taken) / 1e12, "what": what}

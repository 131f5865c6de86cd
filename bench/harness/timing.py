"""What a measurement stands on: the clock, a cold cache, the ceilings of the chip at hand, peak memory, and what machine it was.

The clock reads the GPU's own time: a tick is an event in the stream, and the difference of two waits for the later one. The cache is
flushed before every round by writing a buffer larger than it, and the round is enqueued while that write still runs, so that up to about
0.3 ms of the host's work is hidden, as in a training step. Without a GPU a tick is the wall clock.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
COPY_BYTES = 1 << 30 if CUDA else 1 << 26  # far beyond the cache, which is 50 MB on an H100
PACKAGES = ("trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "nvidia-cutlass-dsl", "transformers", "pytest-benchmark")


class Tick:
    """A moment of the clock; `later - earlier` is in seconds and waits for the GPU to reach the later one."""

    def __init__(self):
        if CUDA:
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record()
        else:
            self.seconds = time.perf_counter()

    def __sub__(self, earlier: Tick) -> float:
        if not CUDA:
            return self.seconds - earlier.seconds
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) * 1e-3


def clock() -> Tick:
    """The timer that pytest-benchmark is given (--benchmark-timer)."""
    return Tick()


def seconds_of(call: Callable[[], object]) -> float:
    """How long one call takes, without a flush."""
    start = clock()
    call()
    return clock() - start


class Cache:
    """The buffer that pushes everything else out of the cache, and that a copy is timed on."""

    def __init__(self):
        self.source, self.target = (torch.zeros(COPY_BYTES // 4, device=DEVICE) for _ in range(2))

    def flush(self) -> None:
        self.source.zero_()

    def copy(self) -> None:
        self.target.copy_(self.source)


def peak_mib(call: Callable[[], object]) -> float:
    """MiB that a call holds at its worst above what was there before and what it returns.

    On a GPU from the allocator's counters; on a CPU from the profiler's record of every allocation.
    """
    if CUDA:
        release()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        del result
        return peak / 2**20
    call()  # what is allocated once and kept belongs to no call
    with _quiet(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    del result
    return (peak - held) / 2**20


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The profiler's library writes to the process's standard error."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def release() -> None:
    """Frees what Python no longer holds and hands the allocator's unused blocks back."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def gemm(hidden: Tensor, weight: Tensor) -> Callable[[], object]:
    """The product that the head's ceiling is measured on: hidden (T, H) @ weight.T (H, V), into a buffer that is there."""
    out = torch.empty(hidden.shape[0], weight.shape[0], dtype=hidden.dtype, device=hidden.device)
    hidden, weight = hidden.detach(), weight.detach()
    return lambda: torch.mm(hidden, weight.T, out=out)


def gpu_state() -> dict[str, float] | None:
    """SM clock in MHz, power in W and temperature in degrees Celsius, by nvidia-smi; None where there is none."""
    if not CUDA or not shutil.which("nvidia-smi"):
        return None
    names = ("clocks.sm", "power.draw", "temperature.gpu")
    command = [
        "nvidia-smi",
        f"--id=GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}",
        f"--query-gpu={','.join(names)}",
        "--format=csv,noheader,nounits",
    ]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split(",")
    numbers = [float(x) if re.fullmatch(r"\s*[\d.]+\s*", x) else None for x in told]
    return dict(zip(("sm_mhz", "power_w", "celsius"), numbers, strict=True)) if len(numbers) == 3 else None


def slug() -> str:
    """The folder of this machine's results: nvidia-h100-80gb-hbm3, or cpu-2core."""
    if not CUDA:
        return f"cpu-{len(os.sched_getaffinity(0))}core"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def machine() -> dict[str, Any]:
    """Chip, versions, date and commit, as they are written into every result file."""
    cpuinfo = Path("/proc/cpuinfo")
    models = (
        [x.split(":", 1)[1].strip() for x in cpuinfo.read_text().splitlines() if x.startswith("model name")] if cpuinfo.exists() else []
    )
    properties = torch.cuda.get_device_properties(0) if CUDA else None
    return {
        "slug": slug(),
        "gpu": properties.name if properties else None,
        "gpu_memory_mib": properties.total_memory >> 20 if properties else None,
        "sm_count": properties.multi_processor_count if properties else None,
        "capability": list(torch.cuda.get_device_capability()) if CUDA else None,
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "load_before": [round(x, 2) for x in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "packages": {name: _version(name) for name in PACKAGES},
        "date": today(),
        "commit": commit(),
    }


def today() -> str:
    """The date in UTC."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def commit() -> str:
    """ACTIAL_COMMIT if set (a copy without its history), else the short hash, with +changes where tracked files differ, or "unknown"."""
    if os.environ.get("ACTIAL_COMMIT"):
        return os.environ["ACTIAL_COMMIT"]
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        hashed = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return "unknown"
    return hashed + ("+changes" if changed else "") if hashed else "unknown"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

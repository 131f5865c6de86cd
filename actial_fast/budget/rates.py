"""How fast a GPU is: as `python -m bench.step.costs --rates` measured it there, or by its datasheet and called so."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from actial_fast.budget.gpus import Machine
from actial_fast.data.sources import cache

SHARES = 0.3, 0.6  # assumed: of a datasheet's tflops that training reaches
READS = 0.35, 0.75  # assumed: of its bandwidth that decoding reaches
FIELDS = ("gpu", "update_tflops", "copy_tb_s", "date", "command")


@dataclass(frozen=True)
class Rates:
    """Slow and fast: tflops, of the least FLOPs of an update; bandwidth, of memory, bytes a second. link: bytes a second between ranks;
    about: where they are from."""

    tflops: tuple[float, float]
    bandwidth: tuple[float, float]
    link: float
    about: str


def folder() -> Path:
    """Where measured rates lie: a file for each GPU."""
    return cache.folder() / "rates"


def file_of(gpu: str) -> Path:
    """The file of a GPU by the name that its driver gives."""
    return folder() / f"{'-'.join(gpu.split()).replace('/', '-')}.json"


def write(gpu: str, *, update_tflops: tuple[float, float], copy_tb_s: float, date: str, command: str) -> Path:
    """Keep what was measured on a GPU: the slowest and fastest of an update's passes, and copies within its memory."""
    path = file_of(gpu)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(zip(FIELDS, (gpu, list(update_tflops), copy_tb_s, date, command), strict=True)), indent=1) + "\n")
    return path


def rates_of(machine: Machine, file: str = "") -> Rates | None:
    """The rates of a machine's GPUs: those of `file`, of a file that was measured on them, or of their datasheet; None where nothing is
    known. ValueError for a file that has none."""
    path = Path(file) if file else _measured(machine)
    if path is None:
        return _of_sheet(machine)
    try:
        said = json.loads(path.read_text())
        slow, fast = map(float, said["update_tflops"])
        copied = float(said["copy_tb_s"]) * 1e12
        about = f"measured on {said['gpu']}, {said['date']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--rates: {path} is no file of `python -m bench.step.costs --rates` ({type(error).__name__}: {error})") from None
    if not 0 < slow <= fast < math.inf or not 0 < copied < math.inf:
        raise ValueError(f"--rates: {path} has rates that no GPU has, {slow:g} to {fast:g} TFLOP/s and {copied:g} bytes a second")
    return Rates((slow * 1e12, fast * 1e12), (0.5 * copied, copied), _link(machine), about)


def _measured(machine: Machine) -> Path | None:
    """A file of a GPU whose name has this machine's."""
    if machine.sheet is None or machine.guessed or not folder().is_dir():
        return None
    fitting = (path for path in sorted(folder().glob("*.json")) for word in machine.sheet.shown if "-".join(word.split()) in path.stem)
    return next(fitting, None)


def _of_sheet(machine: Machine) -> Rates | None:
    sheet = machine.sheet
    if sheet is None:
        return None
    by = f"by the datasheet of the {sheet.name}{', a GPU of this size' if machine.guessed else ''}"
    assumed = (
        f"{SHARES[0]:.0%} to {SHARES[1]:.0%} of {sheet.tflops:g} TFLOP/s, {READS[0]:.0%} to {READS[1]:.0%} of {sheet.bandwidth:g} TB/s"
    )
    about = f"not measured on this GPU: {by}, {assumed} assumed"
    tflops, bandwidth = sheet.tflops * 1e12, sheet.bandwidth * 1e12
    return Rates((SHARES[0] * tflops, SHARES[1] * tflops), (READS[0] * bandwidth, READS[1] * bandwidth), _link(machine), about)


def _link(machine: Machine) -> float:
    return (machine.sheet.link if machine.sheet else 32.0) * 1e9

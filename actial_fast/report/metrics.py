"""What a run writes down while it runs: metrics.jsonl, events.jsonl, TensorBoard (W&B when named), and one line of progress.

The two JSONL files are the record; report.py and everything else reads those. One line of RUN/metrics.jsonl:
    {"stage": "sft", "step": 12, "time": 1700000000.123, "loss": 1.2, ...}               time: Unix seconds; a NaN or infinity is null
    {"stage": "sft", "step": 12, "time": ..., "eval/own/val/loss": 1.3, "eval/own/val/perplexity": 3.7, ...}   losses of held-out rows
and of RUN/events.jsonl:
    {"kind": "eval", "stage": "sft", "step": 12, "time": ..., "name": "test", "result": {... of statistics.accuracy_table}}
    {"kind": "rollouts", "stage": "grpo", "step": 1, "time": ..., "rollouts": [{"images", "prompt", "response", "reward", "truth", "kind"}]}
    {"kind": "phases", "stage": "grpo", "step": 10, "time": ..., "phases": {"seconds/save": 9.5, "seconds/eval": 61.0, ...}}
    {"kind": "rate", "stage": "grpo", "step": 0, "time": ..., "rate": {"tflops": 702.0, "what": "median of ..."}}
A step's line has the figures of train.phases up to its end; its checkpoint and evaluation, which come when the line is safe, have the
event.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TextIO

import yaml

from actial_fast.data.sources.files import writing

METRICS_FILE, EVENTS_FILE = "metrics.jsonl", "events.jsonl"
LOSSES = "eval/"  # how the names of held-out losses begin
TELLING = (
    "loss",
    "reward",
    "reward/format",
    "reward/accuracy",
    "response_length",
    "kl",
    "grad_norm",
    "tokens_per_s",
)  # shown, in this order
SHOWN = 6
PLAIN_SECONDS = 60.0  # without a terminal a line is due at least this often, so that a log never looks dead


class MetricLog:
    """The record of one stage of a run. Use as a context manager: leaving it flushes TensorBoard and ends the progress line.

    run_dir: created when missing. stage: "base", "sft", "grpo", ... total: steps this stage will reach. tensorboard: also write scalars
    `stage/name` to RUN/tensorboard/STAGE. wandb: a W&B project, "" for none. resume_step: the step of the checkpoint this process continues
    from; lines of this stage beyond it (all of them when 0) come from the process that died and are dropped, so no step is there twice.
    enabled: False on every rank but 0, where all methods do nothing.
    Raises ValueError when TensorBoard or W&B is asked for and not installed, or when a file holds something that is not a record.
    """

    def __init__(
        self, run_dir: Path, *, stage: str, total: int, tensorboard: bool, wandb: str = "", resume_step: int = 0, enabled: bool = True
    ):
        self.enabled, self.stage, self.total, self._step = enabled, stage, total, resume_step
        if not enabled:
            return
        self._run_dir = run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        self._tensorboard = _summary_writer(run_dir / "tensorboard" / stage, resume_step) if tensorboard else None
        self._wandb = _wandb_run(wandb, run_dir, stage, resume_step) if wandb else None
        for name in (METRICS_FILE, EVENTS_FILE):
            _drop_after(run_dir / name, stage, resume_step)
        self._metrics = open(run_dir / METRICS_FILE, "a", encoding="utf-8", buffering=1)
        self._events = open(run_dir / EVENTS_FILE, "a", encoding="utf-8", buffering=1)
        self._progress = _Progress(stage, total, resume_step)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one step (1-based: the step just finished). Values: anything float() takes."""
        if not self.enabled:
            return
        self._step = step
        values = {name: float(value) for name, value in metrics.items()}
        _put(self._metrics, _line({"stage": self.stage, "step": step, "time": round(time.time(), 3), **values}))
        self._scalars(step, values)
        self._progress.step(step, values)

    def event(self, kind: str, payload: Any, step: int | None = None) -> None:
        """Record what happened at `step` (the last one recorded when None).

        kind "eval": payload `{name: result of accuracy_table}`, one line a name, shown in the terminal as well. kind "rollouts": payload is
        a list of `{"images": [path relative to RUN, or data URI], "prompt", "response", "reward", "truth", "kind"}`. kind "phases": payload
        `{name: number}`, which TensorBoard has as well. Any other kind: any JSON value, stored under the kind's name.
        """
        if not self.enabled:
            return
        step = self._step if step is None else step
        head = {"kind": kind, "stage": self.stage, "step": step, "time": round(time.time(), 3)}
        if kind != "eval":
            _put(self._events, _line({**head, kind: payload}))
            if kind == "phases":
                self._scalars(step, {f"after/{name}": float(value) for name, value in payload.items()})
            return
        for name, result in payload.items():
            _put(self._events, _line({**head, "name": name, "result": result}))
            groups = {**result["kinds"], "overall": result["overall"]}
            keys = ["accuracy", "format_rate", "well_formed_and_correct", "mean_response_length"]
            keys += ["score"] if result["overall"].get("partial") else []
            self._scalars(step, {f"eval/{name}/{group}/{key}": figures[key] for group, figures in groups.items() for key in keys})
            parts = ", ".join(f"{group} {100 * figures['accuracy']:.1f}%" for group, figures in groups.items())
            right = 100 * result["overall"]["well_formed_and_correct"]
            marks = f"; score {100 * result['overall']['score']:.1f}%" if result["overall"].get("partial") else ""
            self._progress.say(f"{self.stage} step {step}: {name} accuracy {parts}{marks}; well-formed and correct {right:.1f}%")

    def losses(self, step: int, found: Mapping[str, tuple[float, float, int, int]]) -> None:
        """Record losses that were measured behind `step`: name -> (mean, perplexity, answer tokens, rows), a line of their own in
        metrics.jsonl, shown in the terminal as well."""
        if not self.enabled or not found:
            return
        keys = ("loss", "perplexity", "answer_tokens", "rows")
        values = {f"{LOSSES}{name}/{key}": float(v) for name, each in found.items() for key, v in zip(keys, each, strict=True)}
        _put(self._metrics, _line({"stage": self.stage, "step": step, "time": round(time.time(), 3), **values}))
        self._scalars(step, values)
        for name, (mean, perplexity, tokens, rows) in found.items():
            told = f"loss {mean:.4f}, perplexity {perplexity:,.4g} ({tokens:,} answer tokens of {rows:,} rows)"
            self._progress.say(f"{self.stage} step {step}: {name} {told}")

    def measured(self, step: int) -> bool:
        """Whether losses that were measured behind `step` of this stage were recorded before; False on ranks that do not write."""
        metrics = read_metrics(self._run_dir) if self.enabled else []
        return any(m["stage"] == self.stage and m["step"] == step and any(key.startswith(LOSSES) for key in m) for m in metrics)

    def evaluated(self, step: int) -> dict[str, Any]:
        """The results of an evaluation at `step` of this stage that was recorded before, by name; nothing on ranks that do not write."""
        events = read_events(self._run_dir) if self.enabled else []
        return {e["name"]: e["result"] for e in events if (e["kind"], e["stage"], e["step"]) == ("eval", self.stage, step)}

    def opening(self, lines: Iterable[str]) -> None:
        """The first lines in the terminal, with the stage's name; not where only results are wanted."""
        if self.enabled and not self._progress.quiet:
            for line in lines:
                self._progress.say(f"{self.stage}: {line}")

    def say(self, text: str) -> None:
        """A line in the terminal, beside the progress."""
        if self.enabled:
            self._progress.say(text)

    def close(self) -> None:
        """Flush and end everything; harmless when called twice."""
        if not self.enabled or self._metrics.closed:
            return
        self._progress.close()
        for file in (self._metrics, self._events):
            with writing(Path(file.name)):
                file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        tagged = {f"{self.stage}/{name}": value for name, value in values.items()}
        if self._tensorboard is not None:
            for tag, value in tagged.items():
                self._tensorboard.add_scalar(tag, value, step)
        if self._wandb is not None:
            self._wandb.log({**tagged, f"{self.stage}/step": step})


def _put(file: TextIO, line: str) -> None:
    with writing(Path(file.name)):
        file.write(line)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of RUN/metrics.jsonl in order, null as NaN; empty when there is no file. A last line torn by a kill is left out; ValueError
    for any other line that is not a record."""
    records = _read(run_dir / METRICS_FILE)
    return [{key: math.nan if value is None else value for key, value in record.items()} for record in records]


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of RUN/events.jsonl in order, like read_metrics. Of two events of one kind, stage, step and name the later one holds: a run
    killed between an evaluation and the next checkpoint evaluates again."""
    return list({(e["kind"], e["stage"], e["step"], _name(e)): e for e in _read(run_dir / EVENTS_FILE)}.values())


def _name(event: Mapping[str, Any]) -> Any:
    """What an event is about, where several of its kind may belong to one step."""
    inside = event.get(event["kind"])
    return event.get("name", inside.get("name") if isinstance(inside, Mapping) else None)


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """`value` with null for what JSON has no word for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return value


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    # Bytes: a kill can tear a line in the middle of a character.
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            record = json.loads(line)
            record["stage"], record["step"]  # what every reader relies on
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):  # no newline after it: torn
                continue
            raise ValueError(f"{path}:{number}: not a record ({error!r}); delete that line to go on") from None
        records.append(record)
    return records


def _drop_after(path: Path, stage: str, step: int) -> None:
    """Remove a torn last line and the lines of `stage` beyond `step` (all of them when 0); atomic, and no write when nothing changes."""
    records = _read(path)
    text = "".join(_line(r) for r in records if r["stage"] != stage or (step > 0 and r["step"] <= step)).encode()
    if path.exists() and path.read_bytes() != text:
        temporary = path.with_name(path.name + ".tmp")
        with open(temporary, "wb") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)


def _summary_writer(folder: Path, resume_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            f"tensorboard is on but cannot be imported ({error}); `pip install tensorboard`, or set tensorboard=false"
        ) from error
    # purge_step hides what a killed process wrote beyond the checkpoint. It purges every tag of its folder, hence one folder a stage.
    return SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else 0, flush_secs=10)


def _wandb_run(project: str, run_dir: Path, stage: str, resume_step: int) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ValueError(f"wandb={project!r} names a W&B project but wandb cannot be imported ({error}); `pip install wandb`") from error
    recipe = run_dir / stage / "recipe.yaml"
    # The same folder and stage are the same W&B run: resumed after a kill, overwritten when started over.
    identity = hashlib.sha256(f"{run_dir.resolve()}/{stage}".encode()).hexdigest()[:16]
    run = wandb.init(
        project=project,
        name=f"{run_dir.name}/{stage}",
        group=run_dir.name,
        id=identity,
        resume="allow" if resume_step else None,
        dir=str(run_dir),
        config=yaml.safe_load(recipe.read_text(encoding="utf-8")) if recipe.is_file() else None,
    )
    # An axis of ours: W&B's own step never goes back, and after a kill ours does.
    run.define_metric(f"{stage}/step")
    run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
    return run


class _Progress:
    """The progress line: live in a terminal, else a plain line for about every twentieth step."""

    def __init__(self, stage: str, total: int, start: int):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.stage, self.total, self.every = stage, total, max(1, total // 20)
        self.recent = deque([(start, time.monotonic())], maxlen=50)  # for the ETA: the last 50 steps, whatever a step takes
        self.last_line, self.live = time.monotonic(), None
        self.say: Callable[[str], None] = _print
        console = Console()
        self.quiet = bool(os.environ.get("ACTIAL_QUIET"))
        if console.is_terminal and not self.quiet:
            columns = (
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self.live = Progress(*columns, console=console, refresh_per_second=2)
            self.task = self.live.add_task(stage, total=total, completed=start, note="")
            self.live.start()
            self.say = lambda text: console.print(text, markup=False, highlight=False)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        now = time.monotonic()
        self.recent.append((step, now))
        first, began = self.recent[0]
        eta = _clock((now - began) / max(1, step - first) * max(0, self.total - step))
        shown = [name for name in TELLING if name in values][:SHOWN] or list(values)[:SHOWN]
        note = "  ".join(f"{name} {values[name]:,.4g}" for name in shown)
        if self.live is not None:
            self.live.update(self.task, completed=step, note=f"ETA {eta}  {note}")
        elif self.quiet:
            pass
        elif step % self.every == 0 or step in (1, self.total) or now - self.last_line > PLAIN_SECONDS:
            self.last_line = now
            self.say(f"{self.stage} {step}/{self.total}  ETA {eta}  {note}")

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()


def _print(text: str) -> None:
    print(text, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

"""Held-out evaluation: reply to every row, compare with the truth, and put the accuracy beside chance and the majority answer."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from actial_fast.data.sources.answers import is_right
from actial_fast.data.sources.row import Row
from actial_fast.data.sources.source import SourceConfig
from actial_fast.data.sources.stream import Example, Pass
from actial_fast.data.sources.task import score_of, task_of
from actial_fast.evaluation.losses import losses
from actial_fast.evaluation.statistics import Record, accuracy_table
from actial_fast.model.policy import Policy
from actial_fast.model.processor import Processor
from actial_fast.report.metrics import MetricLog
from actial_fast.report.paired import KEY
from actial_fast.rollout.engines import open_checkpoint
from actial_fast.rollout.episodes import play, text_of
from actial_fast.rollout.protocol import Draw, Engine, Reader, Reply, Watch, awake
from actial_fast.settings.recipe import EvalConfig, GRPORecipe, RolloutConfig, SFTRecipe
from actial_fast.train.dist import Agreed, World, world
from actial_fast.train.phases import Phases
from actial_fast.train.shortage import ran_out
from actial_fast.train.stopping import NEVER, Stop


def evaluate(
    engine: Engine, processor: Reader, config: EvalConfig, where: World, *, seed: int = 0, on_bad_row: str = "error"
) -> dict[str, dict[str, Any]]:
    """The accuracy table of each source, by its folder's and file's name; every rank calls and gets the same result.

    A reply is scored by the metric of the row's task, and right with full marks; without a task by answers.is_right, and with config.strict
    when the text in its <answer> tags, or the whole reply where it has none, equals the truth. on_bad_row: as data.on_bad_row. Raises
    ValueError, the same on every rank, for the first source that could not be evaluated.
    """
    tables, failures = attempt(engine, processor, config, where, seed=seed, on_bad_row=on_bad_row)
    for name, cause in failures.items():
        raise Agreed(f"evaluation of {name}: {cause}")
    return tables


def attempt(
    engine: Engine,
    processor: Reader,
    config: EvalConfig,
    where: World,
    *,
    seed: int = 0,
    on_bad_row: str = "error",
    version: int = 0,
    stop: Stop = NEVER,
    halved: Counter[str] | None = None,
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """`evaluate` that goes on: the tables of the sources that could be evaluated, and why the others could not, the same on every rank.
    halved: gets the times that memory ran short over a source and the rest was drawn with half of it, over all ranks.

    The engine wakes, with the weights of step `version`, once for all sources, and once more after one that fails. A rank that fails, for a
    row or for want of memory, still meets the others where they wait for its records. Raises GivenUp on every rank once `stop` is asked.
    """
    tables, failures = {}, {}
    left = named(config.sources, config.temperature)
    while left:
        with awake(engine, version):
            broken = False
            while left and not broken:
                name, source = left.pop(0)
                short: list[str] = []
                records, cause = _records(engine, processor, config, source, where, seed, on_bad_row, stop, short)
                stop.leave()
                told = where.gather([(cause, len(short))])
                causes = [c for c, _ in told if c]
                if halved is not None:
                    halved[name] += sum(times for _, times in told)
                records = where.gather(records)
                broken = bool(causes)
                if causes or not records:
                    failures[name] = causes[0] if causes else f"{source.path}: no row has a truth to compare with, or a task that scores it"
                else:
                    tables[name] = accuracy_table(records)
        if broken:
            engine.recover()
    return tables, failures


def held_out(
    engine: Engine,
    policy: Policy,
    processor: Processor,
    recipe: SFTRecipe | GRPORecipe,
    where: World,
    log: MetricLog,
    step: int,
    stop: Stop,
    phases: Phases,
) -> dict[str, dict[str, Any]] | None:
    """The evaluation that belongs behind `step`, logged: losses of eval.loss_sources, then the tables of eval.sources, which are returned;
    None where none is due. What the log has already, in a run that goes on, is not measured again.

    A source that fails is logged with its cause and left out, unless eval.fatal: then ValueError.
    """
    config = recipe.eval
    last, first = step == log.total, step == 0 and (config.before or isinstance(recipe, GRPORecipe))
    if not (last or first or (step > 0 and config.every > 0 and step % config.every == 0)):
        return None
    failures: dict[str, str] = {}
    if config.loss_sources and not where.gather([log.measured(step)])[0]:
        with phases("eval"):
            found, failures = losses(policy, processor, recipe, named(config.loss_sources), where, stop)
        phases.add("eval", tokens=sum(each.tokens for each in found.values()) / where.size)
        log.losses(step, {name: (each.mean, each.perplexity, each.tokens, each.rows) for name, each in found.items()})
    tables = None
    if config.sources:
        tables, more = _tables(engine, processor, recipe, where, log, step, stop, phases)
        failures |= more
    for name, cause in failures.items():
        log.event("eval_failed", {"name": name, "cause": cause}, step)
        log.say(f"{recipe.name} step {step}: {name} was NOT evaluated: {cause}")
    if failures and config.fatal:
        raise Agreed("eval.fatal: " + "; ".join(f"{name}: {cause}" for name, cause in failures.items()))
    return tables


def _tables(
    engine: Engine,
    processor: Processor,
    recipe: SFTRecipe | GRPORecipe,
    where: World,
    log: MetricLog,
    step: int,
    stop: Stop,
    phases: Phases,
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The tables of eval.sources, logged, and why the others failed; those that the log has already."""
    config = recipe.eval
    if before := where.gather([log.evaluated(step)])[0]:
        return before, {}
    halved: Counter[str] = Counter()
    with phases("eval"):
        tables, failures = attempt(
            engine, processor, config, where, seed=recipe.seed, on_bad_row=recipe.data.on_bad_row, version=step, stop=stop, halved=halved
        )
    phases.add("eval", tokens=reply_tokens(tables) / where.size)
    log.event("eval", tables, step)
    if times := sum(halved.values()):
        text = f"memory ran short {times} times over {', '.join(+halved)}; batches of replies are smaller now"
        log.event("short_of_memory", {"halved": times, "text": text}, step)
        log.say(f"{recipe.name} step {step}: {text}")
    return tables, failures


def reply_tokens(results: dict[str, dict[str, Any]]) -> float:
    """The tokens of all replies that `evaluate` drew, on all ranks."""
    return sum(table["overall"]["n"] * table["overall"]["mean_response_length"] for table in results.values())


def evaluate_checkpoint(model: Path | str, config: EvalConfig, seed: int = 0) -> dict[str, dict[str, Any]]:
    """`evaluate` for a checkpoint folder or hub name, on this process's device (or torchrun's ranks)."""
    with world() as where:
        return evaluate(*open_checkpoint(model, where, seed), config, where, seed=seed)


def evaluate_server(rollout: RolloutConfig, config: EvalConfig, seed: int = 0) -> dict[str, dict[str, Any]]:
    """`evaluate` for what a server serves; its replies' lengths are in tokens as it counts them."""
    from actial_fast.rollout.client import Client
    from actial_fast.rollout.server import Rows, Server

    with world() as where:
        return evaluate(Server(Client(rollout.url, rollout.model), rollout.workers), Rows(), config, where, seed=seed)


def _records(
    engine: Engine,
    processor: Reader,
    config: EvalConfig,
    source: SourceConfig,
    where: World,
    seed: int,
    on_bad_row: str,
    stop: Stop,
    short: list[str],
) -> tuple[list[Record], str]:
    """This rank's records, or none and why. Nothing here waits for another rank. short: gets longer each time that memory runs short."""
    try:
        rows = Pass(source, limit=config.limit, on_bad_row=on_bad_row, encode=processor.encode_prompt, rank=where.rank, world=where.size)
        examples = [example for example in rows if example.row.truth or example.row.task]
        replies = _replies(engine, processor, examples, config, seed, stop, lambda: short.append(source.path))
        if stop.asked:
            return [], ""
        drawn = zip(examples, replies, strict=True)
        texts = [(e.row, text_of(processor, reply), reply.drawn) for e, (reply,) in drawn]
        records = [_record(row, text, length, config.strict) for row, text, length in texts]
        return [record for record in records if record is not None], ""
    except Exception as error:  # whatever it is, the run goes on without this evaluation
        if ran_out(error):
            longest = f"eval.kv_tokens ({config.kv_tokens or 'as much as there is'}) or eval.max_new_tokens ({config.max_new_tokens})"
            return [], f"{type(error).__name__}: {' '.join(str(error).split())[:500]}; lower {longest}"
        return [], f"{type(error).__name__}: {' '.join(str(error).split())[:500]}" if not isinstance(error, ValueError) else str(error)


def _replies(
    engine: Engine, processor: Reader, examples: list[Example], config: EvalConfig, seed: int, stop: Stop, short: Callable[[], None]
) -> list[list[Reply]]:
    """One reply to each, or none once `stop` is asked."""
    keys = [(seed, example.position) for example in examples]
    draw = Draw(1, config.temperature, config.max_new_tokens, config.kv_tokens)
    return play(engine, processor, examples, draw, keys, Watch(asked=lambda: stop.asked, short=short))


def _record(row: Row, response: str, length: int, strict: bool) -> Record | None:
    """None where the task's metric cannot score the row."""
    score = score_of(response, row) if row.task else float(is_right(response, row, strict=strict))
    if score is None:
        return None
    letter = len(row.truth) == 1 and row.truth.isalpha() and row.truth not in row.choices
    index = ord(row.truth.upper()) - ord("A") if letter else -1
    return Record(
        kind=row.kind,
        correct=score == 1,
        score=score,
        well_formed=task_of(row).formed(response, row),
        response_length=length,
        truth=row.choices[index] if 0 <= index < len(row.choices) else row.truth,
        choices=len(row.choices),
        images=tuple(str(i) if isinstance(i, Path) else hashlib.blake2b(i, digest_size=16).hexdigest() for i in row.images),
        row=_key(row),
    )


def _key(row: Row) -> str:
    """What tells a row from others wherever it lies: its question and answer, and of its images the bytes, or the file's name and size.

    Under another system prompt it is the same row.
    """
    turns = [(turn.role, turn.content) for turn in row.prompt if turn.role != "system"]
    told = hashlib.blake2b(repr((row.id, turns, row.truth, row.accepted, row.task)).encode(), digest_size=KEY * 3 // 4)
    for image in row.images:
        told.update(image if isinstance(image, bytes) else repr((image.name, image.stat().st_size if image.is_file() else 0)).encode())
    return base64.urlsafe_b64encode(told.digest()).decode()


def named(sources: Sequence[SourceConfig], temperature: float = 0.0) -> list[tuple[str, SourceConfig]]:
    """Each source under its folder's and file's name, the same in every stage; sampled figures never share a name with greedy ones."""
    suffix = f" at temperature {temperature:g}" if temperature else ""
    names = ["/".join(Path(source.path).with_suffix("").parts[-2:]) + suffix for source in sources]
    return [(n if names.count(n) == 1 else f"{n} #{i + 1}", source) for i, (n, source) in enumerate(zip(names, sources, strict=True))]

"""Held-out evaluation: reply to every row, compare with the truth, and put the accuracy beside chance and the majority answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from actial_fast.data.sources.row import Row
from actial_fast.data.sources.source import SourceConfig
from actial_fast.data.sources.stream import Pass
from actial_fast.data.sources.tags import extract_answer, is_well_formed, same_answer
from actial_fast.evaluation.statistics import Record, accuracy_table
from actial_fast.model.policy import Policy, load_policy
from actial_fast.model.processor import Processor
from actial_fast.rollout.embedded import generate
from actial_fast.settings.recipe import EvalConfig, ModelConfig
from actial_fast.train.dist import World, world


def evaluate(policy: Policy, processor: Processor, config: EvalConfig, where: World, *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """The accuracy table of each source, by its folder's and file's name; every rank calls and gets the same result.

    A reply counts as right when the text in its <answer> tags, or the whole reply where it has none, equals the truth. Raises
    ValueError for a source none of whose rows has a truth.
    """
    return {name: _evaluate(policy, processor, config, source, where, seed) for name, source in _named(config)}


def reply_tokens(results: dict[str, dict[str, Any]]) -> float:
    """The tokens of all replies that `evaluate` drew, on all ranks."""
    return sum(table["overall"]["n"] * table["overall"]["mean_response_length"] for table in results.values())


def evaluate_checkpoint(model: Path | str, config: EvalConfig, seed: int = 0) -> dict[str, dict[str, Any]]:
    """`evaluate` for a checkpoint folder or hub name, on this process's device (or torchrun's ranks)."""
    with world() as where:
        policy = load_policy(ModelConfig(path=str(model)), where.device, seed).eval()
        return evaluate(policy, Processor.load(str(model)), config, where, seed=seed)


def _evaluate(policy: Policy, processor: Processor, config: EvalConfig, source: SourceConfig, where: World, seed: int) -> dict[str, Any]:
    rows = Pass(source, limit=config.limit, encode=processor.encode_prompt, rank=where.rank, world=where.size)
    examples = [example for example in rows if example.row.truth]
    records = []
    for start in range(0, len(examples), config.batch_size):
        part = examples[start : start + config.batch_size]
        replies = generate(
            policy,
            processor,
            [example.encoded for example in part],
            1,
            keys=[(seed, example.position) for example in part],
            temperature=config.temperature,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
        )
        for example, (reply,) in zip(part, replies, strict=True):
            records.append(_record(example.row, processor.decode(reply.ids), len(reply.ids)))
    records = where.gather(records)
    if not records:
        raise ValueError(f"evaluation source {source.path}: no row has a truth to compare with")
    return accuracy_table(records)


def _record(row: Row, response: str, length: int) -> Record:
    letter = len(row.truth) == 1 and row.truth.isalpha() and row.truth not in row.choices
    index = ord(row.truth.upper()) - ord("A") if letter else -1
    return Record(
        kind=row.kind,
        correct=same_answer(extract_answer(response), row.truth),
        well_formed=is_well_formed(response),
        response_length=length,
        truth=row.choices[index] if 0 <= index < len(row.choices) else row.truth,
        choices=len(row.choices),
    )


def _named(config: EvalConfig) -> list[tuple[str, SourceConfig]]:
    """Each source under its folder's and file's name, the same in every stage; sampled figures never share a name with greedy ones."""
    suffix = f" at temperature {config.temperature:g}" if config.temperature else ""
    names = ["/".join(Path(source.path).with_suffix("").parts[-2:]) + suffix for source in config.sources]
    return [
        (n if names.count(n) == 1 else f"{n} #{i + 1}", source) for i, (n, source) in enumerate(zip(names, config.sources, strict=True))
    ]

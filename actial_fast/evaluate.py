"""Held-out evaluation: reply to every row, compare with the truth, and put the accuracy beside chance and the majority answer."""

from __future__ import annotations

from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any

from actial_fast.config import EvalConfig, ModelConfig
from actial_fast.data.row import Row
from actial_fast.data.source import SourceConfig
from actial_fast.data.stream import Pass
from actial_fast.data.tags import extract_answer, is_well_formed, same_answer
from actial_fast.dist import World, world
from actial_fast.model import Policy, load_policy
from actial_fast.processor import Processor
from actial_fast.rollout.embedded import generate
from actial_fast.statistics import Record, accuracy_table


def evaluate(policy: Policy, processor: Processor, config: EvalConfig, where: World, *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """The accuracy table of each source, by its file's name; every rank calls and gets the same result.

    A reply counts as right when the text in its <answer> tags, or the whole reply where it has none, equals the truth. Raises
    ValueError for a source none of whose rows has a truth.
    """
    return {name: _evaluate(policy, processor, config, source, where, seed) for name, source in _named(config.sources)}


def evaluate_checkpoint(model: Path | str, config: EvalConfig, seed: int = 0) -> dict[str, dict[str, Any]]:
    """`evaluate` for a checkpoint folder or hub name, on this process's device (or torchrun's ranks)."""
    with world() as where:
        policy = load_policy(ModelConfig(path=str(model)), where.device, seed).eval()
        return evaluate(policy, Processor.load(str(model)), config, where, seed=seed)


def _evaluate(policy: Policy, processor: Processor, config: EvalConfig, source: SourceConfig, where: World, seed: int) -> dict[str, Any]:
    examples = [e for e in Pass(source, limit=config.limit, rank=where.rank, world=where.size) if e.row.truth]
    records = []
    for start in range(0, len(examples), config.batch_size):
        part = examples[start : start + config.batch_size]
        replies = generate(
            policy,
            processor,
            [processor.encode_prompt(example) for example in part],
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


def _named(sources: Many[SourceConfig]) -> list[tuple[str, SourceConfig]]:
    """Each source with a short name: its file's, with the folder's before it where two would be called the same."""
    stems = [source.path.rstrip("/").rsplit("/", 1)[-1].split(".")[0] for source in sources]
    long = [".".join(source.path.rstrip("/").split(".")[0].split("/")[-2:]) for source in sources]
    names = [long[i] if stems.count(stem) > 1 else stem for i, stem in enumerate(stems)]
    return [
        (name if names.count(name) == 1 else f"{name}-{i}", source) for i, (name, source) in enumerate(zip(names, sources, strict=True))
    ]

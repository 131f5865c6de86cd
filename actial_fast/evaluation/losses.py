"""Held-out loss: how likely the model holds the answers that stand in rows, with no reply drawn.

What text without one right answer can be judged by. The loss is SFT's with `loss_weighting: token`: the sum of -log p over all answer
tokens of a source, on all ranks, over their number; so it does not depend on how rows are packed, nor on how many ranks share them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from actial_fast.data.sources.source import SourceConfig
from actial_fast.data.sources.stream import Pass as Rows
from actial_fast.model.policy import Policy
from actial_fast.model.processor import Processor
from actial_fast.packing.batch import Sequence
from actial_fast.settings.recipe import GRPORecipe, SFTRecipe
from actial_fast.train.dist import World
from actial_fast.train.forward import log_probs
from actial_fast.train.rounds import Pass, passes
from actial_fast.train.sharding import is_sharded
from actial_fast.train.shortage import ran_out
from actial_fast.train.stopping import NEVER, Stop

CHUNK = 256  # rows that a rank has in memory at a time


@dataclass(frozen=True)
class Loss:
    """Of one source. mean: nats per answer token; tokens: those of all answers, what ends each included; rows: how many were read."""

    mean: float
    tokens: int
    rows: int

    @property
    def perplexity(self) -> float:
        """e to the loss; infinite where no float holds it."""
        return math.inf if self.mean > 700 else math.exp(self.mean)


def losses(
    policy: Policy,
    processor: Processor,
    recipe: SFTRecipe | GRPORecipe,
    sources: Iterable[tuple[str, SourceConfig]],
    where: World,
    stop: Stop = NEVER,
) -> tuple[dict[str, Loss], dict[str, str]]:
    """The loss of each source that could be read, by its name, and why the others could not, the same on every rank. Every rank calls.

    Rows are cut into passes as the recipe's training is. Raises GivenUp on every rank once `stop` is asked.
    """
    found, failures = {}, {}
    for name, source in sources:
        measured = _measured(policy, processor, recipe, source, where, stop)
        if isinstance(measured, Loss):
            found[name] = measured
        else:
            failures[name] = measured
    return found, failures


def _measured(
    policy: Policy, processor: Processor, recipe: SFTRecipe | GRPORecipe, source: SourceConfig, where: World, stop: Stop
) -> Loss | str:
    """The loss of one source, or why it has none. Ranks read apart and meet behind every chunk, whoever could not read it too."""
    sums = np.zeros(3)  # of -log p, answer tokens, rows
    chunks = _chunks(processor, recipe, source, where)
    while True:
        chunk, cause = next(chunks, ([], ""))
        told = where.gather([(len(chunk), cause)])
        if causes := [cause for _, cause in told if cause]:
            return causes[0]
        if not any(rows for rows, _ in told):
            break
        mine, cause = _passed(policy, processor, recipe, chunk, where, stop)
        everyone = where.gather([(mine, cause)])
        if causes := [cause for _, cause in everyone if cause]:
            return causes[0]
        sums += [math.fsum(values) for values in zip(*(each for each, _ in everyone), strict=True)]
    total, tokens, rows = sums.tolist()
    return Loss(total / tokens, int(tokens), int(rows)) if tokens else f"{source.path}: no row has an answer to measure"


def _passed(
    policy: Policy, processor: Processor, recipe: SFTRecipe | GRPORecipe, chunk: list[Sequence], where: World, stop: Stop
) -> tuple[tuple[float, int, int], str]:
    """Of this rank's rows the sum of -log p, answer tokens and how many they are; or none of it, and why. Sharded ranks, which need each
    other within a pass, have no why: for want of memory they end together."""
    (rounds,) = passes([Pass(policy, chunk, trained=False, phase="eval")], recipe, processor, where)
    try:
        found = log_probs(policy, chunk, rounds, stop=stop)
    except Exception as error:
        if is_sharded(policy) or not ran_out(error):
            raise
        stop.leave()
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        return (0.0, 0, 0), what
    tokens = sum(int(s.trained[1:].sum()) for s in chunk)
    return (-math.fsum(float(each.double().sum()) for each in found), tokens, len(chunk)), ""


def _chunks(
    processor: Processor, recipe: SFTRecipe | GRPORecipe, source: SourceConfig, where: World
) -> Iterator[tuple[list[Sequence], str]]:
    """This rank's rows, so many at a time, each chunk with what was wrong with it, which ends them."""
    how, limit = recipe.data.on_bad_row, recipe.eval.limit
    try:
        rows = iter(Rows(source, limit=limit, on_bad_row=how, encode=processor.encode, rank=where.rank, world=where.size))
        while chunk := [example.encoded for example in islice(rows, CHUNK)]:
            yield chunk, ""
    except (ValueError, OSError) as error:
        yield [], str(error)

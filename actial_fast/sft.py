"""Supervised fine-tuning, in reading order.

Simplified against a general trainer: one objective (next-token loss on the assistant's turns), one optimizer, no callbacks.
A step draws a GLOBAL batch of rows, every rank takes its share, and every loss term is divided by the global count before backward, so the
gradient does not depend on the number of ranks or micro-batches.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actial_fast import ops
from actial_fast.budget.fits import Budget
from actial_fast.evaluation.evaluate import held_out
from actial_fast.model.policy import Policy
from actial_fast.model.processor import Processor
from actial_fast.ops.ranges import named
from actial_fast.packing.batch import Sequence
from actial_fast.rollout.engines import open_engine
from actial_fast.settings.recipe import SFTRecipe
from actial_fast.train.account import Account
from actial_fast.train.dist import World, clip_gradients, reduce_gradients, world
from actial_fast.train.guard import Guard
from actial_fast.train.optim import parameters_of, set_learning_rate
from actial_fast.train.rounds import Pass, balanced, passes
from actial_fast.train.sharding import is_sharded
from actial_fast.train.shortage import over
from actial_fast.train.stage import (
    begin,
    device_name,
    draw,
    finished,
    open_clock,
    open_log,
    open_stage,
    report_skipped,
)
from actial_fast.train.stopping import NEVER, GivenUp, Stop


def train(recipe: SFTRecipe) -> Path:
    """Run the stage, or go on with it, or do nothing when it is finished; returns the folder of the final model.

    Raises ValueError for a recipe or data that cannot be used, NonFinite when too many steps in a row were, Stopped after a signal (with a
    checkpoint written).
    """
    with world(recipe.dist.timeout) as where:
        return finished(recipe) or _train(recipe, where)


def _train(recipe: SFTRecipe, where: World) -> Path:
    with contextlib.ExitStack() as stack:
        budget = Budget()
        start = begin(recipe, where, Processor.encode, budget.lacking, stack)
        stage = open_stage(recipe, start, where, Processor.encode, stack)
        policy, processor, optimizer, stream = stage.policy, stage.processor, stage.optimizer, stage.stream
        parameters, guard = parameters_of(policy), Guard(optimizer, recipe.optim.max_skipped)
        total = recipe.steps or max(1, round(recipe.epochs * stream.epoch_length / recipe.batch_size))
        log, stop = stack.enter_context(open_log(recipe, start, total, where)), stack.enter_context(Stop(where))
        log.opening(budget.opening(stream.sizes, device_name(where), start, total))
        phases, window = open_clock(recipe, start, where, log, stack)
        account, engine = Account(phases), open_engine(recipe, policy, processor, where, stack, optimizer)
        try:
            for step in range(start + 1, total + 2):
                mark = stage.mark()
                results = held_out(engine, policy, processor, recipe, where, log, step - 1, stop, phases)
                if phases.used:
                    log.event("phases", phases.metrics(), step - 1)
                if step > total or (results and _reached(results, recipe, step - 1)):
                    break
                window.at(step)
                rate = set_learning_rate(optimizer, recipe.optim, step, total)
                with phases("data"):
                    examples = draw(stream, recipe.batch_size, where)
                with phases("plan"):
                    sequences = balanced([example.encoded for example in examples], lambda s: s, recipe, processor, where)
                with phases("update"):
                    loss, answer_tokens = _accumulate(policy, processor, sequences, recipe, where, stop, account)
                    reduce_gradients(parameters, where)
                    norm = clip_gradients(parameters, recipe.optim.clip_norm)
                    guard.step(loss, norm)
                tokens, rejected = where.total([sum(map(len, sequences)), stream.rejected])
                skipped = guard.skipped()  # the first wait for the device
                times = phases.metrics()
                metrics = {
                    "loss": float(loss),
                    "lr": rate,
                    "grad_norm": float(norm),
                    "answer_tokens": answer_tokens,
                    "tokens_per_s": tokens / times["seconds"],
                    **times,
                    **({"rejected_rows": rejected} if rejected else {}),
                }
                with phases("log"):
                    log.step(step, metrics | {"skipped_updates": len(skipped)})
                    if skipped:
                        report_skipped(log, guard, [example.row.where for example in examples], step, where)
                ends = stop.agreed()  # asked a moment later, this rank alone would end
                if ends or step == total or (recipe.save.every and step % recipe.save.every == 0):
                    with phases("save"):
                        stage.save(step)
                stage.saver.poll()
                if ends:
                    stage.saver.wait()
                    raise stop.stopped(f"{recipe.name}: stopped at step {step} of {total}; the same command goes on from here")
        except GivenUp:
            stage.give_up(mark, step)
            raise stop.stopped(f"{recipe.name}: stopped at step {step - 1} of {total}; the same command goes on from here") from None
        return stage.finish(step - 1)


def _accumulate(
    policy: Policy,
    processor: Processor,
    sequences: list[Sequence],
    recipe: SFTRecipe,
    where: World,
    stop: Stop = NEVER,
    account: Account | None = None,
) -> tuple[Tensor, int]:
    """Gradients of the global batch's loss, from this rank's sequences; returns the global loss, on the device, and answer tokens."""
    lengths = np.array([s.trained[1:].sum() for s in sequences], np.int64)
    counts = where.total([lengths.sum(), len(sequences)])
    total = torch.zeros((), device=where.device)
    update = Pass(policy, sequences, trained=True)
    (rounds,) = passes([update], recipe, processor, where)
    for each in stop.until(rounds, together=is_sharded(policy)):
        weights = _token_weights([sequences[k] for k in each.members], recipe.loss_weighting, counts)
        token_weight = torch.from_numpy(np.append(weights, np.zeros(each.idle, np.float32))).to(where.device, non_blocking=True)
        with over(each.told):
            loss = policy(
                each.batch, lambda hidden, head, b=each.batch, w=token_weight: ops.linear_cross_entropy(hidden, head, b.targets, w)
            )
            with named("backward"):
                loss.backward()
        total += loss.detach()
    stop.leave()
    if account is not None:
        account.passes([update])
    return where.sum(total), int(counts[0])


def _token_weights(members: list[Sequence], weighting: str, counts: list[float]) -> np.ndarray:
    """Each answer token's weight in the global mean: (T,) float32. counts: answer tokens and rows of the global batch."""
    parts = [np.full(n, 1 / counts[0] if weighting == "token" else 1 / (n * counts[1])) for n in (s.trained[1:].sum() for s in members)]
    return np.concatenate([np.zeros(0), *parts]).astype(np.float32)


def _reached(results: dict[str, dict[str, Any]], recipe: SFTRecipe, step: int) -> bool:
    """True when every question type of every source has the accuracy that ends the stage."""
    if not recipe.stop_accuracy or step < recipe.stop_steps or len(results) < len(recipe.eval.sources):
        return False
    return all(f["accuracy"] >= recipe.stop_accuracy for table in results.values() for f in table["kinds"].values())

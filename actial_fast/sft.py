"""Supervised fine-tuning, in reading order.

Simplified against a general trainer: one objective (next-token loss on the assistant's turns), one optimizer, no callbacks.
A step draws a GLOBAL batch of rows, every rank takes its share, and every loss term is divided by the global count before backward, so the
gradient does not depend on the number of ranks or micro-batches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actial_fast import ops
from actial_fast.evaluation.evaluate import evaluate, reply_tokens
from actial_fast.model.policy import Policy
from actial_fast.model.processor import Processor
from actial_fast.ops.ranges import named
from actial_fast.packing.batch import Sequence
from actial_fast.settings.recipe import SFTRecipe
from actial_fast.train import checkpoint
from actial_fast.train.account import Account
from actial_fast.train.dist import World, clip_gradients, reduce_gradients, world
from actial_fast.train.phases import Phases, measured_rate
from actial_fast.train.profile import Window
from actial_fast.train.rounds import Pass, balanced, passes
from actial_fast.train.stage import (
    Stopped,
    begin,
    graceful_stop,
    open_log,
    open_stage,
    parameters_of,
    set_learning_rate,
    stage_folder,
)


def train(recipe: SFTRecipe) -> Path:
    """Run the stage, or go on with it, or do nothing when it is finished; returns the folder of the final model.

    Raises ValueError for a recipe or data that cannot be used, Stopped after a signal (with a checkpoint written).
    """
    with world() as where:
        return _train(recipe, where)


def _train(recipe: SFTRecipe, where: World) -> Path:
    folder = stage_folder(recipe)
    start = begin(recipe, where)
    if done := checkpoint.final(folder):
        return done
    stage = open_stage(recipe, start, where, Processor.encode)
    policy, processor, optimizer, stream = stage.policy, stage.processor, stage.optimizer, stage.stream
    total = recipe.steps or max(1, round(recipe.epochs * stream.epoch_length / recipe.batch_size))
    window = Window(recipe.profile, Path(recipe.run), recipe.name, where)
    with open_log(recipe, start, total, where) as log, graceful_stop() as asked, window:
        log.event("rate", ceiling := measured_rate(where.device), start)
        phases = Phases(where, ceiling["tflops"])
        account = Account(phases)
        for step in range(start + 1, total + 1):
            window.at(step)
            rate = set_learning_rate(optimizer, recipe.optim, step, total)
            with phases("data"):
                sequences = [example.encoded for example in stream.next_batch(recipe.batch_size)]
            with phases("plan"):
                sequences = balanced(sequences, lambda s: s, recipe, processor, where)
            with phases("update"):
                loss, answer_tokens = _accumulate(policy, processor, sequences, recipe, where, account)
                reduce_gradients(parameters_of(policy), where)
                norm = clip_gradients(parameters_of(policy), recipe.optim.clip_norm)
                with named("optimizer"):
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
            tokens, rejected = where.total([sum(map(len, sequences)), stream.rejected])
            loss_value, norm_value = float(loss), float(norm)  # the first wait for the device
            times = phases.metrics()
            log.step(
                step,
                {
                    "loss": loss_value,
                    "lr": rate,
                    "grad_norm": norm_value,
                    "answer_tokens": answer_tokens,
                    "tokens_per_s": tokens / times["seconds"],
                    **times,
                    **({"rejected_rows": rejected} if rejected else {}),
                },
            )
            last = step == total
            if recipe.eval.sources and (last or (recipe.eval.every and step % recipe.eval.every == 0)):
                with phases("eval"):
                    results = evaluate(policy, processor, recipe.eval, where, seed=recipe.seed)
                phases.add("eval", tokens=reply_tokens(results) / where.size)
                log.event("eval", results, step)
                last = last or _reached(results, recipe, step)
            stop = where.max(len(asked)) > 0
            if last or stop or (recipe.save.every and step % recipe.save.every == 0):
                state = {"position": stream.position}
                with phases("save"):
                    checkpoint.save(folder, step, policy, processor, optimizer, state, where, keep=recipe.save.keep, last=last)
            if phases.used:
                log.event("phases", phases.metrics(), step)
            if last:
                break
            if stop:
                raise Stopped(f"{recipe.name}: stopped at step {step} of {total}; the same command goes on from here")
    stream.close()
    return folder / "final" / "model"


def _accumulate(
    policy: Policy, processor: Processor, sequences: list[Sequence], recipe: SFTRecipe, where: World, account: Account | None = None
) -> tuple[Tensor, int]:
    """Gradients of the global batch's loss, from this rank's sequences; returns the global loss, on the device, and answer tokens."""
    lengths = np.array([s.trained[1:].sum() for s in sequences], np.int64)
    counts = where.total([lengths.sum(), len(sequences)])
    total = torch.zeros((), device=where.device)
    update = Pass(policy, sequences, trained=True)
    (rounds,) = passes([update], recipe, processor, where)
    for each in rounds:
        weights = _token_weights([sequences[k] for k in each.members], recipe.loss_weighting, counts)
        token_weight = torch.from_numpy(np.append(weights, np.zeros(each.idle, np.float32))).to(where.device, non_blocking=True)
        loss = policy(each.batch, lambda hidden, head, b=each.batch, w=token_weight: ops.linear_cross_entropy(hidden, head, b.targets, w))
        with named("backward"):
            loss.backward()
        total += loss.detach()
    if account is not None:
        account.passes([update])
    return where.sum(total), int(counts[0])


def _token_weights(members: list[Sequence], weighting: str, counts: list[float]) -> np.ndarray:
    """Each answer token's weight in the global mean: (T,) float32. counts: answer tokens and rows of the global batch."""
    parts = [np.full(n, 1 / counts[0] if weighting == "token" else 1 / (n * counts[1])) for n in (s.trained[1:].sum() for s in members)]
    return np.concatenate([np.zeros(0), *parts]).astype(np.float32)


def _reached(results: dict[str, dict[str, Any]], recipe: SFTRecipe, step: int) -> bool:
    """True when every question type of every source has the accuracy that ends the stage."""
    if not recipe.stop_accuracy or step < recipe.stop_steps:
        return False
    return all(f["accuracy"] >= recipe.stop_accuracy for table in results.values() for f in table["kinds"].values())

"""Group relative policy optimisation with verifiable rewards, in reading order.

A step: draw prompts, sample n replies to each, score them, turn rewards into advantages within each group (rollout/groups.py), and make one
optimizer step per mini-batch of prompts. Simplified against a general trainer: old log-probs are those of the weights that the step begins
with, so the first mini-batch needs none (its ratio is exactly 1); what the sampler's own log-probs differ by, importance weights make up
for. The reference is the starting weights, held frozen or reached by switching the adapter off. A group lives on one rank until the groups
are balanced; every loss term is divided by a global count, so the number of ranks and micro-batches does not change the update.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from actial_fast import ops
from actial_fast.budget.fits import Budget
from actial_fast.evaluation.evaluate import held_out
from actial_fast.model.policy import Policy, load_reference
from actial_fast.model.processor import Processor
from actial_fast.ops.ranges import named
from actial_fast.rollout.engines import open_engine
from actial_fast.rollout.groups import Groups, settled
from actial_fast.rollout.kept import Kept
from actial_fast.settings.recipe import GRPORecipe
from actial_fast.tasks.rewards import Scorer
from actial_fast.train import checkpoint
from actial_fast.train.account import Account
from actial_fast.train.dist import World, clip_gradients, reduce_gradients, world
from actial_fast.train.forward import log_probs
from actial_fast.train.guard import Guard
from actial_fast.train.mismatch import Band, Mismatch
from actial_fast.train.optim import parameters_of, set_learning_rate
from actial_fast.train.phases import Timer, untimed
from actial_fast.train.rounds import Pass, Round, balanced, passes
from actial_fast.train.samples import Sample, figures, shown
from actial_fast.train.sharding import is_sharded, shard
from actial_fast.train.shortage import keys_of, over, told
from actial_fast.train.stage import (
    Stage,
    begin,
    device_name,
    digest,
    finished,
    open_clock,
    open_log,
    open_stage,
    report_skipped,
)
from actial_fast.train.stopping import NEVER, GivenUp, Stop


def train(recipe: GRPORecipe) -> Path:
    """Run the stage, or go on with it, or do nothing when it is finished; returns the folder of the final model.

    Raises ValueError for a recipe or data that cannot be used, NonFinite when too many steps in a row were, Stopped after a signal (with a
    checkpoint written, and the replies drawn for the step under way kept).
    """
    if recipe.prompts % recipe.minibatch:
        raise ValueError(f"minibatch: prompts ({recipe.prompts}) must be a multiple of it, got {recipe.minibatch}")
    longest = recipe.data.max_prompt_tokens + recipe.sampling.max_new_tokens
    if recipe.packing == "packed" and recipe.pack_tokens < longest:
        raise ValueError(f"pack_tokens: a prompt and its reply may have {longest} tokens and must fit, got {recipe.pack_tokens}")
    with world(recipe.dist.timeout) as where:
        return finished(recipe) or _train(recipe, where)


def _train(recipe: GRPORecipe, where: World) -> Path:
    with contextlib.ExitStack() as stack:
        budget = Budget()
        start = begin(recipe, where, Processor.encode_prompt, budget.lacking, stack)
        stage = open_stage(recipe, start, where, Processor.encode_prompt, stack)
        policy, processor, optimizer, stream = stage.policy, stage.processor, stage.optimizer, stage.stream
        parameters, guard, total = parameters_of(policy), Guard(optimizer, recipe.optim.max_skipped), recipe.steps
        reference = None
        if (recipe.loss.beta > 0 or not recipe.skip_reference) and not policy.adapted:
            place = functools.partial(shard, where=where, config=recipe.dist) if recipe.dist.fsdp else None
            with told("load", keys_of(recipe)):
                reference = load_reference(recipe.model, where.device, packed=recipe.packing == "packed", place=place)
        log, stop = stack.enter_context(open_log(recipe, start, total, where)), stack.enter_context(Stop(where))
        log.opening(budget.opening(stream.sizes, device_name(where), start, total))
        scorer, replies = stack.enter_context(Scorer(recipe.rewards)), Kept(stage.folder, digest(recipe))
        phases, window = open_clock(recipe, start, where, log, stack)
        account, engine = Account(phases), open_engine(recipe, policy, processor, where, stack, optimizer, reference)
        recipe, band = settled(recipe, engine), Band(log, policy.compute_dtype)
        groups = Groups(
            engine, processor, stream, recipe, where, scorer, cursor=stage.cursor, replies=replies, log=log, stop=stop, phase=phases
        )
        stack.enter_context(groups).forget(_needed(stage, recipe, start))
        try:
            for step in range(start + 1, total + 2):
                mark = stage.mark(groups.cursor)
                held_out(engine, policy, processor, recipe, where, log, step - 1, stop, phases)
                if phases.used:
                    log.event("phases", phases.metrics(), step - 1)
                if step > total:
                    break
                window.at(step)
                rate = set_learning_rate(optimizer, recipe.optim, step, total)
                drawn = groups.of(step)
                examples, samples = drawn.examples, drawn.samples
                if recipe.rollout.ahead and step < total:
                    groups.ahead(step + 1)
                with phases("plan"):
                    taught = [s for s in samples if s.finished or not recipe.overlong.mask]
                    minibatches = [[s for s in taught if s.minibatch == m] for m in range(recipe.prompts // recipe.minibatch)]
                    counts = [where.total([sum(map(len, each)), len(each)]) for each in minibatches]
                    moved = [balanced(_kept(each, recipe), lambda s: s.sequence, recipe, processor, where) for each in minibatches]
                    ahead = _passes(policy, reference, processor, moved, recipe, where)
                ready = _log_probs(policy, reference, moved, ahead, recipe, stop, phases)
                stats, norms = torch.zeros(len(ops.STATS), device=where.device), []
                weighed = recipe.importance_correction == "on"
                mismatch = Mismatch(where, recipe.loss if weighed else None)
                with phases("update"):
                    for m, (minibatch, count, rounds) in enumerate(zip(ready, counts, ahead.updates, strict=True)):
                        # until the first optimizer step nothing has changed, so that the step may be given up
                        found = _accumulate(policy, minibatch, count, rounds, recipe, where, stop if m == 0 else NEVER, mismatch)
                        if count[0]:  # else no rank has a gradient: every reply was cut, and none is to be learned from
                            reduce_gradients(parameters, where)
                        norms.append(clip_gradients(parameters, recipe.optim.clip_norm))
                        made = guard.step(found[ops.STATS.index("loss")], norms[-1])
                        stats += torch.where(made, found, 0)
                    counted = torch.cat([stats.double(), torch.stack(norms).mean().double()[None], mismatch.total()])
                with phases("plan"):
                    account.passes(ahead.wanted)
                    account.sampled(policy, [s.sequence for s in samples], recipe.sampling.n)
                skipped = guard.skipped()  # the first wait for the device
                groups.settle()
                numbers = counted.tolist()
                sums, norm = numbers[: len(ops.STATS)], numbers[len(ops.STATS)]
                times = phases.metrics()
                means = np.array(sums) / max(1, len(norms) - len(skipped))
                metrics = figures(samples, means, recipe, where, times["seconds"]) | {"lr": rate, "grad_norm": norm, **times}
                metrics |= Mismatch.metrics(numbers[len(ops.STATS) + 1 :], weighed) | drawn.figures
                rejected, untaught, *failed = where.total([stream.rejected, len(samples) - len(taught), *drawn.failed])
                metrics |= {"masked_replies": untaught} if recipe.overlong.mask else {}
                metrics |= {"rejected_rows": rejected} if rejected else {}
                metrics |= {f"reward_failures/{r.name}": n for r, n in zip(recipe.rewards, failed, strict=True) if n}
                with phases("log"):
                    log.step(step, metrics | {"skipped_updates": len(skipped)})
                    if recipe.log_rollouts and step in (1, (total + 1) // 2, total):
                        log.event("rollouts", shown(processor.store, examples, samples, recipe), step)
                    if skipped:
                        firsts = samples[:: recipe.sampling.n]
                        rows = [e.row.where for e, first in zip(examples, firsts, strict=True) if first.minibatch in skipped]
                        report_skipped(log, guard, rows, step, where)
                    if drawn.version == step - 1:  # older ones are as far off as an update takes the policy
                        band.look(step, metrics)
                    groups.forget(_needed(stage, recipe, step))
                ends = stop.agreed()  # asked a moment later, this rank alone would end
                if ends or step == total or (recipe.save.every and step % recipe.save.every == 0):
                    with phases("save"):
                        stage.save(step, groups.cursor)
                stage.saver.poll()
                if ends:
                    stage.saver.wait()
                    raise stop.stopped(f"{recipe.name}: stopped at step {step} of {total}; the same command goes on from here")
        except GivenUp:
            stage.give_up(mark, step)
            kept_too = "the replies drawn since are kept; the same command goes on from here"
            raise stop.stopped(f"{recipe.name}: stopped at step {step - 1} of {total}; {kept_too}") from None
        groups.forget([])
        return stage.finish(step - 1)


def _needed(stage: Stage, recipe: GRPORecipe, step: int) -> list[int]:
    """The steps whose replies a run may go on with once `step` is done: the next one's and, drawn ahead, those of the one behind it and of
    the ones behind checkpoints, since the weights that drew them are gone."""
    if not recipe.rollout.ahead:
        return [step + 1]
    return [step + 1, step + 2, *(saved + 1 for saved in [*stage.saver.under_way, *checkpoint.steps(stage.folder)])]


@dataclass(frozen=True)
class Passes:
    """The rounds of one step, to be run in this order: old log-probs of mini-batches that need them and the reference's, or None where none
    does, then each mini-batch's update. wanted: what they go over."""

    wanted: list[Pass]
    old: Iterator[Round] | None
    ref: Iterator[Round] | None
    updates: list[Iterator[Round]]


def _passes(
    policy: Policy, reference: Policy | None, processor: Processor, minibatches: Many[list[Sample]], recipe: GRPORecipe, where: World
) -> Passes:
    late = minibatches[_on_policy(recipe) :]
    needs_ref = recipe.loss.beta > 0 or not recipe.skip_reference
    wanted = [Pass(policy, [s.sequence for samples in late for s in samples], trained=False, phase="old")] if late else []
    if needs_ref:
        everything = [s.sequence for samples in minibatches for s in samples]
        wanted.append(Pass(reference or policy, everything, trained=False, phase="reference", adapters=False))
    wanted += [Pass(policy, [s.sequence for s in samples], trained=True) for samples in minibatches]
    made = passes(wanted, recipe, processor, where)
    old = made.pop(0) if late else None
    ref = made.pop(0) if needs_ref else None
    return Passes(wanted, old, ref, made)


def _on_policy(recipe: GRPORecipe) -> int:
    """How many mini-batches, the first ones, have the policy's own log-probs for old ones."""
    return 1 if recipe.skip_old_logp else 0


def _kept(samples: list[Sample], recipe: GRPORecipe) -> list[Sample]:
    """The samples without those of groups whose gradient is exactly zero."""
    spec = recipe.loss
    skips = recipe.skip_zero_variance and spec.beta == 0 and spec.entropy_coef == 0 and spec.top_entropy == 1
    return [s for s in samples if s.advantage != 0] if skips else samples


def _log_probs(
    policy: Policy,
    reference: Policy | None,
    minibatches: Many[list[Sample]],
    rounds: Passes,
    recipe: GRPORecipe,
    stop: Stop = NEVER,
    phase: Timer = untimed,
) -> list[list[Sample]]:
    """The samples with old log-probs where the policy will have moved (after the first mini-batch), and reference ones where beta asks."""
    minibatches, temperature = list(minibatches), recipe.sampling.temperature
    if rounds.old is not None:
        late = minibatches[_on_policy(recipe) :]
        with phase("old"):
            old = iter(log_probs(policy, [s.sequence for samples in late for s in samples], rounds.old, temperature=temperature, stop=stop))
        minibatches[_on_policy(recipe) :] = [[replace(s, old=next(old)) for s in samples] for samples in late]
    if rounds.ref is not None:
        with phase("reference"), contextlib.nullcontext() if reference is not None else policy.adapter_off():
            everything = [s.sequence for each in minibatches for s in each]
            ref = iter(log_probs(reference or policy, everything, rounds.ref, temperature=temperature, stop=stop))
        minibatches = [[replace(s, ref=next(ref)) for s in samples] for samples in minibatches]
    return minibatches


def _accumulate(
    policy: Policy,
    samples: list[Sample],
    counts: Many[float],
    rounds: Iterator[Round],
    recipe: GRPORecipe,
    where: World,
    stop: Stop = NEVER,
    mismatch: Mismatch | None = None,
) -> Tensor:
    """Gradients of one global mini-batch's loss, from this rank's samples, which the rounds go over; returns the global statistics
    (len(ops.STATS),) float32, on the device.

    counts: tokens and replies of the global mini-batch, those that were left out included; stop: for the step's first one, which may be
    given up; mismatch: is told the log-probs of the policy that sampled, this one's where a sample has no old ones. With loss.top_entropy
    < 1 the threshold is that of each micro-batch, so the update depends on how these are cut.
    """
    spec, (tokens, replies) = recipe.loss, counts
    stats = torch.zeros(len(ops.STATS), device=where.device)
    for each in stop.until(rounds, together=is_sharded(policy)):
        chosen, idle = [samples[k] for k in each.members], each.idle

        def rows(values: list[np.ndarray], idle: int = idle) -> Tensor:
            return torch.from_numpy(np.concatenate([*values, np.zeros(idle)]).astype(np.float32)).to(where.device, non_blocking=True)

        def joined(values: list[Tensor], idle: int = idle) -> Tensor:
            return torch.cat([*values, torch.zeros(idle, device=where.device)])

        lengths = [*map(len, chosen), *([idle] if idle else [])]
        cu_seqlens = torch.tensor([0, *np.cumsum(lengths)])
        mask = torch.arange(sum(lengths)) < sum(lengths) - idle
        token_weight = ops.token_weights(
            spec, cu_seqlens, mask=mask, tokens=tokens, sequences=replies, max_length=recipe.sampling.max_new_tokens
        )
        sampled = rows([s.sampled for s in chosen])
        old, ref = [s.old for s in chosen if s.old is not None], [s.ref for s in chosen if s.ref is not None]
        arguments = {
            "advantages": rows([np.full(len(s), s.advantage) for s in chosen]),
            "old_logp": joined(old) if old else None,
            "ref_logp": joined(ref) if len(ref) == len(chosen) else None,
            "sampler_logp": sampled if recipe.importance_correction == "on" else None,
            "token_weight": token_weight.to(where.device, non_blocking=True),
            "cu_seqlens": cu_seqlens,
        }
        with over(each.told):
            result = policy(
                each.batch,
                lambda hidden, head, b=each.batch, a=arguments: ops.linear_grpo_loss(
                    hidden, head, b.targets, spec=spec, temperature=recipe.sampling.temperature, **a
                ),
            )
            with named("backward"):
                result.loss.backward()
        stats += result.stats
        if mismatch is not None:
            real = sum(map(len, chosen))
            own = result.logp if arguments["old_logp"] is None else arguments["old_logp"]
            mismatch.add(sampled[:real], own[:real], [len(s) for s in chosen])
    stop.leave()
    return where.sum(stats)

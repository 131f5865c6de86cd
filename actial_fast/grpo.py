"""Group relative policy optimisation with verifiable rewards, in reading order.

A step: draw prompts, sample n replies to each, score them, turn rewards into advantages within each group, and make one optimizer step
per mini-batch of prompts. Simplified against a general trainer: replies come from the trainer's own weights, so the first mini-batch is
on policy and needs no old log-probs (its ratio is exactly 1), and the reference is the starting weights, held frozen or reached by
switching the adapter off. A group lives on one rank; every loss term is divided by a global count, so the number of ranks and micro-batches
does not change the update.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import time
from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from actial_fast import ops
from actial_fast.data.sources.stream import Example
from actial_fast.evaluation.evaluate import held_out
from actial_fast.model.policy import Policy, load_reference
from actial_fast.model.processor import Processor
from actial_fast.packing.batch import Sequence
from actial_fast.rollout.embedded import Reply, generate
from actial_fast.rollout.kept import Kept
from actial_fast.settings.recipe import GRPORecipe
from actial_fast.tasks.rewards import score
from actial_fast.train.dist import World, clip_gradients, is_sharded, reduce_gradients, shard, world
from actial_fast.train.guard import Guard
from actial_fast.train.rounds import Pass, Round, balanced, passes
from actial_fast.train.stage import (
    begin,
    digest,
    draw,
    finished,
    open_log,
    open_stage,
    parameters_of,
    report_skipped,
    set_learning_rate,
)
from actial_fast.train.stopping import NEVER, GivenUp, Stop


@dataclass(frozen=True)
class Sample:
    """One reply, ready for the update.

    sequence: prompt and reply, the reply's n tokens trained; sampled (n,) float32, the sampler's log-probs; rewards (k,) float32, one a
    reward function; reward: their weighted sum; minibatch: which optimizer step it belongs to; finished: False where the length limit cut
    it; old, ref (n,) float32, on the device: log-probs under the policy before the update and under the reference, or None where not
    needed.
    """

    sequence: Sequence
    text: str
    sampled: np.ndarray
    rewards: np.ndarray
    reward: float
    advantage: float
    minibatch: int
    finished: bool
    old: Tensor | None = None
    ref: Tensor | None = None

    def __len__(self) -> int:
        return len(self.sampled)


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
        start = begin(recipe, where, Processor.encode_prompt, stack)
        stage = open_stage(recipe, start, where, Processor.encode_prompt, stack)
        policy, processor, optimizer, stream = stage.policy, stage.processor, stage.optimizer, stage.stream
        parameters, guard, total = parameters_of(policy), Guard(optimizer, recipe.optim.max_skipped), recipe.steps
        reference = None
        if (recipe.loss.beta > 0 or not recipe.skip_reference) and not policy.adapted:
            place = functools.partial(shard, where=where) if recipe.dist.fsdp else None
            reference = load_reference(recipe.model, where.device, packed=recipe.packing == "packed", place=place)
        log, stop = stack.enter_context(open_log(recipe, start, total, where)), stack.enter_context(Stop(where))
        replies = Kept(stage.folder, digest(recipe))
        try:
            for step in range(start + 1, total + 2):
                mark = stage.mark()
                held_out(policy, processor, recipe, where, log, step - 1, stop)
                if step > total:
                    break
                began = time.perf_counter()
                rate = set_learning_rate(optimizer, recipe.optim, step, total)
                examples = draw(stream, recipe.prompts, where)
                samples = _sample(policy, processor, examples, recipe, where, replies.at(step), stop)
                sampled_in = time.perf_counter() - began
                minibatches = [[s for s in samples if s.minibatch == m] for m in range(recipe.prompts // recipe.minibatch)]
                counts = [where.total([sum(map(len, each)), len(each)]) for each in minibatches]
                kept = [balanced(_kept(each, recipe), lambda s: s.sequence, recipe, processor, where) for each in minibatches]
                ahead = _passes(policy, reference, processor, kept, recipe, where)
                kept = _log_probs(policy, reference, kept, ahead, recipe, stop)
                stats, norms = torch.zeros(len(ops.STATS), device=where.device), []
                for m, (minibatch, count, rounds) in enumerate(zip(kept, counts, ahead.updates, strict=True)):
                    found = _accumulate(policy, minibatch, count, rounds, recipe, where, stop if m == 0 else NEVER)
                    reduce_gradients(parameters, where)
                    norms.append(clip_gradients(parameters, recipe.optim.clip_norm))
                    made = guard.step(found[ops.STATS.index("loss")], norms[-1])
                    stats += torch.where(made, found, 0)
                skipped = guard.skipped()  # the first wait for the device
                figures = stats.double().cpu().numpy() / max(1, len(norms) - len(skipped))
                metrics = _metrics(samples, figures, recipe, where, time.perf_counter() - began)
                if rejected := where.total([stream.rejected])[0]:
                    metrics["rejected_rows"] = rejected
                metrics |= {"lr": rate, "grad_norm": float(sum(norms)) / len(norms), "sampling_seconds": sampled_in}
                log.step(step, metrics | {"skipped_updates": len(skipped)})
                if recipe.log_rollouts and step in (1, (total + 1) // 2, total):
                    log.event("rollouts", _shown(processor, examples, samples, recipe), step)
                if skipped:
                    rows = [e.row.where for e in examples if e.position % len(norms) in skipped]
                    report_skipped(log, guard, rows, step, where)
                if stop.agreed() or step == total or (recipe.save.every and step % recipe.save.every == 0):
                    stage.save(step)
                stage.saver.poll()
                if where.main:
                    replies.clear()
                if stop.asked:
                    stage.saver.wait()
                    raise stop.stopped(f"{recipe.name}: stopped at step {step} of {total}; the same command goes on from here")
        except GivenUp:
            stage.give_up(mark, step)
            told = "the replies drawn since are kept; the same command goes on from here"
            raise stop.stopped(f"{recipe.name}: stopped at step {step - 1} of {total}; {told}") from None
        return stage.finish(step - 1)


def _sample(
    policy: Policy,
    processor: Processor,
    examples: Many[Example],
    recipe: GRPORecipe,
    where: World,
    kept: Kept | None = None,
    stop: Stop = NEVER,
) -> list[Sample]:
    """n scored replies to each of this rank's prompts, in order, with their advantages. Every rank calls."""
    n, weights = recipe.sampling.n, torch.tensor([r.weight for r in recipe.rewards])
    prompts, positions = [example.encoded for example in examples], [example.position for example in examples]
    have = kept.load(positions, n) if kept else {}

    def keep(made: dict[int, list[Reply]]) -> None:
        if kept:
            kept.add({positions[i]: group for i, group in made.items()})

    groups = generate(
        policy,
        processor,
        prompts,
        n,
        keys=[(recipe.seed, position) for position in positions],
        temperature=recipe.sampling.temperature,
        max_new_tokens=recipe.sampling.max_new_tokens,
        batch_size=recipe.sampling.batch_size,
        have={i: have[position] for i, position in enumerate(positions) if position in have},
        drawn=keep,
        asked=lambda: stop.asked,
    )
    stop.leave()
    replies = [reply for group in groups for reply in group]
    texts = [processor.decode(reply.ids) for reply in replies]
    rewards = score(texts, [example.row for example in examples for _ in range(n)], recipe.rewards)
    advantages = _advantages(rewards, len(examples), weights, recipe, where)
    totals = np.where(np.isnan(rewards).all(1), np.nan, np.nansum(rewards * weights.numpy(), axis=1))
    steps = recipe.prompts // recipe.minibatch
    return [
        Sample(
            sequence=replace(prompts[i // n], trained=np.zeros(len(prompts[i // n]), bool)).extended(reply.ids),
            text=texts[i],
            sampled=reply.logprobs,
            rewards=rewards[i],
            reward=float(totals[i]),
            advantage=float(advantages[i]),
            minibatch=positions[i // n] % steps,  # of the global batch, so that ranks do not change which prompts go together
            finished=reply.finished,
        )
        for i, reply in enumerate(replies)
    ]


def _advantages(rewards: np.ndarray, groups: int, weights: Tensor, recipe: GRPORecipe, where: World) -> Tensor:
    """The advantages (N,) of this rank's replies from their rewards (N, R), in `groups` of n. Some statistics are of the whole batch, so
    the rewards of all ranks go in."""
    everyone = where.gather([rewards])
    before = sum(len(part) for part in everyone[: where.rank])
    table = torch.from_numpy(np.concatenate(everyone))
    owner = torch.arange(len(table)) // recipe.sampling.n
    return ops.group_advantages(table, owner, recipe.advantages, weights=weights)[before : before + groups * recipe.sampling.n]


@dataclass(frozen=True)
class Passes:
    """The rounds of one step, to be run in this order: old log-probs of mini-batches that need them and the reference's, or None where none
    does, then each mini-batch's update."""

    old: Iterator[Round] | None
    ref: Iterator[Round] | None
    updates: list[Iterator[Round]]


def _passes(
    policy: Policy, reference: Policy | None, processor: Processor, minibatches: Many[list[Sample]], recipe: GRPORecipe, where: World
) -> Passes:
    late = minibatches[_on_policy(recipe) :]
    needs_ref = recipe.loss.beta > 0 or not recipe.skip_reference
    wanted = [Pass(policy, [s.sequence for samples in late for s in samples], trained=False)] if late else []
    if needs_ref:
        wanted.append(Pass(reference or policy, [s.sequence for samples in minibatches for s in samples], trained=False))
    wanted += [Pass(policy, [s.sequence for s in samples], trained=True) for samples in minibatches]
    made = passes(wanted, recipe, processor, where)
    old = made.pop(0) if late else None
    ref = made.pop(0) if needs_ref else None
    return Passes(old, ref, made)


def _on_policy(recipe: GRPORecipe) -> int:
    """How many mini-batches, the first ones, have the policy's own log-probs for old ones."""
    return 1 if recipe.skip_old_logp else 0


def _kept(samples: list[Sample], recipe: GRPORecipe) -> list[Sample]:
    """The samples without those of groups whose gradient is exactly zero."""
    spec = recipe.loss
    skips = recipe.skip_zero_variance and spec.beta == 0 and spec.entropy_coef == 0 and spec.top_entropy == 1
    return [s for s in samples if s.advantage != 0] if skips else samples


def _log_probs(
    policy: Policy, reference: Policy | None, minibatches: Many[list[Sample]], rounds: Passes, recipe: GRPORecipe, stop: Stop = NEVER
) -> list[list[Sample]]:
    """The samples with old log-probs where the policy will have moved (after the first mini-batch), and reference ones where beta asks."""
    minibatches = list(minibatches)
    if rounds.old is not None:
        late = minibatches[_on_policy(recipe) :]
        old = iter(_forward_only(policy, [s.sequence for samples in late for s in samples], rounds.old, recipe, stop))
        minibatches[_on_policy(recipe) :] = [[replace(s, old=next(old)) for s in samples] for samples in late]
    if rounds.ref is not None:
        with contextlib.nullcontext() if reference is not None else policy.adapter_off():
            ref = iter(_forward_only(reference or policy, [s.sequence for each in minibatches for s in each], rounds.ref, recipe, stop))
        minibatches = [[replace(s, ref=next(ref)) for s in samples] for samples in minibatches]
    return minibatches


@torch.no_grad()
def _forward_only(
    policy: Policy, sequences: list[Sequence], rounds: Iterator[Round], recipe: GRPORecipe, stop: Stop = NEVER
) -> list[Tensor]:
    """Log-probs of each sequence's trained tokens, (n,) float32 each, on the device. Every rank calls."""
    was_training = policy.training
    policy.eval()
    out: list[Tensor] = [torch.empty(0)] * len(sequences)
    for each in stop.until(rounds, together=is_sharded(policy)):
        logp = policy(
            each.batch,
            lambda hidden, head, b=each.batch: ops.linear_logprob(
                hidden, head, b.targets, temperature=recipe.sampling.temperature, return_entropy=False
            )[0],
        )
        sizes = [int(sequences[k].trained[1:].sum()) for k in each.members]
        for k, part in zip(each.members, logp.split([*sizes, each.idle]), strict=False):
            out[k] = part
    policy.train(was_training)
    stop.leave()
    return out


def _accumulate(
    policy: Policy,
    samples: list[Sample],
    counts: Many[float],
    rounds: Iterator[Round],
    recipe: GRPORecipe,
    where: World,
    stop: Stop = NEVER,
) -> Tensor:
    """Gradients of one global mini-batch's loss, from this rank's samples, which the rounds go over; returns the global statistics
    (len(ops.STATS),) float32, on the device.

    counts: tokens and replies of the global mini-batch, those that were left out included. stop: for the step's first one, which
    may be given up. With loss.top_entropy < 1 the threshold is that
    of each micro-batch, so the update depends on how these are cut.
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
        old, ref = [s.old for s in chosen if s.old is not None], [s.ref for s in chosen if s.ref is not None]
        arguments = {
            "advantages": rows([np.full(len(s), s.advantage) for s in chosen]),
            "old_logp": joined(old) if old else None,
            "ref_logp": joined(ref) if len(ref) == len(chosen) else None,
            "sampler_logp": rows([s.sampled for s in chosen]) if recipe.importance_correction else None,
            "token_weight": token_weight.to(where.device, non_blocking=True),
            "cu_seqlens": cu_seqlens,
        }
        result = policy(
            each.batch,
            lambda hidden, head, b=each.batch, a=arguments: ops.linear_grpo_loss(
                hidden, head, b.targets, spec=spec, temperature=recipe.sampling.temperature, **a
            ),
        )
        result.loss.backward()
        stats += result.stats
    stop.leave()
    return where.sum(stats)


def _metrics(samples: list[Sample], stats: np.ndarray, recipe: GRPORecipe, where: World, seconds: float) -> dict[str, float]:
    """The step's figures over all ranks; means of tokens are over those that were computed, and absent where all were skipped."""
    named = dict(zip(ops.STATS, stats, strict=True))
    mean = {name: named[name] / named["tokens"] for name in ops.STATS if named["tokens"]}
    n = recipe.sampling.n
    groups = [samples[i : i + n] for i in range(0, len(samples), n)]
    rewards = np.array([s.rewards for s in samples], np.float64).reshape(-1, len(recipe.rewards))
    totals = np.array([s.reward for s in samples])
    local = [
        len(samples),
        sum(map(len, samples)),
        sum(len(s.sequence) for s in samples),
        sum(s.finished for s in samples),
        sum(len({s.reward for s in group if not np.isnan(s.reward)}) < 2 for group in groups),
        np.isfinite(totals).sum(),
        np.nansum(totals),
        *np.isfinite(rewards).sum(0),
        *np.nansum(rewards, 0),
    ]
    count, length, tokens, finished, flat, scored, reward, *parts = where.total(local)
    known, sums = parts[: len(recipe.rewards)], parts[len(recipe.rewards) :]
    count = max(count, 1)
    return {
        "loss": named["loss"],
        "reward": reward / scored if scored else np.nan,  # means are over the replies that were scored
        **{f"reward/{r.name}": sums[k] / known[k] if known[k] else np.nan for k, r in enumerate(recipe.rewards)},
        "unscored": 1 - scored / count,
        "response_length": length / count,
        "finished": finished / count,
        "zero_variance_groups": flat * n / count,
        **{name: mean[name] for name in ("kl", "entropy", "ratio", *(["importance"] * recipe.importance_correction)) if mean},
        **({"clip_fraction": mean["clip_low"] + mean["clip_high"]} if mean else {}),
        "tokens_per_s": tokens / seconds,
        "seconds": seconds,
    }


def _shown(processor: Processor, examples: list[Example], samples: list[Sample], recipe: GRPORecipe) -> list[dict[str, Any]]:
    """Rollouts for the report: the first replies of the first groups, with their images as small PNGs."""
    shown = []
    for g, example in enumerate(examples[: recipe.log_rollouts]):
        images = [_thumbnail(processor.store.pixels(key)) for key in example.encoded.images]
        prompt = "\n".join(turn.content for turn in example.row.prompt if turn.role != "system")
        for sample in samples[g * recipe.sampling.n :][:2]:
            shown.append({"images": images, "prompt": prompt, "response": sample.text, "reward": sample.reward, "truth": example.row.truth})
    return shown


def _thumbnail(pixels: np.ndarray) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((160, 160))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

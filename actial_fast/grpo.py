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
import io
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
from actial_fast.evaluation.evaluate import evaluate, reply_tokens
from actial_fast.model.policy import Policy, load_reference
from actial_fast.model.processor import Processor
from actial_fast.ops.ranges import named
from actial_fast.packing.batch import Sequence
from actial_fast.rollout.embedded import generate
from actial_fast.settings.recipe import GRPORecipe
from actial_fast.tasks.rewards import score
from actial_fast.train import checkpoint
from actial_fast.train.account import Account
from actial_fast.train.dist import World, clip_gradients, gathered, reduce_gradients, shard, world
from actial_fast.train.mismatch import Mismatch
from actial_fast.train.phases import Phases, Timer, measured_rate, untimed
from actial_fast.train.profile import Window
from actial_fast.train.rounds import Pass, Round, balanced, passes
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

    Raises ValueError for a recipe or data that cannot be used, Stopped after a signal (with a checkpoint written).
    """
    if recipe.prompts % recipe.minibatch:
        raise ValueError(f"minibatch: prompts ({recipe.prompts}) must be a multiple of it, got {recipe.minibatch}")
    longest = recipe.data.max_prompt_tokens + recipe.sampling.max_new_tokens
    if recipe.packing == "packed" and recipe.pack_tokens < longest:
        raise ValueError(f"pack_tokens: a prompt and its reply may have {longest} tokens and must fit, got {recipe.pack_tokens}")
    with world() as where:
        return _train(recipe, where)


def _train(recipe: GRPORecipe, where: World) -> Path:
    folder = stage_folder(recipe)
    start = begin(recipe, where)
    if done := checkpoint.final(folder):
        return done
    stage = open_stage(recipe, start, where, Processor.encode_prompt)
    policy, processor, optimizer, stream = stage.policy, stage.processor, stage.optimizer, stage.stream
    reference = None
    if (recipe.loss.beta > 0 or not recipe.skip_reference) and not policy.adapted:
        reference = load_reference(recipe.model, where.device, packed=recipe.packing == "packed")
        reference = shard(reference, where) if recipe.dist.fsdp else reference
    total = recipe.steps
    window = Window(recipe.profile, Path(recipe.run), recipe.name, where)
    with open_log(recipe, start, total, where) as log, graceful_stop() as asked, window:
        log.event("rate", ceiling := measured_rate(where.device), start)
        phases = Phases(where, ceiling["tflops"])
        account = Account(phases)
        if start == 0 and recipe.eval.sources:
            with phases("eval"):
                results = evaluate(policy, processor, recipe.eval, where, seed=recipe.seed)
            phases.add("eval", tokens=reply_tokens(results) / where.size)
            log.event("eval", results, 0)
            log.event("phases", phases.metrics(), 0)
        for step in range(start + 1, total + 1):
            window.at(step)
            rate = set_learning_rate(optimizer, recipe.optim, step, total)
            with phases("data"):
                examples = stream.next_batch(recipe.prompts)
            samples = _sample(policy, processor, examples, recipe, phases)
            with phases("plan"):
                minibatches = [[s for s in samples if s.minibatch == m] for m in range(recipe.prompts // recipe.minibatch)]
                counts = [where.total([sum(map(len, each)), len(each)]) for each in minibatches]
                kept = [balanced(_kept(each, recipe), lambda s: s.sequence, recipe, processor, where) for each in minibatches]
                ahead = _passes(policy, reference, processor, kept, recipe, where)
            kept = _log_probs(policy, reference, kept, ahead, recipe, phases)
            stats, norms, mismatch = torch.zeros(len(ops.STATS), device=where.device), [], Mismatch(where)
            with phases("update"):
                for minibatch, count, rounds in zip(kept, counts, ahead.updates, strict=True):
                    stats += _accumulate(policy, minibatch, count, rounds, recipe, where, mismatch)
                    reduce_gradients(parameters_of(policy), where)
                    norms.append(clip_gradients(parameters_of(policy), recipe.optim.clip_norm))
                    with named("optimizer"):
                        optimizer.step()
                        optimizer.zero_grad(set_to_none=True)
                norm = torch.stack(norms).mean()
                found = torch.cat([stats.double() / len(norms), norm.double()[None], mismatch.total()])
            with phases("plan"):
                account.passes(ahead.wanted)
                account.sampled(policy, [s.sequence for s in samples], recipe.sampling.n)
            figures = found.cpu().numpy()  # the first wait for the device
            times = phases.metrics()
            metrics = _metrics(samples, figures[: len(ops.STATS)], recipe, where, times["seconds"])
            if rejected := where.total([stream.rejected])[0]:
                metrics["rejected_rows"] = rejected
            seen = Mismatch.metrics(*figures[-3:].tolist())
            log.step(step, {**metrics, **seen, "lr": rate, "grad_norm": figures[len(ops.STATS)], **times})
            if recipe.log_rollouts and step in (1, (total + 1) // 2, total):
                log.event("rollouts", _shown(processor, examples, samples, recipe), step)
            last = step == total
            if recipe.eval.sources and (last or (recipe.eval.every and step % recipe.eval.every == 0)):
                with phases("eval"):
                    results = evaluate(policy, processor, recipe.eval, where, seed=recipe.seed)
                phases.add("eval", tokens=reply_tokens(results) / where.size)
                log.event("eval", results, step)
            stop = where.max(len(asked)) > 0
            if last or stop or (recipe.save.every and step % recipe.save.every == 0):
                state = {"position": stream.position}
                with phases("save"):
                    checkpoint.save(folder, step, policy, processor, optimizer, state, where, keep=recipe.save.keep, last=last)
            if phases.used:
                log.event("phases", phases.metrics(), step)
            if stop and not last:
                raise Stopped(f"{recipe.name}: stopped at step {step} of {total}; the same command goes on from here")
    stream.close()
    return folder / "final" / "model"


def _sample(policy: Policy, processor: Processor, examples: Many[Example], recipe: GRPORecipe, phase: Timer = untimed) -> list[Sample]:
    """n scored replies to each of this rank's prompts, in order, with their advantages."""
    n, weights = recipe.sampling.n, np.array([r.weight for r in recipe.rewards], np.float32)
    prompts = [example.encoded for example in examples]
    with contextlib.ExitStack() as whole:
        with phase("sync"):
            whole.enter_context(gathered(policy))
        with phase("sample"):
            groups = generate(
                policy,
                processor,
                prompts,
                n,
                keys=[(recipe.seed, example.position) for example in examples],
                temperature=recipe.sampling.temperature,
                max_new_tokens=recipe.sampling.max_new_tokens,
                batch_size=recipe.sampling.batch_size,
            )
    with phase("score"):
        replies = [reply for group in groups for reply in group]
        texts = [processor.decode(reply.ids) for reply in replies]
        rewards = score(texts, [example.row for example in examples for _ in range(n)], recipe.rewards)
        totals = np.where(np.isnan(rewards).all(1), np.nan, np.nansum(rewards * weights, axis=1))
        owner = torch.arange(len(examples)).repeat_interleave(n)
        advantages = ops.group_advantages(torch.from_numpy(totals), owner, recipe.advantages)
        steps = recipe.prompts // recipe.minibatch
        return [
            Sample(
                sequence=replace(prompts[i // n], trained=np.zeros(len(prompts[i // n]), bool)).extended(reply.ids),
                text=texts[i],
                sampled=reply.logprobs,
                rewards=rewards[i],
                reward=float(totals[i]),
                advantage=float(advantages[i]),
                minibatch=examples[i // n].position % steps,  # of the global batch, so that ranks do not change which prompts go together
                finished=reply.finished,
            )
            for i, reply in enumerate(replies)
        ]


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
    phase: Timer = untimed,
) -> list[list[Sample]]:
    """The samples with old log-probs where the policy will have moved (after the first mini-batch), and reference ones where beta asks."""
    minibatches = list(minibatches)
    if rounds.old is not None:
        late = minibatches[_on_policy(recipe) :]
        with phase("old"):
            old = iter(_forward_only(policy, [s.sequence for samples in late for s in samples], rounds.old, recipe))
        minibatches[_on_policy(recipe) :] = [[replace(s, old=next(old)) for s in samples] for samples in late]
    if rounds.ref is not None:
        with phase("reference"), contextlib.nullcontext() if reference is not None else policy.adapter_off():
            ref = iter(_forward_only(reference or policy, [s.sequence for each in minibatches for s in each], rounds.ref, recipe))
        minibatches = [[replace(s, ref=next(ref)) for s in samples] for samples in minibatches]
    return minibatches


@torch.no_grad()
def _forward_only(policy: Policy, sequences: list[Sequence], rounds: Iterator[Round], recipe: GRPORecipe) -> list[Tensor]:
    """Log-probs of each sequence's trained tokens, (n,) float32 each, on the device."""
    was_training = policy.training
    policy.eval()
    out: list[Tensor] = [torch.empty(0)] * len(sequences)
    for each in rounds:
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
    return out


def _accumulate(
    policy: Policy,
    samples: list[Sample],
    counts: Many[float],
    rounds: Iterator[Round],
    recipe: GRPORecipe,
    where: World,
    mismatch: Mismatch | None = None,
) -> Tensor:
    """Gradients of one global mini-batch's loss, from this rank's samples, which the rounds go over; returns the global statistics
    (len(ops.STATS),) float32, on the device.

    counts: tokens and replies of the global mini-batch, those that were left out included; mismatch: is told the log-probs of the policy
    that sampled, this one's where a sample has no old ones. With loss.top_entropy < 1 the threshold is that
    of each micro-batch, so the update depends on how these are cut.
    """
    spec, (tokens, replies) = recipe.loss, counts
    stats = torch.zeros(len(ops.STATS), device=where.device)
    for each in rounds:
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
            "sampler_logp": sampled if recipe.importance_correction else None,
            "token_weight": token_weight.to(where.device, non_blocking=True),
            "cu_seqlens": cu_seqlens,
        }
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
            mismatch.add(sampled[:real], own[:real])
    return where.sum(stats)


def _metrics(samples: list[Sample], stats: np.ndarray, recipe: GRPORecipe, where: World, seconds: float) -> dict[str, float]:
    """The step's figures over all ranks; means of tokens are over those that were computed, and absent where all were skipped."""
    named = dict(zip(ops.STATS, stats, strict=True))
    mean = {name: named[name] / named["tokens"] for name in ops.STATS if named["tokens"]}
    n = recipe.sampling.n
    groups = [samples[i : i + n] for i in range(0, len(samples), n)]
    local = [
        len(samples),
        np.nansum([s.reward for s in samples]),
        sum(map(len, samples)),
        sum(len(s.sequence) for s in samples),
        sum(s.finished for s in samples),
        sum(len({s.reward for s in group}) == 1 for group in groups),
        *(np.nansum([s.rewards[k] for s in samples]) for k in range(len(recipe.rewards))),
    ]
    count, reward, length, tokens, finished, flat, *parts = where.total(local)
    count = max(count, 1)
    return {
        "loss": named["loss"],
        "reward": reward / count,
        **{f"reward/{r.name}": part / count for r, part in zip(recipe.rewards, parts, strict=True)},
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

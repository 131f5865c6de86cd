"""Sampling from the trainer's own module: one prefill per group, its keys and values expanded to the group's replies.

Each token is drawn by inverting the distribution's cumulative sum at a uniform number that is fixed by (seed, prompt, reply, place), so
replies do not depend on how prompts are batched or spread over ranks, and a resumed run draws what the interrupted one would have.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from collections.abc import Sequence as Many

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from actial_fast.model.policy import Policy
from actial_fast.model.processor import Processor
from actial_fast.packing.batch import Sequence, collate
from actial_fast.rollout.protocol import UNWATCHED, Draw, Reply, Watch
from actial_fast.train.dist import gathered, recover

BATCH = 64  # prompts decoded together


class Embedded:
    """The engine that replies with the trainer's own module, whose weights are gathered while it is awake."""

    own = True

    def __init__(self, policy: Policy, processor: Processor):
        self.version = -1
        self._policy, self._processor = policy, processor
        self._held = contextlib.ExitStack()

    def wake(self) -> None:
        """Gather sharded weights."""
        self._held.enter_context(gathered(self._policy))

    def sync(self, version: int) -> None:
        """They are the trainer's own."""
        self.version = version

    def sleep(self) -> None:
        """Back to this rank's share of them."""
        self._held.close()

    def recover(self) -> None:
        """Whatever a pass that broke off left of the module's state and of its memory."""
        recover(self._policy)

    def close(self) -> None:
        """Nothing is left to end."""

    @torch.no_grad()
    def generate(self, prompts: Many[Sequence], draw: Draw, keys: Many[tuple[int, ...]], watch: Watch = UNWATCHED) -> list[list[Reply]]:
        """As the protocol says."""
        assert draw.temperature == 0 or len(keys) == len(prompts), "one key per prompt"
        policy, have, n = self._policy, watch.have or {}, draw.n
        was_training = policy.training
        policy.eval()
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # similar lengths together: little padding
        replies: list[list[Reply]] = [have.get(i, []) for i in range(len(prompts))]
        try:
            for start in range(0, len(order), BATCH):
                chosen = [i for i in order[start : start + BATCH] if i not in have]
                if not chosen:
                    continue
                uniforms = None
                if draw.temperature > 0:
                    rows = [np.random.default_rng(keys[i]).random((n, draw.max_new_tokens)) for i in chosen]
                    uniforms = torch.from_numpy(np.concatenate(rows)).to(policy.device)
                wanted = [prompts[i] for i in chosen]
                made = _decode(policy, self._processor, wanted, n, uniforms, draw.temperature, draw.max_new_tokens, watch.asked)
                if made is None:
                    break
                groups = {i: made[k * n : (k + 1) * n] for k, i in enumerate(chosen)}
                for i, group in groups.items():
                    replies[i] = group
                if watch.drawn:
                    watch.drawn(groups)
        finally:
            policy.train(was_training)
        return replies


def _decode(
    policy: Policy,
    processor: Processor,
    prompts: list[Sequence],
    n: int,
    uniforms: Tensor | None,
    temperature: float,
    limit: int,
    asked: Callable[[], bool],
) -> list[Reply] | None:
    """n replies to each of the prompts, one behind the other; None once `asked`."""
    device = policy.device
    batch = collate(prompts, processor.pad, processor.store, left=True).to(device)
    stop = torch.tensor(processor.stop_tokens, device=device)
    banned = torch.tensor(processor.banned_tokens, device=device)
    cache = DynamicCache(config=policy.base.config.get_text_config())
    logits, cache = policy({**batch.model_inputs(), "past_key_values": cache, "use_cache": True}, _last_logits)
    cache.batch_repeat_interleave(n)
    logits = logits.repeat_interleave(n, 0)
    mask = batch.attention_mask.repeat_interleave(n, 0)
    position = (batch.position_ids.amax((0, 2)) + 1).repeat_interleave(n, 0)

    rows = len(prompts) * n
    tokens = torch.full((rows, limit), processor.pad, dtype=torch.int64, device=device)
    logprobs = torch.zeros((rows, limit), dtype=torch.float32, device=device)
    lengths = torch.full((rows,), limit, dtype=torch.int64, device=device)
    finished = torch.zeros(rows, dtype=torch.bool, device=device)
    alive = torch.arange(rows, device=device)  # rows still in the batch; finished ones leave it once they are half of it
    for step in range(limit):
        if asked():
            return None
        token, logp = _draw(logits, None if uniforms is None else uniforms[alive, step], temperature, banned)
        running = ~finished[alive]
        tokens[alive, step] = torch.where(running, token, processor.pad)
        logprobs[alive, step] = torch.where(running, logp, 0.0)
        ended = running & torch.isin(token, stop)
        lengths[alive[ended]] = step + 1
        finished[alive[ended]] = True
        keep = (~finished[alive]).nonzero().squeeze(1)
        if len(keep) == 0 or step + 1 == limit:
            break
        if 2 * len(keep) <= len(alive):
            cache.batch_select_indices(keep)
            alive, mask, position, token = alive[keep], mask[keep], position[keep], token[keep]
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], 1)
        inputs = {
            "input_ids": token[:, None],
            "attention_mask": mask,
            "position_ids": position[None, :, None].expand(3, -1, -1),
            "past_key_values": cache,
            "use_cache": True,
        }
        logits, cache = policy(inputs, _last_logits)
        position = position + 1
    drawn = zip(tokens.cpu().numpy(), logprobs.cpu().numpy(), lengths.tolist(), finished.tolist(), strict=True)
    return [Reply(ids[:length], logp[:length], ended) for ids, logp, length, ended in drawn]


def _last_logits(outputs: BaseModelOutputWithPast, weight: Tensor) -> tuple[Tensor, DynamicCache]:
    return (outputs.last_hidden_state[:, -1] @ weight.T).float(), outputs.past_key_values


def _draw(logits: Tensor, uniform: Tensor | None, temperature: float, banned: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row and its log-prob: logits (R, V) float32, uniform (R,) float64 or None for greedy -> (R,) int64, (R,) float32."""
    scaled = logits / (temperature or 1.0)
    logp = scaled.log_softmax(-1)
    allowed = logp.index_fill(-1, banned, -torch.inf)
    if uniform is None:
        token = allowed.argmax(-1)
    else:
        total = allowed.double().exp().cumsum(-1)  # float64: a float32 sum over 150,000 tokens would lose the rare ones
        token = torch.searchsorted(total, (uniform * total[:, -1])[:, None], right=True).squeeze(1)
        token = token.clamp(max=logits.shape[1] - 1)
    return token, logp.gather(-1, token[:, None]).squeeze(1)

"""Sampled replies on their way to the update, and what a step tells of them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from actial_fast import ops
from actial_fast.data.sources.stream import Example
from actial_fast.data.sources.task import replies_of
from actial_fast.packing.batch import Sequence
from actial_fast.packing.images import ImageStore
from actial_fast.settings.recipe import GRPORecipe
from actial_fast.train.dist import World


@dataclass(frozen=True)
class Sample:
    """One reply, ready for the update.

    sequence: prompt and reply, of which the n tokens are trained that the model drew; sampled (n,) float32, the sampler's log-probs;
    rewards (k,) float32, one a reward function, and the fine of its length where there is one; reward: their weighted sum, NaN where none
    could score it; minibatch: which optimizer step it belongs to; finished: False where the length limit cut it; old, ref (n,) float32, on
    the device: log-probs under the policy before the update and under the reference, or None where not needed.
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


def figures(samples: Many[Sample], stats: np.ndarray, recipe: GRPORecipe, where: World, seconds: float) -> dict[str, float]:
    """The step's figures over all ranks, from this rank's samples and the global statistics (len(ops.STATS),). Every rank calls.

    Means of tokens are over those that were computed, and absent where all were skipped; means of rewards are over the replies that were
    scored, NaN where none was.
    """
    named = dict(zip(ops.STATS, stats, strict=True))
    mean = {name: named[name] / named["tokens"] for name in ops.STATS if named["tokens"]}
    names = [r.name for r in recipe.rewards] + ["overlong"] * bool(recipe.overlong.buffer)
    n, terms = recipe.sampling.n, len(names)
    groups = [samples[i : i + n] for i in range(0, len(samples), n)]
    rewards = np.array([s.rewards for s in samples], np.float64).reshape(-1, terms)
    totals = np.array([s.reward for s in samples], np.float64)
    local = [
        len(samples),
        sum(map(len, samples)),
        sum(len(s.sequence) for s in samples),
        sum(s.finished for s in samples),
        sum(len({s.reward for s in group if not np.isnan(s.reward)}) < 2 for group in groups),
        (~np.isnan(totals)).sum(),
        np.nansum(totals),
        *(~np.isnan(rewards)).sum(0),
        *np.nansum(rewards, 0),
    ]
    count, length, tokens, finished, flat, scored, reward, *parts = where.total(local)
    known, sums = parts[:terms], parts[terms:]
    count = max(count, 1)
    return {
        "loss": named["loss"],
        "reward": reward / scored if scored else np.nan,
        **{f"reward/{name}": sums[k] / known[k] if known[k] else np.nan for k, name in enumerate(names)},
        "unscored": 1 - scored / count,
        "response_length": length / count,
        "finished": finished / count,
        "zero_variance_groups": flat * n / count,
        **{name: mean[name] for name in ("kl", "entropy", "ratio", *(["importance"] * (recipe.importance_correction == "on"))) if mean},
        **({"clip_fraction": mean["clip_low"] + mean["clip_high"]} if mean else {}),
        "tokens_per_s": tokens / seconds,
    }


def shown(store: ImageStore, examples: Many[Example], samples: Many[Sample], recipe: GRPORecipe) -> list[dict[str, Any]]:
    """Rollouts for the report: the first replies of the first groups, with their images as small PNGs."""
    found = []
    for g, example in enumerate(examples[: recipe.log_rollouts]):
        images = [_thumbnail(store.pixels(key)) for key in example.encoded.images]
        prompt = "\n".join(turn.content for turn in example.row.prompt if turn.role != "system")
        for sample in samples[g * recipe.sampling.n :][:2]:
            said = "\n".join(replies_of(sample.text))
            told = {"images": images, "prompt": prompt, "response": said, "reward": sample.reward, "truth": example.row.truth}
            found.append(told | {"kind": example.row.kind})
    return found


def _thumbnail(pixels: np.ndarray) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((160, 160))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

"""The least FLOPs of an update's samples: `actial_fast.model.flops` has the formulas."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from actial_fast.grpo import Sample
from actial_fast.model import flops
from actial_fast.model.flops import Work
from actial_fast.packing.batch import Sequence


def work_of(samples: Iterable[Sample], image_token: int) -> Work:
    """The least rows, pairs, predictions and images of one pass over the samples, with images at the `image_token`s.

    As a tree: a row is computed once, whichever sequences begin with it and however late they part, and so are its predictions. No
    packing does less; one common beginning a group, which our batches have, does more wherever replies begin alike or prompts of
    different images do.
    """
    sequences = [s.sequence for s in samples]
    named: dict[str, int] = {}
    paths = sorted(((_inputs(s, image_token, named), s.trained[1:]) for s in sequences), key=lambda path: path[0].tolist())
    rows = pairs = predicted = 0
    last, asked = np.empty(0, np.int64), np.empty(0, bool)
    for inputs, predicts in paths:  # neighbours share the most
        shortest = min(len(last), len(inputs))
        same = last[:shortest] == inputs[:shortest]
        common = shortest if same.all() else int(same.argmin())
        before, asked = asked[:common], predicts.copy()
        asked[:common] |= before
        rows += len(inputs) - common
        pairs += (len(inputs) * (len(inputs) + 1) - common * (common + 1)) // 2
        predicted += int(asked.sum() - before.sum())
        last = inputs
    return replace(flops.work_of([(0, sequences)]), rows=rows, pairs=pairs, predicted=predicted)


def _inputs(sequence: Sequence, image_token: int, named: dict[str, int]) -> np.ndarray:
    """Its tokens that are inputs, image tokens in their places as negative numbers, one for each different image."""
    inputs = sequence.ids[:-1].copy()
    images = inputs == image_token
    starts = images & ~np.concatenate([[False], images[:-1]])
    numbers = np.array([named.setdefault(key, -1 - len(named)) for key in sequence.images], np.int64)
    inputs[images] = numbers[np.cumsum(starts)[images] - 1]
    return inputs

"""The order in which a mixture draws from its sources: the exact shares, at every moment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

MAX_PERIOD = 100_000


def interleave(weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The periodic order in which sources are drawn, by error diffusion.

    After any number p of draws, source k has been drawn p * share_k times to within less than one; any whole number of periods holds its
    exact share (0.9 : 0.1 has period 10, so every window of 1,000 holds 900 and 100). A draw of source k becomes eligible when its share of
    the past is used up and is due before its share is one behind; the eligible draw that is due first goes next, which always meets every
    due time because the shares add up to one (earliest deadline first on unit jobs).

    Returns (pattern, before, counts): pattern int16 (P,), the source at each place; before int64 (P,), how often that source came earlier
    in the period; counts int64 (K,), draws of each source in a period. Shares are exact for weights that are ratios of integers up to
    10,000 with a common period up to 100,000, and otherwise rounded to 1/100,000. Raises ValueError for weights that are not positive and
    finite, or so small a share that it rounds to nothing.
    """
    if not weights:
        raise ValueError("a mixture needs at least one source")
    for k, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"source {k} has weight {weight}; weights are positive numbers (leave a source out instead of giving it 0)")
    parts = [Fraction(weight).limit_denominator(10_000) or Fraction(weight) for weight in weights]
    shares = [part / sum(parts) for part in parts]
    period = math.lcm(*(share.denominator for share in shares))
    if period > MAX_PERIOD:
        period = MAX_PERIOD
        counts = [math.floor(share * period) for share in shares]
        leftovers = sorted(range(len(shares)), key=lambda k: counts[k] - shares[k] * period)
        for k in leftovers[: period - sum(counts)]:  # largest remainders
            counts[k] += 1
    else:
        counts = [int(share * period) for share in shares]
    for k, count in enumerate(counts):
        if not count:
            raise ValueError(f"source {k} has weight {weights[k]}, a share below 1 in {MAX_PERIOD} draws; raise it or leave the source out")
    pattern, before, drawn = np.empty(period, np.int16), np.empty(period, np.int64), [0] * len(counts)
    for p in range(period):
        ready = [k for k, count in enumerate(counts) if drawn[k] < count and drawn[k] * period <= p * count]
        k = min(ready, key=lambda k: (-(-(drawn[k] + 1) * period // counts[k]), k))
        pattern[p], before[p] = k, drawn[k]
        drawn[k] += 1
    return pattern, before, np.array(counts, np.int64)

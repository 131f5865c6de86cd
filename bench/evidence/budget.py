"""Issue budgets: whether a kernel that is to wait for memory alone can be fed its instructions as fast as memory feeds it bytes.

A multiprocessor issues four warp instructions a cycle, each for 32 threads. With i instructions for every 16 bytes that a thread exchanges
with HBM it can move at most 4 x 32 x 16 / i = 2048 / i bytes a cycle, against the share of the card's bandwidth that one multiprocessor has
(below). `SUSTAINED` of the issue slots is what such loops reach; the rest goes to waits. Above 1 a kernel is memory-bound.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from bench.evidence import sass
from bench.evidence.sass import Code

SUSTAINED = 0.75
TOUCHED_LIMIT = 1.02  # of the least bytes, of a streaming kernel in the ledger
# card: compute capability, and bytes of HBM a cycle for each multiprocessor, by the vendor's bandwidth and the clock behind its bf16 peak
CARDS = {
    "A100 80GB SXM": (80, 2.039e12 / 108 / 1.41e9),
    "H100 SXM": (90, 3.35e12 / 132 / 1.83e9),
    "H200 SXM": (90, 4.8e12 / 132 / 1.83e9),
    "B200": (100, 8.0e12 / 148 / 1.86e9),
}
TWO_SWEEPS = {"grpo_logits_kernel"}  # their second sweep reads what the first left in L2


@dataclass(frozen=True)
class Sweep:
    """One loop of a kernel, or its way from start to end where it has none: instructions, and 16 bytes loaded and stored by each thread."""

    instructions: int
    loads: float
    stores: float


def width(name: str) -> int:
    """Bytes that a global load or store of this name moves for a thread; 0 for other instructions."""
    opcode, *modifiers = name.split(".")
    bits = [int(size[1]) for one in modifiers if (size := re.fullmatch(r"[US]?(8|16|64|128|256)", one))]
    return (bits[0] // 8 if bits else 4) if opcode in ("LDG", "STG") else 0


def sweeps(code: Code) -> list[Sweep]:
    """The innermost loops with the widest accesses, in the order of the program; the program where no loop has any. Narrower accesses,
    numbers of a row among them, are not counted."""
    widest = max(width(one.name) for one in code)
    wide = [i for i, one in enumerate(code) if width(one.name) == widest]
    ways = sorted(sass.loops(code, wide), key=min)
    innermost = [way for way in ways if not any(other is not way and set(other) < set(way) for other in ways)]
    return [_sweep([code[i] for i in way], widest) for way in innermost or [sass.straight(code, wide[0])]]


def _sweep(code: Code, widest: int) -> Sweep:
    def moved(name: str) -> float:
        return sum(widest / 16 for one in code if one.name.startswith(name) and width(one.name) == widest)

    return Sweep(len(code), moved("LDG"), moved("STG"))


def instructions(kernel: str, code: Code) -> float:
    """Instructions for every 16 bytes of HBM traffic. Of several loops the dearest counts, unless both are sweeps over the same row."""
    found = [one for one in sweeps(code) if one.loads + one.stores]
    assert found, f"{kernel} has no global load or store"
    if kernel in TWO_SWEEPS and (reading := [one for one in found if one.loads and not one.stores]):
        first, second = reading[0], max((one for one in found if one.loads and one.stores), key=lambda one: one.instructions, default=None)
        if second is not None:
            return (first.instructions / first.loads + second.instructions / second.stores) / 2
    return max(one.instructions / (one.loads + one.stores) for one in found)


def share(card: str, per_16_bytes: float) -> float:
    """What the instructions allow of the card's bandwidth; above 1 memory is what the kernel waits for."""
    return SUSTAINED * 2048 / per_16_bytes / CARDS[card][1]

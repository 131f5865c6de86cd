"""Inner loops and epilogues of the products: what surrounds the matrix instructions, and the cycles that it takes in the model.

A product's warps multiply in an inner loop and finish a tile of accumulators in an epilogue. In the inner loop other instructions are free
as long as they fit beside the matrix instructions: `issue share` is the issue slots that they take over the cycles that the tensor cores
need. The epilogue is paid in full where the same warps do both, since then nothing multiplies.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from bench.evidence import cycles, sass
from bench.evidence.sass import Code

STORE = re.compile(r"STG\b|UTMASTG|UTMAREDG")
FLOP_PER_CYCLE = {80: 2048, 86: 1024, 89: 1024, 90: 4096, 100: 8192, 103: 8192, 120: 1024}  # bf16, dense, of one multiprocessor


@dataclass(frozen=True)
class Product:
    """One product as compiled. All counts are of one warp; cycles are the model's, tensor_cycles those that the matrix instructions of the
    whole block take at the chip's peak rate."""

    kernel: str
    arch: int
    warps: int
    registers: int
    spills: int
    loop: int  # instructions of an iteration
    matrix: int  # matrix instructions among them
    tensor_cycles: float
    loop_cycles: int
    issue_share: float
    barriers: int
    in_flight: int  # groups of matrix instructions that an iteration leaves unfinished; -1: it waits for none
    epilogue: int
    epilogue_cycles: int
    epilogue_stalls: int
    epilogue_barriers: int
    per_element: float  # instructions of the epilogue for each accumulator of a thread


def measure(
    name: str, arch: int, warps: int, registers: int, spills: int, code: Code, tile: tuple[int, int, int], specialized: bool = False
) -> Product:
    """Reads a compiled product whose block of `warps` computes a tile of (rows, columns, inner). specialized: other warps than these
    multiply, one a scheduler."""
    matrix = [i for i, one in enumerate(code) if one.is_matrix]
    inner = min(sass.loops(code, matrix), key=lambda one: (-sum(code[i].is_matrix for i in one), len(one)))
    loop = [code[i] for i in inner]
    outer = _epilogue(code, inner)
    epilogue = [code[i] for i in outer if i not in set(inner)]
    per_scheduler = max(1, warps // 4)
    multiplying = 1 if specialized else per_scheduler
    tensor = _tensor_flop(loop, warps, tile) / FLOP_PER_CYCLE[arch]
    waits = [int(found[1], 0) for one in loop if one.opcode == "WARPGROUP" and (found := re.search(r"gsb0, (\w+)", one.operands))]
    return Product(
        kernel=name,
        arch=arch,
        warps=warps,
        registers=registers,
        spills=spills,
        loop=len(loop),
        matrix=sum(one.is_matrix for one in loop),
        tensor_cycles=tensor,
        loop_cycles=cycles.simulate(loop, multiplying),
        issue_share=len(loop) * multiplying / tensor,
        barriers=sum(one.opcode == "BAR" for one in loop),
        in_flight=min(waits, default=-1),
        epilogue=len(epilogue),
        epilogue_cycles=cycles.simulate(epilogue, per_scheduler),
        epilogue_stalls=sum(one.stall for one in epilogue),
        epilogue_barriers=sum(one.opcode == "BAR" for one in epilogue),
        per_element=len(epilogue) / (tile[0] * tile[1] / (32 * warps)),
    )


def _tensor_flop(loop: Code, warps: int, tile: tuple[int, int, int]) -> float:
    """FLOP of an iteration in the whole block: by the shapes in the instructions' names, or the tile's where one warp issues for all."""
    flop = 0.0
    for one in loop:
        if group := re.match(r"HGMMA\.64x(\d+)x(\d+)", one.name):
            flop += 2.0 * 64 * int(group[1]) * int(group[2]) * warps / 4
        elif warp := re.match(r"HMMA\.(16)(8)(8|16)\b", one.name):
            flop += 2.0 * 16 * 8 * int(warp[3]) * warps
    return flop or 2.0 * tile[0] * tile[1] * tile[2]


def _epilogue(code: Code, inner: Sequence[int]) -> list[int]:
    """The shortest way from the inner loop by a store of results and back: every store that a tile always makes lies on it. Where results
    stay in registers for another tile, by an exponential; where a block has one tile, by a store to the program's end."""
    last = max(i for i in inner if code[i].is_matrix)
    outside = [i for i in range(len(code)) if i not in set(inner)]
    stores = [i for i in outside if STORE.match(code[i].name)]
    for marks in (stores, [i for i in outside if code[i].name.startswith("MUFU.EX2")]):
        if ways := [way for mark in marks if (way := sass.cycle(code, last, mark))]:
            return min(ways, key=len)
    # other warps than those that multiply store the results, or nothing follows the tile
    return min(sass.loops(code, stores) or [sass.straight(code, last)], key=len)

"""A model of how long a stretch of machine code takes: warps that share a scheduler issue in order, control fields obeyed.

Each cycle the scheduler issues one instruction of one warp, in turns: one whose stall has passed, whose scoreboards are clear and whose
pipe is free. A barrier holds a warp until all modelled warps have come. What is not modelled: cache misses beyond the latencies below, bank
conflicts, instruction fetch, other blocks on the multiprocessor. Latencies are rounded figures of published microbenchmarks of Hopper
("Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via Microbenchmarking", arXiv 2402.13499): trust ratios between versions of
one kernel, not the number of cycles.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench.evidence.sass import Instruction

BARRIER, DEFAULT, READ = 20, 10, 12  # cycles: after the last warp has come; a result in general; until operands are read
LATENCY = {
    **dict.fromkeys(("MUFU", "I2F", "F2I", "I2FP"), 18),
    **dict.fromkeys(("SHFL",), 24),
    **dict.fromkeys(("LDS", "STS"), 28),
    **dict.fromkeys(("LDSM", "STSM", "S2R", "REDUX", "UTMASTG", "SYNCS", "STG", "LDT", "LDTM"), 30),
    **dict.fromkeys(("R2UR", "ELECT", "ULDC"), 12),
    **dict.fromkeys(("UTMALDG", "UTMACMDFLUSH", "LDCU"), 20),
    **dict.fromkeys(("FENCE", "MEMBAR", "LDC"), 40),
    "LDG": 600,
    "DEPBAR": 2,
}
# cycles for which an instruction of a warp keeps its pipe, by (pipe, cycles)
_ALU = ("FSEL FSETP FMNMX FMNMX3 ISETP LOP3 SEL IADD3 IADD SHF F2FP PRMT VIMNMX VIADD LEA PLOP3 IMNMX IABS").split()
PIPES = {
    **dict.fromkeys(_ALU, ("alu", 2)),
    **dict.fromkeys(("FMUL", "FADD", "FFMA", "IMAD", "FMUL2", "FADD2", "FFMA2"), ("fma", 1)),
    **dict.fromkeys(("MUFU", "I2F", "F2I"), ("special", 8)),
    "SHFL": ("memory", 2),
    **dict.fromkeys(("LDS", "STS", "LDG", "STG"), ("memory", 4)),
    **dict.fromkeys(("LDSM", "STSM"), ("memory", 8)),
}


def simulate(code: Sequence[Instruction], warps: int) -> int:
    """Cycles until `warps` warps of one scheduler have issued a straight stretch of code and their last stalls have passed."""
    place, ready, waiting = [0] * warps, [0] * warps, [False] * warps
    boards = [[0] * 6 for _ in range(warps)]
    busy = {pipe: 0 for pipe, _ in PIPES.values()}
    cycle, last = 0, -1
    while any(at < len(code) for at in place):
        earliest, chosen = None, None
        for turn in range(warps):
            warp = (last + 1 + turn) % warps
            if place[warp] == len(code) or waiting[warp]:
                continue
            one = code[place[warp]]
            start = max([ready[warp], *(boards[warp][i] for i in one.waits)])
            if pipe := PIPES.get(one.opcode):
                start = max(start, busy[pipe[0]])
            if start <= cycle:
                earliest, chosen = cycle, warp
                break
            if earliest is None or start < earliest:
                earliest, chosen = start, warp
        assert earliest is not None and chosen is not None, "a barrier that no warp is left to reach"
        cycle, last, one = earliest, chosen, code[place[chosen]]
        if pipe := PIPES.get(one.opcode):
            busy[pipe[0]] = cycle + pipe[1]
        if one.writes is not None:
            boards[chosen][one.writes] = cycle + LATENCY.get(one.opcode, DEFAULT)
        if one.reads is not None:
            boards[chosen][one.reads] = max(boards[chosen][one.reads], cycle + READ)
        ready[chosen] = cycle + max(one.stall, 1)
        place[chosen] += 1
        if one.opcode == "BAR":
            waiting[chosen] = True
            if all(waiting):
                waiting = [False] * warps
                ready = [cycle + BARRIER] * warps
        cycle += 1
    return max([cycle, *ready])

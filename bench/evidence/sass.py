"""Machine code read back: instructions with their control fields, and the paths that a warp takes through them.

nvdisasm prints each 16-byte instruction with its encoding, whose upper bits say how it is scheduled (Volta to Blackwell alike): the cycles
until the warp's next instruction may issue, the scoreboards that it sets when it has written its result or read its operands, and those
that it waits for. The layout of these bits is not published; it is what open assemblers use (CuAssembler, TuringAs).

A loop is taken to be the shortest way from an instruction back to itself: what a condition can leave out (a tile in which the target
stands, a wait that was not over) is left out.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import triton

MATRIX = re.compile(r"HMMA\b|HGMMA\b|UTC\w*MMA\b")


@dataclass(frozen=True)
class Instruction:
    """One instruction. stall: cycles until the warp's next; writes, reads: the scoreboard set when the result is there or the operands are
    read, or None; waits: scoreboards that must be clear; following: the indices of what may come next."""

    address: int
    predicate: str  # "", or as in "@!P3"
    name: str  # with its modifiers: HGMMA.64x256x16.F32.BF16
    operands: str
    stall: int
    writes: int | None
    reads: int | None
    waits: tuple[int, ...]
    following: tuple[int, ...]

    @property
    def opcode(self) -> str:
        return self.name.split(".")[0]

    @property
    def is_matrix(self) -> bool:
        return bool(MATRIX.match(self.name))


Code = list[Instruction]


def disassemble(cubin: bytes) -> Code:
    """The instructions of a cubin with one kernel, in order, without the padding behind its end."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = (triton.knobs.nvidia.nvdisasm.path, "-hex", "-c", file.name)
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    found: list[tuple[re.Match[str], int]] = []
    labels: dict[str, int] = {}
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(found)
        if instruction := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/", line):
            control = re.match(r"\s*/\* 0x([0-9a-f]{16}) \*/", below)
            assert control, f"nvdisasm prints encodings in another way now: {below}"
            found.append((instruction, int(control[1], 16) >> 41))
    while found and _is_padding(found, labels):
        found.pop()
    assert found, "nvdisasm prints instructions in another way now"
    return [_instruction(i, *one, labels, len(found)) for i, one in enumerate(found)]


def _is_padding(found: Sequence[tuple[re.Match[str], int]], labels: dict[str, int]) -> bool:
    """Whether the last instruction stands behind the program's end: a NOP, or a branch to itself."""
    label = re.search(r"`\((\.L_x_\d+)\)", found[-1][0][4])
    return found[-1][0][3] == "NOP" or (label is not None and labels[label[1]] == len(found) - 1)


def _instruction(index: int, match: re.Match[str], control: int, labels: dict[str, int], end: int) -> Instruction:
    writes, reads = control >> 5 & 7, control >> 8 & 7
    following: list[int] = [] if match[3] == "EXIT" and not match[2] else [index + 1]
    if match[3].startswith("BRA") and (label := re.search(r"`\((\.L_x_\d+)\)", match[4])):
        conditional = bool(match[2]) or bool(re.match(r"!?U?P\d", match[4]))
        following = [labels[label[1]], *(following if conditional else [])]
    return Instruction(
        address=int(match[1], 16),
        predicate=match[2] or "",
        name=match[3],
        operands=match[4],
        stall=control & 15,
        writes=None if writes == 7 else writes,
        reads=None if reads == 7 else reads,
        waits=tuple(i for i in range(6) if control >> 11 + i & 1),
        following=tuple(i for i in following if i < end),
    )


def _tree(edges: Sequence[Sequence[int]], root: int) -> dict[int, int]:
    """Node -> the node before it on a shortest way from root; root itself only where a way leads back to it."""
    before: dict[int, int] = {}
    queue = deque([root])
    while queue:
        here = queue.popleft()
        for there in edges[here]:
            if there not in before:
                before[there] = here
                if there != root:
                    queue.append(there)
    return before


def _way(before: dict[int, int], root: int, goal: int) -> list[int]:
    """The nodes from root to goal, goal left out."""
    way = [before[goal]]
    while way[-1] != root:
        way.append(before[way[-1]])
    return way[::-1]


def cycle(code: Code, through: int, also: int | None = None) -> list[int] | None:
    """The shortest way from instruction `through` (and by way of `also`) back to it, as indices; None where there is no such way."""
    edges = [one.following for one in code]
    forth = _tree(edges, through)
    if also is None or also == through:
        return _way(forth, through, through) if through in forth else None
    back = _tree(edges, also)
    return _way(forth, through, also) + _way(back, also, through) if also in forth and through in back else None


def loops(code: Code, members: Sequence[int]) -> list[list[int]]:
    """The different shortest cycles through these instructions; members that are in no cycle are passed over."""
    found: list[list[int]] = []
    for member in members:
        if not any(member in one for one in found) and (one := cycle(code, member)):
            found.append(one)
    return found


def straight(code: Code, through: int) -> list[int]:
    """The shortest way from the program's start by instruction `through` to its end."""
    edges = [one.following for one in code]
    ends = [i for i, one in enumerate(code) if one.name == "EXIT" and not one.predicate]
    begin, rest = _tree(edges, 0), _tree(edges, through)
    ways = [[*_way(rest, through, end), end] for end in ends if end in rest]
    return (_way(begin, 0, through) if through else []) + min(ways, key=len)

"""What one compiled kernel takes and consists of: ptxas's figures, the SASS, and what Triton's IR says it multiplies, loads and stores."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

import triton

from bench.kernels.compile_only import CHIPS, Launch

ENCODINGS = {90: "SM90a", 100: "SM100a", 103: "SM100a", 120: "SM120a"}
"""Whose instructions nvdisasm reads, where that is not SM and the number. sm_103 has sm_100's, by which name Triton 3.6's tool knows it."""
BITS = {"i1": 8, "i8": 8, "i16": 16, "i32": 32, "i64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64}


@dataclass(frozen=True)
class Access:
    """One block that the kernel loads from or stores to global memory."""

    kind: str  # load | store
    descriptor: bool  # through a tensor descriptor: TMA from sm_90 on
    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * BITS[self.dtype] // 8


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes and consists of. shared: bytes a block; instructions: counts of SASS mnemonics in the program text."""

    kernel: str
    kind: str | None
    arch: int
    case: str
    dtype: str
    constants: dict[str, str]
    grid: tuple[int, ...]
    warps: int
    stages: int
    registers: int
    stack: int
    shared: int
    tensor_memory: int
    largest_tensor: int
    dots: tuple[tuple[str, str], ...]  # operand dtype and input precision of every tl.dot
    accesses: tuple[Access, ...]
    instructions: dict[str, int]

    @property
    def name(self) -> str:
        return f"{self.kernel} sm_{self.arch} ({self.case}, {self.dtype})"

    @property
    def occupancy(self) -> float:
        """Resident warps over the chip's limit, from registers, shared and tensor memory, warps and blocks."""
        chip = CHIPS[self.arch]
        per_warp = _round_up(self.registers * 32, 256)
        shared = _round_up(self.shared + 1024, 128)  # the system keeps 1 KiB of every block
        blocks = [
            chip.registers // 4 // per_warp * 4 // self.warps,  # warps are dealt to 4 partitions with a register file each
            chip.shared_per_sm * 1024 // shared,
            chip.warps // self.warps,
            chip.blocks,
        ]
        if self.tensor_memory:
            blocks.append(chip.tensor_memory // self.tensor_memory)
        return min(blocks) * self.warps / chip.warps

    def count(self, pattern: str) -> int:
        """Instructions whose mnemonic begins like the regular expression."""
        return sum(count for name, count in self.instructions.items() if re.match(pattern, name))

    def sixteen_bytes(self, kind: str) -> int:
        """16-byte global loads or stores in the program text; one of 32 bytes counts as two."""
        name = "LDG(STS)?" if kind == "load" else "STG"
        return self.count(rf"{name}\.(\w+\.)*128") + 2 * self.count(rf"{name}\.(\w+\.)*256")

    def tma(self, kind: str) -> int:
        return self.count(r"UTMALDG|UBLKCP" if kind == "load" else r"UTMASTG|UTMAREDG|UBLKCP")


def read(launches: Sequence[tuple[str, str, Launch]], arch: int) -> list[Usage]:
    """The usage of compiled launches, each with its case and dtype."""
    counts = _instructions([launch.compiled.asm["cubin"] for *_, launch in launches], arch)
    return [_usage(launch, arch, case, dtype, found) for (case, dtype, launch), found in zip(launches, counts, strict=True)]


def taken(cubin: bytes) -> dict[str, int]:
    """Of a cubin with one kernel: REG registers a thread; STACK, LOCAL, SHARED bytes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = _tool(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", told)}
    assert len(found) == 4, f"cuobjdump -res-usage told something else: {told}"
    return found


def _usage(launch: Launch, arch: int, case: str, dtype: str, instructions: dict[str, int]) -> Usage:
    compiled = launch.compiled
    found = taken(compiled.asm["cubin"])
    static = found["SHARED"] - (1024 if arch >= 90 else 0)  # from sm_90 on it includes the system's 1 KiB
    threads = re.search(r"\.reqntid\s+(\d+)", compiled.asm["ptx"])  # num_warps leaves out the warps that specialisation adds
    kind = launch.function.fn.__globals__.get("KIND", {}).get(launch.function.fn.__name__)
    return Usage(
        kernel=launch.function.fn.__name__,
        kind=kind,
        arch=arch,
        case=case,
        dtype=dtype,
        grid=launch.grid,
        largest_tensor=launch.largest_tensor,
        constants={_argument(compiled.src.fn.arg_names, path): str(value) for path, value in compiled.src.constants.items()},
        warps=int(threads[1]) // 32,
        stages=compiled.metadata.num_stages,
        registers=found["REG"],
        stack=found["STACK"] + found["LOCAL"],
        shared=compiled.metadata.shared + max(static, 0),
        tensor_memory=compiled.metadata.tmem_size or 0,
        dots=tuple(_dots(compiled.asm["ttir"])),
        accesses=tuple(_accesses(compiled.asm["ttir"])),
        instructions=instructions,
    )


def _instructions(cubins: Sequence[bytes], arch: int) -> list[dict[str, int]]:
    """How often each SASS mnemonic stands in each cubin. One nvdisasm reads the code of all: most of its time is its start."""
    codes = [_code(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        sass = _tool(triton.knobs.nvidia.nvdisasm.path, "-ndf", "-b", ENCODINGS.get(arch, f"SM{arch}"), file.name) if codes else ""
    lines = re.findall(r"^\s*/\*([0-9a-f]+)\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE)
    assert 16 * len(lines) == sum(map(len, codes)), "nvdisasm prints instructions of 16 bytes in another way now"
    counts, ends = [Counter() for _ in codes], list(accumulate(map(len, codes)))
    for offset, mnemonic in lines:
        counts[bisect_right(ends, int(offset, 16))][mnemonic] += 1
    return [dict(count) for count in counts]


def _code(cubin: bytes) -> bytes:
    """The machine code in a cubin, an ELF file: its sections .text.*."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, number, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<I20xQQ", cubin, table + i * size) for i in range(number)]  # name, offset, length
    named = [(cubin[sections[names][1] + name :], cubin[offset : offset + length]) for name, offset, length in sections]
    return b"".join(code for name, code in named if name.startswith(b".text."))


def _argument(names: list[str], path: tuple[int, ...]) -> str:
    return ".".join([names[path[0]], *map(str, path[1:])])  # an entry of a tuple by its index


def _accesses(ttir: str) -> Iterator[Access]:
    for line in ttir.splitlines():
        operation = re.search(r"\btt\.(descriptor_)?(load|store)\b", line)
        if not operation:
            continue
        block = r"tensor<([\dx]+)x(\w+)>" if operation[1] else r"tensor<([\dx]+)x!tt\.ptr<(\w+)>>"
        if found := re.findall(block, line):  # none: a scalar
            shape, dtype = found[-1]
            yield Access(operation[2], bool(operation[1]), tuple(map(int, shape.split("x"))), dtype)


def _dots(ttir: str) -> Iterator[tuple[str, str]]:
    for line in ttir.splitlines():
        if found := re.search(r"\btt\.dot(?:_scaled)?\b.* tensor<[\dx]+x(\w+)> \* ", line):
            precision = re.search(r"inputPrecision = (\w+)", line)
            yield found[1], precision[1] if precision else "ieee"


def _tool(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step

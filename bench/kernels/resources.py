"""What the compiler makes of every Triton kernel on chips that need not be here: registers, spills, shared memory, occupancy, SASS.

    python -m bench.kernels.resources [--arch 80 86 89 90 100 103 120] [--op NAME] [--json FILE]

The real launchers are called with meta tensors at the recipe's sizes while Triton's driver is replaced by one that only compiles, so what
is read is what would be launched: signature, specialisation, constexprs and options. Everything told is compile time: counts of
instructions are of the program text, not of a run, and nothing is timed. Exits with 1 when a check fails (see `findings`).
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import triton

from bench.kernels.cases import CASES, Case, H, T
from bench.kernels.compile_only import CHIPS, Launch, compile_only
from bench.kernels.usage import BITS, Usage, read

KERNELS = Path(__file__).parents[2] / "kernels"
KINDS = ("matrix", "thin", "memory", "scattered", "small")
"""thin: matrix products of 16 rows, Ampere's instruction on every chip; scattered: single elements of large tensors, a few of each row."""
GRID_LIMITS = (2**31 - 1, 65535, 65535)
PARKED = 8 if triton.__version__.startswith("3.7.") else 0
"""Bytes of stack that are no finding: two registers, which Triton 3.7's ptxas parks of its own accord, with a store and a load each."""


def findings(used: Usage) -> list[str]:
    """What is wrong with a compiled kernel, a line each; empty when all is well."""
    chip, wrong = CHIPS[used.arch], []
    local = used.count(r"LDL|STL")
    if used.stack > PARKED or local > PARKED // 2:
        wrong.append(f"spills: {used.stack} bytes of stack, {local} instructions on local memory (LDL, STL)")
    if used.shared > chip.shared_per_block * 1024:
        wrong.append(f"shared memory: {used.shared} bytes a block, the chip has {chip.shared_per_block * 1024}")
    if used.tensor_memory > chip.tensor_memory:
        wrong.append(f"tensor memory: {used.tensor_memory} columns, the chip has {chip.tensor_memory}")
    for axis, size, limit in zip("xyz", used.grid, GRID_LIMITS, strict=False):
        if size > limit:
            wrong.append(f"grid: {size} blocks along {axis}, at most {limit} can be launched")
    if used.kind not in KINDS:
        wrong.append(f"kind: {used.kind!r} in its module's KIND, expected one of {', '.join(KINDS)}")
    elif (used.kind in ("matrix", "thin")) != bool(used.dots):
        wrong.append(f"kind: declared {used.kind} with {len(used.dots)} tl.dot")
    if used.kind == "small" and used.largest_tensor >= T * H:
        wrong.append(f"kind: declared small but handed a tensor of {used.largest_tensor} elements; the hidden states have {T * H}")
    if used.kind in ("matrix", "thin"):
        wrong += _dot_findings(used)
    if used.kind not in ("scattered", "small"):
        wrong += _access_findings(used)
    return wrong


def _dot_findings(used: Usage) -> list[str]:
    if used.dtype == "fp32":
        return [f"precision: tl.dot rounds fp32 to {how}" for dtype, how in used.dots if dtype == "f32" and how == "tf32"]
    expected, wrong = CHIPS[80 if used.kind == "thin" else used.arch].tensor_core, []
    if not used.count(expected):
        wrong.append(f"tensor cores: no instruction like {expected}")
    elif used.kind == "matrix" and not re.match(expected, "HMMA") and used.count(r"HMMA\b"):
        wrong.append(f"tensor cores: {used.count('HMMA')} HMMA beside {expected}: some of its dots fell back to Ampere's")
    wide = sorted({dtype for dtype, _ in used.dots if BITS.get(dtype, 8) > 16})
    if wide:
        wrong.append(f"tensor cores: tl.dot of {', '.join(wide)} though the case is {used.dtype}")
    return wrong


def _access_findings(used: Usage) -> list[str]:
    """Every large block must move 16 bytes at a time: a matrix kernel's tiles, whose sides are at least 16 (what is narrower is a few
    numbers of each row); of others, what is at least half the largest block. A thin kernel's stores are left out: most of its 16 rows are
    masked."""
    wrong = []
    if used.kind in ("matrix", "thin"):
        rows = [access for access in used.accesses if len(access.shape) > 1 and min(access.shape) >= 16]
    else:
        largest = max((access.elements for access in used.accesses), default=0)
        rows = [access for access in used.accesses if 2 * access.elements >= largest]
    if not rows:
        wrong.append(f"memory: declared {used.kind} but it loads and stores no block")
    for kind in ("load", "store") if used.kind != "thin" else ("load",):
        through_tma = [access for access in rows if access.kind == kind and access.descriptor and used.arch >= 90]
        others = [access for access in rows if access.kind == kind and access not in through_tma]
        if through_tma and not used.tma(kind):
            wrong.append(f"memory: {len(through_tma)} descriptor {kind}s but no bulk copy (TMA)")
        expected = sum(max(1, access.bytes // (used.warps * 32 * 16)) for access in others)
        if used.sixteen_bytes(kind) < expected:
            blocks = ", ".join(f"{'x'.join(map(str, access.shape))} {access.dtype}" for access in others)
            name = "LDG" if kind == "load" else "STG"
            narrow = {key: n for key, n in used.instructions.items() if key.startswith(name)}
            wrong.append(
                f"memory: {used.sixteen_bytes(kind)} 16-byte {kind}s, {expected} expected for {blocks} "
                f"over {used.warps * 32} threads; found {narrow}"
            )
    return wrong


def declared_kernels(folder: Path = KERNELS) -> dict[str, str]:
    """Functions whose name ends in _kernel -> the file that defines them."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                assert node.name not in found, f"{node.name} stands in {found[node.name]} and in {path.name}: give one another name"
                found[node.name] = path.name
    return found


def collect(arch: int, cases: Sequence[Case]) -> tuple[list[Usage], list[str]]:
    """Compiles what the cases launch: the usage of every different kernel, and what is wrong, a case that does not compile included."""
    launched: list[tuple[str, str, Launch]] = []
    wrong: list[str] = []
    for case in cases:
        label = f"{case.op} {case.label}".strip()
        with compile_only(arch) as launches:
            try:
                case.call()
            except Exception as error:
                wrong.append(f"sm_{arch} ({label}, {case.dtype}): {type(error).__name__}: {error}")
        launched += [(label, case.dtype, launch) for launch in launches]
    different: dict[str, tuple[str, str, Launch]] = {}
    for one in launched:
        different.setdefault(one[2].compiled.hash, one)
    used = dict(zip(different, read(list(different.values()), arch), strict=True))
    told: dict[tuple[str, str], str] = {}
    for label, dtype, launch in launched:
        compiled = used[launch.compiled.hash]
        one = dataclasses.replace(compiled, case=label, dtype=dtype, grid=launch.grid, largest_tensor=launch.largest_tensor)
        for reason in findings(one):
            told.setdefault((launch.compiled.hash, reason), f"{one.name}: {reason}")
    return list(used.values()), [*wrong, *told.values()]


def main() -> None:
    """Compile, print the table and the findings, write the JSON when asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels.resources", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=CHIPS, default=list(CHIPS), help="compute capabilities (default: all)")
    parser.add_argument("--op", nargs="+", choices=sorted({case.op for case in CASES}), help="only these ops' kernels (default: all)")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    args = parser.parse_args()
    cases = [case for case in CASES if args.op is None or case.op in args.op]
    used, wrong = [], []
    for arch in args.arch:
        more, found = collect(arch, cases)
        used, wrong = used + more, wrong + found
    if args.json:
        rows = [dataclasses.asdict(one) | {"occupancy": one.occupancy} for one in used]
        about = {"triton": triton.__version__, "measured": "compile time only: no kernel was run or timed"}
        args.json.write_text(json.dumps({"about": about, "findings": wrong, "kernels": rows}, indent=1, default=str) + "\n")
    print(table(used))
    print(f"\n{len(used)} kernels compiled with Triton {triton.__version__}. Compile time only: nothing was run or timed.")
    print(*(wrong or ["no findings"]), sep="\n")
    sys.exit(bool(wrong))


def table(used: Sequence[Usage]) -> str:
    """One line per compiled kernel, aligned. ld16, st16: 16-byte global loads and stores, of all; tma: bulk loads and stores; ex2:
    exponentials; bar: barriers. Last the constants in which the variants of a kernel differ, tuples left out."""
    words = ["kernel", "case", "dtype"]
    figures = ["sm", "warps", "stages", "regs", "spills", "shared KB", "occ %", "mma", "ld16", "st16", "tma", "ex2", "bar"]
    rows = [
        [
            one.kernel,
            one.case,
            one.dtype,
            str(one.arch),
            str(one.warps),
            str(one.stages),
            str(one.registers),
            str(one.count(r"LDL|STL")),
            f"{one.shared / 1024:.1f}",
            f"{100 * one.occupancy:.0f}",
            _tensor_core_cell(one),
            f"{one.sixteen_bytes('load')}/{one.count('LDG(STS)?[.]')}",
            f"{one.sixteen_bytes('store')}/{one.count('STG[.]')}",
            f"{one.tma('load')}/{one.tma('store')}",
            str(one.count(r"MUFU\.EX2")),
            str(one.count(r"BAR\b")),
            " ".join(f"{name}={one.constants[name]}" for name in one.constants if name in _varying(one, used)),
        ]
        for one in used
    ]
    head = [*words, *figures, "constants"]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    aligned = [str.ljust] * len(words) + [str.rjust] * len(figures) + [str.ljust]
    lines = [
        "  ".join(align(cell, width) for align, cell, width in zip(aligned, row, widths, strict=True)).rstrip()
        for row in [head, ["-" * width for width in widths[:-1]] + ["---------"], *rows]
    ]
    return "\n".join(lines)


def _varying(one: Usage, used: Sequence[Usage]) -> set[str]:
    same = [other.constants for other in used if other.kernel == one.kernel]
    names = {name for constants in same for name, value in constants.items() if "." not in name and "(" not in value}
    return {name for name in names if len({constants.get(name) for constants in same}) > 1}


def _tensor_core_cell(one: Usage) -> str:
    found = Counter()
    for name, count in one.instructions.items():
        if re.match(r"HMMA\b|HGMMA\b|UTC\w*MMA\b", name):
            found[name.split(".")[0]] += count
    return " ".join(f"{count} {name}" for name, count in found.items()) or "-"


if __name__ == "__main__":
    main()

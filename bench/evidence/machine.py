"""The shipped kernels' machine code, measured: inner loops and epilogues of the products, issue budgets of the memory-bound kernels.

Cases are those of the resource guard (bench/kernels/cases.py), compiled without a GPU. Each different machine code is measured once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from bench.evidence import budget, products, sass
from bench.kernels.cases import Case
from bench.kernels.compile_only import Launch, compile_only
from bench.kernels.usage import Usage, read

PRODUCTS = {"logits_kernel", "dhidden_kernel", "dweight_kernel"}  # kind matrix; decode's thin products wait for memory

ADDED_WARPS = 4  # by warp specialisation, to those of the program


def launches(cases: Sequence[Case], arch: int) -> list[tuple[Case, Launch, Usage]]:
    """What the cases launch on a chip, every different machine code once, under the first case that makes it."""
    different: dict[str, tuple[Case, Launch]] = {}
    for case in cases:
        with compile_only(arch) as found:
            case.call()
        for launch in found:
            different.setdefault(launch.compiled.hash, (case, launch))
    used = read([(f"{case.op} {case.label}".strip(), case.dtype, launch) for case, launch in different.values()], arch)
    return [(case, launch, one) for (case, launch), one in zip(different.values(), used, strict=True)]


def measure(cases: Sequence[Case], arch: int) -> list[dict[str, Any]]:
    """A record for each product in 16 bit and each memory-bound kernel, with its case, dtype and what tells variants apart; of machine
    codes that differ in what divides their sizes alone, the dearest."""
    found: dict[str, dict[str, Any]] = {}
    for case, launch, used in launches(cases, arch):
        about: dict[str, Any] = {"case": used.case, "dtype": case.dtype}
        if used.kernel in PRODUCTS and case.dtype != "fp32":
            code = sass.disassemble(launch.compiled.asm["cubin"])
            rows, columns, inner = (int(used.constants[f"BLOCK_{axis}"]) for axis in "MNK")
            spills = used.count("LDL|STL")
            specialized = used.constants.get("SPECIALIZE") == "True"
            warps = used.warps - ADDED_WARPS * specialized
            tile = rows, columns, inner
            one = products.measure(used.kernel, arch, warps, used.registers, spills, code, tile, specialized)
            variant = {name: used.constants[name] for name in ("STORE", "ADD", "HAS_CAP") if name in used.constants}
            record = about | {"variant": variant} | dataclasses.asdict(one)
        elif used.kind == "memory":
            code = sass.disassemble(launch.compiled.asm["cubin"])
            dear = budget.instructions(used.kernel, code)
            shares = {card: round(budget.share(card, dear), 3) for card, (chip, _) in budget.CARDS.items() if chip == arch}
            takes = {"kernel": used.kernel, "arch": arch, "registers": used.registers, "occupancy": round(used.occupancy, 3)}
            record = about | takes | {"instructions_per_16_bytes": round(dear, 1), "shares": shares}
        else:
            continue
        before = found.get(key(record))
        if before is None or _cost(record) > _cost(before):
            found[key(record)] = record
    return list(found.values())


def _cost(record: dict[str, Any]) -> float:
    return record["epilogue_cycles"] if "epilogue_cycles" in record else record["instructions_per_16_bytes"]


def key(record: dict[str, Any]) -> str:
    """What tells a record from the others."""
    variant = ",".join(f"{name}={value}" for name, value in record.get("variant", {}).items())
    return "/".join([record["kernel"], f"sm_{record['arch']}", record["case"], record["dtype"], variant])

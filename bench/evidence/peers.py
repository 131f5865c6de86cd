"""What peers' kernels are made of, compiled as ours are: registers, spills, inner loops, instructions for every 16 bytes.

Each function launches one package's kernels on meta tensors as that package does, for the recipe's sizes. A package that is not installed,
or whose kernels do not compile here, is listed with the reason. Those that the project does not install are found on PYTHONPATH.
T rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.evidence import budget, products, quack, sass
from bench.kernels.compile_only import Launch, compile_only
from bench.kernels.usage import read, taken

T, H, V = 2048, 3584, 152064
ARCH = 90


def _meta(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def _rows(dtype: torch.dtype = torch.float32) -> Tensor:
    return _meta(T, dtype=dtype)


def trl() -> None:
    """TRL's log-prob and entropy from logits, forward and backward."""
    kernels = importlib.import_module("trl.kernels.logprob_entropy")
    z, targets, numbers = _meta(T, V), _rows(torch.int64), _rows()
    block, strides = kernels._BLOCK_SIZE, (0, V, 0, 1, 0, 0)
    given = {"n_cols": V, "rows_per_batch": T, "TEMPERATURE": 0.9, "HAS_MASK": False, "BLOCK_SIZE": block}
    kernels._forward_kernel[(T,)](z, targets, targets, *[numbers] * 4, *strides, **given)
    wanted = {"HAS_LOGPROB_GRAD": True, "HAS_ENTROPY_GRAD": True}
    kernels._backward_kernel[(T, -(-V // block))](z, targets, targets, *[numbers] * 4, z, *strides, 0, V, **given, **wanted)


def liger() -> None:
    """Liger's GRPO loss from logits (Triton), forward and backward."""
    kernels = importlib.import_module("liger_kernel.ops.grpo_loss")
    z, ids, numbers = _meta(1, T + 1, V), _meta(1, T, dtype=torch.int64), _meta(1, T, dtype=torch.float32)
    row = _meta(1, dtype=torch.float32)
    numbers_of_the_loss = (0.9, 0.04, 0.2, 0.2, 0, 1.0, 1.05, 0.0, False)
    launch = {"BLOCK_N": 2048, "num_stages": 2, "num_warps": 1}
    given = (z, numbers, numbers, ids, None, row, None, 0, None)
    kernels._grpo_loss_fwd_kernel[(1, T)](*given, numbers, numbers, numbers, numbers, *numbers_of_the_loss, T, V, **launch)
    given = (numbers, z, z, numbers, numbers, ids, row, None, numbers, None, 0, None)
    kernels._grpo_loss_bwd_kernel[(1, T)](*given, *numbers_of_the_loss, *numbers.stride(), T, V, **launch | {"num_warps": 16})


def verl() -> None:
    """verl's linear cross-entropy, forward product, with TMA and without. Its package asks for Ray: only the two modules are loaded."""
    found = importlib.util.find_spec("verl")
    assert found and found.submodule_search_locations, "find_spec has told that it is there"
    folder = Path(found.submodule_search_locations[0])
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "verl"}
    device = types.ModuleType("verl.utils.device")
    device.__dict__.update(get_device_capability=lambda *_: (9, 0), get_device_name=lambda: "cuda", is_cuda_available=True)
    device.__dict__.update(get_torch_device=lambda: torch.cuda)
    try:
        for name in ("verl", "verl.utils", "verl.utils.kernel"):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
        sys.modules["verl.utils.device"] = device
        kernels = importlib.import_module("verl.utils.kernel.kernels")
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "verl"]:
            del sys.modules[name]
        sys.modules.update(before)
    part = 1024
    parts = -(-V // part)
    sums = [_meta(T, parts, dtype=torch.float32) for _ in range(3)]
    for tma in (True, False):
        kernels.efficient_entropy_kernel_general_mainloop[(T // 128 * parts,)](
            0, _meta(T, H), _meta(V, H), _rows(torch.int64), T, H, V, part, H, 1, H, 1,
            *[given for one in sums for given in (one, parts, 1)], _rows(), 1, _meta(1, dtype=torch.float32), 1.0, USE_TMA=tma,
        )  # fmt: skip


def cut_cross_entropy() -> None:
    """cut-cross-entropy's log-sum-exp and its backward with and without its filter."""
    os.environ.setdefault("CCE_AUTOTUNE", "0")
    forward = importlib.import_module("cut_cross_entropy.cce_lse_forward")
    backward = importlib.import_module("cut_cross_entropy.cce_backward")
    hidden, weight, numbers, locks = _meta(T, H), _meta(V, H), _rows(), _meta(16, dtype=torch.int32)
    forward._cce_lse_forward_kernel[(T // 256 * V // 128,)](
        hidden, weight, numbers, None, locks, None, None, T, V, H, H, 1, H, 1, 1, 1, num_locks=16, B_BIN=11
    )
    grid, block_locks = (T // 128 * V // 128,), _meta(56, 56, dtype=torch.int32)
    for filtered in (1e-3, None):
        backward._cce_backward_kernel[grid](
            hidden, weight, numbers, numbers, 1.0, None, None, None, _rows(torch.int64), _meta(T, H), block_locks, _meta(V, H), block_locks,
            T, H, V, 56, 56, 56, 56, H, 1, H, 1, 1, filtered, B_BIN=11, SHIFT=False, REQUIRES_GRAD=True,
        )  # fmt: skip


PEERS: dict[str, tuple[str, Callable[[], None]]] = {
    "TRL": ("trl", trl),
    "Liger": ("liger_kernel", liger),
    "verl": ("verl", verl),
    "cut-cross-entropy": ("cut_cross_entropy", cut_cross_entropy),
}
DISTRIBUTIONS = {"liger_kernel": "liger-kernel", "cut_cross_entropy": "cut-cross-entropy"}


def measure() -> list[dict[str, Any]]:
    """A record for each kernel of each peer, or why there is none."""
    found: list[dict[str, Any]] = []
    for name, (package, launch_all) in PEERS.items():
        if importlib.util.find_spec(package) is None:
            found.append({"peer": name, "missing": "not installed"})
            continue
        about = {"peer": name, "version": importlib.metadata.version(DISTRIBUTIONS.get(package, package))}
        with compile_only(ARCH) as launches:
            try:
                launch_all()
            except Exception as error:
                found.append(about | {"missing": f"{type(error).__name__}: {error}".splitlines()[0]})
                continue
        different = {launch.compiled.hash: launch for launch in launches}
        found += [about | _record(launch) for launch in different.values()]
    return found + _quack()


def _quack() -> list[dict[str, Any]]:
    """The same of quack, whose compiler is another."""
    if importlib.util.find_spec("quack") is None:
        return [{"peer": "quack", "missing": "not installed"}]
    about = {"peer": "quack", "version": importlib.metadata.version("quack-kernels")}
    found = []
    try:
        for name, cubin in quack.compiled():
            (variant, tile, warps), takes, code = quack.KERNELS[name], taken(cubin), sass.disassemble(cubin)
            spills = sum(one.opcode in ("LDL", "STL") for one in code)
            one = products.measure(name.partition("-")[0], ARCH, warps, takes["REG"], spills, code, tile)
            found.append(about | {"variant": variant} | dataclasses.asdict(one))
    except RuntimeError as error:
        return [about | {"missing": str(error)}]
    return found


def _record(launch: Launch) -> dict[str, Any]:
    used, code = read([("", "bf16", launch)], ARCH)[0], sass.disassemble(launch.compiled.asm["cubin"])
    spills = used.count("LDL|STL")
    about = {"kernel": used.kernel, "variant": f"USE_TMA={used.constants['USE_TMA']}" if "USE_TMA" in used.constants else ""}
    takes = {"warps": used.warps, "registers": used.registers, "spills": spills, "stack": used.stack}
    if any(one.is_matrix for one in code):
        # each package names its blocks in its own way, but in the order of rows, columns, inner dimension
        blocks = [int(value) for axis in "MBNVKD" for key, value in used.constants.items() if re.fullmatch(f"BLOCK_(SIZE_)?{axis}", key)]
        rows, columns, inner, *_ = blocks
        one = products.measure(used.kernel, ARCH, used.warps, used.registers, spills, code, (rows, columns, inner))
        return about | dataclasses.asdict(one)
    return about | takes | {"instructions_per_16_bytes": round(budget.instructions(used.kernel, code), 1)}

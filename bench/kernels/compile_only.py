"""Triton without a GPU: a driver that only compiles, and launches that are compiled and recorded instead of run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from actial_fast.kernels import common


@dataclass(frozen=True)
class Chip:
    """Limits of one compute capability (CUDA C++ Programming Guide, technical specifications); shared memory in KiB."""

    sm_count: int  # of the A100, A10, RTX 4090, H100 SXM, B200, B300 and RTX 5090
    shared_per_block: int
    shared_per_sm: int
    tensor_core: str  # the mnemonic of its matrix instruction, a regular expression
    registers: int = 65536
    warps: int = 64
    blocks: int = 32
    tensor_memory: int = 0  # columns


CHIPS = {
    80: Chip(108, 163, 164, r"HMMA\b"),
    86: Chip(72, 99, 100, r"HMMA\b", warps=48, blocks=16),
    89: Chip(128, 99, 100, r"HMMA\b", warps=48, blocks=24),
    90: Chip(132, 227, 228, r"HGMMA\b"),
    100: Chip(148, 227, 228, r"UTC\w*MMA\b", tensor_memory=512),
    103: Chip(148, 227, 228, r"UTC\w*MMA\b", tensor_memory=512),
    120: Chip(170, 99, 100, r"HMMA\b", warps=48, blocks=24),
}


class CompileOnlyDriver:
    """As much of a Triton driver as compiling needs; each chip is a device of its own, so that the compile caches stay apart."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> str:
        return f"compile-only sm_{self.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@dataclass(frozen=True)
class Launch:
    """One launch that was compiled instead of run."""

    function: JITFunction
    compiled: Any  # triton.compiler.CompiledKernel
    grid: tuple[int, ...]
    largest_tensor: int  # elements


@contextlib.contextmanager
def compile_only(arch: int) -> Iterator[list[Launch]]:
    """Inside, every Triton launch is compiled for sm_`arch` (a key of CHIPS) and appended to the list, and nothing runs.

    Signature, specialisation, constexprs and options are those of the launch; of an autotuner every configuration is compiled. Tensors are
    to be on meta: their storage counts as aligned, as the caching allocator's is, and a view starts where it would. `common.capability`
    and `common.sm_count` answer for the chip. Raises RuntimeError when Triton's interpreter is on.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set, so nothing would be compiled: start a process without it")
    launches: list[Launch] = []
    run, autotune = JITFunction.run, Autotuner.run
    capability, sm_count = common.capability, common.sm_count
    active = driver._active  # the public property looks for a GPU

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        placed = {name: _placed(value) for name, value in kwargs.items()}
        compiled = run(self, *map(_placed, args), grid=grid, warmup=True, **placed)
        bound = self.signature.bind(*args, **{name: value for name, value in kwargs.items() if name in self.arg_names})
        bound.apply_defaults()
        sizes = [tensor.numel() for given in bound.arguments.values() for tensor in _tensors(given)]
        launches.append(
            Launch(
                self,
                compiled,
                tuple(grid(bound.arguments) if callable(grid) else grid),
                max(sizes, default=0),
            )
        )
        return compiled

    def every_configuration(self: Autotuner, *args: Any, **kwargs: Any) -> None:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        for config in self.prune_configs(kwargs):
            self.fn.run(*args, **kwargs, **config.all_kwargs())

    driver.set_active(CompileOnlyDriver(arch))
    common.capability = lambda: divmod(arch, 10)
    common.sm_count = lambda: CHIPS[arch].sm_count
    JITFunction.run, Autotuner.run = record, every_configuration
    try:
        yield launches
    finally:
        JITFunction.run, Autotuner.run = run, autotune
        common.capability, common.sm_count = capability, sm_count
        driver._active = active


def _tensors(given: Any) -> list[torch.Tensor]:
    """The tensors in an argument: itself, the base of a descriptor, or those of a tuple."""
    if isinstance(given, tuple):
        return [tensor for item in given for tensor in _tensors(item)]
    base = getattr(given, "base", given)
    return [base] if isinstance(base, torch.Tensor) else []


@dataclass(frozen=True)
class _Pointer:
    """A tensor on meta as a launch sees it: its own data_ptr() is 0 even for a view that starts at an odd element."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address


def _placed(given: Any) -> Any:
    """An argument with its meta tensors replaced; those of descriptors stay, since a descriptor says all of itself."""
    if isinstance(given, torch.Tensor):
        return _Pointer(given.dtype, given.storage_offset() * given.element_size())
    if isinstance(given, tuple):
        items = [_placed(item) for item in given]
        return type(given)(*items) if hasattr(given, "_fields") else tuple(items)
    return given

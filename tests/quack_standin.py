"""What of quack 0.6.5 our head takes, in torch on the CPU: the same names and signatures, the shapes, dtypes, strides and alignment that
its kernels are compiled for, and the results that its docstrings tell. Epilogues and transforms are called with whole tiles of tensors
where quack calls them with elements.

Signatures were read from the wheel; tests/kernels/test_quack.py compares them with the package's source where that is installed.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

LOG2E = 1.4426950408889634
MAJOR = 9  # of the chip that is stood in for
CALLS: list[str] = []  # the epilogues that have run


def pexp2(v):
    return torch.exp2(v)


class EpiOp:
    def __init__(self, name):
        self.name = name


class ColVecLoad(EpiOp):
    fn_port = "col"

    def check(self, value: Tensor, rows: int) -> None:
        assert value.shape == (rows,) and value.is_contiguous(), f"{self.name}: (m,) expected, got {tuple(value.shape)}"
        assert value.data_ptr() % (4 * value.element_size()) == 0, f"{self.name}: compiled for 4 elements at a time"


class ColVecReduce(EpiOp):
    fn_port = "sink"

    def __init__(self, name, combine="add", scaled=False, check_oob=None):
        super().__init__(name)
        assert combine == "add" and check_oob is None, "not stood in for"
        self.scaled = scaled


class ColVecSelect(EpiOp):
    fn_port = "sink"

    def __init__(self, name, idx_op):
        super().__init__(name)
        assert isinstance(idx_op, ColVecLoad)
        self.idx_op = idx_op


class MaxLog2(EpiOp):
    fn_port = "value"

    def __init__(self, name, round_to_int=True):
        super().__init__(name)
        self.round_to_int = round_to_int

    def out(self, name):
        return GroupedColStatsOut(name, self)

    def of(self, tile: Tensor) -> Tensor:
        peak = torch.where(tile.isnan(), -torch.inf, tile).amax(1)  # PTX max passes over NaN
        bits = peak * torch.tensor(LOG2E, dtype=torch.float32)
        return bits.round() if self.round_to_int else bits


class GroupedColStatsOut(EpiOp):
    def __init__(self, name, stats_op):
        super().__init__(name)
        self.stats_op = stats_op


class TransformAOperand(NamedTuple):
    blob: Tensor
    sf: Tensor | None = None


class ATransformMod:
    def __init__(self, fn, vec_size, packed, consts=None, regs=None, args=None):
        assert packed is None and consts is None and regs is None and vec_size in (2, 4, 8)
        self.fn, self.args = fn, tuple((args or {}).items())
        assert [name for name, _ in self.args] == list(inspect.signature(fn).parameters)[1:]

    def apply(self, operand: TransformAOperand, tile_m: int, tile_k: int) -> Tensor:
        a, value = operand
        ((_, kind),) = self.args
        rows, columns = a.shape
        if kind == "colvec_ktile":
            spread = value[:, :rows].T.repeat_interleave(tile_k, 1)[:, :columns]
        else:
            spread = value.repeat_interleave(64, 0)[:, :columns]
        return self.fn(a, spread).to(a.dtype)


def a_transform(vec_size=None, packed=None, consts=None, regs=None, args=None):
    return lambda fn: ATransformMod(fn, vec_size, packed, consts, regs, args)


def transform_a_operand(mod, A, values, tile_m, tile_k=64):
    assert MAJOR == 9, "only the sm_90 main loop has them"
    ((name, kind),) = mod.args
    assert set(values) == {name} and A.ndim == 2
    value, (rows, columns) = values[name], A.shape
    assert value.dtype == A.dtype and value.element_size() == 2 and value.is_contiguous()
    assert rows % tile_m == 0, f"M ({rows}) must be divisible by tile_M ({tile_m})"
    steps = -(-columns // tile_k)
    assert value.shape == {"colvec_ktile": (steps, rows), "kvec_m64": (rows // 64, steps * tile_k)}[kind]
    return TransformAOperand(A, value)


class EpiMod:
    def __init__(
        self,
        fn,
        outputs=(),
        ops=None,
        reduces=None,
        mode=None,
        paired=(),
        outs=None,
        prepass=None,
        prepass_outs=(),
        extra_ops=(),
        vectorize=None,
    ):
        assert not outputs and mode is None and not paired and vectorize is None, "not stood in for"
        self.fn, self.ops, self.sinks = fn, dict(ops or {}), {**(reduces or {}), **(outs or {})}
        self.prepass, self.prepass_outs, self.extra_ops = prepass, tuple(prepass_outs), tuple(extra_ops)
        first, *self.operand_names = inspect.signature(fn).parameters
        assert first == "acc" and all(op.name == name for name, op in {**self.ops, **self.sinks}.items())
        assert set(self.operand_names) <= set(self.ops), "kinds that are inferred are not stood in for"

    def gemm(
        self,
        A,
        B,
        D,
        C=None,
        *,
        epi_args,
        tile_M=128,
        tile_N=256,
        cluster_M=2,
        cluster_N=1,
        tile_K=None,
        pingpong=False,
        persistent=True,
        is_dynamic_persistent=False,
        max_swizzle_size=8,
        tile_count_semaphore=None,
        cu_seqlens_m=None,
        A_idx=None,
        rounding_mode=0,
        epi_key_overrides=None,
        b_kn=False,
        use_tma_gather=False,
        concat_layout=None,
        SFA=None,
        SFB=None,
        bs_format_a=None,
        bs_format_b=None,
        swap_ab=False,
        split_k=1,
        split_k_mode=0,
        add_to_output=False,
        ag_args=None,
        transform_a=None,
        transform_sf=None,
        post_init_attrs=(),
        split_k_buffers=None,
        _launch=True,
    ):
        CALLS.append(self.fn.__name__)
        assert C is None and persistent and not is_dynamic_persistent and not b_kn and split_k == 1, "not stood in for"
        assert not pingpong or MAJOR == 9
        if transform_a is not None:
            assert isinstance(A, TransformAOperand)
            a = transform_a.apply(A, tile_M, tile_K or 64)
            given = A.blob
        else:
            a = given = A
        (rows, inner), columns = given.shape, B.shape[0]
        assert B.shape == (columns, inner), f"B is (n, k): {tuple(B.shape)}"
        for x in (given, B, D):
            if x is not None:
                assert _tma(x), f"strides {x.stride()} of {x.dtype} at {x.data_ptr() % 16}: not for TMA"
        assert given.dtype == B.dtype in (torch.bfloat16, torch.float16)
        assert D is None or D.shape == (rows, columns)
        assert not add_to_output or (D is not None and D.dtype == torch.float32)
        return self._run(a.float() @ B.float().T, D, epi_args, tile_N, add_to_output)

    def _run(self, acc, D, given, tile_n, add):
        rows, columns = acc.shape
        allowed = {**self.ops, **self.sinks, **{op.name: op for op in self.extra_ops}}
        assert set(given) == set(allowed), f"{sorted(given)} given, {sorted(allowed)} declared"
        vectors = {name: op for name, op in allowed.items() if isinstance(op, ColVecLoad)}
        for name, op in vectors.items():
            op.check(given[name], rows)
        tiles = -(-columns // tile_n)
        for name, op in allowed.items():
            if isinstance(op, MaxLog2):
                assert given[name] == tile_n and columns % tile_n == 0, "a group is the whole tile, and divides N"
            elif isinstance(op, (ColVecReduce, GroupedColStatsOut)):
                assert given[name].shape == (rows, tiles) and given[name].dtype == torch.float32 and given[name].stride(1) == 1
            elif isinstance(op, ColVecSelect):
                assert given[name].shape == (rows,) and given[name].dtype == torch.float32
                assert given[op.idx_op.name].dtype in (torch.int32, torch.int64)
        for tile in range(tiles):
            self._tile(acc[:, tile * tile_n : (tile + 1) * tile_n], tile, tile * tile_n, D, given, vectors, add)

    def _tile(self, acc, tile, start, D, given, vectors, add):
        columns = {name: given[name][:, None] for name in vectors}
        if self.prepass:
            known = {name: columns[name] for name in list(inspect.signature(self.prepass).parameters)[1:]}
            for name, value in self.prepass(acc, **known).items():
                assert name in self.prepass_outs
                columns[name] = self.ops[name].of(value)[:, None]
        found = self.fn(acc, **{name: columns[name] for name in self.operand_names})
        for op in self.extra_ops:
            if isinstance(op, GroupedColStatsOut):
                given[op.name][:, tile] = columns[op.stats_op.name][:, 0]
        for name, op in self.sinks.items():
            value = found[name]
            if isinstance(op, ColVecReduce):
                given[name][:, tile] = (value[0] * value[1] if op.scaled else value).sum(1)
            else:
                at = given[op.idx_op.name].to(torch.int32).long() - start  # the kernel's index has 32 bits
                hit = (at >= 0) & (at < acc.shape[1])
                chosen = value.gather(1, at.clamp(0, acc.shape[1] - 1)[:, None])[:, 0]
                given[name][hit & (chosen != -torch.inf)] = chosen[hit & (chosen != -torch.inf)]
        if D is not None:
            out = D[:, start : start + acc.shape[1]]
            out.copy_(out + found["D"] if add else found["D"])


def gemm_epilogue(
    outputs=(), ops=None, reduces=None, mode=None, paired=(), outs=None, prepass=None, prepass_outs=(), extra_ops=(), vectorize=None
):
    return lambda fn: EpiMod(fn, outputs, ops, reduces, mode, paired, outs, prepass, prepass_outs, extra_ops, vectorize)


def _tma(x: Tensor) -> bool:
    strides = [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
    return x.data_ptr() % 16 == 0 and 1 in x.stride() and all(s == 1 or s * x.element_size() % 16 == 0 for s in strides)


PLACES = {
    "quack.epilogue.frontend": (gemm_epilogue, EpiMod),
    "quack.epilogue.math": (pexp2,),
    "quack.epilogue.ops": (ColVecLoad, ColVecReduce, ColVecSelect),
    "quack.epilogue.scaled_exp": (MaxLog2,),
    "quack.operand_transform": (a_transform, transform_a_operand),
}
OURS = "actial_fast.kernels.quack_gemms"


@contextmanager
def installed(major: int = 9) -> Iterator[list[str]]:
    """Inside, `import quack` finds this, on a chip of that major compute capability. Gives the names of the epilogues that run."""
    global MAJOR
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name == OURS or name.split(".")[0] == "quack"}
    for name in ("quack", "quack.epilogue", *PLACES):
        sys.modules[name] = types.ModuleType(name)
    for name, members in PLACES.items():
        for member in members:
            setattr(sys.modules[name], member.__name__, member)
    MAJOR = major
    CALLS.clear()
    try:
        yield CALLS
    finally:
        MAJOR = 9
        for name in [name for name in sys.modules if name == OURS or name.split(".")[0] == "quack"]:
            del sys.modules[name]
        sys.modules.update(before)

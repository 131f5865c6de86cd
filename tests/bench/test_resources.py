"""The guard over what the compiler makes of the kernels: the shipped ones pass on every chip, and a bad one is named.

Kernels are compiled in processes of their own, because Triton's interpreter is on in this one where there is no GPU. Run as a module
(`python -m tests.bench.test_resources ARCH`), this file prints the findings about the kernels below as JSON.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from actial_fast.kernels import common
from bench.kernels import resources
from bench.kernels.cases import Case
from bench.kernels.compile_only import CHIPS, compile_only
from bench.kernels.usage import Usage

ROOT = Path(__file__).parents[2]
NEAR = (86, 89, 103, 120)  # compiled nearly as another chip: 86 and 89 as 80, 103 as 100, 120 as 89
TILED = ("linear_grpo_loss", "grpo_loss_from_logits", "decode")
KIND = {
    "scale_kernel": "memory",
    "gather_rows_kernel": "memory",
    "scatter_rows_kernel": "memory",
    "narrow_block_kernel": "memory",
    "spill_kernel": "memory",
    "matmul_kernel": "matrix",
    "pointer_matmul_kernel": "matrix",
    "called_small_kernel": "small",
    "not_a_matmul_kernel": "matrix",
    "tuned_kernel": "memory",
}


@triton.jit
def scale_kernel(x, y, n, factor, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, (tl.load(x + at, at < n).to(tl.float32) * factor).to(y.dtype.element_ty), at < n)


@triton.jit
def gather_rows_kernel(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + 2 * at, at < n), at < n)


@triton.jit
def scatter_rows_kernel(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + 2 * at, tl.load(x + at, at < n), at < n)


@triton.jit
def narrow_block_kernel(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, at < n), at < n)


@triton.jit
def spill_kernel(x, y, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at, at < n, 0.0)  # all of it stays alive over the sum
    tl.store(y + at, value / tl.sum(value), at < n)


@triton.jit
def matmul_kernel(a, b, c, inner, WIDEN: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n = tl.program_id(0) * M, tl.program_id(1) * N
    product = tl.zeros((M, N), tl.float32)
    for k in range(0, inner, K):
        left, right = a.load([m, k]), b.load([n, k])
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        product = tl.dot(left, right.T, product, input_precision=PRECISION)
    c.store([m, n], product.to(c.dtype))


@triton.jit
def pointer_matmul_kernel(a, b, c, rows, columns, inner, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)[:, None]
    column = tl.program_id(1).to(tl.int64) * N + tl.arange(0, N)[None, :]
    product = tl.zeros((M, N), tl.float32)
    for k in range(0, inner, K):
        left = tl.load(a + row * inner + k + tl.arange(0, K)[None, :], row < rows)
        right = tl.load(b + column * inner + k + tl.arange(0, K)[:, None], column < columns)
        product = tl.dot(left, right, product)
    tl.store(c + row * columns + column, product.to(c.dtype.element_ty), (row < rows) & (column < columns))


@triton.jit
def called_small_kernel(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, at < n), at < n)


@triton.jit
def not_a_matmul_kernel(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, at < n), at < n)


@triton.jit
def undeclared_kernel(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, at < n), at < n)


@triton.autotune([triton.Config({"BLOCK": 2048}), triton.Config({"BLOCK": 256})], key=["n"])
@triton.jit
def tuned_kernel(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, at < n), at < n)


def elementwise(kernel, dtype=torch.bfloat16, size=1 << 28, start=0, grid=None, **options):
    x = torch.empty(start + size, dtype=dtype, device="meta")[start:]
    factor = (2.5,) if kernel is scale_kernel else ()
    kernel[grid or (triton.cdiv(size, 2048),)](x, torch.empty_like(x), size, *factor, **({"BLOCK": 2048} | options))


def matmul(dtype=torch.bfloat16, tile=(128, 128, 64), widen=False, precision="ieee", pointers=False, **options):
    m, n, k = tile
    a, b, c = (torch.empty(size, dtype=dtype, device="meta") for size in ((8192, 3584), (152064, 3584), (8192, 152064)))
    grid = lambda given: (triton.cdiv(8192, given["M"]), triton.cdiv(152064, given["N"]))  # noqa: E731
    options = {"num_warps": 8, "num_stages": 3} | options
    if pointers:
        pointer_matmul_kernel[grid](a, b, c, 8192, 152064, 3584, M=m, N=n, K=k, **options)
    else:
        described = [TensorDescriptor.from_tensor(x, list(block)) for x, block in ((a, (m, k)), (b, (n, k)), (c, (m, n)))]
        matmul_kernel[grid](*described, 3584, WIDEN=widen, PRECISION=precision, M=m, N=n, K=k, **options)


def no_such_size():
    raise ValueError("hidden: expected (T, H)")


# what is launched, as which dtype, and what must be found on which chips (all: every chip)
SPILLS_120 = {120: "spills: "} if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) else {}  # 3.7 keeps it in the registers
CASES = {
    "scale-bf16": ("bf16", lambda: elementwise(scale_kernel), {}),
    "scale-fp32": ("fp32", lambda: elementwise(scale_kernel, torch.float32), {}),
    "pointers": ("fp16", lambda: matmul(torch.float16, pointers=True), {}),
    "pointers-fp32": ("fp32", lambda: matmul(torch.float32, (64, 64, 32), pointers=True), {"all": "precision: tl.dot rounds fp32 to tf32"}),
    "tma": ("bf16", matmul, {**dict.fromkeys((80, 86, 89), "memory: 0 16-byte loads"), **SPILLS_120}),
    "spill": ("fp32", lambda: elementwise(spill_kernel, torch.float32, BLOCK=4096, num_warps=1, maxnreg=64), {"all": "spills: "}),
    "gather": ("fp32", lambda: elementwise(gather_rows_kernel, torch.float32), {"all": "memory: 0 16-byte loads, 4 expected"}),
    "scatter": ("bf16", lambda: elementwise(scatter_rows_kernel), {"all": "memory: 0 16-byte stores, 2 expected"}),
    "narrow": ("bf16", lambda: elementwise(narrow_block_kernel, BLOCK=512), {"all": "memory: 0 16-byte loads, 1 expected for 512 bf16"}),
    "odd-length": ("bf16", lambda: elementwise(scale_kernel, size=(1 << 28) - 1), {"all": "memory: 0 16-byte loads"}),
    "odd-start": ("bf16", lambda: elementwise(scale_kernel, start=3), {"all": "memory: 0 16-byte loads"}),
    "widened": ("bf16", lambda: matmul(tile=(64, 64, 32), widen=True), {"all": "tensor cores: tl.dot of f32 though the case is bf16"}),
    "small-tile": (
        "bf16",
        lambda: matmul(tile=(16, 64, 64), num_warps=4, pointers=True),
        dict.fromkeys((90, 100, 103), "tensor cores: no "),
    ),
    "shared": ("bf16", lambda: matmul(pointers=True, tile=(128, 128, 128), num_stages=5), {"all": "shared memory: "}),
    "grid": ("bf16", lambda: elementwise(scale_kernel, grid=(1, 70000)), {"all": "grid: 70000 blocks along y, at most 65535"}),
    "undeclared": ("bf16", lambda: elementwise(undeclared_kernel), {"all": "kind: None in its module's KIND"}),
    "not-small": (
        "bf16",
        lambda: elementwise(called_small_kernel),
        {"all": "kind: declared small but handed a tensor of 268435456 elements"},
    ),
    "no-dot": ("bf16", lambda: elementwise(not_a_matmul_kernel), {"all": "kind: declared matrix with 0 tl.dot"}),
    "tuned": ("bf16", lambda: tuned_kernel_launch(), {"all": "1 expected for 256 bf16"}),
    "too-much": ("bf16", lambda: matmul(pointers=True, num_stages=5), dict.fromkeys((86, 89, 120), "shared memory: 131072 bytes a block")),
    "raises": ("bf16", no_such_size, {"all": "ValueError: hidden: expected (T, H)"}),
}


def tuned_kernel_launch():
    x = torch.empty(1 << 20, dtype=torch.bfloat16, device="meta")
    tuned_kernel[lambda given: (triton.cdiv(1 << 20, given["BLOCK"]),)](x, torch.empty_like(x), 1 << 20)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, env=clean | environment, capture_output=True, text=True)


@pytest.mark.parametrize("arch", [pytest.param(arch, marks=pytest.mark.slow if arch in NEAR else ()) for arch in CHIPS])
def test_shipped_kernels(arch, tmp_path):
    """Every kernel is compiled, declared and passes, and the command says so."""
    result = resources_of(arch, tmp_path)
    elsewhere = set() if arch == 90 else {"strip_kernel", "factors_kernel"}  # beside quack's products, which are in strips on sm_90 alone
    missed = resources.declared_kernels().keys() - {kernel["kernel"] for kernel in result["kernels"]} - elsewhere
    assert not missed, f"no case in bench/kernels/cases.py compiles {', '.join(sorted(missed))} for sm_{arch}"


@pytest.mark.parametrize("arch", NEAR)
def test_shipped_kernels_whose_tiles_differ(arch, tmp_path):
    """What a chip with less shared memory, or fewer registers to spare, could not hold; all of them are compiled by `make test-slow`."""
    kernels = {kernel["kernel"] for kernel in resources_of(arch, tmp_path, "--op", *TILED)["kernels"]}
    assert {"logits_kernel", "dhidden_kernel", "dweight_kernel", "grpo_logits_kernel", "prompt_kernel"} <= kernels


def resources_of(arch: int, folder: Path, *arguments: str) -> dict:
    report = folder / "resources.json"
    done = run("bench.kernels.resources", "--arch", str(arch), "--json", str(report), *arguments)
    assert report.exists(), done.stderr
    result = json.loads(report.read_text())
    assert not result["findings"], "\n".join(result["findings"])
    assert done.returncode == 0 and "no findings" in done.stdout and "nothing was run or timed" in done.stdout
    assert {kernel["arch"] for kernel in result["kernels"]} == {arch}
    return result


@pytest.mark.parametrize("arch", [pytest.param(arch, marks=pytest.mark.slow if arch in (89, 103) else ()) for arch in CHIPS])
def test_findings(arch):
    """A bad kernel is found and named with chip and reason; a good one gives none."""
    done = run("tests.bench.test_resources", str(arch))
    assert done.returncode == 0, done.stderr
    texts = json.loads(done.stdout)
    assert sum(text.startswith(f"spill_kernel sm_{arch} (spill, fp32): spills: ") for text in texts) == 1
    for case, (dtype, _, expected) in CASES.items():
        found = [text for text in texts if f"sm_{arch} ({case}, {dtype}): " in text]
        texts = [text for text in texts if text not in found]
        reason = expected.get(arch, expected.get("all"))
        assert any(reason in text for text in found) if reason else not found, (case, found)
    assert not texts


USED = Usage(
    kernel="scale_kernel",
    kind="memory",
    arch=90,
    case="",
    dtype="bf16",
    constants={},
    grid=(1,),
    warps=4,
    stages=3,
    registers=32,
    stack=0,
    shared=0,
    tensor_memory=0,
    largest_tensor=0,
    dots=(),
    accesses=(),
    instructions={},
)


@pytest.mark.parametrize(
    ("changed", "occupancy"),
    [
        ({}, 1.0),
        ({"warps": 1}, 0.5),  # 32 blocks
        ({"registers": 128}, 0.25),  # 16 warps
        ({"registers": 168, "warps": 12}, 12 / 64),  # Hopper's classic of three warpgroups: one block
        ({"registers": 255, "warps": 8}, 0.125),
        ({"shared": 227 * 1024, "warps": 8}, 0.125),
        ({"shared": 113 * 1024, "warps": 8}, 0.25),  # 2 * (113 + 1) = 228
        ({"shared": 114 * 1024, "warps": 8}, 0.125),
        ({"shared": 81 * 1024, "warps": 8, "arch": 80}, 0.25),  # 2 * (81 + 1) = 164
        ({"shared": 82 * 1024, "warps": 8, "arch": 80}, 0.125),
        ({"tensor_memory": 256, "warps": 8, "arch": 100}, 0.25),
        ({"warps": 1, "arch": 86}, 16 / 48),  # 16 blocks
        ({"shared": 49 * 1024, "warps": 8, "arch": 120}, 16 / 48),  # 2 * (49 + 1) = 100
        ({"shared": 50 * 1024, "warps": 8, "arch": 89}, 8 / 48),
    ],
)
def test_occupancy(changed, occupancy):
    assert dataclasses.replace(USED, **changed).occupancy == occupancy


def test_tensor_memory_limit():
    assert "tensor memory: 1024 columns" in "".join(resources.findings(dataclasses.replace(USED, arch=100, tensor_memory=1024)))


def test_fallen_back_dots():
    """A kernel whose other dots do use the chip's instruction is not excused."""
    mixed = dataclasses.replace(
        USED, kind="matrix", dots=(("bf16", "ieee"),), instructions={"HGMMA.64x128x16.F32.BF16": 4, "HMMA.16816.F32": 8}
    )
    assert "8 HMMA beside" in "".join(resources.findings(mixed))


def test_restores(monkeypatch):
    """Nothing of compile_only stays behind, also when the body raises; and it refuses to pretend under the interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    kept = triton.runtime.jit.JITFunction.run, triton.runtime.autotuner.Autotuner.run, common.capability, common.sm_count
    with pytest.raises(KeyError), compile_only(80):
        assert common.capability() == (8, 0) and common.sm_count() == 108
        assert triton.runtime.driver.active.get_current_target().arch == 80
        raise KeyError
    assert kept == (triton.runtime.jit.JITFunction.run, triton.runtime.autotuner.Autotuner.run, common.capability, common.sm_count)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), compile_only(80):
        pass


if __name__ == "__main__":
    print(json.dumps(resources.collect(int(sys.argv[1]), [Case(name, "", dtype, call) for name, (dtype, call, _) in CASES.items()])[1]))

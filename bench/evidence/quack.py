"""quack's CuTe kernels, compiled for sm_90 without a GPU: its own product of a cross-entropy, and those that `head="quack"` takes.

    python -m bench.evidence.quack FOLDER

CuTe chooses its chip when it is imported and needs no device to compile, only to launch, so this runs in a process of its own, which leaves
a cubin for each kernel in FOLDER. `compiled` starts it. quack comes from where Python finds it; `pip install 'actial-fast[quack]'`, or a
folder of its own on PYTHONPATH.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[2]
T, H, V = 2048, 3584, 152064
# kernel: which it is, the tile's rows, columns and inner dimension, and the warps that multiply one tile
KERNELS = {
    "scaled_exp_target_epi": ("its own cross-entropy's logits", (128, 192, 64), 4),
    "softmax_part": ("head='quack', stores exponentials", (128, 128, 64), 4),
    "softmax_part-2": ("head='quack', no gradient", (128, 128, 64), 4),
    "row_scaled": ("head='quack', d hidden", (128, 256, 64), 8),
    "plain": ("head='quack', d weight, first chunk", (128, 256, 64), 8),
    "plain-2": ("head='quack', d weight, adds to the sum", (128, 256, 64), 8),
}


def compiled() -> Iterator[tuple[str, bytes]]:
    """The cubins of KERNELS by their names, in that order. RuntimeError with the last line of what a process that failed has printed."""
    with tempfile.TemporaryDirectory() as folder:
        clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        chip = {"CUDA_VISIBLE_DEVICES": "", "QUACK_ARCH": "90", "CUTE_DSL_ARCH": "sm_90a", "CUTE_DSL_KEEP": "ptx,cubin"}
        places = {"CUTE_DSL_DUMP_DIR": folder, "QUACK_CACHE_DIR": f"{folder}/cache"}
        command = [sys.executable, "-m", "bench.evidence.quack", folder]
        done = subprocess.run(command, cwd=ROOT, env=clean | chip | places, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or ["it told nothing"])[-1])
        for name in KERNELS:
            yield name, Path(folder, f"{name}.cubin").read_bytes()


def compile_all(folder: Path) -> None:
    """Compiles KERNELS, as they are called at the recipe's sizes, and names what CuTe has dumped into the folder."""
    import torch
    from quack.cache.async_compile import _pin_dsl_arch
    from quack.epilogue.frontend import EpiMod
    from quack.gemm_runtime import host

    _pin_dsl_arch("sm_90a")

    from quack.epilogue.scaled_exp import scaled_exp_target_epi

    from actial_fast.kernels import quack_gemms

    def meta(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    def numbers(*size: int) -> torch.Tensor:
        return meta(*size, dtype=torch.float32)

    hidden, weight, scaled, targets = meta(T, H), meta(V, H), meta(T, V), meta(T, dtype=torch.int64)
    sums = {name: numbers(T, V // quack_gemms.PART) for name in ("bits", "total", "moment")} | {"chosen": numbers(T), "major": 9}
    own = {"max_log2": 192, "target": targets, "target_logit": numbers(T)}
    own |= {name: numbers(T, V // 192) for name in ("sum_exp", "max_log2_out")}
    pingpong = {"tile_M": 128, "tile_N": 192, "cluster_M": 2, "cluster_N": 1, "pingpong": True}
    strip, out = meta(V // 64, T), numbers(V, H)
    calls: dict[str, Callable[[], Any]] = {
        "scaled_exp_target_epi": lambda: scaled_exp_target_epi.gemm(hidden, weight, scaled, epi_args=own, **pingpong),
        "softmax_part": lambda: quack_gemms.logits(hidden, weight, numbers(T), targets, scaled=scaled, **sums),
        "softmax_part-2": lambda: quack_gemms.logits(hidden, weight, numbers(T), targets, scaled=None, **sums),
        "row_scaled": lambda: quack_gemms.dhidden(scaled, strip, numbers(T), weight, meta(T, H)),
        "plain": lambda: quack_gemms.dweight(scaled, strip, hidden, out, add=False),
        "plain-2": lambda: quack_gemms.dweight(scaled, strip, hidden, out, add=True),
    }
    assert set(calls) == set(KERNELS)
    launch = EpiMod.gemm
    with (
        mock.patch.object(EpiMod, "gemm", lambda self, *a, **k: launch(self, *a, **k, _launch=False)),
        mock.patch.object(host, "get_max_active_clusters", lambda size, *_: 132 // size),
    ):
        for name, call in calls.items():
            before = set(folder.glob("*.cubin"))
            call()
            (found,) = set(folder.glob("*.cubin")) - before
            assert re.search(rf"_{name.partition('-')[0]}_", found.name), f"{found.name} is not {name}"
            found.rename(folder / f"{name}.cubin")


if __name__ == "__main__":
    compile_all(Path(sys.argv[1]))

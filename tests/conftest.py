"""Shared data for the tests: captures rendered once, questions built from them, a tiny model that fits their texts."""

import functools
import importlib.util
import io
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

if not torch.cuda.is_available():  # before any kernel is imported: without a GPU they run in Triton's interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton"):
        from tests.interpreter import repair

        repair()

from actial_fast.data.sources.row import Row, Turn
from actial_fast.data.sources.source import SourceConfig
from actial_fast.data.sources.stream import Example
from actial_fast.ops.spec import GRPOSpec
from actial_fast.settings.model import ModelConfig
from actial_fast.settings.recipe import DataConfig, GRPORecipe, SFTRecipe
from actial_fast.settings.running import OptimConfig, SaveConfig
from actial_fast.settings.sampling import SamplingConfig
from actial_fast.tasks.rewards import RewardConfig
from tests import descriptor_reduce

descriptor_reduce.install()

# the same examples on every run, and no time limit each, so that whoever changes nothing sees nothing fail, on a busy machine too;
# HYPOTHESIS_RANDOM=1 draws new ones
settings.register_profile("repeatable", derandomize=not os.environ.get("HYPOTHESIS_RANDOM"), deadline=None)
settings.load_profile("repeatable")

# a GPU machine may come with a Python that lacks the peers (make gpu GPU_PYTHON=...): what is compared with them cannot run there
collect_ignore = (
    []
    if importlib.util.find_spec("trl")
    else [*(f"integrations/test_trl{part}.py" for part in ("", "_bf16", "_sharded")), "ops/test_equal_to_trl.py"]
)


LONGEST = (
    "test_quickstart.py",
    "test_vocab_parallel.py",
    "test_paths.py",
    "test_training.py",
    "test_step.py",
    "test_examples.py",
    "test_packaging.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files with the longest tests first, so that no worker is alone with one at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_report_header() -> str | None:
    return f"not run, trl is not installed: {', '.join(collect_ignore)}" if collect_ignore else None


@pytest.fixture
def poisoned(monkeypatch) -> None:
    """Memory that nobody has written holds NaN, or an integer that is no index: what a kernel forgets to write shows."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, functools.partial(_poisoned, getattr(torch, name)))
    if not torch.cuda.is_available():  # where PyTorch's product in bfloat16 multiplies what lies between two rows by 0
        mm = torch.mm
        monkeypatch.setattr(torch, "mm", lambda a, b, **kinds: mm(a.contiguous(), b.contiguous(), **kinds))


def _poisoned(empty, *arguments, **kinds) -> torch.Tensor:
    x = empty(*arguments, **kinds)
    return x.fill_(torch.nan if x.is_floating_point() else x.dtype.is_signed and -(2 ** (8 * x.element_size() - 2)))


@pytest.fixture(scope="session")
def lab(tmp_path_factory) -> SimpleNamespace:
    """root, captures, questions (train.jsonl, test.jsonl), spatial (parquet) and model: small, and the same for every test."""
    from actial_fast.data.captures.render import RenderConfig, render
    from actial_fast.data.captures.settings import ViewpointConfig
    from actial_fast.data.captures.spatial import SpatialConfig, spatial_questions, viewpoint_objects
    from actial_fast.data.captures.viewpoint import build
    from actial_fast.data.sources.own import JsonlSource
    from actial_fast.model.tiny import TinyConfig, create

    root: Path = tmp_path_factory.mktemp("lab")
    captures, questions, spatial, model = (root / name for name in ("captures", "questions", "spatial", "model"))
    render(captures, RenderConfig(families=("vehicle", "chair"), objects=5, views=10, workers=1), progress=False)
    build(
        captures,
        questions,
        ViewpointConfig(pairs_per_object=6, test_examples=18, max_test_fraction=0.3, ask_letter=False, workers=1, probes=False),
        progress=False,
    )
    held_out = viewpoint_objects(questions / "test.jsonl")
    spatial_questions(captures, spatial, SpatialConfig(train_per_kind=10, test_per_kind=3), held_out, progress=False)
    rows = JsonlSource(questions / "train.jsonl")
    texts = [turn.content.replace("<image>", "") for i in range(len(rows)) for turn in rows[i].turns]
    thoughts = ["<think>The camera moved to the left. So the answer is B.</think><answer>B</answer>"]
    create(model, [*texts, *thoughts], TinyConfig(hidden=32, vision_hidden=32, layers=2, heads=4, vision_depth=0, image_size=28), seed=0)
    return SimpleNamespace(root=root, captures=captures, questions=questions, spatial=spatial, model=model)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A checkpoint folder of a tiny model alone, for tests that need no data."""
    from actial_fast.model.tiny import TinyConfig, create

    folder: Path = tmp_path_factory.mktemp("tiny") / "model"
    create(
        folder,
        ["Which way? A. left B. right", "<answer>A</answer>"] * 2,
        TinyConfig(hidden=32, vision_hidden=32, layers=2, heads=4, vision_depth=0, image_size=28),
        seed=0,
    )
    return folder


@pytest.fixture(scope="session", autouse=True)
def image_cache(tmp_path_factory) -> Iterator[None]:
    """Images of tests stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def example():
    """A function that makes an Example: example("<image>question", "answer", sizes=[(h, w), ...])."""

    def make(question: str, answer: str = "", sizes=(), truth: str = "", seed: int = 0) -> Example:
        rng = np.random.default_rng(seed)
        turns = (Turn("user", question), *((Turn("assistant", answer),) if answer else ()))
        images = tuple(png(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes)
        return Example(Row(turns=turns, images=images, truth=truth, where=f"test:{seed}"), seed)

    return make


@pytest.fixture
def sft_recipe(lab, tmp_path) -> SFTRecipe:
    """Six steps on the lab's questions."""
    return SFTRecipe(
        run=str(tmp_path / "run"),
        model=ModelConfig(path=str(lab.model)),
        data=DataConfig(sources=(SourceConfig(str(lab.questions / "train.jsonl")),), workers=1),
        optim=OptimConfig(lr=1e-3, warmup_steps=2, weight_decay=0.01),
        save=SaveConfig(every=2, keep=2, tensorboard=False),
        steps=6,
        batch_size=8,
        micro_batch=3,
    )


@pytest.fixture
def grpo_recipe(lab, tmp_path) -> GRPORecipe:
    """Three steps. Replies are random, so the reward is one that random replies earn now and then."""
    return GRPORecipe(
        run=str(tmp_path / "run"),
        model=ModelConfig(path=str(lab.model)),
        data=DataConfig(
            sources=(SourceConfig(str(lab.questions / "train.jsonl")), SourceConfig(str(lab.spatial / "train.parquet"))), workers=1
        ),
        rewards=(RewardConfig("tests.helpers:short", 1.0), RewardConfig("format", 0.5)),
        sampling=SamplingConfig(n=4, max_new_tokens=8),
        loss=GRPOSpec(beta=0.05),
        optim=OptimConfig(lr=3e-3, warmup_steps=0),
        save=SaveConfig(every=1, keep=3, tensorboard=False),
        steps=3,
        prompts=4,
        minibatch=2,
        micro_batch=5,
    )

"""Every way of sharding gives one rank's gradients, with the collectives that it cannot do without."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from actial_fast.model.tiny import TinyConfig, create
from actial_fast.settings.running import DistConfig
from actial_fast.train.dist import World
from actial_fast.train.sharding import unfit
from tests.ranks import on_ranks

LAYERS, BLOCKS = 2, 2
WAYS = [(reshard, reduce) for reshard in ("block", "step") for reduce in ("pass", "step")]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder of four checkpoints: model, with a tower of two blocks, tied, the same with the embedding for a head, deep, a Qwen3-VL,
    whose tower gives features for the first layers too, and older, a Qwen2-VL."""
    folder = tmp_path_factory.mktemp("sharded")
    sizes = TinyConfig(hidden=32, vision_hidden=32, layers=LAYERS, vision_depth=BLOCKS, heads=4, image_size=28)
    create(folder / "model", ["Which way? A. left B. right", "<answer>A</answer>"] * 2, sizes, seed=0)
    for name, family in (("deep", "qwen3_vl"), ("older", "qwen2_vl")):
        create(folder / name, ["Which way? A. left B. right", "<answer>A</answer>"] * 2, replace(sizes, family=family), seed=0)
    shutil.copytree(folder / "model", folder / "tied")
    about = json.loads((folder / "tied" / "config.json").read_text())
    about["tie_word_embeddings"] = about["text_config"]["tie_word_embeddings"] = True
    (folder / "tied" / "config.json").write_text(json.dumps(about))
    weights = folder / "tied" / "model.safetensors"
    kept = {name: value for name, value in load_file(weights).items() if name != "lm_head.weight"}
    save_file(kept, weights, metadata={"format": "pt"})
    return folder


def check(found, names):
    assert list(found) == names
    for name, figures in found.items():
        assert figures["far"] < 1e-6 < 1e-2 < figures["largest"], (name, figures)


@pytest.mark.ranks
def test_two_ranks_have_the_gradients_of_one_in_every_way(models):
    names = [f"model:whole:packed:{reshard}:{reduce}:1" for reshard, reduce in WAYS]
    names += ["tied:whole:packed:block:step:1", "tied:adapters:plain:step:pass:1", "deep:whole:packed:block:pass:1"]
    found = on_ranks("tests.train.sharded", "ways", models, *names)
    check(found, names)
    calls = [found[name]["calls"] for name in names[:4]]
    groups = LAYERS + BLOCKS + 4  # and the tower's rest, the embedding, the head, the last norm
    # of the micro-batches N, T with a tower's call, and reduced: N a group of the language model, T one of the tower's
    n, t = calls[0]["reduce 2"] - (BLOCKS + 1) * 2, 2
    n /= LAYERS + 3
    assert n == int(n) >= 3, "several micro-batches, of which some have no image"
    assert [c["reduce 2"] for c in calls] == [(LAYERS + 3) * n + (BLOCKS + 1) * t, groups] * 2
    assert [c["gather 2"] for c in calls[2:]] == [groups] * 2, "once a step"
    # layers twice, embedding and head once; the last norm too, and once more where the tower's call comes first
    assert calls[0]["gather 2"] == calls[1]["gather 2"] == (2 * LAYERS + 3) * n + 2 * (BLOCKS + 1) * t


@pytest.mark.slow
def test_four_ranks_in_two_groups_have_the_gradients_of_one(models):
    kinds = [
        f"{model}:{keys}:{packing}" for model in ("model", "tied") for keys in ("whole", "adapters") for packing in ("packed", "plain")
    ]
    names = [f"{kind}:{reshard}:{reduce}:2" for kind in kinds for reshard, reduce in WAYS]
    names += ["deep:adapters:packed:step:step:2", "deep:whole:plain:step:step:2", "older:whole:packed:block:pass:2"]
    found = on_ranks("tests.train.sharded", "ways", models, *names, ranks=4)
    check(found, names)


@pytest.mark.ranks
def test_two_by_two_ranks_have_the_gradients_of_one(models):
    """Weights are gathered within a group, gradients go between groups once a step."""
    names = ["model:whole:packed:block:pass:2"]
    found = on_ranks("tests.train.sharded", "ways", models, *names, ranks=4)
    check(found, names)
    calls = found[names[0]]["calls"]
    assert calls["reduce 2"] > calls["sum 2"] == LAYERS + BLOCKS + 4 and calls["sum 4"] == 2, "of all four: statistics and the norm"


@pytest.mark.parametrize(
    ("keys", "size", "problem"),
    [
        ({"fsdp": False}, 1, ""),
        ({"fsdp": True}, 1, "dist.fsdp: needs several ranks"),
        ({"fsdp": True}, 2, ""),
        ({"fsdp": True, "replicate": 2}, 8, ""),
        ({"fsdp": True, "replicate": 2}, 2, "dist.replicate: 2 ranks cannot be 2 groups of two or more"),
        ({"fsdp": True, "replicate": 3}, 8, "dist.replicate: 8 ranks cannot be 3 groups"),
    ],
)
def test_what_does_not_fit_the_ranks_is_told(keys, size, problem):
    where = World(0, size, torch.device("cpu"), mesh=None if size == 1 else object())  # type: ignore[arg-type]
    found = unfit(DistConfig(**keys), where)
    assert found.startswith(problem) and bool(found) == bool(problem)


@pytest.mark.parametrize("keys", [{"reshard": "step"}, {"reduce": "step"}, {"replicate": 2}])
def test_keys_of_sharded_weights_need_them(keys):
    with pytest.raises(ValueError, match=f"{next(iter(keys))}: says how sharded weights travel"):
        DistConfig(**keys)
    DistConfig(fsdp=True, **keys)

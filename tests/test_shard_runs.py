"""Whole runs from tar shards, with an image store that has less room than the data: the same weights as from files with all of it."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from actial_fast import sft
from actial_fast.data.sources.source import SourceConfig, open_source
from actial_fast.data.sources.stream import Stream
from actial_fast.packing import room
from actial_fast.report.metrics import read_metrics
from actial_fast.settings.config import to_yaml
from actial_fast.settings.recipe import SaveConfig
from actial_fast.train import checkpoint
from tests.test_training import assert_same, launch

SHARDS = 3


@pytest.fixture
def shards(lab, tmp_path) -> str:
    """The lab's questions, a sample each with its pictures beside it."""
    source = open_source(SourceConfig(str(lab.questions / "train.jsonl")))
    for k in range(SHARDS):
        with tarfile.open(tmp_path / f"train-{k:03}.tar", "w") as file:
            for n in range(k * len(source) // SHARDS, (k + 1) * len(source) // SHARDS):
                row = source[n]
                said = row.to_json(tmp_path)
                del said["images"]
                members = [("json", json.dumps(said).encode()), *((f"{i}.png", p.read_bytes()) for i, p in enumerate(row.images))]
                for suffix, data in members:
                    info = tarfile.TarInfo(f"{n:06}.{suffix}")
                    info.size = len(data)
                    file.addfile(info, io.BytesIO(data))
    return str(tmp_path / f"train-{{000..{SHARDS - 1:03}}}.tar")


def order(data, position: int) -> int:
    """The row that a run with this data draws at a position."""
    return Stream(data.sources, seed=0, together=False, workers=0).locate(position)[1]


def test_a_run_from_shards_with_little_room_is_the_same(sft_recipe, lab, shards, tmp_path):
    rows = SourceConfig(str(lab.questions / "train.jsonl"))
    data = replace(sft_recipe.data, sources=(rows,), together=False)
    whole = sft.train(replace(sft_recipe, run=str(tmp_path / "whole"), data=data))
    little = replace(data, sources=(SourceConfig(shards),), image_cache=str(tmp_path / "images"), image_cache_gb=1.2e-4)
    final = sft.train(replace(sft_recipe, run=str(tmp_path / "little"), data=little))
    assert_same(load_file(final / "model.safetensors"), load_file(whole / "model.safetensors"))
    (store,) = room.stores(tmp_path / "images")
    held, drawn = list(room.kept(store)), {p for n in range(48) for p in open_source(rows)[order(little, n)].images}
    assert 0 < sum(file.bytes for file in held) <= 1.2e5 < len(drawn) * held[0].bytes, "the run has drawn more than there is room for"


@pytest.mark.ranks
@pytest.mark.slow
def test_two_ranks_from_shards_are_killed_and_go_on(sft_recipe, lab, shards, tmp_path):
    recipe = replace(sft_recipe, save=SaveConfig(every=1, tensorboard=False), steps=4)
    data = replace(recipe.data, sources=(SourceConfig(shards),), image_cache=str(tmp_path / "images"), image_cache_gb=1.2e-4)
    whole, two = (replace(recipe, run=str(tmp_path / name), data=data) for name in ("whole", "two"))
    sft.train(whole)
    (tmp_path / "recipe.yaml").write_text(to_yaml(two))
    killed = launch("sft", tmp_path / "recipe.yaml", ranks=2, env={"ACTIAL_TEST_KILL_AT": "2"})
    killed.communicate(timeout=300)
    assert killed.returncode and checkpoint.final(Path(two.run) / "sft") is None
    process = launch("sft", tmp_path / "recipe.yaml", ranks=2)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    one, other = ([m["loss"] for m in read_metrics(Path(r.run))] for r in (whole, two))
    assert len(one) == 4 and one == pytest.approx(other, abs=1e-4)

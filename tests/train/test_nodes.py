"""Two ranks as on two machines: each with an image store of its own, and with one run folder or two."""

from dataclasses import replace

import pytest

from actial_fast import sft
from actial_fast.model.processor import Processor
from actial_fast.packing.images import ImageStore
from actial_fast.report.metrics import read_metrics
from actial_fast.settings.config import to_yaml
from actial_fast.settings.running import DistConfig
from tests.ranks import on_ranks


@pytest.fixture
def recipe(sft_recipe):
    return replace(sft_recipe, batch_size=6, pack_tokens=300, steps=3, dist=DistConfig(timeout=2))


@pytest.mark.ranks
def test_images_go_with_the_sequences(recipe, tmp_path):
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    found = on_ranks("tests.train.sharded", "machines", tmp_path, tmp_path / "recipe.yaml", "shared")
    assert found["outcome"] == "finished" and sum(found["carried"]) > 0, found
    sft.train(replace(recipe, run=str(tmp_path / "one")))
    assert found["losses"] == pytest.approx([m["loss"] for m in read_metrics(tmp_path / "one")], abs=1e-5)


@pytest.mark.ranks
def test_a_run_folder_that_is_not_shared_is_refused(recipe, tmp_path):
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    found = on_ranks("tests.train.sharded", "machines", tmp_path, tmp_path / "recipe.yaml", "apart")
    assert found["outcome"] == "Unready", found
    assert (
        "run/sft on " in found["said"] and "is not the folder that rank 0 has; name one on storage that all machines share" in found["said"]
    )


def test_a_store_keeps_what_another_has(lab, tmp_path):
    settings = Processor.load(str(lab.model)).store.settings
    first, second = ImageStore(settings, tmp_path / "first"), ImageStore(settings, tmp_path / "second")
    key = first.put(next(lab.captures.rglob("*.png")))
    assert first.hold(key) and not second.hold(str(key))
    second.keep(key, first.pixels(key))
    second.keep(key, first.pixels(key))
    assert second.hold(str(key)) and (second.pixels(key) == first.pixels(key)).all() and second.grid(key) == first.grid(key)

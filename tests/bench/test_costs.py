"""The cost model's coefficients come back from the seconds that they make, and the real micro-batches hold what their shapes say."""

import json
import math

import numpy as np
import pytest
import yaml

from actial_fast.model.processor import Processor
from actial_fast.packing.batch import share
from actial_fast.packing.planning import Costs
from actial_fast.settings.config import load_recipe
from actial_fast.settings.recipe import SFTRecipe
from actial_fast.train.dist import World
from actial_fast.train.rounds import Pass, passes
from bench.step import costs
from bench.step.costs import TERMS, fit, measure, sequences_of, shapes, work_of, yaml_of

LARGE = shapes(24_576, 65_536, 1296, 2)  # images of 504 x 504
WORK = np.array([work_of(shape) for shape in LARGE.values()])
TRUTHS = {
    "all": (2e-5, 3.1e-5, 0.1, 900.0),
    "no quadratic": (2e-5, 0.0, 0.1, 900.0),
    "no vision": (2e-5, 3.1e-5, 0.0, 900.0),
    "no constant": (2e-5, 3.1e-5, 0.1, 0.0),
    "tokens only": (4e-3, 0.0, 0.0, 0.0),
}


def seconds_of(truth: tuple[float, ...], noise: float = 0.0, seed: int = 0) -> np.ndarray:
    unit, *others = truth
    return unit * (WORK @ [1.0, *others]) * np.exp(noise * np.random.default_rng(seed).standard_normal(len(WORK)))


@pytest.mark.parametrize("name", TRUTHS)
def test_exact_seconds_give_the_coefficients_back(name):
    unit, *others = TRUTHS[name]
    found = fit(WORK, seconds_of(TRUTHS[name]))
    assert found.costs == Costs(1.0, *others) and found.token_seconds == pytest.approx(unit)
    assert found.predicted == pytest.approx(seconds_of(TRUTHS[name]))


@pytest.mark.parametrize("name", TRUTHS)
def test_noisy_seconds_give_them_within_the_noise(name):
    noise, truth = 0.01, dict(zip(TERMS, (1.0, *TRUTHS[name][1:]), strict=True))
    drawn = [fit(WORK, seconds_of(TRUTHS[name], noise, seed)).costs for seed in range(20)]
    for term, value in truth.items():
        found = np.array([getattr(c, term) for c in drawn])
        if value:
            assert abs(found / value - 1).max() < 0.15 and np.median(found) == pytest.approx(value, rel=0.03), term
        else:
            assert (found == 0).sum() >= 17, term  # noise passes for a term about once in 25 times


def test_short_passes_count_as_much_as_long_ones():
    seconds = seconds_of(TRUTHS["all"])
    shortest = np.argsort(seconds)[: len(seconds) // 2]
    seconds[shortest] *= 1.5
    assert fit(WORK, seconds).costs.constant > 1.5 * TRUTHS["all"][3]


def test_seconds_that_know_no_tokens_are_refused():
    with pytest.raises(ValueError, match="do not grow with the tokens"):
        fit(WORK, np.full(len(WORK), 0.5))
    with pytest.raises(ValueError, match="do not grow with the tokens"):
        fit(WORK, 1e-9 * WORK[:, 1])


@pytest.mark.parametrize(("tokens", "patches", "image", "merge"), [(24_576, 65_536, 1296, 2), (1024, 65_536, 4, 2), (4096, 3000, 1296, 2)])
def test_shapes_fill_the_capacities_and_never_exceed_them(tokens, patches, image, merge):
    found = shapes(tokens, patches, image, merge)
    work = np.array([work_of(shape) for shape in found.values()])
    assert work[:, 0].max() <= tokens and work[:, 2].max() <= patches
    assert work[0, 0] == tokens and max(work[:, 2] / patches + work[:, 0] / tokens) > 0.6
    assert (work[:, 3] == 1).all() and np.linalg.matrix_rank(work / work.max(0), tol=1e-3) == 4
    for shape in found.values():
        for size in shape:
            assert size.patches % image == 0 and size.prefix > size.patches // merge**2 and all(n > 0 for n in size.suffixes)


def test_capacities_too_small_to_tell_are_refused():
    with pytest.raises(ValueError, match="pack_tokens: costs need at least 1024"):
        shapes(1000, 65_536, 4, 2)
    with pytest.raises(ValueError, match="pack_patches: expected at least 340 and 1296"):
        shapes(4096, 1000, 1296, 2)


def test_work_is_what_the_planner_counts():
    found = work_of((costs.Size(10, (3, 4), 8), costs.Size(5)))
    assert found.tolist() == [22, 50 + 4.5 + 30 + 8 + 40 + 12.5, 8, 1]


def test_the_warm_up_does_not_count_and_the_fastest_round_does(capsys):
    taken = iter([9.0, 0.1, 3.0, 2.0, 2.0, 4.0])
    found = measure({"a": (costs.Size(2),), "b": (costs.Size(3),)}, lambda shape: next(taken), rounds=2)
    assert found.tolist() == [2.0, 2.0] and next(taken, None) is None


@pytest.mark.parametrize("value", [0.0, 3e-5, 1.23e-9, 0.098, 1.0, 340.0, 123_000.0])
def test_the_line_reads_back_as_numbers(value):
    assert yaml.safe_load(yaml_of({"linear": 1.0, "quadratic": value})) == {"costs": {"linear": 1.0, "quadratic": value}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from actial_fast.model.tiny import TinyConfig, create

    folder = tmp_path_factory.mktemp("model")
    create(folder, ["a text"], TinyConfig(hidden=32, vision_hidden=32, layers=1, heads=4, vision_depth=0, image_size=28), seed=0)
    return folder


def test_a_micro_batch_holds_what_its_shape_says(model, tmp_path):
    processor = Processor.load(str(model), image_cache=str(tmp_path))
    recipe = SFTRecipe(pack_tokens=2**31 - 1, pack_patches=2**31 - 1)
    policy = costs.load_policy(costs.replace(recipe.model, path=str(model)), costs.torch.device("cpu"), 0, packed=True)
    for name, shape in shapes(1024, 4096, 4, 2).items():
        sequences = sequences_of(shape, processor, (28, 28), np.random.default_rng(0))
        groups = share(sequences, processor.image_token)
        sizes = [(g.prefix, tuple(len(sequences[i]) - g.prefix for i in g.members if len(g.members) > 1)) for g in groups]
        assert sizes == [(size.prefix, size.suffixes) for size in shape], name
        assert [sequences[g.members[0]].patches for g in groups] == [size.patches for size in shape], name
        (rounds,) = passes([Pass(policy, sequences, trained=True)], recipe, processor, World(0, 1, policy.device))
        (only,) = rounds
        shown = sum(size.patches // 4 for size in shape)
        assert len(only.batch.image_slots) == shown and (only.batch.features is None) == (shown == 0), name
        trained = sum(sum(size.suffixes) or size.prefix - max(1, size.patches // 4) for size in shape)
        assert len(only.batch.targets) == trained, name


def test_the_command_prints_a_line_that_a_recipe_takes(model, tmp_path, capsys):
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "costs.json"
    lines = f"kind: grpo\nmodel: {{path: {model}}}\npack_patches: 4096\n"
    recipe.write_text(lines)
    costs.main(["--recipe", str(recipe), "pack_tokens=1024", "--rounds", "3", "--json", str(out)])
    result, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert printed.splitlines()[-1] == yaml_of(result["costs"])
    recipe.write_text(lines + printed.splitlines()[-1] + "\n")
    assert load_recipe(recipe, []).costs == Costs(**result["costs"]) and result["costs"]["linear"] == 1
    assert {row["shape"] for row in result["shapes"]} == set(shapes(1024, 4096, 4, 2))
    assert all(row["seconds"] > 0 and math.isclose(row["error"], row["predicted"] / row["seconds"] - 1) for row in result["shapes"])
    assert result["settings"]["image"] == [28, 28]


def test_rates_are_kept_where_the_plan_finds_them(tmp_path, monkeypatch):
    from actial_fast.budget import gpus, rates

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    about = {"gpu": "NVIDIA H100 80GB HBM3", "date": "2026-11-28"}
    speeds = {"one sequence": 400.0, "images": 300.0, "images / 8": 90.0}  # micro-batches that are not full say nothing
    path = costs.keep_rates({"machine": about, "recipe": "r.yaml", "overrides": ["pack_tokens=8192"], "tflops": speeds, "copy_tb_s": 2.5})
    assert "pack_tokens=8192" in path.read_text()
    found = rates.rates_of(gpus.parse("8xH100"))
    assert found.tflops == (300e12, 400e12) and found.bandwidth[1] == 2.5e12 and found.about.startswith("measured on NVIDIA H100")

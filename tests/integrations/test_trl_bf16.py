"""actial_fast.integrations.trl in bfloat16, TRL's default: old, reference and policy log-probs come from one head.

The trunk rounds alike on all sides. TRL with `cast_lm_head_to_fp32` multiplies the same bf16 hidden states and weights in float32: it is
the oracle of the head, and what TRL's own bf16 head makes of it is the error that ours is measured by.
"""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from trl import GRPOTrainer

from actial_fast.integrations.trl import FusedGRPOTrainer
from tests.integrations.test_trl import (
    MODELS,
    STEPS,
    TOKENIZER,
    Options,
    covering,
    make_batch,
    make_trainer,
    run,
    text_model,
    trained,
)

NEAR = {"old": 0.06, "ref": 0.08}
"""How far the weights that old and reference log-probs are of lie from the policy's, relative to theirs."""
NOTHING = 1e-9  # above the KL of log-probs that differ in float32's last digit, as products of other numbers of rows may


@contextlib.contextmanager
def moved(model, distance: float, seed: int):
    """The model with all weights moved a little, alike whatever dtype they are kept in: the values stay bfloat16's."""
    g, kept = torch.Generator().manual_seed(seed), [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=g) * distance * p.float().std(correction=0)
            p.copy_((p.float() + noise).bfloat16())
        yield
        for p, before in zip(model.parameters(), kept, strict=True):
            p.copy_(before)


class Sides:
    """The oracle, TRL and ours on equal models, each with a batch whose old and reference log-probs are its own."""

    def __init__(self, kind: str, folder, distances: dict[str, float]):
        model, images = MODELS[kind]().bfloat16(), kind.startswith("images")
        settings = {"oracle": (GRPOTrainer, True), "theirs": (GRPOTrainer, False), "ours": (FusedGRPOTrainer, False)}
        self.trainers = {
            name: make_trainer(trainer, copy.deepcopy(model), folder, bf16=True, cast_lm_head_to_fp32=fp32)
            for name, (trainer, fp32) in settings.items()
        }
        batch = make_batch(self.trainers["oracle"], images)
        g = torch.Generator().manual_seed(7)
        noise = 0.2 * torch.randn(batch["completion_ids"].shape, generator=g)
        self.batches = {}
        for name, trainer in self.trainers.items():
            scored = {}
            for seed, (which, distance) in enumerate(distances.items()):
                with moved(trainer.model, distance, seed):
                    scored[which] = score(trainer, batch)
            own = {"old_per_token_logps": scored["old"], "ref_per_token_logps": scored["ref"]}
            self.batches[name] = batch | own
        sampled = self.batches["oracle"]["old_per_token_logps"] + noise
        for batch in self.batches.values():
            batch["sampling_per_token_logps"] = sampled

    def run(self, name: str, o: Options, steps: int) -> SimpleNamespace:
        return run(self.trainers[name], self.batches[name], o, steps)


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    made: dict = {}

    def get(kind: str, distances: dict[str, float]) -> Sides:
        key = (kind, *distances.values())
        if key not in made:
            made[key] = Sides(kind, tmp_path_factory.mktemp(kind), distances)
        return made[key]

    return get


def score(trainer: GRPOTrainer, batch: dict) -> torch.Tensor:
    """Log-probs (B, C) as the trainer scores old and reference ones."""
    ids, mask = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    pixels = {x: batch[x] for x in ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids") if x in batch}
    return trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, batch["completion_ids"].shape[1], **pixels)[0]


def gradient(result: SimpleNamespace) -> torch.Tensor:
    return torch.cat([g.double().flatten() for g in result.gradients.values()])


def error(result: SimpleNamespace, want: SimpleNamespace) -> tuple[float, float]:
    """The largest of loss and metrics, and the relative one of the whole gradient."""
    assert list(result.metrics) == list(want.metrics) and result.gradients.keys() == want.gradients.keys()
    values, expected = ([x for y in (r.losses, *r.metrics.values()) for x in y] for r in (result, want))
    values = max(abs(a - b) for a, b in zip(values, expected, strict=True))
    return values, float((gradient(result) - gradient(want)).norm() / gradient(want).norm())


def mostly_text() -> list[tuple[str, Options, int]]:
    """The options of the comparison in float32; several steps, and images, whose model is slow, in one of eight."""
    return [(kind, o, STEPS) if i % 8 == 0 else (kind.replace("images", "text"), o, 1) for i, (kind, o, _) in enumerate(covering())]


@pytest.mark.parametrize(("kind", "o", "steps"), mostly_text(), ids=str)
def test_a_step_in_bf16_equals_an_exact_head(sides, kind, o, steps):
    """Loss and metrics to float32's rounding, gradients to a part of what TRL's own bf16 head loses: with old log-probs, a reference and a
    correction that each side has scored itself."""
    both = sides(kind, NEAR)
    want, theirs, mine = (both.run(name, o, steps) for name in ("oracle", "theirs", "ours"))
    (_, their_gradient), (values, gradients) = error(theirs, want), error(mine, want)
    assert values < 1e-5 * max(1.0, *map(abs, want.losses)), (values, o)
    assert 1e-3 < their_gradient and gradients < min(their_gradient, 2**-7) / 2, (gradients, their_gradient, o)  # theirs may cross a clip
    if "lm_head.weight" in want.gradients:  # one rounding to bf16
        head = [x.gradients["lm_head.weight"].double() for x in (mine, want)]
        assert (head[0] - head[1]).norm() < 2**-8 * head[1].norm()


def test_the_bf16_batch_crosses_the_clips_and_trl_itself_is_off(sides):
    """Otherwise the test above would compare the easy half, or nothing at all."""
    both = sides("text", NEAR)
    o = Options("grpo", beta=0.04, importance="token_truncate")
    want, theirs = both.run("oracle", o, STEPS), both.run("theirs", o, STEPS)
    assert min(want.metrics["kl"]) > 1e-3 and max(want.metrics["clip_ratio/low_mean"]) > 0.05 < max(want.metrics["clip_ratio/high_mean"])
    assert error(theirs, want)[0] > 1e-4


@pytest.mark.parametrize("kind", ["text", "text-peft", "images"])
def test_equal_weights_give_ratios_of_1_and_no_kl_in_bf16(sides, kind):
    both = sides(kind, {"old": 0.0, "ref": 0.0})
    for loss_type, level, beta in (
        ("grpo", "sequence", 0.04),
        ("dapo", "token", 0.04),
        ("cispo", "token", 0.04),
        ("bnpo", "sequence", 0.0),
    ):
        trainer, batch = both.trainers["ours"], both.batches["ours"]
        o = Options(loss_type, level, beta)
        o.set_on(trainer)
        got = run(trainer, batch, o, STEPS)
        moved = {name: x for name, x in got.metrics.items() if "clip" in name or name == "kl"}
        assert len(moved) >= 2 and all(x < NOTHING for values in moved.values() for x in values), (moved, o)


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "peft"])
@pytest.mark.parametrize(("level", "epsilon"), [("sequence", 3e-4), ("token", 0.2)])
def test_training_that_moves_nothing_clips_nothing(tmp_path, level, epsilon, adapters):
    """The whole of train() at learning rate 0, two passes over each generation: GSPO's narrow clip sees every rounding that differs."""
    text_model().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    settings = {"bf16": True, "learning_rate": 0.0, "importance_sampling_level": level, "epsilon": epsilon, "epsilon_high": epsilon}
    got = trained(FusedGRPOTrainer, tmp_path, adapters, loss_type="grpo", beta=0.04, **settings)
    for entry in got.logs[:-1]:
        assert entry["kl"] < NOTHING and entry["clip_ratio/region_mean"] == 0 and abs(entry["loss"]) < 1e-6, entry
        assert entry["grad_norm"] > 0.1, "an update without a gradient says nothing"

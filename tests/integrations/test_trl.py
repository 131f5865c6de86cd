"""actial_fast.integrations.trl beside the installed TRL: the same model, batch and options go through the unpatched GRPOTrainer's own
`training_step` and through ours; losses, gradients of every parameter and logged metrics must be equal.

B sequences, C the longest completion, V vocabulary.
"""

import copy
import importlib
import importlib.metadata
import inspect
import itertools
import math
import os
import re
import socket
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import trl
import trl.trainer.utils
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from actial_fast.integrations import trl as ours
from actial_fast.integrations.trl import FusedGRPOTrainer, LogProbFunction, patch_trl, spec_of, unpatch
from actial_fast.model.tiny import build_tokenizer
from bench.kernels import loss_memory
from bench.step.models import config_of
from tests.head_cases import difference
from tests.ops.test_equal_to_trl import importance_ratio

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
IMPORTANCE = (None, "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
TOLERANCE = 1e-5
B, STEPS, TEMPERATURE, RANGE = 9, 3, 0.9, (0.7, 1.4)
LENGTHS, PROMPTS = (1, 7, 3, 9, 4, 6, 5, 2, 8), (4, 6, 3, 5, 4, 7, 3, 4, 5)  # before images


@dataclass(frozen=True)
class Options:
    """What is set on both trainers, in TRL's names. cap: of cispo's ratio, its epsilon_high."""

    loss_type: str = "grpo"
    level: str = "token"
    beta: float = 0.0
    importance: str | None = None
    on_policy: bool = False
    corrected_kl: bool = False
    delta: float | None = None
    entropy_coef: float = 0.0
    quantile: float = 1.0
    off_policy: float | None = None
    adaptive: bool = False
    cap: float = 1.15

    def __str__(self) -> str:
        return "-".join(str(x) for x in vars(self).values())

    def set_on(self, trainer: GRPOTrainer) -> None:
        high = self.cap if self.loss_type == "cispo" else 0.15
        low, top = RANGE
        own = {"loss_type": self.loss_type, "importance_sampling_level": self.level, "beta": self.beta, "epsilon_high": high}
        own |= {"top_entropy_quantile": self.quantile, "entropy_coef": self.entropy_coef, "off_policy_mask_threshold": self.off_policy}
        own |= {"use_vllm": self.importance is not None, "vllm_importance_sampling_mode": self.importance or "token_truncate"}
        own |= {"vllm_importance_sampling_clip_min": low, "vllm_importance_sampling_clip_max": top, "use_adaptive_entropy": self.adaptive}
        for name, value in own.items():
            setattr(trainer, name, value)
        trainer.epsilon_low = 0.1
        trainer._entropy_bonus_enabled = self.entropy_coef != 0 or self.adaptive
        trainer._last_world_entropy, trainer._entropy_window_stats = math.inf, None
        trainer.args.delta, trainer.args.use_bias_correction_kl = self.delta, self.corrected_kl
        trainer.args.entropy_target, trainer.args.entropy_coef_delta = 10.0, 0.005


# ---- tiny models, one pair of trainers for each


TOKENIZER = build_tokenizer(["text"], 10)


def text_model() -> Qwen2ForCausalLM:
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen2Config(vocab_size=len(TOKENIZER), initializer_range=0.2, tie_word_embeddings=False, attn_implementation="sdpa", **sizes)
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config)


def vision_model():
    from transformers import Qwen2_5_VLForConditionalGeneration

    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
    text = sizes | {"vocab_size": len(TOKENIZER), "initializer_range": 0.2, "rope_parameters": rope}
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 24, "fullatt_block_indexes": [1]}
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(config_of(TOKENIZER, text, vision | {"initializer_range": 0.2}))


def with_adapters(model):
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.0))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return adapted


def make_trainer(kind: type[GRPOTrainer], model, folder, **settings) -> GRPOTrainer:
    usual = {"bf16": False, "gradient_checkpointing": False, "max_completion_length": 12, "temperature": TEMPERATURE}
    usual |= {
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": STEPS,
        "num_generations": 3,
        "use_cpu": True,
        "report_to": [],
    }
    rows = Dataset.from_dict({"prompt": ["-"] * 3})
    config = GRPOConfig(str(folder), **usual | settings)
    return kind(model, lambda completions, **_: [0.0] * len(completions), config, rows, processing_class=copy.deepcopy(TOKENIZER))


@dataclass(frozen=True)
class Pair:
    """TRL's trainer and ours on equal models, and the batch both get."""

    theirs: GRPOTrainer
    ours: FusedGRPOTrainer
    batch: dict


MODELS = {
    "text": text_model,
    "text-peft": lambda: with_adapters(text_model()),
    "images": vision_model,
    "images-peft": lambda: with_adapters(vision_model()),
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    made: dict[str, Pair] = {}

    def get(name: str) -> Pair:
        if name not in made:
            made[name] = make_pair(MODELS[name](), tmp_path_factory.mktemp(name), name.startswith("images"))
        return made[name]

    return get


def make_pair(model, folder, images: bool = False, **settings) -> Pair:
    both = [make_trainer(kind, copy.deepcopy(model), folder, **settings) for kind in (GRPOTrainer, FusedGRPOTrainer)]
    return Pair(*both, make_batch(both[0], images))


def make_batch(trainer: GRPOTrainer, images: bool, seed: int = 3) -> dict:
    """What `_generate_and_score_completions` returns: left-padded prompts, right-padded completions, tokens that a tool wrote, one
    truncated sequence, and old, reference and sampler log-probs near the policy's, so that the clips are crossed."""
    g = torch.Generator().manual_seed(seed)
    start, pad, end = (TOKENIZER.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "image_pad", "vision_end"))
    shown = [(0, 1, 2)[b % 3] if images else 0 for b in range(B)]  # a third of the prompts has no image
    grids = [(1, 4, 4) if i % 2 else (1, 2, 4) for i in range(sum(shown))]
    prompts, left = [], list(grids)
    for length, count in zip(PROMPTS, shown, strict=True):
        ids = torch.randint(10, 250, (length,), generator=g).tolist()
        for _ in range(count):
            ids += [start, *[pad] * (math.prod(left.pop(0)) // 4), end]
        prompts.append(ids)
    P, C = max(map(len, prompts)), max(LENGTHS)
    prompt_ids, prompt_mask = torch.full((B, P), TOKENIZER.pad_token_id), torch.zeros(B, P, dtype=torch.int64)
    for b, ids in enumerate(prompts):
        prompt_ids[b, P - len(ids) :], prompt_mask[b, P - len(ids) :] = torch.tensor(ids), 1
    completion = (torch.arange(C) < torch.tensor(LENGTHS)[:, None]).long()
    completion_ids = torch.where(completion.bool(), torch.randint(10, 250, (B, C), generator=g), TOKENIZER.pad_token_id)
    completion[4] = 0  # as mask_truncated_completions makes it
    tool = (torch.rand(B, C, generator=g) > 0.2).long()
    tool[:, 0] = 1
    advantages = torch.randn(B, generator=g)
    advantages[6] = 0
    batch = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion,
        "tool_mask": tool,
        "advantages": advantages,
        "num_items_in_batch": (completion * tool).sum() + 3,
    }
    if images:
        ids = torch.cat([prompt_ids, completion_ids], 1)
        patches = sum(map(math.prod, grids))
        batch |= {"pixel_values": torch.randn(patches, 3 * 2 * 14 * 14, generator=g), "image_grid_thw": torch.tensor(grids)}
        batch |= {"num_images": shown, "mm_token_type_ids": (ids == pad).long()}
    with torch.no_grad():
        ids, mask = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask"))
        pixels = {x: batch[x] for x in ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids") if x in batch}
        near = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, C, **pixels)[0]

    def off(token: float, sequence: float) -> torch.Tensor:
        return near + token * torch.randn(B, C, generator=g) + sequence * torch.randn(B, 1, generator=g)

    old = off(0.15, 0.2)
    sampled = old + off(0.2, 0.05) - near
    sampled[1, 2] = math.nan  # the engine could not score it
    batch |= {"old_per_token_logps": old, "ref_per_token_logps": off(0.3, 0.0), "sampling_per_token_logps": sampled}
    return batch


def batch_for(batch: dict, o: Options) -> dict:
    """The batch as TRL's generation would give it under these options."""
    batch = dict(batch)
    if o.on_policy:
        del batch["old_per_token_logps"]
    if o.importance is None:
        del batch["sampling_per_token_logps"]
    else:
        masks = {"completion": batch["completion_mask"], "tool": batch["tool_mask"]}
        case = SimpleNamespace(old=batch["old_per_token_logps"], sampler=batch["sampling_per_token_logps"], **masks)
        batch["importance_sampling_ratio"] = importance_ratio(case, o.importance, *RANGE)
    return batch


# ---- one optimizer step's worth of training steps


def run(trainer: GRPOTrainer, batch: dict, o: Options, steps: int, generation: int | None = None) -> SimpleNamespace:
    """generation: how many steps share one generation (None: those of one optimizer step)."""
    o.set_on(trainer)
    trainer.current_gradient_accumulation_steps, trainer.args.steps_per_generation = steps, generation or steps
    trainer._step, trainer._buffered_inputs = 0, None
    trainer._metrics["train"].clear()
    trainer._generate_and_score_completions = lambda _: batch_for(batch, o)
    trainer.model.train()
    trainer.model.zero_grad(set_to_none=True)
    torch.manual_seed(0)  # TRL shuffles the batch
    losses = [float(trainer.training_step(trainer.model, None, None)) for _ in range(steps)]
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    metrics = {name: values for name, values in trainer._metrics["train"].items() if name != "step_time"}
    return SimpleNamespace(losses=losses, gradients=gradients, metrics=metrics)


def assert_same(pair: Pair, o: Options, steps: int) -> None:
    want, got = run(pair.theirs, pair.batch, o, steps), run(pair.ours, pair.batch, o, steps)
    assert_equal(want, got, o)


def assert_equal(want, got, o) -> None:
    assert got.losses == pytest.approx(want.losses, rel=TOLERANCE, abs=TOLERANCE / 4), o  # terms of size 1, which cancel
    assert got.gradients.keys() == want.gradients.keys() and len(want.gradients) > 3, o
    largest = max(g.abs().max() for g in want.gradients.values())
    assert largest > 1e-4, ("the gradient is next to nothing, so this comparison says nothing", o)
    for name, gradient in want.gradients.items():
        assert difference(got.gradients[name], gradient) < TOLERANCE or (got.gradients[name] - gradient).abs().max() < 1e-6 * largest, (
            name,
            o,
        )
    assert list(got.metrics) == list(want.metrics) and "entropy" in want.metrics, o
    for name, values in want.metrics.items():
        assert got.metrics[name] == pytest.approx(values, rel=TOLERANCE, abs=1e-6, nan_ok=True), (name, o)


def every() -> list[Options]:
    """All options that can meet. Importance weights come with old log-probs, as in TRL's generation; vespo takes them per token."""
    out = []
    for loss_type, level in itertools.product(ours.trl_loss.LOSS_TYPES, ("token", "sequence")):
        deltas = (None, 1.2) if loss_type in CLIPPED else (None,)
        modes = [m for m in IMPORTANCE if m is None or loss_type != "vespo" or m.startswith("token")]
        policies = [(True, None), *((False, mode) for mode in modes)]
        kl = ((0.0, False), (0.04, False), (0.04, True))
        for (beta, corrected), (on_policy, mode), delta, coef, quantile in itertools.product(kl, policies, deltas, (0.0, 0.02), (1.0, 0.4)):
            out.append(Options(loss_type, level, beta, mode, on_policy, corrected, delta, coef, quantile))
    return out


def covering() -> list[tuple[str, Options, int]]:
    """Every loss type at both levels with beta 0 and > 0, with and without importance correction, on every kind of model in turn."""
    chosen = []
    kinds = itertools.cycle(MODELS)
    for i, (loss_type, level, beta, corrected) in enumerate(
        itertools.product(ours.trl_loss.LOSS_TYPES, ("token", "sequence"), (0.0, 0.04), (False, True))
    ):
        modes = IMPORTANCE[1:3] if loss_type == "vespo" else IMPORTANCE[1:]
        o = Options(loss_type, level, beta, modes[i // 2 % len(modes)] if corrected else None, on_policy=not corrected and i % 3 == 0)
        if i % 4 == 3:
            next(kinds)  # so that no option always meets the same model
        chosen.append((next(kinds), o, 1 if i % 3 == 0 else STEPS))
    return chosen


@pytest.mark.parametrize(("kind", "o", "steps"), covering(), ids=str)
def test_a_step_equals_trl(pairs, kind, o, steps):
    assert_same(pairs(kind), o, steps)


FURTHER = (
    Options("grpo", beta=0.04, corrected_kl=True, delta=1.2, entropy_coef=0.02),
    Options("luspo", "sequence", delta=1.2, quantile=0.4),
    Options("dapo", quantile=0.4, entropy_coef=0.02, importance="token_mask"),
    Options("dapo", off_policy=0.05),
    Options("bnpo", "sequence", off_policy=0.05, importance="sequence_truncate", quantile=0.4),
    Options("cispo", "sequence", 0.04, corrected_kl=True, entropy_coef=-0.01),
    Options("cispo", cap=0.2, entropy_coef=0.02),
    Options("cispo", on_policy=True, cap=0.2),
    Options("sapo", on_policy=True, off_policy=0.05),
    Options("vespo", off_policy=0.05, importance="token_truncate", entropy_coef=0.02),
    Options("grpo", off_policy=0.05, entropy_coef=0.02),
    Options("dr_grpo", adaptive=True),
    Options("grpo", adaptive=True, entropy_coef=0.03, quantile=0.4, on_policy=True),
)


@pytest.mark.parametrize(("kind", "o"), list(zip(itertools.cycle(MODELS), FURTHER, strict=False)), ids=str)
def test_further_options_equal_trl(pairs, kind, o):
    assert_same(pairs(kind), o, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ours.trl_loss.LOSS_TYPES)
@pytest.mark.parametrize("kind", MODELS)
def test_every_combination_equals_trl(pairs, kind, loss_type, level):
    """The whole product on text; on the other models every seventh, so every value of each option: the loss sees rows, not the model."""
    chosen = [o for o in every() if (o.loss_type, o.level) == (loss_type, level)]
    assert len(chosen) >= 48
    chosen = chosen[:: 1 if kind == "text" else 7]
    for i, o in enumerate(chosen):
        assert_same(pairs(kind), o, STEPS if i % 2 or "mask" in str(o.importance) else 1)  # one step may hold masked sequences only


def test_the_batch_crosses_the_clips_and_the_sequences_that_are_dropped(pairs):
    """Otherwise the tests above would compare the easy half of every objective."""
    pair = pairs("text")
    metrics = run(pair.theirs, pair.batch, Options(), 1).metrics
    assert 0.05 < metrics["clip_ratio/low_mean"][0] and 0.05 < metrics["clip_ratio/high_mean"][0]
    assert metrics["clip_ratio/region_mean"][0] < 0.9
    with_all, without = (run(pair.theirs, pair.batch, Options("dapo", off_policy=x), 1).losses for x in (None, 0.05))
    assert with_all != without
    for mode in IMPORTANCE[1:]:
        ratio = batch_for(pair.batch, Options(importance=mode))["importance_sampling_ratio"]
        outside = (ratio == 0) | (ratio == RANGE[0]) | (ratio == RANGE[1])
        assert ratio.max() <= RANGE[1] and 0 < outside.sum() < outside.numel()


@pytest.mark.parametrize("change", [lambda x: 1.01 * x, lambda x: 0 * x], ids=["scaled by 1.01", "zeroed"])
def test_a_wrong_gradient_fails_the_comparison(pairs, monkeypatch, change):
    inner = ours.trl_loss.ops.linear_grpo_loss

    def broken(*args, **kwargs):
        out = inner(*args, **kwargs)
        return out._replace(loss=out.loss.detach() + change(out.loss - out.loss.detach()))

    monkeypatch.setattr(ours.trl_loss.ops, "linear_grpo_loss", broken)
    with pytest.raises(AssertionError):
        assert_same(pairs("text"), Options("dapo"), STEPS)


@pytest.mark.parametrize("kind", ["text", "images-peft"])
def test_only_rows_that_carry_loss_reach_the_head_and_adapters_leave_it_frozen(pairs, monkeypatch, kind):
    pair, seen, inner = pairs(kind), [], ours.trl_loss.ops.linear_grpo_loss

    def watched(hidden, weight, *args, **kwargs):
        seen.append((len(hidden), weight.requires_grad, kwargs["policy_mask"]))
        return inner(hidden, weight, *args, **kwargs)

    monkeypatch.setattr(ours.trl_loss.ops, "linear_grpo_loss", watched)
    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", None)  # TRL's head must not run beside ours
    run(pair.ours, pair.batch, Options("dapo"), 1)
    rows = int((pair.batch["completion_mask"] * pair.batch["tool_mask"])[batch_of_first_step(pair)].sum())
    assert seen == [(rows, not kind.endswith("peft"), None)]
    assert rows < pair.batch["completion_mask"].numel()


def batch_of_first_step(pair: Pair) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randperm(B)


def test_advantages_may_be_given_per_token(pairs):
    pair = pairs("text")
    g = torch.Generator().manual_seed(5)
    batch = pair.batch | {"advantages": torch.randn(pair.batch["completion_ids"].shape, generator=g)}
    for o in (Options("grpo"), Options("cispo"), Options("sapo", "sequence", 0.04)):
        assert_same(Pair(pair.theirs, pair.ours, batch), o, STEPS)


@pytest.mark.parametrize("loss_type", ours.trl_loss.LOSS_TYPES)
def test_a_generation_that_lasts_for_several_optimizer_steps(pairs, loss_type):
    pair, o = pairs("text"), Options(loss_type, beta=0.04)
    assert_equal(run(pair.theirs, pair.batch, o, 1, STEPS), run(pair.ours, pair.batch, o, 1, STEPS), o)


def test_a_micro_batch_without_a_row_gives_no_gradient(pairs):
    pair = pairs("text")
    batch = pair.batch | {"completion_mask": torch.zeros_like(pair.batch["completion_mask"])}
    want, got = (run(t, batch, Options("grpo", beta=0.04), 1) for t in (pair.theirs, pair.ours))
    assert got.losses == want.losses == [0.0]
    assert got.gradients.keys() == want.gradients.keys()
    assert all((g == 0).all() for g in got.gradients.values())
    assert all(got.metrics[name] == pytest.approx(x, nan_ok=True) for name, x in want.metrics.items())


def test_evaluation_equals_trl(pairs):
    pair = pairs("text")
    results = []
    for trainer in (pair.theirs, pair.ours):
        for o in (Options("grpo", beta=0.04), Options("dapo", entropy_coef=0.02)):
            o.set_on(trainer)
            trainer.model.eval()
            trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = STEPS  # neither counts in evaluation
            trainer._metrics["eval"].clear()
            trainer._generate_and_score_completions = lambda _, o=o: batch_for(pair.batch, o)
            loss, *_ = trainer.prediction_step(trainer.model, None, True)
            results.append([float(loss), *(x for values in trainer._metrics["eval"].values() for x in values)])
    assert results[2] == pytest.approx(results[0], rel=TOLERANCE, abs=1e-6) and results[3] == pytest.approx(
        results[1], rel=TOLERANCE, abs=1e-6
    )
    assert len(results[0]) > 5 and results[0][0] != 0


@pytest.mark.parametrize("name", ["text", "text-peft", "images"])
def test_with_gradient_checkpointing(tmp_path, name):
    pair = make_pair(MODELS[name](), tmp_path, name == "images", gradient_checkpointing=True)
    for trainer in (pair.theirs, pair.ours):
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(pair, Options("dapo", beta=0.04), STEPS)


def test_the_head_in_float32_under_bfloat16_autocast(tmp_path):
    """The trunk rounds alike on both sides; the head does not round at all."""
    pair = make_pair(text_model(), tmp_path, bf16=True, cast_lm_head_to_fp32=True)
    o = Options("dapo", beta=0.04)
    want, got = run(pair.theirs, pair.batch, o, STEPS), run(pair.ours, pair.batch, o, STEPS)
    assert got.losses == pytest.approx(want.losses, rel=TOLERANCE, abs=TOLERANCE / 10)
    assert difference(got.gradients["lm_head.weight"], want.gradients["lm_head.weight"]) < TOLERANCE
    norm = "model.norm.weight"
    assert difference(got.gradients[norm], want.gradients[norm]) < 1e-2


def test_under_bfloat16_autocast_ours_is_nearer_to_float32(tmp_path):
    o = Options("dapo", on_policy=True)  # no clip, which rounding could cross
    exact = make_pair(text_model(), tmp_path / "fp32")
    rounded = make_pair(text_model(), tmp_path / "bf16", bf16=True)
    name = "lm_head.weight"
    want = run(exact.theirs, exact.batch, o, STEPS).gradients[name]
    theirs, mine = (difference(run(t, exact.batch, o, STEPS).gradients[name], want) for t in (rounded.theirs, rounded.ours))
    assert 0 < mine < 0.1 and mine < 1.5 * theirs


# ---- models with more about their head


def tiny(config_class, model_class, **more):
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    return model_class(config_class(vocab_size=len(TOKENIZER), initializer_range=0.2, tie_word_embeddings=False, **sizes | more))


def softcapped():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return tiny(Gemma2Config, Gemma2ForCausalLM, head_dim=12, final_logit_softcapping=3.0, attn_implementation="eager")


def scaled():
    from transformers import CohereConfig, CohereForCausalLM

    return tiny(CohereConfig, CohereForCausalLM, logit_scale=0.3)


def biased():
    from transformers import PhiConfig, PhiForCausalLM

    model = tiny(PhiConfig, PhiForCausalLM, num_key_value_heads=2)
    torch.nn.init.normal_(model.lm_head.bias)
    return model


def experts():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 12, "router_aux_loss_coef": 0.1}
    return tiny(Qwen3MoeConfig, Qwen3MoeForCausalLM, **sizes)


@pytest.mark.parametrize("make", [softcapped, scaled, biased, experts])
def test_softcaps_scales_biases_and_load_balancing_equal_trl(tmp_path, make):
    pair = make_pair(make(), tmp_path)
    assert pair.ours.aux_loss_enabled == (make is experts)
    assert_same(pair, Options("dapo", beta=0.04), STEPS)
    assert_same(pair, Options("grpo", entropy_coef=0.02), STEPS)


def test_a_head_with_another_scale_is_refused(tmp_path):
    from transformers import GraniteConfig, GraniteForCausalLM

    with pytest.raises(ValueError, match=r"logits_scaling = 4.0; supported: TRL 1.15, 1.16"):
        make_trainer(FusedGRPOTrainer, tiny(GraniteConfig, GraniteForCausalLM, logits_scaling=4.0), tmp_path)


# ---- the whole of train()


def trained(kind: type[GRPOTrainer], folder, adapters: bool = False, **settings) -> SimpleNamespace:
    """Logs and trained weights of a run: sampling, rewards, old and reference log-probs, two updates of each batch, clipped gradients."""
    usual = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": STEPS, "num_generations": 3, "num_iterations": 2}
    usual |= {"max_completion_length": 8, "max_steps": 4, "learning_rate": 0.3, "optim": "sgd", "beta": 0.04, "loss_type": "dapo"}
    usual |= {"use_cpu": True, "bf16": False, "report_to": [], "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    rows = Dataset.from_dict({"prompt": ["what is it", "where is it", "which way"] * 2})

    def reward(completions, **_):
        return [float(sum(map(ord, text)) % 7) for text in completions]

    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.0) if adapters else None
    config = GRPOConfig(str(folder / kind.__name__), **usual | settings)
    trainer = kind(str(folder / "model"), reward, config, rows, peft_config=lora, processing_class=copy.deepcopy(TOKENIZER))
    trainer.train()
    timed = ("runtime", "step_time", "per_second", "num_tokens")
    logs = [{k: v for k, v in entry.items() if not any(x in k for x in timed)} for entry in trainer.state.log_history]
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return SimpleNamespace(logs=logs, weights=weights, processes=trainer.accelerator.num_processes)


def assert_trained_alike(folder, **settings) -> SimpleNamespace:
    text_model().save_pretrained(folder / "model")
    TOKENIZER.save_pretrained(folder / "model")
    want, got = (trained(kind, folder, **settings) for kind in (GRPOTrainer, FusedGRPOTrainer))
    assert_same_training(want, got)
    return got


def assert_same_training(want: SimpleNamespace, got: SimpleNamespace) -> None:
    assert len(want.logs) == 5 and {"kl", "entropy", "loss", "grad_norm", "clip_ratio/region_mean"} <= set(want.logs[0])
    assert want.logs[-2]["kl"] > 1e-3, "the policy never moved"
    for entry, mine in zip(want.logs, got.logs, strict=True):
        assert mine == pytest.approx(entry, rel=1e-4, abs=1e-5, nan_ok=True)
    for name, weight in want.weights.items():
        assert difference(got.weights[name], weight) < 1e-4, name


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "peft"])
def test_training_ends_with_the_same_weights_and_logs(tmp_path, adapters):
    assert_trained_alike(tmp_path, adapters=adapters)


def test_training_in_bfloat16_runs_in_what_accelerate_wraps(tmp_path):
    text_model().save_pretrained(tmp_path / "model")
    got = trained(FusedGRPOTrainer, tmp_path, bf16=True, max_steps=1)
    assert math.isfinite(got.logs[0]["loss"]) and got.logs[0]["grad_norm"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("unused", [False, True], ids=["", "find_unused_parameters"])
def test_two_processes_train_as_trl_does(tmp_path, unused):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(_train_in_process, (port, tmp_path, unused), nprocs=2)


def _train_in_process(rank: int, port: int, folder, unused: bool) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    (folder / str(rank)).mkdir()
    got = assert_trained_alike(folder / str(rank), ddp_find_unused_parameters=unused, top_entropy_quantile=0.5, entropy_coef=0.01)
    assert got.processes == 2


# ---- memory


def test_the_sides_of_the_memory_bench_compute_the_same_loss():
    assert loss_memory.compare([loss_memory.measure(name, 300, 8, 50, torch.get_num_threads()) for name in loss_memory.SIDES]) > 0
    other = loss_memory.measure("chunked", 300, 8, 50, torch.get_num_threads())
    with pytest.raises(AssertionError, match="not the same loss"):
        loss_memory.compare([other, other | {"loss": 1.001 * other["loss"]}])


@pytest.mark.slow
def test_peak_memory_at_the_vocabulary_of_qwen():
    result = loss_memory.measured(list(loss_memory.SIDES), 4096, 64, 152064, 1)
    peak = {row["side"]: row["peak_mib"] for row in result["sides"]}
    assert peak["ours"] <= peak["materialised"] / 4 and peak["ours"] <= peak["chunked"]
    assert peak["ours, logprob"] <= peak["materialised"] / 4 and peak["ours, logprob"] <= peak["chunked"]
    assert peak["ours"] > result["gradients_mib"], "not measured"


# ---- level "logprob"


def head_case(dtype=torch.float32, bias=False, rows=11):
    g = torch.Generator().manual_seed(1)
    H, V = 8, 37
    tensors = [torch.randn(rows, H, generator=g), torch.randn(V, H, generator=g), torch.randn(V, generator=g) if bias else None]
    return [x if x is None else x.to(dtype).requires_grad_() for x in tensors], torch.randint(0, V, (rows,), generator=g)


def evaluated(function, dtype, bias, scaling, outputs):
    tensors, targets = head_case(dtype, bias)
    out = function.apply(*tensors, targets, 0.8, 16, *scaling, outputs)
    loss = (out[0] * torch.linspace(-1, 1, len(targets))).sum()
    if out[1] is not None:
        loss = loss + (out[1] * torch.linspace(1, 2, len(targets))).sum()
    return out, torch.autograd.grad(loss, [x for x in tensors if x is not None])


@pytest.mark.parametrize(
    "outputs", [(), ("log_probs", "entropy"), ("log_probs", "mean_logits", "is_top1"), ("entropy", "log_sum_sq_probs")], ids=str
)
@pytest.mark.parametrize("scaling", [(None, 1.0), (3.0, 1.0), (None, 0.3), (3.0, 0.3)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_the_per_token_function_equals_trl(outputs, scaling, bias):
    (want, want_gradients), (got, gradients) = (
        evaluated(f, torch.float32, bias, scaling, outputs) for f in (ChunkedLogProbFunction, LogProbFunction)
    )
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert a.dtype == b.dtype and a.requires_grad == b.requires_grad
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients, want_gradients, strict=True):
        assert difference(a, b) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_per_token_function_has_the_dtypes_of_trl(dtype):
    everything = ("entropy", *ours.EXTRA_OUTPUTS)
    want, got = (evaluated(f, dtype, True, (None, 1.0), everything) for f in (ChunkedLogProbFunction, LogProbFunction))
    assert [x.dtype for x in got[0]] == [x.dtype for x in want[0]] and [x.dtype for x in got[1]] == [x.dtype for x in want[1]]
    for a, b in zip((*got[0][:4], *got[1]), (*want[0][:4], *want[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.1)


def test_the_per_token_function_takes_a_head_of_another_dtype():
    (hidden, weight, _), targets = head_case()
    out = LogProbFunction.apply(hidden.bfloat16(), weight, None, targets, 1.0, 16)
    want = ChunkedLogProbFunction.apply(hidden.bfloat16(), weight, None, targets, 1.0, 16)
    torch.testing.assert_close(out[0], want[0], rtol=0.02, atol=0.05)
    assert torch.autograd.grad(out[0].sum(), weight)[0].dtype == torch.float32


def test_the_per_token_function_takes_targets_of_minus_100():
    """TRL leaves such rows out before the call, and fills their fields with 0."""
    (hidden, weight, _), targets = head_case()
    gone = torch.arange(len(targets)) % 3 == 1
    got, want = (
        LogProbFunction.apply(hidden, weight, None, targets.masked_fill(gone, -100), 0.8, 16),
        LogProbFunction.apply(hidden[~gone], weight, None, targets[~gone], 0.8, 16),
    )
    for a, b in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(a[~gone], b)
        assert (a[gone] == 0).all()
    gradients = [torch.autograd.grad(x[0].sum() + x[1].sum(), [hidden, weight]) for x in (got, want)]
    assert all(difference(a, b) < TOLERANCE for a, b in zip(*gradients, strict=True))


def test_the_first_of_equal_logits_is_the_top_one():
    hidden, weight = torch.ones(2, 3), torch.ones(5, 3)
    for function in (ChunkedLogProbFunction, LogProbFunction):
        assert function.apply(hidden, weight, None, torch.tensor([0, 2]), 1.0, 4)[4].tolist() == [True, False]


def test_the_extra_outputs_are_the_same_in_chunks(monkeypatch):
    (hidden, weight, _), targets = head_case()
    whole = LogProbFunction.apply(hidden, weight, None, targets, 1.0, 16)
    monkeypatch.setattr(ours, "WORKSPACE_MB", 0.005)  # 8 of 11 rows
    parts = LogProbFunction.apply(hidden, weight, None, targets, 1.0, 16)
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b)


def test_arguments_are_those_of_the_installed_function():
    theirs, mine = (inspect.signature(f).parameters for f in (ChunkedLogProbFunction.forward, LogProbFunction.apply))
    assert list(theirs)[1:] == list(mine)
    assert [p.default for p in theirs.values()][1:] == [p.default for p in mine.values()]


@pytest.mark.parametrize(("name", "value"), [("logit_scale", 0.0), ("ds_id", None)])
def test_a_head_that_cannot_be_served_is_refused(name, value):
    (hidden, weight, _), targets = head_case()
    if name == "ds_id":
        weight.ds_id = 3
    with pytest.raises(ValueError, match=r"supported: TRL 1\.15, 1\.16"):
        LogProbFunction.apply(hidden, weight, None, targets, 1.0, 16, None, 1.0 if value is None else value)


# ---- patching


def state() -> tuple:
    return trl.trainer.utils._ChunkedLogProbFunction, GRPOTrainer.__init__, GRPOTrainer._compute_loss


@pytest.fixture
def unpatched():
    before = state()
    yield before
    unpatch()
    assert state() == before


def test_level_logprob_serves_an_unchanged_trainer(unpatched, pairs):
    pair = pairs("text")
    for o in (Options("grpo", beta=0.04), Options("cispo", entropy_coef=0.02)):
        want = run(pair.theirs, pair.batch, o, STEPS)
        with patch_trl("logprob"):
            assert state() == (LogProbFunction, *unpatched[1:])
            got = run(pair.theirs, pair.batch, o, STEPS)
        assert state() == unpatched
        assert_equal(want, got, o)
        assert got.losses != want.losses or got.gradients["lm_head.weight"].ne(want.gradients["lm_head.weight"]).any(), "TRL's ran again"


def test_level_loss_makes_every_new_trainer_ours(unpatched, tmp_path, pairs):
    pair, o = pairs("text"), Options("dapo", beta=0.04)
    want = run(pair.theirs, pair.batch, o, STEPS)
    patch_trl()
    trainer = make_trainer(GRPOTrainer, text_model(), tmp_path)
    assert_equal(want, run(trainer, pair.batch, o, STEPS), o)
    assert trainer.workspace_mb is None
    fused = make_trainer(FusedGRPOTrainer, text_model(), tmp_path)  # patched twice over: once is enough
    assert_equal(want, run(fused, pair.batch, o, STEPS), o)
    with pytest.raises(ValueError, match="made before patch_trl"):
        run(pair.theirs, pair.batch, o, 1)
    unpatch()
    assert state() == unpatched
    unpatch()


def test_the_second_patch_replaces_the_first(unpatched):
    patch_trl("loss")
    patch_trl("logprob")
    assert state() == (LogProbFunction, *unpatched[1:])


def test_a_trainer_with_its_own_loss_is_refused(unpatched, tmp_path):
    class Own(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, inputs)

    with patch_trl(), pytest.raises(ValueError, match=r"Own: computes its own loss; patch_trl\('logprob'\) serves it"):
        make_trainer(Own, text_model(), tmp_path)
    with patch_trl("logprob"):
        make_trainer(Own, text_model(), tmp_path)


@pytest.mark.parametrize("version", ["1.14.2", "1.17.0", "0.29.1", "1.150.0", None])
def test_another_version_of_trl_is_refused_at_import(version, monkeypatch):
    """The message is short and says what to install."""

    def found(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", found)
    monkeypatch.delitem(sys.modules, "actial_fast.integrations.trl_loss")
    monkeypatch.delitem(sys.modules, "actial_fast.integrations.trl")
    monkeypatch.delattr("actial_fast.integrations.trl")
    monkeypatch.delattr("actial_fast.integrations.trl_loss")
    what = "not installed" if version is None else f"version {version} is installed"
    with pytest.raises(ImportError, match=rf"^trl: {re.escape(what)}; .* of TRL 1\.15 and 1\.16: pip install trl==1\.16\.0$"):
        importlib.import_module("actial_fast.integrations.trl")


def test_an_unknown_level_is_refused(unpatched):
    with pytest.raises(ValueError, match="level: 'all' is not one of logprob, loss"):
        patch_trl("all")


# ---- options


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "gspo"}, r"loss_type: 'gspo' is not supported; supported: .*loss_type grpo, bnpo"),
        ({"importance_sampling_level": "word"}, "ratio: 'word' is not one of token, sequence"),
        ({"loss_type": "vespo", "vllm_importance_sampling_clip_max": 0.5}, "vespo needs 1 between them"),
        ({"delta": 1.05}, "clip_delta: must be > 1 \\+ clip_high"),
        ({"torch_compile": True}, "torch_compile: would compile the loss anew"),
    ],
    ids=str,
)
def test_options_without_our_loss_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(FusedGRPOTrainer, text_model(), tmp_path, **settings)


def test_a_cispo_cap_below_1_is_told_and_computed():
    """TRL's default for it, 0.2; the steps of FURTHER have its values."""
    with pytest.warns(UserWarning, match="epsilon_high: cispo caps the ratio itself at it, and at 0.2"):
        assert spec_of(GRPOConfig(loss_type="cispo", bf16=False)).clip_high == pytest.approx(-0.8)


@pytest.mark.parametrize(("name", "told"), [("DEEPSPEED", "DEEPSPEED"), ("FSDP", "FSDP1")])
def test_other_ways_to_distribute_are_refused_and_the_way_is_named(pairs, name, told):
    trainer = SimpleNamespace(**vars(pairs("text").ours))
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1))
    trainer.accelerator = SimpleNamespace(distributed_type=SimpleNamespace(name=name), state=state)
    with pytest.raises(
        ValueError, match=rf"distributed_type: {told} is not supported: set accelerate's fsdp_version to 2, .*DDP.*; supported"
    ):
        ours.trl_loss.prepare(trainer, 700)


def test_the_spec_of_trls_defaults():
    args = GRPOConfig("unused", use_cpu=True, bf16=False, epsilon_high=0.28)
    spec = spec_of(args)
    assert (spec.objective, spec.aggregation, spec.ratio) == ("clip", "token", "token") and args.loss_type == "dapo"
    assert (spec.clip_low, spec.clip_high, spec.clip_delta, spec.beta) == (0.2, 0.28, None, 0.0)
    assert (spec.importance, spec.importance_min, spec.importance_max) == ("sequence_mask", 0.0, 3.0)


def test_the_workspace_can_be_chosen(tmp_path):
    pair = make_pair(text_model(), tmp_path)
    small = FusedGRPOTrainer.__new__(FusedGRPOTrainer)
    small.__dict__ = dict(pair.ours.__dict__, workspace_mb=0.02)
    got, want = run(small, pair.batch, Options("dapo"), 1), run(pair.ours, pair.batch, Options("dapo"), 1)
    assert_equal(want, got, "in chunks")
    with pytest.raises(ValueError, match=r"workspace_mb: 0\.001 is too small for one row"):
        small.workspace_mb = 0.001
        run(small, pair.batch, Options("dapo"), 1)

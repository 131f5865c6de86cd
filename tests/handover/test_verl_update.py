"""One update from a handed-over recipe: verl 0.9.1's own advantages, weights, loss and optimizer beside ours, with the exported overrides.

Runs in verl's environment (`make test-verl`); elsewhere it is skipped, for lack of Hydra. B replies, up to L tokens each, H hidden, V
vocabulary. The policy is a head over fixed hidden states; verl's side computes log-probs by log_softmax and everything else by the
functions that its trainer calls, on what its configuration says.
"""

import asyncio
import importlib.util
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from actial_fast import ops
from actial_fast.data.sources.source import open_source
from actial_fast.rollout.choosing import fines, totals_of
from actial_fast.settings.running import OptimConfig
from actial_fast.tasks.rewards import score
from tests.handover.exported import handed, overrides_of, parquet, recipe_of, words_of, write_rows

pytest.importorskip("hydra", reason="verl's own environment has it: make test-verl")

GROUPS, N, L, H, V = 2, 4, 9, 8, 31
LENGTHS = (9, 4, 7, 1, 3, 8, 2, 6)

GSPO = {"aggregation": "sequence", "ratio": "sequence", "clip_low": 0.02, "clip_high": 0.03}
RECIPES = {
    "the paper's": {},
    "another size of steps": {"loss": {"clip_low": 0.1, "clip_high": 0.3, "beta": 0.2}, "advantages": {"scale": "none"}},
    "dapo": {"loss": {"clip_high": 0.28, "beta": 0.0}},
    "dual clip, k1": {"loss": {"dual_clip": 1.3, "kl": "k1", "beta": 0.1, "aggregation": "sequence"}},
    "entropy, k2": {"loss": {"entropy_coef": 0.02, "kl": "k2", "beta": 0.1, "aggregation": "sequence_sum"}},
    "dr_grpo": {"loss": {"aggregation": "constant"}, "advantages": {"scale": "none"}},
    "rloo": {"advantages": {"baseline": "leave_one_out", "scale": "none"}},
    "gspo": {"loss": GSPO | {"importance": "sequence_truncate"}},
    "gspo, by tokens": {"loss": GSPO | {"aggregation": "token", "importance": "sequence_mask"}},
    "gspo, no weights": {"loss": GSPO, "importance_correction": "off"},
    "cispo": {"loss": {"objective": "cispo", "clip_high": 0.2, "beta": 0.0}},
    "sapo": {"loss": {"objective": "sapo", "aggregation": "sequence", "sapo_temperature_neg": 1.3}},
    "masked weights": {"loss": {"importance": "token_mask", "importance_min": 0.8, "importance_max": 1.2}},
    "masked weights from 0": {"loss": {"importance": "token_mask", "importance_max": 1.1}},
    "sequence weights": {"loss": {"importance": "sequence_truncate", "importance_max": 1.1}},
    "masked sequence weights": {"loss": {"importance": "sequence_mask", "importance_min": 0.5, "importance_max": 1.5}},
    "no weights": {"importance_correction": "off"},
    "temperature": {"sampling": {"temperature": 0.7, "n": N, "max_new_tokens": L}},
}


def composed(folder):
    """verl's configuration with the overrides of the folder's script: unknown keys are errors."""
    from hydra import compose, initialize_config_dir

    root = importlib.util.find_spec("verl").submodule_search_locations[0]
    with initialize_config_dir(os.path.join(root, "trainer", "config"), version_base=None):
        return compose("ppo_trainer", overrides=words_of(folder)[2:])


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture
def folder_of(rows, tmp_path):
    def folder_of(**fields):
        recipe = recipe_of(rows, **fields)
        handed(recipe, tmp_path / "out")
        return recipe, tmp_path / "out"

    return folder_of


def batch(recipe):
    """What an update is made from. Old, reference and sampler's log-probs lie near the policy's, so that clips and bounds are crossed."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(sum(LENGTHS), H, generator=g), torch.randn(V, H, generator=g) / H**0.5
    targets = torch.randint(0, V, (sum(LENGTHS),), generator=g)
    with torch.no_grad():
        logp = (hidden @ weight.T / recipe.sampling.temperature).log_softmax(-1).gather(-1, targets[:, None])[:, 0]

    def near(x, spread):
        return x + spread * torch.randn(x.shape, generator=g)

    old = near(logp, 0.2)
    rewards = torch.tensor([1.0, 0.5, 0.0, 0.5, 0.5, 1.0, 1.0, 0.0])
    return hidden, weight, targets, rewards, old, near(logp, 0.5), near(old, 0.2)


def ours(recipe, hidden, weight, targets, rewards, old, ref, sampled):
    """Loss and gradients as grpo._accumulate has them."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    advantages = ops.group_advantages(rewards[:, None], torch.arange(GROUPS * N) // N, recipe.advantages)
    cu_seqlens = torch.tensor([0, *np.cumsum(LENGTHS)])
    spec = recipe.loss
    token_weight = ops.token_weights(
        spec, cu_seqlens, tokens=sum(LENGTHS), sequences=len(LENGTHS), max_length=recipe.sampling.max_new_tokens
    )
    result = ops.linear_grpo_loss(
        hidden,
        weight,
        targets,
        spec=spec,
        temperature=recipe.sampling.temperature,
        advantages=torch.repeat_interleave(advantages, torch.tensor(LENGTHS)),
        old_logp=old,
        ref_logp=ref if spec.beta else None,
        sampler_logp=None if recipe.importance_correction == "off" else sampled,
        token_weight=token_weight,
        cu_seqlens=cu_seqlens,
    )
    result.loss.backward()
    return result.loss.detach(), hidden.grad, weight.grad


def theirs(config, hidden, weight, targets, rewards, old, ref, sampled):
    """Loss and gradients as verl's trainer and its FSDP engine come to them, on one rank."""
    from tensordict import TensorDict
    from verl import DataProto
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_add_to_batch
    from verl.utils import tensordict_utils as tu
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.utils.losses import ppo_loss

    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]  # (B, L)

    def padded(x):
        return torch.zeros(mask.shape).masked_scatter(mask, x)

    scores = torch.zeros(mask.shape).scatter(1, torch.tensor(LENGTHS)[:, None] - 1, rewards[:, None])  # at each reply's last token
    tensors = {
        "response_mask": mask.long(),
        "token_level_rewards": scores,
        "old_log_probs": padded(old),
        "rollout_log_probs": padded(sampled),
    }
    data = DataProto.from_dict(tensors=tensors, non_tensors={"uid": np.repeat(np.array(["a", "b"], object), N)})
    correction = config.algorithm.rollout_correction
    if correction.rollout_is is not None:
        data, _ = compute_rollout_correction_and_add_to_batch(data, correction)
    # as its trainers' compute_advantage, which lies beside what imports engines for rollouts
    algorithm = config.algorithm
    more = {"norm_adv_by_std_in_grpo": algorithm.norm_adv_by_std_in_grpo} if algorithm.adv_estimator == "grpo" else {"config": algorithm}
    advantages, _ = get_adv_estimator_fn(algorithm.adv_estimator)(
        token_level_rewards=data.batch["token_level_rewards"],
        response_mask=data.batch["response_mask"],
        index=data.non_tensor_batch["uid"],
        **more,
    )
    data.batch["advantages"] = advantages

    def nested(x):
        return torch.nested.as_nested_tensor([row[:n] for row, n in zip(x, LENGTHS, strict=True)], layout=torch.jagged)

    fields = {name: nested(data.batch[name]) for name in ("response_mask", "old_log_probs", "advantages")}
    if "rollout_is_weights" in data.batch:
        fields["rollout_is_weights"] = nested(data.batch["rollout_is_weights"])
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    if actor.use_kl_loss:
        fields["ref_log_prob"] = nested(padded(ref))
    # the engine's outputs stand one place before their tokens, behind a prompt: of one token here
    fields |= {"prompts": nested_ones(len(LENGTHS)), "responses": nested(mask.long())}
    td = TensorDict(fields, batch_size=[len(LENGTHS)])
    global_info = {
        "dp_size": 1,
        "batch_num_tokens": sum(LENGTHS),
        "global_batch_size": config.actor_rollout_ref.actor.ppo_mini_batch_size * N,
    }
    tu.assign_non_tensor(td, **global_info)
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    spread = (hidden @ weight.T / config.actor_rollout_ref.rollout.temperature).log_softmax(-1)
    output = {"log_probs": behind_prompts(spread.gather(-1, targets[:, None])[:, 0])}
    if actor.entropy_coeff:
        output["entropy"] = behind_prompts(-(spread.exp() * spread).sum(-1))
    loss, _ = ppo_loss(actor, output, td)
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


def nested_ones(count):
    return torch.nested.as_nested_tensor([torch.ones(1, dtype=torch.long)] * count, layout=torch.jagged)


def behind_prompts(x):
    """Rows of replies (T,) as the engine gives them for prompt and reply: the value of a token at the place before it."""
    return torch.cat([torch.nn.functional.pad(part, (0, 1)) for part in x.split(list(LENGTHS))])


@pytest.mark.parametrize("fields", RECIPES.values(), ids=RECIPES.keys())
def test_loss_and_gradient_are_ours(fields, folder_of):
    recipe, folder = folder_of(**fields)
    config, case = composed(folder), batch(recipe)
    (loss, *gradients), (want, *wanted) = theirs(config, *case), ours(recipe, *case)
    assert loss.item() == pytest.approx(want.item(), rel=1e-5, abs=1e-6)
    for got, expected in zip(gradients, wanted, strict=True):
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_what_is_not_handed_over_changes_the_update(folder_of):
    """verl's defaults of these would give another loss, so the comparison above sees that they are set."""
    recipe, folder = folder_of(loss={"clip_low": 0.1, "clip_high": 0.3, "beta": 0.2}, advantages={"scale": "none"})
    case = batch(recipe)
    want = ours(recipe, *case)[0].item()
    for key, value in (
        ("actor_rollout_ref.actor.clip_ratio_low", 0.2),
        ("actor_rollout_ref.actor.use_kl_loss", False),
        ("actor_rollout_ref.actor.kl_loss_coef", 0.001),
        ("actor_rollout_ref.actor.clip_ratio_c", 1.05),
        ("algorithm.norm_adv_by_std_in_grpo", True),
        ("algorithm.rollout_correction.rollout_is", None),
        ("actor_rollout_ref.actor.loss_agg_mode", "seq-mean-token-mean"),
    ):
        config = composed(folder)
        from omegaconf import OmegaConf

        OmegaConf.update(config, key, value)
        assert theirs(config, *case)[0].item() != pytest.approx(want, rel=1e-4), key


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_optimizer_and_learning_rates(schedule, warmup, folder_of):
    """Two steps on given gradients, and the rates of all steps; those of the warm-up come one step later, as the export tells."""
    from verl.utils.config import omega_conf_to_dataclass
    from verl.utils.torch_functional import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup
    from verl.workers.config.optimizer import build_optimizer

    from actial_fast.train.optim import set_learning_rate

    optim = {
        "lr": 3e-3,
        "betas": [0.8, 0.9],
        "eps": 1e-6,
        "weight_decay": 0.1,
        "warmup_steps": warmup,
        "schedule": schedule,
        "min_lr_ratio": 0.2,
    }
    recipe, folder = folder_of(optim=optim, steps=12)
    assert isinstance(recipe.optim, OptimConfig)
    config = composed(folder)
    settings = omega_conf_to_dataclass(config.actor_rollout_ref.actor.optim)
    assert settings.clip_grad == recipe.optim.clip_norm and config.trainer.total_training_steps == recipe.steps
    g = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(5, 4, generator=g), torch.randn(2, 5, 4, generator=g)

    def stepped(make):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = make(parameter)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
        return optimizer, parameter.detach()

    a = recipe.optim
    mine, want = stepped(lambda p: torch.optim.AdamW([p], lr=a.lr, betas=a.betas, eps=a.eps, weight_decay=a.weight_decay))
    verls, got = stepped(lambda p: build_optimizer([p], settings))
    assert torch.equal(got, want)
    verls = build_optimizer([torch.nn.Parameter(start)], settings)
    warm = {"optimizer": verls, "num_warmup_steps": settings.lr_warmup_steps}
    if settings.lr_scheduler_type == "constant":
        scheduler = get_constant_schedule_with_warmup(**warm)
    else:
        scheduler = get_cosine_schedule_with_warmup(
            **warm, num_training_steps=12, min_lr_ratio=settings.min_lr_ratio, num_cycles=settings.num_cycles
        )
    rates = []
    for _ in range(12):
        rates.append(verls.param_groups[0]["lr"])
        verls.step()
        scheduler.step()
    wanted = [set_learning_rate(mine, recipe.optim, step, 12) for step in range(1, 13)]
    assert rates[warmup:] == pytest.approx(wanted[warmup:])
    assert rates[1:warmup] == pytest.approx(wanted[: max(0, warmup - 1)])


def test_the_fine_of_long_replies(folder_of):
    """By verl's reward manager, for replies of every length."""
    from verl import DataProto
    from verl.experimental.reward_loop.reward_manager.dapo import DAPORewardManager
    from verl.trainer.ppo.reward import get_custom_reward_fn

    recipe, folder = folder_of(overlong={"buffer": 4, "penalty": 0.5})
    config, record = composed(folder), parquet(folder / "train.parquet")[0]
    text = "<think>-</think><answer>A</answer>"
    manager = DAPORewardManager(config, SimpleNamespace(decode=lambda ids, skip_special_tokens: text), get_custom_reward_fn(config))
    row = open_source(recipe.data.sources[0])[0]
    for length in range(1, L + 1):
        mask = (torch.arange(1 + L) < 1 + length).long()[None]  # behind a prompt of one token
        given = {key: np.array([record[key]], object) for key in ("data_source", "reward_model", "extra_info")}
        data = DataProto.from_dict({"responses": torch.ones(1, L, dtype=torch.long), "attention_mask": mask}, non_tensors=given)
        got = asyncio.new_event_loop().run_until_complete(in_loop(manager, data))["reward_score"]
        table = np.column_stack([score([text], [row], recipe.rewards), fines([length], recipe.overlong, L)]).astype(np.float32)
        assert float(got) == pytest.approx(float(totals_of(table, recipe)[0]), abs=1e-6), length


async def in_loop(manager, data):
    """The manager uses the loop that it was made in; here it is made outside of any."""
    manager.loop = asyncio.get_running_loop()
    return await manager.run_single(data)


EVERYTHING = {  # as many keys as one recipe can set
    "data": {"on_bad_row": "skip"},
    "model": {"lora": {"rank": 8, "alpha": 16}, "checkpointing": "full", "tower_checkpointing": "full", "offload_activations": True},
    "sampling": {"n": N, "max_new_tokens": L, "oversample": 1.5},
    "overlong": {"buffer": 4, "penalty": 0.5},
    "optim": {"offload": "always", "clip_norm": 0, "kind": "adamw8bit"},
    "save": {"every": 0, "wandb": "it's mine"},
    "packing": "plain",
}


@pytest.mark.parametrize("fields", [{}, EVERYTHING, EVERYTHING | {"overlong": {}}], ids=["usual", "everything", "without a fine"])
def test_verl_takes_the_configuration(fields, folder_of, tmp_path):
    """Its dataclasses are made of it, its dataset reads the rows, and its reward manager's function scores them."""
    from omegaconf import OmegaConf
    from verl.trainer.ppo.reward import get_custom_reward_fn
    from verl.utils.config import omega_conf_to_dataclass, validate_config
    from verl.utils.dataset.rl_dataset import RLHFDataset

    recipe, folder = folder_of(**fields)
    config = composed(folder)
    OmegaConf.resolve(config)
    omega_conf_to_dataclass(config.actor_rollout_ref.rollout)
    checked = config.copy()
    checked.actor_rollout_ref.model.lora_rank = 0  # for adapters it asks vLLM, which is not here
    validate_config(checked, use_reference_policy=recipe.loss.beta > 0, use_critic=False)  # as the trainer does before anything else
    assert config.trainer.nnodes == 1 and config.trainer.n_gpus_per_node == 8
    config.data.filter_overlong_prompts = False  # wants a processor, and with it torchvision
    dataset = RLHFDataset(list(config.data.train_files), None, config.data, processor=object())
    row = dataset[3]
    parts = row["raw_prompt"][-1]["content"]
    assert [part["type"] for part in parts] == ["image", "text", "image", "text"] and len(dataset) == 12
    assert parts[0]["image"].size == (60, 33) and (parts[0]["min_pixels"], parts[0]["max_pixels"]) == (784, 1568)
    compute_score = get_custom_reward_fn(config)
    for text, worth in (("<think>-</think><answer>D</answer>", 1.0), ("none of them", 0.5), ("<think>-</think><answer>B</answer>", 0.5)):
        given = {"data_source": row["data_source"], "ground_truth": row["reward_model"]["ground_truth"], "extra_info": row["extra_info"]}
        assert compute_score(solution_str=text, **given)["score"] == worth, text
    if recipe.overlong.buffer:
        assert OmegaConf.to_container(config.reward.reward_kwargs.overlong_buffer_cfg)["len"] == 4
    assert overrides_of(folder, "trainer.save_freq=5")["trainer.save_freq"] == "5"

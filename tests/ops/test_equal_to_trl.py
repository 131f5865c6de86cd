"""Our GRPO loss against the installed TRL: values, gradients and logged statistics of `GRPOTrainer._compute_loss`, option by option.

The trainer's own method runs on a stand-in for the trainer, on padded (B, L) completions; ours runs on the packed rows of the same
completions. S sequences, L the longest one, T packed rows, H hidden, V vocabulary.
"""

import ast
import inspect
import math
import textwrap
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer.grpo_trainer import GRPOTrainer

from actial_fast import ops
from actial_fast.integrations import trl_loss
from actial_fast.ops import reference
from actial_fast.ops.spec import GRPOSpec
from bench.kernels.accuracy import as_if_on_a_gpu
from tests.head_cases import difference

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LOSS_TYPES = (*CLIPPED, "cispo", "sapo", "vespo")
IMPORTANCE = (None, "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
LENGTHS = (1, 7, 3, 9, 4, 6, 8, 2, 5, 7, 6, 9, 3, 8, 5, 1)
H, V, MAX_LENGTH, TEMPERATURE = 5, 17, 16, 0.9
CONSTANTS = {name: value for name, value in vars(GRPOSpec()).items() if name.startswith(("sapo", "vespo"))}


@dataclass(frozen=True)
class Options:
    """A configuration, in TRL's names."""

    loss_type: str
    importance_sampling_level: str = "token"
    beta: float = 0.0
    use_bias_correction_kl: bool = False
    delta: float | None = None
    entropy_coef: float = 0.0
    top_entropy_quantile: float = 1.0
    vllm_importance_sampling_mode: str | None = None
    on_policy: bool = False
    gradient_accumulation_steps: int = 1
    steps_per_generation: int = 1
    num_processes: int = 1
    epsilon: float = 0.1
    epsilon_high: float = 0.15

    @property
    def high(self) -> float:
        """TRL's epsilon_high: for cispo it is the cap itself."""
        return 1 + self.epsilon_high if self.loss_type == "cispo" else self.epsilon_high


# ---- one batch in both layouts


def make(dtype=torch.float64, seed=3, lengths=LENGTHS) -> SimpleNamespace:
    """Old, reference and sampler log-probs lie near the policy's, per token and per sequence, so that the clips are crossed."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    size, longest = len(lengths), max(lengths)
    hidden, weight = normal(size, longest, H), normal(V, H)
    ids = torch.randint(0, V, (size, longest), generator=g)
    logp, _ = reference.linear_logprob(hidden.view(-1, H), weight, ids.view(-1), temperature=TEMPERATURE)
    near = logp.view(size, longest)
    completion = torch.arange(longest) < torch.tensor(lengths)[:, None]
    tool = torch.rand(size, longest, generator=g) > 0.2  # False: a tool wrote the token
    tool[:, 0] = True
    tool[4] = False  # nothing of this sequence counts
    sampler = near + 0.1 * normal(size, longest) + 0.3 * normal(size, 1)
    sampler[1, 2] = math.nan  # the engine could not score it
    advantages = normal(size)
    advantages[5] = 0.0
    return SimpleNamespace(
        hidden=hidden.to(dtype),
        weight=weight.to(dtype),
        ids=ids,
        completion=completion,
        tool=tool,
        mask=completion & tool,
        advantages=advantages.to(dtype),
        old=(near + 0.15 * normal(size, longest) + 0.2 * normal(size, 1)).to(dtype),
        ref=(near + 0.3 * normal(size, longest)).to(dtype),
        sampler=sampler.to(dtype),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
    )


# ---- theirs


def log_softmax_head(hidden, weight, ids):
    logits = (hidden.flatten(0, 1) @ weight.T) / TEMPERATURE
    logp = logits.log_softmax(-1)
    return logp.gather(-1, ids.reshape(-1, 1)).view_as(ids), -(logp.exp() * logp).sum(-1).view_as(ids)


def trl_head(hidden, weight, ids):
    logp, entropy, *_ = ChunkedLogProbFunction.apply(
        hidden.flatten(0, 1), weight, None, ids.flatten(), TEMPERATURE, 6, None, 1.0, ("entropy",)
    )
    return logp.view_as(ids), entropy.view_as(ids)


def block_of_trl(method, name: str):
    """The compiled `if` block of a TRL method that assigns `name` first: the formula itself, not a transcription of it."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and isinstance(node.body[0], ast.Assign)]
    (block,) = [node for node in blocks if any(isinstance(x, ast.Name) and x.id == name for s in node.body for x in ast.walk(s))][:1]
    return compile(ast.Module(block.body, []), "trl", "exec")


IMPORTANCE_BLOCK = block_of_trl(GRPOTrainer._generate_and_score_completions, "per_token_logps_diff")


def importance_ratio(case, mode: str, low: float, high: float):
    names = {
        "self": SimpleNamespace(
            vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_min=low, vllm_importance_sampling_clip_max=high
        ),
        "torch": torch,
        "math": math,
        "completion_mask": case.completion.int(),
        "tool_mask": case.tool.int(),
        "old_per_token_logps": case.old,
        "sampling_per_token_logps": case.sampler,
    }
    exec(IMPORTANCE_BLOCK, names)
    return names["vllm_importance_sampling_ratio"]


def theirs(case, o: Options, head=log_softmax_head) -> SimpleNamespace:
    """loss, dhidden (S, L, H), dweight and TRL's logged metrics."""
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()

    def score(model, input_ids, attention_mask, logits_to_keep, compute_entropy, compute_aux_loss, **unused):
        assert compute_entropy and not compute_aux_loss and logits_to_keep == case.ids.shape[1]
        return *head(hidden, weight, input_ids[:, -logits_to_keep:]), None

    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=score,
        aux_loss_enabled=False,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            num_processes=o.num_processes,
            sync_gradients=True,
            gather=lambda x: x,
            reduce=lambda x, reduction: x,
            pad_across_processes=lambda x, dim, pad_index: x,
        ),
        args=SimpleNamespace(
            use_bias_correction_kl=o.use_bias_correction_kl,
            delta=o.delta,
            steps_per_generation=o.steps_per_generation,
            **CONSTANTS,
        ),
        loss_type=o.loss_type,
        importance_sampling_level=o.importance_sampling_level,
        beta=o.beta,
        epsilon_low=o.epsilon,
        epsilon_high=o.high,
        off_policy_mask_threshold=None,
        top_entropy_quantile=o.top_entropy_quantile,
        use_vllm=o.vllm_importance_sampling_mode is not None,
        vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=o.gradient_accumulation_steps,
        max_completion_length=MAX_LENGTH,
        entropy_coef=o.entropy_coef,
        _entropy_bonus_enabled=o.entropy_coef != 0,
        use_adaptive_entropy=False,
        _metrics={"train": defaultdict(list)},
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
    )
    trainer.get_high_entropy_mask = lambda *args: GRPOTrainer.get_high_entropy_mask(trainer, *args)
    inputs = {
        "prompt_ids": torch.zeros(len(case.ids), 2, dtype=torch.int64),
        "prompt_mask": torch.ones(len(case.ids), 2, dtype=torch.int64),
        "completion_ids": case.ids,
        "completion_mask": case.completion.int(),
        "tool_mask": case.tool.int(),
        "advantages": case.advantages,
        "num_items_in_batch": torch.tensor(GLOBAL_TOKENS),
        "ref_per_token_logps": case.ref,
    }
    if not o.on_policy:
        inputs["old_per_token_logps"] = case.old
    if o.vllm_importance_sampling_mode:
        inputs["importance_sampling_ratio"] = importance_ratio(case, o.vllm_importance_sampling_mode, *IMPORTANCE_RANGE)
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    dhidden, dweight = torch.autograd.grad(loss, (hidden, weight))
    return SimpleNamespace(loss=loss.detach(), dhidden=dhidden, dweight=dweight, metrics=trainer._metrics["train"])


# ---- ours


GLOBAL_TOKENS = 131.0  # of the generation batch, over all processes
IMPORTANCE_RANGE = (0.7, 1.4)


def spec_of(o: Options) -> GRPOSpec:
    low, high = IMPORTANCE_RANGE
    own = {"epsilon_high": o.high, "vllm_importance_sampling_mode": o.vllm_importance_sampling_mode or "token_truncate"}
    own |= {"vllm_importance_sampling_clip_min": low, "vllm_importance_sampling_clip_max": high}
    return trl_loss.spec_of(SimpleNamespace(**CONSTANTS | vars(o) | own))


def ours(case, o: Options, loss_of) -> SimpleNamespace:
    """loss, dhidden (S, L, H) with zeros where there is no row, dweight and the statistics by name, from packed rows."""
    spec, rows = spec_of(o), case.completion
    mask = case.mask[rows]
    steps = o.gradient_accumulation_steps
    if o.loss_type in ("dapo", "cispo", "vespo"):
        tokens = GLOBAL_TOKENS / o.num_processes * steps / o.steps_per_generation
    else:
        tokens = max(int(mask.sum()), 1) * steps
    token_weight = reference.token_weights(
        spec, case.cu_seqlens, mask=mask, tokens=tokens, sequences=len(case.ids) * steps, max_length=MAX_LENGTH
    )
    hidden, weight = case.hidden[rows].requires_grad_(), case.weight.clone().requires_grad_()
    with torch.no_grad():
        _, entropy = reference.linear_logprob(hidden, weight, case.ids[rows], temperature=TEMPERATURE)
        kept = reference.high_entropy(entropy, token_weight, o.top_entropy_quantile) if o.top_entropy_quantile < 1 else mask
        bonus = (mask & kept).to(entropy.dtype)
    loss, stats = loss_of(
        hidden,
        weight,
        case.ids[rows],
        case.advantages.repeat_interleave(case.completion.sum(1)),
        None if o.on_policy else case.old[rows],
        case.ref[rows] if o.beta else None,
        spec,
        token_weight=token_weight,
        cu_seqlens=case.cu_seqlens,
        sampler_logp=case.sampler[rows] if o.vllm_importance_sampling_mode else None,
        policy_mask=kept if o.top_entropy_quantile < 1 else None,
        entropy_weight=bonus / (bonus.sum().clamp(min=1) * steps),  # TRL's bonus is a mean over the tokens whatever the loss type
        temperature=TEMPERATURE,
    )[:2]
    packed, dweight = torch.autograd.grad(loss, (hidden, weight))
    dhidden = torch.zeros_like(case.hidden)
    dhidden[rows] = packed
    return SimpleNamespace(loss=loss.detach(), dhidden=dhidden, dweight=dweight, stats=dict(zip(ops.STATS, stats.tolist(), strict=True)))


def assert_same(case, o: Options, loss_of, tolerance: float, head=log_softmax_head) -> None:
    want, got = theirs(case, o, head), ours(case, o, loss_of)
    assert got.loss.item() == pytest.approx(want.loss.item(), rel=tolerance, abs=tolerance / 10), o  # its terms are of size 1 and cancel
    for name in ("dhidden", "dweight"):
        assert difference(getattr(got, name), getattr(want, name)) < tolerance, (name, o)
    assert want.dhidden[case.mask].abs().sum(-1).gt(0).sum() > 3, ("the gradient is next to nothing, so this comparison says nothing", o)
    assert got.stats["loss"] == pytest.approx(want.loss.item(), rel=1e-5, abs=1e-6), o
    mean = {name: total / got.stats["tokens"] for name, total in got.stats.items()}
    assert mean["entropy"] == pytest.approx(want.metrics["entropy"][0], rel=1e-5), o
    if o.beta:
        assert mean["kl"] == pytest.approx(want.metrics["kl"][0], rel=1e-5), o
    if o.importance_sampling_level == "token":  # TRL counts clipped sequences otherwise: see the test of equal lengths
        assert_same_clipping(o, mean, want.metrics)


def assert_same_clipping(o: Options, mean: dict, metrics: dict) -> None:
    if o.loss_type in CLIPPED:
        assert mean["clip_low"] == pytest.approx(metrics["clip_ratio/low_mean"][0], rel=1e-5, abs=1e-7), o
        assert mean["clip_high"] == pytest.approx(metrics["clip_ratio/high_mean"][0], rel=1e-5, abs=1e-7), o
        assert mean["clip_low"] + mean["clip_high"] == pytest.approx(metrics["clip_ratio/region_mean"][0], rel=1e-5, abs=1e-7), o
    elif o.loss_type == "cispo":
        assert mean["clip_high"] == pytest.approx(metrics["cispo_clip_ratio"][0], rel=1e-5, abs=1e-7), o


# ---- the tests

PATHS = pytest.mark.parametrize("loss_of", [reference.linear_grpo_loss, ops.linear_grpo_loss], ids=["reference", "ops"])
LEVELS = pytest.mark.parametrize("level", ["token", "sequence"])


@PATHS
@LEVELS
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_option_of_every_loss_type(loss_type, level, loss_of):
    """The product of all options that can meet: whole for the reference; every fifth, so every value of each option, for the fused loss.

    Importance weights come with old log-probs, as in TRL's generation.
    """
    case = make()
    kl = ((0.0, False), (0.04, False), (0.04, True))
    deltas = (None, 1.2) if loss_type in CLIPPED else (None,)
    policies = ((True, None), *((False, mode) for mode in IMPORTANCE))
    every = list(product(kl, deltas, (0.0, 0.02), (1.0, 0.37), policies))
    for (beta, corrected), delta, coef, share, (on_policy, mode) in every[:: 1 if loss_of is reference.linear_grpo_loss else 5]:
        o = Options(loss_type, level, beta, corrected, delta, coef, share, mode, on_policy)
        assert_same(case, o, loss_of, tolerance=1e-6)


@PATHS
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_normalisation_over_accumulation_steps_and_processes(loss_type, loss_of):
    for steps, generation, processes in ((4, 4, 1), (2, 8, 2), (3, 1, 4)):
        o = Options(loss_type, beta=0.04, entropy_coef=0.02, gradient_accumulation_steps=steps, steps_per_generation=generation)
        assert_same(make(), replace(o, num_processes=processes), loss_of, tolerance=1e-6)


def on_kernels(*args, **kwargs):
    """The fused loss on the Triton kernels: interpreted where there is no GPU."""
    with as_if_on_a_gpu():
        return ops.linear_grpo_loss(*args, **kwargs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="compares on the CPU")
@LEVELS
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("loss_of", [ops.linear_grpo_loss, on_kernels], ids=["cpu", "triton"])
def test_in_float32_with_the_log_probs_of_trl(loss_of, loss_type, level):
    """Both sides whole, as installed: TRL's chunked log-prob function under its loss, our fused loss."""
    o = Options(loss_type, level, 0.04, True, 1.2 if loss_type in CLIPPED else None, 0.02, 1.0, "token_truncate")
    assert_same(make(torch.float32, lengths=LENGTHS[:8]), o, loss_of, tolerance=1e-5, head=trl_head)


@pytest.mark.parametrize("loss_type", [*CLIPPED, "cispo"])
def test_clipped_sequences_are_counted_alike_when_they_are_equally_long(loss_type):
    """A sequence-level ratio clips whole sequences: TRL's mean is over sequences, ours over tokens."""
    case = make(lengths=(6,) * 16)
    case.tool.fill_(True)
    case.mask = case.completion
    o = Options(loss_type, "sequence", beta=0.04)
    want, got = theirs(case, o), ours(case, o, reference.linear_grpo_loss)
    mean = {name: total / got.stats["tokens"] for name, total in got.stats.items()}
    assert_same_clipping(o, mean, want.metrics)
    assert 0 < mean["clip_high"] < 1


@LEVELS
def test_the_batch_crosses_both_clips_and_the_importance_range(level):
    """Otherwise the tests above would compare unclipped objectives only."""
    case = make()
    stats = ours(case, Options("grpo", level), reference.linear_grpo_loss).stats
    clipped = (stats["clip_low"], stats["clip_high"])
    assert min(clipped) >= 1 and sum(clipped) < stats["tokens"] - 3
    a = ours(case, Options("grpo", level), reference.linear_grpo_loss).dhidden
    assert (a.abs().sum(-1) == 0)[case.mask].any(), "a clipped row with no gradient"
    b = ours(case, Options("grpo", level, delta=1.2), reference.linear_grpo_loss).dhidden
    assert difference(a, b) > 0.01, "the two-sided clip is crossed too"
    for mode in IMPORTANCE[1:]:
        ratio = importance_ratio(case, mode, -math.inf, math.inf)
        ratio = ratio if mode.startswith("sequence") else ratio[case.mask]
        low, high = IMPORTANCE_RANGE
        assert (ratio < low).any() and (ratio > high).any() and ((ratio >= low) & (ratio <= high)).any()


def broken(change):
    """The fused loss with its gradients changed and its values kept."""

    def loss_of(hidden, weight, *args, **kwargs):
        out = ops.linear_grpo_loss(hidden, weight, *args, **kwargs)
        loss = out.loss.detach() + change(out.loss - out.loss.detach())
        return loss + 0 * (hidden.sum() + weight.sum()), out.stats

    return loss_of


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize(
    "change", [lambda x: 0 * x, lambda x: 1.01 * x, lambda x: -x], ids=["zeroed", "scaled by 1.01", "of the other sign"]
)
def test_a_wrong_gradient_fails_the_comparison_with_trl(loss_type, change):
    for level in ("token", "sequence"):
        o = Options(loss_type, level, beta=0.04)
        assert_same(make(), o, ops.linear_grpo_loss, tolerance=1e-6)
        with pytest.raises(AssertionError, match="dhidden"):
            assert_same(make(), o, broken(change), tolerance=1e-6)

"""FusedLinearGRPOLoss beside the installed Liger's class, both beside a float64 oracle, and Liger's layers in our model.

The oracle is Liger's own formula (`ppo_loss_fn`, plain torch on log-probs) in float64 on float64 log-probs. B sequences of at most L
tokens, H hidden, V vocabulary.
"""

import inspect
import math
import sys
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction
from peft import LoraConfig, get_peft_model
from transformers import Qwen3VLMoeConfig

from actial_fast import ops
from actial_fast.integrations.liger import LOSS_TYPES, FusedLinearGRPOLoss, apply_liger
from actial_fast.model.attention import use_packed_attention
from actial_fast.ops import reference
from bench.kernels.accuracy import as_if_on_a_gpu
from tests.attention_case import DEVICE, relative
from tests.head_cases import FLOOR, difference, error
from tests.model.test_attention_models import GRIDS, Data, build, data, packed_hidden, patches, prompt, split_packed

cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="Liger's kernels run in Triton's interpreter here, compiled on a GPU")
LENGTHS = (6, 3, 7, 1, 0, 5)
H, V, L = 5, 19, 7
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
VALUES = {"epsilon_low": 0.1, "epsilon_high": 0.15, "temperature": 0.9, "max_completion_length": 16}


def make(dtype=torch.float32, lengths=LENGTHS, seed=0, scale=1.0) -> SimpleNamespace:
    """Old and reference log-probs near the policy's, so that the clip is crossed on both sides; one advantage is 0."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    B, length = len(lengths), max(lengths)
    hidden, weight, bias = normal(B, length, H), scale * normal(V, H), 0.3 * normal(V)
    ref_hidden, ref_weight = hidden + 0.1 * normal(B, length, H), weight + 0.1 * normal(V, H)
    ids = torch.randint(0, V, (B, length), generator=g)
    logp, _ = reference.linear_logprob(hidden.flatten(0, 1), weight, ids.flatten(), bias=bias, temperature=VALUES["temperature"])
    logp = logp.view(B, length)
    advantages = normal(B)
    advantages[0] = 0
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).int()
    mask[0, 2] = 0  # a tool wrote the token
    ratio = (0.3 * normal(B, length)).exp()
    ratio[2, 1] = 0
    head = {"hidden": hidden, "weight": weight, "bias": bias, "ref_hidden": ref_hidden, "ref_weight": ref_weight}
    rows = {"advantages": advantages, "old": logp + 0.15 * normal(B, length) + 0.4 * normal(B, 1), "ref": logp + 0.3 * normal(B, length)}
    return SimpleNamespace(
        **{name: x.to(dtype) for name, x in head.items()},
        **{name: x.float() for name, x in rows.items()},
        ratio=torch.where(mask != 0, ratio, 1).float(),
        ids=ids,
        mask=mask,
    )


def run(loss_of, c, on_policy=False, ratio=None, from_hidden=False, trained=("hidden", "weight", "bias"), **more) -> dict:
    """loss, metrics and gradients; ratio: the shape in which the importance ratios are given."""
    head = {name: getattr(c, name).clone().requires_grad_(name in trained) for name in ("hidden", "weight", "bias")}
    given = {} if on_policy else {"old_per_token_logps": c.old}
    given |= {"ref_input": c.ref_hidden, "ref_weight": c.ref_weight} if from_hidden else {"ref_per_token_logps": c.ref}
    if ratio:
        given["vllm_is_ratio"] = c.ratio if ratio == "token" else c.ratio[:, :1] if ratio == "sequence" else c.ratio[:, 0]
    loss, metrics = loss_of(head["hidden"], head["weight"], c.ids, c.mask, c.advantages, head["bias"], **given, **more)
    (1.7 * loss).backward()
    grads = {f"d{name}": head[name].grad for name in trained}
    return {"loss": loss.detach(), **{f"metric{i}": x for i, x in enumerate(metrics)}, **grads}


def settings(loss_type: str, **changes) -> dict:
    values = {**VALUES, "epsilon_high": 1.15} if loss_type == "cispo" else VALUES
    return {**values, "loss_type": loss_type, "compiled": False, **changes}


def theirs(**options) -> LigerFusedLinearGRPOLoss:
    return LigerFusedLinearGRPOLoss(**options)


def oracle(c, options: dict, on_policy=False, ratio=None) -> dict:
    """Liger's formula in float64 on float64 log-probs."""
    head = {name: getattr(c, name).double().requires_grad_() for name in ("hidden", "weight", "bias")}
    logits = (head["hidden"] @ head["weight"].T + head["bias"]) / options["temperature"]
    logp = logits.log_softmax(-1).gather(-1, c.ids[..., None]).squeeze(-1)
    names = inspect.signature(LigerFusedLinearGRPOFunction.ppo_loss_fn).parameters
    loss, metrics = LigerFusedLinearGRPOFunction.ppo_loss_fn(
        logp,
        c.mask,
        c.advantages.double(),
        c.mask,
        c.ref.double(),
        None if on_policy else c.old.double(),
        vllm_is_ratio=None if ratio is None else c.ratio.double(),
        **{name: x for name, x in options.items() if name in names},
    )
    (1.7 * loss).backward()
    grads = {f"d{name}": x.grad for name, x in head.items()}
    return {"loss": loss.detach(), **{f"metric{i}": x.detach() for i, x in enumerate(metrics)}, **grads}


def assert_same(got: dict, want: dict, tolerance: float, what="") -> None:
    assert got.keys() == want.keys(), what
    for name in want:
        if name.startswith("d"):
            assert difference(got[name], want[name]) < tolerance, (name, what)
            assert got[name].dtype == want[name].dtype
        else:  # the terms of a loss are of size 1 and cancel
            assert got[name].shape == () and got[name].item() == pytest.approx(want[name].item(), rel=tolerance, abs=tolerance / 10), (
                name,
                what,
            )


# ---- the interface


def test_constructor_and_forward_take_what_the_installed_class_takes():
    for method in ("__init__", "forward"):
        want = [(p.name, p.default) for p in inspect.signature(getattr(LigerFusedLinearGRPOLoss, method)).parameters.values()]
        got = [(p.name, p.default) for p in inspect.signature(getattr(FusedLinearGRPOLoss, method)).parameters.values()]
        assert got[: len(want)] == want
        assert [name for name, _ in got[len(want) :]] == (["workspace_mb"] if method == "__init__" else ["cu_seqlens"])


def on_kernels(module):
    """Our loss on the Triton kernels: interpreted where there is no GPU."""

    def call(*args, **kwargs):
        with as_if_on_a_gpu():
            return module(*args, **kwargs)

    return call


# ---- values and gradients


@pytest.mark.parametrize(("loss_type", "level"), [*product(LOSS_TYPES, ["token"]), *product(CLIPPED, ["sequence"])])
def test_values_gradients_and_metrics_are_those_of_liger(loss_type, level):
    """All options that can meet; of those that clip every fifth, so every value of each option. luspo differs with padding: see below."""
    lengths = LENGTHS if loss_type != "luspo" else (L,) * 4
    case = make(lengths=lengths)
    if loss_type == "luspo":
        case.mask[:] = 1
    deltas = (None, 1.2) if loss_type in CLIPPED else (None,)
    clipped = 0.0
    every = list(product(((0.0, False), (0.04, False), (0.04, True)), deltas, (True, False), (None, "token", "sequence", "flat")))
    for (beta, corrected), delta, on_policy, ratio in every[:: 1 if len(every) == 24 else 5] + every[-1:]:
        options = settings(loss_type, beta=beta, delta=delta, use_bias_correction_kl=corrected, importance_sampling_level=level)
        got, want = (run(f(**options), case, on_policy, ratio) for f in (FusedLinearGRPOLoss, theirs))
        assert_same(got, want, 1e-5, (options, on_policy, ratio))
        clipped = max(clipped, float(want["metric1"] if beta else want["metric0"]))
        assert want["dhidden"].abs().sum(-1).gt(0).sum() > 3, "the gradient is next to nothing, so this comparison says nothing"
    assert clipped > 0 or loss_type in ("sapo", "vespo")


@cpu
@pytest.mark.parametrize(
    ("loss_type", "changes"), [("luspo", {}), ("cispo", {"epsilon_high": 0.2}), ("sapo", {}), ("vespo", {})], ids=lambda x: str(x or "")
)
@pytest.mark.filterwarnings("ignore:epsilon_high")
def test_the_kernels_give_the_same(loss_type, changes):
    options = settings(loss_type, beta=0.04, **changes)
    case = make(lengths=(L, L, L))
    case.mask[:] = 1
    got, want = run(on_kernels(FusedLinearGRPOLoss(**options)), case, ratio="token"), run(theirs(**options), case, ratio="token")
    assert_same(got, want, 1e-5)


@pytest.mark.parametrize("on_policy", [False, True])
def test_a_cispo_cap_below_1_is_told_and_computed(on_policy):
    """Liger's default for it, 0.2."""
    case, options = make(), settings("cispo", beta=0.04, epsilon_high=0.2)
    with pytest.warns(UserWarning, match="epsilon_high: cispo caps the ratio itself at it, and at 0.2"):
        loss = FusedLinearGRPOLoss(**options)
    assert_same(run(loss, case, on_policy), run(theirs(**options), case, on_policy), 1e-5)


@pytest.mark.parametrize("scale", [1.0, 6.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("loss_type", [x for x in LOSS_TYPES if x != "luspo"])
def test_no_further_from_float64_than_liger(loss_type, dtype, scale):
    """In the sum over many cases, because a single one may round luckily."""
    options = settings(loss_type, beta=0.04, use_bias_correction_kl=True)
    total: dict[str, list[float]] = {}
    for seed in range(6):
        case = make(dtype, seed=seed, scale=scale)
        want = oracle(case, options, ratio="token")
        for side, loss in enumerate((FusedLinearGRPOLoss, theirs)):
            got = run(loss(**options), case, ratio="token")
            for name in ("loss", "dhidden", "dweight", "dbias"):
                total.setdefault(name, [0.0, 0.0])[side] += error(got[name], want[name], 1e-2) / 6
    for name, (ours, other) in total.items():
        assert ours <= other + FLOOR[dtype], (name, ours, other)
    assert dtype == torch.float32 or total["dhidden"][0] < 0.75 * total["dhidden"][1] or scale == 1


def test_the_reference_from_its_hidden_states():
    case, options = make(), settings("grpo", beta=0.3)
    got, want = (run(f(**options), case, from_hidden=True) for f in (FusedLinearGRPOLoss, theirs))
    assert_same(got, want, 1e-5)
    assert got["metric0"] != run(FusedLinearGRPOLoss(**options), case)["metric0"]


def test_without_a_reference_the_policy_is_its_own():
    case, options = make(), settings("grpo", beta=0.3, use_ref_model=False)
    got, want = (run(f(**options), case) for f in (FusedLinearGRPOLoss, theirs))
    assert_same(got, want, 1e-5)
    assert got["metric0"] == 0


@pytest.mark.parametrize("loss_type", ["bnpo", "dapo", "cispo", "vespo"])
@pytest.mark.parametrize("items", [None, 31, torch.tensor(31.0)], ids=["none", "int", "tensor"])
def test_the_normaliser_of_a_generation_batch(loss_type, items):
    case, options = make(), settings(loss_type)
    got, want = (run(f(**options), case, num_items_in_batch=items) for f in (FusedLinearGRPOLoss, theirs))
    assert_same(got, want, 1e-5)


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_normaliser_over_ranks(ranks, monkeypatch):
    """Liger's arithmetic with the collective replaced: each rank sees the tokens of all, divided by their number."""
    import torch.distributed as dist

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda *_: ranks)
    monkeypatch.setattr(dist, "all_reduce", lambda x, *args, **kwargs: x.add_(ranks - 1))
    case, options = make(), settings("dapo")
    got, want = (run(f(**options), case) for f in (FusedLinearGRPOLoss, theirs))
    assert_same(got, want, 1e-5)


def test_a_frozen_head_gets_no_gradient():
    case, options = make(), settings("dapo")
    got, want = (run(f(**options), case, trained=("hidden",)) for f in (FusedLinearGRPOLoss, theirs))
    assert_same(got, want, 1e-5)


def test_padding_may_hold_any_id():
    case, loss = make(), FusedLinearGRPOLoss(**settings("dapo"))
    want = run(loss, case)
    case.ids = torch.where(case.mask != 0, case.ids, -100)
    assert_same(run(loss, case), want, 1e-12)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_token_of_minus_100_counts_as_masked(loss_type):
    case, loss = make(), FusedLinearGRPOLoss(**settings(loss_type, beta=0.04))
    gone = torch.zeros_like(case.mask)
    gone[0, 1], gone[2, 3:5], gone[3, 0] = 1, 1, 1
    masked = SimpleNamespace(**{**vars(case), "mask": case.mask * (1 - gone)})
    case.ids = case.ids.masked_fill(gone == 1, -100)
    assert_same(run(loss, case, ratio="token"), run(loss, masked, ratio="token"), 1e-12)


def test_luspo_leaves_padding_out():
    """The documented difference: Liger's value for a padded batch moves with the padding, ours is the mean over each sequence alone."""
    lengths = (6, 3, 7)
    case = make(lengths=lengths)
    case.mask[0, 2] = 1
    for level in ("token", "sequence"):
        options = settings("luspo", beta=0.04, importance_sampling_level=level)
        got, padded = run(FusedLinearGRPOLoss(**options), case), run(theirs(**options), case)
        alone = []
        for i, n in enumerate(lengths):
            names = ("hidden", "ids", "mask", "old", "ref", "ratio")
            one = SimpleNamespace(
                **{**vars(case), **{k: getattr(case, k)[i : i + 1, :n] for k in names}, "advantages": case.advantages[i : i + 1]}
            )
            alone.append(run(theirs(**options), one))
        assert got["loss"].item() == pytest.approx(sum(x["loss"] for x in alone).item() / 3, rel=1e-5)
        assert difference(got["dweight"], sum(x["dweight"] for x in alone) / 3) < 1e-5
        outside = case.mask == 0
        assert got["dhidden"][outside].abs().max() == 0 < padded["dhidden"][outside].abs().max()


# ---- packed rows


@pytest.mark.parametrize("ratio", [None, "token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_packed_rows_give_what_padded_rows_give(loss_type, ratio):
    case = make()
    rows = (torch.arange(L) < torch.tensor(LENGTHS)[:, None]).flatten()
    packed = {name: getattr(case, name).flatten(0, 1)[rows] for name in ("hidden", "ids", "mask", "old", "ref")}
    packed = SimpleNamespace(**{**vars(case), **packed})
    options = settings(loss_type, beta=0.04)
    loss = FusedLinearGRPOLoss(**options)
    want = run(loss, case, ratio=ratio)
    packed.ratio = case.ratio.flatten()[rows] if ratio == "token" else case.ratio
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0)
    got = run(loss, packed, ratio=ratio, cu_seqlens=cu_seqlens)
    want["dhidden"] = want["dhidden"].flatten(0, 1)[rows]
    assert_same(got, want, 2e-6)


# ---- rejections


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"loss_type": "reinforce"},
            "loss_type: 'reinforce' is not supported; supported are grpo, bnpo, dr_grpo, dapo, cispo, sapo, luspo, vespo",
        ),
        ({"importance_sampling_level": "turn"}, "'turn' is not supported; supported are token, sequence"),
        ({"loss_type": "dr_grpo"}, "max_completion_length: needed"),
        ({"loss_type": "cispo", "epsilon_high": -0.1}, "epsilon_high: must be >= -1"),
        ({"delta": 1.1}, r"delta: must be > 1 \+ epsilon_high = 1.2, got 1.1"),
        ({"epsilon_low": -0.1}, "epsilon_low: must be >= 0"),
        ({"beta": -1.0}, "beta: must be >= 0"),
        ({"sapo_temperature_pos": 0.0}, "sapo_temperature_pos: must be > 0"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_options_that_are_not_supported(options, message):
    with pytest.raises(ValueError, match=message):
        FusedLinearGRPOLoss(**options)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_options_are_attributes_that_may_change(loss_type):
    """Code written for Liger reads and anneals them."""
    made, changed = settings(loss_type, beta=0.04), settings(loss_type, beta=0.1)
    changed |= {"epsilon_low": 0.05, "epsilon_high": changed["epsilon_high"] + 0.05, "temperature": 1.1, "max_completion_length": 12}
    changed |= {"sapo_temperature_pos": 0.7, "vespo_k_pos": 1.5, "vespo_lambda_neg": 1.0, "use_bias_correction_kl": True}
    changed |= {"delta": 1.5} if loss_type in CLIPPED else {}
    changed |= {"importance_sampling_level": "sequence"} if loss_type in CLIPPED else {}
    loss, liger, c = FusedLinearGRPOLoss(**made), theirs(**made), make()
    before = run(loss, c)
    assert {name: getattr(loss, name) for name in vars(liger) if name in made} == made
    assert {name for name in vars(liger) if not name.startswith("_")} <= vars(loss).keys()
    for name, value in changed.items():
        setattr(loss, name, value)
    assert_same(run(loss, c), run(FusedLinearGRPOLoss(**changed), c), 1e-6)
    assert difference(run(loss, c)["dhidden"], before["dhidden"]) > 1e-3
    loss.epsilon_low = -0.1
    with pytest.raises(ValueError, match="epsilon_low: must be >= 0"):
        run(loss, c)


@pytest.mark.parametrize("loss_type", ["cispo", "sapo", "vespo"])
def test_a_ratio_of_the_sequence_is_refused_by_the_call_as_by_ligers(loss_type):
    c, options = make(), settings(loss_type, importance_sampling_level="sequence")
    for kind in (theirs, FusedLinearGRPOLoss):
        loss = kind(**options)
        with pytest.raises(ValueError, match="Sequence-level importance sampling is not supported for loss_type"):
            run(loss, c)
        loss.importance_sampling_level = "token"
        assert run(loss, c)["loss"] == run(kind(**settings(loss_type)), c)["loss"]


def test_both_references_give_the_first_and_a_warning_as_ligers():
    c = make()
    both = {"ref_input": c.ref_hidden, "ref_weight": c.ref_weight, "ref_per_token_logps": c.ref}
    call = c.hidden, c.weight, c.ids, c.mask, c.advantages
    for kind in (theirs, FusedLinearGRPOLoss):
        with pytest.warns(UserWarning, match="Both ref_per_token_logps and ref_input are provided") as caught:
            loss, _ = kind(beta=0.04, compiled=False)(*call, **both)
        assert loss == kind(beta=0.04, compiled=False)(*call, ref_per_token_logps=c.ref)[0]
    assert caught[0].filename == __file__


def test_in_bf16_log_probs_of_the_same_head_give_ratios_of_1_and_no_kl():
    """And those of a head that rounds its logits do not: the docstring and docs/from-liger.md say so."""
    c = make(torch.bfloat16, scale=3.0)
    rows = c.hidden.flatten(0, 1), c.weight, c.ids.flatten()
    ours = ops.linear_logprob(*rows, temperature=VALUES["temperature"])[0].view(c.ids.shape)
    rounded = ((c.hidden @ c.weight.T) / VALUES["temperature"]).float().log_softmax(-1).gather(-1, c.ids[..., None]).squeeze(-1)
    loss = FusedLinearGRPOLoss(**settings("grpo", beta=0.04, epsilon_low=3e-4, epsilon_high=4e-4, importance_sampling_level="sequence"))
    kl, clipped = {}, {}
    for name, logp in {"ours": ours, "rounded": rounded}.items():
        given = {"old_per_token_logps": logp, "ref_per_token_logps": logp}
        _, (kl[name], clipped[name]) = loss(c.hidden, c.weight, c.ids, c.mask, c.advantages, **given)
    assert kl["ours"] == clipped["ours"] == 0
    assert kl["rounded"] > 1e-6 and clipped["rounded"] > 0.1


def test_arguments_that_do_not_fit():
    c = make()
    loss = FusedLinearGRPOLoss(beta=0.04)
    call = {"old_per_token_logps": c.old, "ref_per_token_logps": c.ref}
    with pytest.raises(ValueError, match=r"_input: expected \(B, L, H\) without cu_seqlens"):
        loss(c.hidden[0], c.weight, c.ids[0], c.mask[0], c.advantages[:1])
    with pytest.raises(ValueError, match=r"_input: expected \(T, H\) with cu_seqlens"):
        loss(c.hidden, c.weight, c.ids, c.mask, c.advantages, cu_seqlens=torch.tensor([0, 7]))
    with pytest.raises(ValueError, match=r"old_per_token_logps: expected \(6, 7\)"):
        loss(c.hidden, c.weight, c.ids, c.mask, c.advantages, **{**call, "old_per_token_logps": c.old[:, 1:]})
    with pytest.raises(ValueError, match=r"advantages: expected one per sequence, \(6,\)"):
        loss(c.hidden, c.weight, c.ids, c.mask, c.old, **call)
    with pytest.raises(ValueError, match=r"vllm_is_ratio: expected \(B, L\), \(B, 1\) or \(B,\)"):
        loss(c.hidden, c.weight, c.ids, c.mask, c.advantages, vllm_is_ratio=c.old[:, :2], **call)
    with pytest.raises(ValueError, match=r"ref_per_token_logps: needed for beta=0\.04; pass it, or ref_input"):
        loss(c.hidden, c.weight, c.ids, c.mask, c.advantages)


# ---- Liger's layers


@triton.jit
def _rsqrt(x):
    return 1.0 / tl.sqrt(x)


@pytest.fixture
def interpreted(monkeypatch):
    """Two things that Liger's kernels need of Triton's interpreter: float arguments as tensors, and an rsqrt (libdevice has no body)."""
    if torch.cuda.is_available():
        return
    from liger_kernel.ops import rms_norm
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def with_floats(x):
        if isinstance(x, float):
            return tl.tensor(interpreter.TensorHandle(np.array([x], dtype=np.float32), tl.float32), tl.float32)
        return convert(x)

    monkeypatch.setattr(interpreter, "_implicit_cvt", with_floats)
    monkeypatch.setattr(rms_norm, "rsqrt", _rsqrt)


def small() -> Data:
    """A prompt with an image and two replies, and a plain sequence."""
    return Data(((prompt(1, 2, [(1, 2, 2)]), (np.array([4]), np.array([7, 1]))), (prompt(2, 2), ())))


def outcome(model, given: Data):
    """Rows of the packed batch and gradients of every trained parameter of a loss that weighs every number differently."""
    model.zero_grad()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    rows = torch.cat(split_packed(packed_hidden(base, given), given))
    weights = torch.randn(rows.shape, generator=torch.Generator().manual_seed(5)).to(rows.device)
    (rows * weights).sum().backward()
    return rows.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(got, want, tolerance: float) -> None:
    (rows, grads), (want_rows, want_grads) = got, want
    assert relative(rows, want_rows) < tolerance
    assert grads.keys() == want_grads.keys() and len(grads) > 3
    wrong = {name: relative(grads[name], want_grads[name]) for name in grads if want_grads[name].norm() > 1e-4}
    assert len(wrong) > 0.8 * len(grads) and max(wrong.values()) < tolerance, max(wrong.items(), key=lambda x: x[1])


COUNTS = {
    "Qwen2-VL": {"rope": 2, "rms_norm": 2 * 2 + 1, "swiglu": 2},
    "Qwen2.5-VL": {"rope": 2, "rms_norm": 2 * 2 + 1 + 3 * 2 + 1, "swiglu": 2 + 3},
    "Qwen3-VL": {"rope": 2, "rms_norm": 2 * 4 + 1, "swiglu": 2},
}


@pytest.mark.parametrize(("name", "adapters"), [*((name, False) for name in COUNTS), ("Qwen2.5-VL", True), ("Qwen3-VL", True)])
def test_a_packed_pass_through_ligers_layers_is_the_same(name, adapters, interpreted):
    """adapters: and checkpointing, as load_policy does."""
    model, given = build(name), small()
    use_packed_attention(model)
    model.train()
    if adapters:
        torch.manual_seed(0)
        model = get_peft_model(
            model, LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|gate_proj|down_proj)", init_lora_weights=False)
        )
    want = outcome(model, given)
    counts = apply_liger(model)
    assert counts == COUNTS[name]
    if adapters:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_close(outcome(model, given), want, 1e-5 if DEVICE == "cpu" else 1e-3)


@cpu
@pytest.mark.parametrize("family", COUNTS)
def test_the_kernels_are_the_ones_that_ran(family, interpreted, monkeypatch):
    """Each kernel, spoilt, changes the result: none of the patches is a name that nobody calls."""
    from liger_kernel.transformers import functional

    model = build(family)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        want = model(input_ids=ids).logits
        for name, kernel in (("liger_rms_norm", "rms_norm"), ("liger_swiglu", "swiglu"), ("liger_rope", "rope")):
            real = getattr(functional, name)
            wrong = (lambda q, k, *_: (q, -k)) if kernel == "rope" else lambda *args, real=real: 1.1 * real(*args)
            other = build(family)
            with monkeypatch.context() as patch:
                patch.setattr(functional, name, wrong)
                apply_liger(other, **{**dict.fromkeys(("rms_norm", "swiglu", "rope"), False), kernel: True})
            assert relative(other(input_ids=ids).logits, want) > 1e-3, name


@cpu
def test_only_the_instance_is_patched(interpreted):
    modeling = sys.modules[type(build("Qwen2.5-VL")).__module__]
    before, other, model = dict(vars(modeling)), build("Qwen2.5-VL"), build("Qwen2.5-VL")
    state, names = {k: v.clone() for k, v in model.state_dict().items()}, [type(m).__name__ for m in model.modules()]
    apply_liger(model)
    assert apply_liger(model) == apply_liger(build("Qwen2.5-VL"))  # twice is once
    assert dict(vars(modeling)) == before
    assert not any("forward" in vars(m) for m in other.modules())
    assert [type(m).__name__ for m in model.modules()] == names
    assert model.state_dict().keys() == state.keys() and all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    assert sum("forward" in vars(m) for m in model.modules()) == 2 + 12 + 5
    assert apply_liger(other, rope=False, swiglu=False) == {"rms_norm": 12}
    assert sum("forward" in vars(m) for m in other.modules()) == 12


def test_models_of_other_families_are_refused():
    other = torch.nn.Linear(2, 2)
    other.config = Qwen3VLMoeConfig()
    with pytest.raises(ValueError, match=r"expected a Qwen2-VL, Qwen2.5-VL or Qwen3-VL of transformers, .* around one, got qwen3_vl_moe"):
        apply_liger(other)
    with pytest.raises(ValueError, match="got Linear"):
        apply_liger(torch.nn.Linear(2, 2))
    model = build("Qwen2.5-VL")
    model.model.language_model.layers[1].mlp.act_fn = torch.nn.GELU()
    with pytest.raises(ValueError, match="activation is GELU"):
        apply_liger(model)


def test_without_liger_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", None)
    with pytest.raises(ImportError, match=r"pip install liger-kernel==0\.8\.5"):
        apply_liger(build("Qwen2.5-VL"))


@pytest.mark.gpu
def test_in_bf16_on_cuda_ligers_layers_are_as_close_to_float32_as_the_plain_ones():
    model, given = build("Qwen2.5-VL"), data()
    pixels = patches(model, GRIDS)
    exact = model.model.visual(pixels, grid_thw=torch.tensor(GRIDS).to(DEVICE)).pooler_output
    model.bfloat16()
    use_packed_attention(model)

    def both():
        features = model.model.visual(pixels.bfloat16(), grid_thw=torch.tensor(GRIDS).to(DEVICE)).pooler_output
        return outcome(model, given), torch.cat(list(features)).detach()

    plain, plain_features = both()
    apply_liger(model)
    ours, features = both()
    assert relative(features, torch.cat(list(exact))) <= 2 * relative(plain_features, torch.cat(list(exact))) + 1e-3
    assert_close(ours, plain, 5e-2)
    assert math.isfinite(relative(ours[0], plain[0]))

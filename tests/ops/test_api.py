"""The door: the ops against an oracle written out row by row in float64, what the arguments mean, edge cases, and every refusal."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actial_fast import ops
from actial_fast.ops import chunked, chunked_kl, chunked_logits, library, reference
from actial_fast.ops.spec import AdvantageSpec, GRPOSpec
from tests.head_cases import error, make

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 1e-2}  # of the largest entry; gradients in bf16 are rounded
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))


# ---- the oracle


def log_softmax_row(hidden: np.ndarray, weight: np.ndarray, temperature: float) -> list[float]:
    logits = [math.fsum(float(h) * float(w) for h, w in zip(hidden, row, strict=True)) / temperature for row in weight]
    top = max(logits)
    lse = top + math.log(math.fsum(math.exp(z - top) for z in logits))
    return [z - lse for z in logits]


def oracle(case, spec: GRPOSpec, temperature: float = 1.0, old: bool = True) -> SimpleNamespace:
    """loss, stats, dhidden, dweight, logp, entropy of the clip objective in float64, row by row; the gradients are derived by hand."""
    hidden, weight, advantages, token_weight = (
        t.detach().double().numpy() for t in (case.hidden, case.weight, case.advantages, case.token_weight)
    )
    out = SimpleNamespace(loss=0.0, stats=np.zeros(len(ops.STATS)), dhidden=np.zeros_like(hidden), dweight=np.zeros_like(weight))
    out.logp, out.entropy = [], []
    for t, target in enumerate(case.targets.tolist()):
        row = log_softmax_row(hidden[t], weight, temperature)
        p = np.exp(row)
        logp, entropy = row[target], -math.fsum(math.exp(x) * x for x in row)
        out.logp.append(logp)
        out.entropy.append(entropy)
        a, w = float(advantages[t]), float(token_weight[t])
        if w == 0:
            continue
        ratio = math.exp(logp - float(case.old_logp[t])) if old else 1.0
        low, high = 1 - spec.clip_low, 1 + spec.clip_high
        if a > 0:
            policy, active = -min(ratio, high) * a, ratio <= high
        else:
            policy, active = -max(ratio, low) * a, ratio >= low
        slope = -ratio * a if active else 0.0  # d policy / d logp
        kl = 0.0
        if case.ref_logp is not None:
            d = float(case.ref_logp[t]) - logp
            kl = math.expm1(d) - d
            slope += spec.beta * -math.expm1(d)
        loss = w * (policy + spec.beta * kl)
        out.loss += loss
        dlogits = w * slope / temperature * ((np.arange(len(p)) == target) - p)
        out.dhidden[t] = dlogits @ weight
        out.dweight += np.outer(dlogits, hidden[t])
        out.stats += [1, loss, w * policy, kl, entropy, a < 0 and ratio < low, a > 0 and ratio > high, ratio, ratio**2, 1]
    return out


def case_of(T=37, ref=True, **more) -> SimpleNamespace:
    """Without the parts of a case that the oracle does not know."""
    case = make(T=T, **more)
    with torch.no_grad():
        logp, _ = reference.linear_logprob(case.hidden.double(), case.weight.double(), case.targets)
        scaled, _ = reference.linear_logprob(
            case.hidden.double(), case.weight.double(), case.targets, bias=case.bias.double(), temperature=case.temperature.double()
        )
        for name in ("old_logp", "ref_logp"):  # near the policy without bias and temperature
            setattr(case, name, (getattr(case, name).double() - scaled + logp).to(case.token_weight.dtype))
    if not ref:
        case.ref_logp = None
    return case


def call(case, spec: GRPOSpec, temperature: float = 1.0, old: bool = True, **more) -> SimpleNamespace:
    rows = (case.targets, case.advantages, case.old_logp if old else None, case.ref_logp)
    more = {"token_weight": case.token_weight} | more
    out = ops.linear_grpo_loss(case.hidden, case.weight, *rows, spec, temperature=temperature, **more)
    dhidden, dweight = torch.autograd.grad(out.loss, (case.hidden, case.weight))
    return SimpleNamespace(loss=out.loss.detach(), stats=out.stats, dhidden=dhidden, dweight=dweight, logp=out.logp, entropy=out.entropy)


def assert_agrees(got: SimpleNamespace, want: SimpleNamespace, dtype: torch.dtype) -> None:
    tolerance, want = TOLERANCE[dtype], {name: torch.as_tensor(np.asarray(x)) for name, x in vars(want).items()}
    assert error(got.loss, want["loss"]) < 10 * tolerance, "loss"  # terms of both signs cancel in the sum
    assert error(got.dhidden, want["dhidden"]) < tolerance, "gradient of hidden"
    assert error(got.dweight, want["dweight"]) < tolerance, "gradient of weight"
    assert error(got.stats, want["stats"]) < max(tolerance, 1e-6), "statistics"  # float32 always
    assert error(got.logp, want["logp"]) < tolerance and error(got.entropy, want["entropy"]) < tolerance, "log-probs"


# ---- the policy loss


@DTYPES
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_grpo_loss_gradients_and_statistics(dtype, beta, temperature):
    case, spec = case_of(dtype=dtype), GRPOSpec(beta=beta)
    assert_agrees(call(case, spec, temperature), oracle(case, spec, temperature), dtype)


@DTYPES
def test_on_policy_ratio_is_one_and_has_the_log_probs_gradient(dtype):
    case, spec = case_of(dtype=dtype), GRPOSpec(beta=0.05)
    got = call(case, spec, old=False)
    assert_agrees(got, oracle(case, spec, old=False), dtype)
    stats = dict(zip(ops.STATS, got.stats.tolist(), strict=True))
    assert stats["clip_low"] == stats["clip_high"] == 0
    assert stats["ratio"] == stats["ratio_sq"] == stats["tokens"] == (case.token_weight != 0).sum()


def test_no_reference_at_beta_zero():
    case, spec = case_of(ref=False), GRPOSpec(beta=0)
    got = call(case, spec)
    assert_agrees(got, oracle(case, spec), torch.float64)
    assert got.stats[ops.STATS.index("kl")] == 0


@pytest.mark.parametrize(("clip_low", "clip_high"), [(0.2, 0.2), (0.1, 0.4), (0.0, 0.0), (1.0, 9.0)])
def test_clip_range(clip_low, clip_high):
    case, spec = case_of(T=80), GRPOSpec(clip_low=clip_low, clip_high=clip_high, beta=0.01)
    assert_agrees(call(case, spec), oracle(case, spec), torch.float64)


def test_the_clip_is_crossed_in_both_directions():
    """What the comparisons above rest on: ratios clipped from below and above, ratios beyond the range that are not, and ratios inside."""
    case = case_of()
    ratio = (torch.tensor(oracle(case, GRPOSpec()).logp) - case.old_logp).exp()
    for beyond in (ratio > 1.2, ratio < 0.8, (ratio - 1).abs() < 0.2):
        for side in (case.advantages > 0, case.advantages < 0):
            assert (beyond & side).any()
    stats = dict(zip(ops.STATS, call(case, GRPOSpec()).stats.tolist(), strict=True))
    total = stats["tokens"]
    assert 0.05 * total < stats["clip_low"] < 0.5 * total and 0.05 * total < stats["clip_high"] < 0.5 * total


@DTYPES
@pytest.mark.parametrize("spoil", [lambda g: 0 * g, lambda g: 1.05 * g, lambda g: -g, lambda g: g.flip(0), lambda g: g + math.nan])
@pytest.mark.parametrize("name", ["dhidden", "dweight"])
def test_a_wrong_gradient_fails_the_comparison(dtype, spoil, name):
    case, spec = case_of(dtype=dtype), GRPOSpec(beta=0.1)
    want = oracle(case, spec)
    got = call(case, spec)
    assert_agrees(got, want, dtype)
    setattr(got, name, spoil(getattr(got, name)))
    with pytest.raises(AssertionError, match="gradient of"):
        assert_agrees(got, want, dtype)


@pytest.mark.parametrize("change", [{"beta": 0.12}, {"clip_low": 0.25}, {"clip_high": 0.15}])
def test_another_spec_fails_the_comparison(change):
    case = case_of()
    with pytest.raises(AssertionError, match="loss"):
        assert_agrees(call(case, GRPOSpec(beta=0.1)), oracle(case, dataclasses.replace(GRPOSpec(beta=0.1), **change)), torch.float64)


def test_rows_of_weight_zero_change_nothing():
    case, spec = case_of(T=20), GRPOSpec(beta=0.1)
    case.token_weight[10:] = 0
    got, half = call(case, spec), case_of(T=20)
    for name in ("hidden", "targets", "advantages", "old_logp", "ref_logp", "token_weight"):
        setattr(half, name, getattr(case, name)[:10])
    part = call(half, spec)
    assert got.loss == pytest.approx(part.loss.item(), rel=1e-12)
    assert torch.equal(got.dhidden[10:], torch.zeros_like(got.dhidden[10:]))
    assert error(got.dweight, part.dweight) < 1e-12


def test_micro_batches_add_up():
    case, spec = case_of(T=31), GRPOSpec(beta=0.1)
    whole, parts = call(case, spec), []
    for rows in (slice(0, 1), slice(1, 17), slice(17, 31)):
        part = SimpleNamespace(**vars(case))
        for name in ("targets", "advantages", "old_logp", "ref_logp", "token_weight"):
            setattr(part, name, getattr(case, name)[rows])
        part.hidden = case.hidden.detach()[rows].requires_grad_()
        parts.append(call(part, spec))
    assert sum(p.loss for p in parts).item() == pytest.approx(whole.loss.item(), rel=1e-12)
    assert error(sum(p.dweight for p in parts), whole.dweight) < 1e-12
    assert error(torch.cat([p.dhidden for p in parts]), whole.dhidden) < 1e-12
    assert error(sum(p.stats for p in parts), whole.stats.double()) < 1e-6


@DTYPES
def test_no_rows_give_a_zero_loss_that_backpropagates(dtype):
    case = case_of(T=0, dtype=dtype)
    sequences = {"cu_seqlens": torch.tensor([0])}
    for spec, old in ((GRPOSpec(), True), (GRPOSpec(), False), (GRPOSpec(top_entropy=0.5), True), (GRPOSpec.named("gspo"), True)):
        got = call(case, spec, old=old, **sequences)
        assert got.loss == 0 and torch.equal(got.stats, torch.zeros(len(ops.STATS)))
        assert got.dhidden.shape == case.hidden.shape and torch.equal(got.dweight, torch.zeros_like(case.weight))
    loss = ops.linear_cross_entropy(case.hidden, case.weight, case.targets, case.token_weight)
    assert loss == 0
    assert torch.equal(torch.autograd.grad(loss, case.weight)[0], torch.zeros_like(case.weight))
    assert [tuple(x.shape) for x in ops.linear_logprob(case.hidden, case.weight, case.targets)] == [(0,), (0,)]


@DTYPES
def test_one_row(dtype):
    case, spec = case_of(T=1, dtype=dtype, scale=0.2), GRPOSpec(beta=0.1)
    case.advantages[:] = -1.5
    assert_agrees(call(case, spec), oracle(case, spec), dtype)


def test_advantage_zero_leaves_only_the_kl():
    case, spec = case_of(), GRPOSpec(beta=0.1)
    case.advantages.zero_()
    got = call(case, spec)
    assert_agrees(got, oracle(case, spec), torch.float64)
    assert not torch.equal(got.dhidden, torch.zeros_like(got.dhidden))
    got = call(case, GRPOSpec(beta=0))
    assert got.loss == 0 and torch.equal(got.dhidden, torch.zeros_like(got.dhidden)), "why such groups may be skipped"


@DTYPES
@pytest.mark.parametrize("shift", [-3072.0, 3072.0], ids=["strongly negative", "strongly positive"])
def test_far_away_logits(dtype, shift):
    """Logits about -3072 or 3072: only their differences matter. The common part sits in one coordinate that is exact in every dtype."""
    case, spec = case_of(T=9, V=17, dtype=dtype, spread=0.2), GRPOSpec(beta=0.1)
    with torch.no_grad():
        case.hidden[:, 0], case.weight[:, 0] = 64.0, 0.0
    near = oracle(case, spec)
    with torch.no_grad():
        case.weight[:, 0] = shift / 64
    far = oracle(case, spec)
    assert far.loss == pytest.approx(near.loss, rel=1e-6)
    logp, entropy = ops.linear_logprob(case.hidden, case.weight, case.targets)
    spacing = 3072 * torch.finfo(dtype).eps  # of the logits themselves, which is all that may be lost
    assert error(logp, torch.tensor(far.logp, dtype=torch.float64)) < 4 * spacing and entropy.isfinite().all()
    got = call(case, spec)
    assert got.loss.isfinite() and got.dhidden.isfinite().all() and got.dweight.isfinite().all()


@DTYPES
def test_one_dominant_token(dtype):
    """Probability 1 up to rounding for the target: log-prob and entropy 0, not NaN; the other tokens' log-probs stay finite."""
    hidden = torch.eye(4, dtype=dtype).requires_grad_()
    weight = torch.full((7, 4), -400.0, dtype=dtype)
    weight[3] = 400.0
    weight.requires_grad_()
    for target, want in ((3, 0.0), (5, -800.0)):
        targets = torch.full((4,), target)
        logp, entropy = ops.linear_logprob(hidden, weight, targets)
        assert torch.equal(logp, torch.full_like(logp, want)) and torch.equal(entropy, torch.zeros_like(entropy))
        gradient = torch.autograd.grad(ops.linear_cross_entropy(hidden, weight, targets, torch.ones(4)), hidden)[0]
        assert torch.equal(gradient, torch.full_like(gradient, 0.0 if target == 3 else 800.0))


# ---- log-probs and cross-entropy


@DTYPES
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_log_probs_and_entropy(dtype, temperature):
    case = case_of(dtype=dtype)
    logp, entropy = ops.linear_logprob(case.hidden, case.weight, case.targets, temperature=temperature)
    want = oracle(case, GRPOSpec(), temperature)
    assert (
        error(logp, torch.tensor(want.logp, dtype=torch.float64)) < TOLERANCE[dtype]
        and error(entropy, torch.tensor(want.entropy, dtype=torch.float64)) < TOLERANCE[dtype]
    )
    assert logp.dtype == entropy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@DTYPES
def test_cross_entropy_is_the_weighted_sum_of_log_probs(dtype):
    case = case_of(dtype=dtype)
    loss = ops.linear_cross_entropy(case.hidden, case.weight, case.targets, case.token_weight)
    dhidden, dweight = torch.autograd.grad(loss, (case.hidden, case.weight))
    # the on-policy policy loss with advantage 1 has the same gradient
    case.advantages.fill_(1.0)
    want = oracle(case, GRPOSpec(beta=0), old=False)
    assert loss.item() == pytest.approx(-np.dot(want.logp, case.token_weight.double().numpy()), rel=TOLERANCE[dtype])
    assert error(dhidden, torch.tensor(want.dhidden)) < TOLERANCE[dtype] and error(dweight, torch.tensor(want.dweight)) < TOLERANCE[dtype]


def test_entropy_of_a_uniform_distribution():
    _, entropy = ops.linear_logprob(torch.zeros(2, 3), torch.randn(11, 3), torch.tensor([0, 10]))
    assert entropy.tolist() == pytest.approx([math.log(11)] * 2, rel=1e-6)


def test_gradcheck_of_the_references():
    case = case_of(T=5, H=3, V=4, seed=1)
    fixed = (case.targets, case.advantages, case.old_logp, case.ref_logp)

    def policy(hidden, weight):
        return reference.linear_grpo_loss(hidden, weight, *fixed, GRPOSpec(beta=0.3), token_weight=case.token_weight, temperature=0.8)[0]

    inputs = (case.hidden, case.weight)
    assert torch.autograd.gradcheck(policy, inputs)
    assert torch.autograd.gradcheck(lambda h, w: reference.linear_logprob(h, w, case.targets, temperature=1.3), inputs)
    assert torch.autograd.gradcheck(lambda h, w: reference.linear_cross_entropy(h, w, case.targets, case.token_weight), inputs)
    logp = case.old_logp.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reference.token_kl(x, case.ref_logp), (logp,))


# ---- k3


def test_k3_and_the_ratio_stay_finite_however_far_the_policies_are_apart():
    far = torch.tensor([-200.0])
    assert ops.token_kl(far, torch.zeros(1)).item() == pytest.approx(math.expm1(20) - 20)
    hidden, weight = torch.tensor([[300.0]], requires_grad=True), torch.tensor([[0.0], [1.0]])
    loss, stats, *_ = ops.linear_grpo_loss(
        hidden, weight, torch.tensor([1]), torch.zeros(1), far, None, GRPOSpec(beta=0.0), token_weight=torch.ones(1)
    )
    loss.backward()
    assert loss.item() == 0 and stats.isfinite().all() and hidden.grad.isfinite().all()


@given(st.floats(-30, 3), st.floats(-8, 1.3), st.sampled_from((-1, 1)))
def test_k3_is_exact_for_any_difference(logp, exponent, sign):
    d = sign * 10**exponent
    got = ops.token_kl(torch.tensor([0.0], dtype=torch.float64), torch.tensor([d], dtype=torch.float64)).item()
    series = d * d / 2 * (1 + d / 3 + d * d / 12 + d**3 / 60)  # of e^d - 1 - d
    want = series if abs(d) < 1e-3 else math.expm1(d) - d
    # expm1 rounds at d's own spacing; e^d - 1 - d would round at 1's, and give 0 or below where d is tiny
    assert abs(got - want) <= 4e-16 * abs(d) + 1e-12 * want and got >= 0


def test_k3_of_a_tiny_difference_in_float32():
    d = torch.tensor([1e-3, -1e-3, 3e-3], dtype=torch.float32)
    got = ops.token_kl(torch.zeros(3), d).double()
    want = torch.expm1(d.double()) - d.double()
    assert ((got - want).abs() / want).max() < 1e-3
    naive = (torch.exp(d) - 1 - d).double()
    assert ((naive - want).abs() / want).max() > 1e-2, "the difference that expm1 makes"


def test_k3_is_zero_at_the_reference_and_positive_elsewhere():
    x = torch.randn(100)
    assert torch.equal(ops.token_kl(x, x), torch.zeros(100))
    assert (ops.token_kl(x, x + 0.3) > 0).all() and (ops.token_kl(x, x - 0.3) > 0).all()


# ---- advantages


def advantages_by_hand(rewards, groups, spec):
    out = []
    for reward, group in zip(rewards, groups, strict=True):
        known = [r for r, g in zip(rewards, groups, strict=True) if g == group and not math.isnan(r)]
        if math.isnan(reward) or len(known) < 2 or max(known) == min(known):
            out.append(0.0)
            continue
        centred = reward - sum(known) / len(known)
        scale = np.std(known, ddof=1) + spec.epsilon if spec.scale == "std" else 1.0
        out.append(centred / scale)
    return out


REWARDS = st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0, -2.0, math.nan])


@settings(max_examples=200)
@given(st.lists(st.tuples(REWARDS, st.integers(0, 4)), max_size=24), st.sampled_from(["std", "none"]), st.sampled_from([1e-6, 0.1]))
def test_group_advantages(pairs, scale, epsilon):
    rewards, groups = [r for r, _ in pairs], [g for _, g in pairs]
    spec = AdvantageSpec(scale=scale, epsilon=epsilon)
    got = ops.group_advantages(torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups, dtype=torch.int64), spec)
    assert got.tolist() == pytest.approx(advantages_by_hand(rewards, groups, spec), abs=1e-9)


def test_advantages_of_a_known_group():
    rewards, groups = torch.tensor([0.0, 1.0, 1.0, 0.0, 5.0, 2.0]), torch.tensor([0, 0, 0, 0, 2, 1])
    got = ops.group_advantages(rewards, groups, AdvantageSpec())
    assert got.tolist() == pytest.approx([-0.8660244, 0.8660244, 0.8660244, -0.8660244, 0, 0], abs=1e-5)
    assert ops.group_advantages(rewards, groups, AdvantageSpec(scale="none")).tolist() == [-0.5, 0.5, 0.5, -0.5, 0, 0]


@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 0.7, 1e6 / 7, -0.1])
def test_equal_rewards_give_exactly_zero(scale, dtype, reward):
    """Rounding in the mean must not leave a trace: groups with advantage 0 are skipped, and epsilon would blow the trace up."""
    groups = torch.cat([torch.full((n,), n) for n in range(3, 40)])
    got = ops.group_advantages(torch.full((len(groups),), reward, dtype=dtype), groups, AdvantageSpec(scale=scale))
    assert torch.equal(got, torch.zeros_like(got))


def test_no_rewards():
    assert ops.group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.int64), AdvantageSpec()).shape == (0,)


def test_advantages_ignore_the_order_and_the_names_of_groups():
    g = torch.Generator().manual_seed(0)
    rewards, groups = torch.rand(30, generator=g, dtype=torch.float64), torch.randint(0, 5, (30,), generator=g)
    order = torch.randperm(30, generator=g)
    a = ops.group_advantages(rewards, groups, AdvantageSpec())
    b = ops.group_advantages(rewards[order], 3 * groups[order] + 1, AdvantageSpec())
    assert torch.allclose(a[order], b, rtol=0, atol=1e-12)


# ---- what the arguments mean


def test_without_weights_the_rows_are_averaged_as_the_spec_says():
    case = case_of(lengths=(5, 1, 0, 9, 12))
    rows = (case.targets, case.advantages, case.old_logp, case.ref_logp)
    for aggregation, cu_seqlens in (
        ("token", None),
        ("token", case.cu_seqlens),
        ("sequence", case.cu_seqlens),
        ("sequence_sum", case.cu_seqlens),
    ):
        spec = GRPOSpec(aggregation=aggregation)
        got = ops.linear_grpo_loss(case.hidden, case.weight, *rows, spec, cu_seqlens=cu_seqlens).loss
        token_weight = ops.token_weights(spec, case.cu_seqlens).double()
        assert got.item() == ops.linear_grpo_loss(case.hidden, case.weight, *rows, spec, token_weight=token_weight).loss.item()
        lengths = torch.tensor([1, 5, 9, 12]).double() if aggregation == "sequence" else torch.tensor([27.0])
        assert aggregation == "sequence_sum" or set(token_weight.unique().tolist()) <= set(
            (1 / lengths / (5 if len(lengths) > 1 else 1)).float().tolist()
        )


def test_one_advantage_a_sequence():
    case = case_of(lengths=(5, 1, 0, 9, 12))
    advantages = torch.randn(5, dtype=torch.float64)
    spread = advantages.repeat_interleave(case.cu_seqlens.diff())
    rows = (case.hidden, case.weight, case.targets)
    for cu_seqlens in (case.cu_seqlens, case.cu_seqlens.int()):
        got = ops.linear_grpo_loss(*rows, advantages, case.old_logp, None, GRPOSpec(beta=0), cu_seqlens=cu_seqlens)
        assert torch.equal(got.loss, ops.linear_grpo_loss(*rows, spread, case.old_logp, None, GRPOSpec(beta=0)).loss)


def test_top_entropy_selects_the_rows_of_highest_entropy():
    case, spec = case_of(T=40), GRPOSpec(beta=0, top_entropy=0.25)
    got = call(case, spec)
    counted = case.token_weight != 0
    threshold = torch.quantile(got.entropy[counted], 0.75)
    chosen = counted & (got.entropy >= threshold)
    assert chosen.sum() == math.ceil(0.25 * int(counted.sum()))
    assert (got.dhidden[~chosen] == 0).all() and got.dhidden[chosen & (case.advantages != 0)].abs().max() > 0
    by_hand = call(case, dataclasses.replace(spec, top_entropy=1.0), policy_mask=chosen)
    assert torch.equal(got.dweight, by_hand.dweight) and torch.equal(got.loss, by_hand.loss)
    logits = (case.hidden @ case.weight.T).detach().requires_grad_()
    rows = (case.targets, case.advantages, case.old_logp, None, spec)
    assert ops.grpo_loss_from_logits(logits, *rows, token_weight=case.token_weight).loss.item() == pytest.approx(got.loss.item(), rel=1e-12)


@DTYPES
def test_the_gradient_of_the_head_is_added_to_a_buffer(dtype):
    case, spec = case_of(dtype=dtype), GRPOSpec(beta=0.1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    want, start = call(case, spec), torch.randn(case.weight.shape, dtype=wide)
    buffer = start.clone()
    rows = (case.hidden, case.weight, case.targets)
    for times in (1, 2):
        case.hidden.grad = None
        ops.linear_grpo_loss(
            *rows, case.advantages, case.old_logp, case.ref_logp, spec, token_weight=case.token_weight, weight_grad=buffer
        ).loss.backward()
        assert case.weight.grad is None and torch.equal(case.hidden.grad, want.dhidden)
        assert error(buffer - start, times * want.dweight) < max(TOLERANCE[dtype], 1e-6)
    ce = torch.autograd.grad(ops.linear_cross_entropy(*rows, case.token_weight), case.weight)[0]
    buffer.zero_()
    ops.linear_cross_entropy(*rows, case.token_weight, weight_grad=buffer).backward()
    assert error(buffer, ce) < TOLERANCE[dtype]
    with torch.no_grad():
        before = buffer.clone()
        ops.linear_cross_entropy(*rows, case.token_weight, weight_grad=buffer)
    assert torch.equal(buffer, before), "without gradients there is nothing to add"


def test_a_buffer_cannot_be_scaled_afterwards():
    case = case_of()
    loss = ops.linear_cross_entropy(case.hidden, case.weight, case.targets, case.token_weight, weight_grad=torch.zeros_like(case.weight))
    with pytest.raises(ValueError, match=r"^weight_grad: the head's gradient is in it already.* but 0\.5 arrived; .*token_weight"):
        (loss / 2).backward()


@DTYPES
def test_the_loss_may_be_scaled(dtype):
    case, spec = case_of(dtype=dtype), GRPOSpec(beta=0.1)
    plain = call(case, spec)
    rows = (case.targets, case.advantages, case.old_logp, case.ref_logp, spec)
    loss = ops.linear_grpo_loss(case.hidden, case.weight, *rows, token_weight=case.token_weight).loss
    for _ in range(2):
        got = torch.autograd.grad(-8 * loss, (case.hidden, case.weight), retain_graph=True)
        assert all(error(a, -8 * b) < TOLERANCE[dtype] for a, b in zip(got, (plain.dhidden, plain.dweight), strict=True))


def test_float16_gradients_wait_for_the_loss_scale():
    """A gradient below float16's range survives when the loss is scaled up."""
    case = case_of(dtype=torch.float16)
    case.token_weight *= 1e-6
    loss = ops.linear_cross_entropy(case.hidden, case.weight, case.targets, case.token_weight)
    dhidden, dweight = torch.autograd.grad(2**16 * loss, (case.hidden, case.weight))
    case.token_weight *= 2**16
    want = torch.autograd.grad(
        reference.linear_cross_entropy(case.hidden.double(), case.weight.double(), case.targets, case.token_weight),
        (case.hidden, case.weight),
    )
    assert error(dhidden, want[0]) < 2e-3 and error(dweight, want[1]) < 2e-3


def test_autocast_casts_like_a_linear_layer():
    case = case_of(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logp, entropy = ops.linear_logprob(case.hidden, case.weight, case.targets)
        loss = ops.linear_cross_entropy(case.hidden, case.weight, case.targets, case.token_weight)
    low = [x.detach().bfloat16() for x in (case.hidden, case.weight)]
    want = ops.linear_logprob(*low, case.targets)
    assert torch.equal(logp, want[0]) and torch.equal(entropy, want[1])
    loss.backward()
    assert case.hidden.grad.dtype == case.weight.grad.dtype == torch.float32 and case.weight.grad.abs().max() > 0
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        double = [x.detach().double() for x in (case.hidden, case.weight)]
        assert ops.linear_logprob(*double, case.targets)[0].dtype == torch.float64


def test_entropy_may_be_left_out_and_memory_laid_out_otherwise():
    case = case_of()
    logp, entropy = ops.linear_logprob(case.hidden, case.weight, case.targets)
    assert ops.linear_logprob(case.hidden, case.weight, case.targets, return_entropy=False)[1] is None
    wide = torch.cat([case.weight, case.weight], 1)[:, :12]  # rows with gaps
    got = ops.linear_logprob(case.hidden.T.contiguous().T, wide, case.targets)
    assert torch.equal(got[0], logp) and torch.equal(got[1], entropy)


@DTYPES
@pytest.mark.parametrize("inplace", [False, True])
def test_from_logits(dtype, inplace):
    case, spec = case_of(dtype=dtype, lengths=(5, 1, 9, 12)), GRPOSpec.named("gspo", beta=0.1, entropy_coef=0.1)
    logits = (case.hidden @ case.weight.T).detach()
    rows = (case.targets, case.advantages, case.old_logp, case.ref_logp, spec)
    more = {"token_weight": case.token_weight, "cu_seqlens": case.cu_seqlens}
    twin = logits.double().clone().requires_grad_()
    want = reference.grpo_terms(*reference.logprob_from_logits(twin, case.targets, temperature=0.7), *rows[1:], **more)
    (dwant,) = torch.autograd.grad(want[0], twin)
    leaf = logits.clone().requires_grad_()
    x = leaf * 1
    got = ops.grpo_loss_from_logits(x, *rows, **more, temperature=0.7, inplace=inplace)
    (3 * got.loss).backward()
    assert error(got.loss, want[0]) < 1e-5 and error(got.stats, want[1]) < 1e-5 and not got.logp.requires_grad
    assert error(leaf.grad, 3 * dwant) < TOLERANCE[dtype]
    assert torch.equal(x.detach(), leaf.grad if inplace else logits)
    with torch.no_grad():
        x = logits.clone()
        ops.grpo_loss_from_logits(x, *rows, **more, inplace=inplace)
        ops.logprob_from_logits(x, case.targets, inplace_backward=inplace)
    assert torch.equal(x, logits), "without gradients nothing is overwritten"


def test_all_rows_masked():
    case = case_of(lengths=(5, 1, 9))
    case.token_weight.zero_()
    case.advantages[:], case.old_logp[:] = math.nan, math.nan
    for name in ("grpo", "gspo", "cispo", "sapo", "vespo"):
        got = call(case, GRPOSpec.named(name, beta=0.1), cu_seqlens=case.cu_seqlens)
        assert got.loss == 0 and not got.stats.any() and not got.dhidden.any() and not got.dweight.any()


# ---- the door leads to the kernels


def test_the_kernels_take_what_the_door_gives(monkeypatch):
    """Every op through Triton (its interpreter where there is no GPU) with the door's own arguments, against the CPU path."""
    case = case_of(dtype=torch.float32, lengths=(3, 1, 5), V=40, H=16)
    groups, spec = torch.tensor([0, 0, 0, 7, 7, 7, 7, 2, 7]), GRPOSpec.named("gspo", beta=0.1)
    logits = (case.hidden @ case.weight.T).detach()
    rows = (case.targets, case.advantages, case.old_logp, case.ref_logp, spec)
    more = {"token_weight": case.token_weight, "cu_seqlens": case.cu_seqlens, "sampler_logp": case.sampler_logp}
    calls = {
        "linear_logprob": lambda: ops.linear_logprob(case.hidden, case.weight, case.targets, temperature=case.temperature, softcap=5.0),
        "linear_grpo_loss": lambda: ops.linear_grpo_loss(case.hidden, case.weight, *rows, **more, bias=case.bias),
        "linear_cross_entropy": lambda: [ops.linear_cross_entropy(case.hidden, case.weight, case.targets, case.token_weight)],
        "linear_kl": lambda: [ops.linear_kl(case.hidden, case.weight, case.hidden + 0.1, case.weight * 1.1, temperature=0.7)],
        "logprob_from_logits": lambda: ops.logprob_from_logits(logits, case.targets, temperature=0.7),
        "grpo_loss_from_logits": lambda: ops.grpo_loss_from_logits(logits, *rows, **more),
        "group_advantages": lambda: [ops.group_advantages(case.advantages, groups, AdvantageSpec())],
        "token_kl": lambda: [ops.token_kl(case.old_logp, case.ref_logp, "k2")],
    }
    leaves = (case.hidden, case.weight, case.bias)

    def with_gradients(run):
        """The results, and the gradients of those that have one."""
        out = list(run())
        total = sum((x.sum() for x in out if x.requires_grad), 0 * sum(x.sum() for x in leaves))
        return out + list(torch.autograd.grad(total, leaves))

    for name, run in calls.items():
        cpu = with_gradients(run)
        with monkeypatch.context() as patch:
            patch.setattr(library, "on_gpu", lambda x: True)
            for module, f in ((chunked, name), (chunked_logits, name), (chunked_kl, name), (reference, name)):
                if hasattr(module, f):
                    patch.setattr(module, f, unreachable(name))
            triton = with_gradients(run)
        for a, b in zip(triton, cpu, strict=True):
            assert a.dtype == b.dtype and torch.allclose(a, b, atol=2e-5, rtol=2e-5), name


def unreachable(name: str):
    def cpu_path(*_, **__):
        raise AssertionError(f"{name} took the CPU path")

    cpu_path.__name__ = name
    return cpu_path


# ---- refusals

LONG = torch.int64
HEAD = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "targets": torch.zeros(3, dtype=LONG)}
ROWS = {name: torch.zeros(3) for name in ("advantages", "old_logp", "ref_logp", "token_weight")}
OTHER_ROWS = ("sampler_logp", "entropy_weight", "temperature")
BAD_HEAD = [
    ({"hidden": torch.zeros(3)}, r"^hidden: expected \(T, H\) floating point, got \(3,\) torch\.float32$"),
    ({"hidden": torch.zeros(3, 4, dtype=LONG)}, r"^hidden: expected .* got \(3, 4\) torch\.int64$"),
    ({"hidden": torch.zeros(3, 4, device="meta")}, r"^hidden: on meta; these ops run on cpu and cuda$"),
    ({"hidden": torch.zeros(3, 4).to(torch.float8_e4m3fn)}, r"^hidden: torch\.float8_e4m3fn on cpu; cast to float32, bfloat16 or float16"),
    ({"weight": torch.zeros(4)}, r"^weight: expected \(V, 4\) to fit hidden, got \(4,\)$"),
    ({"weight": torch.zeros(5, 3)}, r"^weight: expected \(V, 4\) to fit hidden, got \(5, 3\)$"),
    ({"weight": torch.zeros(0, 4)}, r"^weight: expected V >= 1 and H >= 1, got \(0, 4\)$"),
    (
        {"weight": torch.zeros(5, 4).double()},
        r"^weight: torch\.float64 but hidden is torch\.float32; cast .* weight\.to\(torch\.float32\)$",
    ),
    ({"weight": torch.zeros(4, 5).T}, r"^weight: its rows must be contiguous, got strides \(1, 5\); pass weight\.contiguous\(\)$"),
    ({"weight": torch.zeros(5, 4, device="meta")}, r"^weight: on meta but hidden is on cpu; it was never loaded$"),
    ({"targets": torch.zeros(2, dtype=LONG)}, r"^targets: expected \(3,\) (or \(3, K\) with K >= 1, )?int64, got \(2,\) torch\.int64$"),
    (
        {"targets": torch.zeros(3, dtype=torch.int32)},
        r"^targets: expected \(3,\) (or \(3, K\) with K >= 1, )?int64, got \(3,\) torch\.int32$",
    ),
    ({"targets": torch.zeros(3, dtype=LONG, device="meta")}, r"^targets: on meta but hidden is on cpu"),
    ({"targets": torch.tensor([0, 5, 1])}, r"^targets: expected ids in \[0, 5\), got 5; a row without a target has -100"),
    ({"targets": torch.tensor([0, -1, 1])}, r"^targets: expected ids in \[0, 5\), got -1"),
    ({"bias": torch.zeros(4)}, r"^bias: expected \(5,\) floating point to fit weight, got \(4,\) torch\.float32$"),
    ({"bias": torch.zeros(5).double()}, r"^bias: torch\.float64 but hidden is torch\.float32"),
    ({"softcap": 0.0}, r"^softcap: must be > 0 and finite, got 0\.0; None = no cap$"),
    ({"workspace_mb": 0}, r"^workspace_mb: must be > 0 and finite, got 0$"),
]
BAD_ROW = [
    (torch.zeros(2), r"expected \(3,\) floating point on cpu, got \(2,\) torch\.float32 on cpu$"),
    (torch.zeros(3, 1), r"expected \(3,\) floating point on cpu, got \(3, 1\) torch\.float32 on cpu$"),
    (torch.zeros(3, dtype=LONG), r"expected \(3,\) floating point on cpu, got \(3,\) torch\.int64 on cpu$"),
    (torch.zeros(3, device="meta"), r"expected \(3,\) floating point on cpu, got \(3,\) torch\.float32 on meta$"),
    (torch.zeros(3, requires_grad=True), r"requires a gradient, but gets none here; pass .*\.detach\(\)$"),
]


def loss(**changes):
    return ops.linear_grpo_loss(**(HEAD | ROWS | {"spec": GRPOSpec()} | changes))


@pytest.mark.parametrize(("change", "message"), BAD_HEAD, ids=[message[1:40] for _, message in BAD_HEAD])
def test_heads_that_do_not_fit(change, message):
    for refused in (
        lambda: ops.linear_logprob(**(HEAD | change)),
        lambda: ops.linear_cross_entropy(**(HEAD | change), token_weight=torch.ones(3)),
        lambda: loss(**({"token_weight": torch.ones(3)} | change)),
    ):
        with pytest.raises(ValueError, match=message):
            refused()


@pytest.mark.parametrize(("tensor", "message"), BAD_ROW, ids=["length", "shape", "dtype", "device", "gradient"])
@pytest.mark.parametrize("name", [*ROWS, *OTHER_ROWS])
def test_rows_that_do_not_fit(name, tensor, message):
    with pytest.raises(ValueError, match=f"^{name}: {message}"):
        loss(**{name: tensor})
    with pytest.raises(ValueError, match=f"^{name}: {message}"):
        ops.grpo_loss_from_logits(torch.zeros(3, 5), HEAD["targets"], **(ROWS | {"spec": GRPOSpec(), name: tensor}))
    if name == "token_weight":
        with pytest.raises(ValueError, match=f"^{name}: {message}"):
            ops.linear_cross_entropy(**HEAD, token_weight=tensor)


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan, torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1.0, math.nan, 1.0])], ids=str)
def test_temperature_must_be_positive(temperature):
    for refused in (
        lambda: ops.linear_logprob(**HEAD, temperature=temperature),
        lambda: loss(temperature=temperature),
        lambda: ops.logprob_from_logits(torch.zeros(3, 5), HEAD["targets"], temperature=temperature),
        lambda: ops.linear_kl(*[torch.zeros(3, 4)] * 4, temperature=temperature),
    ):
        with pytest.raises(ValueError, match=r"^temperature: must be > 0, got"):
            refused()


SEQUENCES = GRPOSpec(ratio="sequence")
BAD_LOSS = [
    ({"ref_logp": None}, r"^ref_logp: needed for beta=0\.01; pass the reference's log-probs \(T,\) or set beta to 0$"),
    (
        {"advantages": torch.tensor([0, math.nan, 0]), "token_weight": torch.ones(3)},
        r"^advantages: NaN in rows that count; give unscorable",
    ),
    ({"policy_mask": torch.ones(3)}, r"^policy_mask: expected \(3,\) bool, got \(3,\) torch\.float32$"),
    ({"policy_mask": torch.ones(2, dtype=torch.bool)}, r"^policy_mask: expected \(3,\) bool, got \(2,\) torch\.bool$"),
    ({"spec": SEQUENCES}, r"^cu_seqlens: this spec's rows depend on their sequence; pass it on the CPU, .* got None$"),
    ({"spec": GRPOSpec(objective="vespo")}, r"^cu_seqlens: this spec's rows depend on their sequence"),
    ({"spec": GRPOSpec(importance="sequence_mask"), "sampler_logp": torch.zeros(3)}, r"^cu_seqlens: this spec's rows depend on"),
    (
        {"token_weight": None, "spec": GRPOSpec(aggregation="sequence")},
        r"^cu_seqlens: needed for aggregation='sequence'; pass it, or token_weight",
    ),
    (
        {"token_weight": None, "spec": GRPOSpec(aggregation="constant")},
        r"^token_weight: needed for aggregation='constant'; pass token_weights\(",
    ),
    ({"cu_seqlens": torch.tensor([1, 3])}, r"^cu_seqlens: must start at 0, never fall and end at T = 3, got \[1, 3\]$"),
    ({"cu_seqlens": torch.tensor([0, 2])}, r"^cu_seqlens: must start at 0, never fall and end at T = 3, got \[0, 2\]$"),
    ({"cu_seqlens": torch.tensor([0, 2, 1, 3])}, r"^cu_seqlens: must start at 0, never fall"),
    ({"cu_seqlens": torch.tensor([0.0, 3.0])}, r"^cu_seqlens: expected \(S \+ 1,\) int32 or int64, got \(2,\) torch\.float32$"),
    ({"cu_seqlens": torch.zeros(0, dtype=LONG)}, r"^cu_seqlens: expected \(S \+ 1,\) int32 or int64, got \(0,\)"),
    ({"cu_seqlens": torch.tensor([0, 3], device="meta")}, r"^cu_seqlens: on meta; pass it on the CPU$"),
    ({"weight_grad": torch.zeros(4, 5)}, r"^weight_grad: expected \(5, 4\) torch\.float32, contiguous, got \(4, 5\)"),
    ({"weight_grad": torch.zeros(4, 5).T}, r"^weight_grad: expected \(5, 4\) torch\.float32, contiguous, .* with strides \(1, 5\)$"),
    (
        {"weight_grad": torch.zeros(5, 4).bfloat16()},
        r"^weight_grad: expected \(5, 4\) torch\.float32, contiguous, got \(5, 4\) torch\.bfloat16",
    ),
    ({"weight_grad": torch.zeros(5, 4, device="meta")}, r"^weight_grad: on meta but weight is on cpu"),
    ({"weight_grad": torch.zeros(5, 4)}, r"^weight_grad: weight does not require a gradient, so nothing would be added"),
]


@pytest.mark.parametrize(("change", "message"), BAD_LOSS, ids=[message[1:60] for _, message in BAD_LOSS])
def test_arguments_of_the_loss_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        loss(**change)
    if "weight_grad" not in change:
        with pytest.raises(ValueError, match=message):
            ops.grpo_loss_from_logits(torch.zeros(3, 5), HEAD["targets"], **(ROWS | {"spec": GRPOSpec()} | change))


def test_a_nan_advantage_of_a_masked_row_is_none_of_our_business():
    weight = torch.tensor([0.5, 0.0, 0.5])
    got = loss(advantages=torch.tensor([1, math.nan, 1]), token_weight=weight)
    assert got.loss.isfinite() and got.stats[0] == 2


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(3), HEAD["targets"], r"^logits: expected \(T, V\) floating point with V >= 1, got \(3,\)"),
        (torch.zeros(3, 0), HEAD["targets"], r"^logits: expected .* got \(3, 0\)"),
        (torch.zeros(3, 5, dtype=LONG), HEAD["targets"], r"^logits: expected .* torch\.int64$"),
        (torch.zeros(3, 5, device="meta"), HEAD["targets"], r"^logits: on meta; these ops run on cpu and cuda$"),
        (torch.zeros(3, 5), HEAD["targets"][:2], r"^targets: expected \(3,\) int64, got \(2,\)"),
        (torch.zeros(3, 5), HEAD["targets"] + 5, r"^targets: expected ids in \[0, 5\), got 5"),
    ],
)
def test_logits_that_do_not_fit(logits, targets, message):
    with pytest.raises(ValueError, match=message):
        ops.logprob_from_logits(logits, targets)
    with pytest.raises(ValueError, match=message):
        ops.grpo_loss_from_logits(logits, targets, **(ROWS | {"token_weight": torch.ones(3)}), spec=GRPOSpec())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ref_hidden": torch.zeros(2, 6)}, r"^ref_hidden: expected 3 rows like hidden, got 2$"),
        ({"ref_weight": torch.zeros(4, 6)}, r"^ref_weight: expected 5 rows like weight, got 4$"),
        ({"ref_weight": torch.zeros(5, 4)}, r"^ref_weight: expected \(V, 6\) to fit ref_hidden, got \(5, 4\)$"),
        ({"weight": torch.zeros(5, 4).double()}, r"^weight: torch\.float64 but hidden is torch\.float32"),
        ({"ref_hidden": torch.zeros(3, 6, device="meta")}, r"^ref_hidden: on meta; these ops run"),
    ],
)
def test_kl_of_heads_that_do_not_fit(change, message):
    heads = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "ref_hidden": torch.zeros(3, 6), "ref_weight": torch.zeros(5, 6)}
    with pytest.raises(ValueError, match=message):
        ops.linear_kl(**(heads | change))


@pytest.mark.parametrize(
    ("rewards", "groups", "weights", "message"),
    [
        (torch.zeros(2, 2, 2), torch.zeros(2, dtype=LONG), None, r"^rewards: expected \(N,\) or \(N, R\) floating point, got \(2, 2, 2\)"),
        (torch.zeros(2, dtype=LONG), torch.zeros(2, dtype=LONG), None, r"^rewards: expected .* torch\.int64$"),
        (torch.zeros(2), torch.zeros(3, dtype=LONG), None, r"^groups: expected \(2,\) int64, got \(3,\) torch\.int64$"),
        (torch.zeros(2), torch.zeros(2), None, r"^groups: expected \(2,\) int64, got \(2,\) torch\.float32$"),
        (torch.zeros(2), torch.zeros(2, dtype=LONG, device="meta"), None, r"^groups: on meta but rewards is on cpu"),
        (torch.zeros(2, 3), torch.zeros(2, dtype=LONG), torch.ones(2), r"^weights: expected one per column of rewards \(2, 3\)"),
        (torch.zeros(2), torch.zeros(2, dtype=LONG), torch.ones(2), r"^weights: expected one per column of rewards \(2,\)"),
    ],
)
def test_rewards_and_groups_that_do_not_fit(rewards, groups, weights, message):
    with pytest.raises(ValueError, match=message):
        ops.group_advantages(rewards, groups, AdvantageSpec(), weights=weights)


@pytest.mark.parametrize(
    ("logp", "ref_logp", "kind", "message"),
    [
        (torch.zeros(3, 1), torch.zeros(3, 1), "k3", r"^logp: expected \(T,\) floating point, got \(3, 1\)"),
        (torch.zeros(3), torch.zeros(2), "k3", r"^ref_logp: expected \(3,\) like logp, got \(2,\)$"),
        (torch.zeros(3), torch.zeros(3).double(), "k3", r"^ref_logp: torch\.float64 but logp is torch\.float32"),
        (torch.zeros(3), torch.zeros(3), "k4", r"^kind: 'k4' is not one of k1, k2, k3$"),
    ],
)
def test_kl_of_log_probs_that_do_not_fit(logp, ref_logp, kind, message):
    with pytest.raises(ValueError, match=message):
        ops.token_kl(logp, ref_logp, kind)


@pytest.mark.parametrize("field", ["clip_low", "clip_high", "beta"])
def test_a_spec_with_a_negative_number(field):
    with pytest.raises(ValueError, match=rf"^{field}: must be >= 0, got -0\.1$"):
        GRPOSpec(**{field: -0.1})

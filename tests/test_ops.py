"""The ops against an oracle written out row by row in float64: forward, gradients, statistics, edge cases, and every refusal."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actial_fast import ops, reference
from actial_fast.spec import AdvantageSpec, GRPOSpec

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2}  # of the largest entry; bf16 rounds the logits
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))


# ---- the oracle


def log_softmax_row(hidden: np.ndarray, weight: np.ndarray, temperature: float) -> list[float]:
    logits = [math.fsum(float(h) * float(w) for h, w in zip(hidden, row, strict=True)) / temperature for row in weight]
    top = max(logits)
    lse = top + math.log(math.fsum(math.exp(z - top) for z in logits))
    return [z - lse for z in logits]


def oracle(case, spec: GRPOSpec, temperature: float = 1.0, old: bool = True) -> SimpleNamespace:
    """loss, stats, dhidden, dweight, logp, entropy in float64, each row by itself; the gradients are derived by hand."""
    hidden, weight, advantages, token_weight = (
        t.detach().double().numpy() for t in (case.hidden, case.weight, case.advantages, case.token_weight)
    )
    out = SimpleNamespace(loss=0.0, stats=np.zeros(len(ops.STATS)), dhidden=np.zeros_like(hidden), dweight=np.zeros_like(weight))
    out.logp, out.entropy = [], []
    for t, target in enumerate(case.targets.tolist()):
        row = log_softmax_row(hidden[t], weight, temperature)
        p = np.exp(row)
        logp, entropy = row[target], -math.fsum(math.exp(x) * x for x in row)
        a, w = float(advantages[t]), float(token_weight[t])
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
        out.loss += w * (policy + spec.beta * kl)
        dlogits = w * slope / temperature * ((np.arange(len(p)) == target) - p)
        out.dhidden[t] = dlogits @ weight
        out.dweight += np.outer(dlogits, hidden[t])
        out.stats += [1, w * policy, w * kl, w * entropy, w * (a < 0 and ratio < low), w * (a > 0 and ratio > high), w * ratio]
        out.logp.append(logp)
        out.entropy.append(entropy)
    return out


def make(T=37, H=12, V=29, dtype=torch.float64, seed=0, spread=0.35, ref=True, scale=0.5) -> SimpleNamespace:
    """Inputs whose old log-probs lie near the policy's, so that many ratios are clipped, in both directions, and many are not."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, H, generator=g, dtype=torch.float64).to(dtype)
    weight = (scale * torch.randn(V, H, generator=g, dtype=torch.float64)).to(dtype)
    targets = torch.randint(0, V, (T,), generator=g)
    logp, _ = reference.linear_logprob(hidden.double(), weight.double(), targets)
    noise = torch.randn(2, T, generator=g, dtype=torch.float64)
    advantages = torch.randn(T, generator=g, dtype=torch.float64)
    advantages[::7] = 0
    rows = torch.float64 if dtype == torch.float64 else torch.float32
    return SimpleNamespace(
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(),
        targets=targets,
        advantages=advantages.to(rows),
        old_logp=(logp + spread * noise[0]).to(rows),
        ref_logp=(logp + spread * noise[1]).to(rows) if ref else None,
        token_weight=(torch.rand(T, generator=g, dtype=torch.float64) / max(T, 1)).to(rows),
    )


def call(case, spec: GRPOSpec, temperature: float = 1.0, old: bool = True) -> SimpleNamespace:
    loss, stats = ops.linear_grpo_loss(
        case.hidden,
        case.weight,
        case.targets,
        case.advantages,
        case.old_logp if old else None,
        case.ref_logp,
        spec,
        token_weight=case.token_weight,
        temperature=temperature,
    )
    dhidden, dweight = torch.autograd.grad(loss, (case.hidden, case.weight))
    return SimpleNamespace(loss=loss.detach(), stats=stats, dhidden=dhidden, dweight=dweight)


def error(got: torch.Tensor, want) -> float:
    """Largest difference, in units of the oracle's largest entry; infinite for NaN or another shape."""
    got, want = got.detach(), torch.as_tensor(np.asarray(want), dtype=torch.float64)
    if got.shape != want.shape or not got.isfinite().all():
        return math.inf
    return float((got.double() - want).abs().max() / want.abs().max().clamp(min=1e-12)) if want.numel() else 0.0


def assert_agrees(got: SimpleNamespace, want: SimpleNamespace, dtype: torch.dtype) -> None:
    tolerance = TOLERANCE[dtype]
    assert error(got.loss, want.loss) < 10 * tolerance, "loss"  # terms of both signs cancel in the sum
    assert error(got.dhidden, want.dhidden) < tolerance, "gradient of hidden"
    assert error(got.dweight, want.dweight) < tolerance, "gradient of weight"
    assert error(got.stats, want.stats) < max(tolerance, 1e-6), "statistics"  # float32 always


# ---- the policy loss


@DTYPES
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_grpo_loss_gradients_and_statistics(dtype, beta, temperature):
    case, spec = make(dtype=dtype), GRPOSpec(beta=beta)
    assert_agrees(call(case, spec, temperature), oracle(case, spec, temperature), dtype)


@DTYPES
def test_on_policy_ratio_is_one_and_has_the_log_probs_gradient(dtype):
    case, spec = make(dtype=dtype), GRPOSpec(beta=0.05)
    got = call(case, spec, old=False)
    assert_agrees(got, oracle(case, spec, old=False), dtype)
    stats = dict(zip(ops.STATS, got.stats.tolist(), strict=True))
    assert stats["clip_low"] == stats["clip_high"] == 0
    assert stats["ratio"] == pytest.approx(case.token_weight.sum().item(), rel=1e-6)


def test_no_reference_at_beta_zero():
    case, spec = make(ref=False), GRPOSpec(beta=0)
    got = call(case, spec)
    assert_agrees(got, oracle(case, spec), torch.float64)
    assert got.stats[ops.STATS.index("kl")] == 0


@pytest.mark.parametrize(("clip_low", "clip_high"), [(0.2, 0.2), (0.1, 0.4), (0.0, 0.0), (1.0, 9.0)])
def test_clip_range(clip_low, clip_high):
    case, spec = make(T=80), GRPOSpec(clip_low=clip_low, clip_high=clip_high, beta=0.01)
    assert_agrees(call(case, spec), oracle(case, spec), torch.float64)


def test_the_clip_is_crossed_in_both_directions():
    """What the comparisons above rest on: ratios clipped from below and above, ratios beyond the range that are not, and ratios inside."""
    case = make()
    ratio = (torch.tensor(oracle(case, GRPOSpec()).logp) - case.old_logp).exp()
    for beyond in (ratio > 1.2, ratio < 0.8, (ratio - 1).abs() < 0.2):
        for side in (case.advantages > 0, case.advantages < 0):
            assert (beyond & side).any()
    stats = dict(zip(ops.STATS, call(case, GRPOSpec()).stats.tolist(), strict=True))
    total = case.token_weight.sum().item()
    assert 0.05 * total < stats["clip_low"] < 0.5 * total and 0.05 * total < stats["clip_high"] < 0.5 * total


@DTYPES
@pytest.mark.parametrize("spoil", [lambda g: 0 * g, lambda g: 1.05 * g, lambda g: -g, lambda g: g.flip(0), lambda g: g + math.nan])
@pytest.mark.parametrize("name", ["dhidden", "dweight"])
def test_a_wrong_gradient_fails_the_comparison(dtype, spoil, name):
    case, spec = make(dtype=dtype), GRPOSpec(beta=0.1)
    want = oracle(case, spec)
    got = call(case, spec)
    assert_agrees(got, want, dtype)
    setattr(got, name, spoil(getattr(got, name)))
    with pytest.raises(AssertionError, match="gradient of"):
        assert_agrees(got, want, dtype)


@pytest.mark.parametrize("change", [{"beta": 0.12}, {"clip_low": 0.25}, {"clip_high": 0.15}])
def test_another_spec_fails_the_comparison(change):
    case = make()
    with pytest.raises(AssertionError, match="loss"):
        assert_agrees(call(case, GRPOSpec(beta=0.1)), oracle(case, dataclasses.replace(GRPOSpec(beta=0.1), **change)), torch.float64)


def test_rows_of_weight_zero_change_nothing():
    case, spec = make(T=20), GRPOSpec(beta=0.1)
    case.token_weight[10:] = 0
    got, half = call(case, spec), make(T=20)
    for name in ("hidden", "targets", "advantages", "old_logp", "ref_logp", "token_weight"):
        setattr(half, name, getattr(case, name)[:10])
    part = call(half, spec)
    assert got.loss == pytest.approx(part.loss.item(), rel=1e-12)
    assert torch.equal(got.dhidden[10:], torch.zeros_like(got.dhidden[10:]))
    assert error(got.dweight, part.dweight) < 1e-12


def test_micro_batches_add_up():
    case, spec = make(T=31), GRPOSpec(beta=0.1)
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
    case = make(T=0, dtype=dtype)
    for spec, old in ((GRPOSpec(), True), (GRPOSpec(), False)):
        got = call(case, spec, old=old)
        assert got.loss == 0 and torch.equal(got.stats, torch.zeros(len(ops.STATS)))
        assert got.dhidden.shape == case.hidden.shape and torch.equal(got.dweight, torch.zeros_like(case.weight))
    loss = ops.linear_cross_entropy(case.hidden, case.weight, case.targets, case.token_weight)
    assert loss == 0
    assert torch.equal(torch.autograd.grad(loss, case.weight)[0], torch.zeros_like(case.weight))
    assert [tuple(x.shape) for x in ops.linear_logprob(case.hidden, case.weight, case.targets)] == [(0,), (0,)]


@DTYPES
def test_one_row(dtype):
    case, spec = make(T=1, dtype=dtype, scale=0.2), GRPOSpec(beta=0.1)
    case.advantages[:] = -1.5
    assert_agrees(call(case, spec), oracle(case, spec), dtype)


def test_advantage_zero_leaves_only_the_kl():
    case, spec = make(), GRPOSpec(beta=0.1)
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
    case, spec = make(T=9, V=17, dtype=dtype, spread=0.2), GRPOSpec(beta=0.1)
    with torch.no_grad():
        case.hidden[:, 0], case.weight[:, 0] = 64.0, 0.0
    near = oracle(case, spec)
    with torch.no_grad():
        case.weight[:, 0] = shift / 64
    far = oracle(case, spec)
    assert far.loss == pytest.approx(near.loss, rel=1e-6)
    logp, entropy = ops.linear_logprob(case.hidden, case.weight, case.targets)
    spacing = 3072 * torch.finfo(dtype).eps  # of the logits themselves, which is all that may be lost
    assert error(logp, far.logp) < 4 * spacing and entropy.isfinite().all()
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
    case = make(dtype=dtype)
    logp, entropy = ops.linear_logprob(case.hidden, case.weight, case.targets, temperature=temperature)
    want = oracle(case, GRPOSpec(), temperature)
    assert error(logp, want.logp) < TOLERANCE[dtype] and error(entropy, want.entropy) < TOLERANCE[dtype]
    assert logp.dtype == entropy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@DTYPES
def test_cross_entropy_is_the_weighted_sum_of_log_probs(dtype):
    case = make(dtype=dtype)
    loss = ops.linear_cross_entropy(case.hidden, case.weight, case.targets, case.token_weight)
    dhidden, dweight = torch.autograd.grad(loss, (case.hidden, case.weight))
    # the on-policy policy loss with advantage 1 has the same gradient
    case.advantages.fill_(1.0)
    want = oracle(case, GRPOSpec(beta=0), old=False)
    assert error(loss, -np.dot(want.logp, case.token_weight.double().numpy())) < TOLERANCE[dtype]
    assert error(dhidden, want.dhidden) < TOLERANCE[dtype] and error(dweight, want.dweight) < TOLERANCE[dtype]


def test_entropy_of_a_uniform_distribution():
    _, entropy = ops.linear_logprob(torch.zeros(2, 3), torch.randn(11, 3), torch.tensor([0, 10]))
    assert entropy.tolist() == pytest.approx([math.log(11)] * 2, rel=1e-6)


def test_gradcheck_of_the_references():
    case = make(T=7, H=5, V=6, seed=1)
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
    loss, stats = ops.linear_grpo_loss(
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
    got = ops.group_advantages(torch.full((len(groups),), reward, dtype=dtype), groups, AdvantageSpec(scale))
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


# ---- refusals


HEAD = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "targets": torch.zeros(3, dtype=torch.int64)}
ROWS = {name: torch.zeros(3) for name in ("advantages", "old_logp", "ref_logp", "token_weight")}
BAD_HEAD = [
    ({"hidden": torch.zeros(3)}, r"^hidden: expected \(T, H\) floating point, got \(3,\) torch\.float32$"),
    ({"hidden": torch.zeros(3, 4, dtype=torch.int64)}, r"^hidden: expected .* got \(3, 4\) torch\.int64$"),
    ({"weight": torch.zeros(4)}, r"^weight: expected \(V, 4\) to fit hidden, got \(4,\)$"),
    ({"weight": torch.zeros(5, 3)}, r"^weight: expected \(V, 4\) to fit hidden, got \(5, 3\)$"),
    ({"weight": torch.zeros(5, 4).double()}, r"^weight: torch\.float64 but hidden is torch\.float32; cast one of them$"),
    ({"targets": torch.zeros(2, dtype=torch.int64)}, r"^targets: expected \(3,\) int64, got \(2,\) torch\.int64$"),
    ({"targets": torch.zeros(3, dtype=torch.int32)}, r"^targets: expected \(3,\) int64, got \(3,\) torch\.int32$"),
    ({"targets": torch.zeros(3, dtype=torch.int64, device="meta")}, r"^targets: on meta but hidden is on cpu$"),
    ({"weight": torch.zeros(5, 4, device="meta")}, r"^weight: on meta but hidden is on cpu$"),
]
BAD_ROWS = [
    (name, tensor, rf"^{name}: expected \(3,\) floating point on cpu, got {text}$")
    for name in ROWS
    for tensor, text in (
        (torch.zeros(2), r"\(2,\) torch\.float32 on cpu"),
        (torch.zeros(3, 1), r"\(3, 1\) torch\.float32 on cpu"),
        (torch.zeros(3, dtype=torch.int64), r"\(3,\) torch\.int64 on cpu"),
        (torch.zeros(3, device="meta"), r"\(3,\) torch\.float32 on meta"),
    )
]


@pytest.mark.parametrize(("change", "message"), BAD_HEAD, ids=[message[1:28] for _, message in BAD_HEAD])
def test_heads_that_do_not_fit(change, message):
    head = HEAD | change
    with pytest.raises(ValueError, match=message):
        ops.linear_logprob(**head)
    with pytest.raises(ValueError, match=message):
        ops.linear_cross_entropy(**head, token_weight=torch.zeros(3))
    with pytest.raises(ValueError, match=message):
        ops.linear_grpo_loss(**head, **ROWS, spec=GRPOSpec())


@pytest.mark.parametrize(("name", "tensor", "message"), BAD_ROWS)
def test_rows_that_do_not_fit(name, tensor, message):
    with pytest.raises(ValueError, match=message):
        ops.linear_grpo_loss(**HEAD, **(ROWS | {name: tensor}), spec=GRPOSpec())
    if name == "token_weight":
        with pytest.raises(ValueError, match=message):
            ops.linear_cross_entropy(**HEAD, token_weight=tensor)


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match="temperature: must be > 0"):
        ops.linear_logprob(**HEAD, temperature=temperature)
    with pytest.raises(ValueError, match="temperature: must be > 0"):
        ops.linear_grpo_loss(**HEAD, **ROWS, spec=GRPOSpec(), temperature=temperature)


def test_a_penalty_needs_its_reference():
    with pytest.raises(ValueError, match=r"^ref_logp: needed for beta=0\.01; pass the reference's log-probs"):
        ops.linear_grpo_loss(**HEAD, **(ROWS | {"ref_logp": None}), spec=GRPOSpec())


@pytest.mark.parametrize(
    ("rewards", "groups", "message"),
    [
        (torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64), r"^rewards: expected a float vector \(N,\), got \(2, 2\) torch\.float32$"),
        (torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), r"^rewards: expected a float vector .* torch\.int64$"),
        (torch.zeros(2), torch.zeros(3, dtype=torch.int64), r"^groups: expected \(2,\) int64, got \(3,\) torch\.int64$"),
        (torch.zeros(2), torch.zeros(2), r"^groups: expected \(2,\) int64, got \(2,\) torch\.float32$"),
        (torch.zeros(2), torch.tensor([0, -1]), r"^groups: expected ids from 0 on, got -1$"),
    ],
)
def test_rewards_and_groups_that_do_not_fit(rewards, groups, message):
    with pytest.raises(ValueError, match=message):
        ops.group_advantages(rewards, groups, AdvantageSpec())


def test_kl_of_two_lengths():
    with pytest.raises(ValueError, match=r"^ref_logp: expected \(3,\) like logp, got \(2,\)$"):
        ops.token_kl(torch.zeros(3), torch.zeros(2))


@pytest.mark.parametrize("field", ["clip_low", "clip_high", "beta"])
def test_a_spec_with_a_negative_number(field):
    with pytest.raises(ValueError, match=rf"^{field}: must be >= 0, got -0\.1$"):
        GRPOSpec(**{field: -0.1})

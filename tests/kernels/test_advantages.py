"""The advantage kernel and its reference, against float64 by hand and against the formulas of the installed TRL."""

import ast
import inspect
import itertools
import math
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actial_fast.kernels import advantages
from actial_fast.ops import reference
from actial_fast.ops.spec import AdvantageSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = math.nan
SPECS = [
    AdvantageSpec(baseline, scale, epsilon, combine)
    for baseline, scale, combine, epsilon in itertools.product(
        ("mean", "leave_one_out"), ("std", "batch_std", "none"), ("sum_then_normalize", "normalize_then_sum"), (1e-4,)
    )
]
ALL_SPECS = pytest.mark.parametrize("spec", SPECS, ids=[f"{s.baseline}-{s.scale}-{s.combine}" for s in SPECS])
IMPLEMENTATIONS = pytest.mark.parametrize("ours", [advantages.group_advantages, reference.group_advantages], ids=["kernel", "reference"])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Blocks small enough that a few dozen rewards take several programs and tiles; the sizes that ship are tested at the end."""
    if DEVICE == "cpu":
        monkeypatch.setattr(advantages, "ROWS", 32)
        monkeypatch.setattr(advantages, "TILE", 32)


def normalized(column: np.ndarray, groups: np.ndarray, spec: AdvantageSpec) -> np.ndarray:
    out = np.zeros(len(column))
    for i, r in enumerate(column):
        members = column[groups == groups[i]]
        members = members[~np.isnan(members)]
        if np.isnan(r) or len(members) < 2 or np.ptp(members) <= 1e-9 * max(1, abs(r)):
            continue
        others = (members.sum() - r) / (len(members) - 1)
        out[i] = r - (members.mean() if spec.baseline == "mean" else others)
        if spec.scale != "none":
            over = members if spec.scale == "std" else column[~np.isnan(column)]
            out[i] /= over.std(ddof=1) + spec.epsilon
    return out


def oracle(rewards, groups, spec: AdvantageSpec, weights=None) -> np.ndarray:
    """Row by row in float64, by the definitions; leave-one-out really leaves one out."""
    table = np.asarray(rewards.detach().double().cpu()).reshape(len(groups), -1)
    groups = np.asarray(groups.cpu())
    weights = np.ones(table.shape[1]) if weights is None else np.asarray(weights.double().cpu())
    unscorable = np.isnan(table).all(1)
    if spec.combine == "sum_then_normalize":
        sums = np.where(unscorable, NAN, np.nansum(table * weights, axis=1))
        return normalized(sums, groups, spec)
    sums = sum(w * normalized(table[:, k], groups, spec) for k, w in enumerate(weights))
    scored = sums[~unscorable]
    if len(scored) < 2 or scored.std(ddof=1) < 1e-9:
        return np.zeros(len(groups))
    return np.where(unscorable, 0, (sums - scored.mean()) / (scored.std(ddof=1) + spec.epsilon))


def draw(N=40, R=3, dtype=torch.float32, nan=0.2, seed=0):
    """Uneven groups with ids far apart, in no order; one group of one, one of equal rewards, one unscorable row."""
    g = torch.Generator().manual_seed(seed)
    names = torch.tensor([3, -5, 0, 2**40, 11, 12])
    groups = names[torch.randint(0, 5, (N,), generator=g)]
    rewards = torch.randn(N, R, generator=g, dtype=torch.float64) * torch.tensor([1.0, 10.0, 0.1])[:R] + 0.5
    rewards[torch.rand(N, R, generator=g) < nan] = NAN
    rewards[groups == 11] = 0.7
    if N > 7:
        groups[7], rewards[5] = 99, NAN
    weights = torch.tensor([1.0, 0.25, -2.0])[:R]
    return rewards.to(DEVICE, dtype), groups.to(DEVICE), weights.to(DEVICE)


def assert_agrees(got: torch.Tensor, want: np.ndarray, plain: torch.Tensor | None = None, eps: float | None = None) -> None:
    """Twice the error of torch in the same dtype where given, and a few roundings of the largest advantage."""
    assert got.isfinite().all(), "advantages: not finite"
    want = torch.as_tensor(want)
    floor = 16 * (eps or torch.finfo(got.dtype).eps) * max(float(want.abs().max()), 1e-3) if len(want) else 0.0
    allowed = floor + (0 if plain is None else 2 * float((plain.double().cpu() - want).abs().max()))
    assert ((got.double().cpu() - want).abs() <= allowed).all(), "advantages: differ"
    assert (got.cpu()[want == 0] == 0).all(), "advantages: not exactly 0"


@ALL_SPECS
def test_kernel_in_float32(spec):
    rewards, groups, weights = draw()
    plain = reference.group_advantages(rewards, groups, spec, weights=weights)
    got = advantages.group_advantages(rewards, groups, spec, weights=weights)
    assert got.dtype == torch.float32 and got.shape == groups.shape
    assert_agrees(got, oracle(rewards, groups, spec, weights), plain)


@ALL_SPECS
@IMPLEMENTATIONS
def test_float64_stays_float64(ours, spec):
    rewards, groups, weights = draw(R=2, dtype=torch.float64)
    got = ours(rewards, groups, spec, weights=weights)
    assert got.dtype == torch.float64
    assert_agrees(got, oracle(rewards, groups, spec, weights), eps=1e-14)


@IMPLEMENTATIONS
@pytest.mark.parametrize("combine", ["sum_then_normalize", "normalize_then_sum"])
def test_half_precision_gives_float32(ours, combine):
    rewards, groups, weights = draw(R=2, dtype=torch.float16)
    spec = AdvantageSpec(combine=combine)
    got = ours(rewards, groups, spec, weights=weights)
    assert got.dtype == torch.float32
    assert_agrees(got, oracle(rewards, groups, spec, weights))


@pytest.mark.parametrize("N", [1, 31, 32, 33, 65])
@pytest.mark.parametrize("combine", ["sum_then_normalize", "normalize_then_sum"])
def test_sizes_around_the_blocks(N, combine):
    spec = AdvantageSpec(scale="batch_std", combine=combine)
    rewards, groups, weights = draw(N, R=2, seed=N)
    plain = reference.group_advantages(rewards, groups, spec, weights=weights)
    assert_agrees(advantages.group_advantages(rewards, groups, spec, weights=weights), oracle(rewards, groups, spec, weights), plain)
    flat = reference.group_advantages(rewards[:, 0], groups, spec)  # (N,) is (N, 1)
    assert_agrees(advantages.group_advantages(rewards[:, 0], groups, spec), oracle(rewards[:, 0], groups, spec), flat)


@IMPLEMENTATIONS
@ALL_SPECS
def test_no_rewards(ours, spec):
    for rewards in (torch.zeros(0, device=DEVICE), torch.zeros(0, 2, device=DEVICE)):
        got = ours(rewards, torch.zeros(0, dtype=torch.int64, device=DEVICE), spec)
        assert got.shape == (0,) and got.dtype == torch.float32


@IMPLEMENTATIONS
@ALL_SPECS
def test_one_reward_and_unscorable_rows(ours, spec):
    assert ours(torch.tensor([2.0], device=DEVICE), torch.tensor([4], device=DEVICE), spec).tolist() == [0.0]
    rewards, groups = torch.full((20, 2), NAN, device=DEVICE), torch.arange(20, device=DEVICE) // 5
    rewards[3, 1], rewards[11, 0] = 1.0, 2.0  # one known reward in two of the groups, none in the others
    assert ours(rewards, groups, spec).tolist() == [0.0] * 20


@pytest.mark.parametrize("combine", ["sum_then_normalize", "normalize_then_sum"])
def test_all_unscorable(combine):
    got = advantages.group_advantages(
        torch.full((9, 2), NAN, device=DEVICE), torch.arange(9, device=DEVICE) // 5, AdvantageSpec(combine=combine)
    )
    assert got.tolist() == [0.0] * 9


@IMPLEMENTATIONS
@ALL_SPECS
def test_groups_of_one_and_of_equal_rewards_give_exactly_zero(ours, spec):
    """Rounding in the mean must leave no trace: such groups are skipped, and a small epsilon would blow the trace up."""
    kinds = [(n, reward) for n in (1, 3, 7) for reward in (0.1, 1 / 3, 1e6 / 7, -0.7)]
    groups = torch.cat([torch.full((n,), i) for i, (n, _) in enumerate(kinds)] + [torch.tensor([99, 99])]).to(DEVICE)
    rewards = torch.tensor([reward for n, reward in kinds for _ in range(n)] + [1.0, 2.0], device=DEVICE)
    got = ours(rewards, groups, spec)
    assert torch.equal(got[:-2], torch.zeros_like(got[:-2])) and (got[-2:] != 0).all()


def test_a_large_common_offset_costs_no_more_than_its_own_rounding():
    """Centred squares: E[r^2] - E[r]^2 would have lost everything here."""
    g = torch.Generator().manual_seed(0)
    rewards = (1e4 + torch.randint(0, 2, (64,), generator=g).float()).to(DEVICE)
    groups = (torch.arange(64) % 5).to(DEVICE)
    for scale in ("std", "batch_std"):
        spec = AdvantageSpec(scale=scale)
        got = advantages.group_advantages(rewards, groups, spec)
        assert_agrees(got, oracle(rewards, groups, spec), eps=1e4 * 2.0**-24)
    one_pass = (rewards**2).mean() - rewards.mean() ** 2
    assert abs(one_pass - rewards.double().var(unbiased=False)) > 0.1, "what is avoided"


@pytest.mark.parametrize(
    "spoil", [lambda a: 0 * a, lambda a: 1.01 * a, lambda a: -a, lambda a: a.roll(1), lambda a: a + 1e-4, lambda a: a * NAN]
)
@ALL_SPECS
def test_a_wrong_result_fails_the_comparison(spoil, spec):
    rewards, groups, weights = draw()
    plain = reference.group_advantages(rewards, groups, spec, weights=weights)
    want = oracle(rewards, groups, spec, weights)
    with pytest.raises(AssertionError, match=r"^advantages"):
        assert_agrees(spoil(plain), want, plain)


def test_every_choice_of_the_spec_matters():
    rewards, groups, weights = draw()
    results = [reference.group_advantages(rewards, groups, spec, weights=weights) for spec in SPECS]
    for a, b in itertools.combinations(results, 2):
        assert not torch.allclose(a, b, rtol=1e-3, atol=1e-4)
    for change in ({"epsilon": 1.0}, {"weights": None}, {"weights": -weights}):
        spec = AdvantageSpec(epsilon=change.get("epsilon", 1e-4))
        assert not torch.allclose(reference.group_advantages(rewards, groups, spec, weights=change.get("weights", weights)), results[0])


@pytest.mark.parametrize("combine", ["sum_then_normalize", "normalize_then_sum"])
def test_every_output_is_written_and_nothing_beyond(monkeypatch, combine):
    rewards, groups, weights = draw(N=37)
    want = oracle(rewards, groups, AdvantageSpec(combine=combine), weights)
    buffers = []

    def poisoned(n, **kwargs):
        buffers.append(torch.full((n + 1024,), NAN, **kwargs))
        return buffers[-1][:n]

    monkeypatch.setattr(torch, "empty", poisoned)
    got = advantages.group_advantages(rewards, groups, AdvantageSpec(combine=combine), weights=weights)
    monkeypatch.undo()
    assert len(buffers) == (1 if combine == "sum_then_normalize" else 2)
    assert all(buffer[37:].isnan().all() for buffer in buffers)
    assert np.allclose(got.double().cpu(), want, atol=1e-4)


def test_strided_rewards_and_groups():
    rewards, groups, weights = draw(N=40)
    wide, every = rewards.repeat_interleave(2, 1), groups.repeat_interleave(2)
    for spec in SPECS[:2]:  # one of each order
        want = advantages.group_advantages(rewards, groups, spec, weights=weights)
        assert torch.equal(advantages.group_advantages(wide[:, ::2], every[::2], spec, weights=weights), want)
        assert torch.equal(advantages.group_advantages(rewards.T.contiguous().T, groups, spec, weights=weights), want)


@pytest.mark.parametrize("combine", ["sum_then_normalize", "normalize_then_sum"])
def test_the_result_does_not_depend_on_the_blocks(combine, monkeypatch):
    spec = AdvantageSpec(scale="batch_std", combine=combine)
    rewards, groups, weights = draw(R=2)
    want = advantages.group_advantages(rewards, groups, spec, weights=weights)
    monkeypatch.undo()  # the sizes that ship
    torch.testing.assert_close(advantages.group_advantages(rewards, groups, spec, weights=weights), want, rtol=1e-5, atol=1e-6)
    again = advantages.group_advantages(rewards, groups, spec, weights=weights)
    assert torch.equal(advantages.group_advantages(rewards, groups, spec, weights=weights), again)


TABLES = st.integers(1, 2).flatmap(
    lambda R: st.lists(st.tuples(st.integers(-2, 3), *[st.sampled_from([0.0, 0.25, 0.5, 1.0, -2.0, NAN])] * R), min_size=1, max_size=16)
)


def unpack(rows) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([row[1:] for row in rows], dtype=torch.float64).to(DEVICE), torch.tensor([row[0] for row in rows]).to(DEVICE)


@settings(max_examples=15, deadline=None)
@given(TABLES, st.sampled_from(SPECS))
def test_any_table(rows, spec):
    rewards, groups = unpack(rows)
    want = oracle(rewards, groups, spec)
    for ours in (advantages.group_advantages, reference.group_advantages):
        assert np.allclose(ours(rewards, groups, spec).cpu(), want, rtol=0, atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(TABLES, st.sampled_from(SPECS), st.randoms(use_true_random=False))
def test_order_names_shift_and_scale(rows, spec, random):
    """Of the reference, to which the kernel is held above."""
    rewards, groups = unpack(rows)
    base = reference.group_advantages(rewards, groups, spec)
    order = torch.tensor(random.sample(range(len(rows)), len(rows)), device=DEVICE)
    moved = reference.group_advantages(rewards[order], 7 - 3 * groups[order], spec)
    assert torch.allclose(moved, base[order], rtol=0, atol=1e-9), "order and names of the groups"
    exact = AdvantageSpec(spec.baseline, spec.scale, 0.0, spec.combine)
    base = reference.group_advantages(rewards, groups, exact)
    unknown = rewards.isnan().any(1).any()
    if spec.combine == "normalize_then_sum" or not unknown:  # in a sum, an unknown reward stays 0 while the others are shifted
        shifted = reference.group_advantages(rewards + 3.0, groups, exact)
        assert torch.allclose(shifted, base, rtol=0, atol=1e-9), "shift"
    scaled = reference.group_advantages(8.0 * rewards, groups, exact)
    factor = 8.0 if spec.scale == "none" and spec.combine == "sum_then_normalize" else 1.0
    assert torch.allclose(scaled, factor * base, rtol=0, atol=1e-9), "scale"
    if spec.combine == "sum_then_normalize":
        for name in groups.unique():
            assert abs(base[groups == name].sum().item()) < 1e-9, "a group's advantages add up to 0"


# ---- TRL


def trl_advantages(rewards_per_func, generations, scale, aggregation, weights):
    """Runs the statements of the installed GRPOTrainer that turn rewards into advantages, as they stand in its source."""
    grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")
    source = textwrap.dedent(inspect.getsource(grpo_trainer.GRPOTrainer._generate_and_score_completions))
    body = ast.parse(source).body[0].body
    first = next(i for i, node in enumerate(body) if ast.unparse(node).startswith("unscorable_mask = "))
    last = next(i for i, node in enumerate(body) if ast.unparse(node).startswith("advantages = torch.nan_to_num("))
    trainer = SimpleNamespace(
        reward_weights=weights, multi_objective_aggregation=aggregation, scale_rewards=scale, reward_funcs=range(rewards_per_func.shape[1])
    )
    scope = {"self": trainer, "rewards_per_func": rewards_per_func, "device": rewards_per_func.device, "num_generations": generations}
    exec(compile(ast.Module(body[first : last + 1], []), "grpo_trainer", "exec"), vars(grpo_trainer) | scope, scope)
    return scope["advantages"]


@IMPLEMENTATIONS
@pytest.mark.parametrize("known", [True, False], ids=["all known", "some NaN"])
@pytest.mark.parametrize(
    ("combine", "trl_scale", "scale"),
    [
        ("sum_then_normalize", "group", "std"),
        ("sum_then_normalize", "batch", "batch_std"),
        ("sum_then_normalize", "none", "none"),
        ("normalize_then_sum", "batch", "std"),  # TRL divides each reward by its group's deviation whatever scale_rewards says
    ],
)
def test_equals_trl(ours, combine, trl_scale, scale, known):
    generations, R = 6, 3
    g = torch.Generator().manual_seed(3)
    rewards = torch.randn(48, R, generator=g, dtype=torch.float64)
    if not known:
        rewards[torch.rand(48, R, generator=g) < 0.3] = NAN
        rewards[10] = NAN
    weights = torch.tensor([1.0, 0.5, -0.25], dtype=torch.float64)
    groups = torch.arange(48) // generations
    want = trl_advantages(rewards.clone(), generations, trl_scale, combine, weights)
    assert want.abs().max() > 0.5 and (known or want[10] == 0)
    got = ours(rewards.to(DEVICE), groups.to(DEVICE), AdvantageSpec("mean", scale, 1e-4, combine), weights=weights.to(DEVICE))
    # its nanstd rounds n / (n - 1) to float32
    torch.testing.assert_close(got.cpu(), want, rtol=0, atol=1e-12 if scale == "none" else 2e-7)


@pytest.mark.skipif(DEVICE == "cpu", reason="minutes in the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@ALL_SPECS
def test_a_whole_step_of_rewards(spec, dtype):
    """512 prompts times 16, shuffled, with the blocks that ship and thousands of programs in no order."""
    g = torch.Generator().manual_seed(0)
    groups = (torch.arange(8192) // 16)[torch.randperm(8192, generator=g)].to(DEVICE)
    rewards = torch.randn(8192, 2, generator=g, dtype=torch.float64).to(DEVICE, dtype)
    want = reference.group_advantages(rewards.double(), groups, spec)
    for _ in range(5):
        got = advantages.group_advantages(rewards, groups, spec)
        torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-12 if dtype == torch.float64 else 1e-5)

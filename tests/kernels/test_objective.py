"""The objective's kernels against the specification in float64: gradients by hand against autograd's, and the statistics."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actial_fast.kernels import objective
from actial_fast.ops.reference import STATS
from actial_fast.ops.spec import NAMED, GRPOSpec
from tests.kernels.grpo_case import DEVICE, LENGTHS, Case, check, draw, from_logp, policy

GRID = list(itertools.product(("clip", "cispo", "sapo", "vespo"), ("token", "sequence"), ("k1", "k2", "k3"), (False, True)))
IMPORTANCE = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
CLIP_LOW, CLIP_HIGH = STATS.index("clip_low"), STATS.index("clip_high")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def nan_in_fresh_memory(monkeypatch):
    """What the kernels leave unwritten is NaN."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, make=make, **options: make(*args, **options).fill_(float("nan")))


def ours(spec: GRPOSpec, case: Case, logp: torch.Tensor, entropy: torch.Tensor, dtype: torch.dtype = torch.float32):
    rows = case.arguments(dtype)
    g_logp, g_entropy, partial = objective.grpo_rows(logp.to(DEVICE), entropy.to(DEVICE), spec=spec, **rows)
    assert partial.shape[1] == len(STATS)
    return g_logp.cpu(), g_entropy.cpu(), partial.sum(0).cpu()


def agree(spec: GRPOSpec, case: Case, logp: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
    """Checks gradients and statistics, with garbage in the masked rows; returns the statistics."""
    masked = case.token_weight == 0
    bad = torch.where(masked, float("nan"), logp), torch.where(masked, float("inf"), entropy)
    got = ours(spec, case.poisoned(), *bad)
    same, oracle = (from_logp(spec, case, logp, entropy, dtype) for dtype in (torch.float32, torch.float64))
    floor = 5e-6 if spec.objective == "vespo" else 1e-6  # a sum over the sequence stands in vespo's exponent
    for name, x, y, z in zip(("g_logp", "g_entropy"), got, same, oracle, strict=False):
        check(x, y, z, name, floor)
        assert (x[masked] == 0).all()
    for i, name in enumerate(STATS):
        terms = case.token_weight.sum().item() if name in ("loss", "policy_loss") else got[2][0].item()
        check(got[2][i : i + 1], same[2][i : i + 1], oracle[2][i : i + 1], name, floor, terms)
    return got[2]


@pytest.mark.parametrize(("kind", "ratio", "kl", "bias"), GRID)
def test_gradients_and_statistics_are_the_specifications(kind, ratio, kl, bias):
    i = GRID.index((kind, ratio, kl, bias))
    logp, entropy = policy(seed=i)
    case = draw(logp, sampler=i % 5 != 4, policy_mask=i % 2 == 0, entropy_weight=i % 3 == 0, seed=i)
    spec = GRPOSpec(
        objective=kind,
        ratio=ratio,
        kl=kl,
        kl_bias_correction=bias,
        beta=0.3,
        entropy_coef=0.1,
        importance=IMPORTANCE[i % 4],
        importance_min=0.5,
        importance_max=1.5,
        clip_delta=1.4 if i % 2 else None,
        dual_clip=1.3 if i % 3 else None,
    )
    stats = agree(spec, case, logp, entropy)
    assert 0 < stats[0] < len(logp)
    if kind == "clip":
        assert stats[CLIP_LOW] > 0, "no row is clipped: the draw tests nothing"
    if kind in ("clip", "cispo"):
        assert stats[CLIP_HIGH] > 0, "no row is clipped: the draw tests nothing"


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("old", [False, True], ids=["on-policy", "off-policy"])
def test_published_objectives(name, old):
    logp, entropy = policy()
    agree(GRPOSpec.named(name), draw(logp, old=old, ref=False), logp, entropy)


SPECS = st.builds(
    GRPOSpec,
    objective=st.sampled_from(("clip", "cispo", "sapo", "vespo")),
    ratio=st.sampled_from(("token", "sequence")),
    clip_low=st.floats(0, 1),
    clip_high=st.floats(0, 0.45),
    clip_delta=st.none() | st.floats(1.5, 4),
    dual_clip=st.none() | st.floats(1.1, 4),
    sapo_temperature_pos=st.floats(0.1, 120),
    vespo_k_neg=st.floats(0, 5),
    beta=st.floats(0, 2),
    kl=st.sampled_from(("k1", "k2", "k3")),
    kl_bias_correction=st.booleans(),
    entropy_coef=st.floats(-1, 1),
    importance=st.sampled_from(IMPORTANCE),
    importance_min=st.floats(0, 0.8),
    importance_max=st.floats(0.8, 4),
)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    spec=SPECS,
    lengths=st.lists(st.sampled_from((0, 1, 2, 3, 17, 129, 260)), min_size=1, max_size=5),
    given=st.fixed_dictionaries({n: st.booleans() for n in ("old", "ref", "sampler", "policy_mask", "entropy_weight")}),
    seed=st.integers(0, 99),
)
def test_any_spec_and_any_lengths(spec, lengths, given, seed):
    logp, entropy = policy(sum(lengths), seed)
    agree(spec, draw(logp, tuple(lengths), **given, seed=seed), logp, entropy)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_one_row(ratio):
    logp, entropy = policy(1)
    assert agree(GRPOSpec(ratio=ratio, entropy_coef=0.1), draw(logp, (1,)), logp, entropy)[0] == 1


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_all_rows_masked_give_exact_zeros(ratio):
    logp, entropy = policy()
    case = replace(draw(logp, sampler=True), token_weight=torch.zeros(len(logp)))
    for x in ours(GRPOSpec(ratio=ratio, entropy_coef=0.1), case.poisoned(), logp * float("nan"), entropy):
        assert (x == 0).all()


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_no_rows(ratio):
    logp, entropy = policy(0)
    g_logp, g_entropy, stats = ours(GRPOSpec(ratio=ratio), draw(logp, ()), logp, entropy)
    assert g_logp.shape == g_entropy.shape == (0,) and (stats == 0).all()


def test_on_policy_gradient_is_the_policy_gradient():
    logp, entropy = policy()
    case = draw(logp, old=False, ref=False)
    g_logp, _, stats = ours(GRPOSpec(beta=0.0), case, logp, entropy)
    assert torch.equal(g_logp, -case.token_weight * case.advantages)
    assert stats[STATS.index("ratio")] == stats[0]


@pytest.mark.parametrize("kind", ["clip", "sapo"])
def test_no_gradient_beyond_the_largest_log_ratio(kind):
    """Reference, policy and sampler further apart than e^20: finite, and without a gradient of the ratio or the KL."""
    logp, entropy = policy(4)
    apart = torch.tensor([-30.0, 30.0, -25.0, 0.1])
    case = draw(logp, (4,))
    case = replace(
        case, old_logp=logp + apart, ref_logp=logp - apart, token_weight=torch.ones(4), advantages=torch.tensor([-1.0, 1, -2, 1])
    )
    for ratio in ("token", "sequence"):
        spec = GRPOSpec(objective=kind, ratio=ratio, kl_bias_correction=True)
        agree(spec, case, logp, entropy)
        g_logp, _, _ = ours(spec, case, logp, entropy)
        assert g_logp.isfinite().all()
        if ratio == "token":
            assert g_logp[0] == 0 and g_logp[2] == 0


def test_k3_gradient_keeps_its_relative_error_where_policy_and_reference_nearly_agree():
    """exp(x) - x - 1 cancels for small x: with no advantage the gradient is -w beta expm1(d), for d down to 1e-6."""
    d = torch.cat([10.0 ** torch.linspace(-6, 1, 57), -(10.0 ** torch.linspace(-6, 1, 57))])
    rows = len(d)
    case = draw(torch.zeros(rows), (rows,), old=False)
    case = replace(case, ref_logp=d, advantages=torch.zeros(rows), token_weight=torch.ones(rows))
    g_logp, _, stats = ours(GRPOSpec(beta=1.0), case, torch.zeros(rows), torch.zeros(rows))
    exact = -torch.expm1(d.double())
    assert ((g_logp.double() - exact) / exact).abs().max() < 1e-6
    kl = (torch.expm1(d.double()) - d.double())[d.abs() < 0.1]
    small = replace(case, token_weight=(d.abs() < 0.1).float())
    _, _, stats = ours(GRPOSpec(beta=1.0), small, torch.zeros(rows), torch.zeros(rows))
    assert abs(stats[STATS.index("kl")].item() / kl.sum().item() - 1) < 1e-6


@pytest.mark.parametrize("kind", ["clip", "cispo", "sapo", "vespo"])
def test_a_log_prob_that_is_nan_shows_in_the_loss(kind):
    logp, entropy = policy(5)
    logp[2] = float("nan")
    case = replace(draw(logp, (5,)), token_weight=torch.ones(5))
    *_, stats = ours(GRPOSpec(objective=kind), replace(case, ref_logp=None), logp, entropy)
    assert stats[STATS.index("loss")].isnan()


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_sequences_do_not_see_each_other(ratio):
    """A sequence alone gives the same bits as among others."""
    logp, entropy = policy()
    spec = GRPOSpec(objective="clip", ratio=ratio, importance="sequence_truncate")
    case = draw(logp, sampler=True)
    together = ours(spec, case, logp, entropy)
    for start, stop in itertools.pairwise(case.cu_seqlens.tolist()):
        names = [name for name, x in vars(case).items() if x is not None and name != "cu_seqlens"]
        alone = replace(case, cu_seqlens=torch.tensor([0, stop - start]), **{name: getattr(case, name)[start:stop] for name in names})
        got = ours(spec, alone, logp[start:stop], entropy[start:stop])
        assert torch.equal(got[0], together[0][start:stop]) and torch.equal(got[1], together[1][start:stop])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_vectors_of_16_bits_and_int32_sequences(dtype):
    logp, entropy = policy()
    case = draw(logp, sampler=True, entropy_weight=True)
    halves = {name: x.to(dtype) for name, x in vars(case).items() if x is not None and x.is_floating_point()}
    widened = replace(case, **{name: x.float() for name, x in halves.items()})
    spec = GRPOSpec(ratio="sequence", entropy_coef=0.1)
    expected = ours(spec, widened, logp, entropy)
    got = ours(spec, replace(case, cu_seqlens=case.cu_seqlens.int()), logp, entropy, dtype)
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(("ratio", "fault"), list(itertools.product(("token", "sequence"), (0.0, 0.99, -1.0))))
def test_the_rule_catches_a_wrong_gradient(ratio, fault):
    logp, entropy = policy()
    spec, case = GRPOSpec(ratio=ratio), draw(logp)
    got = ours(spec, case, logp, entropy)[0]
    same, oracle = (from_logp(spec, case, logp, entropy, dtype)[0] for dtype in (torch.float32, torch.float64))
    check(got, same, oracle, "g_logp")
    with pytest.raises(AssertionError, match="g_logp: off by"):
        check(got * fault, same, oracle, "g_logp")
    with pytest.raises(AssertionError, match="NaN"):
        check(torch.where(torch.arange(sum(LENGTHS)) == 7, float("nan"), got), same, oracle, "g_logp")

"""Log-prob, entropy and the GRPO loss from logits against the specification in float64, forward and backward."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actial_fast.kernels import logits as kernels
from actial_fast.kernels import objective
from actial_fast.kernels import scale as scaling
from actial_fast.ops import reference
from actial_fast.ops.reference import STATS
from actial_fast.ops.spec import GRPOSpec
from tests.kernels.grpo_case import DEVICE, check, draw

GPU = DEVICE == "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LENGTHS = (1, 4, 0, 3)  # the last one is masked altogether


class Small(kernels.Launch):
    """Tiles of 256 fp32 columns on 4 threads: small vocabularies span several, and the interpreter has few threads to join."""

    def block(self, dtype):
        return super().block(dtype) | {"THREADS": 4, "LOADS": 16}


SMALL = Small(warps=1, loads=1)
pytestmark = [
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def nan_in_fresh_memory(monkeypatch):
    """What the kernels leave unwritten is NaN."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, make=make, **options: make(*args, **options).fill_(float("nan")))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch, request):
    if "shipped_tiles" not in request.fixturenames:
        for name in ("SWEEP", "TWO_SWEEPS"):
            monkeypatch.setattr(kernels, name, SMALL)


@pytest.fixture
def shipped_tiles():
    """Keeps the tiles that GPUs get."""


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels as they are launched."""
    names = []

    class Counted:
        def __init__(self, kernel, name):
            self.kernel, self.name = kernel, name

        def __getitem__(self, grid):
            names.append(self.name)
            return self.kernel[grid]

    for module in (kernels, objective, scaling):
        for name in module.KIND:
            monkeypatch.setattr(module, name, Counted(getattr(module, name), name))
    return names


def draw_logits(T=4, V=600, dtype=torch.float32, stride=None, scale=3.0, seed=0):
    """logits (T, V) with rows `stride` apart, and targets, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    wide = (torch.randn(T, stride or V, generator=generator) * scale).to(dtype)
    return wide[:, :V], torch.randint(V, (T,), generator=generator)


def on_device(x):
    """A leaf with the values and strides of x."""
    if x.is_contiguous():
        return x.to(DEVICE).clone().requires_grad_()
    wide = torch.zeros(len(x), x.stride(0), dtype=x.dtype, device=DEVICE)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]].requires_grad_()


def forward_and_gradient(function, logits, targets, grads, **options):
    """logp, entropy and d (grads . outputs) / d logits."""
    outputs = function(logits, targets, **options)
    gradient = torch.autograd.grad(sum((g.to(x) * x).sum() for g, x in zip(grads, outputs, strict=True)), logits)[0]
    return *outputs, gradient


def agree(logits, targets, temperature=1.0, grads=None, **options):
    """Checks logp, entropy and gradient; returns ours."""
    if grads is None:
        grads = torch.randn(2, len(targets), generator=torch.Generator().manual_seed(5))
    t = temperature.to(DEVICE) if isinstance(temperature, torch.Tensor) else temperature
    got = forward_and_gradient(kernels.logprob_from_logits, on_device(logits), targets.to(DEVICE), grads, temperature=t, **options)
    wide = temperature.double() if isinstance(temperature, torch.Tensor) else temperature
    same, oracle = (
        forward_and_gradient(reference.logprob_from_logits, logits.to(d, copy=True).requires_grad_(), targets, grads, temperature=t)
        for d, t in ((logits.dtype, temperature), (torch.float64, wide))
    )
    for name, x, y, z in zip(("logp", "entropy", "gradient"), got, same, oracle, strict=True):
        check(x, y, z, name, terms=1e-3)  # e^-80 is known to 1e-5 of itself: what is smaller than 1e-9 counts as nothing
    assert not (got[0] > 0).any() and not (got[1] < 0).any()
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "V", "stride"), [(1, 1, None), (3, 2, 7), (1, 257, None), (4, 1000, None), (2, 531, 544), (3, 512, 513)])
def test_log_prob_and_entropy(T, V, stride, dtype):
    logits, targets = draw_logits(T, V, dtype, stride)
    agree(logits, targets)
    agree(logits, targets, 0.7)
    agree(logits, targets, 0.5 + torch.rand(T, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_launch_configurations_that_ship(dtype, shipped_tiles):
    logits, targets = draw_logits(1, 20_001, dtype)
    agree(logits, targets)
    loss_agrees(GRPOSpec(beta=0.0), logits, targets, draw(torch.zeros(1), (1,), old=False, ref=False))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    T=st.integers(1, 4),
    V=st.integers(1, 700),
    pad=st.integers(0, 9),
    temperature=st.floats(0.1, 4),
    scale=st.floats(0.01, 30),
    seed=st.integers(0, 99),
)
def test_any_shape(T, V, pad, temperature, scale, seed):
    logits, targets = draw_logits(T, V, torch.float32, V + pad, scale, seed)
    agree(logits, targets, temperature)


def hard_rows():
    """Rows that break a careless log-sum-exp: (name, row)."""
    noise = torch.randn(700, generator=torch.Generator().manual_seed(0))
    lowest = torch.finfo(torch.float32).min
    yield "strongly negative", noise - 1e4
    yield "near the lowest float", noise * 1e30 - 3e38
    yield "all equal to -3e38", torch.full((700,), -3e38)
    yield "large positive", noise + 1e6
    yield "infinite columns", torch.where(noise > 0, noise, -torch.inf)
    yield "a tile of infinite columns", torch.where(torch.arange(700) >= 300, noise, -torch.inf)
    yield "columns masked with the lowest float", torch.where(torch.arange(700) % 300 == 7, noise, lowest)
    yield "one dominant logit", torch.where(torch.arange(700) == 7, 80.0, noise)
    yield "one dominant logit of 1e4", torch.where(torch.arange(700) == 7, 1e4, noise)


@pytest.mark.parametrize(("name", "row"), list(hard_rows()), ids=[name for name, _ in hard_rows()])
@pytest.mark.parametrize("target", [7, 307])
def test_hard_rows_are_exact(name, row, target):
    """Verl issue 2656: fused log-probs of up to +123. SkyRL issue 2141: NaN where all logits are strongly negative."""
    grads = torch.tensor([[1.0], [0.5]]) if row[target] > -1e30 else torch.zeros(2, 1)
    got = agree(row[None], torch.tensor([target]), grads=grads)
    assert not any(x.isnan().any() for x in got)


@pytest.mark.parametrize("target", [-1, 600, -(2**62)])
def test_a_target_outside_of_the_vocabulary_gives_nan_and_reads_nothing(target):
    logits, targets = draw_logits()
    expected = kernels.logprob_from_logits(logits.to(DEVICE), targets.to(DEVICE))
    spoiled = targets.clone()
    spoiled[2] = target
    leaf = on_device(logits)
    logp, entropy = kernels.logprob_from_logits(leaf, spoiled.to(DEVICE))
    assert logp[2].isnan() and torch.equal(entropy, expected[1])
    others = torch.arange(4) != 2
    assert torch.equal(logp[others], expected[0][others])
    torch.where(others.to(DEVICE), logp, 0).sum().backward()
    assert leaf.grad.isfinite().all() and (leaf.grad[2] == 0).all()


def test_rows_without_a_gradient_are_not_read_by_the_backward():
    logits, targets = draw_logits()
    leaf = on_device(logits)
    logp, entropy = kernels.logprob_from_logits(leaf, targets.to(DEVICE))
    leaf.data[3] = float("nan")
    keep = (torch.arange(4) != 3).to(DEVICE)
    ((logp + entropy) * keep).sum().backward()
    assert leaf.grad.isfinite().all() and (leaf.grad[3] == 0).all()


@pytest.mark.parametrize("stride", [None, 640])
def test_the_backward_can_write_over_the_logits(stride):
    logits, targets = draw_logits(stride=stride)
    expected = agree(logits, targets)[2]
    got = agree(logits, targets, inplace_backward=True)[2]
    assert torch.equal(got, expected)
    leaf = on_device(logits)
    z = leaf * 1
    logp, _ = kernels.logprob_from_logits(z, targets.to(DEVICE), inplace_backward=True)
    seen = []
    z.register_hook(lambda g: seen.append(g.data_ptr()))
    logp.sum().backward(retain_graph=True)
    assert seen == [z.data_ptr()]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp.sum().backward()


def test_one_launch_forward_and_one_backward(launches):
    logits, targets = draw_logits()
    logp, entropy = kernels.logprob_from_logits(on_device(logits), targets.to(DEVICE))
    assert launches == ["logprob_kernel"]
    (logp + entropy).sum().backward()
    assert launches == ["logprob_kernel", "gradient_kernel"]


def offsets_beyond_int32(monkeypatch, dtype):
    """Three rows 2^30 elements apart: memory that is reserved and hardly touched."""
    monkeypatch.undo()
    for name in ("SWEEP", "TWO_SWEEPS"):
        monkeypatch.setattr(kernels, name, SMALL)
    return torch.empty(2**31 + 64, dtype=dtype, device=DEVICE).as_strided((3, 64), (2**30, 1))


def test_offsets_beyond_int32(monkeypatch):
    far = offsets_beyond_int32(monkeypatch, torch.float16)
    logits, targets = draw_logits(3, 64, torch.float16)
    far.copy_(logits)
    near = on_device(logits)
    expected = forward_and_gradient(kernels.logprob_from_logits, near, targets.to(DEVICE), torch.ones(2, 3, device=DEVICE))
    got = forward_and_gradient(
        kernels.logprob_from_logits, far.requires_grad_(), targets.to(DEVICE), torch.ones(2, 3, device=DEVICE), inplace_backward=True
    )
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.skipif(not GPU, reason="the interpreter takes minutes")
def test_more_rows_than_a_grid_axis_holds():
    """Liger issue 1294: grid overflow beyond 65,535 tokens."""
    logits, targets = draw_logits(70_000, 8)
    agree(logits, targets)
    loss_agrees(GRPOSpec(beta=0.0), logits, targets, draw(torch.zeros(70_000), (70_000,), old=False, ref=False))


def grpo(function, spec, case, logits, targets, dtype, device, upstream=1.0, **options):
    """loss, statistics, logp, entropy as given, and the gradient of upstream * loss."""
    rows = case.arguments(torch.float64 if dtype == torch.float64 else torch.float32, device)
    if device == "cpu" and function is from_logits:
        loss, stats, logp, entropy = function(spec, logits, targets, rows, **options)
    else:
        loss, stats, logp, entropy = function(logits, targets, spec=spec, **rows, **options)
    return stats, logp, entropy, torch.autograd.grad(loss * upstream, logits)[0]


def from_logits(spec, logits, targets, rows, temperature=1.0):
    logp, entropy = reference.logprob_from_logits(logits, targets, temperature=temperature)
    return *reference.grpo_terms(logp, entropy, spec=spec, **rows), logp, entropy


def loss_agrees(spec, logits, targets, case, upstream=1.0, temperature=1.0, spoil=False, **options):
    """Checks statistics and gradient; returns ours. spoil: NaN in the masked rows, of the logits too."""
    masked = case.token_weight == 0
    given, given_case = logits, case
    if spoil:
        given, given_case = logits.clone(), case.poisoned()
        given[masked] = float("nan")
    got = grpo(
        kernels.grpo_loss_from_logits,
        spec,
        given_case,
        on_device(given),
        targets.to(DEVICE),
        torch.float32,
        DEVICE,
        upstream,
        temperature=temperature.to(DEVICE) if isinstance(temperature, torch.Tensor) else temperature,
        **options,
    )
    same, oracle = (
        grpo(from_logits, spec, case, logits.to(d, copy=True).requires_grad_(), targets, d, "cpu", upstream, temperature=temperature)
        for d in (logits.dtype, torch.float64)
    )
    floor = 1e-5 if spec.objective == "vespo" else 5e-6  # the rounding of a log-prob of -20 is 1e-6 of every ratio
    for i, name in enumerate(STATS):
        terms = case.token_weight.sum().item() if name in ("loss", "policy_loss") else got[0][0].item()
        check(got[0][i : i + 1], same[0][i : i + 1], oracle[0][i : i + 1], name, floor, terms)
    check(got[1][~masked], same[1][~masked], oracle[1][~masked], "logp")
    check(got[2][~masked], same[2][~masked], oracle[2][~masked], "entropy")
    check(got[3], same[3], oracle[3], "gradient", floor)
    assert (got[3][masked] == 0).all() and got[3].dtype == logits.dtype
    return got


def problem(dtype=torch.float32, seed=0, stride=None, **given):
    logits, targets = draw_logits(sum(LENGTHS), 260, dtype, stride, seed=seed)
    logp, _ = reference.logprob_from_logits(logits, targets)
    return logits, targets, draw(logp, LENGTHS, seed=seed, **given)


GRID = list(itertools.product(("clip", "cispo", "sapo", "vespo"), ("token", "sequence"), DTYPES))


@pytest.mark.parametrize(("kind", "ratio", "dtype"), GRID)
def test_loss_and_gradient_are_the_specifications(kind, ratio, dtype):
    i = GRID.index((kind, ratio, dtype))
    logits, targets, case = problem(dtype, i, 264 if i % 2 else None, sampler=i % 3 == 0, policy_mask=i % 2 == 0, entropy_weight=i % 4 == 1)
    spec = GRPOSpec(
        objective=kind,
        ratio=ratio,
        beta=0.1,
        kl=("k1", "k2", "k3")[i % 3],
        kl_bias_correction=i % 2 == 0,
        entropy_coef=0.1,
        clip_delta=1.5,
        dual_clip=2.0,
        importance="token_mask" if i % 2 else "sequence_truncate",
    )
    temperature = 0.5 + torch.rand(len(logits), generator=torch.Generator().manual_seed(i)) if i % 2 else 1.0
    loss_agrees(spec, logits, targets, case, upstream=(1.0, 1024.0, -0.3)[i % 3], temperature=temperature, spoil=True, inplace=i % 4 < 2)


def test_the_draw_crosses_the_clip():
    logits, targets, case = problem()
    stats, *_, gradient = loss_agrees(GRPOSpec(beta=0.0), logits, targets, case)
    clipped = stats[STATS.index("clip_low")] + stats[STATS.index("clip_high")]
    silent = (gradient == 0).all(1).cpu() & (case.token_weight != 0)
    assert clipped > 0 and silent.sum() == clipped


@pytest.mark.parametrize("case", ["token", "sequence"])
def test_launches_of_the_loss(case, launches):
    logits, targets, rows = problem()
    spec = GRPOSpec(ratio=case)
    loss, *_ = kernels.grpo_loss_from_logits(on_device(logits), targets.to(DEVICE), spec=spec, **rows.arguments())
    forward = ["grpo_logits_kernel"] if case == "token" else ["logprob_kernel", "sequence_objective_kernel"]
    assert launches == forward
    loss.backward()
    assert launches == [*forward, "scale_kernel" if case == "token" else "gradient_kernel"]


@pytest.mark.parametrize("spec", [GRPOSpec(), GRPOSpec(ratio="sequence")], ids=["token", "sequence"])
def test_without_a_gradient_nothing_is_written_to_the_logits(spec):
    logits, targets, case = problem()
    leaf = on_device(logits)
    with torch.no_grad():
        quiet = kernels.grpo_loss_from_logits(leaf, targets.to(DEVICE), spec=spec, **case.arguments(), inplace=True)
    assert torch.equal(leaf.detach().cpu(), logits) and not quiet[0].requires_grad
    loud = kernels.grpo_loss_from_logits(leaf, targets.to(DEVICE), spec=spec, **case.arguments())
    for x, y in zip(quiet, loud, strict=True):
        assert torch.equal(x, y)
    assert loud[0].requires_grad and not any(x.requires_grad for x in loud[1:])


@pytest.mark.parametrize("spec", [GRPOSpec(), GRPOSpec(ratio="sequence")], ids=["token", "sequence"])
@pytest.mark.parametrize("stride", [None, 264])
def test_the_gradient_can_take_the_place_of_the_logits(spec, stride):
    logits, targets, case = problem(stride=stride)
    z = on_device(logits) * 1 if stride is None else on_device(logits).view_as(logits)
    seen = []
    z.register_hook(lambda g: seen.append((g.data_ptr(), g.clone())))
    loss, *_ = kernels.grpo_loss_from_logits(z, targets.to(DEVICE), spec=spec, **case.arguments(), inplace=True)
    (3 * loss).backward(retain_graph=True)
    assert seen[0][0] == z.data_ptr()
    expected = loss_agrees(spec, logits, targets, case, upstream=3.0)[3]
    assert torch.equal(seen[0][1], expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_all_rows_masked(ratio):
    logits, targets, case = problem()
    case = replace(case, token_weight=torch.zeros(len(logits)))
    stats, *_, gradient = loss_agrees(GRPOSpec(ratio=ratio), logits, targets, case, spoil=True)
    assert (gradient == 0).all() and (stats == 0).all()


def test_half_precision_keeps_gradients_that_only_a_loss_scaler_lifts_into_range():
    """Weights of 1e-6 leave gradients below float16's smallest number until the upstream gradient of 2^16 is applied."""
    logits, targets, case = problem(torch.float16, old=False, ref=False)
    case = replace(case, token_weight=case.token_weight * 1e-5)
    gradient = loss_agrees(GRPOSpec(beta=0.0), logits, targets, case, upstream=65536.0)[3]
    assert gradient.abs().max() > 0.01


@pytest.mark.parametrize(
    ("shape", "factor"), [((), 0.5), ((1,), 1.0), ((5000,), -0.3), ((3, 1000), 1.0), ((7, 333), 2.0), ((4, 128, 9), 0.1)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale(shape, factor, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = scaling.scale_(x.to(DEVICE).clone(), torch.tensor(factor, device=DEVICE))
    assert torch.equal(got.cpu(), (x.float() * torch.tensor(factor)).to(dtype))


def test_scale_leaves_the_gap_between_rows_alone():
    wide = torch.ones(5, 700, device=DEVICE)
    scaling.scale_(wide[:, :650], torch.tensor(2.0, device=DEVICE))
    assert (wide[:, :650] == 2).all() and (wide[:, 650:] == 1).all()


@pytest.mark.parametrize("fault", [0.0, 0.98, -1.0])
def test_the_rule_catches_a_wrong_gradient(fault):
    logits, targets, case = problem()
    got = loss_agrees(GRPOSpec(), logits, targets, case)[3]
    oracle = grpo(from_logits, GRPOSpec(), case, logits.double().requires_grad_(), targets, torch.float64, "cpu")[3]
    check(got, oracle, oracle, "gradient")
    with pytest.raises(AssertionError, match="gradient: off by"):
        check(got * fault, oracle, oracle, "gradient")

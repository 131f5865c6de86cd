"""The token KL kernels and their device mathematics, against float64 and against the reference."""

import math

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from actial_fast.kernels import common, token_kl
from actial_fast.kernels.kl_math import expm1_minus_x
from actial_fast.ops import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
SIZES = [1, 127, 128, token_kl.BLOCK, token_kl.BLOCK + 1, 3 * token_kl.BLOCK - 5]
EPS = 2.0**-24  # float32's rounding


def draw(T: int, dtype=torch.float32, spread: float = 1.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(T, generator=g, dtype=torch.float64)
    ref_logp = logp + spread * torch.randn(T, generator=g, dtype=torch.float64)
    return logp.to(DEVICE, dtype), ref_logp.to(DEVICE, dtype)


def run(function, logp, ref_logp, kind, grad) -> list[torch.Tensor]:
    """kl and the gradients of logp and ref_logp, detached."""
    logp, ref_logp = logp.detach().requires_grad_(), ref_logp.detach().requires_grad_()
    kl = function(logp, ref_logp, kind)
    return [kl.detach(), *torch.autograd.grad(kl, (logp, ref_logp), grad.to(kl.dtype))]


def oracle(logp, ref_logp, kind, grad) -> list[torch.Tensor]:
    """In float64, from the difference as float32 has it, which is the kernel's input in effect."""
    d = (ref_logp.float() - logp.float()).double()
    slope = {"k1": -torch.ones_like(d), "k2": d, "k3": torch.expm1(d)}[kind]
    value = {"k1": -d, "k2": d * d / 2, "k3": torch.expm1(d) - d}[kind]
    return [value, -grad.double() * slope, grad.double() * slope]


def assert_agrees(got, want, plain) -> None:
    """Twice the error of torch in the same dtype, and a few roundings of each value."""
    for name, ours, exact, torchs in zip(("kl", "gradient of logp", "gradient of ref_logp"), got, want, plain, strict=True):
        assert ours.isfinite().all(), f"{name}: not finite"
        floor = 8 * torch.finfo(ours.dtype).eps * exact.abs() + 1e-15
        assert ((ours.double() - exact).abs() <= 2 * (torchs.double() - exact).abs() + floor).all(), name


@KINDS
@pytest.mark.parametrize("T", SIZES)
def test_forward_and_gradients(kind, T):
    logp, ref_logp = draw(T)
    grad = torch.randn(T, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    got = run(token_kl.token_kl, logp, ref_logp, kind, grad)
    assert [x.dtype for x in got] == [torch.float32] * 3
    assert_agrees(got, oracle(logp, ref_logp, kind, grad), run(reference.token_kl, logp, ref_logp, kind, grad))


@KINDS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_inputs_are_computed_in_float32(kind, dtype):
    logp, ref_logp = draw(300, dtype)
    grad = torch.randn(300, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    got = run(token_kl.token_kl, logp, ref_logp, kind, grad)
    assert [x.dtype for x in got] == [torch.float32, dtype, dtype]
    assert_agrees(got, oracle(logp, ref_logp, kind, grad), run(reference.token_kl, logp.float(), ref_logp.float(), kind, grad))


@pytest.mark.parametrize(
    "spoil", [lambda x: 0 * x, lambda x: 1.001 * x, lambda x: -x, lambda x: x.roll(1), lambda x: x + 1e-4, lambda x: x * math.nan]
)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_wrong_result_fails_the_comparison(spoil, which):
    logp, ref_logp = draw(300)
    grad = torch.ones(300, device=DEVICE)
    want, plain = oracle(logp, ref_logp, "k3", grad), run(reference.token_kl, logp, ref_logp, "k3", grad)
    got = run(token_kl.token_kl, logp, ref_logp, "k3", grad)
    assert_agrees(got, want, plain)
    got[which] = spoil(got[which])
    with pytest.raises(AssertionError, match=r"kl|gradient"):
        assert_agrees(got, want, plain)


@triton.jit
def both_kernel(x, rest, expm1, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, b = expm1_minus_x(tl.load(x + i, mask=i < N))
    tl.store(rest + i, a, mask=i < N)
    tl.store(expm1 + i, b, mask=i < N)


def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.to(DEVICE)
    rest, expm1 = torch.full_like(x, math.nan), torch.full_like(x, math.nan)
    both_kernel[(triton.cdiv(len(x), 1024),)](x, rest, expm1, len(x), BLOCK=1024)
    return rest.double().cpu(), expm1.double().cpu()


def exact_rest(x: torch.Tensor) -> torch.Tensor:
    """expm1(x) - x in float64 by its series where the difference would cancel."""
    x = x.double()
    term, total = x * x / 2, torch.zeros_like(x)
    for n in range(3, 30):
        total, term = total + term, term * x / n
    return torch.where(x.abs() < 1, total, torch.expm1(x) - x)


def test_k3_does_not_cancel():
    """Relative error of expm1(d) - d at every size of d: exp(d) - 1 - d loses everything below 1e-4, expm1(d) - d as written below 1e-7."""
    small = 10 ** torch.linspace(-15, 0, 3000)
    d = torch.cat([small, -small, torch.linspace(-100, 20, 6001), torch.linspace(-2, 2, 2001)])
    d = d[d != 0]
    rest, expm1 = both(d)
    assert ((rest - exact_rest(d)) / exact_rest(d)).abs().max() < 5 * EPS
    assert ((expm1 - torch.expm1(d.double())) / torch.expm1(d.double())).abs().max() < 5 * EPS
    naive, written = torch.exp(small) - 1 - small, torch.expm1(small) - small
    for other in (naive, written):
        assert ((other.double() - exact_rest(small)) / exact_rest(small)).abs().max() > 0.9, "what the kernel avoids"
    logp, ref_logp = torch.zeros(len(small)).to(DEVICE), small.to(DEVICE)
    got = token_kl.token_kl(logp, ref_logp, "k3").double().cpu()
    assert ((got - exact_rest(small)) / exact_rest(small)).abs().max() < 5 * EPS, "the op itself, not only its helper"


def test_both_sides_of_the_branch_meet():
    edge = torch.tensor([1.5, -1.5])
    x = torch.cat([torch.nextafter(edge, torch.zeros(2)), edge, torch.nextafter(edge, 4 * edge)])
    rest, _ = both(x)
    assert ((rest - exact_rest(x)) / exact_rest(x)).abs().max() < 5 * EPS


def test_remainders_at_the_ends():
    rest, expm1 = both(torch.tensor([0.0, -math.inf, -1e30, 88.0, math.nan]))
    assert rest[:3].tolist() == pytest.approx([0.0, math.inf, 1e30]) and expm1[:3].tolist() == [0.0, -1.0, -1.0]
    assert rest[3].item() == pytest.approx(math.exp(88), rel=1e-6) and rest[4].isnan() and expm1[4].isnan()


@KINDS
def test_beyond_the_bound_value_is_held_and_gradient_is_zero(kind):
    bound = common.MAX_LOG_RATIO
    assert bound == reference.MAX_LOG_RATIO
    ref_logp = torch.tensor([bound - 1, bound, bound + 1, 500.0, -60.0]).to(DEVICE)
    logp, grad = torch.zeros(5).to(DEVICE), torch.full((5,), 0.5).to(DEVICE)
    kl, dlogp, dref = run(token_kl.token_kl, logp, ref_logp, kind, grad)
    want = run(reference.token_kl, logp.double(), ref_logp.double(), kind, grad)
    for got, exact in zip((kl, dlogp, dref), want, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=0)
    assert kl[1] == kl[2] == kl[3] and not dlogp[2:4].any() and not dref[2:4].any() and dlogp[:2].all()


def test_nan_is_not_hidden():
    logp, ref_logp = draw(5)
    logp[2] = math.nan
    for kind in ("k1", "k2", "k3"):
        for x in run(token_kl.token_kl, logp, ref_logp, kind, torch.ones(5, device=DEVICE)):
            assert x.isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)])
def test_only_the_gradients_that_are_wanted(wanted, monkeypatch):
    asked = []
    backward = token_kl.token_kl_backward
    monkeypatch.setattr(token_kl, "token_kl_backward", lambda *a, **k: asked.append(backward(*a, **k)) or asked[0])
    inputs = [x.requires_grad_(need) for x, need in zip(draw(40), wanted, strict=True)]
    grad = torch.linspace(-1, 1, 40).to(DEVICE)
    token_kl.token_kl(*inputs, "k3").backward(grad)
    assert [x is not None for x in asked[0]] == list(wanted)
    exact = oracle(*(x.detach() for x in inputs), "k3", grad)[1:]
    for x, need, want in zip(inputs, wanted, exact, strict=True):
        assert (x.grad is not None) == need
        if need:
            torch.testing.assert_close(x.grad.double(), want, rtol=1e-6, atol=0)


def test_a_gradient_of_one_number_is_read_once():
    logp, ref_logp = draw(token_kl.BLOCK + 7)
    for reduce, share in ((torch.sum, 1.0), (torch.mean, 1 / len(logp))):
        inputs = [x.clone().requires_grad_() for x in (logp, ref_logp)]
        reduce(token_kl.token_kl(*inputs)).backward()
        _, *want = oracle(logp, ref_logp, "k3", torch.full_like(logp, share, dtype=torch.float64))
        for x, exact in zip(inputs, want, strict=True):
            torch.testing.assert_close(x.grad.double(), exact, rtol=1e-6, atol=0)


def test_strided_inputs_and_gradients():
    logp, ref_logp = draw(202)
    grad = torch.linspace(-1, 1, 202).to(DEVICE)
    got = run(token_kl.token_kl, logp[::2], ref_logp[::2], "k3", grad[::2])
    want = run(token_kl.token_kl, logp[::2].clone(), ref_logp[::2].clone(), "k3", grad[::2].clone())
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("T", [1, 130, token_kl.BLOCK + 3])
def test_every_output_is_written_and_nothing_beyond(monkeypatch, T):
    """Outputs start as NaN inside a larger buffer of NaN."""
    buffers = []

    def poisoned(like, dtype=None):
        buffers.append(torch.full((T + 2048,), math.nan, dtype=dtype or like.dtype, device=DEVICE))
        return buffers[-1][:T]

    monkeypatch.setattr(torch, "empty_like", poisoned)
    logp, ref_logp = draw(T)
    kl = token_kl.token_kl_forward(logp, ref_logp, "k3")
    grads = token_kl.token_kl_backward(torch.ones(T, device=DEVICE), logp, ref_logp, "k3")
    assert len(buffers) == 3
    for out, buffer in zip((kl, *grads), buffers, strict=True):
        assert out.isfinite().all() and buffer[T:].isnan().all()


def test_no_tokens():
    logp, ref_logp = (x.requires_grad_() for x in draw(0))
    kl = token_kl.token_kl(logp, ref_logp)
    assert kl.shape == (0,) and kl.dtype == torch.float32
    kl.sum().backward()
    assert logp.grad.shape == ref_logp.grad.shape == (0,)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 400), st.sampled_from(["k1", "k2", "k3"]), st.sampled_from([1e-6, 1e-2, 1.0, 15.0]), st.integers(0, 99))
def test_any_length_and_spread(T, kind, spread, seed):
    logp, ref_logp = draw(T, spread=spread, seed=seed)
    d = (ref_logp - logp).double().clamp(max=common.MAX_LOG_RATIO)
    got = token_kl.token_kl(logp, ref_logp, kind).double()
    want = {"k1": -d, "k2": d * d / 2, "k3": exact_rest(d)}[kind]
    torch.testing.assert_close(got, want, rtol=5 * EPS, atol=1e-37)
    assert kind == "k1" or (got >= 0).all()


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter has no grid limit and would take minutes")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_many_tokens(dtype):
    T = 65_536 * token_kl.BLOCK + 3
    logp, ref_logp = torch.zeros(T, device=DEVICE, dtype=dtype), torch.full((T,), 0.5, device=DEVICE, dtype=dtype)
    got = token_kl.token_kl(logp, ref_logp)
    torch.testing.assert_close(got, torch.full_like(got, math.expm1(0.5) - 0.5), rtol=1e-6, atol=0)

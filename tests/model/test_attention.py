"""Prompt-once attention against dense masked attention in float64, and the merge kernel against the merge."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actial_fast.kernels import merge
from actial_fast.model import attention
from actial_fast.model.attention import prompt_once, varlen_attention
from tests.attention_case import DEVICE, cpu, pack, relative, segments

# a group: rows of its prefix, rows of each suffix; without suffixes it is a plain sequence
GROUPS = {
    "uneven suffixes": [(7, [3, 5, 1])],
    "several groups": [(9, [4, 4]), (2, [1]), (33, [6, 1, 40])],
    "plain ones among them": [(6, [2, 4]), (5, []), (9, [1]), (3, [])],
    "plain only": [(5, []), (4, []), (5, [])],
    "suffixes of one row": [(4, [1, 1]), (1, [1])],
    "longer than a block": [(530, [200, 40, 1])],
}
HEADS = {"ratio 1": (3, 3), "ratio 2": (4, 2), "ratio 7": (7, 1), "ratio 7 of 2": (14, 2)}


def draw(rows, heads, dim, dtype, seed=0, device=DEVICE):
    """q, k, v and an upstream gradient; scores spread enough that either part of the keys may dominate a row."""
    make = torch.Generator().manual_seed(seed)
    shapes = [(rows, heads[0], dim), (rows, heads[1], dim), (rows, heads[1], dim), (rows, heads[0], dim)]
    q, k, v, grad = (torch.randn(shape, generator=make, dtype=torch.float64) for shape in shapes)
    return [x.to(device, dtype) for x in (2 * q, k, v, grad)]


def dense(q, k, v, allowed, scale):
    """The oracle: (L, H, D) attention under a mask, every score in memory."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed.to(q.device), -math.inf).softmax(-1), v)


def gradients(function, inputs, grad):
    """The function's result and the gradients of its inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    out.backward(grad)
    return [out.detach(), *(x.grad for x in leaves)]


def errors(groups, heads, dim, dtype, device=DEVICE, of_dense=False):
    """Relative errors of out and the gradients of q, k and v; or those of dense attention in the same dtype."""
    packed = pack(groups, device)
    q, k, v, grad = draw(packed.rows, heads, dim, dtype, device=device)
    scale, allowed = 0.7 * dim**-0.5, packed.allowed()
    exact = gradients(lambda *x: dense(*x, allowed, scale), [x.double() for x in (q, k, v)], grad.double())
    run = (lambda *x: dense(*x, allowed, scale)) if of_dense else (lambda *x: prompt_once(*x, packed, scale))
    found = gradients(run, (q, k, v), grad)
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, dtype) for x in exact]
    return [relative(a, b) for a, b in zip(found, exact, strict=True)]


@cpu
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_prompt_once_is_dense_attention(groups, heads):
    assert max(errors(groups, heads, 32, torch.float32)) < 1e-5
    if sum(prefix for prefix, _ in groups) < 500:
        assert max(errors(groups, heads, 32, torch.float64)) < 1e-13


@cpu
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_head_dimensions(dim):
    assert max(errors(GROUPS["plain ones among them"], (4, 2), dim, torch.float32)) < 1e-5


LENGTHS = st.integers(1, 9)


@cpu
@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.tuples(LENGTHS, st.lists(LENGTHS, max_size=4)), min_size=1, max_size=4), st.sampled_from(list(HEADS.values())))
def test_any_mixture_of_groups(groups, heads):
    assert errors(groups, heads, 8, torch.float64)[0] < 1e-13
    packed = pack(groups)
    q, k, v, grad = draw(packed.rows, heads, 8, torch.float64)
    exact = gradients(lambda *x: dense(*x, packed.allowed(), 1.0), (q, k, v), grad)
    ours = gradients(lambda *x: prompt_once(*x, packed, 1.0), (q, k, v), grad)
    assert all((a - b).abs().max() < 1e-11 for a, b in zip(ours, exact, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_on_the_cpu_is_as_good_as_dense(dtype):
    case = GROUPS["several groups"], (4, 2), 64, dtype, "cpu"
    for mine, theirs in zip(errors(*case), errors(*case, of_dense=True), strict=True):
        assert mine <= 2 * theirs + 1e-3


@cpu
def test_a_wrong_merge_or_a_dropped_share_of_the_gradient_is_seen(monkeypatch):
    """The other tests would fail if one of these were broken."""
    right_merge, right_backward = attention.merge, attention._backward
    case = GROUPS["uneven suffixes"], (4, 2), 32, torch.float32

    def heavier(out, lse, part, part_lse):
        right_merge(out, lse, part, part_lse + 0.01)

    def stale_lse(out, lse, part, part_lse):
        right_merge(out, lse.clone(), part, part_lse)

    def without(dropped):
        def backward(*args):
            shares = list(right_backward(*args))
            causal = args[8]
            if not causal:  # the suffixes over their prefix
                shares[dropped] = torch.zeros_like(shares[dropped])
            return tuple(shares)

        return backward

    monkeypatch.setattr(attention, "merge", heavier)
    assert errors(*case)[0] > 1e-4
    monkeypatch.setattr(attention, "merge", stale_lse)
    assert errors(*case)[0] < 1e-5 and min(errors(*case)[1:]) > 1e-2
    monkeypatch.setattr(attention, "merge", right_merge)
    for dropped in range(3):
        monkeypatch.setattr(attention, "_backward", without(dropped))
        assert [error > 1e-2 for error in errors(*case)] == [i == dropped + 1 for i in range(4)]


@cpu
def test_memory_layout_and_repetition_change_no_bit():
    packed = pack(GROUPS["several groups"])
    q, k, v, grad = draw(packed.rows, (4, 2), 32, torch.float32)
    expected = gradients(lambda *x: prompt_once(*x, packed), (q, k, v), grad)
    assert relative(expected[0], dense(q.double(), k.double(), v.double(), packed.allowed(), 32**-0.5)) < 1e-6
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    for inputs in ((q, k, v), turned):
        assert all(map(torch.equal, gradients(lambda *x: prompt_once(*x, packed), inputs, grad), expected))
    with torch.no_grad():
        assert torch.equal(prompt_once(*turned, packed), expected[0])


@cpu
def test_varlen_attention_of_windows_in_any_order():
    lengths = [16, 16, 4, 16, 16, 4, 8, 8, 2]
    block = torch.block_diag(*[torch.ones(n, n) for n in lengths]).bool()
    q, k, v, grad = draw(sum(lengths), (2, 2), 80, torch.float64)
    for causal, allowed in ((False, block), (True, block.tril())):
        exact = gradients(lambda *x, allowed=allowed: dense(*x, allowed, 0.2), (q, k, v), grad)
        ours = gradients(lambda *x, causal=causal: varlen_attention(*x, segments(lengths), causal=causal, scale=0.2), (q, k, v), grad)
        assert max(relative(a, b) for a, b in zip(ours, exact, strict=True)) < 1e-13


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v, p: (q[:-1], k, v, p), "k and v with rows and dim of q"),
        (lambda q, k, v, p: (q[:, :3], k, v, p), "heads that divides q's"),
        (lambda q, k, v, p: (q, k.double(), v, p), "one floating dtype"),
        (lambda q, k, v, p: (q[:-1], k[:-1], v[:-1], p), "segments: they cover 13 rows, q has 12"),
        (lambda q, k, v, p: (q, k, v, SimpleNamespace(**{**vars(p), "suffix_rows": 6})), "packed: 13 rows with 4 of prefixes and 6 of"),
        (lambda q, k, v, p: (q, k, v, SimpleNamespace(**{**vars(p), "cross_k": segments([4, 1])})), "cross_k covers 5 in 2 groups"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, message):
    packed = pack([(4, [2, 3]), (4, [])])
    q, k, v, _ = draw(packed.rows, (4, 2), 32, torch.bfloat16)
    with pytest.raises(ValueError, match=message):
        prompt_once(*change(q, k, v, packed))


@pytest.mark.parametrize("shape", [(37, 3, 64), (5, 7, 80), (1, 1, 32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_the_merge_kernel_is_the_merge(dtype, shape):
    S, H, D = shape
    make = torch.Generator().manual_seed(1)
    a, b = (torch.randn(S + 3, H, D, generator=make).to(DEVICE, dtype) for _ in range(2))
    lse_a, lse_b = (40 * torch.randn(H, S + 5, generator=make).to(DEVICE) for _ in range(2))
    turned = b.transpose(0, 1).contiguous().transpose(0, 1)  # heads of the second part lie further apart than its rows
    out, lse = a.clone(), lse_a.clone()
    merge.merge_(out[2 : S + 2], lse[:, 1 : S + 1], turned[:S], lse_b[:, :S])
    exact, exact_lse = a.double(), lse_a.double()
    both = torch.stack([exact_lse[:, 1 : S + 1], lse_b[:, :S].double()])
    shares = both.softmax(0).transpose(1, 2)[..., None]
    exact[2 : S + 2] = shares[0] * exact[2 : S + 2] + shares[1] * b[:S].double()
    exact_lse[:, 1 : S + 1] = both.logsumexp(0)
    assert (lse.double() - exact_lse).abs().max() < 1e-5
    assert (out.double() - exact).abs().max() < {torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]


def test_flash_kernels_by_name():
    attention.use_flash("FA2")
    with pytest.raises(ValueError, match="FA9"):
        attention.use_flash("FA9")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where the package is not installed")
def test_a_missing_flash_package_is_named():
    with pytest.raises(ValueError, match="install flash-attn-4"):
        attention.use_flash("FA4")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_prompt_once_on_cuda(groups, heads, dtype):
    for dim in (32, 64, 80, 128):
        case = groups, heads, dim, dtype
        for mine, theirs in zip(errors(*case), errors(*case, of_dense=True), strict=True):
            assert mine <= 2 * theirs + 1e-3


@pytest.mark.gpu
def test_no_sync_and_no_copy_of_keys_on_cuda():
    packed = pack([(4000, [300] * 16)])
    q, k, v, grad = draw(packed.rows, (28, 4), 128, torch.bfloat16)
    q.requires_grad_()
    prompt_once(q, k, v, packed).backward(grad)  # compiles the merge
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = prompt_once(q, k, v, packed)
        forward = torch.cuda.max_memory_allocated() - before
        out.backward(grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    outputs = 2 * out.numel() * out.element_size()  # both parts, of which the suffixes' is the smaller
    assert forward < outputs + 16 * packed.rows * 28 + 2**20


@pytest.mark.gpu
def test_float32_on_cuda_is_refused():
    packed = pack([(4, [2])], "cuda")
    with pytest.raises(ValueError, match="float16 or bfloat16"):
        prompt_once(*draw(packed.rows, (2, 2), 32, torch.float32, device="cuda")[:3], packed)

"""Log-probs of several targets a row, and over what a sampler keeps, on both paths: the CPU's and the Triton kernels'."""

import functools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from actial_fast import ops
from actial_fast.kernels import chunks, truncated
from actial_fast.kernels.head import make_head
from actial_fast.ops import chunked, library, reference
from actial_fast.ops.spec import Kept

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOOR = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}  # of the largest entry
KEPT = {
    "all": {},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.05},
    "three": {"top_k": 20, "top_p": 0.9, "min_p": 0.01},
}
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(params=["cpu", "kernels"])
def path(request, monkeypatch) -> str:
    if request.param == "kernels":
        monkeypatch.setattr(library, "on_gpu", lambda x: True)
    elif DEVICE == "cuda":
        pytest.skip("CUDA tensors go to the kernels")
    return request.param


def make(T=5, H=11, V=203, K: int | None = 6, dtype=torch.float32, kept=(), extras=False, seed=0) -> SimpleNamespace:
    """Targets mostly of what is kept; the first column is any token, and in the first row all are the same."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=g, dtype=torch.float64)  # noqa: E731
    c = SimpleNamespace(hidden=draw(T, H), weight=2 * draw(V, H) / math.sqrt(H), bias=draw(V) if extras else None)
    for name in ("hidden", "weight", "bias"):
        x = getattr(c, name)
        setattr(c, name, None if x is None else x.to(DEVICE, dtype).requires_grad_())
    rows = torch.float64 if dtype == torch.float64 else torch.float32
    c.temperature = (0.5 + torch.rand(T, generator=g)).to(DEVICE, rows) if extras else 0.8
    c.softcap, c.kept = (4.0 if extras else None), dict(kept)
    z = reference.logits(*(None if x is None else x.detach().double() for x in (c.hidden, c.weight, c.bias)), c.temperature, c.softcap)
    probability = z.softmax(-1).masked_fill(z < reference.lowest_kept(z, Kept(**c.kept)), 0).cpu()
    c.targets = torch.multinomial(probability, K or 1, replacement=True, generator=g)
    if K is None:
        c.targets = c.targets[:, 0]
    else:
        c.targets[:, 0] = torch.randint(0, V, (T,), generator=g)
        c.targets[0] = c.targets[0, -1]
    c.targets = c.targets.to(DEVICE)
    c.g, c.h = draw(*c.targets.shape).to(DEVICE, rows), draw(T).to(DEVICE, rows)
    return c


def run(c, **more) -> dict[str, Tensor]:
    """Values, and gradients of all of them by the coefficients g and h."""
    options = {"bias": c.bias, "temperature": c.temperature, "softcap": c.softcap} | c.kept | more
    logp, entropy = ops.linear_logprob(c.hidden, c.weight, c.targets, **options)
    leaves = {name: x for name, x in (("hidden", c.hidden), ("weight", c.weight), ("bias", c.bias)) if x is not None}
    grads = torch.autograd.grad((logp, entropy), list(leaves.values()), (c.g, c.h))
    return {"logp": logp.detach(), "entropy": entropy.detach(), **dict(zip(leaves, grads, strict=True))}


def oracle(c, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The same in float64, by the reference on the head's product; with a dtype, the logits' gradient is rounded to it on its way, and so
    are the results, as the best that tensor cores of that dtype allow."""
    rounded = (lambda x: x) if dtype is None else (lambda x: x.to(dtype).double())
    hidden, weight = c.hidden.detach().double(), c.weight.detach().double()
    x = hidden @ weight.T + (0 if c.bias is None else c.bias.detach().double())
    x.requires_grad_()
    temperature = c.temperature.double() if isinstance(c.temperature, Tensor) else c.temperature
    identity = torch.eye(x.shape[1], dtype=torch.float64, device=DEVICE)
    more = {"temperature": temperature, "softcap": c.softcap, "kept": Kept(**c.kept) if c.kept else None}
    logp, entropy = reference.linear_logprob(x, identity, c.targets, **more)
    (dx,) = torch.autograd.grad((logp, entropy), x, (c.g.double(), c.h.double()))
    found = {"logp": logp.detach(), "entropy": entropy.detach()}
    found |= {"hidden": rounded(rounded(dx) @ weight), "weight": rounded(rounded(dx).T @ hidden)}
    return found if c.bias is None else found | {"bias": rounded(dx.sum(0))}


def assert_right(got: dict[str, Tensor], c) -> None:
    """err(ours) <= 2 err(the same dtype) + floor, in units of the oracle's largest entry; -inf where the oracle has it."""
    want, same = oracle(c, None), oracle(c, c.hidden.dtype)
    assert got.keys() == want.keys()
    for name, value in got.items():
        assert value.shape == want[name].shape and torch.equal(value == -math.inf, want[name] == -math.inf), name
        finite = want[name].isfinite()
        size = want[name][finite].abs().max().clamp(min=1e-30)
        ours, theirs = ((x.double() - want[name])[finite].abs().max() / size for x in (value, same[name]))
        assert ours <= 2 * theirs + FLOOR[c.hidden.dtype], f"{name}: off by {ours:.2e}, the dtype's own {theirs:.2e}"


SLOW = [
    *(("all", 18, False, dtype) for dtype in ("float16", "bfloat16")),
    *(("top_k", 3, True, "bfloat16"), ("top_p", None, True, "float16"), ("top_p", 6, False, "bfloat16"), ("min_p", 3, True, "float32")),
    *(("three", None, False, "bfloat16"), ("three", 6, True, "float32")),
]
CASES = [
    *(("all", 6, True, dtype) for dtype in ("float64", "float32", "float16", "bfloat16")),
    *(("all", 18, False, "float32"), ("top_k", None, False, "float32"), ("top_p", 2, True, "bfloat16"), ("min_p", None, False, "float16")),
    *(("three", 2, True, "float16"), ("three", None, True, "float64")),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW),
]


@pytest.mark.parametrize(("kept", "K", "extras", "dtype"), CASES)
def test_values_and_gradients(kept, K, extras, dtype, path):
    if path == "kernels" and dtype == "float64":
        pytest.skip("of the CPU alone")
    rows = 21 if path == "cpu" else 4 if kept == "all" else 2
    c = make(T=rows, K=K, dtype=getattr(torch, dtype), kept=KEPT[kept], extras=extras)
    got = run(c)
    assert_right(got, c)
    assert got["logp"].isfinite().any() and (kept != "all" or got["logp"].isfinite().all())


@pytest.mark.parametrize("kept", ["all", pytest.param("top_k", marks=pytest.mark.slow)])
def test_one_target_of_several_is_the_one_target(kept, path):
    one = make(T=2, K=None, kept=KEPT[kept], extras=True)
    several = SimpleNamespace(**vars(one) | {"targets": one.targets[:, None], "g": one.g[:, None]})
    a, b = run(one), run(several)
    assert b["logp"].shape == (2, 1)
    for name, value in a.items():
        torch.testing.assert_close(b[name].reshape(value.shape), value, rtol=1e-5, atol=2e-6)


def test_a_token_that_stands_twice_counts_twice(path):
    once = make(K=3)
    once.targets[0] = torch.tensor([7, 9, 200])
    twice = SimpleNamespace(**vars(once) | {"targets": once.targets[:, [0, 1, 2, 1, 0]], "g": once.g[:, [0, 1, 2, 1, 0]] / 2})
    twice.g[:, 2] *= 2
    a, b = run(once), run(twice)
    assert torch.equal(a["logp"][:, [0, 1, 2, 1, 0]], b["logp"])
    for name in ("hidden", "weight"):
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)


def test_a_row_whose_coefficients_add_up_to_0_has_a_gradient(path):
    """As that of log p(a) - log p(b), which is that of two logits alone."""
    c = make(T=4, K=2)
    c.targets[:] = torch.tensor([3, 5])
    c.g[:] = torch.tensor([1.0, -1.0])
    c.h.zero_()
    got = run(c)
    torch.testing.assert_close(got["hidden"], ((c.weight[3] - c.weight[5]) / 0.8).detach().expand(4, -1), rtol=1e-5, atol=1e-6)
    assert got["weight"][[3, 5]].any() and not got["weight"][[0, 1, 2, 4]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_the_sampler_kept_goes_in_as_targets(dtype, path):
    """Sampling replay: log-probs over given ids, a row's own number of them, equal those of the same set found anew."""
    c = make(T=2, V=150, K=None, dtype=dtype, kept=KEPT["top_p"], seed=3)
    z = reference.logits(c.hidden.detach().double(), c.weight.detach().double(), None, 0.8, None)
    sets = [row.nonzero().flatten() for row in z >= reference.lowest_kept(z, Kept(**c.kept))]
    ids = torch.nn.utils.rnn.pad_sequence(sets, batch_first=True, padding_value=0)
    given = torch.arange(ids.shape[1], device=DEVICE) < torch.tensor([[len(one)] for one in sets], device=DEVICE)
    assert not given.all(), "no row was filled up: the test says little"

    logp, _ = ops.linear_logprob(c.hidden, c.weight, torch.cat((c.targets[:, None], ids), 1), temperature=0.8)
    replayed = logp[:, 0] - logp[:, 1:].masked_fill(~given, -torch.inf).logsumexp(1)
    grads = torch.autograd.grad(replayed, (c.hidden, c.weight), c.g)
    c.h.zero_()
    want, floor = oracle(c, None), 20 * FLOOR[dtype]  # the sum over all tokens cancels, to what the dtype leaves of it
    for got, name in zip((replayed, *grads), ("logp", "hidden", "weight"), strict=True):
        assert (got.double() - want[name]).abs().max() <= floor * want[name].abs().max(), name


@pytest.mark.parametrize("wrong", [0.0, 1.02])
def test_a_wrong_gradient_fails_the_comparison(wrong):
    if DEVICE == "cuda":
        pytest.skip("of the rule, which a CPU shows")
    c = make(kept=KEPT["three"])
    right = run(c)
    assert_right(right, c)
    for name in ("hidden", "weight"):
        with pytest.raises(AssertionError, match=f"{name}: off by"):
            assert_right(right | {name: wrong * right[name]}, c)


# ---- what is kept


def by_vllms_rule(z: Tensor, kept: Kept) -> Tensor:
    """Which tokens of one row stay, told as vLLM's sampler is written: min_p first, what is below the k-th, then from the lowest
    probability up as many as 1 - top_p holds."""
    z = z.masked_fill(z.softmax(0) < kept.min_p * z.softmax(0).max(), -torch.inf)
    ordered, index = z.sort()
    if kept.top_k:
        ordered = ordered.masked_fill(ordered < ordered[len(z) - kept.top_k], -torch.inf)
    if kept.top_p < 1:
        drop = ordered.softmax(0).cumsum(0) <= 1 - kept.top_p
        drop[-1] = False
        ordered = ordered.masked_fill(drop, -torch.inf)
    return torch.empty_like(z).scatter_(0, index, ordered) > -torch.inf


def test_kept_is_what_vllm_keeps():
    g, sizes = torch.Generator().manual_seed(1), []
    for i in range(300):
        z = torch.randn(40, generator=g, dtype=torch.float64) * (0.2 + i % 7)
        kept = Kept([0, 1, 7, 39][i % 4], [1.0, 0.05, 0.6, 0.95, 0.9999][i % 5], [0.0, 0.01, 0.3][i % 3])
        want, got = by_vllms_rule(z, kept), z >= reference.lowest_kept(z[None], kept)[0]
        assert torch.equal(got, want), (i, kept)
        sizes.append(int(want.sum()))
    assert min(sizes) == 1 and 40 in sizes and len(set(sizes)) > 15


def test_tokens_of_one_logit_are_kept_together(path):
    weight = torch.tensor([[3.0], [2], [2], [2], [1], [1], [0], [-torch.inf]], device=DEVICE)
    ask = functools.partial(ops.linear_logprob, torch.ones(1, 1, device=DEVICE), weight, torch.arange(8, device=DEVICE)[None])
    for kept, size in (
        ({"top_k": 1}, 1),
        ({"top_k": 2}, 4),
        ({"top_k": 5}, 6),
        ({"top_k": 7}, 7),
        ({"top_p": 1e-6}, 1),
        ({"top_p": 0.999}, 7),
        ({"min_p": 0.3}, 4),
        ({"top_k": 6, "top_p": 0.8}, 4),
    ):
        logp, entropy = ask(**kept)
        want = weight[:, 0].double()[:size].log_softmax(0)
        assert torch.equal(logp[0].isfinite(), torch.arange(8, device=DEVICE) < size), kept
        torch.testing.assert_close(logp[0, :size].double(), want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(entropy[0].double(), -(want.exp() * want).sum(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("scale", "kept"), [(1e-3, Kept(top_k=300)), (1.0, Kept(top_p=0.7)), (1e4, Kept(top_k=1290))], ids=str)
def test_borders_are_found_among_any_logits(scale, kept, path):
    """Large, small, of either sign, with banned tokens far below; more of them than a block of the kernel."""
    g = torch.Generator().manual_seed(2)
    V = 1300
    weight = (scale * torch.randn(V, 1, generator=g)).to(DEVICE)
    weight[::7] = -1e30
    z = weight[:, 0].double()
    targets = torch.arange(V, device=DEVICE)[None]
    logp, _ = ops.linear_logprob(torch.ones(1, 1, device=DEVICE), weight, targets, **kept._asdict())
    want = z.masked_fill(z < reference.lowest_kept(z[None], kept)[0], -torch.inf).log_softmax(0)
    off = (logp[0] == -torch.inf) != (want == -torch.inf)
    assert off.sum() <= (kept.top_p < 1)  # a share in float32 may fall on the other side of one token
    both = want.isfinite() & logp[0].isfinite()
    torch.testing.assert_close(logp[0][both].double(), want[both], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_vocabulary_of_many_blocks(monkeypatch):
    monkeypatch.setattr(library, "on_gpu", lambda x: True)
    c = make(T=1, H=3, V=17_001, K=2, kept=KEPT["three"])
    assert truncated.padded_vocab(17_001) == 20480
    assert_right(run(c), c)


@pytest.mark.parametrize("kept", [{"top_k": 0}, {"top_k": -1}, {"top_k": 203}, {"top_k": 999}, {"top_p": 1}, {"min_p": 0}], ids=str)
def test_what_keeps_everything_changes_nothing(kept, monkeypatch):
    c = make()
    monkeypatch.setattr(reference, "lowest_kept", None)
    a, b = run(c), run(c, **kept)
    assert all(torch.equal(a[name], b[name]) for name in a)


# ---- bounds and refusals


@pytest.mark.parametrize("kept", ["all", pytest.param("three", marks=pytest.mark.slow)])
def test_rows_do_not_depend_on_their_chunk(kept, path):
    c = make(T=9 if path == "cpu" else 2, K=4, kept=KEPT[kept], extras=True)
    whole = run(c)
    if path == "cpu":
        small = 2.1 * 4 * (6 * 203 + 3 * 11 + 30) / 2**20
    else:
        argument = make_head(c.hidden, c.weight, c.targets, None, 1.0, None, kept=Kept(**c.kept) if c.kept else None)
        small = 1.1 * chunks.row_bytes(argument, True) / 2**20
        assert len(chunks.cut(argument, True, small)) == 2
    parts = run(c, workspace_mb=small)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-5, atol=1e-6)


def test_float16_keeps_tiny_coefficients(path):
    """Weights of 1e-7 are what a normaliser over ten million tokens gives, and there the loss scale is yet to come."""
    for kept in ("all", "top_k"):
        c = make(T=2, K=2, dtype=torch.float16, kept=KEPT[kept])
        leaf, weight = c.hidden.detach().float().requires_grad_(), c.weight.detach().float().requires_grad_()
        logp, _ = ops.linear_logprob(leaf.half(), weight.half(), c.targets, temperature=0.8, **c.kept)
        grads = torch.autograd.grad(logp, (leaf, weight), c.g * 1e-3)
        c.h.zero_()
        want = oracle(c, None)
        for got, name in zip(grads, ("hidden", "weight"), strict=True):
            assert (1e3 * got.double() - want[name]).abs().max() < 1e-2 * want[name].abs().max()


def test_more_targets_and_sorting_take_smaller_chunks():
    hidden, weight, targets = torch.zeros(100, 8), torch.zeros(1000, 8), torch.zeros(100, 500, dtype=torch.int64)
    groups = {}
    for name, (ids, kept) in {
        "one": (targets[:, 0], None),
        "several": (targets, None),
        "sorting": (targets[:, 0], Kept(top_p=0.5)),
    }.items():
        groups[name] = len(chunked._logprob_job(hidden, weight, ids, 1.0, None, 0.1, kept).groups)
    assert groups["several"] > 2 * groups["one"] and groups["sorting"] > 2 * groups["one"]
    with pytest.raises(ValueError, match=r"workspace_mb: .* is too small for one row"):
        chunked._logprob_job(hidden, weight, targets, 1.0, None, 0.02, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": torch.zeros(5, 0, dtype=torch.int64)}, r"targets: expected \(5,\) or \(5, K\) with K >= 1, int64, got \(5, 0\)"),
        ({"targets": torch.zeros(4, 2, dtype=torch.int64)}, r"targets: expected \(5,\) or \(5, K\) with K >= 1, int64, got \(4, 2\)"),
        ({"targets": torch.zeros(5, 2)}, r"targets: expected .* int64, got \(5, 2\) torch.float32"),
        ({"targets": torch.zeros(5, 2, 1, dtype=torch.int64)}, r"targets: expected .* got \(5, 2, 1\)"),
        (
            {"targets": torch.tensor([[0, -1]] * 5)},
            r"targets: expected ids in \[0, 203\), got -1; fill up a row of fewer targets with -100",
        ),
        ({"top_k": -2}, "top_k: must be a whole number >= 1, got -2; None, 0 or -1 = all tokens"),
        ({"top_k": 2.5}, "top_k: must be a whole number"),
        ({"top_k": torch.ones(5)}, "top_k: expected a whole number for all rows, got a tensor; call once for the rows of each"),
        ({"top_p": torch.ones(5)}, "top_p: expected a number for all rows, got a tensor"),
        ({"top_p": 0.0}, r"top_p: must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, "top_p: must be in"),
        ({"top_p": math.nan}, "top_p: must be in"),
        ({"min_p": -0.1}, r"min_p: must be in \[0, 1\], got -0.1"),
        ({"min_p": math.nan}, "min_p: must be in"),
        ({"top_k": 5, "vocab_parallel": ops.VocabParallel(None, 0, 203, 203, 203)}, "vocab_parallel: not with top_k, top_p or min_p"),
    ],
)
def test_what_is_refused(arguments, message, monkeypatch):
    monkeypatch.setattr(ops.VocabParallel, "enter", lambda self, hidden: hidden)
    given = {"hidden": torch.zeros(5, 4), "weight": torch.zeros(203, 4), "targets": torch.zeros(5, dtype=torch.int64)} | arguments
    with pytest.raises(ValueError, match=message):
        ops.linear_logprob(**given)

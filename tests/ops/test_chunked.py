"""The CPU path against the reference in float64: values and gradients for every spec and chunking, GEMMs counted, memory measured."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from actial_fast import ops
from actial_fast.ops import chunked, chunked_logits, chunks, reference
from actial_fast.ops.spec import NAMED, GRPOSpec
from tests.head_cases import assert_agrees, doubled, error, make

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
SMALL = 0.017  # MiB: 12 to 36 rows of the small cases
LENGTHS = (5, 1, 9, 0, 12, 3, 7)


def grpo(f, case, spec, *, head=(), **changes):
    """loss, statistics and the gradients of hidden, weight and bias, from the op or from the reference."""
    names = ("token_weight", "cu_seqlens", "sampler_logp", "policy_mask", "entropy_weight", "bias", "temperature")
    rows = {name: changes.pop(name, getattr(case, name)) for name in names}
    out = f(case.hidden, case.weight, case.targets, case.advantages, case.old_logp, case.ref_logp, spec, **rows, **changes)
    grads = torch.autograd.grad(out[0], [case.hidden, case.weight, case.bias])
    return dict(zip(("loss", "stats", "hidden", "weight", "bias"), (out[0], out[1], *grads), strict=True))


def agrees(case, spec, *, workspace_mb=SMALL, skip_zero_rows=None, **changes) -> dict:
    dtype = case.hidden.dtype
    got = grpo(ops.linear_grpo_loss, case, spec, workspace_mb=workspace_mb, skip_zero_rows=skip_zero_rows, **changes)
    want, torchs = (grpo(reference.linear_grpo_loss, c, spec, **changes) for c in (doubled(case), case))
    assert got["stats"][0] == want["stats"][0], "tokens"
    terms = {"loss": float((case.token_weight * case.advantages).abs().sum())}
    assert_agrees(got, torchs, want, dtype, floor=1e-6 if dtype == torch.float64 else None, terms=terms)  # statistics are float32 always
    if dtype == torch.float64:
        del got["stats"], want["stats"]
        assert_agrees(got, torchs, want, dtype, terms=terms)
    return got


# ---- values and gradients

CHANGES = [
    {},
    {"beta": 0.0},
    {"beta": 0.3, "kl": "k1"},
    {"beta": 0.3, "kl": "k2", "kl_bias_correction": True},
    {"entropy_coef": 0.1},
    {"clip_high": 0.2, "clip_delta": 1.3, "dual_clip": 1.2},
    {"importance": "token_mask", "importance_min": 0.8, "importance_max": 1.3},
    {"importance": "sequence_truncate", "importance_max": 1.1},
]


@DTYPES
@pytest.mark.parametrize("name", NAMED)
def test_published_losses(dtype, name):
    case = make(lengths=LENGTHS, dtype=dtype)
    spec = GRPOSpec.named(name, beta=0.1, importance_max=1.2)
    got = agrees(case, spec, sampler_logp=case.sampler_logp)
    assert all(got[key].abs().max() > 0 for key in ("hidden", "weight", "bias"))


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_parts_of_a_spec(change):
    agrees(make(lengths=LENGTHS), GRPOSpec(**change))


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    H=st.integers(1, 20),
    V=st.integers(1, 60),
    name=st.sampled_from(sorted(NAMED)),
    change=st.sampled_from(CHANGES),
    workspace=st.floats(1.0, 40.0),
    softcap=st.none() | st.floats(0.5, 20),
    rows=st.booleans(),
    seed=st.integers(0, 10),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_any_shape_spec_and_chunking(lengths, H, V, name, change, workspace, softcap, rows, seed, dtype):
    case = make(lengths=lengths, H=H, V=V, dtype=dtype, seed=seed, softcap=softcap)
    longest = max(lengths) * (3 * V + 3 * H) * dtype.itemsize / 2**20  # what must fit
    spec = GRPOSpec.named(name, **change)
    changes = {"temperature": case.temperature if rows else 0.8, "softcap": softcap, "policy_mask": case.policy_mask if rows else None}
    agrees(case, spec, workspace_mb=1.01 * longest * workspace, **changes)


@DTYPES
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("what", ["logp", "entropy", "both"])
def test_log_probs_and_entropies(dtype, softcap, what):
    case = make(dtype=dtype, softcap=softcap)
    factors = (float(what != "entropy"), float(what != "logp"))

    def run(f, c, **more):
        logp, entropy = f(c.hidden, c.weight, c.targets, bias=c.bias, temperature=c.temperature, softcap=softcap, **more)
        total = sum(k * (c.old_logp * x).sum() for k, x in zip(factors, (logp, entropy), strict=True) if k)
        grads = torch.autograd.grad(total, [c.hidden, c.weight, c.bias])
        return dict(zip(("logp", "entropy", "hidden", "weight", "bias"), (logp, entropy, *grads), strict=True))

    got = run(ops.linear_logprob, case, workspace_mb=SMALL)
    assert_agrees(got, run(reference.linear_logprob, case), run(reference.linear_logprob, doubled(case)), dtype)
    assert got["logp"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert [got[n].dtype for n in ("hidden", "weight", "bias")] == [dtype] * 3


@DTYPES
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_cross_entropy(dtype, softcap):
    case = make(dtype=dtype)

    def run(f, c, **more):
        loss = f(c.hidden, c.weight, c.targets, c.token_weight, bias=c.bias, softcap=softcap, **more)
        return dict(
            zip(("loss", "hidden", "weight", "bias"), (loss, *torch.autograd.grad(loss, [c.hidden, c.weight, c.bias])), strict=True)
        )

    got = run(ops.linear_cross_entropy, case, workspace_mb=SMALL)
    assert_agrees(got, run(reference.linear_cross_entropy, case), run(reference.linear_cross_entropy, doubled(case)), dtype)
    assert (got["hidden"][case.token_weight == 0] == 0).all()


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_bf16_logits_are_not_rounded(scale):
    """Better than torch in bf16 by far: the operands are exact in float32."""
    case = make(T=64, H=64, V=200, dtype=torch.bfloat16, scale=scale)
    head = (case.hidden.detach(), case.weight.detach(), case.targets)
    want = reference.linear_logprob(*(x.double() if x.is_floating_point() else x for x in head))
    ours, torchs = ops.linear_logprob(*head, workspace_mb=0.5), reference.linear_logprob(*head)
    for a, b, w in zip(ours, torchs, want, strict=True):
        assert error(a, w) < 1e-5 < 0.01 * error(b, w)


@pytest.mark.parametrize("spoil", [lambda g: 0 * g, lambda g: 1.05 * g, lambda g: -g, lambda g: g.flip(0), lambda g: g + math.nan])
@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_wrong_gradient_fails_the_comparison(dtype, spoil, name, monkeypatch):
    case, spec = make(lengths=LENGTHS, dtype=dtype), GRPOSpec(beta=0.1)
    agrees(case, spec)
    backward, at = chunked._LinearLoss.backward, ("hidden", "weight", "bias").index(name)

    def spoiled(ctx, *upstream):
        return tuple(spoil(g) if i == at else g for i, g in enumerate(backward(ctx, *upstream)))

    monkeypatch.setattr(chunked._LinearLoss, "backward", staticmethod(spoiled))
    with pytest.raises(AssertionError, match=f"^{name}: off by"):
        agrees(case, spec)


def test_gradients_are_the_derivatives():
    """Finite differences, for the objectives whose gradient is that of their value."""
    case = make(T=5, H=2, V=5, seed=1)
    head, rows = (case.hidden, case.weight, case.bias), (case.advantages, case.old_logp, case.ref_logp)
    more = {"temperature": case.temperature, "softcap": 3.0, "workspace_mb": 0.0006}
    for spec in (GRPOSpec(beta=0.3, entropy_coef=0.2), GRPOSpec(objective="sapo"), GRPOSpec(ratio="sequence", clip_low=0.1)):
        more_rows = {"token_weight": case.token_weight, "cu_seqlens": torch.tensor([0, 3, 5]), **more}
        assert torch.autograd.gradcheck(
            lambda h, w, b, s=spec, m=more_rows: ops.linear_grpo_loss(h, w, case.targets, *rows, s, bias=b, **m).loss, head
        )
    assert torch.autograd.gradcheck(lambda h, w, b: ops.linear_logprob(h, w, case.targets, bias=b, **more), head)
    logits = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.logprob_from_logits(x, case.targets[:5], temperature=0.7), (logits,))


# ---- chunks


def test_the_chunks_do_not_matter():
    """Only the order of sums changes with them: rounding of float32."""
    case, spec = make(T=101, V=70, dtype=torch.float32), GRPOSpec(beta=0.1, entropy_coef=0.1)
    whole = grpo(ops.linear_grpo_loss, case, spec)
    for rows in (1, 2, 7, 33, 100):
        workspace = rows * (3 * 70 + 3 * 12) * 4 / 2**20
        assert len(chunks.plan(case.hidden, case.weight, workspace)[0]) == math.ceil(101 / rows)
        part = grpo(ops.linear_grpo_loss, case, spec, workspace_mb=workspace)
        for name in whole:
            assert error(part[name], whole[name]) < 2e-6, (rows, name)


def test_chunks_are_cut_between_sequences_and_within_longer_ones():
    hidden, weight = torch.zeros(37, 12), torch.zeros(29, 12)
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0)
    row = (3 * 29 + 3 * 12) * 4 / 2**20

    def plan(rows, *more):
        return [[(c.start, c.stop) for c in chunks] for chunks in chunks.plan(hidden, weight, rows * row, *more)[0]]

    assert plan(13, cu_seqlens) == [[(0, 6)], [(6, 15)], [(15, 27)], [(27, 37)]]
    assert plan(9, cu_seqlens) == [[(0, 6)], [(6, 15)], [(15, 24), (24, 27)], [(27, 30)], [(30, 37)]]
    assert plan(37, cu_seqlens) == [[(0, 37)]]
    assert plan(20) == [[(0, 20)], [(20, 37)]]


@pytest.mark.parametrize("spec", ["gspo", "vespo", "sequence_truncate"])
def test_a_sequence_may_be_longer_than_a_chunk(spec, monkeypatch):
    """One more product for its rows, and the same numbers."""
    case, row = make(lengths=LENGTHS, dtype=torch.float32), (3 * 29 + 3 * 12) * 4 / 2**20
    spec = GRPOSpec(importance=spec) if spec.startswith("sequence") else GRPOSpec.named(spec, beta=0.1)
    more = {"cu_seqlens": case.cu_seqlens, "sampler_logp": case.sampler_logp, "skip_zero_rows": False}
    whole = grpo(ops.linear_grpo_loss, case, spec, **more)
    done, mm, addmm = [], torch.mm, torch.addmm
    monkeypatch.setattr(torch, "mm", lambda a, b, **to: done.append(a.shape[0] * a.shape[1] * b.shape[1]) or mm(a, b, **to))
    monkeypatch.setattr(torch, "addmm", lambda x, a, b, **to: done.append(a.shape[0] * a.shape[1] * b.shape[1]) or addmm(x, a, b, **to))
    for rows in (12, 9, 3):
        done.clear()
        cut = grpo(ops.linear_grpo_loss, case, spec, workspace_mb=rows * row, **more)
        for name in whole:
            assert error(cut[name], whole[name]) < 1e-5, (rows, name)
        longer = sum(n for n in LENGTHS if n > rows)
        assert sum(done) == (3 * 37 + longer) * 12 * 29


def test_a_workspace_that_is_too_small_names_the_one_that_is_not():
    case = make(lengths=LENGTHS)
    for spec, cu_seqlens in ((GRPOSpec(), None), (GRPOSpec.named("gspo"), case.cu_seqlens)):
        case.hidden = torch.zeros(37, 500, dtype=torch.float64, requires_grad=True)
        case.weight = torch.zeros(29, 500, dtype=torch.float64, requires_grad=True)
        with pytest.raises(ValueError, match=r"^workspace_mb: 0\.001 is too small for one row.* it takes workspace_mb=[0-9.]+$") as raised:
            grpo(ops.linear_grpo_loss, case, spec, workspace_mb=0.001, cu_seqlens=cu_seqlens)
        grpo(ops.linear_grpo_loss, case, spec, workspace_mb=float(str(raised.value).split("=")[-1]), cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match=r"^workspace_mb: 0\.001 is too small for one row"):
        ops.linear_logprob(case.hidden, case.weight, case.targets, workspace_mb=0.001)


@pytest.mark.parametrize("skip", [True, False])
def test_rows_without_a_gradient_may_be_left_out(skip):
    case, spec = make(lengths=LENGTHS), GRPOSpec(beta=0.0)
    case.advantages[5:20] = 0
    got = agrees(case, spec, skip_zero_rows=skip)
    assert (got["hidden"][5:20] == 0).all()


def test_a_logit_of_minus_infinity_is_a_token_that_cannot_be():
    case = make(T=9, V=12)
    with torch.no_grad():
        case.bias[4] = -math.inf
    case.targets[case.targets == 4] = 5
    logp, entropy = ops.linear_logprob(case.hidden, case.weight, case.targets, bias=case.bias)
    kept = torch.arange(12) != 4
    want = reference.linear_logprob(case.hidden, case.weight[kept], case.targets - (case.targets > 4).long(), bias=case.bias[kept])
    assert error(logp, want[0]) < 1e-12 and error(entropy, want[1]) < 1e-12
    (ours,), (theirs,) = (torch.autograd.grad((x + y).sum(), case.hidden) for x, y in ((logp, entropy), want))
    assert error(ours, theirs) < 1e-12


# ---- GEMMs


def gemms(f, T, H, V) -> float:
    counter = FlopCounterMode(display=False)
    with counter:
        f()
    return counter.get_total_flops() / (2 * T * H * V)


T, H, V = 48, 8, 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_gemms(dtype):
    """3, 2 and 1 of T * H * V for the losses; 1, 4 and 3 for log-probs."""
    case, spec = make(T=T, H=H, V=V, dtype=dtype), GRPOSpec(beta=0.1)
    case.token_weight = torch.full_like(case.token_weight, 1 / T)
    rows = (case.advantages, case.old_logp, case.ref_logp, spec)
    ops_of = {
        "grpo": lambda w: ops.linear_grpo_loss(case.hidden, w, case.targets, *rows, workspace_mb=SMALL).loss,
        "cross-entropy": lambda w: ops.linear_cross_entropy(case.hidden, w, case.targets, case.token_weight, workspace_mb=SMALL),
        "log-prob": lambda w: ops.linear_logprob(case.hidden, w, case.targets, workspace_mb=SMALL)[0].sum(),
    }
    for name, op in ops_of.items():
        trained, frozen = (4, 3) if name == "log-prob" else (3, 2)
        assert gemms(lambda op=op: op(case.weight).backward(), T, H, V) == trained, name
        assert gemms(lambda op=op: op(case.weight.detach()).backward(), T, H, V) == frozen, name
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert gemms(lambda op=op: op(case.weight), T, H, V) == 1, name


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_gemms_with_rows_without_a_gradient(share):
    case = make(T=T, H=H, V=V)
    case.advantages = torch.ones(T, dtype=torch.float64)
    case.advantages[torch.randperm(T, generator=torch.Generator().manual_seed(0))[: int(share * T)]] = 0

    def loss(weight, **more):
        return ops.linear_grpo_loss(case.hidden, weight, case.targets, case.advantages, None, None, GRPOSpec(beta=0), **more).loss

    for mb in (SMALL, 700):
        assert gemms(lambda mb=mb: loss(case.weight, workspace_mb=mb), T, H, V) == 1 + 2 * (1 - share)
    assert gemms(lambda: loss(case.weight.detach()), T, H, V) == 2 - share
    assert gemms(lambda: loss(case.weight, skip_zero_rows=False), T, H, V) == 3


def test_top_entropy_costs_one_more_gemm():
    case = make(T=T, H=H, V=V)
    spec = GRPOSpec(beta=0, top_entropy=0.5)
    rows = (case.targets, case.advantages, None, None, spec)
    assert gemms(lambda: ops.linear_grpo_loss(case.hidden, case.weight, *rows, skip_zero_rows=False), T, H, V) == 4


# ---- memory


class Watch(TorchDispatchMode):
    """The largest tensor, and the most bytes alive, of all that operators make while it watches; `known` and what views it is left out."""

    def __init__(self, *known: torch.Tensor | None):
        super().__init__()
        self.known = {x.untyped_storage()._cdata for x in known if x is not None}
        self.alive, self.largest, self.peak = WeakIdKeyDictionary(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.known:
                self.alive[x.untyped_storage()] = x.untyped_storage().nbytes()
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


MB = 2**20


@pytest.mark.parametrize(
    ("op", "dtype"),
    [(op, torch.float32) for op in ("grpo", "softcap", "cross-entropy", "log-prob", "no grad")]
    + [(op, torch.bfloat16) for op in ("grpo", "log-prob")],
    ids=lambda x: str(x).removeprefix("torch."),
)
@pytest.mark.parametrize("T", [130, 390])
def test_memory_stays_within_the_workspace_whatever_the_number_of_rows(dtype, op, T):
    H, V, budget = 24, 1500, 1.0
    case = make(T=T, H=H, V=V, dtype=dtype)
    rows = (case.targets, case.advantages, case.old_logp, case.ref_logp)
    buffer = torch.zeros(V, H)
    inputs = (*(x for x in vars(case).values() if isinstance(x, torch.Tensor)), buffer)
    weight = case.weight.detach() if op == "no grad" else case.weight
    hidden = case.hidden.detach() if op == "no grad" else case.hidden
    with Watch(*inputs) as watch:
        if op == "cross-entropy":
            ops.linear_cross_entropy(hidden, weight, case.targets, case.token_weight, weight_grad=buffer, workspace_mb=budget).backward()
        elif op in ("log-prob", "no grad"):
            logp, entropy = ops.linear_logprob(hidden, weight, case.targets, workspace_mb=budget)
            if op == "log-prob":
                torch.autograd.backward([logp, entropy], [case.old_logp, case.ref_logp])
        else:
            cap = {"softcap": 5.0} if op == "softcap" else {}
            spec = GRPOSpec(beta=0.1, entropy_coef=0.1)
            ops.linear_grpo_loss(hidden, weight, *rows, spec, weight_grad=buffer, workspace_mb=budget, **cap).loss.backward()
    dhidden = T * H * dtype.itemsize * (op != "no grad")
    dweight = V * H * (4 + (dtype.itemsize if dtype != torch.float32 else 0)) * (op == "log-prob")
    vectors = 10 * T * 4  # log-probs, entropies, their gradients and the checks' masks
    above = watch.peak - dhidden - dweight - vectors
    assert 0.4 * budget * MB < above <= budget * MB, f"{above / MB:.2f} MiB"
    assert watch.largest < T * V / 2


def test_no_second_tensor_of_the_logits_size_in_place():
    T, V = 64, 4096
    targets, logits = torch.randint(0, V, (T,)), torch.randn(T, V)
    chunk = chunked_logits.WORKSPACE
    try:
        chunked_logits.WORKSPACE = 3 * 4 * V * 8  # 8 rows
        copy = logits.clone().requires_grad_()
        want = torch.autograd.grad(sum(x.sum() for x in ops.logprob_from_logits(copy, targets)), copy)[0]
        x = logits.clone().requires_grad_()
        with Watch(x, logits, targets) as watch:
            logp, entropy = ops.logprob_from_logits(x, targets, inplace_backward=True)
            (logp.sum() + entropy.sum()).backward()
    finally:
        chunked_logits.WORKSPACE = chunk
    assert watch.largest == 8 * V and watch.peak < 4 * 8 * V * 4
    assert x.grad.data_ptr() == x.data_ptr() and torch.equal(x.grad, want)

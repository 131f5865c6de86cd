"""The bugs that other fused losses had, a test each: on the CPU path and on the Triton kernels (interpreted where there is no GPU)."""

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from actial_fast import ops
from actial_fast.ops import reference
from actial_fast.ops.reference import STATS, token_weights
from actial_fast.ops.spec import AdvantageSpec, GRPOSpec
from bench.kernels.accuracy import DEVICE, as_if_on_a_gpu
from tests.head_cases import difference

PATHS = ("triton",) if DEVICE == "cuda" else ("cpu", "triton")
BOTH = pytest.mark.parametrize("path", PATHS)
GPU = pytest.mark.gpu
NEEDS_GPU = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
ROWS_BEYOND_A_GRID = 70_000  # a grid's y and z axes end at 65,535


def on(path: str):
    """Inside, ops on this machine's tensors take the path."""
    return as_if_on_a_gpu() if path == "triton" and DEVICE == "cpu" else contextlib.nullcontext()


def make(lengths=(5, 1, 4, 2, 3, 1), H=12, V=37, seed=0, scale=1.0, dtype=torch.float32, device=DEVICE) -> SimpleNamespace:
    """Packed rows whose old and reference log-probs lie near the policy's."""
    g = torch.Generator().manual_seed(seed)
    T = sum(lengths)
    hidden = torch.randn(T, H, generator=g).to(dtype)
    weight = (torch.randn(V, H, generator=g) * scale / math.sqrt(H)).to(dtype)
    targets = torch.randint(0, V, (T,), generator=g)
    logp, _ = reference.linear_logprob(hidden.double(), weight.double(), targets)
    noise = torch.randn(3, T, generator=g, dtype=torch.float64)
    rows = {
        "old_logp": logp + 0.25 * noise[0],
        "ref_logp": logp + 0.25 * noise[1],
        "sampler_logp": logp + 0.25 * noise[2],
        "advantages": torch.randn(len(lengths), generator=g, dtype=torch.float64).repeat_interleave(torch.tensor(lengths)),
    }
    mask = torch.rand(T, generator=g) > 0.2
    return SimpleNamespace(
        hidden=hidden.to(device),
        weight=weight.to(device),
        targets=targets.to(device),
        mask=mask.to(device),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        **{name: row.float().to(device) for name, row in rows.items()},
    )


def grpo(case, spec, rows=slice(None), cu_seqlens=None, **changes):
    """loss, statistics and gradients of the case's rows through the public op."""
    hidden, weight = case.hidden[rows].clone().requires_grad_(), case.weight.clone().requires_grad_()
    arguments = {name: getattr(case, name)[rows] for name in ("targets", "advantages", "old_logp", "ref_logp")}
    arguments |= {"cu_seqlens": case.cu_seqlens if cu_seqlens is None else cu_seqlens} | changes
    out = ops.linear_grpo_loss(hidden, weight, spec=spec, **arguments)
    wanted = (hidden,) if arguments.get("weight_grad") is not None else (hidden, weight)
    dhidden, *dweight = torch.autograd.grad(out.loss, wanted)
    return SimpleNamespace(loss=out.loss.detach(), stats=out.stats, logp=out.logp, dhidden=dhidden, dweight=dweight[0] if dweight else None)


# ---- fused log-probs of up to +123 (verl#2656)


def check_probabilities(path, T, V, scale, seed):
    """Every token of every row as the target."""
    case = make((1,) * T, H=8, V=V, seed=seed, scale=scale)
    every_target = torch.arange(V, device=DEVICE).repeat(T)
    with on(path):
        logp, entropy = ops.linear_logprob(case.hidden.repeat_interleave(V, 0), case.weight, every_target)
        fused = ops.linear_grpo_loss(
            case.hidden, case.weight, case.targets, torch.ones(T, device=DEVICE), None, None, GRPOSpec(beta=0.0), cu_seqlens=case.cu_seqlens
        )
    assert (logp <= 0).all() and (fused.logp <= 0).all() and (entropy >= 0).all() and (fused.entropy >= 0).all()
    total = logp.view(T, V).double().exp().sum(1)
    assert (total - 1).abs().max() < 1e-5 * (1 + scale / 10)


@settings(max_examples=40, deadline=None)
@given(T=st.integers(1, 5), V=st.integers(1, 140), scale=st.sampled_from([0.1, 4.0, 60.0, 1000.0]), seed=st.integers(0, 99))
def test_verl_2656_log_probs_are_never_positive_and_probabilities_sum_to_one(T, V, scale, seed):
    check_probabilities(PATHS[0], T, V, scale, seed)


@pytest.mark.parametrize(("V", "scale"), [(15, 1000.0), (66, 60.0)])
def test_verl_2656_log_probs_of_the_kernels(V, scale):
    check_probabilities("triton", 1, V, scale, seed=0)


@BOTH
@pytest.mark.parametrize("V", [1920, 1056, 1025, 999], ids=["896 left of 1024, as of 129920", "33 * 32", "one more", "odd"])
def test_verl_2899_vocabularies_that_no_block_divides(path, V):
    """Peaked rows of negative logits, where a column that is not there and counts as a logit of 0 would take all of the probability."""
    case = make((4, 3), H=8, V=V, scale=6.0)
    case.hidden[:, 0], case.weight[:, 0] = 10.0, -10.0
    hidden, weight = (x.double().requires_grad_() for x in (case.hidden, case.weight))
    want, want_entropy = reference.linear_logprob(hidden, weight, case.targets)
    given = [x.clone().requires_grad_() for x in (case.hidden, case.weight)]
    with on(path):
        logp, entropy = ops.linear_logprob(*given, case.targets)
        ((0.3 * logp).sum() + entropy.sum()).backward()
    ((0.3 * want).sum() + want_entropy.sum()).backward()
    assert want.max() < 0 and (logp - want).abs().max() < 1e-4 and (entropy - want_entropy).abs().max() < 1e-4
    for mine, exact in zip(given, (hidden, weight), strict=True):
        assert (mine.grad - exact.grad).norm() < 1e-4 * exact.grad.norm()


@BOTH
def test_verl_2656_the_log_prob_of_a_certain_token_is_zero(path):
    hidden, weight = torch.full((3, 4), 50.0, device=DEVICE), torch.zeros(70, 4, device=DEVICE)
    weight[66] = 1.0
    with on(path):
        logp, entropy = ops.linear_logprob(hidden, weight, torch.tensor([66, 0, 69], device=DEVICE))
    assert logp.tolist() == [0.0, -200.0, -200.0] and entropy.abs().max() < 1e-30


# ---- a gradient norm 100 times too large, from a normaliser that drifts with the split (Liger#1082)


AGGREGATIONS = ("token", "sequence", "sequence_sum", "constant")
SPLITS = ([3], [1, 2], [5], [1, 2, 3, 4, 5])
DRIFT = [("cpu", a, buffer, SPLITS) for a in AGGREGATIONS for buffer in (False, True)] if DEVICE == "cpu" else []
DRIFT += [("triton", "token", True, ([2],)), ("triton", "sequence", False, ([1, 4],))]  # the weights are the caller's: two will do


@pytest.mark.parametrize(("path", "aggregation", "buffer", "splits"), DRIFT)
def test_liger_1082_micro_batches_add_up_to_the_gradient_of_the_global_batch(path, aggregation, buffer, splits):
    case, spec = make(), GRPOSpec(aggregation=aggregation, beta=0.04, entropy_coef=0.01)
    S = len(case.cu_seqlens) - 1
    counts = {"tokens": case.mask.sum(), "sequences": S, "max_length": 16}
    cu_seqlens = case.cu_seqlens.tolist()

    def gradient(cuts):
        """(dhidden, dweight, loss) with sequences [0, S) cut there."""
        dhidden, loss = [], 0.0
        dweight = torch.zeros_like(case.weight)
        for first, last in zip([0, *cuts], [*cuts, S], strict=True):
            rows = slice(cu_seqlens[first], cu_seqlens[last])
            inside = case.cu_seqlens[first : last + 1] - rows.start
            token_weight = token_weights(spec, inside, mask=case.mask[rows], **counts)
            out = grpo(case, spec, rows, inside, token_weight=token_weight, weight_grad=dweight if buffer else None)
            dhidden.append(out.dhidden)
            dweight += 0 if buffer else out.dweight
            loss += out.loss.item()
        return torch.cat(dhidden), dweight, torch.tensor(loss)

    with on(path):
        whole = gradient([])
        for cuts in splits:
            for got, want in zip(gradient(cuts), whole, strict=True):
                assert difference(got, want) < 1e-5, cuts
    assert whole[1].norm() > 1e-3


# ---- grids that overflow past 65,535 tokens (Liger#1294)


def long_case(T, device):
    vector = {name: torch.zeros(T, device=device) for name in ("advantages", "old_logp", "ref_logp", "sampler_logp")}
    matrix = {"hidden": torch.zeros(T, 16, device=device), "weight": torch.zeros(32, 16, device=device)}
    logits = torch.zeros(T, 32, device=device)
    return SimpleNamespace(**vector, **matrix, logits=logits, targets=torch.zeros(T, dtype=torch.int64, device=device))


def call_everything(case, T):
    """Every op, forward and backward, over the case's T rows; the results of those that can be compared with one another."""
    hidden, weight, logits = (getattr(case, name).clone().requires_grad_() for name in ("hidden", "weight", "logits"))
    ones = torch.ones(T, device=hidden.device)
    rows = (case.targets, case.advantages, case.old_logp, case.ref_logp)
    spec, out = GRPOSpec(beta=0.04), {}
    logp, entropy = ops.linear_logprob(hidden, weight, case.targets)
    out["linear_logprob"] = (logp, *torch.autograd.grad((logp + entropy).sum(), (hidden, weight)))
    loss = ops.linear_grpo_loss(hidden, weight, *rows, spec, token_weight=ones / T)
    out["linear_grpo_loss"] = (loss.logp, *torch.autograd.grad(loss.loss, (hidden, weight)))
    loss = ops.linear_cross_entropy(hidden, weight, case.targets, ones)
    out["linear_cross_entropy"] = (loss, *torch.autograd.grad(loss, (hidden, weight)))
    kl = ops.linear_kl(hidden, weight, case.hidden, case.weight)
    out["linear_kl"] = (kl, *torch.autograd.grad(kl.sum(), (hidden, weight)))
    logp, entropy = ops.logprob_from_logits(logits, case.targets)
    out["logprob_from_logits"] = (logp, *torch.autograd.grad((logp + entropy).sum(), logits))
    loss = ops.grpo_loss_from_logits(logits, *rows, spec, token_weight=ones / T)
    out["grpo_loss_from_logits"] = (loss.logp, *torch.autograd.grad(loss.loss, logits))
    old = case.old_logp.clone().requires_grad_()
    kl = ops.token_kl(old, case.ref_logp)
    out["token_kl"] = (kl, *torch.autograd.grad(kl.sum(), old))
    groups = torch.arange(T, device=hidden.device) // 2
    out["group_advantages"] = (ops.group_advantages(case.advantages, groups, AdvantageSpec()),)
    return out


@GPU
@NEEDS_GPU
def test_liger_1294_more_rows_than_a_grid_axis_holds():
    """The first and the last rows get the same values, and as many rows by themselves get the same again."""
    T = ROWS_BEYOND_A_GRID
    case = long_case(T, DEVICE)
    g = torch.Generator(DEVICE).manual_seed(0)
    for name in ("hidden", "logits", "advantages", "old_logp", "ref_logp"):
        row = torch.randn(50, *getattr(case, name).shape[1:], generator=g, device=DEVICE)
        getattr(case, name).copy_(row.repeat(T // 50, *[1] * (row.ndim - 1)))
    case.weight.normal_(generator=g)
    torch.cuda.synchronize()
    few = SimpleNamespace(**{name: value if name == "weight" else value[:50] for name, value in vars(case).items()})
    for name, results in call_everything(few, 50).items():
        many = call_everything(case, T)[name]
        for got, want in zip(many, results, strict=True):
            if got.shape and got.shape[0] == T and name != "group_advantages":
                got = got * (T / 50 if got.abs().max() < want.abs().max() / 100 else 1)  # a mean over T rows
                assert difference(got[:50], want) < 1e-5 and difference(got[-50:], want) < 1e-5, name


@pytest.mark.skipif(DEVICE == "cuda", reason="the test above runs it")
def test_liger_1294_every_launch_of_70000_rows_fits_a_grid():
    """The launchers are called for real; what they would launch is recorded instead of run."""
    from triton.runtime.interpreter import GridExecutor

    grids = {}

    def record(self, *args, **kwargs):
        grid = self.grid(kwargs) if callable(self.grid) else self.grid
        grids.setdefault(self.fn.__name__, []).append(tuple(grid))

    with pytest.MonkeyPatch.context() as patch, as_if_on_a_gpu():
        patch.setattr(GridExecutor, "__call__", record)
        call_everything(long_case(ROWS_BEYOND_A_GRID, "cpu"), ROWS_BEYOND_A_GRID)
    assert len(grids) >= 8, f"kernels seen: {sorted(grids)}"
    for name, launched in grids.items():
        for grid in launched:
            limits = (2**31 - 1, 65_535, 65_535)
            assert all(0 < size <= limit for size, limit in zip(grid, limits, strict=False)), (name, grid)


@pytest.mark.skipif(DEVICE == "cuda", reason="the test above runs it")
def test_liger_1294_the_cpu_path_with_70000_rows():
    case = long_case(ROWS_BEYOND_A_GRID, "cpu")
    for name, results in call_everything(case, ROWS_BEYOND_A_GRID).items():
        for result in results:
            assert result.isfinite().all(), name
    logp = call_everything(case, ROWS_BEYOND_A_GRID)["linear_logprob"][0]
    assert (logp + math.log(32)).abs().max() < 1e-6


# ---- NaN when all logits are strongly negative (SkyRL#2141)


@BOTH
@pytest.mark.parametrize(("V", "offset"), [(37, -1e4), (130, -1e30)])
def test_skyrl_2141_all_logits_strongly_negative(path, V, offset):
    case = make(V=V)
    T = len(case.targets)
    hidden, weight = torch.ones(T, 4, device=DEVICE), torch.full((V, 4), offset / 4, device=DEVICE)
    hidden.requires_grad_(), weight.requires_grad_()
    rows = (case.targets, case.advantages, None, None, GRPOSpec(beta=0.0))
    few = slice(0, 3)
    logits, some = torch.full((3, V), offset, device=DEVICE, requires_grad=True), case.targets[few]
    with on(path):
        loss = ops.linear_grpo_loss(hidden, weight, *rows)
        dhidden, dweight = torch.autograd.grad(loss.loss, (hidden, weight))
        logp, entropy = ops.linear_logprob(hidden, weight, case.targets)
        gradients = torch.autograd.grad((logp + entropy).sum(), (hidden, weight))
        from_logits, entropy_of_logits = ops.logprob_from_logits(logits, some)
        (dlogits,) = torch.autograd.grad(from_logits.sum(), logits)
        loss_of_logits = ops.grpo_loss_from_logits(logits, some, case.advantages[few], *rows[2:])
    for got in (loss.logp, logp, from_logits, loss_of_logits.logp):  # the distribution is uniform
        assert (got + math.log(V)).abs().max() < 1e-5
    for got in (loss.entropy, entropy, entropy_of_logits, loss_of_logits.entropy):
        assert (got - math.log(V)).abs().max() < 1e-5
    for got in (loss.loss, loss.stats, dhidden, dweight, *gradients, dlogits, loss_of_logits.loss):
        assert got.isfinite().all()
    onehot = torch.nn.functional.one_hot(case.targets, V).float()
    assert (dlogits - (onehot[few] - 1 / V)).abs().max() < 1e-6
    assert difference(dweight, -((case.advantages / T)[:, None] * (onehot - 1 / V)).T @ hidden.detach()) < 1e-5


@BOTH
def test_skyrl_2141_some_logits_minus_infinity(path):
    """A vocabulary with banned tokens, a whole block of them."""
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    logits[:, :160] = -math.inf
    logits[1, 200:] = -math.inf
    targets = torch.tensor([170, 180, 299, 161])
    want = logits.double().log_softmax(-1)
    logits, targets = logits.to(DEVICE).requires_grad_(), targets.to(DEVICE)
    with on(path):
        logp, entropy = ops.logprob_from_logits(logits, targets)
        (dlogits,) = torch.autograd.grad((logp + entropy).sum(), logits)
    exact = want.gather(1, targets.cpu()[:, None]).squeeze(1)
    exact_entropy = -(want.exp() * want.masked_fill(want == -math.inf, 0)).sum(1)
    assert difference(logp.detach().cpu().double(), exact) < 1e-6 and difference(entropy.detach().cpu().double(), exact_entropy) < 1e-6
    assert dlogits.isfinite().all() and not dlogits[:, :160].any()


# ---- k3 as exp(d) - d - 1 cancels for small d


def is_k3(got: torch.Tensor, d: torch.Tensor) -> bool:
    """Whether got is expm1(d) - d up to float32's rounding of d, and of itself, and not of 1."""
    d = d.double()
    exact = torch.expm1(d) - d
    return bool(((got.double() - exact).abs() <= 2.5e-7 * d.abs() + 1e-6 * exact).all() and (got >= 0).all())


@BOTH
def test_k3_does_not_cancel_for_small_differences(path):
    d = torch.tensor([sign * 10.0**e for e in range(-7, 1) for sign in (1, -1)], device=DEVICE)
    logp = torch.zeros_like(d).requires_grad_()
    few = d[4:8]  # +-1e-5, +-1e-4
    one = torch.zeros(len(few), 1, device=DEVICE)  # of a vocabulary of one token every log-prob is exactly 0
    targets, stats = torch.zeros(1, dtype=torch.int64, device=DEVICE), []
    with on(path):
        kl = ops.token_kl(logp, d)
        (slope,) = torch.autograd.grad(kl.sum(), logp)
        for i in range(len(few)):
            rows = (targets, one[i], None, few[i : i + 1], GRPOSpec(beta=1.0))
            fused = (ops.grpo_loss_from_logits(one[i : i + 1], *rows), ops.linear_grpo_loss(one[i : i + 1], one[:1], *rows))
            stats.append([out.stats[STATS.index("kl")] for out in fused])
    assert is_k3(kl.detach(), d)
    assert all(is_k3(torch.stack(got), few) for got in zip(*stats, strict=True))
    rounding = 1.2e-7 if path == "cpu" else 0.0  # torch's derivative of expm1(d) - d is exp(d) - 1: rounded once at 1
    assert ((slope.double() + torch.expm1(d.double())).abs() <= 4e-7 * torch.expm1(d.double()).abs() + rounding).all()
    assert not is_k3(torch.exp(d) - d - 1, d), "this test would let the cancelling formula pass"


# ---- host syncs on the loss scale and on masks


class NoHostSync(TorchDispatchMode):
    """Fails on what makes the CPU wait for a GPU: reading a value, sizes that depend on values, masks as indices.

    int32 tensors (cu_seqlens) and what is computed from them alone lie on the CPU: reading these is free.
    """

    SYNCS = frozenset(
        {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "unique", "_unique2", "unique_dim"}
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_host = bool(tensors) and all(x.dtype == torch.int32 or hasattr(x, "on_host") for x in tensors)
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(x is not None and x.dtype == torch.bool for x in args[1])
        sizes = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if not on_host and (name in self.SYNCS or masks or sizes):
            raise AssertionError(f"{func} makes the host wait for the device")
        out = func(*args, **(kwargs or {}))
        if on_host and isinstance(out, torch.Tensor):
            out.on_host = True
        return out


@contextlib.contextmanager
def no_host_sync():
    """On a GPU the driver watches; without one the dispatcher does, under the code that a GPU would run."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    else:
        with NoHostSync():
            yield


SPECS = {
    "kl, entropy bonus, top entropies": GRPOSpec.named("grpo", beta=0.04, entropy_coef=0.01, top_entropy=0.3),
    "zero rows skipped": GRPOSpec.named("dapo"),
    "whole sequences": GRPOSpec.named("gspo", importance="sequence_mask"),
}


@pytest.mark.parametrize("name", SPECS)
def test_no_host_sync_in_the_grpo_loss(name):
    case, spec = make(), SPECS[name]
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    scale, buffer, temperature = torch.tensor(0.5, device=DEVICE), torch.zeros_like(weight), torch.full_like(case.advantages, 0.9)
    rows = (case.targets, case.advantages, case.old_logp, case.ref_logp, spec)
    named = {"cu_seqlens": case.cu_seqlens, "sampler_logp": case.sampler_logp}

    def run():
        masked = {**named, "token_weight": token_weights(spec, case.cu_seqlens, mask=case.mask)}
        out = ops.linear_grpo_loss(hidden, weight, *rows, **masked, temperature=temperature)
        torch.autograd.grad(out.loss * scale, (hidden, weight))
        torch.autograd.grad(ops.linear_grpo_loss(hidden, weight, *rows, **named, weight_grad=buffer).loss, hidden)

    with on("triton"):
        if DEVICE == "cuda":
            run()  # compiles the kernels, which may wait
        with no_host_sync():
            run()
            with torch.no_grad():
                ops.linear_grpo_loss(hidden, weight, *rows, **named)
    assert buffer.abs().sum() > 0


def test_no_host_sync_in_the_other_ops():
    case = make()
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    few = slice(0, 2)
    logits = torch.randn(2, len(weight), device=DEVICE).requires_grad_()
    token_weight = case.mask.float()
    old = case.old_logp.clone().requires_grad_()
    groups = torch.arange(len(hidden), device=DEVICE) // 4
    rewards = torch.randn(len(hidden), 2, device=DEVICE)
    rows = (case.targets[few], case.advantages[few], case.old_logp[few], case.ref_logp[few], GRPOSpec(beta=0.04))

    def everything():
        logp, entropy = ops.linear_logprob(hidden, weight, case.targets)
        torch.autograd.grad(logp.sum() + entropy.sum(), (hidden, weight))
        torch.autograd.grad(ops.linear_cross_entropy(hidden, weight, case.targets, token_weight), (hidden, weight))
        torch.autograd.grad(ops.linear_kl(hidden, weight, case.hidden.detach(), case.weight.detach()).sum(), (hidden, weight))
        torch.autograd.grad(ops.logprob_from_logits(logits, case.targets[few])[0].sum(), logits)
        torch.autograd.grad(ops.grpo_loss_from_logits(logits, *rows, token_weight=token_weight[few]).loss, logits)
        torch.autograd.grad(ops.token_kl(old, case.ref_logp).sum(), old)
        for spec in (AdvantageSpec(), AdvantageSpec("leave_one_out", "batch_std"), AdvantageSpec(combine="normalize_then_sum")):
            ops.group_advantages(rewards, groups, spec)

    with on("triton"):
        if DEVICE == "cuda":
            everything()
        with no_host_sync():
            everything()


@pytest.mark.parametrize(
    "sync",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: float(x[0]),
        lambda x: torch.repeat_interleave(x, torch.ones(len(x), dtype=torch.int64, device=x.device)),
    ],
    ids=["item", "bool", "mask as index", "nonzero", "float", "repeat_interleave"],
)
def test_a_host_sync_is_noticed(sync):
    """The two tests above prove something only if this one holds."""
    x = torch.arange(4.0, device=DEVICE)
    with pytest.raises((AssertionError, RuntimeError)), no_host_sync():
        sync(x)


# ---- a near-vacuous loss test: with old log-probs far from the policy a gradient of zero passes (see also test_trl.py)


@BOTH
def test_most_rows_near_the_policy_have_a_gradient_and_far_ones_have_none(path):
    """Why the inputs of the loss tests lie near the policy: a clipped objective far from it is flat, and any gradient test of it empty."""
    case, spec = make((4,) * 4), GRPOSpec(beta=0.0)
    with on(path):
        near = grpo(case, spec)
        case.old_logp = case.old_logp - 10 * case.advantages.sign()  # every ratio is far on the clipped side
        far = grpo(case, spec)
    assert (near.dhidden != 0).any(1).float().mean() > 0.4
    assert not far.dhidden.any() and not far.dweight.any()
    clipped = far.stats[STATS.index("clip_low")] + far.stats[STATS.index("clip_high")]
    assert clipped == far.stats[0] == 16

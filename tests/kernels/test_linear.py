"""The Triton path of the ops that start from hidden states: interpreted without a GPU, compiled on one."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actial_fast.kernels import chunks, head, head_grad, linear_grpo, linear_logprob
from actial_fast.ops import reference
from actial_fast.ops.spec import GRPOSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [(1, 64, 64), (70, 33, 200), (130, 64, 150)]
ids = lambda case: "x".join(map(str, case)) if isinstance(case, tuple) else str(case).removeprefix("torch.")  # noqa: E731


def make(T=70, H=33, V=200, dtype=torch.float32, seed=0, bias=False, rows=False, softcap=None, scale=1.0) -> SimpleNamespace:
    g = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=g)  # noqa: E731
    case = SimpleNamespace(
        hidden=(scale * draw(T, H)).to(DEVICE, dtype),
        weight=(draw(V, H) / math.sqrt(H)).to(DEVICE, dtype),
        bias=draw(V).to(DEVICE, dtype) if bias else None,
        targets=torch.randint(0, V, (T,), generator=g).to(DEVICE),
        temperature=(0.5 + torch.rand(T, generator=g)).to(DEVICE) if rows else 0.8,
        softcap=softcap,
    )
    logp, _ = reference.linear_logprob(*doubled(case)[:2], case.targets, **options(case, torch.float64))
    case.old_logp = (logp + 0.3 * draw(T).to(DEVICE)).float()  # near the policy, so that the clip is crossed
    case.ref_logp = (logp + 0.3 * draw(T).to(DEVICE)).float()
    case.advantages = draw(T).to(DEVICE)
    case.token_weight = torch.rand(T, generator=g).to(DEVICE) / T
    case.cu_seqlens = torch.tensor(sorted({0, T, *torch.randint(0, T + 1, (4,), generator=g).tolist()}))
    return case


def doubled(case):
    return tuple(None if x is None else x.double() for x in (case.hidden, case.weight, case.bias))


def options(case, dtype=None):
    cast = lambda x: x.to(dtype) if dtype is not None and isinstance(x, torch.Tensor) else x  # noqa: E731
    return {"bias": cast(case.bias), "temperature": cast(case.temperature), "softcap": case.softcap}


def gradients(function, case, dtype=None, frozen=False):
    """Outputs of function(hidden, weight, bias), and the gradients of its loss (its first entry) by the three."""
    inputs = [None if x is None else x.to(dtype or x.dtype).detach().requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    if frozen:
        inputs[1].requires_grad_(False)
    out = function(*inputs)
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    return [x.detach() for x in out], torch.autograd.grad(out[0], wanted)


def assert_close(ours, torch_same, oracle, floor=1e-6):
    """err(ours) <= 2 * err(torch in the same dtype) + floor, errors relative to the oracle's largest entry."""
    for name, (a, b, c) in enumerate(zip(ours, torch_same, oracle, strict=True)):
        assert a.shape == c.shape and not a.isnan().any()
        size = c.abs().max().clamp(min=1e-30)
        mine, theirs = ((x.double() - c).abs().max() / size for x in (a, b))
        assert mine <= 2 * theirs + floor, f"output {name}: error {mine:.2e}, torch's {theirs:.2e}"


def logprob_losses(case, coefficients, head="triton"):
    """(ours, reference) as functions of hidden, weight, bias -> (loss, logp, entropy)."""

    def loss(outputs):
        logp, entropy = outputs
        a, b = (x.to(logp.dtype) for x in coefficients)
        return (a * logp + b * entropy).sum(), logp, entropy

    def ours(h, w, b):
        scaling = options(case) | {"bias": b, "workspace_mb": case.workspace_mb, "head": head}
        return loss(linear_logprob.linear_logprob(h, w, case.targets, **scaling))

    def plain(h, w, b):
        return loss(reference.linear_logprob(h, w, case.targets, **options(case, h.dtype) | {"bias": b}))

    return ours, plain


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("size", SIZES, ids=ids)
@pytest.mark.parametrize("extras", [{}, {"bias": True, "rows": True, "softcap": 3.0}], ids=["plain", "bias-rows-softcap"])
def test_logprob_and_entropy_and_their_gradients(size, dtype, extras):
    case = make(*size, dtype, **extras)
    case.workspace_mb = 700
    ours, plain = logprob_losses(case, (torch.randn(size[0], device=DEVICE), torch.randn(size[0], device=DEVICE)))
    results = [gradients(f, case, d) for f, d in ((ours, None), (plain, None), (plain, torch.float64))]
    floor = 1e-6 if dtype == torch.float32 else 1e-3
    assert_close(*(out[1:] for out, _ in results), floor=floor)  # the loss only makes gradients, and is a sum that nearly cancels
    assert_close(*(grads for _, grads in results), floor=floor)


def losses(case, spec, *, old=True, sampler=False, mask=None, skip=True, weight_grad=None, workspace_mb=700, head="triton"):
    rows = {
        "token_weight": case.token_weight,
        "cu_seqlens": case.cu_seqlens if spec.needs_sequences(sampler) else None,
        "sampler_logp": case.old_logp + 0.1 if sampler else None,
        "policy_mask": mask,
        "entropy_weight": None,
    }

    def ours(h, w, b):
        return linear_grpo.linear_grpo_loss(
            h,
            w,
            case.targets,
            case.advantages,
            case.old_logp if old else None,
            case.ref_logp if spec.beta else None,
            spec,
            **rows,
            **options(case) | {"bias": b},
            weight_grad=weight_grad,
            skip_zero_rows=skip,
            workspace_mb=workspace_mb,
            head=head,
        )

    def plain(h, w, b):
        to = lambda x: None if x is None else x.to(h.dtype) if x.is_floating_point() else x  # noqa: E731
        head_out = reference.linear_logprob(h, w, case.targets, **options(case, h.dtype) | {"bias": b})
        others = to(case.advantages), to(case.old_logp) if old else None, to(case.ref_logp) if spec.beta else None
        return *reference.grpo_terms(*head_out, *others, spec, **{k: to(v) for k, v in rows.items()}), *head_out

    return ours, plain


SPECS = {
    "clip": GRPOSpec(beta=0.0),
    "clip-k3": GRPOSpec(beta=0.1),
    "cispo-k2-entropy": GRPOSpec.named("cispo", clip_high=0.1, beta=0.1, kl="k2", entropy_coef=0.1),
    "gspo": GRPOSpec.named("gspo", clip_low=0.05, clip_high=0.05),
    "sapo-k1": GRPOSpec.named("sapo", beta=0.2, kl="k1", kl_bias_correction=True),
    "vespo": GRPOSpec.named("vespo"),
    "dual": GRPOSpec(beta=0.0, dual_clip=1.1, clip_delta=1.4),
}


@pytest.mark.parametrize("skip", [True, False], ids=["compact", "dense"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("name", SPECS)
def test_grpo_loss_and_its_gradients(name, frozen, skip):
    case, spec = make(bias=True, softcap=None if skip else 4.0), SPECS[name]
    ours, plain = losses(case, spec, skip=skip)
    results = [gradients(f, case, d, frozen) for f, d in ((ours, None), (plain, None), (plain, torch.float64))]
    for i in range(2):
        assert_close(*(r[i] for r in results), floor=2e-6)
    if spec.objective == "clip" and spec.ratio == "token":
        stats = dict(zip(reference.STATS, results[0][0][1].tolist(), strict=True))
        assert stats["clip_low"] > 0 and stats["clip_high"] > 0, "the clip was never crossed: the test says little"


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=ids)
@pytest.mark.parametrize("skip", [True, False], ids=["compact", "dense"])
def test_grpo_loss_in_half_precision(dtype, skip):
    case, spec = make(150, 64, 300, dtype), GRPOSpec(beta=0.05)
    ours, plain = losses(case, spec, skip=skip)
    results = [gradients(f, case, d) for f, d in ((ours, None), (plain, None), (plain, torch.float64))]
    for i in range(2):
        assert_close(*(r[i] for r in results), floor=2e-3)


def test_float16_keeps_tiny_coefficients():
    """Weights of 1e-7 are what a normaliser over ten million tokens gives; the upstream gradient is the loss scale against it."""
    case = make(20, 64, 100, torch.float16)
    case.token_weight = case.token_weight * 1e-7
    ours, plain = losses(case, GRPOSpec(beta=0.0))
    big = lambda f: lambda *inputs: (f(*inputs)[0] * 1e7,)  # noqa: E731
    (_, got), (_, want) = gradients(big(ours), case), gradients(big(plain), case, torch.float64)
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).abs().max() < 2e-3 * b.abs().max()


@given(
    T=st.integers(1, 40),
    H=st.sampled_from([1, 7, 16, 40]),
    V=st.sampled_from([2, 17, 65, 130]),
    name=st.sampled_from(sorted(SPECS)),
    seed=st.integers(0, 99),
    zero=st.floats(0, 1),
    rows=st.booleans(),
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_grpo_loss_of_any_shape_with_any_rows_masked(T, H, V, name, seed, zero, rows):
    case, spec = make(T, H, V, seed=seed, rows=rows), SPECS[name]
    case.token_weight[torch.rand(T, generator=torch.Generator().manual_seed(seed)).to(DEVICE) < zero] = 0
    case.old_logp[case.token_weight == 0] = torch.nan  # never looked at
    ours, plain = losses(case, spec)
    results = [gradients(f, case, d) for f, d in ((ours, None), (plain, None), (plain, torch.float64))]
    for i in range(2):
        assert_close(*(r[i] for r in results), floor=3e-6)


def test_all_rows_masked_gives_zero():
    case = make()
    case.token_weight.zero_()
    (loss, stats, *_), grads = gradients(losses(case, GRPOSpec(beta=0.1))[0], case)
    assert loss == 0 and not stats.any() and all(not g.any() for g in grads)


@pytest.mark.parametrize("skip", [True, False], ids=["compact", "dense"])
def test_a_row_does_not_depend_on_its_chunk(skip):
    case = make(300, 64, 150, rows=True)
    one = gradients(losses(case, SPECS["clip"], skip=skip)[0], case)
    unit = chunks.row_bytes(head.make_head(case.hidden, case.weight, case.targets, None, 1.0, None), True)
    small = 130 * unit / 2**20
    assert len(chunks.cut(head.make_head(case.hidden, case.weight, case.targets, None, 1.0, None), True, small)) > 1
    many = gradients(losses(case, SPECS["clip"], skip=skip, workspace_mb=small)[0], case)
    assert torch.equal(one[0][2], many[0][2]) and torch.equal(one[0][3], many[0][3]), "log-probs and entropies, to the bit"
    if skip and DEVICE == "cuda":  # the dense products are the library's, and the interpreter's are numpy's
        assert torch.equal(one[1][0], many[1][0]), "gradients of hidden, to the bit"
    assert torch.allclose(one[1][0], many[1][0], rtol=1e-5, atol=1e-9)
    assert torch.allclose(one[1][1], many[1][1], rtol=1e-5, atol=1e-7)


def test_chunks_are_cut_between_sequences_and_within_longer_ones():
    case = make(64, 32, 80)
    cu_seqlens = torch.tensor([0, 10, 10, 30, 31, 64])
    argument = head.make_head(case.hidden, case.weight, case.targets, None, 1.0, None)
    unit = chunks.row_bytes(argument, True) / 2**20
    for rows in (40.5, 33.5):
        assert chunks.cut_sequences(argument, True, rows * unit, cu_seqlens) == [[(0, 31)], [(31, 64)]]
    assert chunks.cut_sequences(argument, True, 64.5 * unit, cu_seqlens) == [[(0, 64)]]
    assert chunks.cut_sequences(argument, True, 19.5 * unit, cu_seqlens) == [
        [(0, 10)],
        [(10, 29), (29, 30)],
        [(30, 31)],
        [(31, 50), (50, 64)],
    ]
    assert chunks.cut_sequences(argument, True, 40.5 * unit, None) == [[(0, 40)], [(40, 64)]]
    with pytest.raises(ValueError, match=r"workspace_mb: .* holds no row"):
        chunks.cut_sequences(argument, True, 0.5 * unit, cu_seqlens)


@pytest.mark.parametrize("skip", [True, False], ids=["compact", "dense"])
@pytest.mark.parametrize("name", ["gspo", "vespo"])
def test_a_sequence_may_be_longer_than_a_chunk(name, skip):
    case = make(64, 32, 80)
    case.cu_seqlens = torch.tensor([0, 10, 10, 30, 31, 64])
    argument = head.make_head(case.hidden, case.weight, case.targets, None, 1.0, None)
    unit = chunks.row_bytes(argument, True) / 2**20
    whole, cut, shred = (
        gradients(losses(case, SPECS[name], sampler=True, skip=skip, workspace_mb=mb)[0], case) for mb in (700, 40.5 * unit, 19.5 * unit)
    )
    for some in (cut, shred):
        for a, b in zip((*whole[0], *whole[1]), (*some[0], *some[1]), strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("H", [32, 33])
def test_weight_grad_is_added_to(H):
    case = make(H=H)
    _, (_, want) = gradients(losses(case, SPECS["clip"])[0], case)
    buffer = torch.full_like(case.weight, 3.0)
    for times in (1, 2):
        h, w = case.hidden.detach().requires_grad_(), case.weight.detach().requires_grad_()
        losses(case, SPECS["clip"], weight_grad=buffer)[0](h, w, None)[0].backward()
        assert w.grad is None and h.grad is not None
        assert torch.allclose(buffer, 3 + times * want, atol=1e-6)


@pytest.mark.parametrize("start", [0, 1, 4])
def test_chunks_add_to_a_weight_grad_that_begins_anywhere(start):
    """16-bit tiles add through a tensor descriptor, which only reaches multiples of 16 bytes."""
    case = make(300, 64, 150, torch.float16)
    _, (_, want) = gradients(losses(case, SPECS["clip"])[0], case)
    unit = chunks.row_bytes(head.make_head(case.hidden, case.weight, case.targets, None, 1.0, None), True)
    buffer = torch.full((start + case.weight.numel() + 1,), 3.0, device=DEVICE)
    weight_grad = buffer[start:-1].view(case.weight.shape)
    h = case.hidden.detach().requires_grad_()
    losses(case, SPECS["clip"], weight_grad=weight_grad, workspace_mb=130 * unit / 2**20)[0](h, case.weight, None)[0].backward()
    assert torch.allclose(weight_grad, 3 + want.float(), rtol=1e-3, atol=1e-4 * want.abs().max().item())
    assert torch.equal(buffer[:start], torch.full_like(buffer[:start], 3.0)) and buffer[-1] == 3


def test_an_upstream_gradient_other_than_one_shows_in_weight_grad():
    """The host cannot know it without waiting, and must not end the process's CUDA context by an assertion."""
    case = make()
    for scale in (1, 2):
        h, buffer = case.hidden.detach().requires_grad_(), torch.zeros_like(case.weight)
        loss = losses(case, SPECS["clip"], weight_grad=buffer)[0](h, case.weight.detach().requires_grad_(), None)[0]
        (scale * loss).backward()
        assert all(x.isnan().all() if scale == 2 else x.isfinite().all() and x.any() for x in (buffer, h.grad))


def test_the_upstream_gradient_scales_as_often_as_it_comes():
    case = make()
    _, want = gradients(losses(case, SPECS["clip"])[0], case)
    h, w = case.hidden.detach().requires_grad_(), case.weight.detach().requires_grad_()
    loss = losses(case, SPECS["clip"])[0](h, w, None)[0]
    for _ in range(2):
        h.grad = w.grad = None
        (3 * loss).backward(retain_graph=True)
        assert torch.allclose(h.grad, 3 * want[0]) and torch.allclose(w.grad, 3 * want[1])
    (3 * loss).backward()
    assert torch.allclose(h.grad, 6 * want[0]) and torch.allclose(w.grad, 6 * want[1])


def test_cross_entropy():
    case = make(softcap=5.0, bias=True)
    case.temperature = 1.0
    case.token_weight[::3] = 0

    def ours(h, w, b):
        more = {"bias": b, "softcap": 5.0, "weight_grad": None, "workspace_mb": 700}
        return (linear_grpo.linear_cross_entropy(h, w, case.targets, case.token_weight, **more),)

    def plain(h, w, b):
        return (reference.linear_cross_entropy(h, w, case.targets, case.token_weight.to(h.dtype), bias=b, softcap=5.0),)

    results = [gradients(f, case, d) for f, d in ((ours, None), (plain, None), (plain, torch.float64))]
    for i in range(2):
        assert_close(*(r[i] for r in results))


def test_a_target_outside_of_the_vocabulary_gives_nan_and_nothing_else():
    case = make()
    case.targets[3], case.targets[5] = 200, -1
    logp, entropy = linear_logprob.linear_logprob(case.hidden, case.weight, case.targets, **options(case), workspace_mb=700)
    assert logp.isnan().nonzero().flatten().tolist() == [3, 5] and not entropy.isnan().any()


@pytest.mark.parametrize("offset", [-1e4, 0.0, 1e4])
def test_large_logits_of_either_sign(offset):
    hidden = torch.tensor([[1.0, 0, 0, 0]] * 3, device=DEVICE)
    weight = torch.zeros(100, 4, device=DEVICE)
    weight[:, 0] = offset + torch.linspace(0, 60, 100, device=DEVICE)
    targets = torch.tensor([99, 50, 0], device=DEVICE)
    plain = {"bias": None, "temperature": 1.0, "softcap": None}
    logp, entropy = linear_logprob.linear_logprob(hidden, weight, targets, **plain, workspace_mb=700)
    want, want_entropy = reference.linear_logprob(hidden.double(), weight.double(), targets)
    assert (
        (logp <= 0).all() and torch.allclose(logp.double(), want, rtol=1e-6) and torch.allclose(entropy.double(), want_entropy, rtol=1e-5)
    )


@pytest.mark.parametrize("head_state", ["trainable", "frozen", "no-grad"])
def test_products_of_t_h_v(head_state, monkeypatch):
    """3 with a trainable head, 2 with a frozen one, 1 without gradients: each kernel that multiplies runs once per chunk."""
    case, launched = make(), []

    def counted(module, name):
        kernel = getattr(module, name)

        class Counted:
            def __getitem__(self, grid):
                launched.append(name)
                return kernel[grid]

        monkeypatch.setattr(module, name, Counted())

    for module in (head, head_grad):
        for name in (name for name, kind in module.KIND.items() if kind == "matrix"):
            counted(module, name)
    monkeypatch.setattr(torch, "mm", None)
    hidden, weight = case.hidden.requires_grad_(head_state != "no-grad"), case.weight.requires_grad_(head_state == "trainable")
    loss, *_ = losses(case, SPECS["clip"])[0](hidden, weight, None)
    if loss.requires_grad:
        loss.backward()
    every = ["logits_kernel", "dhidden_kernel", "dweight_kernel"]
    assert launched == every[: {"trainable": 3, "frozen": 2, "no-grad": 1}[head_state]]
    want, *_ = losses(case, SPECS["clip"])[1](case.hidden.double(), case.weight.double(), None)
    assert torch.allclose(loss.double(), want, rtol=1e-5)


def test_rows_without_a_coefficient_stay_out_of_the_gradients_products():
    """Were they multiplied by zero instead, their NaN would show."""
    case, clean = make(150), make(150)
    case.token_weight[::2] = clean.token_weight[::2] = 0
    case.hidden[::2] = torch.nan
    got, want = (gradients(losses(c, SPECS["clip"])[0], c)[1] for c in (case, clean))
    assert not case.hidden[1::2].isnan().any() and torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("change", [0.0, 1.01])
def test_a_wrong_gradient_fails_the_comparison(change):
    case = make()
    ours, plain = losses(case, SPECS["clip"])
    results = [gradients(f, case, d)[1] for f, d in ((ours, None), (plain, None), (plain, torch.float64))]
    assert_close(*results, floor=2e-6)
    with pytest.raises(AssertionError, match="output 0: error"):
        assert_close([change * g for g in results[0]], *results[1:], floor=2e-6)


@pytest.mark.gpu
def test_more_rows_than_a_grid_axis_holds():
    case = make(70_000, 64, 300, torch.bfloat16)
    ours, plain = losses(case, SPECS["clip"])
    (out, grads), (want, want_grads) = gradients(ours, case), gradients(plain, case, torch.float64)
    assert torch.allclose(out[2].double(), want[2], atol=5e-3)
    for a, b in zip(grads, want_grads, strict=True):
        assert (a.double() - b).abs().max() < 0.02 * b.abs().max()


@pytest.mark.gpu
def test_no_host_sync():
    case = make(300, 64, 500, torch.bfloat16)
    ours = losses(case, SPECS["clip-k3"])[0]
    gradients(ours, case)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(ours, case)
    finally:
        torch.cuda.set_sync_debug_mode("default")

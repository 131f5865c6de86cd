"""Under torch.compile: every op is one graph without a break, with the values and gradients of the op outside; opcheck of the operators."""

import math
from types import SimpleNamespace

import pytest
import torch

from actial_fast import ops
from actial_fast.ops import library, operators, operators_logits
from actial_fast.ops.spec import NAMED, AdvantageSpec, GRPOSpec
from tests.head_cases import make

LENGTHS = (5, 1, 9, 0, 12)
T = sum(LENGTHS)
SPECS = {"clip": GRPOSpec(beta=0.1, clip_delta=1.5, importance_max=math.inf), "gspo": GRPOSpec.named("gspo", beta=0.1, entropy_coef=0.1)}
SMALL = 0.02  # MiB: several chunks


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def case_of(lengths=LENGTHS, **more) -> SimpleNamespace:
    return make(lengths=lengths, **({"dtype": torch.float32} | more))


# ---- the door, compiled


def rows_of(case) -> tuple:
    return case.targets, case.advantages, case.old_logp, case.ref_logp


CALLS = {
    "linear_logprob": lambda c: ops.linear_logprob(c.hidden, c.weight, c.targets),
    "linear_logprob, everything": lambda c: ops.linear_logprob(
        c.hidden, c.weight, c.targets, bias=c.bias, temperature=c.temperature, softcap=4.0, return_entropy=False, workspace_mb=SMALL
    )[:1],
    "linear_logprob, several targets": lambda c: ops.linear_logprob(
        c.hidden, c.weight, torch.stack((c.targets, c.targets % 3), 1), bias=c.bias, temperature=c.temperature
    ),
    "linear_logprob, top_k and top_p": lambda c: [
        torch.where(x.isfinite(), x, 0) for x in ops.linear_logprob(c.hidden, c.weight, c.targets, top_k=20, top_p=0.9, min_p=0.001)
    ],
    "linear_grpo_loss": lambda c: ops.linear_grpo_loss(c.hidden, c.weight, *rows_of(c), SPECS["clip"], token_weight=c.token_weight),
    "linear_grpo_loss, everything": lambda c: ops.linear_grpo_loss(
        c.hidden,
        c.weight,
        *rows_of(c),
        SPECS["gspo"],
        token_weight=c.token_weight,
        cu_seqlens=c.cu_seqlens,
        sampler_logp=c.sampler_logp,
        policy_mask=c.policy_mask,
        entropy_weight=c.entropy_weight,
        bias=c.bias,
        temperature=c.temperature,
        softcap=4.0,
        workspace_mb=SMALL,
    ),
    "linear_grpo_loss, an advantage a sequence": lambda c: ops.linear_grpo_loss(
        c.hidden,
        c.weight,
        c.targets,
        c.advantages[: len(c.cu_seqlens) - 1],
        None,
        None,
        GRPOSpec(aggregation="sequence", beta=0, top_entropy=0.5),
        cu_seqlens=c.cu_seqlens,
    ),
    "linear_cross_entropy": lambda c: [ops.linear_cross_entropy(c.hidden, c.weight, c.targets, c.token_weight)],
    "linear_cross_entropy, everything": lambda c: [
        ops.linear_cross_entropy(c.hidden, c.weight, c.targets, c.token_weight, bias=c.bias, softcap=4.0, workspace_mb=SMALL)
    ],
    "linear_kl": lambda c: [ops.linear_kl(c.hidden, c.weight, c.hidden * 0.9, c.weight.detach() * 1.1)],
    "linear_kl, temperatures": lambda c: [ops.linear_kl(c.hidden, c.weight, c.hidden * 0.9, c.weight * 1.1, temperature=c.temperature)],
    "logprob_from_logits": lambda c: ops.logprob_from_logits(c.hidden @ c.weight.T, c.targets, temperature=c.temperature),
    "grpo_loss_from_logits": lambda c: ops.grpo_loss_from_logits(
        c.hidden @ c.weight.T, *rows_of(c), SPECS["gspo"], token_weight=c.token_weight, cu_seqlens=c.cu_seqlens
    ),
    "grpo_loss_from_logits, in place": lambda c: ops.grpo_loss_from_logits(
        c.hidden @ c.weight.T, *rows_of(c), GRPOSpec(), token_weight=c.token_weight, inplace=True
    ),
    "token_kl": lambda c: [ops.token_kl(c.hidden[:, 0], c.hidden[:, 1], "k2")],
    "group_advantages": lambda c: [ops.group_advantages(c.advantages, c.targets % 3, AdvantageSpec(epsilon=0.1))],
    "token_weights": lambda c: [ops.token_weights(SPECS["gspo"], c.cu_seqlens, mask=c.policy_mask)],
}


def with_gradients(outputs, case) -> list[torch.Tensor]:
    """The outputs, and the gradients of a sum of those that have one, each weighed by its place."""
    outputs = [x for x in outputs if x is not None]
    total = sum(((2.0 + i) * x.sum() for i, x in enumerate(outputs) if x.requires_grad), start=0 * case.hidden.sum())
    leaves = (case.hidden, case.weight, case.bias)
    grads = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return [*(x.detach() for x in outputs), *grads]


def assert_same(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6, msg=lambda text, i=i: f"output {i}: {text}")


@pytest.mark.parametrize("name", CALLS)
def test_a_compiled_caller_sees_one_graph_and_the_same_numbers(name):
    compiled = torch.compile(lambda case: list(CALLS[name](case)), fullgraph=True, dynamic=True, backend="aot_eager")
    case = case_of()
    assert_same(with_gradients(compiled(case), case), with_gradients(CALLS[name](case), case))


def test_the_compiler_that_writes_code():
    """Its code runs below autograd, of which the CPU's losses make use."""
    call, case = CALLS["linear_cross_entropy"], case_of()
    compiled = torch.compile(lambda case: list(call(case)), fullgraph=True)
    assert_same(with_gradients(compiled(case), case), with_gradients(call(case), case))


@pytest.mark.parametrize(
    ("name", "mode"), [("linear_logprob", torch.inference_mode), ("linear_grpo_loss, everything", torch.no_grad)], ids=["logprob", "loss"]
)
def test_without_gradients(name, mode):
    case = case_of()
    with mode():
        got = torch.compile(lambda case: list(CALLS[name](case)), fullgraph=True, backend="aot_eager")(case)
        want = CALLS[name](case)
    assert not any(x.requires_grad for x in got)
    assert_same(got, list(want))


def test_another_number_of_rows_needs_no_new_graph():
    """A training step, the rows never as many as before: a graph for the first number, one for all others."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(hidden, weight, targets, advantages, old_logp, ref_logp):
        return ops.linear_grpo_loss(hidden * 2, weight, targets, advantages, old_logp, ref_logp, GRPOSpec(beta=0.5)).loss

    for length in (9, 12, 17, 31, 44):
        case = case_of((length,))
        got = torch.autograd.grad(step(case.hidden, case.weight, *rows_of(case)), (case.hidden, case.weight))
        want = ops.linear_grpo_loss(case.hidden * 2, case.weight, *rows_of(case), GRPOSpec(beta=0.5)).loss
        assert_same(list(got), list(torch.autograd.grad(want, (case.hidden, case.weight))))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2 and not torch._dynamo.utils.counters["graph_break"]


def test_the_gradient_of_the_head_is_added_to_a_buffer():
    case, start = case_of(), torch.randn(29, 12)
    buffer = start.clone()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def losses(scale, buffer):
        rows = rows_of(case)
        loss = ops.linear_grpo_loss(case.hidden, case.weight, *rows, GRPOSpec(), weight_grad=buffer).loss
        return scale * (loss + ops.linear_cross_entropy(case.hidden, case.weight, case.targets, case.token_weight, weight_grad=buffer))

    plain = ops.linear_grpo_loss(case.hidden, case.weight, *rows_of(case), GRPOSpec()).loss
    plain = plain + ops.linear_cross_entropy(case.hidden, case.weight, case.targets, case.token_weight)
    dhidden, dweight = torch.autograd.grad(plain, (case.hidden, case.weight))
    losses(torch.ones(()), buffer).backward()
    assert case.weight.grad is None
    assert_same([case.hidden.grad, buffer - start], [dhidden, dweight])
    with pytest.raises(RuntimeError, match="weight_grad the loss must be backpropagated as it is"):
        losses(torch.tensor(0.5), buffer).backward()


def test_float16_gradients_wait_for_the_loss_scale():
    case = case_of(dtype=torch.float16)
    case.token_weight = case.token_weight * 1e-6

    def loss(case):
        return 2**16 * ops.linear_cross_entropy(case.hidden, case.weight, case.targets, case.token_weight)

    got, want = (
        torch.autograd.grad(f(case), (case.hidden, case.weight)) for f in (torch.compile(loss, fullgraph=True, backend="aot_eager"), loss)
    )
    for a, b in zip(got, want, strict=True):
        assert b.any() and torch.equal(a, b)


def test_autocast_casts_like_a_linear_layer():
    case = case_of()

    def logp(case):
        with torch.autocast("cpu", torch.bfloat16):
            return ops.linear_logprob(case.hidden, case.weight, case.targets)[0]

    compiled = torch.compile(logp, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(case), logp(case)) and not torch.equal(
        logp(case), ops.linear_logprob(case.hidden, case.weight, case.targets)[0]
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["linear_logprob", "linear_grpo_loss", "linear_kl", "logprob_from_logits"])
def test_a_second_derivative_is_refused(name, backend):
    case = case_of()
    out = torch.compile(lambda case: CALLS[name](case)[0].sum(), backend=backend)(case)
    (first,) = torch.autograd.grad(out, case.weight, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiable once|does not currently support double backward"):
        first.square().sum().backward()


def test_refusals_of_shapes_stay():
    case = case_of()
    compiled = torch.compile(lambda case: ops.linear_logprob(case.hidden, case.weight[:, :5], case.targets), backend="eager")
    with pytest.raises(ValueError, match=r"^weight: expected \(V, 12\) to fit hidden"):
        compiled(case)


@pytest.mark.parametrize(
    ("name", "trained", "frozen"), [("linear_grpo_loss", 3, 2), ("linear_cross_entropy", 3, 2), ("linear_logprob", 4, 3)]
)
def test_products(name, trained, frozen, monkeypatch):
    """As many T x H x V as outside of the compiler."""
    case, done = case_of(), []
    case.token_weight = torch.full((T,), 1 / T)
    compiled = torch.compile(lambda case: CALLS[name](case)[0].sum(), fullgraph=True, backend="aot_eager")
    compiled(case)  # the compiler's modules are imported here, and some keep torch.mm by its name
    mm, addmm = torch.mm, torch.addmm
    monkeypatch.setattr(torch, "mm", lambda a, b, **to: done.append(a.shape[0] * a.shape[1] * b.shape[1]) or mm(a, b, **to))
    monkeypatch.setattr(torch, "addmm", lambda x, a, b, **to: done.append(a.shape[0] * a.shape[1] * b.shape[1]) or addmm(x, a, b, **to))
    for weight, products in ((case.weight, trained), (case.weight.detach(), frozen)):
        case.weight = weight
        compiled(case).backward()
        assert sum(done) == products * T * 12 * 29
        done.clear()
    with torch.no_grad():
        compiled(case)
    assert sum(done) == T * 12 * 29


# ---- the operators

HEAD = lambda c, bias=True: (c.hidden, c.weight, c.bias if bias else None)  # noqa: E731
ONES = (1.0, None)
ALL, HIDDEN = [True] * 3, [True, False, False]


def loss_rows(c, full: bool) -> tuple:
    more = (c.cu_seqlens, c.sampler_logp, c.policy_mask, c.entropy_weight) if full else (None,) * 4
    return c.targets, c.advantages, c.old_logp if full else None, c.ref_logp, c.token_weight, *more


def grpo_arguments(c, full: bool, buffer: bool = False, wanted=ALL) -> tuple:
    """Of the operator, all of its optional ones given or none."""
    head = (c.hidden.detach(), c.weight.detach(), c.bias.detach() if full else None)
    numbers = (*library.flat(SPECS["gspo" if full else "clip"]), *((1.0, c.temperature) if full else ONES), 4.0 if full else None)
    return (
        *head,
        *loss_rows(c, full),
        *numbers,
        not full,
        SMALL,
        torch.zeros_like(head[1]) if buffer else None,
        wanted if full else [*wanted[:2], False],
    )


def several(c) -> torch.Tensor:
    return torch.stack((c.targets, c.targets % 3), 1)


def some_rows(c) -> tuple:
    """Few, since a search in Triton's interpreter takes its time; those with gradients are leaves, as opcheck wants them."""
    return c.hidden.detach()[:3].clone().requires_grad_(), c.weight, c.bias, c.targets[:3]


def gradients_of(c) -> tuple:
    return tuple(torch.randn_like(x) for x in (c.hidden, c.weight, c.bias))


OPERATORS = {
    "linear_logprob": lambda c: (operators._linear_logprob, (*HEAD(c), c.targets, 1.0, c.temperature, 4.0, None, SMALL)),
    "linear_logprob, little": lambda c: (operators._linear_logprob, (*HEAD(c, False), c.targets, 0.7, None, None, None, SMALL)),
    "linear_logprob, several targets": lambda c: (operators._linear_logprob, (*HEAD(c), several(c), 1.0, c.temperature, 4.0, None, SMALL)),
    "linear_logprob, kept": lambda c: (operators._linear_logprob, (*some_rows(c), 0.7, None, None, [3.0, 0.9, 0.01], SMALL)),
    "linear_logprob_backward": lambda c: (
        operators._linear_logprob_backward,
        (*HEAD(c), c.targets, c.old_logp, c.ref_logp, 1.0, c.temperature, 4.0, None, SMALL, ALL),
    ),
    "linear_logprob_backward, several targets": lambda c: (
        operators._linear_logprob_backward,
        (*HEAD(c), several(c), torch.stack((c.old_logp, c.ref_logp), 1), c.ref_logp, 1.0, c.temperature, 4.0, None, SMALL, ALL),
    ),
    "linear_logprob_backward, kept": lambda c: (
        operators._linear_logprob_backward,
        (*some_rows(c), c.old_logp[:3], None, 0.7, None, None, [3.0, 0.9, 0.01], SMALL, ALL),
    ),
    "linear_logprob_backward, little": lambda c: (
        operators._linear_logprob_backward,
        (*HEAD(c, False), c.targets, c.old_logp, None, 0.7, None, None, None, SMALL, HIDDEN),
    ),
    "linear_grpo_loss": lambda c: (operators._linear_grpo_loss, grpo_arguments(c, True)),
    "linear_grpo_loss, a buffer": lambda c: (operators._linear_grpo_loss, grpo_arguments(c, True, buffer=True)),
    "linear_grpo_loss, little": lambda c: (operators._linear_grpo_loss, grpo_arguments(c, False)),
    "linear_grpo_loss, frozen": lambda c: (operators._linear_grpo_loss, grpo_arguments(c, False, wanted=HIDDEN)),
    "linear_grpo_loss, no gradient": lambda c: (operators._linear_grpo_loss, grpo_arguments(c, False, wanted=[False] * 3)),
    "linear_cross_entropy": lambda c: (
        operators._linear_cross_entropy,
        (*(x.detach() for x in HEAD(c)), c.targets, c.token_weight, 4.0, SMALL, None, ALL),
    ),
    "linear_cross_entropy, a buffer": lambda c: (
        operators._linear_cross_entropy,
        (c.hidden.detach(), c.weight.detach(), None, c.targets, c.token_weight, None, SMALL, torch.zeros(29, 12), [True, True, False]),
    ),
    "with_gradients": lambda c: (operators._with_gradients, (torch.randn(()), *HEAD(c), *gradients_of(c), ALL, False)),
    "with_gradients, a buffer": lambda c: (
        operators._with_gradients,
        (torch.tensor(1.5), *HEAD(c, False), gradients_of(c)[0], torch.empty(0), torch.empty(0), [True, True, False], True),
    ),
    "linear_kl": lambda c: (operators_logits._linear_kl, (*HEAD(c)[:2], *other_head(c), 1.0, c.temperature, SMALL)),
    "linear_kl_backward": lambda c: kl_backward(c, c.temperature, [True] * 4),
    "linear_kl_backward, little": lambda c: kl_backward(c, None, [True, False, False, True]),
    "logprob_from_logits": lambda c: (operators_logits._logprob_from_logits, (c.hidden @ c.weight.T, c.targets, 1.0, c.temperature, False)),
    "logprob_from_logits_backward": lambda c: logits_backward(c),
    "group_advantages": lambda c: (
        operators_logits._group_advantages,
        (torch.stack([c.advantages] * 2, 1), c.targets % 3, torch.ones(2), *library.flat(AdvantageSpec())),
    ),
    "group_advantages, little": lambda c: (
        operators_logits._group_advantages,
        (c.advantages, c.targets % 3, None, *library.flat(AdvantageSpec(combine="normalize_then_sum"))),
    ),
}


def other_head(c) -> tuple[torch.Tensor, torch.Tensor]:
    return (c.hidden.detach() * 0.9).requires_grad_(), (c.weight.detach() * 1.1).requires_grad_()


def kl_backward(c, temperature, wanted):
    heads = tuple(x.detach() for x in (c.hidden, c.weight, *other_head(c)))
    kept = operators_logits._linear_kl(*heads, 1.0, temperature, SMALL)
    return operators_logits._linear_kl_backward, (c.old_logp, *heads, *kept, 1.0, temperature, SMALL, wanted)


def logits_backward(c):
    logits = (c.hidden @ c.weight.T).detach()
    _, *kept = operators_logits._logprob_from_logits(logits, c.targets, 1.0, c.temperature, False)
    gradients = (c.old_logp, c.ref_logp, torch.empty_like(logits))
    return operators_logits._logprob_from_logits_backward, (logits, c.targets, *kept, *gradients, 1.0, c.temperature)


@pytest.mark.parametrize("lengths", [LENGTHS, (0,)], ids=["rows", "no rows"])
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name, lengths):
    operator, arguments = OPERATORS[name](case_of(lengths))
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck_of_what_the_kernels_return(name, monkeypatch):
    """Through Triton's interpreter where there is no GPU: schema and shapes, those that only the kernels keep included."""
    monkeypatch.setattr(library, "on_gpu", lambda x: True)
    operator, arguments = OPERATORS[name](case_of())
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_every_operator_is_checked():
    checked = {OPERATORS[name](case_of())[0].name() for name in OPERATORS}
    assert checked == {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("actial_fast::")}


@pytest.mark.parametrize(
    "spec", [*(GRPOSpec.named(name) for name in NAMED), SPECS["clip"], GRPOSpec(kl_bias_correction=True, dual_clip=3.0)]
)
def test_a_spec_comes_back_as_it_was(spec):
    words, numbers = library.flat(spec)
    assert library.spec_of(GRPOSpec, words, *numbers) == spec
    assert library.spec_of(AdvantageSpec, *library.flat(AdvantageSpec(scale="none", epsilon=0.5))[:1], 0.5) == AdvantageSpec(
        scale="none", epsilon=0.5
    )


# ---- the kernels under the compiler, and CUDA graphs


@pytest.mark.parametrize(
    "name", ["linear_logprob, everything", "linear_grpo_loss, everything", "linear_cross_entropy", "linear_kl", "logprob_from_logits"]
)
def test_the_kernels_under_the_compiler(name, monkeypatch):
    case = case_of()
    want = with_gradients(CALLS[name](case), case)
    monkeypatch.setattr(library, "on_gpu", lambda x: True)
    got = with_gradients(torch.compile(lambda case: list(CALLS[name](case)), fullgraph=True, backend="aot_eager")(case), case)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5, msg=lambda text, i=i: f"output {i}: {text}")


# what is on the device from the start: a graph cannot hold cu_seqlens, nor weights computed from them, which come from the host
IN_A_GRAPH = ("linear_logprob", "linear_logprob, everything", "linear_grpo_loss", "linear_cross_entropy, everything", "linear_kl")
IN_A_GRAPH += ("logprob_from_logits", "grpo_loss_from_logits, in place", "token_kl", "group_advantages")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("name", IN_A_GRAPH)
def test_in_a_cuda_graph(name, compiled):
    """Forward and backward are captured and replayed on other inputs, with the gradients of a run without a graph."""
    first, other = (to_cuda(case_of()) for _ in range(2))
    with torch.no_grad():
        other.hidden.mul_(0.7)
    run = torch.compile(lambda case: list(CALLS[name](case)), fullgraph=True, backend="aot_eager") if compiled else CALLS[name]
    want = with_gradients(CALLS[name](other), other)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are compiled before the capture
        with_gradients(run(first), first)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = with_gradients(run(first), first)
    with torch.no_grad():
        first.hidden.copy_(other.hidden)
    graph.replay()
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5, msg=lambda text, i=i: f"output {i}: {text}")


def to_cuda(case: SimpleNamespace) -> SimpleNamespace:
    """All but cu_seqlens, which belong on the host."""
    moved = {name: x.detach().cuda().requires_grad_(x.requires_grad) for name, x in vars(case).items() if name != "cu_seqlens"}
    return SimpleNamespace(**moved, cu_seqlens=case.cu_seqlens)

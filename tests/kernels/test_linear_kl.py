"""linear_kl against its specification in float64: the Triton path (in the interpreter without a GPU) and the CPU path."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from actial_fast.kernels import linear_kl as kernels
from actial_fast.ops import chunked_kl, reference

GPU = torch.cuda.is_available()
PATHS = {"triton": (kernels.linear_kl, "cuda" if GPU else "cpu"), "cpu": (chunked_kl.linear_kl, "cpu")}
NAMES = ("kl", "hidden", "weight", "ref_hidden", "ref_weight")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EVERY_PATH = pytest.mark.parametrize("path", PATHS)
pytestmark = [
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning:triton"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning:numpy"),
]


def problem(T=5, H=8, G=6, V=301, scale=1.0, seed=0):
    """hidden, weight, ref_hidden, ref_weight in float32."""
    draw = torch.Generator().manual_seed(seed)
    states = [torch.randn(T, width, generator=draw) for width in (H, G)]
    heads = [torch.randn(V, width, generator=draw) * scale for width in (H, G)]
    return [states[0], heads[0], states[1], heads[1]]


def near():
    """Two models that hardly differ, as the policy and its reference do."""
    hidden, weight, _, _ = problem()
    return [hidden, weight, hidden + 1e-2 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)), weight.clone()]


def strongly_negative():
    """Logits of about -1e4 of both models."""
    inputs = problem()
    for i, x in enumerate(inputs):
        x[:, 0] = -100.0 if i % 2 else 100.0
    return inputs


def dominant():
    """Both models are all but certain, of the same token in every other row."""
    inputs = problem(T=6, H=4, G=4)
    for row in range(6):
        for i in (0, 2):
            target = row * 7 + (i if row % 2 else 0)
            inputs[i][row] = 8 * inputs[i + 1][target] / inputs[i + 1][target].square().mean()
    return inputs


def run(function, inputs, grad, wanted=(True,) * 4, device="cpu", **options):
    """KL and the gradients of sum(grad * KL), None where not wanted, on the CPU."""
    leaves = [x.detach().to(device).requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    kl = function(*leaves, **options)
    kl.backward(grad.to(kl))
    return [kl.detach().cpu(), *(None if x.grad is None else x.grad.cpu() for x in leaves)]


def upstream(inputs):
    return torch.randn(inputs[0].shape[0], generator=torch.Generator().manual_seed(2)) + 0.5


def errors(got, exact):
    """The largest error of each output: of KL relative to 1 nat or the largest KL, of a gradient relative to its largest entry."""
    sizes = [max(1.0, exact[0].abs().max().item()), *(x.abs().max().item() + 1e-30 for x in exact[1:])]
    return [((x.double() - y).abs().max() / size).item() for x, y, size in zip(got, exact, sizes, strict=True)]


def check(got, inputs, grad, temperature=1.0):
    """err(ours) <= 2 * err(torch in the same dtype) + floor, against float64.

    The floor: a few roundings of the output, and what one of each model's largest float32 logit does to it (log p - log q - KL of a token
    that is all but certain is such roundings and nothing else).
    """
    exact = run(reference.linear_kl, [x.double() for x in inputs], grad.double(), temperature=temperature)
    theirs = run(reference.linear_kl, inputs, grad, temperature=temperature)
    logits = [reference.logits(*inputs[i : i + 2], None, temperature, None) for i in (0, 2)]
    rounding = torch.finfo(torch.float32).eps * sum(x.abs().max().item() for x in logits)
    slope = (grad / temperature).abs().max().item()
    partners = [inputs[i].abs().max().item() for i in (1, 0, 3, 2)]
    floors = [1e-6 + rounding]
    for x, partner in zip(exact[1:], partners, strict=True):
        floors.append(4 * torch.finfo(inputs[0].dtype).eps + rounding * slope * partner / (x.abs().max().item() + 1e-30))
    for name, ours, torchs, floor in zip(NAMES, errors(got, exact), errors(theirs, exact), floors, strict=True):
        assert ours <= 2 * torchs + floor, f"{name}: error {ours:.1e}, torch in {inputs[0].dtype} {torchs:.1e}, floor {floor:.1e}"


CASES = {
    "small": (problem, 1.0),
    "one row": (lambda: problem(T=1), 1.0),
    "one token": (lambda: problem(V=1), 1.0),
    "two tokens": (lambda: problem(V=2), 0.6),
    "several tiles, odd": (lambda: problem(T=2, V=kernels.DEPTH * kernels.LANES + kernels.BLOCK + 3), 0.7),
    "whole tiles": (lambda: problem(T=2, V=kernels.DEPTH * kernels.LANES), 1.0),
    "large logits": (lambda: problem(scale=10.0), 0.9),
    "row temperature": (problem, torch.tensor([0.3, 0.7, 1.0, 1.7, 5.0])),
    "near": (near, 1.0),
    "strongly negative (SkyRL#2141)": (strongly_negative, 1.0),
    "dominant": (dominant, 1.0),
}


@EVERY_PATH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients(path, dtype, case):
    make, temperature = CASES[case]
    inputs, (function, device) = [x.to(dtype) for x in make()], PATHS[path]
    grad = upstream(inputs)
    got = run(function, inputs, grad, device=device, temperature=temperature)
    assert [x.dtype for x in got] == [torch.float32, dtype, dtype, dtype, dtype]
    assert (got[0] >= 0).all()
    check(got, inputs, grad, temperature)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda got: got[1].zero_(),
        lambda got: got[2].mul_(1.001),
        lambda got: got[3].neg_(),
        lambda got: got[4][:1].zero_(),
        lambda got: got[0].mul_(1.001),
        lambda got: got[0].fill_(torch.nan),
    ],
    ids=["zeroed", "scaled", "negated", "a token's gradient lost", "value scaled", "value NaN"],
)
def test_the_accuracy_rule_notices(break_it):
    inputs = problem()
    grad = upstream(inputs)
    got = run(chunked_kl.linear_kl, inputs, grad)
    check(got, inputs, grad)
    break_it(got)
    with pytest.raises(AssertionError, match="error"):
        check(got, inputs, grad)


@EVERY_PATH
@pytest.mark.parametrize("wanted", [x for x in itertools.product([True, False], repeat=4) if 0 < sum(x) < 4], ids=str)
def test_gradients_that_are_wanted_do_not_depend_on_the_others(path, wanted):
    inputs, (function, device) = problem(T=3, V=70), PATHS[path]
    every = run(function, inputs, upstream(inputs), device=device)
    some = run(function, inputs, upstream(inputs), wanted, device)
    for x, y, want in zip(every[1:], some[1:], wanted, strict=True):
        assert torch.equal(x, y) if want else y is None


@EVERY_PATH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_identical_models_have_no_divergence_and_no_gradient(path, dtype):
    (hidden, weight, _, _), (function, device) = problem(scale=5.0, V=1030), PATHS[path]
    inputs = [x.to(dtype) for x in (hidden, weight, hidden, weight)]
    for x in run(function, inputs, upstream(inputs), device=device, temperature=0.7):
        assert torch.equal(x, torch.zeros_like(x))


@EVERY_PATH
def test_float32_states_against_half_precision_reference(path):
    hidden, weight, ref_hidden, ref_weight = problem()
    inputs, (function, device) = [hidden, weight, ref_hidden.half(), ref_weight.half()], PATHS[path]
    grad = upstream(inputs)
    got = run(function, inputs, grad, device=device)
    assert [x.dtype for x in got[1:]] == [x.dtype for x in inputs]
    exact = run(reference.linear_kl, [x.double() for x in inputs], grad.double())
    for error, floor in zip(errors(got, exact), [1e-6, 5e-6, 5e-6, 2e-3, 2e-3], strict=True):
        assert error <= floor


@EVERY_PATH
def test_a_row_does_not_depend_on_its_chunk(path):
    inputs, (function, device) = problem(T=9, V=130), PATHS[path]
    whole = run(function, inputs, upstream(inputs), device=device)
    bytes_of_a_row = 8 * 192 + 4 * 8 if path == "triton" else 4 * (3 * 130 + 2 * (8 + 6))
    for rows in (1, 2, 4):
        chunked = run(function, inputs, upstream(inputs), device=device, workspace_mb=rows * bytes_of_a_row / 2**20)
        for x, y in zip(whole, chunked, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=2e-6)
    alone = run(function, [x[4:5] if i % 2 == 0 else x for i, x in enumerate(inputs)], upstream(inputs)[4:5], device=device)
    torch.testing.assert_close(alone[0], whole[0][4:5], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(alone[1], whole[1][4:5], rtol=1e-5, atol=2e-6)


class Largest(TorchDispatchMode):
    """Remembers the bytes of the largest storage that any operation returned."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.bytes = max([self.bytes, *(x.untyped_storage().nbytes() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


@EVERY_PATH
def test_memory_stays_under_the_workspace_for_any_number_of_rows(path):
    inputs, (function, device) = problem(T=14, V=512), PATHS[path]
    budget = 4 * (3 * 512 + 2 * (8 + 6)) * 4
    with Largest() as largest:
        run(function, inputs, upstream(inputs), device=device, workspace_mb=budget / 2**20)
    assert budget / 2 < largest.bytes <= budget < 14 * 512 * 4


@EVERY_PATH
def test_a_workspace_that_holds_no_row_is_rejected(path):
    function, device = PATHS[path]
    with pytest.raises(ValueError, match=r"workspace_mb: 0.001 .*row"):
        function(*(x.to(device) for x in problem(V=512)), workspace_mb=0.001)


def test_half_precision_heads_are_never_converted_whole_on_the_cpu():
    inputs = [x.half() for x in problem(T=4, H=64, G=48, V=600)]
    grad, budget = upstream(inputs), 600 * 64 * 2
    whole = run(chunked_kl.linear_kl, inputs, grad)
    with Largest() as largest:
        blocks = run(chunked_kl.linear_kl, inputs, grad, (True, False, True, False), workspace_mb=budget / 2**20)
    assert largest.bytes <= budget
    for i, tolerance in ((0, 1e-5), (1, 2e-3), (3, 2e-3)):
        torch.testing.assert_close(blocks[i], whole[i], rtol=tolerance, atol=tolerance)


@EVERY_PATH
def test_memory_that_was_not_written_is_not_read(path, monkeypatch):
    inputs, (function, device) = problem(T=6, V=133), PATHS[path]
    grad, options = upstream(inputs), dict(device=device, workspace_mb=4 * 8 * 192 / 2**20)  # the last chunk does not fill the workspace
    clean = run(function, inputs, grad, **options)

    def poisoned(create):
        return lambda *args, **kwargs: create(*args, **kwargs).fill_(torch.nan)

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    assert torch.empty(1).isnan().all()
    for x, y in zip(clean, run(function, inputs, grad, **options), strict=True):
        assert torch.equal(x, y)


@EVERY_PATH
@pytest.mark.parametrize("wanted", [(), (1, 2), (1,), (2,), (3,), (4,), (3, 4), (1, 2, 3, 4)], ids=str)
def test_products(path, wanted):
    """2 forward; backward 2 and one for each gradient."""
    T, H, G, V = 6, 8, 5, 64
    inputs, function = problem(T, H, G, V), PATHS[path][0]  # on the CPU also where there is a GPU: the counter knows no out_dtype
    if path == "triton" and GPU:
        pytest.skip("counted in the interpreter")
    leaves = [x.requires_grad_(i in wanted) for i, x in enumerate(inputs, 1)]
    with FlopCounterMode(display=False) as forward:
        kl = function(*leaves, workspace_mb=4 * 12 * 64 / 2**20)
    assert forward.get_total_flops() == 2 * T * V * (H + G)
    if wanted:
        with FlopCounterMode(display=False) as backward:
            kl.sum().backward()
        assert backward.get_total_flops() == 2 * T * V * (H + G + sum(H if i < 3 else G for i in wanted))


@EVERY_PATH
def test_no_rows(path):
    function, device = PATHS[path]
    kl, *grads = run(function, problem(T=0), torch.zeros(0), device=device)
    assert kl.shape == (0,)
    for x, y in zip(grads, problem(T=0), strict=True):
        assert torch.equal(x, torch.zeros_like(y))


@EVERY_PATH
def test_strided_inputs(path):
    function, device = PATHS[path]
    inputs = problem()
    grad = upstream(inputs)
    straight = run(function, inputs, grad, device=device)
    for x, y in zip(straight, run(function, [x.T.contiguous().T for x in inputs], grad, device=device), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@EVERY_PATH
def test_a_broken_row_shows_and_breaks_no_other(path):
    inputs, (function, device) = problem(), PATHS[path]
    grad = upstream(inputs)
    clean = run(function, inputs, grad, device=device)
    inputs[2][3, 1] = torch.nan
    broken = run(function, inputs, grad, device=device)
    others = torch.arange(5) != 3
    for i in (0, 1, 3):
        assert broken[i][3].isnan().all()
        torch.testing.assert_close(broken[i][others], clean[i][others], rtol=1e-6, atol=1e-6)


@EVERY_PATH
def test_sum_of_an_op_and_its_swap_is_the_symmetric_divergence(path):
    """One tensor as two arguments gets both gradients; the upstream gradient of a sum is an expanded scalar."""
    function, device = PATHS[path]

    def symmetric(f, inputs):
        leaves = [x.detach().requires_grad_() for x in inputs]
        hidden, weight, ref_hidden, ref_weight = leaves
        loss = (f(hidden, weight, ref_hidden, ref_weight) + f(ref_hidden, ref_weight, hidden, weight)).sum()
        loss.backward()
        return [loss.detach().cpu().double(), *(x.grad.cpu().double() for x in leaves)]

    exact = symmetric(reference.linear_kl, [x.double() for x in problem()])
    for x, y in zip(symmetric(function, [x.to(device) for x in problem()]), exact, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", [reference.linear_kl, chunked_kl.linear_kl], ids=["reference", "cpu"])
@pytest.mark.parametrize("temperature", [0.7, torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)], ids=["one", "per row"])
def test_gradcheck(function, temperature):
    inputs = [x.double().requires_grad_() for x in problem(T=3, H=4, G=3, V=11)]
    assert torch.autograd.gradcheck(lambda *x: function(*x, temperature=temperature), inputs)


def test_float64_on_the_cpu():
    inputs = [x.double() for x in problem()]
    grad = upstream(inputs).double()
    got, exact = (run(f, inputs, grad, temperature=0.7) for f in (chunked_kl.linear_kl, reference.linear_kl))
    for x, y in zip(got, exact, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)


@EVERY_PATH
@settings(max_examples=15, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.integers(1, 90)),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    rows=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_any_shape(path, shape, scale, temperature, rows, seed):
    inputs, (function, device) = problem(*shape, scale=scale, seed=seed), PATHS[path]
    grad = upstream(inputs)
    got = run(function, inputs, grad, device=device, temperature=temperature, workspace_mb=rows * 16 * 128 / 2**20)
    exact = run(reference.linear_kl, [x.double() for x in inputs], grad.double(), temperature=temperature)
    bound = 1e-5 * (1 + scale * shape[1] + scale * shape[2]) / temperature
    sizes = [1.0, *(1 + scale + x.abs().max().item() for x in inputs)]
    for name, x, y, size in zip(NAMES, got, exact, sizes, strict=True):
        assert (x - y).abs().max() <= bound * size * max(1, temperature, 1 / temperature), name


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_real_vocabulary(dtype):
    """Every warp of the backward writes over logits that others have read: wrong order would show."""
    inputs = [x.to(dtype) for x in problem(T=130, H=64, G=32, V=151937, scale=0.3)]
    check(run(kernels.linear_kl, inputs, upstream(inputs), device="cuda"), inputs, upstream(inputs))


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_more_rows_than_a_grid_has_along_y():
    inputs = problem(T=70_000, H=8, G=8, V=40)
    check(run(kernels.linear_kl, inputs, upstream(inputs), device="cuda"), inputs, upstream(inputs))

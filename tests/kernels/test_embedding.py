"""Packed embeddings: the kernels and the CPU path against torch in float64."""

import math
from types import SimpleNamespace

import pytest
import torch

from actial_fast.kernels import embedding
from actial_fast.packing import packed_ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# L rows, V ids, H columns, and per image row the feature it takes
CASES = {
    "mixed": (23, 11, 48, [0, 1, 2, 4, 5, 1, 0, 1]),  # feature 1 three times, 3 never, 0 twice
    "all images": (6, 3, 16, [5, 4, 3, 2, 1, 0]),
    "no images": (9, 7, 33, []),
    "one row": (1, 1, 1, [0]),
    "wide": (5, 4, 2 * embedding.WARPS * 32 * 8 + 5, [0, 0]),
    "ids repeat": (40, 2, 20, [1] * 9),
}
cases = pytest.mark.parametrize("case", CASES)


def problem(case: str, dtype=torch.float32, seed: int = 0) -> SimpleNamespace:
    L, V, H, rows = CASES[case]
    g = torch.Generator().manual_seed(seed)
    return SimpleNamespace(
        ids=torch.randint(V, (L,), generator=g).to(DEVICE),
        table=torch.randn(V, H, generator=g).to(DEVICE, dtype),
        features=torch.randn(max(rows, default=-1) + 1, H, generator=g).to(DEVICE, dtype),
        slots=torch.randperm(L, generator=g)[: len(rows)].sort().values.to(DEVICE),
        rows=torch.tensor(rows, dtype=torch.int64).to(DEVICE),
        grad=torch.randn(L, H, generator=g).to(DEVICE, dtype),
    )


def run(function, p, table=True, features=True) -> list[torch.Tensor]:
    """The output and the wanted gradients of table and features."""
    t, f = p.table.detach().requires_grad_(table), p.features.detach().requires_grad_(features)
    out = function(p.ids, t, f, p.slots, p.rows)
    if table or features:
        out.backward(p.grad.to(out.dtype))
    return [out.detach(), t.grad, f.grad]


def plain(ids, table, features, slots, rows):
    """One row after another, as the op is documented."""
    taken = dict(zip(slots.tolist(), rows.tolist(), strict=True))
    out = torch.stack([features[taken[i]].to(table.dtype) if i in taken else table[int(ids[i])] for i in range(len(ids))])
    return out + table[:0].sum() + features[:0].sum()  # 0, of which either has a gradient


def oracle(p) -> list[torch.Tensor]:
    """In float64: output, gradients, and the sums of the absolute values of what each gradient adds up."""
    p = SimpleNamespace(**{k: v.double() if v.is_floating_point() else v for k, v in vars(p).items()})
    return run(plain, p) + run(plain, SimpleNamespace(**vars(p) | {"grad": p.grad.abs()}))[1:]


def assert_agrees(got, want, torchs) -> None:
    """Copies are exact; sums have twice the error of torch in the same dtype, and two roundings of what is added up."""
    assert torch.equal(got[0].double(), want[0]), "output"
    for name, ours, exact, size, other in zip(("table", "features"), got[1:], want[1:3], want[3:], torchs[1:], strict=True):
        assert ours.shape == exact.shape and ours.isfinite().all(), name
        floor = 2 * torch.finfo(ours.dtype).eps * size + 1e-12
        assert ((ours.double() - exact).abs() <= 2 * (other.double() - exact).abs() + floor).all(), name


@cases
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", [embedding.embed, packed_ops.embed], ids=["kernels", "door"])
def test_output_and_gradients(function, case, dtype):
    p = problem(case, dtype)
    got = run(function, p)
    assert got[0].dtype == got[1].dtype == got[2].dtype == dtype
    assert_agrees(got, oracle(p), run(plain, p))


@pytest.mark.parametrize("spoil", [lambda x: 0 * x, lambda x: 1.01 * x, lambda x: x.roll(1, 0), lambda x: x * math.nan])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_wrong_result_fails_the_comparison(spoil, which):
    p = problem("mixed")
    got, want, torchs = run(embedding.embed, p), oracle(p), run(plain, p)
    assert_agrees(got, want, torchs)
    got[which] = spoil(got[which])
    with pytest.raises(AssertionError, match=("output", "table", "features")[which]):
        assert_agrees(got, want, torchs)


@pytest.mark.parametrize("case", ["mixed", "no images"])
def test_gradients_of_the_cpu_path(case):
    p = problem(case)
    inputs = [x.double().cpu().requires_grad_() for x in (p.table, p.features)]
    index = [x.cpu() for x in (p.ids, p.slots, p.rows)]
    function = lambda t, f: packed_ops.embed(index[0], t, f, *index[1:])  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs)


def test_the_door_sends_cuda_tensors_to_the_kernels(monkeypatch):
    p, seen = problem("mixed"), []
    forward = embedding.embed_forward
    monkeypatch.setattr(packed_ops, "_on_gpu", lambda x: True)
    monkeypatch.setattr(embedding, "embed_forward", lambda *a: seen.append(1) or forward(*a))
    p.table = torch.cat([p.table, p.table], 1)[:, :48]  # rows apart
    p.features = p.features.T.contiguous().T  # columns apart
    assert_agrees(run(packed_ops.embed, p), oracle(p), run(plain, p))
    assert seen == [1]


def test_no_features_at_all():
    p = problem("no images")
    assert torch.equal(packed_ops.embed(p.ids, p.table, None, p.slots, p.rows), p.table[p.ids])


def test_features_of_another_dtype():
    p = problem("mixed")
    p.features = p.features.half()
    want = oracle(p)
    for function in (embedding.embed, packed_ops.embed):
        out, table, features = run(function, p)
        assert out.dtype == table.dtype == torch.float32 and features.dtype == torch.float16
        assert torch.equal(out.double(), want[0])
        torch.testing.assert_close(features.double(), want[2], rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("function", [embedding.embed, packed_ops.embed], ids=["kernels", "door"])
def test_many_uses_add_up_in_float32(function):
    n = 60  # in 16 bits 0.4 is lost, or rounded up, when it is added to 1000
    half = torch.bfloat16
    features = torch.zeros(1, 16, device=DEVICE, dtype=half, requires_grad=True)
    index = torch.arange(n, device=DEVICE)
    out = function(0 * index, torch.zeros(1, 16, device=DEVICE, dtype=half), features, index, 0 * index)
    grad = torch.where(index == 0, 1000.0, 0.4).to(half)[:, None].expand(n, 16)
    out.backward(grad)
    exact = grad.double().sum(0)
    assert ((features.grad[0].double() - exact).abs() <= torch.finfo(half).eps * exact).all()


def test_the_order_of_the_sum_is_fixed():
    p = problem("mixed")
    first, second = (run(embedding.embed, p) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("table", "features"), [(True, False), (False, True), (False, False)])
def test_what_is_frozen_costs_nothing(table, features, monkeypatch):
    asked = []
    for name in ("table_grad", "features_grad"):
        function = getattr(embedding, name)
        monkeypatch.setattr(embedding, name, lambda *a, name=name, function=function: asked.append(name) or function(*a))
    p = problem("mixed")
    got, want = run(embedding.embed, p, table, features), oracle(p)
    assert asked == ["table_grad"] * table + ["features_grad"] * features
    for needed, ours, exact in zip((table, features), got[1:], want[1:3], strict=True):
        assert (ours is not None) == needed
        if needed:
            torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6)


@cases
def test_every_output_is_written_and_nothing_beyond(case, monkeypatch):
    p, buffers = problem(case), []

    def poisoned(*shape, dtype, device):
        buffers.append(torch.full((math.prod(shape) + 4096,), math.nan, dtype=dtype, device=device))
        return buffers[-1][: math.prod(shape)].view(shape)

    monkeypatch.setattr(torch, "empty", poisoned)
    out = embedding.embed_forward(p.ids, p.table, p.features, p.slots, p.rows)
    grad = embedding.features_grad(p.grad, p.slots, p.rows, len(p.features), torch.float32)
    assert len(buffers) == 2
    for x, buffer in zip((out, grad), buffers, strict=True):
        assert x.isfinite().all() and buffer[x.numel() :].isnan().all()


@pytest.mark.parametrize("bad", [-1, -(2**40), 11, 2**40])
def test_out_of_range_reads_nothing(bad):
    """A wild address would fault; what must not be read here is NaN's neighbour, and gets no gradient."""
    p = problem("mixed")
    text = next(i for i in range(len(p.ids)) if i not in p.slots.tolist())
    p.ids[text] = bad
    p.ids[p.slots[0]] = bad  # never looked at: an image row
    p.rows[2] = bad
    out, table, features = run(embedding.embed, p)
    assert out.isnan().all(1).nonzero().flatten().tolist() == sorted([text, int(p.slots[2])])
    kept = [i for i in range(len(p.ids)) if i != text and i not in p.slots.tolist()]
    want = torch.zeros_like(p.table).index_add_(0, p.ids[kept], p.grad[kept])
    torch.testing.assert_close(table, want, rtol=1e-6, atol=1e-6)
    kept = [j for j in range(len(p.rows)) if j != 2]
    want = torch.zeros_like(p.features).index_add_(0, p.rows[kept], p.grad[p.slots[kept]])
    torch.testing.assert_close(features, want, rtol=1e-6, atol=1e-6)


def test_no_rows():
    p = problem("no images")
    p.ids = p.ids[:0]
    out, table, features = run(embedding.embed, SimpleNamespace(**vars(p) | {"grad": p.grad[:0]}))
    assert out.shape == (0, 33) and not table.any() and features.shape == (0, 33)


def test_an_expanded_gradient():
    p = problem("mixed")
    features = p.features.requires_grad_()
    embedding.embed(p.ids, p.table, features, p.slots, p.rows).sum().backward()
    assert torch.equal(features.grad[:, 0], p.rows.bincount(minlength=len(features)).float())


ERRORS = {
    "table: expected (V, H)": {"table": torch.ones(4)},
    "features: expected (F, 3)": {"features": torch.ones(2, 5)},
    "input_ids: expected int64": {"ids": torch.tensor([0.0])},
    "image_rows: expected one for each of 1": {"rows": torch.tensor([0, 1])},
    "input_ids: expected values in [0, 4), got 0 to 4": {"ids": torch.tensor([0, 4, 1])},
    "image_slots: expected values in [0, 3)": {"slots": torch.tensor([3])},
    "image_rows: expected values in [0, 2), got -1": {"rows": torch.tensor([-1])},
    "image_slots: must ascend": {"slots": torch.tensor([2, 1]), "rows": torch.tensor([0, 1])},
    "features: on meta but table is on cpu": {"features": torch.ones(2, 3, device="meta")},
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    given = {"ids": torch.tensor([0, 1, 2]), "table": torch.ones(4, 3), "features": torch.ones(2, 3)}
    given |= {"slots": torch.tensor([1]), "rows": torch.tensor([0])} | ERRORS[message]
    with pytest.raises(ValueError) as raised:
        packed_ops.embed(*given.values())
    assert str(raised.value).startswith(message)


@pytest.mark.skipif(DEVICE == "cpu", reason="only a GPU can be waited for")
def test_no_sync():
    p = problem("ids repeat")
    p.ids = p.ids.repeat(200)  # torch's gradient of the table has one path for few ids and one for many
    p.grad = p.grad.repeat(200, 1)
    run(packed_ops.embed, p)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(packed_ops.embed, p)
    finally:
        torch.cuda.set_sync_debug_mode("default")

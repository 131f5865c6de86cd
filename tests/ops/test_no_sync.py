"""The fake GPU of the tests: it finds what waits, lets through what does not, and runs the backward pass that autograd would run."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from actial_fast import GRPOSpec, linear_grpo_loss, ops
from tests.no_sync import COPIES, HostSync, backward, fake_cuda, put


def on_device(device, *, grad=False):
    """x (4, 3) and i (4,), on the device."""
    x = torch.randn(4, 3).to(device, non_blocking=True).requires_grad_(grad)
    return x, torch.tensor([1, 0, 3, 2]).to(device, non_blocking=True)


WAITS = {
    "item": lambda x, i: x.sum().item(),
    "float": lambda x, i: float(x.sum()),
    "tolist": lambda x, i: i.tolist(),
    "if": lambda x, i: 1 if x.sum() > 0 else 2,
    "slice": lambda x, i: x[: i[0]],
    "arange": lambda x, i: torch.arange(i[0]),
    "nonzero": lambda x, i: x.nonzero(),
    "where": lambda x, i: torch.where(x > 0),
    "masked_select": lambda x, i: x.masked_select(x > 0),
    "mask": lambda x, i: x[x > 0],
    "set by mask": lambda x, i: x.__setitem__(i > 1, x[:2]),
    "unique": lambda x, i: i.unique(),
    "unique_consecutive": lambda x, i: i.unique_consecutive(),
    "repeat_interleave": lambda x, i: i.repeat_interleave(i),
    "bincount": lambda x, i: i.bincount(),
    "equal": lambda x, i: torch.equal(x, x),
    "allclose": lambda x, i: torch.allclose(x, x),
    "multinomial": lambda x, i: x.abs().multinomial(1),
    "cpu": lambda x, i: x.cpu(),
    "copy back": lambda x, i: torch.empty(4, 3).copy_(x),
    "read a copy": lambda x, i: x.to("cpu", non_blocking=True).sum().item(),
    "to": lambda x, i: torch.ones(3).to(x.device),
    "copy_": lambda x, i: x.copy_(torch.ones(4, 3)),
    "tensor": lambda x, i: torch.tensor([1.0, 2.0], device=x.device),
    "host index": lambda x, i: x[torch.tensor([0, 1])],
    "index_put_": lambda x, i: x.index_put_((i,), x, accumulate=True),
}


@pytest.mark.parametrize("op", WAITS.values(), ids=WAITS)
def test_what_waits_is_found(op):
    with fake_cuda() as device:
        given = on_device(device)
        with pytest.raises(HostSync):
            op(*given)


LETS = {
    "non_blocking": lambda x, i: x.to("cpu", non_blocking=True),
    "pinned": lambda x, i: torch.ones(3).pin_memory().to(x.device, non_blocking=True),
    "factory": lambda x, i: torch.full((2, 3), 1.5, device=x.device),
    "number": lambda x, i: (x + 2.0) * torch.tensor(3.0),
    "set": lambda x, i: x.__setitem__(0, 1.0),
    "fill by mask": lambda x, i: x.__setitem__(x > 0, 0.0),
    "index": lambda x, i: x[i.argsort()],
    "index_add": lambda x, i: x.index_add(0, i, x),
    "repeat_interleave": lambda x, i: i.repeat_interleave(i, output_size=6),
    "split": lambda x, i: x.split([1, 3]),
    "where": lambda x, i: torch.where(x > 0, x, 0),
}


@pytest.mark.parametrize("op", LETS.values(), ids=LETS)
def test_what_does_not_wait_is_let_through(op):
    with fake_cuda() as device:
        op(*on_device(device))


def test_a_wait_in_the_backward_pass_is_found():
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * grad.max().item()

    with fake_cuda() as device:
        x, _ = on_device(device, grad=True)
        loss = Reads.apply(x).sum()
        with pytest.raises(HostSync, match="_local_scalar_dense"):
            loss.backward()


def test_the_host_computes_for_real():
    with fake_cuda() as device:
        lengths = torch.tensor([0, 2, 5]).diff()
        x = torch.ones(5, 2).to(device, non_blocking=True)
        assert lengths.tolist() == [2, 3] and [len(part) for part in x.split(lengths.tolist())] == [2, 3]
        assert x.is_cuda and x.device == device and not lengths.is_cuda


def test_devices_must_agree_and_autocast_casts():
    with fake_cuda() as device:
        x, _ = on_device(device)
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(4, 3)
        linear = put(nn.Linear(3, 2), device)
        with torch.autocast("cuda", torch.bfloat16):
            assert linear(x).dtype == torch.bfloat16
        assert linear(x).dtype == torch.float32


def test_modules_keep_their_ties_and_what_is_frozen():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    first.bias.requires_grad_(False)
    first.register_buffer("sizes", torch.ones(3))
    with fake_cuda() as device:
        put(nn.ModuleList([first, second]), device)
    assert first.weight is second.weight and first.weight.is_cuda and first.sizes.is_cuda
    assert first.weight.requires_grad and not first.bias.requires_grad


def test_nothing_is_left_behind():
    before = torch.autograd.backward
    with pytest.raises(HostSync), fake_cuda() as device:
        torch.ones(3).to(device)
    assert torch.autograd.backward is before
    x = torch.ones(3, requires_grad=True)
    x.sum().backward()
    assert x.grad.tolist() == [1, 1, 1] and torch.ones(2, requires_grad=True).sum().item() == 2


class Parts(torch.autograd.Function):
    """Two outputs of which one may stay unused, arguments that are no tensors, gradients that are None."""

    @staticmethod
    def forward(ctx, scale, x, index, y):
        ctx.save_for_backward(x, y)
        ctx.scale = scale
        return scale * x * y, x + y

    @staticmethod
    def backward(ctx, product, total):
        x, y = ctx.saved_tensors
        return None, ctx.scale * product * y + total, None, ctx.scale * product * x + total if ctx.needs_input_grad[3] else None


def network(x, y, table, frozen):
    a, _ = Parts.apply(2.0, x, torch.tensor(1), y)
    b = checkpoint(lambda z: (z @ table).tanh(), a + frozen, use_reentrant=False)
    c, d = b.split([2, 3])
    e, f = Parts.apply(0.5, c, None, frozen[:2])
    return [(e * f).sum() + d.bfloat16().float().exp().mean(), table[torch.tensor([1, 1, 0])].sum(0) * y[0]]


@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_backward_is_autograds():
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=g, dtype=torch.float32) for shape in ((5, 4), (1, 4), (4, 4))]
    frozen = torch.randn(5, 4, generator=g)
    grads = []
    for run in (torch.autograd.backward, backward):
        inputs = [x.clone().requires_grad_() for x in leaves]
        loss, rows = network(*inputs, frozen)
        run([loss, rows], [None, torch.ones(4)])
        grads.append([x.grad for x in inputs])
    for mine, theirs in zip(*reversed(grads), strict=True):
        torch.testing.assert_close(mine, theirs)
        assert theirs.any()


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_a_fused_loss_runs_without_its_kernels():
    """The Python around Triton's launches runs on fake tensors, forward and backward."""
    with fake_cuda() as device:
        hidden, head = (torch.randn(n, 32).to(device, non_blocking=True).bfloat16().requires_grad_() for n in (12, 64))
        targets, logp = (x.to(device, non_blocking=True) for x in (torch.arange(12), torch.zeros(12)))
        spec = GRPOSpec.named("dapo", beta=0.01)
        loss, *_ = linear_grpo_loss(hidden, head, targets, logp, logp, logp, spec, token_weight=logp)
        loss.backward()
    assert hidden.grad.shape == (12, 32) and head.grad.shape == (64, 32) and head.grad.is_cuda


class FromHost(TorchDispatchMode):
    """Remembers what is copied from the host to the device."""

    def __init__(self):
        super().__init__()
        self.sources: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket in COPIES and isinstance(out, Tensor) and out.is_cuda:
            source = args[1] if function.overloadpacket is torch.ops.aten.copy_ else args[0]
            if not source.is_cuda:
                self.sources.append(source.data_ptr())
        return out


def capturable(device, op: str, spec: GRPOSpec | None, cu_seqlens: Tensor) -> Tensor:
    hidden, head, other = (torch.empty(n, 32, device=device, dtype=torch.bfloat16, requires_grad=True) for n in (12, 64, 12))
    targets, rows = torch.empty(12, device=device, dtype=torch.int64), torch.empty(12, device=device)
    if op == "linear_logprob":
        return sum(x.sum() for x in ops.linear_logprob(hidden, head, targets, temperature=rows))
    if op in ("several targets", "top_k and top_p"):
        several, kept = (targets[:, None].expand(-1, 5), {}) if op == "several targets" else (targets, {"top_k": 5, "top_p": 0.9})
        return sum(x.sum() for x in ops.linear_logprob(hidden, head, several, temperature=rows, **kept))
    if op == "linear_cross_entropy":
        return ops.linear_cross_entropy(hidden, head, targets, rows)
    if op == "linear_kl":
        return ops.linear_kl(hidden, head, other, head.detach()).sum()
    given = dict(targets=targets, advantages=rows[: len(cu_seqlens) - 1], old_logp=rows, ref_logp=rows, spec=spec, cu_seqlens=cu_seqlens)
    if op == "linear_grpo_loss":
        return ops.linear_grpo_loss(hidden, head, workspace_mb=0.006, weight_grad=torch.empty(64, 32, device=device), **given).loss
    return ops.grpo_loss_from_logits(hidden @ head.T, **given).loss


GRAPHS = [(op, None) for op in ("linear_logprob", "several targets", "top_k and top_p", "linear_cross_entropy", "linear_kl")]
GRAPHS += [(op, spec) for op in ("linear_grpo_loss", "grpo_loss_from_logits") for spec in ("grpo", "dapo", "gspo", "vespo")]


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.parametrize(("op", "spec"), GRAPHS)
def test_a_cuda_graph_may_capture_an_op(op, spec):
    """Forward and backward wait for nothing, and copy nothing from the host but the caller's own cu_seqlens, which may be pinned."""
    cu_seqlens = torch.tensor([0, 5, 5, 9, 12])
    with fake_cuda() as device, FromHost() as copied:
        capturable(device, op, spec and GRPOSpec.named(spec, beta=0.1), cu_seqlens).backward()
    assert set(copied.sources) <= {cu_seqlens.data_ptr()} and bool(copied.sources) == (spec is not None)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_chunks_share_one_copy_of_cu_seqlens():
    cu_seqlens = torch.tensor([0, 5, 5, 9, 12])
    with fake_cuda() as device, FromHost() as copied:
        hidden, head = (torch.empty(n, 32, device=device, dtype=torch.bfloat16, requires_grad=True) for n in (12, 64))
        rows = torch.empty(12, device=device)
        targets, spec = torch.empty(12, device=device, dtype=torch.int64), GRPOSpec.named("gspo")
        more = {"token_weight": rows, "cu_seqlens": cu_seqlens, "workspace_mb": 0.006}
        linear_grpo_loss(hidden, head, targets, rows, rows, None, spec, **more).loss.backward()
    assert len(copied.sources) == 1

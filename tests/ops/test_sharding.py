"""Sharded and replicated parameters: what the ops refuse, and what is right instead, on two ranks over gloo."""

import inspect
import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from actial_fast import AdvantageSpec, GRPOSpec, ops
from actial_fast.packing.packed_ops import embed

T, H, V = 6, 8, 11
ROWS = {
    "targets": torch.arange(T),
    "token_weight": torch.full((T,), 1 / T),
    "x": torch.randn(T, generator=torch.Generator().manual_seed(1)),
}


def tensors(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(T, H, generator=g), torch.randn(V, H, generator=g)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('ranks') / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


h, w = tensors()
x, targets, weights = ROWS["x"], ROWS["targets"], ROWS["token_weight"]
ids = torch.tensor([0, 1, 2])
CALLS = {  # an op, its arguments by name, and those that are tried as DTensors
    "linear_logprob": (ops.linear_logprob, {"hidden": h, "weight": w, "targets": targets, "bias": torch.ones(V)}),
    "linear_grpo_loss": (
        ops.linear_grpo_loss,
        {"hidden": h, "weight": w, "targets": targets, "advantages": x, "old_logp": x, "ref_logp": x, "spec": GRPOSpec()},
    ),
    "linear_cross_entropy": (
        ops.linear_cross_entropy,
        {"hidden": h, "weight": w, "targets": targets, "token_weight": weights, "weight_grad": torch.zeros(V, H)},
    ),
    "linear_kl": (ops.linear_kl, {"hidden": h, "weight": w, "ref_hidden": h, "ref_weight": w}),
    "logprob_from_logits": (ops.logprob_from_logits, {"logits": h, "targets": targets}),
    "grpo_loss_from_logits": (
        ops.grpo_loss_from_logits,
        {"logits": h, "targets": targets, "advantages": x, "old_logp": x, "ref_logp": x, "spec": GRPOSpec()},
    ),
    "group_advantages": (ops.group_advantages, {"rewards": x, "groups": targets, "spec": AdvantageSpec()}),
    "token_kl": (ops.token_kl, {"logp": x, "ref_logp": x}),
    "embed": (embed, {"input_ids": targets, "table": w, "features": None, "image_slots": ids[:0], "image_rows": ids[:0]}),
}


@pytest.mark.parametrize("placement", [Shard(0), Replicate()], ids=str)
@pytest.mark.parametrize(
    ("op", "given", "name"), [(op, given, name) for op, given in CALLS.values() for name, v in given.items() if isinstance(v, torch.Tensor)]
)
def test_a_dtensor_is_refused_by_name_and_with_the_way_out(mesh, op, given, name, placement):
    sharded = given | {name: distribute_tensor(given[name], mesh, [placement])}
    message = rf"{name}: a DTensor, .*unshard\(\), or pass {name}\.full_tensor\(\)"
    with pytest.raises(ValueError, match=message):
        op(**sharded)
    positional = [n for n, p in inspect.signature(op).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD and n in given]
    with pytest.raises(ValueError, match=message):
        op(*[sharded[n] for n in positional], **{n: v for n, v in sharded.items() if n not in positional})


def test_full_tensor_gives_the_gradient_to_the_shards(mesh):
    shard = distribute_tensor(w, mesh, [Shard(0)]).requires_grad_()
    whole = w.clone().requires_grad_()
    ops.linear_cross_entropy(h, shard.full_tensor(), targets, weights).backward()
    ops.linear_cross_entropy(h, whole, targets, weights).backward()
    assert isinstance(shard.grad, DTensor)
    torch.testing.assert_close(shard.grad.full_tensor(), whole.grad)


def test_weight_grad_of_a_reduced_parameter_is_refused_on_two_ranks(tmp_path):
    torch.multiprocessing.spawn(_on_rank, (str(tmp_path / "store"),), nprocs=2)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.lm_head = torch.nn.Linear(H, H), torch.nn.Linear(H, V, bias=False)

    def forward(self, rows, weight_grad=None, hidden_only=False):
        hidden = self.trunk(rows)
        if hidden_only:
            return hidden
        return ops.linear_cross_entropy(hidden, self.lm_head.weight, targets, weights, weight_grad=weight_grad)


def _on_rank(rank: int, store: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mine, other = (tensors(seed=r)[0] for r in (rank, 1 - rank))
    buffer = torch.zeros(V, H)
    refused = pytest.raises(ValueError, match="weight_grad: weight is a parameter of DistributedDataParallel, which reduces")
    model = DistributedDataParallel(Model())
    with refused:
        model(mine, buffer)
    hidden = model(mine, hidden_only=True)
    with refused:  # outside of the wrapper's forward
        ops.linear_cross_entropy(hidden, model.module.lm_head.weight, targets, weights, weight_grad=buffer)
    model(mine).backward()  # without the buffer it is reduced

    alone = Model()  # both ranks' mean, one after the other, with the buffer
    for rows in (mine, other):
        alone(rows, buffer).backward()
    torch.testing.assert_close(buffer / 2, model.module.lm_head.weight.grad)

    ignoring = Model()  # the way out that the message names
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(ignoring, ["lm_head.weight"])
    ignoring, share = DistributedDataParallel(ignoring), torch.zeros(V, H)
    ignoring(mine, share).backward()
    dist.all_reduce(share)
    torch.testing.assert_close(share / 2, model.module.lm_head.weight.grad)
    torch.testing.assert_close(ignoring.module.trunk.weight.grad, model.module.trunk.weight.grad)

    sharded = fully_shard(Model(), mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(ValueError, match="weight_grad: weight is a parameter of FSDP2"):
        sharded(mine, buffer)
    dist.destroy_process_group()

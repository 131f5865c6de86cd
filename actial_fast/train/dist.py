"""Ranks: one process per device, on a device mesh; every loop runs the same with one rank and with many.

Losses are divided by GLOBAL counts, so gradients are summed over ranks, never averaged: the same global batch gives the same update for
any number of ranks. A rank that fails raises; torchrun then ends the others.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import Store
from torch.distributed.tensor import DTensor

from actial_fast.ops.ranges import named


class Agreed(ValueError):
    """An error that every rank raises alike, so that one of them is enough to tell it."""

    agreed = True


class PeerLost(ValueError):
    """Another rank has ended, or did not come for too long."""

    peer_lost = True


@dataclass(frozen=True)
class World:
    """This process among its peers. mesh is None when it is alone."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None
    _grids: dict[int, DeviceMesh] = field(default_factory=dict, repr=False)

    def grid(self, replicas: int) -> DeviceMesh:
        """The ranks as so many rows of neighbours, mesh dimensions "replica" and "shard". Every rank calls; made once."""
        if replicas not in self._grids:
            shape = replicas, self.size // replicas
            self._grids[replicas] = init_device_mesh(self.device.type, shape, mesh_dim_names=("replica", "shard"))
        return self._grids[replicas]

    @property
    def main(self) -> bool:
        """True on the rank that logs and saves."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over all ranks, the same on each."""
        if self.mesh is not None:
            dist.all_reduce(tensor)
        return tensor

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks of numbers on the host, in float64. Hosts wait for each other (gloo), not for a device."""
        if self.mesh is None:
            return [float(value) for value in values]
        return self.sum(torch.tensor(values, dtype=torch.float64)).tolist()

    def max(self, value: float) -> float:
        """The largest `value` over all ranks, on the host like `total`."""
        if self.mesh is None:
            return value
        tensor = torch.tensor(float(value), dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.item()

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all ranks, in rank order, on every rank."""
        if self.mesh is None:
            return items
        lists: list[list[Any]] = [[] for _ in range(self.size)]
        dist.all_gather_object(lists, items)
        return [item for part in lists for item in part]

    def show(self, board: str, text: str) -> None:
        """Add to what all ranks can read on a board, without waiting for any of them."""
        if self.mesh is not None:
            self._store.append(board, text)  # type: ignore[attr-defined]  # the stub lacks it

    def shown(self, board: str) -> str:
        """What ranks have added to a board so far, end to end; "" where there is none, and for one rank."""
        return self._store.get(board).decode() if self.mesh is not None and self._store.check([board]) else ""

    def wipe(self, board: str) -> None:
        """Remove a board, once no rank reads it any more."""
        if self.mesh is not None:
            self._store.delete_key(board)

    @property
    def _store(self) -> Store:
        assert self.mesh is not None
        return self.mesh.get_group().get_group_store()

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.mesh is not None:
            dist.barrier()


@contextlib.contextmanager
def world(minutes: float = 60) -> Iterator[World]:
    """The world that torchrun describes in the environment, or a single process; ended on leaving. minutes: how long a rank waits for
    another before it gives the run up."""
    cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield World(0, 1, device)
        return
    # gloo beside NCCL: what hosts agree on does not wait for the devices
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=datetime.timedelta(minutes=minutes))
    try:
        yield World(dist.get_rank(), size, device, init_device_mesh(device.type, (size,), mesh_dim_names=("data",)))
    except RuntimeError as error:
        if any(sign in str(error) for sign in ("Connection closed", "Connection reset", "Broken pipe")):
            raise PeerLost("another rank has ended; its own message, or a signal, says why") from error
        if isinstance(error, dist.DistError) or "imed out" in str(error):
            raise PeerLost(f"no answer from another rank for {minutes:g} minutes (dist.timeout): {str(error).splitlines()[0]}") from error
        raise
    finally:
        # after an error the peers may never answer, so only a clean end waits for the group
        dist.destroy_process_group()


def reduce_gradients(parameters: list[nn.Parameter], where: World) -> None:
    """Sum the gradients of replicated parameters over ranks, in one flat message per dtype; a no-op for one rank or sharded ones."""
    if where.mesh is None or any(isinstance(p, DTensor) for p in parameters):
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is None:  # this rank had no row that reaches it
            parameter.grad = torch.zeros_like(parameter)
        by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    with named("gradient reduction"):
        for dtype in sorted(by_dtype, key=str):
            grads = by_dtype[dtype]
            flat = torch.cat([g.reshape(-1) for g in grads])
            dist.all_reduce(flat)
            for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                grad.copy_(part.view_as(grad))


def clip_gradients(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Scale the gradients down to the global norm `limit` (0: leave them); the norm before, over all ranks, on the device."""
    with named("gradient reduction"):
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit or float("inf"))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm.to(parameters[0].device)  # without gradients it is on the CPU

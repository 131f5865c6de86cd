"""What training over several ranks does to the tensors that the ops are handed: refused, with a way out, where the result would be wrong.

FSDP2 and tensor parallelism keep parameters as DTensors, whose local shard is not what an op means by (V, H). DistributedDataParallel and
FSDP2 reduce the gradients that autograd gives their parameters; one that an op adds to `weight_grad` passes them by.
"""

from __future__ import annotations

import functools
import gc
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def plain_tensors(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which raises a ValueError naming the argument where it is handed a DTensor."""
    names = tuple(inspect.signature(function).parameters)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        given: list[tuple[str, Any]] = [*zip(names, args, strict=False), *kwargs.items()]
        for name, x in given:
            if isinstance(x, Tensor) and hasattr(x, "full_tensor"):  # a DTensor; importing its class takes longer than the ops
                placed = getattr(x, "placements", ())
                raise ValueError(
                    f"{name}: a DTensor, {tuple(x.shape)} placed {placed}, as FSDP2 and tensor parallelism make them; these ops take plain "
                    "tensors: call them where FSDP has gathered the weights, inside of the module's forward or after its unshard(), or "
                    f"pass {name}.full_tensor(), through which gradients find back to the shards; a head that tensor parallelism has "
                    "spread over the vocabulary goes in as its to_local(), with vocab_parallel"
                )
        return function(*args, **kwargs)

    return checked


def refuse_reduced(weight: Tensor) -> None:
    """ValueError where the gradient of a weight is DistributedDataParallel's or FSDP2's to reduce, so that `weight_grad` would stay local.

    Looked for where there are several ranks, once for each weight, at its first use: in all objects alive, because neither marks its
    parameters. Not while a compiler traces.
    """
    if torch.compiler.is_compiling() or not _several_ranks():
        return
    if getattr(weight, _SEEN, False):
        return
    owner = next((name for x in gc.get_objects() if (name := _reduces(x, weight))), None)
    if owner is not None:
        raise ValueError(
            f"weight_grad: weight is a parameter of {owner}, which reduces over ranks what autograd gives it, and autograd gets nothing: "
            "the buffer would hold this rank's share alone. Leave weight_grad out; or have the wrapper ignore the head, all-reduce the "
            "buffer yourself, and divide it by the number of ranks"
        )
    setattr(weight, _SEEN, True)


_SEEN = "_actial_fast_reduced_by_nobody"


def _several_ranks() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _reduces(x: Any, weight: Tensor) -> str | None:
    """The name of what reduces the weight's gradient, if x does."""
    kind = type(x)
    if issubclass(kind, torch.nn.parallel.DistributedDataParallel):
        return kind.__name__ if any(p is weight for p in x.__dict__.get("_module_parameters", ())) else None
    if kind.__name__ == "FSDPParam":
        return "FSDP2" if getattr(x, "_unsharded_param", None) is weight else None
    return None

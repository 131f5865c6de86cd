"""How the ops become torch.library operators, which a compiler leaves whole: torch.compile and torch.export see one node with known
outputs and a known derivative where they would otherwise meet Triton launches, loops over chunks and values that the host reads.

`ops` comes to the operators while it is being compiled, with checked arguments; what an operator runs is what `ops` runs outside of the
compiler, so there is one implementation of each op. Outside, autograd.Functions call it directly: they cost less per call, they may hand
the gradient that they hold to autograd instead of a copy, and whatever watches PyTorch's dispatcher (counters of FLOPs and memory, the
fake GPU of the tests) sees what happens within.

Operators take tensors, numbers and strings, and return tensors that are nobody else's: a specification travels as words and numbers
(`flat`), a temperature as a number and a tensor, and what is not wanted is an empty tensor. Those that write to an argument say so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from actial_fast.ops.spec import AdvantageSpec, GRPOSpec


def implementation(x: Tensor, module: str, cpu: Callable[..., Any]) -> Callable[..., Any]:
    """The function of that name in kernels/module.py for CUDA tensors, `cpu` on the CPU and for no rows; outside of autocast.

    Its gradients are constants to autograd: who differentiates them (create_graph=True) gets an error and not a wrong result.
    """
    function = cpu
    if on_gpu(x) and len(x):  # imported here, so that the CPU needs no Triton
        function = getattr(importlib.import_module(f"actial_fast.kernels.{module}"), cpu.__name__)

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(x.device.type, enabled=False), current_device(x):
            outputs = function(*args, **kwargs)
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        if isinstance(first, Tensor) and first.grad_fn is not None:
            first.grad_fn.register_hook(lambda grads, _: _constants(grads))
        return outputs

    return run


def current_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """x's device as the current one: Triton launches there, and a model may be split over several. Backward passes need it not, since
    autograd runs each node on the device of its forward pass."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For the backward pass of an op: no graph is made of it, and who asks for one (create_graph=True) and uses it gets an error."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        return _constants(outputs)

    return run


def _constants(grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Gradients that an op has computed; where a graph is made of the backward pass, ones whose differentiation is an error."""
    if not torch.is_grad_enabled():
        return grads
    given = [x.detach().requires_grad_() for x in grads if x is not None]
    refusing = iter(_Refuse.apply(*given) if given else ())
    return tuple(None if x is None else next(refusing) for x in grads)


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in grads)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            "the ops of actial_fast are differentiable once, and the gradient of one was differentiated again (create_graph=True); "
            "the functions of the same names in actial_fast.ops.reference have second derivatives"
        )


def on_gpu(x: Tensor) -> bool:
    return x.is_cuda  # a function of its own, so that tests can send CPU tensors through Triton's interpreter


def capability(x: Tensor) -> tuple[int, int]:
    """Compute capability of x's device; (0, 0) on a CPU."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0)


def operator(fake: Callable[..., Any], *writes: str) -> Callable[[Callable[..., Any]], torch._ops.OpOverload]:
    """Registers what follows as an operator of its name; fake gives the outputs' shapes and dtypes, writes names what it writes to."""

    def register(run: Callable[..., Any]) -> torch._ops.OpOverload:
        @functools.wraps(run)
        def kernel(*args: Any) -> Any:
            # compiled code runs below autograd, of which the CPU's losses make use within themselves
            below = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
            with below, torch.no_grad():
                return run(*args)

        name = f"actial_fast::{run.__name__.lstrip('_')}"
        torch.library.define(name, torch.library.infer_schema(run, mutates_args=writes), tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(name, ("cpu", "cuda"), kernel)
        torch.library.register_fake(name, fake)
        return getattr(torch.ops.actial_fast, run.__name__.lstrip("_")).default

    return register


def filled(like: Tensor, *outputs: Tensor | None) -> tuple[Tensor, ...]:
    """The outputs, an empty tensor for None."""
    return tuple(like.new_empty(0) if x is None else x for x in outputs)


def split(temperature: float | Tensor) -> tuple[float, Tensor | None]:
    """A temperature for all rows, and those of each row if that is what is given."""
    return (1.0, temperature) if isinstance(temperature, Tensor) else (temperature, None)


def joined(temperature: float, row_temperature: Tensor | None) -> float | Tensor:
    """What `split` took apart."""
    return temperature if row_temperature is None else row_temperature


# ---- specifications


def flat(spec: GRPOSpec | AdvantageSpec) -> tuple[str, list[float]]:
    """A specification's words and numbers, in the order of its fields, NaN for None: constants of a graph, whose change makes a new one."""
    words, numbers = _FIELDS[type(spec)]
    values = [getattr(spec, name) for name in numbers]
    return ",".join([str(getattr(spec, name)) for name in words]), [math.nan if x is None else x for x in values]


@functools.lru_cache(maxsize=64)
def spec_of(kind: type, words: str, *numbers: float) -> Any:
    """The specification that `flat` took apart."""
    word_names, number_names = _FIELDS[kind]
    said = {name: {"True": True, "False": False}.get(x, x) for name, x in zip(word_names, words.split(","), strict=True)}
    return kind(**said, **{name: None if math.isnan(x) else x for name, x in zip(number_names, numbers, strict=True)})


def _fields(kind: type) -> tuple[tuple[str, ...], tuple[str, ...]]:
    numbers = tuple(field.name for field in dataclasses.fields(kind) if str(field.type).startswith("float"))
    return tuple(field.name for field in dataclasses.fields(kind) if field.name not in numbers), numbers


_FIELDS: dict[type, tuple[tuple[str, ...], tuple[str, ...]]] = {kind: _fields(kind) for kind in (GRPOSpec, AdvantageSpec)}

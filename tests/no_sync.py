"""A machine that seems to have a GPU, to find on any computer what would make the host wait for it.

    with fake_cuda() as device:
        model, batch = put(model, device), batch.to(device)
        loss = step(model, batch)
        loss.backward()  # HostSync where the forward or the backward pass asks the device for anything

Tensors on `device` have shapes, dtypes and the dispatch of CUDA tensors (is_cuda, autocast, device mismatches, the meta functions of
CUDA-only ops such as aten._flash_attention_forward), but no numbers; CPU tensors stay what they are, so host code runs for real. Without a
GPU autograd's C++ engine refuses such tensors: `backward` here calls the same graph's nodes one after the other, but no hooks. Triton's
launches do nothing; the Python around them runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
COPIES = {aten._to_copy, aten.copy_}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index, aten._unsafe_index_put}
READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
CHECKS = {aten.multinomial}  # looks at its arguments before it launches


class HostSync(RuntimeError):
    """An op that makes the host wait for the device."""


@contextlib.contextmanager
def fake_cuda() -> Iterator[torch.device]:
    """The device of a machine with one GPU, for the time of a with block in which HostSync is raised by every op that waits for it."""
    with contextlib.ExitStack() as stack:
        if not torch.cuda.is_available():
            stack.enter_context(_device_guard())
            stack.enter_context(mock.patch("torch.cuda.Event", _Event))
            stack.enter_context(mock.patch("torch.cuda.device", lambda _: contextlib.nullcontext()))  # there is one, and it is current
            stack.enter_context(mock.patch("torch.cuda.is_bf16_supported", lambda *_, **__: True))
            stack.enter_context(mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False))
        for kernel in ("interpreter.InterpretedFunction", "jit.JITFunction"):
            stack.enter_context(mock.patch(f"triton.runtime.{kernel}.run", lambda *_, **__: None))
        stack.enter_context(mock.patch("torch.autograd.backward", backward))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_Watch())
        yield torch.device("cuda", 0)


def put(module: nn.Module, device: torch.device) -> nn.Module:
    """The module, its parameters and buffers replaced by ones on `device` (Module.to cannot); ties stay."""
    moved: dict[int, Tensor] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, x in tensors.items():
                if x is not None and id(x) not in moved:
                    y = x.detach().to(device, non_blocking=True)
                    moved[id(x)] = nn.Parameter(y, x.requires_grad) if isinstance(x, nn.Parameter) else y
                tensors[name] = None if x is None else moved[id(x)]
    return module


class _Event:
    """An event that may be recorded, and not asked for."""

    def __init__(self, enable_timing: bool = False):
        assert enable_timing

    def record(self) -> None:
        """Enqueued."""

    def synchronize(self) -> None:
        raise HostSync("Event.synchronize: the host waits for the device")

    query = elapsed_time = lambda self, *_: self.synchronize()


class _Watch(TorchDispatchMode):
    """Ops on fake tensors, or that make them, go to the fake device; all others are the CPU's and run for real."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if not any(isinstance(x, FakeTensor) or (isinstance(x, torch.device) and x.type == "cuda") for x in leaves):
            if not torch.cuda.is_available():  # nor is there page-locked memory
                func = aten.clone.default if func is aten._pin_memory.default else func
                kwargs = {name: x for name, x in kwargs.items() if name != "pin_memory"}
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if reason := _waits(func, args, kwargs):
            raise HostSync(f"{func}: {reason}")
        return func(*args, **kwargs)


def _waits(func: torch._ops.OpOverload, args: tuple, kwargs: dict[str, Any]) -> str | None:
    """Why this op, with a tensor of the device among its arguments or results, makes the host wait; None if it does not."""
    op, given = func.overloadpacket, dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    if op is aten.repeat_interleave:
        return "the size of the result is computed on the device; pass output_size" if given.get("output_size") is None else None
    if op not in INDEXING and (op in CHECKS or READS & set(func.tags)):
        return "the host reads what the device has computed"
    if op in COPIES:
        source = given.get("src", given["self"])
        target = given["self"].device if "src" in given else given.get("device") or source.device
        if source.device.type != target.type and not given.get("non_blocking"):
            return f"a copy from {source.device.type} to {target.type} that is waited for; pass non_blocking=True"
    if op in INDEXING:
        indices, values = [x for x in given["indices"] if x is not None], given.get("values")
        fill = values is not None and values.numel() == 1 and not given.get("accumulate")
        if any(x.dtype in (torch.bool, torch.uint8) for x in indices) and not fill:
            return "a mask as an index is turned into positions on the device, whose number the host reads"
        if any(x.device.type == "cpu" for x in indices) and given["self"].is_cuda:
            return "an index on the host is copied to the device and waited for"
        if op is aten.index_put_ and given.get("accumulate"):  # autograd's own is index_put here, which checks nothing
            return "accumulate=True checks the range of its indices on the host"
    return None


def backward(
    tensors: Tensor | tuple[Tensor, ...] | list[Tensor],
    grad_tensors: Tensor | tuple[Tensor | None, ...] | list[Tensor | None] | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    *_: Any,
    inputs: Any = None,
    **__: Any,
) -> None:
    """torch.autograd.backward: the nodes of the graph in an order in which each has all of its gradients when it runs."""
    assert not create_graph and inputs is None, "only first derivatives, of all leaves"
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    grads = [grad_tensors] if isinstance(grad_tensors, Tensor) else list(grad_tensors or [None] * len(tensors))
    roots = [torch.autograd.graph.get_gradient_edge(x) for x in tensors]
    waiting = _uses([edge.node for edge in roots])
    inbox: dict[Any, list[Tensor | None]] = {node: [None] * len(node._input_metadata) for node in waiting}
    task = next(_TASKS)
    with torch.no_grad(), mock.patch("torch._C._current_graph_task_id", lambda: task):
        for edge, x, grad in zip(roots, tensors, grads, strict=True):
            _add(inbox[edge.node], edge.output_nr, torch.ones_like(x) if grad is None else grad)
        ready = [node for node in dict.fromkeys(edge.node for edge in roots) if not waiting[node]]
        while ready:
            node = ready.pop()
            results = _run(node, inbox.pop(node))
            for (following, nr), grad in zip(node.next_functions, results, strict=True):
                if following is None:
                    continue
                if grad is not None:
                    meta = following._input_metadata[nr]
                    _add(inbox[following], nr, grad.sum_to_size(meta.shape).to(meta.dtype))
                waiting[following] -= 1
                if not waiting[following]:
                    ready.append(following)
    assert not inbox, "a node of the graph was never reached"


_TASKS = itertools.count(1)  # one number a backward pass, by which checkpoints know what they have recomputed


def _uses(roots: list[Any]) -> dict[Any, int]:
    """Every node below the roots, and from how many edges it gets gradients."""
    counts = dict.fromkeys(roots, 0)
    left = list(counts)
    while left:
        for node, _ in left.pop().next_functions:
            if node is not None:
                if node not in counts:
                    counts[node] = 0
                    left.append(node)
                counts[node] += 1
    return counts


def _add(grads: list[Tensor | None], nr: int, grad: Tensor) -> None:
    grads[nr] = grad if grads[nr] is None else grads[nr] + grad


def _run(node: Any, grads: list[Tensor | None]) -> list[Tensor | None]:
    """A node's gradients for its next_functions; nothing where no gradient came in."""
    if all(grad is None for grad in grads):
        return [None] * len(node.next_functions)
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        results = node(*grads)
        return list(results) if isinstance(results, tuple) else [results]
    whole = [
        torch.zeros(m.shape, dtype=m.dtype, device=m.device) if g is None else g for g, m in zip(grads, node._input_metadata, strict=True)
    ]
    results = node.apply(*whole)
    results = results if isinstance(results, tuple) else (results,)
    wanted = iter([grad for grad, needed in zip(results, node.needs_input_grad, strict=True) if needed])
    return [None if following is None else next(wanted) for following, _ in node.next_functions]


@contextlib.contextmanager
def _device_guard() -> Iterator[None]:
    """Lets a PyTorch without CUDA take devices of type cuda: the guard of meta devices, which does nothing, stands in for CUDA's.

    It knows no current device: `x.to("cuda")` without a number makes a meta tensor, which the next op refuses.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    cuda, meta = 1, 14  # c10::DeviceType
    guards = (ctypes.c_void_p * (meta + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before = guards[cuda]
    guards[cuda] = before or guards[meta]
    try:
        yield
    finally:
        guards[cuda] = before

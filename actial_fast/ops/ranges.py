"""Named ranges in a profile. Until a window opens them (train.profile), a range is one `if` and a context manager that does nothing.

    with named("tower"):
        ...

Open, a range is a record_function of torch.profiler and, on a machine with CUDA, an NVTX range, which Nsight Systems shows. A caller that
is compiled has none, and no break in its graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.autograd.profiler import record_function

GROUPS = (  # of kernels, in the order of a step
    "patchify",  # pixels to patches
    "tower",  # the vision tower's forward pass
    "embedding",  # text and image rows to the model's input
    "trunk",  # the language model's forward pass (with the tower's, where a batch is padded)
    "attention",  # of packed rows, in the trunk and the tower
    "attention merge",  # of what a suffix sees in its prefix with what it sees in itself
    "head",  # the head and what is computed from it; a loss has its gradients from here
    "backward",  # all of a micro-batch's, the attention's with it
    "attention backward",
    "tower backward",  # where features were shared by several micro-batches
    "gradient reduction",  # over replicas, in one message (sharded: FSDP has ranges of its own), and the norm
    "optimizer",
)

_NOTHING = contextlib.nullcontext()
_open = False


def named(name: str) -> contextlib.AbstractContextManager[None]:
    """A range of this name, for the time of a with block."""
    return _range(name) if _open and not torch.compiler.is_compiling() else _NOTHING


def show(on: bool) -> None:
    """Open or close the ranges, of this process."""
    global _open
    _open = on


@contextlib.contextmanager
def _range(name: str) -> Iterator[None]:
    nvtx = torch.version.cuda is not None and torch.cuda.is_available()
    if nvtx:
        torch.cuda.nvtx.range_push(name)
    try:
        with record_function(name):
            yield
    finally:
        if nvtx:
            torch.cuda.nvtx.range_pop()

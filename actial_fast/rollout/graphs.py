"""Steps of one shape recorded as CUDA graphs, so that the host's part of a step is one call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Many
from typing import Any

import torch
from torch import Tensor

ASKED = 16  # steps of a shape that run as they are before it is recorded: recording costs about as many


def rows_of_graph(rows: int) -> int:
    """Rows of the graph that decodes so many: a few numbers, so that few graphs are recorded, and little is computed for nobody."""
    step = 16 if rows <= 256 else 64
    return -(-rows // step) * step if rows > 8 else 1 << (rows - 1).bit_length()


class Graphs:
    """`run` of tensors on CUDA, which never waits for the device, recorded by the number of rows.

    Its tensors of one number of rows always have the same shapes. What is returned is overwritten by the next call.
    """

    def __init__(self, run: Callable[..., tuple[Tensor, ...]]):
        self._run = run
        self._asked: Counter[int] = Counter()
        self._made: dict[int, tuple[Any, tuple[Tensor, ...], tuple[Tensor, ...]]] = {}
        self._pool: Any = None

    def __call__(self, rows: int, given: Many[Tensor], device: torch.device) -> tuple[Tensor, ...]:
        """run(*given), given being on the host."""
        if rows not in self._made:
            there = tuple(x.to(device, non_blocking=True) for x in given)
            self._asked[rows] += 1
            if self._asked[rows] <= ASKED:
                return self._run(*there)
            self._made[rows] = self._recorded(there)
        graph, inputs, outputs = self._made[rows]
        for held, new in zip(inputs, given, strict=True):
            held.copy_(new, non_blocking=True)
        graph.replay()
        return outputs

    def _recorded(self, inputs: tuple[Tensor, ...]) -> tuple[Any, tuple[Tensor, ...], tuple[Tensor, ...]]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = self._run(*inputs)
        self._pool = graph.pool()
        return graph, inputs, outputs

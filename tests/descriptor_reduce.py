"""What Triton 3.6's interpreter lacks: a block added to memory through a tensor descriptor."""

from typing import Any

from triton.language import semantic
from triton.runtime.interpreter import InterpreterBuilder


def _reduce(self: Any, kind: Any, descriptor: Any, value: Any, indices: Any) -> None:
    assert kind == semantic.ir.DESCRIPTOR_REDUCE_KIND.ADD, f"{kind}: only additions are interpreted"
    pointers, mask = descriptor.materialize_pointers(indices)
    before = self.create_masked_load(pointers, mask, None, None, None, False)
    self.create_masked_store(pointers, self.create_fadd(before, value), mask, None, None)


def install() -> None:
    InterpreterBuilder.create_descriptor_reduce = _reduce

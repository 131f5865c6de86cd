"""The vision tower's features, computed once for an image and shared by all micro-batches, and passes, that need them.

    y = tower(x), leaf = y without its history;   every micro-batch i adds d L_i / d leaf;   after the last one, y.backward(sum of these)

which is the gradient of running the tower in every micro-batch, for one forward and one backward pass of the tower.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actial_fast.ops.ranges import named


@dataclass(frozen=True)
class _Call:
    """One call of the tower: its outputs and their leaves by image, and the images still to be used."""

    outputs: dict[Hashable, Tensor]
    leaves: dict[Hashable, Tensor]
    left: set[Hashable]


class Features:
    """The features of the images of some micro-batches, for as long as the tower's weights stay as they are.

    tower: given image keys, their features, one (rows, H) tensor each, as transformers' get_image_features has them in `pooler_output`;
    called once for every image, with the images of a micro-batch that no earlier one had, in order. uses: the image keys of every
    micro-batch that will come, of all passes: with a frozen tower those of the old, reference and loss passes of a step, with a trained
    one those of the loss pass of one optimizer step. trained: the tower gets gradients; else it runs without recording any.

    An image's features go after its last use: one of a call of a trained tower once all images of that call are used up, when its
    backward pass runs. A tower with dropout is drawn once. Use as a context manager, which checks (AssertionError) that all came.
    """

    def __init__(
        self, tower: Callable[[Sequence[Hashable]], Sequence[Tensor]], uses: Iterable[Iterable[Hashable]], *, trained: bool = False
    ):
        self._tower, self._trained = tower, trained
        self._left = Counter(key for keys in uses for key in set(keys))
        self._calls: dict[Hashable, _Call] = {}
        self.calls = 0
        """Times the tower was run."""
        self.images = 0
        """Images that went through it."""

    @contextlib.contextmanager
    def of(self, images: Sequence[Hashable]) -> Iterator[Tensor | None]:
        """The features (rows, H) of a micro-batch's distinct images, one behind the other; None for no images. Forward and backward of the
        micro-batch belong inside the with block; where the block raises, the tower gets no gradient."""
        assert len(set(images)) == len(images), "a micro-batch names each of its images once"
        if late := [key for key in images if not self._left[key]]:
            raise AssertionError(f"image {late[0]} is used more often than was announced")
        if new := [key for key in images if key not in self._calls]:
            self._run(new)
        parts = [self._calls[key].leaves[key].to(self._calls[key].outputs[key].dtype) for key in images]
        yield parts[0] if len(parts) == 1 else torch.cat(parts) if parts else None
        del parts
        for key in images:
            self._left[key] -= 1
            if not self._left[key]:
                self._release(key)

    def _run(self, keys: list[Hashable]) -> None:
        assert not self._trained or torch.is_grad_enabled(), "a trained tower's features belong to a pass with gradients"
        with torch.set_grad_enabled(self._trained):
            outputs = dict(zip(keys, self._tower(keys), strict=True))
        leaves = {key: x.detach() for key, x in outputs.items()}
        if self._trained:
            for key, x in outputs.items():
                if not x.requires_grad:
                    raise ValueError("trained: the tower's features require no gradient; pass trained=False for a frozen tower")
                if self._left[key] > 1:  # several gradients add up: not in 16 bits
                    leaves[key] = leaves[key].to(torch.promote_types(x.dtype, torch.float32))
                leaves[key].requires_grad_()
        self._calls |= dict.fromkeys(keys, _Call(outputs, leaves, set(keys)))
        self.calls, self.images = self.calls + 1, self.images + len(keys)

    def _release(self, key: Hashable) -> None:
        call = self._calls.pop(key)
        call.left.remove(key)
        if not self._trained:
            del call.outputs[key], call.leaves[key]
        elif not call.left:
            grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in call.leaves.values()]
            grads = [grad.to(x.dtype) for grad, x in zip(grads, call.outputs.values(), strict=True)]
            with named("tower backward"):
                torch.autograd.backward(list(call.outputs.values()), grads)

    def __enter__(self) -> Features:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._calls.clear()
        if left := sum(self._left.values()):
            assert kind is not None, f"{left} announced uses of images never came: their gradient is missing"

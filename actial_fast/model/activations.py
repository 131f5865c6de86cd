"""What of a layer waits for the backward pass, what is recomputed there, and where it waits.

A checkpointed layer keeps its input and runs forward once more, with gradients, when its backward pass comes: the same operations on the
same numbers, so loss and gradients are the same to the bit. Selective ones keep what attention gave as well, output and log-sum-exp, so
that the recomputation goes past it: the only part of a layer whose cost grows with the square of a row's length.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from actial_fast.model.attention import Keeping
from actial_fast.settings.model import ModelConfig

Contexts = tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]


def use_checkpoints(language_model: nn.Module, visual: nn.Module, config: ModelConfig, *, packed: bool) -> None:
    """Checkpoints on the layers of transformers' language model and vision tower, as the recipe says.

    packed: the layers are on this project's attention, else on sdpa, of whose kernels selective ones then keep the output.
    """
    offload = config.offload_activations
    contexts: Callable[[], Contexts] | None = None
    if config.checkpointing == "selective":
        contexts = functools.partial(_packed, offload) if packed else _plain
    if config.checkpointing != "none":
        _put(language_model.layers, functools.partial(_checkpointed, contexts, offload))
    if config.tower_checkpointing != "none":
        _put(visual.blocks, functools.partial(_checkpointed, None, offload))


def _put(layers: Any, function: Callable[..., Any]) -> None:
    """transformers' layers call `_gradient_checkpointing_func` in training; the public way to set it is another one in each version."""
    for layer in layers:
        assert hasattr(layer, "gradient_checkpointing"), f"{type(layer).__name__} is not a layer that transformers checkpoints"
        layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, function


def _checkpointed(contexts: Callable[[], Contexts] | None, offload: bool, layer: Callable[..., Any], *args: Any) -> Any:
    # around the checkpoint, so that it moves what this one keeps, and nothing of what is recomputed
    with save_on_cpu(pin_memory=True) if offload else contextlib.nullcontext():
        return checkpoint(layer, *args, use_reentrant=False, context_fn=contexts or noop_context_fn)


def _packed(offload: bool) -> Contexts:
    hooks = save_on_cpu(pin_memory=True) if offload else None
    keeping = Keeping(hooks.pack_hook, hooks.unpack_hook) if hooks else Keeping()
    return keeping.recording(), keeping.replaying()


def _plain() -> Contexts:
    return create_selective_checkpoint_contexts(_keeps)


def _keeps(context: Any, op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Every kernel of F.scaled_dot_product_attention is an operator named after it."""
    return CheckpointPolicy.MUST_SAVE if "_scaled_dot_product_" in op.name() else CheckpointPolicy.PREFER_RECOMPUTE

"""Whose products a head's softmax and gradient are made of: ours, or quack's."""

from __future__ import annotations

from torch import Tensor

from actial_fast.kernels import head as triton_head
from actial_fast.kernels import head_grad, quack_head
from actial_fast.kernels.head import Head, Softmax
from actial_fast.kernels.head_grad import Gradients
from actial_fast.kernels.selected import Selected


def forward(head: Head, scaled: Tensor | None) -> tuple[Softmax, Tensor, Tensor]:
    """As `head.forward`."""
    return (quack_head if head.quack else triton_head).forward(head, scaled)


def backward(
    head: Head,
    parts: Softmax,
    entropy: Tensor,
    g_logp: Tensor,
    g_entropy: Tensor | None,
    out: Gradients,
    compact: bool,
    selected: Selected | None = None,
) -> None:
    """As `head_grad.backward`, from what `forward` has left. selected: by our products alone."""
    if head.quack:
        assert selected is None, "refused by ops/checks.py"
        quack_head.backward(head, parts, entropy, g_logp, g_entropy, out, compact)
    else:
        head_grad.backward(head, parts, entropy, g_logp, g_entropy, out, compact, selected)

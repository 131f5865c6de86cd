"""The decoder layers of a model as functions of their weights, for passes without gradients over keys and values in blocks.

The layers' parts are called past the hooks of FSDP and of activation checkpointing and past transformers' own forward pass, which cost as
much as a layer does for a single token; sharded weights must be gathered. On the CPU in float32 what lies between the matrix products is
the C++ extension's, a call each; small matrices with one input are put together first. Adapters are called as the modules they are.
L rows, H hidden size, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.activations import ACT2FN

from actial_fast.model.adapters import product_of
from actial_fast.model.attention import prompt_once
from actial_fast.model.paged import Pages, on_host, turned
from actial_fast.packing import native
from actial_fast.packing.batch import PackedBatch
from actial_fast.packing.packed_ops import add_features

SILU = nn.SiLU, type(ACT2FN["silu"])
JOINED = 2**20  # elements of matrices that are put together: larger ones gain nothing from it, and the copy takes memory


@dataclass(frozen=True)
class Norm:
    """RMSNorm: its weight (H,), on the host as an array too, and its epsilon."""

    weight: Tensor
    host: np.ndarray | None
    eps: float

    @staticmethod
    def of(module: Any) -> Norm:
        weight = module.weight.detach()
        # a copy: memory that numpy has seen FSDP could not free again
        return Norm(weight, weight.clone().numpy() if on_host(weight) else None, module.variance_epsilon)

    def __call__(self, x: Tensor, more: Tensor | None) -> tuple[Tensor, Tensor]:
        """x + more, x itself where there is no more, and that normed; x (L, H) may be overwritten."""
        if self.host is not None:
            added = None if more is None else more.numpy()
            return x, torch.from_numpy(native.add_norm(x.numpy(), added, self.host, self.eps))
        x = x if more is None else x + more
        return x, nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.eps)


@dataclass(frozen=True)
class Layer:
    """One decoder layer. qkv, gate_up: products of one input, each apart or all side by side in one tensor."""

    before: Norm
    qkv: Callable[[Tensor], Many[Tensor]]
    out: Callable[[Tensor], Tensor]
    after: Norm
    gate_up: Callable[[Tensor], Many[Tensor]]
    gate: Callable[[Tensor], Tensor]
    down: Callable[[Tensor], Tensor]
    scale: float

    @staticmethod
    def of(module: Any) -> Layer:
        attention, mlp = module.self_attn, module.mlp
        qkv = products((attention.q_proj, attention.k_proj, attention.v_proj))
        if hasattr(attention, "q_norm"):
            qkv = _normed(qkv, Norm.of(attention.q_norm), Norm.of(attention.k_norm), attention.v_proj.out_features)
        return Layer(
            before=Norm.of(module.input_layernorm),
            qkv=qkv,
            out=product(attention.o_proj),
            after=Norm.of(module.post_attention_layernorm),
            gate_up=products((mlp.gate_proj, mlp.up_proj)),
            gate=mlp.act_fn,
            down=product(mlp.down_proj),
            scale=attention.scaling,
        )

    def rest(self, x: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor]:
        """What is behind the attention (L, H * D): two parts, whose sum the layer gives."""
        x, h = self.after(x, self.out(mixed))
        parts = self.gate_up(h)
        if self.after.host is not None and isinstance(self.gate, SILU):
            both = parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)
            return x, self.down(torch.from_numpy(native.gated(both.numpy())))
        gate, up = parts if len(parts) == 2 else parts[0].chunk(2, 1)
        return x, self.down(self.gate(gate) * up)


class Trunk:
    """The layers of `model`, a language model in eval mode, as they are now: what is put together is a copy. positions: how many from 0 on
    next tokens may stand at."""

    def __init__(self, model: Any, positions: int):
        self._rotary, self._layers, self._norm = model.rotary_emb, [Layer.of(layer) for layer in model.layers], Norm.of(model.norm)
        self._like = model.get_input_embeddings().weight[:1]
        self._table: tuple[Tensor, Tensor] | None = None
        if self._rotary.rope_type == "default":  # others may change with the longest position of a pass
            self._table = self.turns(torch.arange(positions, device=self._like.device).expand(3, -1))

    def turns(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary cosines and sines (L, D) of positions (3, L), or of (L,) where all three are the same."""
        if positions.ndim == 1 and self._table is not None:
            cos, sin = self._table
            return cos[positions], sin[positions]
        cos, sin = self._rotary(self._like, positions.expand(3, -1)[:, None])
        return cos[0], sin[0]

    def read(self, embeds: Tensor, pages: Pages, packed: PackedBatch) -> None:
        """Keep the keys and values of whole sequences: embeds (L, H), which are overwritten, and the further levels of their images."""
        x, more = embeds, None
        for number, layer in enumerate(self._layers):
            x, h = layer.before(x, more)
            q, k, v = pages.heads(layer.qkv(h))
            q, k = (turned(y, pages.cos, pages.sin).to(v.dtype) for y in (q, k))
            pages.write(number, k, v)
            if number + 1 < len(self._layers):  # nobody asks for what the last layer makes of them
                x, more = layer.rest(x, prompt_once(q, k, v, packed, layer.scale).flatten(1))
                if number < len(packed.levels):
                    x = add_features(x, packed.levels[number], packed.image_slots, packed.image_rows)

    def step(self, embeds: Tensor, pages: Pages) -> Tensor:
        """Hidden states (R, H) of the next tokens of R replies: embeds (R, H), which are overwritten."""
        x, more = embeds, None
        for number, layer in enumerate(self._layers):
            x, h = layer.before(x, more)
            x, more = layer.rest(x, pages.step(number, layer.qkv(h), layer.scale))
        return self._norm(x, more)[1]


def _normed(qkv: Callable[[Tensor], Many[Tensor]], q_norm: Norm, k_norm: Norm, width: int) -> Callable[[Tensor], Many[Tensor]]:
    """Queries and keys, normed, in the dtype of their norms, and values. width: of all keys, as of all values."""

    def normed(x: Tensor) -> list[Tensor]:
        parts = qkv(x)
        if len(parts) == 1:
            parts = parts[0].split_with_sizes((parts[0].shape[1] - 2 * width, width, width), 1)
        q, k, v = parts
        return [_by_heads(q_norm, q), _by_heads(k_norm, k), v]

    return normed


def _by_heads(norm: Norm, x: Tensor) -> Tensor:
    """Each head of x (L, heads * D) normed by itself."""
    return norm(x.reshape(-1, len(norm.weight)).to(norm.weight.dtype), None)[1].view(x.shape)


def product(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """A linear layer as a function; one with adapters as it is, but for DoRA's norms, which are taken once."""
    if isinstance(module, LoraLayer):
        return product_of(module) or module
    if type(module) is not nn.Linear:
        return module
    weight, bias = module.weight, module.bias
    return lambda x: nn.functional.linear(x, weight, bias)


def products(modules: Many[nn.Module]) -> Callable[[Tensor], Many[Tensor]]:
    """Linear layers of one input as a function, that of a single one where their weights are small."""
    plain = [module for module in modules if type(module) is nn.Linear]
    weights: list[Tensor] = [x.weight for x in plain]
    biases: list[Tensor] = [x.bias for x in plain if x.bias is not None]
    small = not any(w.is_cuda for w in weights) and sum(w.numel() for w in weights) <= JOINED
    if len(plain) < len(modules) or len(biases) not in (0, len(plain)) or not small:
        functions = [product(module) for module in modules]
        return lambda x: [function(x) for function in functions]
    weight, bias = torch.cat(weights), torch.cat(biases) if biases else None
    return lambda x: (nn.functional.linear(x, weight, bias),)

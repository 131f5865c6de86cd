"""A frozen base in NF4 (arXiv 2305.14314), through bitsandbytes: blocks of 64 weights share a scale, each weight is one of 16 values of it.

With `twice` the scales are held in 8 bits themselves, in blocks of 256. The layers of the language model are quantised one by one as they
are read, on the device; a product has its weight in the dtype of the computation for as long as it takes, in the backward pass once more.
"""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import torch
from torch import Tensor, nn

from actial_fast.model.tensors import Stored
from actial_fast.model.weights import base_name, module_name

BLOCK = 64  # weights that share a scale
LAYER = re.compile(r"^model\.language_model\.layers\..*_proj\.weight$")  # the weights that are held so, as transformers names them
BYTES = 0.53  # of a weight, about: 4 bits and its share of a scale


def nf4_problem() -> str:
    """Why model.quantize: nf4 cannot be used with what is installed, in words for the user; empty where it can."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return "model.quantize: nf4 needs bitsandbytes, which is not installed; pip install 'actial-fast[budget]', or set it to none"
    return ""


class NF4Linear(nn.Module):
    """y = x W^T + b for x (..., I) with gradients for x alone: a linear layer whose weight (O, I) is held in NF4, once `hold` has been
    given it. dtype: of the computation; y has x's, or under autocast this one. Its 4-bit codes are no parameter: nothing trains, shards,
    casts or saves them."""

    def __init__(self, linear: nn.Linear, *, twice: bool, dtype: torch.dtype):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.twice, self.dtype = twice, dtype
        self._codes: Tensor | None = None
        self._state: Any = None

    def hold(self, weight: Tensor) -> None:
        """Quantise a weight (O, I) of any floating dtype, on its device; equal to what transformers makes of it by
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=twice)."""
        from bitsandbytes import functional

        self._codes, self._state = functional.quantize_4bit(
            weight.contiguous(), blocksize=BLOCK, compress_statistics=self.twice, quant_type="nf4"
        )
        self._state.dtype = self.dtype  # of what comes out again: in the backward pass what it is in the forward pass

    @property
    def held(self) -> dict[str, Tensor]:
        """What is held: the codes, two in a byte, and the scales; with `twice` these in 8 bits, and theirs."""
        assert self._codes is not None, "the weight was not read yet"
        second = {"absmax2": self._state.state2.absmax, "offset": self._state.offset} if self.twice else {}
        return {"codes": self._codes, "absmax": self._state.absmax, **second}

    @property
    def weight(self) -> Tensor:
        """The weight (O, I) as the product has it; made anew each time."""
        return self.dequantized(self.dtype)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight (O, I) in another dtype."""
        from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

        assert self._codes is not None, "the weight was not read yet"
        scales = self._state.absmax
        if self._state.nested:
            scales = dequantize_blockwise(scales, self._state.state2) + self._state.offset
        codes, blocks = self._codes.reshape(-1), scales.numel()
        if more := blocks * BLOCK // 2 - codes.numel():
            codes = nn.functional.pad(codes, (0, more))
        # a block a row: on a CPU bitsandbytes 0.50 takes it that every row begins a block, which one of 96 weights does not
        state = QuantState(absmax=scales, shape=torch.Size((blocks, BLOCK)), blocksize=BLOCK, quant_type="nf4", dtype=dtype)
        whole = dequantize_4bit(codes[:, None], state)
        return whole.reshape(-1)[: self.out_features * self.in_features].view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.dtype if torch.is_autocast_enabled(x.device.type) else x.dtype
        x, bias = x.to(self.dtype), None if self.bias is None else self.bias.to(self.dtype)
        if not x.is_cuda:
            return _Product.apply(x, bias, self).to(dtype)
        from bitsandbytes.autograd._functions import matmul_4bit

        assert self._codes is not None, "the weight was not read yet"
        return matmul_4bit(x, self._codes, quant_state=self._state, bias=bias).to(dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, twice={self.twice}"


class _Product(torch.autograd.Function):
    """On a CPU, where the product of bitsandbytes computes in 16 bits in eval mode, and is wrong where rows end within a block."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: NF4Linear) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        return grad @ ctx.layer.weight, None, None


def hold_in_nf4(language_model: nn.Module, *, twice: bool, dtype: torch.dtype) -> None:
    """Put NF4Linear in the place of every linear layer, adapters beside them excepted; their weights are given by `fill_nf4`."""
    for module in [m for m in language_model.modules() if not isinstance(m, nn.ModuleDict)]:  # PEFT keeps adapters in these
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, NF4Linear(child, twice=twice, dtype=dtype))


def fill_nf4(model: nn.Module, stored: Stored, device: torch.device, dtype: torch.dtype) -> None:
    """Read and quantise the weights of all NF4Linear of a model on `device`, one after the other, each rounded to `dtype` first."""
    names = {module_name(name): name for name in stored.names}
    for name, layer in quantized(model).items():
        weight = torch.empty(layer.out_features, layer.in_features, dtype=dtype, device=device)
        stored.into(weight, names[name])
        layer.hold(weight)


def quantized(model: nn.Module) -> dict[str, NF4Linear]:
    """The layers of a policy that are held in NF4, by their weights' names in transformers' model."""
    return {base_name(f"{name}.weight"): module for name, module in model.named_modules() if isinstance(module, NF4Linear)}


def as_held(weight: Tensor, *, twice: bool) -> Tensor:
    """What NF4 makes of a weight (O, I), in float32, on its device."""
    layer = NF4Linear(nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta"), twice=twice, dtype=torch.float32)
    layer.hold(weight)
    return layer.weight

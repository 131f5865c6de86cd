"""Low-rank adapters through PEFT: where they stand, how they begin, and DoRA's factors.

A linear layer W (O, I) with an adapter A (R, I), B (O, R) and a scale s gives W x + s B A x; with DoRA (arXiv 2402.09353) the rows of
W + s B A are brought to trained lengths m (O,): m / |W + s B A| of them, the norm taken row by row and without a gradient.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from actial_fast.model.families.family import Family
from actial_fast.model.families.known import family_of
from actial_fast.model.weights import local, parameters_on_meta, rows_of
from actial_fast.settings.model import LoRAConfig, ModelConfig

ROWS = 1024  # of a weight whose lengths are taken at once


def places(lora: LoRAConfig, family: Family) -> str:
    """A pattern that the names of the layers with adapters match as a whole, as transformers names modules."""
    language = "|".join(map(re.escape, lora.targets))
    chosen = [rf"model\.language_model\..*\.({language})"] if lora.targets else []
    return "|".join([*chosen, *([family.blocks] if lora.tower else []), *([family.merger] if lora.merger else [])])


def unplaced(lora: LoRAConfig, family: Family, layers: Iterable[str]) -> list[str]:
    """What of the keys finds no layer among these names, in words for the user; empty where every one has an effect."""
    layers, said = list(layers), []
    wanted = [(family.blocks, "tower: this model's tower has no blocks; set it to false")] if lora.tower else []
    wanted += [(family.merger, "merger: this model has no merger; set it to false")] if lora.merger else []
    wanted += [
        (places(LoRAConfig(rank=1, targets=(t,)), family), f"targets: the language model has no linear layer {t!r}") for t in lora.targets
    ]
    for pattern, problem in wanted:
        if not any(re.fullmatch(pattern, name) for name in layers):
            said.append(f"model.lora.{problem}")
    return said


def add_adapters(model: Any, config: ModelConfig) -> PeftModel:
    """Adapters on the layers that config.lora names, in the training dtype, without memory yet. ValueError where a key of it finds none."""
    lora, family = config.lora, family_of(model)
    if problems := unplaced(lora, family, [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]):
        raise ValueError("; ".join(problems))
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft only divides it: a float will do
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        target_modules=places(lora, family),
        task_type="CAUSAL_LM",
    )
    with parameters_on_meta(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)  # PEFT asks by the old name
        adapted = get_peft_model(model, settings)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, config.dtype))
    return adapted


def draw_adapters(model: nn.Module, seed: int) -> None:
    """Fresh adapters as PEFT begins them, A uniform, B zero and DoRA's lengths those of the weights, which are there: the model is what it
    is without them. Drawn by `seed`, the same for any number of ranks."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            start, stop = rows_of(parameter)
            whole = torch.empty(parameter.shape)
            nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
            local(parameter).copy_(whole[start:stop])
        elif ".lora_B." in name:
            local(parameter).zero_()
    for module in model.modules():
        for magnitude in getattr(module, "lora_magnitude_vector", {}).values():
            start, stop = rows_of(magnitude.weight)
            weight = module.get_base_layer().weight  # type: ignore[operator]
            mine = local(weight) if isinstance(weight, DTensor) else weight[start:stop]  # one in NF4 is whole on every rank
            local(magnitude.weight).copy_(lengths(mine))


def lengths(weight: Tensor, down: Tensor | None = None, up: Tensor | None = None, scale: float = 0.0) -> Tensor:
    """|W + scale up @ down| of each row, (O,) float32, a number of rows at a time: weight (O, I), down (R, I), up (O, R)."""
    out = torch.empty(len(weight), device=weight.device)
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        part = weight[rows].float()
        if down is not None and up is not None:
            part = torch.addmm(part, up[rows].float(), down.float(), alpha=scale)
        out[rows] = torch.linalg.norm(part, dim=1)
    return out


def product_of(layer: Any) -> Callable[[Tensor], Tensor] | None:
    """What PEFT's layer with DoRA computes of x (L, I) in eval mode, as a function: the norms are taken once, now, and not at every call.
    None for any other layer, and while adapters are off."""
    if getattr(layer, "disable_adapters", True) or not layer.lora_magnitude_vector:
        return None
    (name,) = layer.active_adapters
    base, down, up, scale = layer.get_base_layer(), layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
    with torch.no_grad(), torch.autocast(up.weight.device.type, enabled=False):
        factor = layer.lora_magnitude_vector[name].weight / lengths(base.weight, down.weight, up.weight, scale)

    def product(x: Tensor) -> Tensor:
        y = base(x)
        plain = y if base.bias is None else y - base.bias
        return (y + (factor - 1) * plain + factor * up(down(x.to(down.weight.dtype))) * scale).to(y.dtype)

    return product

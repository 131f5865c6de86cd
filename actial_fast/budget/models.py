"""The widths of the model that a recipe starts from: its checkpoint's, or, before anything is downloaded, those of its name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache

from actial_fast.model.families.known import FAMILIES, family_of
from actial_fast.model.nf4 import LAYER
from actial_fast.model.policy import Policy, assembled
from actial_fast.model.weights import EMBEDDING, HEAD, base_name, check_family, config_at, parameters_on_meta
from actial_fast.rollout.memory import kv_shape
from actial_fast.settings.model import ModelConfig

PLAIN = FAMILIES["qwen2_5_vl"]  # whose sizes are told without its name
SIZES = {f"{family.name}-{size}".lower(): (family, size) for family in FAMILIES.values() for size in family.published}
SIZES |= {size: (PLAIN, size) for size in PLAIN.published}
NAME = re.compile(r"(qwen[\d.]+-vl-\d+b)(-instruct|-thinking)?$", re.IGNORECASE)


def config_of(path: str, like: str = "") -> Any:
    """The configuration of the checkpoint at `path`: of a folder its config.json, of a hub name its published widths, or what an earlier
    download left. like: a key of SIZES, like 7b or qwen3-vl-8b, to go by instead. Nothing is downloaded. ValueError where nothing tells the
    widths, and for a family that is not trained here."""
    if like:
        if like.lower() not in SIZES:
            raise ValueError(f"--model: known are {', '.join(SIZES)}, got {like!r}")
        return _published(like.lower())
    if path and (Path(path) / "config.json").is_file():
        return _told(path, Path(path))
    if (name := NAME.search(path)) and name[1].lower() in SIZES:
        return _published(name[1].lower())
    cached = try_to_load_from_cache(path, "config.json") if path.count("/") == 1 else None
    if isinstance(cached, str):
        return _told(path, Path(cached).parent)
    why = f"{path} is not here yet" if path else "it is empty"
    raise ValueError(f"model.path: {why}, so its widths are not known; say which with --model 7b ({', '.join(SIZES)})")


def _published(size: str) -> Any:
    family, name = SIZES[size]
    return family.made(family.published[name])


def _told(path: str, folder: Path) -> Any:
    check_family(path, folder)
    return config_at(folder)


def config_from(text: str) -> Any:
    """The configuration that `to_json_string` made the text of."""
    said = json.loads(text)
    return FAMILIES[said["model_type"]].config(**said)


def on_meta(config: Any, model: ModelConfig, *, packed: bool) -> Policy:
    """The recipe's policy without memory, as `load_policy` puts it together. What only CUDA has is left out: it holds no less."""
    plain = _without_cuda(model)
    dtype = getattr(torch, model.frozen_dtype if model.lora.rank else model.dtype)
    with parameters_on_meta():
        made = family_of(config).model._from_config(config, dtype=dtype, attn_implementation="sdpa")
    return assembled(made, plain, torch.device("cpu"), packed=packed)


def _without_cuda(model: ModelConfig) -> ModelConfig:
    return replace(model, liger="off", attention="sdpa", quantize="none", quantize_twice=True)


@dataclass(frozen=True)
class Weight:
    """One parameter. group: what FSDP gathers it with; bytes: of one number as stored, in 16 or 32 bits; linear: whether it is a frozen
    matrix of the language model's layers, which NF4 would hold."""

    name: str
    group: str
    shape: tuple[int, ...]
    trained: bool
    bytes: int
    linear: bool

    @property
    def numel(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Shapes:
    """A model as the budget sees it: its configuration, its parameters, each once, and transformers' model without memory."""

    config: Any
    weights: tuple[Weight, ...]
    model: Any

    @property
    def numel(self) -> int:
        """Parameters, adapters included."""
        return sum(w.numel for w in self.weights)

    @property
    def trained(self) -> int:
        """Those that are trained."""
        return sum(w.numel for w in self.weights if w.trained)

    @property
    def trains_tower(self) -> bool:
        """Whether any weight of the vision tower is trained."""
        return any(w.trained and ".visual." in w.name for w in self.weights)

    @property
    def _head(self) -> Weight:
        names = {base_name(w.name): w for w in self.weights}
        return names.get(HEAD, names[EMBEDDING])

    @property
    def trains_head(self) -> bool:
        """Whether the matrix that gives the logits is trained, be it the embedding."""
        return self._head.trained

    @property
    def head_bytes(self) -> int:
        """Bytes of a number of it."""
        return self._head.bytes

    @property
    def levels(self) -> int:
        """How many features a merged image token has."""
        return family_of(self.config).levels(self.config.vision_config)

    @property
    def kv_elements(self) -> int:
        """Numbers that a token's keys and values are."""
        return 2 * math.prod(kv_shape(self.config))


def shapes_of(config: Any, model: ModelConfig) -> Shapes:
    """The parameters of the recipe's policy."""
    plain = replace(_without_cuda(model), path="", checkpointing="none", tower_checkpointing="none", offload_activations=False)
    return _shapes(config.to_json_string(), plain)


@lru_cache(maxsize=8)  # a plan tries many keys, few of which change what parameters there are
def _shapes(config: str, model: ModelConfig) -> Shapes:
    made = config_from(config)
    policy = on_meta(made, model, packed=False)
    return Shapes(made, tuple(_weights(policy)), policy.base)


def _weights(policy: Policy) -> Iterator[Weight]:
    for name, p in policy.named_parameters():
        base = base_name(name)
        layer = re.search(r"language_model\.layers\.(\d+)\.|visual\.blocks\.(\d+)\.", base)
        if layer:
            group = f"layer {layer[1]}" if layer[1] else f"block {layer[2]}"
        elif ".visual." in base:
            group = "tower"
        else:
            group = {EMBEDDING: "embedding", HEAD: "head"}.get(base, "rest")
        linear = bool(LAYER.search(base)) and not p.requires_grad
        yield Weight(name, group, tuple(p.shape), p.requires_grad, p.element_size(), linear)

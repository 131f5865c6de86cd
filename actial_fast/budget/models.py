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
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from actial_fast.model.nf4 import LAYER
from actial_fast.model.policy import Policy, assembled
from actial_fast.model.weights import EMBEDDING, HEAD, base_name, parameters_on_meta
from actial_fast.rollout.memory import kv_shape
from actial_fast.settings.model import ModelConfig

# Of the published config.json files: hidden, intermediate, layers, heads, key-value heads, vocabulary, the tower's intermediate, tied head
PUBLISHED = {
    "3b": (2048, 11008, 36, 16, 2, 151936, 3420, True),
    "7b": (3584, 18944, 28, 28, 4, 152064, 3420, False),
    "32b": (5120, 27648, 64, 40, 8, 152064, 3456, False),
    "72b": (8192, 29568, 80, 64, 8, 152064, 3456, False),
}
NAME = re.compile(r"qwen2\.5-vl-(\d+b)-instruct$", re.IGNORECASE)


def config_of(path: str, like: str = "") -> Qwen2_5_VLConfig:
    """The configuration of the checkpoint at `path`: of a folder its config.json, of a hub name its published widths, or what an earlier
    download left. like: 3b, 7b, 32b or 72b, to go by instead. Nothing is downloaded. ValueError where nothing tells the widths."""
    if like:
        if like.lower() not in PUBLISHED:
            raise ValueError(f"--model: known are {', '.join(PUBLISHED)}, got {like!r}")
        return _published(like.lower())
    folder = Path(path)
    if path and (folder / "config.json").is_file():
        return Qwen2_5_VLConfig.from_pretrained(folder)
    if (size := NAME.search(path)) and size[1].lower() in PUBLISHED:
        return _published(size[1].lower())
    cached = try_to_load_from_cache(path, "config.json") if path.count("/") == 1 else None
    if isinstance(cached, str):
        return Qwen2_5_VLConfig.from_pretrained(Path(cached).parent)
    why = f"{path} is not here yet" if path else "it is empty"
    raise ValueError(f"model.path: {why}, so its widths are not known; say which with --model 7b ({', '.join(PUBLISHED)})")


def _published(size: str) -> Qwen2_5_VLConfig:
    hidden, intermediate, layers, heads, kv_heads, vocabulary, vision, tied = PUBLISHED[size]
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            "max_position_embeddings": 128000,
            "tie_word_embeddings": tied,
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": vision,
            "num_heads": 16,
            "out_hidden_size": hidden,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "window_size": 112,
        },
        tie_word_embeddings=tied,
    )


def shallow(config: Qwen2_5_VLConfig, layers: int, blocks: int) -> Qwen2_5_VLConfig:
    """The same widths, but so many decoder layers and tower blocks; the last block attends to whole images, as one of a tower does."""
    text, vision = config.text_config.to_dict(), config.vision_config.to_dict()
    text |= {"num_hidden_layers": layers, "layer_types": None}
    vision |= {"depth": blocks, "fullatt_block_indexes": [blocks - 1] if blocks else []}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=config.tie_word_embeddings)


def on_meta(config: Qwen2_5_VLConfig, model: ModelConfig, *, packed: bool) -> Policy:
    """The recipe's policy without memory, as `load_policy` puts it together. What only CUDA has is left out: it holds no less."""
    plain = _without_cuda(model)
    dtype = getattr(torch, model.frozen_dtype if model.lora.rank else model.dtype)
    with parameters_on_meta():
        made = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")
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

    config: Qwen2_5_VLConfig
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
    def kv_elements(self) -> int:
        """Numbers that a token's keys and values are."""
        return 2 * math.prod(kv_shape(self.config))


def shapes_of(config: Qwen2_5_VLConfig, model: ModelConfig) -> Shapes:
    """The parameters of the recipe's policy."""
    plain = replace(_without_cuda(model), path="", checkpointing="none", tower_checkpointing="none", offload_activations=False)
    return _shapes(config.to_json_string(), plain)


@lru_cache(maxsize=8)  # a plan tries many keys, few of which change what parameters there are
def _shapes(config: str, model: ModelConfig) -> Shapes:
    made = Qwen2_5_VLConfig(**json.loads(config))
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

"""The contract of a family: what the rest of the package asks of it, beside transformers' own model.

All families have in common: `model.visual`, a tower of `blocks` behind `patch_embed`, whose images never see each other, and `lm_head`
over `model.language_model`, whose layers are those of a Llama, with or without norms of queries and keys; M-RoPE as packing/layout.py
has it; images in the order and with the special tokens of Qwen2-VL. What differs between them is here. P patches, H width of the
language model.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

Grid = tuple[int, int, int]  # of an image: frames, rows, columns, in patches


@dataclass(frozen=True)
class Layers:
    """For counting FLOPs: layers that read the same input, over `rows`, and then attention over `attended`, pairs times the width of all
    heads. norm: before them; inside: between them and the attention; fed: something trained is added to their input."""

    layers: tuple[nn.Module, ...]
    rows: int
    attended: int = 0
    norm: nn.Module | None = None
    inside: tuple[nn.Module, ...] = ()
    fed: bool = False


@dataclass(frozen=True)
class Aside:
    """For counting FLOPs: layers whose output does not go to the next ones, but is the tower's next further level."""

    layers: tuple[Layers, ...]


@dataclass(frozen=True)
class Widths:
    """Of a language model and a tower: hidden and intermediate sizes, layers, heads (kv_heads of keys and values, head_dim wide), blocks.
    levels: after which blocks a tower gives further features, window: pixels along a side of its attention's, in a family that has such."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    vision_hidden: int
    vision_inner: int
    blocks: int
    vision_heads: int
    levels: tuple[int, ...] = ()
    window: int = 112


class Family(ABC):
    """A family; one object of each is in known.FAMILIES."""

    kind: str
    """model_type in config.json."""
    tower_kind: str
    """model_type of the tower's config."""
    name: str
    """As its makers write it."""
    config: type[PreTrainedConfig]
    """transformers' class of its configuration."""
    model: type[PreTrainedModel]
    """transformers' class of the model with its head."""
    blocks: str
    """A pattern of the linear layers of the tower's blocks, as transformers names modules: where adapters may stand."""
    merger: str
    """The same of what lies between tower and language model."""
    published: ClassVar[Mapping[str, Widths]]
    """By size, like 7b: the widths in the config.json files on the hub."""
    images: Mapping[str, Any] = MappingProxyType({})
    """What its image processor has beside Qwen2-VL's settings."""

    # ---- the tower

    def window(self, vision: PreTrainedConfig) -> int:
        """Merged tokens along a side of the windows that some blocks attend within; 0 for a tower without. vision: the tower's config.
        ValueError where windows hold none."""
        return 0

    def table(self, vision: PreTrainedConfig) -> int:
        """Entries along a side of the square table of learned positions that a patch's is interpolated from; 0 for a tower without."""
        return 0

    def levels(self, vision: PreTrainedConfig) -> int:
        """How many features (H) a merged token has: one for the embedding, and one for the output of each of the first layers."""
        return 1

    def tower_sizes(self, vision: Any) -> tuple[int, int]:
        """The tower's hidden and intermediate size."""
        return int(vision.hidden_size), int(vision.intermediate_size)

    def features(self, out: Any) -> Tensor:
        """(rows, levels * H), side by side, from what transformers' tower returns."""
        features: Tensor = out.pooler_output
        return features

    @abstractmethod
    def vision_layers(self, tower: Any, grids: list[Grid]) -> Iterator[Layers | Aside]:
        """The tower's layers in the order of its forward pass over images of these grids."""

    # ---- the language model

    def prepare(self, model: Any) -> None:
        """Have the language model of `model` add, in a pass over a packed batch, what it has of further levels."""
        return  # a family of one level has nothing to add

    def file_name(self, module: str) -> str:
        """What transformers writes for the name of a weight of its model."""
        return module

    # ---- configurations

    @abstractmethod
    def vision_config(self, widths: Widths) -> dict[str, Any]:
        """The tower's configuration."""

    def text_config(self, widths: Widths) -> dict[str, Any]:
        """The language model's."""
        return {
            "vocab_size": widths.vocabulary,
            "hidden_size": widths.hidden,
            "intermediate_size": widths.inner,
            "num_hidden_layers": widths.layers,
            "num_attention_heads": widths.heads,
            "num_key_value_heads": widths.kv_heads,
            "rope_parameters": self.rope(widths.head_dim),
        }

    @abstractmethod
    def rope(self, head_dim: int) -> dict[str, Any]:
        """Rotary parameters, M-RoPE's three shares of half a head among them."""

    def made(self, widths: Widths) -> PreTrainedConfig:
        """A configuration of these widths."""
        text = self.text_config(widths) | {"max_position_embeddings": 128000, "tie_word_embeddings": widths.tied}
        return self.config(text_config=text, vision_config=self.vision_config(widths), tie_word_embeddings=widths.tied)

    def shallow(self, config: Any, layers: int, blocks: int, levels: int = 0) -> PreTrainedConfig:
        """The same widths, but so many decoder layers and tower blocks, of which the last ones give so many further levels; a last block
        attends to whole images."""
        text = config.text_config.to_dict() | {"num_hidden_layers": layers}
        if "layer_types" in text:
            text["layer_types"] = None
        vision = config.vision_config.to_dict() | {"depth": blocks} | self.cut(blocks, levels)
        return self.config(text_config=text, vision_config=vision, tie_word_embeddings=config.tie_word_embeddings)

    def cut(self, blocks: int, levels: int) -> dict[str, Any]:
        """What else of the tower's configuration tells of single blocks."""
        assert not levels, f"{self.name} has none"
        return {}


def patches_of(grids: list[Grid]) -> int:
    """Patches of images of these grids."""
    return sum(map(math.prod, grids))


def whole_pairs(grids: list[Grid]) -> int:
    """Pairs of patches of images whose frames see themselves whole."""
    return sum(frames * (rows * columns) ** 2 for frames, rows, columns in grids)


def sections(head_dim: int) -> list[int]:
    """M-RoPE's shares of half a head for time, height and width, as equal as they can be."""
    half = head_dim // 2
    return [half - 2 * (half // 3), half // 3, half // 3]


def first_rope(head_dim: int) -> dict[str, Any]:
    """The rotary parameters of the families before Qwen3-VL."""
    shares = [16, 24, 24] if head_dim == 128 else sections(head_dim)
    return {"rope_type": "default", "rope_theta": 1e6, "mrope_section": shares}


def old_name(module: str) -> str:
    """A weight's name in the files of the families that are older than transformers' own names."""
    return module.removeprefix("model.") if module.startswith("model.visual.") else module.replace("model.language_model.", "model.", 1)

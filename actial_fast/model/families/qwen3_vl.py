"""Qwen3-VL (arXiv 2511.21631): queries and keys are normed, M-RoPE's shares interleave, patches are of 16 pixels with learned positions
that are interpolated to an image's grid, and features of some blocks of the tower are added to what the first layers give (DeepStack).

Timestamps stand before the frames of videos only, of which rows have none; an image among others is as in the older families.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from actial_fast.model.families.family import Aside, Family, Grid, Layers, Widths, patches_of, sections, whole_pairs
from actial_fast.packing.packed_ops import add_features

SMALL, LARGE = (1024, 4096, 24, 16, (5, 11, 17)), (1152, 4304, 27, 16, (8, 16, 24))  # towers


def _widths(hidden: int, inner: int, layers: int, heads: int, tied: bool, tower: tuple[Any, ...]) -> Widths:
    return Widths(hidden, inner, layers, heads, 8, 128, 151936, tied, *tower)


class Qwen3VL(Family):
    kind, tower_kind, name = "qwen3_vl", "qwen3_vl_vision", "Qwen3-VL"
    config, model = Qwen3VLConfig, Qwen3VLForConditionalGeneration
    blocks = r"model\.visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(linear_fc1|linear_fc2))"
    merger = r"model\.visual\.(merger|deepstack_merger_list\.\d+)\.(linear_fc1|linear_fc2)"
    published: ClassVar = {
        "2b": _widths(2048, 6144, 28, 16, True, SMALL),
        "4b": _widths(2560, 9728, 36, 32, True, SMALL),
        "8b": _widths(4096, 12288, 36, 32, False, LARGE),
        "32b": _widths(5120, 25600, 64, 64, False, LARGE),
    }
    images = MappingProxyType({"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3})

    def table(self, vision: Any) -> int:
        return int(vision.num_position_embeddings**0.5)

    def levels(self, vision: Any) -> int:
        return 1 + len(vision.deepstack_visual_indexes)

    def features(self, out: Any) -> Tensor:
        return torch.cat([out.pooler_output, *out.deepstack_features], 1) if out.deepstack_features else super().features(out)

    def vision_layers(self, tower: Any, grids: list[Grid]) -> Iterator[Layers | Aside]:
        config, patches = tower.config, patches_of(grids)
        yield Layers((tower.patch_embed.proj,), patches)
        yield Layers((), patches, norm=tower.pos_embed)
        for index, block in enumerate(tower.blocks):
            yield Layers((block.attn.qkv,), patches, config.hidden_size * whole_pairs(grids), block.norm1)
            yield Layers((block.attn.proj,), patches)
            yield Layers((block.mlp.linear_fc1,), patches, norm=block.norm2)
            yield Layers((block.mlp.linear_fc2,), patches)
            if index in config.deepstack_visual_indexes:
                merger = tower.deepstack_merger_list[list(config.deepstack_visual_indexes).index(index)]
                yield Aside(tuple(_merger(merger, patches // config.spatial_merge_size**2)))
        yield from _merger(tower.merger, patches // config.spatial_merge_size**2)

    def prepare(self, model: Any) -> None:
        levels = self.levels(model.model.visual.config)
        for number, layer in enumerate(model.model.language_model.layers[: levels - 1]):
            layer.register_forward_hook(functools.partial(_add, number), with_kwargs=True)

    def vision_config(self, widths: Widths) -> dict[str, Any]:
        return {
            "depth": widths.blocks,
            "hidden_size": widths.vision_hidden,
            "intermediate_size": widths.vision_inner,
            "num_heads": widths.vision_heads,
            "out_hidden_size": widths.hidden,
            "deepstack_visual_indexes": list(widths.levels),
        }

    def text_config(self, widths: Widths) -> dict[str, Any]:
        return super().text_config(widths) | {"head_dim": widths.head_dim}

    def rope(self, head_dim: int) -> dict[str, Any]:
        shares = [24, 20, 20] if head_dim == 128 else sections(head_dim)
        return {"rope_type": "default", "rope_theta": 5e6, "mrope_section": shares, "mrope_interleaved": True}

    def cut(self, blocks: int, levels: int) -> dict[str, Any]:
        return {"deepstack_visual_indexes": list(range(blocks - levels, blocks))}


def _merger(merger: Any, rows: int) -> Iterator[Layers]:
    yield Layers((merger.linear_fc1,), rows, norm=merger.norm)
    yield Layers((merger.linear_fc2,), rows)


def _add(level: int, layer: nn.Module, args: Any, kwargs: dict[str, Any], out: Tensor) -> Tensor | None:
    """What transformers does between two layers, by the places of a packed batch: its own way asks the device where they are. A hook, so
    that a checkpointed layer computes it again; a pass that is not packed has none of this."""
    batch = kwargs.get("packed")
    if batch is None or not batch.levels:
        return None
    return add_features(out[0], batch.levels[level], batch.image_slots, batch.image_rows)[None]

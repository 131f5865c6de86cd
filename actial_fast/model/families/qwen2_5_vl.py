"""Qwen2.5-VL (arXiv 2502.13923): most blocks of its tower attend within windows, and their layers are those of a Llama."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, ClassVar

from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from actial_fast.model.families.family import Family, Grid, Layers, Widths, first_rope, old_name, patches_of, whole_pairs


def _widths(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, vision_inner: int, tied: bool) -> Widths:
    return Widths(hidden, inner, layers, heads, kv_heads, 128, vocabulary, tied, 1280, vision_inner, 32, 16)


class Qwen25VL(Family):
    kind, tower_kind, name = "qwen2_5_vl", "qwen2_5_vl_vision", "Qwen2.5-VL"
    config, model = Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    blocks = r"model\.visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(gate_proj|up_proj|down_proj))"
    merger = r"model\.visual\.merger\.mlp\.[02]"
    published: ClassVar = {
        "3b": _widths(2048, 11008, 36, 16, 2, 151936, 3420, True),
        "7b": _widths(3584, 18944, 28, 28, 4, 152064, 3420, False),
        "32b": _widths(5120, 27648, 64, 40, 8, 152064, 3456, False),
        "72b": _widths(8192, 29568, 80, 64, 8, 152064, 3456, False),
    }

    def window(self, vision: Any) -> int:
        pixels, merged = vision.window_size, vision.spatial_merge_size * vision.patch_size
        if pixels < merged:
            raise ValueError(f"config.window_size: {pixels} pixels hold no merged token of {merged}")
        return int(pixels // vision.spatial_merge_size // vision.patch_size)

    def vision_layers(self, tower: Any, grids: list[Grid]) -> Iterator[Layers]:
        config, patches = tower.config, patches_of(grids)
        merged = patches // config.spatial_merge_size**2
        windows = sum(_window_pairs(grid, config.window_size // config.patch_size) for grid in grids)
        yield Layers((tower.patch_embed.proj,), patches)
        for index, block in enumerate(tower.blocks):
            pairs = whole_pairs(grids) if index in config.fullatt_block_indexes else windows
            yield Layers((block.attn.qkv,), patches, config.hidden_size * pairs, block.norm1)
            yield Layers((block.attn.proj,), patches)
            yield Layers((block.mlp.gate_proj, block.mlp.up_proj), patches, norm=block.norm2)
            yield Layers((block.mlp.down_proj,), patches)
        yield Layers((tower.merger.mlp[0],), merged, norm=tower.merger.ln_q)
        yield Layers((tower.merger.mlp[2],), merged)

    def file_name(self, module: str) -> str:
        return old_name(module)

    def vision_config(self, widths: Widths) -> dict[str, Any]:
        return {
            "depth": widths.blocks,
            "hidden_size": widths.vision_hidden,
            "intermediate_size": widths.vision_inner,
            "num_heads": widths.vision_heads,
            "out_hidden_size": widths.hidden,
            # every eighth sees the whole image; of a tower with fewer blocks the last
            "fullatt_block_indexes": list(range(min(7, widths.blocks - 1), widths.blocks, 8)) if widths.blocks else [],
            "window_size": widths.window,
        }

    def rope(self, head_dim: int) -> dict[str, Any]:
        return first_rope(head_dim)

    def cut(self, blocks: int, levels: int) -> dict[str, Any]:
        return super().cut(blocks, levels) | {"fullatt_block_indexes": [blocks - 1] if blocks else []}


def window_sizes(grid: Grid, side: int) -> list[int]:
    """Patches in each attention window of an image (frames, rows, columns): squares of `side` patches, cut off at its edges."""
    frames, *sides = grid
    high, wide = ([min(side, length - at) for at in range(0, length, side)] for length in sides)
    return [a * b for a, b in itertools.product(high, wide)] * frames


@lru_cache(maxsize=4096)  # a run's images come in a few sizes
def _window_pairs(grid: Grid, side: int) -> int:
    return sum(size**2 for size in window_sizes(grid, side))

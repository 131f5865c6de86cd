"""Qwen2-VL (arXiv 2409.12191): a tower that attends to whole images, and the first M-RoPE."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from actial_fast.model.families.family import Family, Grid, Layers, Widths, first_rope, old_name, patches_of, whole_pairs


def _widths(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, tied: bool) -> Widths:
    return Widths(hidden, inner, layers, heads, kv_heads, 128, vocabulary, tied, 1280, 4 * 1280, 32, 16)


class Qwen2VL(Family):
    kind, tower_kind, name = "qwen2_vl", "qwen2_vl_vision", "Qwen2-VL"
    config, model = Qwen2VLConfig, Qwen2VLForConditionalGeneration
    blocks = r"model\.visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))"
    merger = r"model\.visual\.merger\.mlp\.[02]"
    published: ClassVar = {
        "2b": _widths(1536, 8960, 28, 12, 2, 151936, True),
        "7b": _widths(3584, 18944, 28, 28, 4, 152064, False),
        "72b": _widths(8192, 29568, 80, 64, 8, 152064, False),
    }

    def tower_sizes(self, vision: Any) -> tuple[int, int]:
        return int(vision.embed_dim), int(vision.embed_dim * vision.mlp_ratio)

    def vision_layers(self, tower: Any, grids: list[Grid]) -> Iterator[Layers]:
        config, patches = tower.config, patches_of(grids)
        merged = patches // config.spatial_merge_size**2
        yield Layers((tower.patch_embed.proj,), patches)
        for block in tower.blocks:
            yield Layers((block.attn.qkv,), patches, config.embed_dim * whole_pairs(grids), block.norm1)
            yield Layers((block.attn.proj,), patches)
            yield Layers((block.mlp.fc1,), patches, norm=block.norm2)
            yield Layers((block.mlp.fc2,), patches)
        yield Layers((tower.merger.mlp[0],), merged, norm=tower.merger.ln_q)
        yield Layers((tower.merger.mlp[2],), merged)

    def file_name(self, module: str) -> str:
        return old_name(module)

    def vision_config(self, widths: Widths) -> dict[str, Any]:
        assert not widths.vision_inner % widths.vision_hidden, "an intermediate size is a multiple of the hidden one"
        return {
            "depth": widths.blocks,
            "embed_dim": widths.vision_hidden,
            "mlp_ratio": widths.vision_inner // widths.vision_hidden,
            "num_heads": widths.vision_heads,
            "hidden_size": widths.hidden,
        }

    def rope(self, head_dim: int) -> dict[str, Any]:
        return first_rope(head_dim)

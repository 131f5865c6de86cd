"""The models and sizes that bench.step times: Qwen2.5-VL-7B, a tiny one to try step.py with without a GPU, and update.py's narrow one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A model, by fields of its two configs, and the step: prompts and completions of each (GRPO), prompts with three answers each (SFT).

    pack_tokens: of a packed micro-batch; micro_batch: completions in a padded one; ceiling: rows of the product that MFU is taken over.
    """

    text: dict[str, Any]
    vision: dict[str, Any]
    prompts: int
    n: int
    mean: float
    sft_prompts: int
    pack_tokens: int
    micro_batch: int
    ceiling: int


SHAPES = {
    "7b": Shape(
        text={
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            "max_position_embeddings": 128000,
        },
        vision={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "window_size": 112,
        },
        prompts=2,
        n=16,
        mean=300,
        sft_prompts=11,
        pack_tokens=24576,
        micro_batch=8,
        ceiling=8192,
    ),
    "tiny": Shape(
        text={
            "vocab_size": 8192,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
            "max_position_embeddings": 8192,
        },
        vision={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
            "window_size": 112,
        },
        prompts=1,
        n=2,
        mean=40,
        sft_prompts=1,
        pack_tokens=8192,
        micro_batch=1,
        ceiling=512,
    ),
}


def narrow(vocabulary: int, hidden: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of the two configs of a Qwen2.5-VL that a CPU can train at real lengths: 4 layers, a tower of 4 blocks."""
    text = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 8 * hidden // 3,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.08,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]},
        "max_position_embeddings": 8192,
    }
    vision = {
        "depth": 4,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_heads": 4,
        "out_hidden_size": hidden,
        "fullatt_block_indexes": [3],
        "initializer_range": 0.08,
    }
    return text, vision

"""What a token's keys and values are, and how many tokens' this rank can hold."""

from __future__ import annotations

import math

import torch
from transformers import PreTrainedConfig

from actial_fast.model.policy import Policy
from actial_fast.train.preflight import available_memory

SHARE = 0.8  # of what is free: reading prompts and drawing need the rest


def kv_shape(model: PreTrainedConfig) -> tuple[int, int, int]:
    """Of one token's keys, or values: layers, key-value heads, head dimension. Held in `Policy.hidden_dtype`. model: its config."""
    config = model.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, config.num_key_value_heads, width


def kv_budget(policy: Policy) -> int:
    """Tokens whose keys and values fit into free memory, of the device or of the host."""
    if policy.device.type == "cuda":
        cached = torch.cuda.memory_reserved(policy.device) - torch.cuda.memory_allocated(policy.device)
        free = float(torch.cuda.mem_get_info(policy.device)[0] + cached)
    else:
        free = available_memory()
    return int(SHARE * min(free, 2.0**50)) // (2 * math.prod(kv_shape(policy.base.config)) * policy.hidden_dtype.itemsize)

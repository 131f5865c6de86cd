"""How many tokens' keys and values this rank can hold."""

from __future__ import annotations

import torch

from actial_fast.model.policy import Policy
from actial_fast.train.preflight import available_memory

SHARE = 0.8  # of what is free: reading prompts and drawing need the rest


def kv_bytes(policy: Policy) -> int:
    """Of one token, all layers, in the dtype of the computation."""
    config = policy.base.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * width * policy.compute_dtype.itemsize


def kv_budget(policy: Policy) -> int:
    """Tokens whose keys and values fit into free memory, of the device or of the host."""
    if policy.device.type == "cuda":
        cached = torch.cuda.memory_reserved(policy.device) - torch.cuda.memory_allocated(policy.device)
        free = float(torch.cuda.mem_get_info(policy.device)[0] + cached)
    else:
        free = available_memory()
    return int(SHARE * min(free, 2.0**50)) // kv_bytes(policy)

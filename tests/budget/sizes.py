"""A model that is small and yet not nothing, and what its forward pass keeps."""

from __future__ import annotations

import torch
from transformers import Qwen2_5_VLConfig

from actial_fast.budget.models import on_meta
from actial_fast.budget.trace import Live, _batch
from actial_fast.model.weights import materialise
from actial_fast.settings.model import ModelConfig
from bench.step.shapes import narrow

_TEXT, _VISION = narrow(512, 128)
CONFIG = Qwen2_5_VLConfig(text_config=_TEXT | {"num_hidden_layers": 3}, vision_config=_VISION, tie_word_embeddings=False)


def saved_bytes(config: Qwen2_5_VLConfig, model: ModelConfig, rows: int) -> float:
    """Bytes alive behind a real forward pass of the language model, as the allocator's books would have them, its input among them."""
    policy = on_meta(config, model, packed=True)
    materialise(policy, torch.device("cpu"))
    policy.train()
    for p in policy.parameters():
        torch.nn.init.normal_(p.data, std=0.02)
    trunk = policy.base.model.language_model
    live = Live([*policy.parameters(), *policy.buffers()])
    positions = torch.arange(rows).expand(3, 1, rows)
    with live:
        embeds = torch.randn(1, rows, config.text_config.hidden_size).requires_grad_(not model.lora.rank)
        given = {"attention_mask": None, "packed": _batch(rows), "use_cache": False}
        out = trunk(inputs_embeds=embeds, position_ids=positions, **given).last_hidden_state
    assert out.requires_grad
    return float(live.now)

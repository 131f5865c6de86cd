"""The models that are measured: Qwen2.5-VLs of random weights, with adapters where asked."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from actial_fast.model.adapters import add_adapters, draw_adapters
from actial_fast.settings.model import ModelConfig
from bench.step.shapes import narrow

VOCABULARY, HIDDEN = 8192, 128  # of the narrow one


def narrow_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """The narrow Qwen2.5-VL, float32, the same weights for the same seed."""
    text, vision = narrow(VOCABULARY, HIDDEN)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen2_5_VLForConditionalGeneration(config_of(tokenizer, text, vision)).train()


def with_adapters(model: Qwen2_5_VLForConditionalGeneration, config: ModelConfig) -> PeftModel:
    """Fresh adapters on a model whose weights are there already, drawn by one seed."""
    device = next(model.parameters()).device
    adapted = add_adapters(model, config)
    for module in adapted.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                setattr(module, name, torch.nn.Parameter(torch.empty_like(parameter, device=device)))
    draw_adapters(adapted, 0)
    return adapted


def config_of(tokenizer: PreTrainedTokenizerFast, text: dict[str, Any], vision: dict[str, Any]) -> Qwen2_5_VLConfig:
    """The config of a Qwen2.5-VL of these widths for this tokenizer's special tokens."""
    pad, video, start, end = token_ids(tokenizer, "image_pad", "video_pad", "vision_start", "vision_end")
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return Qwen2_5_VLConfig(
        text_config=text | ends,
        vision_config=vision,
        image_token_id=pad,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        initializer_range=text.get("initializer_range", 0.02),
        attn_implementation="sdpa",
    )


def token_ids(tokenizer: PreTrainedTokenizerFast, *names: str) -> list[int]:
    """The ids of special tokens by their names without brackets."""
    return [tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names]

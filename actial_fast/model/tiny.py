"""A tiny model of any family from random weights: transformers' own class, under two million parameters, and a tokenizer built on the spot.

It makes the whole recipe runnable on a laptop: one image is four tokens, and the tokenizer's pieces are the phrases of the training
texts, so a prompt with two images is about 26 tokens long.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from actial_fast.model.families.family import Widths
from actial_fast.model.families.known import FAMILIES
from actial_fast.model.processor import IMAGE_TEXT, VISION_TOKENS

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *VISION_TOKENS)
# a content is a string or OpenAI's list of parts, between which nothing stands: engines that see the loop hand parts over as they are
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type in ('image', 'image_url') %}" + IMAGE_TEXT + "{% elif part.type == 'text' %}"
    "{{ part.text }}{% else %}{{ raise_exception('parts of a message are text, image or image_url, not ' ~ part.type) }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# tags; an option's letter; a line break; a whole line that asks; a sentence (the space goes to the next one); the rest
_PIECE = re.compile(r"<[^<>\n]+>|\n\(?[A-Z][.)] |\n|[^<\n]+\?(?=[<\n]|$)|[^<\n]+?[.?!:](?=[ <\n]|$)|[^<\n]+|<")


@dataclass(frozen=True)
class TinyConfig:
    """Shape of the tiny model."""

    family: Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl"] = "qwen2_5_vl"
    """The model_type of the family it is of."""
    hidden: int = 128
    """Hidden size of the language model."""
    layers: int = 4
    """Decoder layers. With 2 or 3 some seeds never compose the move, the question and the options into a letter."""
    heads: int = 4
    """Attention heads, half of which hold keys and values; with one of three, stage 1 of the quickstart takes two to four times as many
    steps. Engines take heads of 32 and more."""
    vision_hidden: int = 128
    """Hidden size of the vision tower."""
    vision_depth: int = 2
    """Blocks of the vision tower; with 0 it is a patch embedding and a merger."""
    image_size: int = 56
    """Images are scaled to this many pixels squared in area; 28x28 is one merged token (of Qwen3-VL's 32x32)."""
    window: int = 28
    """Pixels along a side of the attention windows of Qwen2.5-VL's tower; its last block sees the whole image."""
    phrases: int = 1000
    """Most frequent pieces of the training texts that become tokens; other text is spelt in bytes."""
    initializer_range: float = 0.08
    """Standard deviation of the random weights; a narrow model needs more than the usual 0.02."""


def create(folder: Path, texts: Iterable[str], config: TinyConfig, seed: int) -> None:
    """Write a checkpoint folder (weights, tokenizer, image processor) that plain transformers opens. Deterministic by seed.

    ValueError: hidden or vision_hidden is no multiple of heads."""
    for name in ("hidden", "vision_hidden"):
        if getattr(config, name) % config.heads:
            raise ValueError(f"{name}={getattr(config, name)} is no multiple of heads={config.heads}")
    tokenizer = build_tokenizer(texts, config.phrases)
    family = FAMILIES[config.family]
    size = {"shortest_edge": config.image_size**2, "longest_edge": config.image_size**2}
    images = Qwen2VLImageProcessorPil(size=size, **family.images)
    widths = Widths(
        hidden=config.hidden,
        inner=8 * config.hidden // 3,
        layers=config.layers,
        heads=config.heads,
        kv_heads=config.heads // 2,
        head_dim=config.hidden // config.heads,
        vocabulary=-(-len(tokenizer) // 64) * 64,
        tied=False,
        vision_hidden=config.vision_hidden,
        vision_inner=2 * config.vision_hidden,
        blocks=config.vision_depth,
        vision_heads=config.heads,
        levels=tuple(range(min(3, config.vision_depth))),
        window=config.window,
    )
    text = {
        "rope_parameters": family.rope(widths.head_dim) | {"rope_theta": 10000.0},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "max_position_embeddings": 8192,
    }
    spread = {"initializer_range": config.initializer_range}
    special = ("image_pad", "video_pad", "vision_start", "vision_end")
    ids: Any = {f"{name.removesuffix('_pad')}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in special}
    about = family.config(
        text_config=family.text_config(widths) | text | spread, vision_config=family.vision_config(widths) | spread, **ids, **spread
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = family.model(about)
    model.generation_config.eos_token_id = sorted((tokenizer.eos_token_id, tokenizer.pad_token_id))  # a turn's end and a text's, as Qwen's
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    images.save_pretrained(folder)


def build_tokenizer(texts: Iterable[str], phrases: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose pieces are the `phrases` most frequent phrases of the texts; any other text is spelt in bytes, losslessly."""
    counts = Counter(piece for text in texts for piece in _PIECE.findall(text) if len(piece) > 1 and piece.isascii())
    counts += Counter({"user\n": 1, "assistant\n": 1, "system\n": 1})
    chosen = [piece for piece, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:phrases]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in chosen])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )

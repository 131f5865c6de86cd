"""The tiny model's tokenizer, chat template and what ends its replies."""

import importlib.util

import pytest
from jinja2.exceptions import TemplateError
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, GenerationConfig

from actial_fast.model.processor import IMAGE_TEXT, Processor
from actial_fast.model.tiny import build_tokenizer


def test_its_chat_template_reads_strings_and_parts_alike():
    tokenizer = build_tokenizer(["Which way?"], 10)
    parts = [{"type": "image"}, {"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "Which way?"}]
    asked = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": c}] for c in (IMAGE_TEXT * 2 + "Which way?", parts)]
    text, listed = (tokenizer.apply_chat_template(each, tokenize=False, add_generation_prompt=True) for each in asked)
    assert text == listed and text.endswith(f"<|im_start|>user\n{IMAGE_TEXT * 2}Which way?<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(TemplateError, match="not audio"):
        tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "audio"}]}], tokenize=False)


def test_other_engines_end_a_reply_where_ours_does(tiny):
    """By the checkpoint, which is all they read."""
    assert {*GenerationConfig.from_pretrained(tiny).eos_token_id} == {*Processor.load(str(tiny)).stop_tokens}


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="with torchvision: tests/vllm/test_serving.py")
def test_what_transformers_processor_lacks_without_torchvision(tiny):
    """As docs/serving.md says; tokenizer and image processor open by themselves."""
    with pytest.raises(ImportError, match="Qwen2VLVideoProcessor requires the Torchvision library"):
        AutoProcessor.from_pretrained(tiny)
    assert AutoTokenizer.from_pretrained(tiny).chat_template and AutoImageProcessor.from_pretrained(tiny).merge_size == 2

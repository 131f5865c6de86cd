"""What the trace counts, beside what is kept for a real backward pass."""

import pytest
import torch

from actial_fast.budget.trace import Line, Live, roughly, traced
from actial_fast.settings.model import LoRAConfig, ModelConfig
from tests.budget.sizes import CONFIG, saved_bytes

KINDS = {
    "none": ModelConfig(),
    "full": ModelConfig(checkpointing="full", tower_checkpointing="full"),
    "selective": ModelConfig(checkpointing="selective"),
    "LoRA": ModelConfig(lora=LoRAConfig(rank=4)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_is_what_autograd_saves(kind, tmp_path):
    """A real forward pass of three layers: the bytes that are alive behind it, weights left out."""
    CONFIG.save_pretrained(tmp_path)
    model = KINDS[kind]
    told = traced(CONFIG, model, packed=True, low=False, sharded=False)
    kept = told.language.kept(700, CONFIG.text_config.num_hidden_layers)
    assert kept == pytest.approx(saved_bytes(CONFIG, model, 700), rel=0.02)


def test_checkpoints_keep_less_and_selective_ones_a_little_more_than_full_ones():
    layers = {kind: traced(CONFIG, model, packed=True, low=False, sharded=False).language.layer for kind, model in KINDS.items()}
    hidden = CONFIG.text_config.hidden_size
    assert layers["full"].per_row == pytest.approx(4 * hidden, rel=0.01), "a layer keeps its input"
    assert layers["full"].per_row < layers["selective"].per_row <= 2.2 * layers["full"].per_row < layers["none"].per_row


@pytest.mark.parametrize("kind", ["none", "LoRA"])
@pytest.mark.parametrize("low", [True, False])
def test_bounds_that_need_no_trace_are_bounds(kind, low):
    told, bound = traced(CONFIG, KINDS[kind], packed=True, low=low, sharded=False), roughly(CONFIG)
    for name in ("language", "tower"):
        part, most = getattr(told, name), getattr(bound, name)
        for rows in (256, 8192):
            assert part.kept(rows, 8) + part.forward(rows, 8) <= most.kept(rows, 8) + most.forward(rows, 8)
            assert part.backward(rows) <= most.backward(rows)
    assert all(getattr(told, name)(4096) <= getattr(bound, name)(4096) for name in ("reading", "looking"))


def test_a_frozen_tower_keeps_nothing():
    told = traced(CONFIG, ModelConfig(freeze=("model.visual",)), packed=True, low=False, sharded=False)
    assert told.tower.kept(4096, 4) == 0 < told.looking(4096)


def test_a_storage_counts_once_and_until_it_is_freed():
    x = torch.ones(256)
    with Live([x]) as live:
        y = x.view(16, 16) * 2
        z = y.t()
        assert live.now == y.nbytes
        del y, z
        assert live.now == 0 and live.peak == 1024
        assert Line(8, 2)(4) == 16 and Line(8, 2)(0) == 0

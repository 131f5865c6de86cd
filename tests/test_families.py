"""Every family through both loops and evaluation, packed and plain (Qwen2.5-VL is what all other tests of the loops train)."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from actial_fast import grpo, sft
from actial_fast.data.sources.source import SourceConfig, open_source
from actial_fast.evaluation.evaluate import evaluate_checkpoint
from actial_fast.model.families.known import FAMILIES
from actial_fast.model.policy import load_policy
from actial_fast.model.tiny import TinyConfig, create
from actial_fast.report.metrics import read_metrics
from actial_fast.settings.model import LoRAConfig
from actial_fast.settings.recipe import EvalConfig
from actial_fast.settings.running import SaveConfig
from tests.loops import ALONE


@pytest.mark.parametrize("kind", ["qwen3_vl", pytest.param("qwen2_vl", marks=pytest.mark.slow)])
def test_a_family_goes_through_both_loops(kind, lab, sft_recipe, grpo_recipe, tmp_path):
    """SFT and then GRPO with an evaluation: the same losses packed and plain, and checkpoints that transformers opens whole."""
    rows = open_source(SourceConfig(str(lab.questions / "train.jsonl")))
    texts = [turn.content.replace("<image>", "") for i in range(len(rows)) for turn in rows[i].turns]
    base, test = tmp_path / "base", (SourceConfig(str(lab.questions / "test.jsonl")),)
    create(base, texts, TinyConfig(family=kind, hidden=32, vision_hidden=32, layers=3, vision_depth=2, heads=4, image_size=28), seed=0)
    losses: dict[str, list[float]] = {}
    for packing in ("packed", "plain"):
        short = {"packing": packing, "steps": 2, "save": SaveConfig(every=2, tensorboard=False)}
        model = replace(sft_recipe.model, path=str(base), checkpointing="full")
        optim = replace(sft_recipe.optim, eps=1e-4)  # with which AdamW's division does not blow up the rounding of tiny gradients
        tuned = sft.train(replace(sft_recipe, run=str(tmp_path / packing), model=model, optim=optim, **short))
        recipe = replace(grpo_recipe, run=str(tmp_path / packing), optim=replace(grpo_recipe.optim, eps=1e-4), **short)
        recipe = replace(recipe, model=replace(model, path=str(tuned)), eval=EvalConfig(sources=test, every=2, limit=4, max_new_tokens=4))
        final = grpo.train(recipe)
        losses[packing] = [m["loss"] for m in read_metrics(Path(recipe.run))]
        opened, about = FAMILIES[kind].model.from_pretrained(final, output_loading_info=True)
        assert not any(about[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        before = dict(FAMILIES[kind].model.from_pretrained(base).named_parameters())
        moved = [n for n, p in opened.named_parameters() if not torch.equal(p, before[n])]
        assert len(moved) > 0.9 * len(before)
        assert [each["overall"]["n"] for each in evaluate_checkpoint(str(final), recipe.eval).values()] == [4]
    assert losses["packed"] == pytest.approx(losses["plain"], abs=1e-5) and len(losses["packed"]) == 4


def test_adapters_on_every_part_begin_where_the_model_is(sft_recipe, tmp_path):
    """And train: two steps of a 4-bit base move adapters of the language model, of the tower, and of all of its mergers."""
    base = tmp_path / "base"
    create(
        base,
        ["A", "B"],
        TinyConfig(family="qwen3_vl", hidden=32, vision_hidden=32, layers=3, vision_depth=2, heads=4, image_size=28),
        seed=0,
    )
    lora = LoRAConfig(rank=2, tower=True, merger=True)
    recipe = replace(sft_recipe, steps=2, model=replace(sft_recipe.model, path=str(base), lora=lora, quantize="nf4"))
    fresh = load_policy(recipe.model, ALONE.device, recipe.seed).trained()
    final = sft.train(recipe)
    adapter = load_file(final.parent / "adapter" / "adapter_model.safetensors")
    up = {n for n, p in adapter.items() if ".lora_B." in n and p.abs().max() > 0}
    assert len(adapter) == len(fresh) and 2 * len(up) == len(adapter)
    for part in ("language_model", "visual.blocks.1.mlp.linear_fc2", "visual.merger", "deepstack_merger_list.0", "deepstack_merger_list.1"):
        assert any(part in n for n in up), part

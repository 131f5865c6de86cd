"""Adapters of every kind: they begin as nothing, and what is exported computes what was trained, in PEFT and merged."""

import json
import re
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, Qwen2_5_VLForConditionalGeneration

from actial_fast.model.adapters import lengths, places, product_of
from actial_fast.model.families.known import family_of
from actial_fast.model.policy import Policy, load_policy
from actial_fast.model.processor import Processor
from actial_fast.model.tiny import TinyConfig, create
from actial_fast.rollout.handover import adapters
from actial_fast.settings.model import LoRAConfig, ModelConfig
from actial_fast.settings.recipe import GRPORecipe
from actial_fast.settings.running import OptimConfig
from actial_fast.train import checkpoint
from actial_fast.train.export import export_to
from actial_fast.train.stage import build_optimizer
from tests.loops import ALONE, generate, log_probs

CPU = torch.device("cpu")
EVERYTHING = {"tower": True, "merger": True, "rslora": True, "dora": True}
KINDS = {
    "plain": {"lora": LoRAConfig(rank=4, alpha=24)},
    "rslora": {"lora": LoRAConfig(rank=4, rslora=True)},
    "dora": {"lora": LoRAConfig(rank=4, dora=True, targets=("q_proj", "down_proj"))},
    "tower": {"lora": LoRAConfig(rank=4, tower=True, targets=())},
    "merger, nf4": {"lora": LoRAConfig(rank=4, merger=True, targets=("v_proj",)), "quantize": "nf4", "quantize_twice": False},
    "everything": {"lora": LoRAConfig(rank=4, **EVERYTHING), "quantize": "nf4"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model whose tower has blocks; its widths are whole blocks of NF4, which transformers needs on a CPU."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    create(
        folder,
        ["Which way?", "left", "right"] * 2,
        TinyConfig(hidden=192, vision_hidden=32, layers=1, vision_depth=1, heads=4, image_size=28),
        seed=3,
    )
    return folder


@pytest.fixture(scope="module")
def processor(model):
    return Processor.load(str(model), max_pixels=28 * 28 * 4)


@pytest.fixture
def sequences(processor, example):
    rows = [example("<image>Which way?", "left", sizes=[(56, 56)], seed=1), example("Which way?", "right and left", seed=2)]
    return [processor.encode(row) for row in rows]


def moved(model, kind, **how) -> Policy:
    """A policy whose adapters are far from where they began."""
    policy = load_policy(ModelConfig(path=str(model), **KINDS[kind]), CPU, 0, **how)
    with torch.no_grad():
        for k, (name, p) in enumerate(policy.trained().items()):
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(k))
            if "lora_B" in name:
                p.copy_(0.02 * noise)
            elif "magnitude" in name:
                p.mul_(1 + 0.1 * noise)
    return policy.eval()


def scores(policy, processor, sequences, packing="plain"):
    return np.concatenate(log_probs(policy, processor, sequences, GRPORecipe(packing=packing)))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("plain", "rslora")])  # tests/rollout has these
def test_adapters_begin_as_nothing_and_both_paths_and_the_sampler_see_them(kind, model, processor, sequences):
    config = ModelConfig(path=str(model), **KINDS[kind])
    policy = load_policy(config, CPU, 0, packed=True)
    start = scores(policy, processor, sequences, "packed")
    with policy.adapter_off():
        assert np.array_equal(scores(policy, processor, sequences, "packed"), start), "the start is the base, bit for bit"
    layers = [re.sub(r"^base_model\.model\.|\.lora_A\..*", "", n.removeprefix("model.")) for n in policy.trained() if ".lora_A." in n]
    parts = {n.split(".")[2] if "visual" in n else "language" for n in layers}
    lora = config.lora
    assert parts == {*(["blocks"] if lora.tower else []), *(["merger"] if lora.merger else []), *(["language"] if lora.targets else [])}
    assert len(layers) == len(lora.targets) + 5 * lora.tower + 2 * lora.merger
    assert policy.trains_tower == (lora.tower or lora.merger)
    policy = moved(model, kind, packed=True)
    ours = scores(policy, processor, sequences, "packed")
    assert np.abs(ours - start).max() > 2e-3
    np.testing.assert_allclose(scores(moved(model, kind), processor, sequences), ours, atol=1e-5)
    for sequence in sequences:
        end = int(sequence.trained.argmax())
        prompt = replace(sequence, ids=sequence.ids[:end], trained=sequence.trained[:end], positions=sequence.positions[:, :end])
        ((reply,),) = generate(policy, processor, [prompt], 1, keys=[(0, 1)], max_new_tokens=6)
        whole = prompt.extended(reply.ids)
        np.testing.assert_allclose(reply.logprobs, scores(policy, processor, [whole], "packed"), atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_exported_is_what_was_trained(kind, model, processor, sequences, tmp_path):
    """PEFT's folder beside the base as it was held, and the merged one, within 1e-5."""
    policy = moved(model, kind)
    ours = scores(policy, processor, sequences)
    with checkpoint.Saver(tmp_path, ALONE, 1) as saver:
        saver.save(1, policy, processor, build_optimizer(policy, OptimConfig()), {})
        saver.finish(1)
    stored = checkpoint.path_of(tmp_path, 1) / "rank-00000-of-00001.safetensors"
    names = [n.removeprefix("weight/") for n in load_file(stored) if n.startswith("weight/")]
    assert set(names) == set(policy.trained()) and all(".lora_" in n for n in names), "a checkpoint has the adapters alone"

    merged = load_policy(ModelConfig(path=str(checkpoint.final(tmp_path))), CPU, 0).eval()
    np.testing.assert_allclose(scores(merged, processor, sequences), ours, atol=1e-5)
    adapter = tmp_path / "final" / "adapter"
    np.testing.assert_allclose(scores(opened(policy.config, adapter), processor, sequences), ours, atol=1e-5)
    said = json.loads((adapter / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(model) and said["target_modules"] == places(policy.config.lora, family_of(policy.base))
    assert (said["use_rslora"], said["use_dora"]) == (policy.config.lora.rslora, policy.config.lora.dora)
    assert (adapter / "README.md").exists() == (policy.config.quantize == "nf4")
    opened(policy.config, adapter).model.save_pretrained(tmp_path / "theirs")
    theirs, mine = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "theirs", adapter))
    assert theirs.keys() == mine.keys() and all(torch.equal(theirs[n], mine[n]) for n in mine), "named as PEFT names them"


def opened(config: ModelConfig, adapter) -> Policy:
    """An adapter beside the base that it was trained on, by transformers and PEFT alone."""
    how = {}
    if config.quantize == "nf4":
        kind = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": config.quantize_twice, "bnb_4bit_compute_dtype": torch.float32}
        how["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["model.visual", "lm_head"], **kind)
        how["device_map"] = {"": "cpu"}
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(config.path, dtype=getattr(torch, config.frozen_dtype), **how)
    for module in base.modules():
        module.support_avx512bf16_for_cpu = False  # where bitsandbytes would compute in 16 bits
        if hasattr(getattr(module, "weight", None), "quant_state"):
            module.weight.quant_state.dtype = torch.float32
    for parameter in base.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return Policy(peft.PeftModel.from_pretrained(base, adapter), torch.float32, config).eval()


def test_merging_into_the_original_base_is_another_model(model, processor, sequences, tmp_path):
    """It is the one that PEFT makes beside that base; and it says so."""
    policy = moved(model, "everything")
    with checkpoint.Saver(tmp_path, ALONE, 1) as saver:
        saver.save(1, policy, processor, build_optimizer(policy, OptimConfig()), {})
    for base in ("trained", "original"):
        done = export_to(checkpoint.path_of(tmp_path, 1), tmp_path / base, base=base)
        assert done.held == 7 and done.dtype == "float32" and done.rounding == 0
    models = {base: load_policy(ModelConfig(path=str(tmp_path / base)), CPU, 0).eval() for base in ("trained", "original")}
    found = {base: scores(merged, processor, sequences) for base, merged in models.items()}
    ours = scores(policy, processor, sequences)
    np.testing.assert_allclose(found["trained"], ours, atol=1e-5)
    assert np.abs(found["original"] - ours).max() > 1e-3
    beside = opened(replace(policy.config, quantize="none"), tmp_path / "original" / "adapter")
    np.testing.assert_allclose(found["original"], scores(beside, processor, sequences), atol=1e-5)


def test_doras_norms_are_taken_once_for_sampling(model, monkeypatch):
    policy = moved(model, "dora")
    layer = policy.base.model.language_model.layers[0].mlp.down_proj
    x = torch.randn(5, layer.in_features)
    with torch.no_grad():
        product = product_of(layer)
        monkeypatch.setattr(type(layer.lora_magnitude_vector["default"]), "get_weight_norm", lambda *_, **__: pytest.fail("again"))
        found = product(x)
        monkeypatch.undo()
        torch.testing.assert_close(found, layer(x), rtol=1e-5, atol=1e-5)
        assert product_of(policy.base.model.language_model.layers[0].mlp.up_proj) is None, "no adapter is there"
        with policy.adapter_off():
            assert product_of(layer) is None
    assert product_of(moved(model, "plain").base.model.language_model.layers[0].mlp.down_proj) is None


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_lengths_of_rows(rows, monkeypatch):
    monkeypatch.setattr("actial_fast.model.adapters.ROWS", rows)
    weight, up, down = torch.randn(7, 5), torch.randn(7, 2), torch.randn(2, 5)
    torch.testing.assert_close(lengths(weight), weight.norm(dim=1))
    torch.testing.assert_close(lengths(weight.bfloat16(), down, up, 0.5), (weight.bfloat16().float() + 0.5 * up @ down).norm(dim=1))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"targets": ("q_proj", "qq_proj")}, r"model.lora.targets: the language model has no linear layer 'qq_proj'"),
        ({"targets": ("embed_tokens",)}, r"model.lora.targets: the language model has no linear layer 'embed_tokens'"),
        ({"tower": True}, r"model.lora.tower: this model's tower has no blocks"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_keys_that_find_no_layer_are_told(changes, problem, tiny):
    with pytest.raises(ValueError, match=problem):
        load_policy(ModelConfig(path=str(tiny), lora=LoRAConfig(rank=2, **changes)), CPU, 0)


def test_freezing_the_adapters_that_were_asked_for_is_told(model):
    for key, frozen in (("tower", "model.visual"), ("merger", "model.visual.merger")):
        config = ModelConfig(path=str(model), lora=LoRAConfig(rank=2, **{key: True}), freeze=(frozen,))
        with pytest.raises(ValueError, match=rf"model.freeze: freezes all that model.lora.{key} is to train"):
            load_policy(config, CPU, 0)


def test_adapters_of_the_tower_have_the_names_of_files(model):
    tensors, _ = adapters(moved(model, "tower"))
    assert "base_model.model.model.visual.blocks.0.attn.qkv.lora_A.weight" in tensors and len(tensors) == 2 * 5

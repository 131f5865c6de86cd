"""Every family against transformers: loading and saving, positions, packed passes, sampling, adapters, FLOPs. A new one joins by itself."""

import contextlib
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from actial_fast.budget.models import config_of, shapes_of
from actial_fast.budget.trace import Live, roughly, traced
from actial_fast.model.families.known import FAMILIES, family_of, known
from actial_fast.model.flops import minimum
from actial_fast.model.policy import load_policy
from actial_fast.model.processor import Processor
from actial_fast.model.tiny import TinyConfig, create
from actial_fast.model.vision import encode_images, vision_arguments
from actial_fast.model.weights import check_checkpoint, module_name
from actial_fast.ops.reference import linear_logprob
from actial_fast.ops.spec import GRPOSpec
from actial_fast.packing.batch import collate
from actial_fast.rollout.engines import open_checkpoint, open_model
from actial_fast.settings.model import LoRAConfig, ModelConfig
from actial_fast.settings.recipe import GRPORecipe, RolloutConfig, SFTRecipe
from actial_fast.settings.running import OptimConfig
from actial_fast.train import checkpoint
from actial_fast.train.preflight import problems_of
from actial_fast.train.stage import build_optimizer
from bench.step.ledger import Count
from tests.bench.packed_work import packed_work
from tests.budget.sizes import saved_bytes
from tests.loops import ALONE, accumulate, generate, log_probs
from tests.train.test_rounds import assert_same, run, samples_of

CPU = torch.device("cpu")
KEYS = [(0, k) for k in range(4)]
SHAPE = TinyConfig(hidden=64, layers=4, vision_hidden=64, vision_depth=3, heads=4, image_size=28)  # widths are whole blocks of NF4


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory) -> SimpleNamespace:
    """A checkpoint with every weight off its start, so that norms, biases and tables of positions count, and its processor."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    texts = ["Which way? A. left B. right", "<answer>A</answer>"] * 2
    create(folder, texts, replace(SHAPE, family=request.param), seed=0)
    family = FAMILIES[request.param]
    theirs = family.model.from_pretrained(folder)
    make = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=make)
    theirs.save_pretrained(folder)
    pixels = (2 * theirs.config.vision_config.patch_size) ** 2
    processor = Processor.load(str(folder), min_pixels=pixels, max_pixels=24 * pixels)
    return SimpleNamespace(family=family, model=folder, theirs=theirs.eval(), processor=processor, side=int(pixels**0.5))


@pytest.fixture
def prompts(case, example):
    rows = [
        example("<image><image>How did it move?", sizes=[(case.side, case.side), (3 * case.side, 2 * case.side)], seed=1),
        example("no image", seed=2),
        example("A question that is spelt in bytes <image>", sizes=[(case.side, 4 * case.side)], seed=3),
    ]
    return [case.processor.encode_prompt(row) for row in rows]


def asked(case, sequence) -> dict:
    """What transformers' own model is given, positions left to it."""
    ids = torch.from_numpy(sequence.ids)[None]
    images = {}
    if sequence.images:
        pixels = [case.processor.store.pixels(key) for key in sequence.images]
        images = dict(case.processor.image_processor(images=pixels, return_tensors="pt", input_data_format="channels_last"))
    return {"input_ids": ids, "mm_token_type_ids": (ids == case.processor.image_token).int(), **images}


def test_a_checkpoint_is_read_and_written_as_transformers_does(case, tmp_path):
    assert check_checkpoint(str(case.model)) == []
    policy = load_policy(ModelConfig(path=str(case.model)), CPU, 0)
    assert type(policy.base) is case.family.model and known(policy.base) and family_of(policy.base) is case.family
    theirs = dict(case.theirs.named_parameters())
    ours = dict(policy.base.named_parameters())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert {case.family.file_name(n) for n in theirs} == load_file(case.model / "model.safetensors").keys()
    assert all(module_name(case.family.file_name(n)) == n for n in theirs)
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(1.5)
    with checkpoint.Saver(tmp_path, ALONE, 1) as saver:
        saver.save(1, policy, case.processor, build_optimizer(policy, OptimConfig()), {})
        saver.finish(1)
    again, about = case.family.model.from_pretrained(checkpoint.final(tmp_path), output_loading_info=True)
    assert not any(about[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(p, ours[n]) for n, p in again.named_parameters())
    assert again.config.to_dict()["text_config"]["rope_parameters"] == case.theirs.config.to_dict()["text_config"]["rope_parameters"]
    settings = Processor.load(str(checkpoint.final(tmp_path))).store.settings
    assert settings.patch == case.theirs.config.vision_config.patch_size and settings.mean == case.processor.store.settings.mean


IMAGE = "<image>"
TEXTS = {
    "text": ("no image at all", 0),
    "one at the start": (f"{IMAGE}what?", 1),
    "one at the end": (f"what? {IMAGE}", 1),
    "nothing else": (IMAGE, 1),
    "adjacent": (f"{IMAGE}{IMAGE}which?", 2),
    "adjacent at the end": (f"which? {IMAGE}{IMAGE}", 2),
    "apart": (f"first {IMAGE} and then {IMAGE}, and {IMAGE} last?", 3),
    "adjacent and apart": (f"{IMAGE}{IMAGE} before {IMAGE}", 3),
}


@pytest.mark.parametrize("name", TEXTS)
def test_positions_are_those_of_transformers(case, example, name):
    """Images of unequal sizes, wide and high."""
    text, images = TEXTS[name]
    for seed in range(3):
        rng = np.random.default_rng(seed)
        sizes = [tuple(int(case.side * n) for n in rng.integers(1, 7, 2)) for _ in range(images)]
        sequence = case.processor.encode_prompt(example(text, sizes=sizes, seed=seed))
        given = asked(case, sequence)
        theirs, _ = case.theirs.model.get_rope_index(
            given["input_ids"], given["mm_token_type_ids"], image_grid_thw=given.get("image_grid_thw")
        )
        assert torch.equal(torch.from_numpy(sequence.positions), theirs[:, 0])
        assert sum(f * h * w for f, h, w in sequence.grids) == 4 * int(given["mm_token_type_ids"].sum())


@pytest.mark.parametrize("packing", ["packed", "plain"])
def test_log_probs_are_those_of_transformers_alone(case, prompts, packing):
    """One sequence at a time through transformers' model, with its own positions and pixels, against all in one pass."""
    rng = np.random.default_rng(4)
    whole = [replace(p, trained=np.zeros(len(p), bool)).extended(rng.integers(5, 60, n)) for p in prompts for n in (3, 7)]
    policy = load_policy(ModelConfig(path=str(case.model)), CPU, 0, packed=packing == "packed").eval()
    ours = log_probs(policy, case.processor, whole, GRPORecipe(packing=packing))
    for sequence, mine in zip(whole, ours, strict=True):
        with torch.no_grad():
            logp = case.theirs(**asked(case, sequence)).logits[0].log_softmax(-1)
        wanted = np.flatnonzero(sequence.trained[1:])
        np.testing.assert_allclose(mine, logp[wanted, sequence.ids[1:][wanted]].numpy(), atol=1e-5)


EVERYTHING = LoRAConfig(rank=2, tower=True, merger=True)
WAYS = {
    "uneven groups, and text": ([(2, 3), (0, 2), (1, 1)], {}),
    "checkpoints": ([(2, 3), (1, 2)], {"checkpointing": "full", "tower_checkpointing": "full"}),
    "selective checkpoints, frozen tower": ([(2, 2), (1, 2)], {"checkpointing": "selective", "freeze": ("model.visual",)}),
    "adapters everywhere, NF4": ([(2, 2), (1, 2)], {"lora": EVERYTHING, "quantize": "nf4"}),
}


@pytest.mark.parametrize("name", WAYS)
def test_packed_equals_one_sample_at_a_time(case, name):
    """Statistics, log-probs, and the gradient of every weight."""
    plan, model = WAYS[name]
    samples = samples_of(case.processor, plan)
    packed, plain = (run(case, case.processor, samples, packed, model=model) for packed in (True, False))
    assert_same(packed, plain)
    moved = {n for n, gradient in plain[1].items() if gradient.abs().max() > 1e-6}
    if "lora" in model:
        layers = [n.split(".lora_")[0] for n in plain[1]]
        assert any("visual.blocks.2.mlp" in n for n in layers) and any("merger" in n for n in layers)
    elif "freeze" not in model:
        assert all(any(part in n for n in moved) for part in ("visual.patch_embed", "visual.blocks.0", "visual.blocks.2", "visual.merger"))
    if case.family.kind == "qwen3_vl" and not model:
        levels = {n.split("deepstack_merger_list.")[1][0] for n in moved if "deepstack" in n}
        assert levels == {"0", "1", "2"} and any("pos_embed" in n for n in moved) and any("q_norm" in n for n in moved)


def test_replies_are_those_of_generate_and_their_log_probs_the_trainers(case, prompts):
    policy = load_policy(ModelConfig(path=str(case.model)), CPU, 0, packed=True).eval()
    never = list(case.processor.never_sampled(policy.base.lm_head.weight.shape[0]))
    greedy = generate(policy, case.processor, prompts, 1, temperature=0, max_new_tokens=10)
    for prompt, (reply,) in zip(prompts, greedy, strict=True):
        more = {"do_sample": False, "max_new_tokens": 10, "suppress_tokens": never, "eos_token_id": list(case.processor.stop_tokens)}
        theirs = case.theirs.generate(**asked(case, prompt), **more)
        assert theirs[0, len(prompt) :].tolist() == reply.ids.tolist()
    for prompt, group in zip(prompts, generate(policy, case.processor, prompts, 4, keys=KEYS[:3], max_new_tokens=12), strict=True):
        for reply in group:
            batch = collate([prompt.extended(reply.ids)], case.processor.pad, case.processor.store)
            start = batch.loss_rows >= len(prompt) - 1
            with torch.no_grad():
                logp = policy(batch, lambda x, head, b=batch: linear_logprob(x, head, b.targets)[0])
            np.testing.assert_allclose(reply.logprobs, logp[start].numpy(), atol=2e-5)


@pytest.mark.parametrize("how", ["adapters", "bfloat16", "NF4"])
def test_the_sampler_draws_what_the_trainer_sees_with_other_weights(case, prompts, how):
    adapters = LoRAConfig(rank=2, tower=True, merger=True)
    kinds = {"adapters": {"lora": adapters}, "bfloat16": {"dtype": "bfloat16"}, "NF4": {"lora": adapters, "quantize": "nf4"}}
    policy = load_policy(ModelConfig(path=str(case.model), **kinds[how]), CPU, 0, packed=True)
    with torch.no_grad():
        for name, p in policy.trained().items():
            if ".lora_B." in name:
                p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
    groups = generate(policy, case.processor, prompts, 2, keys=KEYS[:3], max_new_tokens=6)
    whole = [
        replace(prompt, trained=np.zeros(len(prompt), bool)).extended(reply.ids)
        for prompt, group in zip(prompts, groups, strict=True)
        for reply in group
    ]
    seen = log_probs(policy.eval(), case.processor, whole, GRPORecipe())
    for reply, logp in zip([r for group in groups for r in group], seen, strict=True):
        np.testing.assert_allclose(reply.logprobs, logp, atol=0.1 if how == "bfloat16" else 2e-5)


FROZEN = {
    "none": (),
    "tower": ("model.visual",),
    "first layer and blocks": ("model.visual.patch_embed", "model.visual.blocks.0", "model.language_model.layers.0"),
    "all but mergers": ("model.visual.patch_embed", "model.visual.pos_embed", "model.visual.blocks", "model.language_model", "lm_head"),
}


@pytest.mark.parametrize("name", FROZEN)
def test_the_formulas_give_the_flops_of_a_packed_step(case, name):
    samples = [replace(s, old=None, ref=None) for s in samples_of(case.processor, [(2, 3), (1, 3)])]
    policy = load_policy(ModelConfig(path=str(case.model)), CPU, 0, packed=True)
    for n, p in policy.base.named_parameters():
        p.requires_grad_(not n.startswith(FROZEN[name]) if FROZEN[name] else True)
    recipe = GRPORecipe(prompts=2, minibatch=2, loss=GRPOSpec(beta=0.0))
    with Count(policy.base) as count:
        accumulate(policy, case.processor, samples, recipe)
    needed = minimum(policy.base, packed_work(samples, case.processor.image_token), backward=True)
    assert sum(count.flops.values()) == sum(needed.values()) and needed["vision_forward"] == count.flops["vision_forward"] > 0


def test_the_plan_knows_its_shapes(case):
    """Parameters are those that are loaded; what a training pass keeps, of the language model and of the tower, is what autograd saves."""
    model = ModelConfig(path=str(case.model))
    shapes = shapes_of(config_of(model.path), model)
    policy = load_policy(model, CPU, 0, packed=True)
    assert shapes.numel == sum(p.numel() for p in policy.parameters())
    assert shapes.levels == case.family.levels(case.theirs.config.vision_config)
    config = shapes.config
    told, bound = traced(config, ModelConfig(), packed=True, low=False, sharded=False), roughly(config)
    kept = told.language.kept(700, config.text_config.num_hidden_layers)
    assert kept == pytest.approx(saved_bytes(config, ModelConfig(), 700), rel=0.03)
    arguments = vision_arguments([(1, 24, 32)], config.vision_config)
    vision = config.vision_config
    with Live([*policy.parameters(), *policy.buffers()]) as live:
        patches = torch.randn(arguments.patches, 3 * vision.temporal_patch_size * vision.patch_size**2)
        out = encode_images(policy.base.model.visual, patches, arguments)
    assert out.requires_grad
    assert told.tower.kept(arguments.patches, vision.depth) == pytest.approx(live.now, rel=0.05)
    assert told.tower.kept(4096, vision.depth) <= bound.tower.kept(4096, vision.depth) and told.looking(4096) <= bound.looking(4096)


@pytest.mark.parametrize("case", ["qwen3_vl"], indirect=True)
def test_pictures_cut_for_another_family_are_refused(case, tmp_path):
    """Before the model is loaded, and by whoever hands patches to a tower."""
    shutil.copytree(case.model, tmp_path / "mixed")
    Processor.load(str(case.model)).image_processor.__class__().save_pretrained(tmp_path / "mixed")
    recipe = SFTRecipe(model=ModelConfig(path=str(tmp_path / "mixed")))
    told = problems_of(recipe, Processor.encode, lambda *_: (), tmp_path, ALONE)
    (problem,) = (line for line in told if line.startswith("model.path"))
    assert "image processor cuts for (14, 2, 2), its vision tower takes (16, 2, 2)" in problem and "preprocessor_config.json" in problem
    mixed = Processor.load(str(tmp_path / "mixed"))
    with pytest.raises(ValueError, match="cuts for"):
        run(case, mixed, samples_of(mixed, [(1, 1)]), True)


@pytest.mark.parametrize("case", ["qwen2_vl"], indirect=True)
def test_a_chat_template_may_be_where_processors_keep_it(case, prompts, tmp_path, example):
    shutil.copytree(case.model, tmp_path / "old")
    template = (tmp_path / "old" / "chat_template.jinja").read_text()
    (tmp_path / "old" / "chat_template.jinja").unlink()
    (tmp_path / "old" / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    found = Processor.load(str(tmp_path / "old")).encode_prompt(example("no image", seed=2))
    assert found.ids.tolist() == prompts[1].ids.tolist()


OTHERS = ["qwen3_vl_moe", "qwen3_5", "qwen2_5_omni", "llava_onevision", "qwen2", None]


@pytest.mark.parametrize("kind", OTHERS)
def test_other_families_are_refused_in_a_line_before_anything_is_read(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({} if kind is None else {"model_type": kind}))
    names = "Qwen2-VL, Qwen2.5-VL, Qwen3-VL (model_type qwen2_vl, qwen2_5_vl, qwen3_vl)"
    said = f"model.path: {tmp_path} has model_type {kind}; trained here are {names}"
    assert check_checkpoint(str(tmp_path)) == [said]
    for way in (loaded, opened, benched, lambda folder: config_of(str(folder))):
        with pytest.raises(ValueError) as error:
            way(tmp_path)
        assert str(error.value) == said


def loaded(folder):
    return load_policy(ModelConfig(path=str(folder)), CPU, 0)


def opened(folder):
    return open_checkpoint(folder, ALONE)


def benched(folder):
    with contextlib.ExitStack() as stack:
        open_model(ModelConfig(path=str(folder)), RolloutConfig(), ALONE, stack, max_prompt=64, longest_reply=8)


def test_configurations_as_the_hub_has_them_are_read(tmp_path):
    """Qwen2-VL's is flat, and older ones name a tower after the whole model and tell of M-RoPE as rope_scaling."""
    flat = {"hidden_size": 1536, "num_attention_heads": 12, "num_key_value_heads": 2, "num_hidden_layers": 28, "intermediate_size": 8960}
    flat |= {"model_type": "qwen2_vl", "vocab_size": 151936, "tie_word_embeddings": True, "rope_theta": 1e6}
    flat |= {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    flat["vision_config"] = {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "hidden_size": 1536}
    (tmp_path / "config.json").write_text(json.dumps(flat))
    found, published = config_of(str(tmp_path)), config_of("", "qwen2-vl-2b")
    assert found.text_config.rope_parameters == published.text_config.rope_parameters | {"type": "mrope"}
    assert shapes_of(found, ModelConfig()).weights == shapes_of(published, ModelConfig()).weights
    published = config_of("", "qwen3-vl-4b")
    text, vision = published.text_config.to_dict(), published.vision_config.to_dict()
    text |= {"rope_theta": 5e6, "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}}
    del text["rope_parameters"]
    about = {
        "model_type": "qwen3_vl",
        "text_config": text,
        "vision_config": vision | {"model_type": "qwen3_vl"},
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(about))
    found = config_of(str(tmp_path))
    assert found.text_config.rope_parameters == published.text_config.rope_parameters
    assert shapes_of(found, ModelConfig()).weights == shapes_of(published, ModelConfig()).weights


def test_published_sizes_have_their_parameters():
    """Those of the checkpoints on the hub."""
    counted = {"qwen2-vl-2b": 2208985600, "qwen2-vl-7b": 8291375616, "qwen3-vl-2b": 2127532032, "qwen3-vl-4b": 4437815808}
    counted |= {"qwen3-vl-8b": 8767123696}
    found = {name: shapes_of(config_of("", name), ModelConfig()).numel for name in counted}
    assert found == counted
    assert config_of("Qwen/Qwen3-VL-8B-Thinking").model_type == "qwen3_vl"

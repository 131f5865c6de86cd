"""Loading: what from_pretrained would have loaded, without a second copy; and checkpoints that do not fit are told, not guessed at."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from actial_fast.model import weights
from actial_fast.model.families.known import FAMILIES
from actial_fast.model.policy import load_policy, load_reference
from actial_fast.model.tiny import TinyConfig, create
from actial_fast.model.weights import check_checkpoint, module_name, share
from actial_fast.settings.model import LoRAConfig, ModelConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model whose tower has blocks."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    create(
        folder,
        ["a question?", "an answer"],
        TinyConfig(hidden=32, vision_hidden=32, layers=2, vision_depth=2, heads=4, image_size=28),
        seed=3,
    )
    return folder


@pytest.fixture
def broken(model, tmp_path):
    """A copy, with a function that changes its weights, and one that changes its config."""

    class Broken:
        path = tmp_path / "broken"

        def weights(self, change):
            tensors = load_file(self.path / "model.safetensors")
            change(tensors)
            save_file(tensors, self.path / "model.safetensors", {"format": "pt"})

        def config(self, **changes):
            about = json.loads((self.path / "config.json").read_text())
            (self.path / "config.json").write_text(json.dumps(about | changes))

    shutil.copytree(model, Broken.path)
    return Broken()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loads_what_from_pretrained_loads(model, dtype):
    ours = load_policy(ModelConfig(path=str(model), dtype=dtype), CPU, 0).base
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(model, dtype=getattr(torch, dtype))
    for kind in ("named_parameters", "named_buffers"):
        a, b = dict(getattr(ours, kind)()), dict(getattr(theirs, kind)())
        assert a.keys() == b.keys() and len(a) >= 4
        for name in a:
            assert torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype and a[name].device == CPU, name
    assert all(p.requires_grad for p in ours.parameters())
    assert ours.config.to_dict() == theirs.config.to_dict() and ours.generation_config == theirs.generation_config
    ids = torch.arange(9)[None]
    assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)


def test_frozen_parts_and_the_reference_have_their_dtype(model):
    config = ModelConfig(path=str(model), freeze=("model.visual",), frozen_dtype="bfloat16")
    policy = load_policy(config, CPU, 0)
    for name, parameter in policy.named_parameters():
        frozen = name.startswith("model.model.visual")
        assert parameter.dtype == (torch.bfloat16 if frozen else torch.float32) and parameter.requires_grad != frozen
    reference = load_reference(config, CPU)
    assert {p.dtype for p in reference.parameters()} == {torch.bfloat16} and not any(p.requires_grad for p in reference.parameters())
    assert not reference.training and policy.training


def test_adapters_are_drawn_by_seed_around_untouched_weights(model):
    config = ModelConfig(path=str(model), lora=LoRAConfig(rank=4), frozen_dtype="bfloat16")
    first, again, other = (dict(load_policy(config, CPU, seed).named_parameters()) for seed in (1, 1, 2))
    down = [name for name in first if ".lora_A." in name]
    assert len(down) == 2 * 7 and all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in down)
    assert len({first[name].flatten()[0].item() for name in down}) == len(down), "each drawn for itself"
    for name in down:
        bound = first[name].shape[1] ** -0.5  # PEFT's: uniform within 1 / sqrt(fan in)
        assert 0.8 * bound < first[name].abs().max() <= bound and first[name].dtype == torch.float32
        assert not first[name.replace("lora_A", "lora_B")].any()
    theirs = dict(Qwen2_5_VLForConditionalGeneration.from_pretrained(model, dtype=torch.bfloat16).named_parameters())
    for name, parameter in first.items():
        if ".lora_" not in name:
            assert torch.equal(parameter, theirs[weights.base_name(name)]) and not parameter.requires_grad


def test_weights_in_several_files_are_found_by_their_index(model, tmp_path):
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(model)
    theirs.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3 and check_checkpoint(str(tmp_path)) == []
    ours = dict(load_policy(ModelConfig(path=str(tmp_path)), CPU, 0).base.named_parameters())
    assert all(torch.equal(ours[name], value) for name, value in theirs.named_parameters())
    next(tmp_path.glob("model-00002*")).unlink()
    (problem,) = check_checkpoint(str(tmp_path))
    assert "has no model-00002-of-" in problem


def test_names_are_those_of_transformers(model, tmp_path):
    """Both ways: what it writes for a name of its model, and where it puts names of files of either age."""
    theirs, file_name = Qwen2_5_VLForConditionalGeneration.from_pretrained(model), FAMILIES["qwen2_5_vl"].file_name
    assert {file_name(name) for name, _ in theirs.named_parameters()} == load_file(model / "model.safetensors").keys()
    for name, _ in theirs.named_parameters():
        assert module_name(file_name(name)) == name == module_name(name)
    shutil.copytree(model, tmp_path / "new")
    new = {module_name(name): value for name, value in load_file(model / "model.safetensors").items()}
    save_file(new, tmp_path / "new" / "model.safetensors", {"format": "pt"})
    assert check_checkpoint(str(tmp_path / "new")) == []
    ours = load_policy(ModelConfig(path=str(tmp_path / "new")), CPU, 0).base
    assert all(torch.equal(ours.get_parameter(name), value) for name, value in theirs.named_parameters())


def test_rows_are_shared_as_fsdp_shares_them():
    for rows in range(12):
        for ranks in (1, 2, 3, 5, 8):
            chunks = torch.arange(rows).chunk(ranks)
            for rank in range(ranks):
                start, stop = share(rows, rank, ranks)
                assert torch.equal(torch.arange(start, stop), chunks[rank] if rank < len(chunks) else torch.arange(0)), (rows, ranks, rank)


# ---- checkpoints that do not fit


def test_a_good_checkpoint_has_no_problem(model):
    assert check_checkpoint(str(model)) == []


def test_another_family_is_refused_before_anything_else(broken):
    broken.config(model_type="qwen3_vl_moe")
    (broken.path / "model.safetensors").unlink()
    known = "Qwen2-VL, Qwen2.5-VL, Qwen3-VL (model_type qwen2_vl, qwen2_5_vl, qwen3_vl)"
    expected = f"model.path: {broken.path} has model_type qwen3_vl_moe; trained here are {known}"
    assert check_checkpoint(str(broken.path)) == [expected]
    with pytest.raises(ValueError) as error:
        load_policy(ModelConfig(path=str(broken.path)), CPU, 0)
    assert str(error.value) == expected


def drop(*parts):
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if any(part in name for part in parts)]


def put(name, *shape):
    return lambda tensors: tensors.update({name: torch.ones(shape)})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (drop("visual.blocks.1.mlp.up_proj.weight"), "lacks model.visual.blocks.1.mlp.up_proj.weight"),
        (drop("visual.blocks"), r"lacks model.visual.blocks.0.attn.proj.bias, .*\(24 in all\)"),
        (
            put("model.layers.0.self_attn.q_norm.weight", 8),
            "has what the model does not have: model.language_model.layers.0.self_attn.q_norm",
        ),
        (put("lm_head.weight", 7, 32), r"another shape .*: lm_head.weight \(7, 32\) where the model has \(320, 32\)"),
    ],
    ids=["one missing", "many missing", "unexpected", "shape"],
)
def test_weights_that_do_not_fit_are_told_and_never_guessed(change, problem, broken, monkeypatch):
    broken.weights(change)
    with monkeypatch.context() as patch:
        patch.setattr(weights.Stored, "rows", lambda *_: pytest.fail("headers alone"))
        (found,) = check_checkpoint(str(broken.path))
    with pytest.raises(ValueError, match=problem) as error:
        load_policy(ModelConfig(path=str(broken.path)), CPU, 0)
    assert str(error.value) == found and found.count("weight") + found.count("bias") <= 6


def test_old_frequencies_in_a_file_do_no_harm(broken):
    broken.weights(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert check_checkpoint(str(broken.path)) == []


def test_broken_files_are_told(broken):
    data = (broken.path / "model.safetensors").read_bytes()
    (broken.path / "model.safetensors").write_bytes(data[:-100])
    (problem,) = check_checkpoint(str(broken.path))
    assert problem.startswith("model.path: ") and "copy or download it again" in problem
    (broken.path / "model.safetensors").rename(broken.path / "pytorch_model.bin")
    (problem,) = check_checkpoint(str(broken.path))
    assert "has no model.safetensors, nor model.safetensors.index.json; weights in another format are not read" in problem
    (broken.path / "config.json").write_text("{")
    (problem,) = check_checkpoint(str(broken.path))
    assert "is no checkpoint, its config.json cannot be read" in problem


@pytest.mark.parametrize("path", ["", "nowhere", "./nowhere/at-all", "/nowhere/at-all"])
def test_paths_that_lead_nowhere(path):
    (problem,) = check_checkpoint(path)
    assert problem.startswith("model.path: ") and ("neither a folder nor a hub name" in problem or "is needed" in problem)
    with pytest.raises(ValueError, match=r"model.path: "):
        load_policy(replace(ModelConfig(), path=path), CPU, 0)

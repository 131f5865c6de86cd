"""Packed batches through unmodified transformers models: equal to one sample at a time, and to sdpa where nothing is packed."""

import copy
import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForImageTextToText,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen3VLConfig,
)
from transformers.utils.generic import is_flash_attention_requested

from actial_fast.model.attention import IMPLEMENTATION, is_packed, use_packed_attention
from actial_fast.model.policy import Policy
from actial_fast.packing.batch import Sequence, collate, mrope_positions
from actial_fast.packing.images import ImageSettings, ImageStore
from tests.attention_case import DEVICE, Packed, cpu, pack, relative

VISION = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 14, "initializer_range": 0.15}
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.15,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
TOKENS = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
MODELS = {
    "Qwen2.5-VL": lambda: Qwen2_5_VLConfig(
        text_config=TEXT, vision_config={**VISION, "out_hidden_size": 32, "fullatt_block_indexes": [1]}, **TOKENS
    ),
    "Qwen2-VL": lambda: Qwen2VLConfig(
        text_config=TEXT, vision_config={**VISION, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}, **TOKENS
    ),
    "Qwen3-VL": lambda: Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 8},
        vision_config={**VISION, "out_hidden_size": 32, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64},
        **TOKENS,
    ),
}
GRIDS = [(1, 18, 10), (1, 4, 6)]  # windows of 4 x 4 merged tokens: 9 x 5 leaves borders of all kinds, 2 x 3 is less than one


def build(name: str):
    """A tiny model with random weights, larger than usual so that attention is not flat."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(MODELS[name](), attn_implementation="sdpa").to(DEVICE)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def patches(model, grids, seed=0):
    vision = model.config.vision_config
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    return torch.randn(sum(t * h * w for t, h, w in grids), width, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def prompt(seed: int, text: int, grids=()) -> Sequence:
    """Text, the images between their marks, and text again."""
    rng = np.random.default_rng(seed)
    images = [[62, *[60] * (t * h * w // 4), 63] for t, h, w in grids]
    ids = np.array([*rng.integers(0, 60, text // 2), *itertools.chain(*images), *rng.integers(0, 60, text - text // 2)])
    return Sequence(ids, np.ones(len(ids), bool), mrope_positions(ids, grids, 60, 2), grids=tuple(grids))


@dataclass(frozen=True)
class Data:
    """Prompts with their replies' ids, in the order of a packed batch; `packed` and the tensors of its rows."""

    groups: tuple[tuple[Sequence, tuple[np.ndarray, ...]], ...]

    @property
    def packed(self) -> Packed:
        return pack([(len(prefix), [len(reply) for reply in replies]) for prefix, replies in self.groups])

    def samples(self) -> list[Sequence]:
        """One sequence a reply, those without replies last, as `Packed.spans` has them."""
        shared = [prefix.extended(reply) for prefix, replies in self.groups for reply in replies]
        return shared + [prefix for prefix, replies in self.groups if not replies]

    def rows(self) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, int, int]]]:
        """ids (1, L), positions (3, 1, L), and the grids of the images in the order of the rows."""
        shared = [group for group in self.groups if group[1]]
        plain = [prefix for prefix, replies in self.groups if not replies]
        whole = [prefix for prefix, _ in shared] + plain
        tails = [(prefix.extended(reply), len(prefix)) for prefix, replies in shared for reply in replies]
        parts = [(p.ids, p.positions) for p, _ in shared] + [(s.ids[n:], s.positions[:, n:]) for s, n in tails]
        parts += [(p.ids, p.positions) for p in plain]
        ids = np.concatenate([ids for ids, _ in parts])
        positions = np.concatenate([positions for _, positions in parts], axis=1)
        return torch.tensor(ids)[None].to(DEVICE), torch.tensor(positions)[:, None].to(DEVICE), [g for p in whole for g in p.grids]


def data() -> Data:
    rng = np.random.default_rng(9)
    replies = tuple(tuple(rng.integers(0, 60, n) for n in lengths) for lengths in ([5, 1, 12], [], [4, 4], []))
    prompts = prompt(1, 9, GRIDS[:1]), prompt(2, 6), prompt(3, 5, GRIDS[1:]), prompt(4, 8, GRIDS[1:])
    return Data(tuple(zip(prompts, replies, strict=True)))


def packed_hidden(model, given: Data):
    """Hidden states (L, H) of the packed rows."""
    ids, positions, grids = given.rows()
    inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": None, "use_cache": False, "packed": given.packed}
    images = {"pixel_values": torch.cat([patches(model, [g]) for g in grids]), "image_grid_thw": torch.tensor(grids).to(DEVICE)}
    return model.model(**inputs, **images).last_hidden_state[0]


def separate_hidden(model, given: Data):
    """The same rows from one forward pass a sample, one tensor a sample: its own rows and, before them, the last row of its prompt."""
    out = []
    for sample, (prefix, own) in zip(given.samples(), given.packed.spans, strict=True):
        inputs = {"input_ids": torch.tensor(sample.ids)[None].to(DEVICE), "use_cache": False}
        inputs["position_ids"] = torch.tensor(sample.positions)[:, None].to(DEVICE)
        if sample.grids:
            inputs["pixel_values"] = torch.cat([patches(model, [g]) for g in sample.grids])
            inputs["image_grid_thw"] = torch.tensor(sample.grids).to(DEVICE)
        out.append(model.model(**inputs).last_hidden_state[0, len(sample.ids) - len(own) - bool(prefix) :])
    return out


def split_packed(hidden, given: Data):
    """The packed rows as `separate_hidden` has them: the row that predicts a reply's first token is its prompt's last."""
    return [
        torch.cat([hidden[prefix.stop - 1 : prefix.stop], hidden[own.start : own.stop]]) if prefix else hidden[own.start : own.stop]
        for prefix, own in given.packed.spans
    ]


def backward(model, rows):
    """Gradients of every parameter of a loss that weighs every number of the rows differently."""
    model.zero_grad()
    make = torch.Generator().manual_seed(5)
    sum((x * torch.randn(x.shape, generator=make).to(x.device)).sum() for x in rows).backward()
    return {name: p.grad.clone() for name, p in model.model.named_parameters() if p.grad is not None}


@cpu
@pytest.mark.parametrize("name", MODELS)
def test_packed_is_one_sample_at_a_time(name):
    model, given = build(name), data()
    expected = separate_hidden(model, given)
    expected_grads = backward(model, expected)
    use_packed_attention(model)
    for mode in ("eval", "train", "checkpointing"):
        model.train(mode != "eval")
        if mode == "checkpointing":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        hidden = split_packed(packed_hidden(model, given), given)
        assert max(relative(a, b) for a, b in zip(hidden, expected, strict=True)) < 1e-5
        grads = backward(model, hidden)
        assert grads.keys() == expected_grads.keys()
        wrong = {key: relative(grads[key], expected_grads[key]) for key in grads if expected_grads[key].norm() > 1e-4}
        assert len(wrong) > 0.8 * len(grads) and max(wrong.values()) < 1e-5, sorted(wrong.items(), key=lambda x: -x[1])[:3]


@cpu
def test_samples_never_see_each_other():
    model, given = build("Qwen2.5-VL"), data()
    use_packed_attention(model)
    with torch.no_grad():
        before = split_packed(packed_hidden(model, given), given)
        (first, replies), *rest = given.groups
        changed = Data(((first, (replies[0], replies[1], (replies[2] + 7) % 60)), *rest))
        after = split_packed(packed_hidden(model, changed), changed)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [i != 2 for i in range(len(before))]


class CallCounter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append(str(function))
        return function(*args, **(kwargs or {}))


@cpu
@pytest.mark.parametrize("name", MODELS)
def test_the_vision_tower_is_unchanged_and_has_no_loop_over_windows(name):
    model = build(name)
    pixels, grids = patches(model, GRIDS), torch.tensor(GRIDS)

    def features():
        out = model.model.visual(pixels, grid_thw=grids).pooler_output
        return [out.detach(), *backward(model, [out]).values()]

    expected = features()
    use_packed_attention(model)
    with CallCounter() as counter:
        ours = features()
    assert max(relative(a, b) for a, b in zip(ours, expected, strict=True) if b.norm() > 1e-4) < 1e-6
    forward = [call for call in counter.calls if "flash_attention_for_cpu.default" in call]
    # window lengths 64, 16 and 4 and, of the small image, 24; the images themselves are two lengths
    assert len(forward) == (4 + 2 + 4 if name == "Qwen2.5-VL" else 3 * 2)


@cpu
@pytest.mark.parametrize("name", MODELS)
def test_without_a_packed_batch_the_model_does_what_sdpa_does(name, tmp_path):
    model = build(name)
    vision, rng = model.config.vision_config, np.random.default_rng(0)
    size = vision.patch_size
    settings = ImageSettings(size, 2, vision.temporal_patch_size, 1, 10**9, 3, mean=(0.5,) * 3, std=(0.3,) * 3)
    store = ImageStore(settings, tmp_path)
    prompts = [prompt(1, 9, GRIDS[1:]), prompt(2, 6), prompt(3, 7)]
    keys = [store.put(rng.integers(0, 256, (h * size, w * size, 3), dtype=np.uint8)) for _, h, w in GRIDS[1:]]
    prompts[0] = replace(prompts[0], images=tuple(keys))
    policy = Policy(model, torch.float32).eval()
    batch = collate(prompts, 0, store, left=True)

    @torch.no_grad()
    def logits():
        """Of a padded batch, and of each row's next token behind the cache."""
        inputs = {**batch.model_inputs(), "use_cache": True}
        whole, cache = policy(inputs, lambda out, head: (out.last_hidden_state @ head.T, out.past_key_values))
        following = {
            "input_ids": whole[:, -1].argmax(-1, keepdim=True),
            "attention_mask": torch.cat([batch.attention_mask, torch.ones(3, 1, dtype=torch.int64)], 1),
            "position_ids": (batch.position_ids.amax((0, 2)) + 1)[None, :, None].expand(3, -1, -1),
            "past_key_values": cache,
            "use_cache": True,
        }
        return whole[batch.attention_mask == 1], policy(following, lambda out, head: out.last_hidden_state @ head.T)

    expected = logits()
    assert all(x.isfinite().all() for x in expected)
    restore = use_packed_attention(model)
    assert all(map(torch.equal, logits(), expected))
    restore()
    assert all(map(torch.equal, logits(), expected))


@cpu
def test_autocast_casts_as_sdpa_does():
    """Rotary embeddings leave q and k in float32 where the weights are, and v in bfloat16."""
    model, given = build("Qwen2.5-VL"), data()
    exact = separate_hidden(model, given)
    with torch.autocast("cpu", torch.bfloat16):
        low = [relative(a, b) for a, b in zip(separate_hidden(model, given), exact, strict=True)]
        use_packed_attention(model)
        hidden = split_packed(packed_hidden(model, given), given)
    assert all(relative(x, y) <= 2 * error for x, y, error in zip(hidden, exact, low, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_every_tower_is_set_and_put_back_and_no_config_of_the_caller_is(name):
    model = build(name)
    callers = [model.config, model.config.text_config, model.config.vision_config]
    towers = [model.model.visual, model.model.language_model]
    assert not is_packed(model)
    restore = use_packed_attention(model)
    assert is_packed(model)
    for tower in towers:
        configs = {id(x.config): x.config for x in tower.modules() if hasattr(x, "config")}
        assert len(configs) == 1, "the layers read the tower's"
        # the private name behind the property that every layer reads, which is the one place that asks no Hub
        assert tower.config.__dict__["_attn_implementation_internal"] == tower.config._attn_implementation == IMPLEMENTATION
        assert is_flash_attention_requested(tower.config)
    assert {config._attn_implementation for config in callers} == {"sdpa"}
    assert "actial" not in model.config.to_json_string()
    restore()
    assert not is_packed(model)
    assert [tower.config for tower in towers] == [model.config.vision_config, model.config.text_config]


@pytest.mark.parametrize("name", MODELS)
def test_models_are_made_from_the_config_of_one_that_is_packed(name):
    model = build(name)
    use_packed_attention(model)
    for config in (model.config, copy.deepcopy(model.config)):
        again = type(model)(config).to(DEVICE)
        assert not is_packed(again)
        again.load_state_dict(model.state_dict())
        ids = torch.tensor([[1, 2, 3]], device=DEVICE)
        assert relative(again(input_ids=ids).logits, model(input_ids=ids).logits) < 1e-5
    assert is_packed(copy.deepcopy(model)) and is_packed(model)
    model.set_attn_implementation("eager")
    assert not is_packed(model) and model.config.text_config._attn_implementation == "eager"


def test_models_it_cannot_serve_are_refused():
    with pytest.raises(ValueError, match="no attention that transformers lets others replace"):
        use_packed_attention(torch.nn.Linear(2, 2))
    config = MODELS["Qwen2.5-VL"]()
    sliding = {**TEXT, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    sliding = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=sliding, vision_config=config.vision_config.to_dict(), **TOKENS)
    )
    with pytest.raises(ValueError, match="no sliding window"):
        use_packed_attention(sliding)
    model, given = build("Qwen2.5-VL"), data()
    use_packed_attention(model)
    ids, positions, _ = given.rows()
    mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool, device=DEVICE)
    with pytest.raises(ValueError, match="attention_mask=None and use_cache=False"):
        model.model(input_ids=ids, position_ids=positions, attention_mask={"full_attention": mask}, packed=given.packed)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_packed_models_in_bf16_on_cuda(name):
    model, given = build(name), data()
    expected = separate_hidden(model, given)  # float32, sdpa
    model.bfloat16()
    low = [relative(a, b) for a, b in zip(separate_hidden(model, given), expected, strict=True)]
    use_packed_attention(model)
    ours = [relative(a, b) for a, b in zip(split_packed(packed_hidden(model, given), given), expected, strict=True)]
    assert all(mine <= 2 * theirs + 1e-2 for mine, theirs in zip(ours, low, strict=True))

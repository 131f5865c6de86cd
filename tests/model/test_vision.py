"""The tower's precomputed arguments: equal to transformers' own, the same numbers with and without them, and no host sync."""

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3_5Config, Qwen3VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from actial_fast.model.attention import IMPLEMENTATION, use_packed_attention
from actial_fast.model.families.known import family_of_tower
from actial_fast.model.vision import encode_images, vision_arguments
from tests.no_sync import HostSync, fake_cuda, put

SIZES = {"depth": 3, "num_heads": 2, "patch_size": 14, "initializer_range": 0.15}
TOWERS = {
    "Qwen2.5-VL": lambda: Qwen2_5_VisionTransformerPretrainedModel(
        Qwen2_5_VLConfig(
            vision_config={**SIZES, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 24, "fullatt_block_indexes": [1]}
        ).vision_config
    ),
    "Qwen2-VL": lambda: Qwen2VisionTransformerPretrainedModel(
        Qwen2VLConfig(vision_config={**SIZES, "embed_dim": 32, "hidden_size": 24, "mlp_ratio": 2}).vision_config
    ),
    "Qwen3-VL": lambda: Qwen3VLVisionModel(
        Qwen3VLConfig(
            vision_config={
                **SIZES,
                "hidden_size": 32,
                "intermediate_size": 48,
                "out_hidden_size": 24,
                "deepstack_visual_indexes": [0, 1],
                "num_position_embeddings": 121,
            }
        ).vision_config
    ),
}
LEVELS = {"Qwen2.5-VL": 1, "Qwen2-VL": 1, "Qwen3-VL": 3}
# (frames, rows, columns); windows of Qwen2.5-VL are 8 x 8 patches
GRIDS = {
    "one patch group": [(1, 2, 2)],
    "one window": [(1, 8, 8)],
    "windows cut at both edges": [(1, 18, 10)],
    "a window and a bit": [(1, 10, 8), (1, 8, 10)],
    "strips": [(1, 2, 40), (1, 40, 2)],
    "frames": [(3, 10, 20)],
    "frames and images": [(1, 4, 6), (2, 16, 16), (1, 2, 2), (4, 6, 10)],
    "the recipe's": [(1, 46, 34)] * 2,
    "ten images": [(1, 2 * (i % 7 + 1), 2 * (11 - i)) for i in range(10)],
}


SOME = {name: GRIDS[name] for name in ("windows cut at both edges", "frames and images", "ten images")}


def build(name: str, attention: str = "sdpa", seed: int = 0):
    """A tiny tower in train mode, on our attention or one of transformers'."""
    torch.manual_seed(seed)
    tower = TOWERS[name]().train()
    tower.set_attn_implementation("sdpa" if attention == IMPLEMENTATION else attention)
    if attention == IMPLEMENTATION:
        use_packed_attention(tower)
    return tower


def draw(grids, seed: int = 1) -> torch.Tensor:
    return torch.randn(sum(t * h * w for t, h, w in grids), 3 * 2 * 14**2, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("name", TOWERS)
def test_arguments_are_what_transformers_computes(name, grids):
    config, grid_thw = TOWERS[name]().config, torch.tensor(grids)
    given = {flash: vision_arguments(grids, config).kwargs(flash=flash) for flash in (False, True)}
    cu = get_vision_cu_seqlens(grid_thw)
    expected = {"grid_thw": grid_thw, "position_ids": get_vision_position_ids(grid_thw, 2), "cu_seqlens": cu}
    expected["max_seqlen"] = cu.diff().max().item()
    if name == "Qwen2.5-VL":
        expected["window_index"], cu = get_vision_window_index(grid_thw, 2, config.window_size, config.patch_size)
        expected |= {"cu_window_seqlens": cu, "max_window_seqlen": cu.diff().max().item()}
    if name == "Qwen3-VL":
        how = {"num_grid_per_side": 11, "align_corners": True, "spatial_merge_size": 2}
        expected["interp_indices"], expected["interp_weights"] = get_vision_interpolation_indices_and_weights(grid_thw, **how)
    for mine in given.values():
        assert mine.keys() == expected.keys()
        for key, theirs in expected.items():
            if isinstance(theirs, torch.Tensor):
                assert mine[key].dtype == theirs.dtype and torch.equal(mine[key], theirs), key
            else:
                assert type(mine[key]) is int and mine[key] == theirs, key


@pytest.mark.parametrize("grids", SOME.values(), ids=SOME)
@pytest.mark.parametrize("attention", [IMPLEMENTATION, "sdpa"])
@pytest.mark.parametrize("name", TOWERS)
def test_features_and_gradients_are_the_same_bits(name, attention, grids):
    def run(encode):
        tower, patches = build(name, attention), draw(grids).requires_grad_()
        features = encode(tower, patches)
        weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(i)) for i, x in enumerate(features)]
        sum((x * w).sum() for x, w in zip(features, weights, strict=True)).backward()
        grads = {n: p.grad for n, p in tower.named_parameters()}
        return features, {**grads, "patches": patches.grad}

    def theirs(tower, patches):
        out = tower(patches, grid_thw=torch.tensor(grids))
        return torch.cat([out.pooler_output, *out.get("deepstack_features", ())], 1).split([t * h * w // 4 for t, h, w in grids])

    def ours(tower, patches):
        arguments = vision_arguments(grids, tower.config)
        return encode_images(tower, patches, arguments).split(arguments.rows)

    (mine, mine_grads), (other, other_grads) = run(ours), run(theirs)
    assert [x.shape for x in mine] == [(t * h * w // 4, LEVELS[name] * 24) for t, h, w in grids]
    assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
    assert mine_grads.keys() == other_grads.keys() and all(torch.equal(mine_grads[n], other_grads[n]) for n in mine_grads)
    assert all(grad.any() for grad in mine_grads.values())


def fake_step(name: str, attention: str, without: str | None = None, *, checkpointing: bool = False, autocast: bool = False) -> None:
    """Forward and backward pass of a tower on a fake GPU with our arguments, or without some of them. HostSync if the host waits."""
    grids = [(1, 10, 8), (2, 4, 6)]
    tower, patches, arguments = build(name, attention), draw(grids), vision_arguments(grids, TOWERS[name]().config)
    if checkpointing:
        tower.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not autocast:
        tower, patches = tower.bfloat16(), patches.bfloat16()
    with fake_cuda() as device:
        put(tower, device)
        patches, arguments = patches.to(device, non_blocking=True), arguments.to(device)
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            if without is None:
                features = encode_images(tower, patches, arguments).split(arguments.rows)
            else:
                kwargs = arguments.kwargs(flash=attention == IMPLEMENTATION)
                kwargs = {"grid_thw": kwargs["grid_thw"]} if without == "all" else kwargs
                kwargs.pop(without, None)
                kwargs["grid_thw"] = kwargs["grid_thw"].to(device, non_blocking=True)
                features = family_of_tower(tower.config).features(tower(patches, **kwargs)).split(arguments.rows)
        sum(x.float().square().sum() for x in features).backward()
        assert [tuple(x.shape) for x in features] == [(rows, LEVELS[name] * 24) for rows in arguments.rows]
        assert all(p.grad is not None and p.grad.is_cuda for p in tower.parameters())


HOW = {
    "bf16": (IMPLEMENTATION, {}),
    "checkpointing": (IMPLEMENTATION, {"checkpointing": True}),
    "autocast": (IMPLEMENTATION, {"autocast": True}),
    "sdpa": ("sdpa", {}),
}


@pytest.mark.parametrize("attention, how", HOW.values(), ids=HOW)
@pytest.mark.parametrize("name", TOWERS)
def test_the_host_never_waits(name, attention, how):
    fake_step(name, attention, **how)


ARGUMENTS = {
    ("Qwen2.5-VL", IMPLEMENTATION): "position_ids cu_seqlens max_seqlen window_index cu_window_seqlens max_window_seqlen all",
    ("Qwen2-VL", IMPLEMENTATION): "position_ids cu_seqlens max_seqlen all",
    ("Qwen3-VL", IMPLEMENTATION): "position_ids cu_seqlens max_seqlen interp_indices interp_weights all",
    ("Qwen2.5-VL", "sdpa"): "position_ids cu_seqlens window_index cu_window_seqlens all",
}


@pytest.mark.parametrize("name, attention, without", [(*case, key) for case, keys in ARGUMENTS.items() for key in keys.split()])
def test_the_host_waits_without_any_one_of_the_arguments(name, attention, without):
    with pytest.raises(HostSync):
        fake_step(name, attention, without)


def test_index_and_bounds_on_the_wrong_side_are_found():
    """The two ways in which arguments that are all there still sync."""
    grids, tower = SOME["ten images"], build("Qwen2.5-VL")
    with fake_cuda() as device:
        put(tower, device)
        patches = draw(grids).to(device, non_blocking=True)
        arguments = vision_arguments(grids, tower.config)
        moved = arguments.to(device)
        with pytest.raises(HostSync, match="index on the host"):
            tower(patches, **{**moved.kwargs(flash=False), "window_index": arguments.window_index})
        with pytest.raises(HostSync, match="reads what the device"):
            tower(patches, **moved.kwargs(flash=True))  # sdpa reads them
        with pytest.raises(ValueError, match="arguments: on cpu, patches on cuda:0"):
            encode_images(tower, patches, arguments)


@pytest.mark.parametrize(
    "grids, message",
    [
        ([], "at least one image"),
        ([(1, 4, 4), (1, 6, 5)], r"grids\[1\]: \(1, 6, 5\) .* multiples of 2"),
        ([(1, 3, 4)], r"grids\[0\]"),
        ([(0, 4, 4)], r"grids\[0\]"),
        ([(1, 4, 0)], r"grids\[0\]"),
        ([(4, 4)], r"grids\[0\]"),
    ],
)
def test_wrong_grids_are_named(grids, message):
    with pytest.raises(ValueError, match=message):
        vision_arguments(grids, Qwen2_5_VLConfig().vision_config)


def test_a_tower_of_another_kind_or_with_tiny_windows_is_named():
    with pytest.raises(ValueError, match=r"qwen3_5_vision .* known are qwen2_vl_vision, qwen2_5_vl_vision, qwen3_vl_vision"):
        vision_arguments([(1, 4, 4)], Qwen3_5Config().vision_config)
    with pytest.raises(ValueError, match="window_size: 27 pixels hold no merged token of 28"):
        vision_arguments([(1, 4, 4)], Qwen2_5_VLConfig(vision_config={"window_size": 27}).vision_config)


def test_patches_that_are_not_those_of_the_grids_are_named():
    tower = build("Qwen2-VL")
    with pytest.raises(ValueError, match=r"16 rows, but the grids .* have 20"):
        encode_images(tower, draw([(1, 4, 4)]), vision_arguments([(1, 4, 4), (1, 2, 2)], tower.config))


def test_arguments_share_nothing_that_a_caller_could_change():
    config = TOWERS["Qwen2.5-VL"]().config
    first = vision_arguments([(1, 4, 4)], config)
    for x in (first.position_ids, first.window_index, first.frames.cu, first.windows.cu):
        x.fill_(-1)
    again = vision_arguments([(1, 4, 4)], config)
    assert again.position_ids.tolist()[:4] == [[0, 0], [0, 1], [1, 0], [1, 1]] and again.window_index.tolist() == [0, 1, 2, 3]


@pytest.mark.gpu
@pytest.mark.parametrize("attention", [IMPLEMENTATION, "sdpa"])
@pytest.mark.parametrize("name", TOWERS)
def test_no_sync_in_bf16_on_cuda(name, attention):
    grids = SOME["ten images"]
    tower = build(name, attention).cuda().bfloat16()
    patches, arguments = draw(grids).cuda().bfloat16(), vision_arguments(grids, tower.config, pin=True)

    def step():
        features = encode_images(tower, patches, arguments.to(patches.device))
        features.float().square().sum().backward()
        return features.detach()

    step()  # chooses algorithms and allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        mine = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(mine, family_of_tower(tower.config).features(tower(patches, grid_thw=torch.tensor(grids).cuda())))

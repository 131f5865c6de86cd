"""What of a recipe verl cannot do, what it does otherwise, and that no key is dropped unsaid."""

import dataclasses
import json
import typing
from pathlib import Path

import pytest

from actial_fast.data.sources.source import SourceConfig
from actial_fast.handover.overrides import overrides
from actial_fast.handover.refusals import Refused, check, told
from actial_fast.settings.config import describe, from_dict
from actial_fast.settings.recipe import GRPORecipe
from tests.handover.exported import recipe_of

REFUSED = [
    ({"optim": {"schedule": "linear"}}, "optim.schedule: its schedules are constant and cosine, not linear"),
    ({"advantages": {"scale": "batch_std"}}, "advantages.scale"),
    ({"advantages": {"baseline": "leave_one_out"}}, "advantages.scale: with baseline leave_one_out"),
    ({"advantages": {"epsilon": 1e-4}}, "advantages.epsilon: it adds 1e-6, not 0.0001"),
    ({"advantages": {"combine": "normalize_then_sum"}}, "advantages.combine"),
    ({"loss": {"objective": "vespo"}}, "loss.objective: it has no vespo"),
    ({"loss": {"objective": "sapo"}}, "loss.aggregation: its sapo"),
    ({"loss": {"ratio": "sequence"}}, "loss.importance: its gspo weighs each token's own gradient"),
    ({"loss": {"objective": "cispo", "ratio": "sequence"}}, "loss.ratio"),
    ({"loss": {"clip_delta": 3.0}}, "loss.clip_delta"),
    ({"loss": {"dual_clip": 3.0, "ratio": "sequence", "importance": "sequence_mask"}}, "loss.dual_clip"),
    ({"loss": {"kl_bias_correction": True}}, "loss.kl_bias_correction"),
    ({"loss": {"top_entropy": 0.2}}, "loss.top_entropy"),
    ({"loss": {"importance_min": 0.5}}, "loss.importance_min"),
    ({"loss": {"importance_max": 0.0}}, "loss.importance_max"),
    ({"rewards": [{"name": "m:f", "call": "group"}]}, "rewards.0.call: m:f is called with all replies to a prompt"),
    ({"rewards": [{"name": "format"}, {"name": "m:f", "on_error": "nan"}]}, "rewards.1.on_error"),
    ({"overlong": {"mask": True}}, "overlong.mask"),
    ({"model": {"freeze": ["model.visual"]}}, r"model.freeze: it trains all of the model or adapters \(model.visual would be trained\)"),
    ({"model": {"path": ""}}, "model.path: needed"),
    ({"model": {"lora": {"rank": 8}, "quantize": "nf4"}}, "model.quantize: its base under adapters is not held in nf4"),
    *(
        ({"model": {"lora": {"rank": 8, name: value}}}, f"model.lora.{name}")
        for name, value in {"dropout": 0.1, "tower": True, "merger": True, "rslora": True, "dora": True, "alpha": 12.5}.items()
    ),
    ({"sampling": {"gate": {"low": 0.2}}}, "sampling.gate"),
    ({"rollout": {"engine": "vllm", "ahead": 1}}, "rollout.ahead"),
    ({"data": {"sources": []}}, "data.sources: there are none"),
    ({"data": {"sources": [{"path": "x", "task": "jigsaw_turns"}]}}, "data.sources.0.task: jigsaw_turns is answered in turns"),
    ({"eval": {"sources": [{"path": "x"}, {"path": "x", "task": "jigsaw_turns"}]}}, "eval.sources.1.task: jigsaw_turns"),
    ({"prompts": 5}, "minibatch: prompts"),
    ({"pack_tokens": 100}, "pack_tokens: a prompt and its reply may have 16009 tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "reason"), REFUSED, ids=[reason.split(":")[0] for _, reason in REFUSED])
def test_what_verl_cannot_do_is_refused_by_name(fields, reason):
    with pytest.raises(Refused, match=f"verl 0.9.1 cannot do this: {reason}") as caught:
        check(recipe_of(Path("x"), **fields))
    assert len(caught.value.problems) == 1


def test_all_reasons_are_told_at_once():
    with pytest.raises(Refused) as caught:
        check(recipe_of(Path("x"), optim={"schedule": "linear"}, overlong={"mask": True}, loss={"top_entropy": 0.5}))
    assert len(caught.value.problems) == 3


BASES = [  # between them every key has something to act on
    {"eval": {"sources": [{"path": "y"}]}, "rewards": [{"name": "accuracy"}]},
    {"optim": {"schedule": "cosine", "warmup_steps": 5, "weight_decay": 0.1}, "model": {"lora": {"rank": 8}}},
    {"loss": {"objective": "sapo", "aggregation": "sequence"}, "packing": "plain", "importance_correction": "off"},
    {"overlong": {"buffer": 3}},
    {"sampling": {"n": 2, "max_new_tokens": 9, "oversample": 1.0}},
    {"loss": {"importance": "token_mask", "importance_min": 0.5, "beta": 0.0}, "model": {"dtype": "bfloat16", "checkpointing": "full"}},
    {"model": {"lora": {"rank": 8}, "quantize": "nf4"}, "sampling": {"n": 4, "max_new_tokens": 9, "gate": {"low": 0.1, "high": 0.9}}},
    {"rollout": {"engine": "vllm"}, "dist": {"fsdp": True}, "rewards": [{"name": "m:f"}], "model": {"checkpointing": "full"}},
    {"loss": {"objective": "vespo"}},
]  # fmt: skip
ROWS = {f"{place}.{key}" for place in ("data.sources.0", "eval.sources.0") for key in SourceConfig.__dataclass_fields__} | {
    "data.max_image_pixels",
    "eval.limit",
}
"""Keys that the rows themselves follow."""
NOTHING = {
    "kind",
    "model.quantize_twice",
    *(f"sampling.gate.{name}" for name in ("reward", "retry", "window")),
    *(f"loss.vespo_{name}_{side}" for name in ("k", "lambda") for side in ("pos", "neg")),
}
"""A key without another value, and those of what is refused by another key's name."""


def said(recipe: GRPORecipe) -> tuple:
    """Everything that is written of a recipe, or why it is refused."""
    try:
        check(recipe)
        refused = []
    except ValueError as error:
        refused = str(error)
    return (
        refused,
        told(recipe),
        overrides(recipe, ["train.parquet"], "val.parquet", (recipe.model.min_pixels, recipe.model.max_pixels)),
        recipe.rewards,
        recipe.eval.strict,
    )


def others(recipe: GRPORecipe, key: str) -> list:
    """Values of a key that are not the recipe's."""
    *path, last = key.split(".")
    owner = recipe
    for name in path:
        owner = owner[int(name)] if isinstance(owner, tuple) else getattr(owner, name)
    value, hint = getattr(owner, last), typing.get_type_hints(type(owner))[last]
    if typing.get_origin(hint) is typing.Literal:
        return [other for other in typing.get_args(hint) if other != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1, value + 0.25, value / 2, 0]
    return {tuple: [[2, 3], [0.5, 0.6], ["q_proj"], [{"path": "other.jsonl"}]], type(None): [5.0], str: ["another"]}[type(value)]


def with_value(recipe: GRPORecipe, key: str, value) -> GRPORecipe | None:
    """The recipe with another value of a key; None where there is no such recipe."""
    *path, last = key.split(".")
    at = raw = json.loads(json.dumps(dataclasses.asdict(recipe)))
    for name in path:
        at = at[int(name)] if isinstance(at, list) else at[name]
    at[last] = value
    try:
        return from_dict(GRPORecipe, raw)
    except ValueError:
        return None


def test_no_key_is_dropped_unsaid():
    """Whatever key of a recipe is changed, something that is written changes, or it is refused, or told that it is left out."""
    silent = {key for key, *_ in describe(recipe_of(Path("x"), **BASES[0]))} - ROWS - NOTHING
    assert len(silent) > 100
    for fields in BASES:
        recipe = recipe_of(Path("x"), **fields)
        before, keys = said(recipe), {key for key, *_ in describe(recipe)}
        for key in sorted(silent & keys):
            changed = (with_value(recipe, key, other) for other in others(recipe, key))
            if any(other is not None and said(other) != before for other in changed):
                silent.remove(key)
    assert not silent, " ".join(sorted(silent))


def test_what_is_told_depends_on_the_recipe():
    usual = told(
        recipe_of(Path("x"), loss={"beta": 0.0}, advantages={"scale": "none"}, importance_correction="on", eval={"max_new_tokens": 9})
    )
    assert len(usual) == 2 and "prompts come in an order of its own" in usual[0]
    much = told(recipe_of(Path("x"), optim={"warmup_steps": 3, "weight_decay": 0.1}, dist={"fsdp": True}, rewards=[{"name": "m:f"}]))
    for name in (
        "optim.warmup_steps",
        "optim.weight_decay",
        "m:f must be importable",
        "rewards.workers",
        "loss.kl",
        "importance_correction",
        "dist.fsdp",
    ):
        assert any(name in line for line in much), name

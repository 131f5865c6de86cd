"""Recipes: what is read, what is refused and how, what the shipped ones say, and that every field is documented."""

import dataclasses
import tempfile
import typing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actial_fast.data.captures.render import RenderConfig
from actial_fast.data.captures.settings import ViewpointConfig
from actial_fast.data.captures.spatial import SpatialConfig
from actial_fast.data.sources.source import SourceConfig
from actial_fast.model.tiny import TinyConfig
from actial_fast.ops.spec import AdvantageSpec, GRPOSpec
from actial_fast.settings.config import config_from, describe, field_docs, from_dict, load_recipe, recipe_class, to_yaml
from actial_fast.settings.idle import idle
from actial_fast.settings.model import ModelConfig
from actial_fast.settings.recipe import EvalConfig, GRPORecipe, SFTRecipe
from actial_fast.settings.running import OptimConfig
from actial_fast.tasks.rewards import RewardConfig

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
SFT_7B, GRPO_7B = (next(path for path in RECIPES if path.name == f"actial-7b-{kind}.yaml") for kind in ("sft", "grpo"))


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


# ---- reading


def test_defaults_are_those_of_the_dataclass(write):
    assert load_recipe(write("kind: sft\n")) == SFTRecipe()
    assert load_recipe(write("kind: grpo\n")) == GRPORecipe()


def test_a_part_given_in_part_keeps_the_rest_of_its_place(write):
    """The defaults of a GRPO stage's optimizer, data and checkpoints are not those of their classes."""
    recipe = load_recipe(write("kind: grpo\noptim: {lr: 1e-5}\ndata: {workers: 1}\nsave: {keep: 3}\n"), ["optim.eps=1e-6"])
    usual = GRPORecipe()
    assert recipe.optim == dataclasses.replace(usual.optim, lr=1e-5, eps=1e-6) and recipe.optim.warmup_steps == 0
    assert recipe.data == dataclasses.replace(usual.data, workers=1) and recipe.save == dataclasses.replace(usual.save, keep=3)


def test_nested_values_lists_and_numbers(write):
    recipe = load_recipe(
        write("kind: grpo\noptim: {lr: 1e-6, betas: [0.9, 1]}\nrewards: [{name: accuracy, weight: 2}]\nmodel: {freeze: [model.visual]}\n")
    )
    assert recipe.optim.lr == 1e-6 and type(recipe.optim.lr) is float
    assert recipe.optim.betas == (0.9, 1.0) and type(recipe.optim.betas[1]) is float
    assert recipe.rewards == (RewardConfig("accuracy", 2.0),) and type(recipe.rewards[0].weight) is float
    assert recipe.model.freeze == ("model.visual",)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-6", 1e-6), ("1E-6", 1e-6), ("-2e3", -2000.0), ("1.5e+2", 150.0), (".5", 0.5), ("5.", 5.0), ("3", 3.0)],
)
def test_floats_as_people_write_them(text, value):
    got = config_from(SourceConfig, ["path=x", f"weight={text}"], {"path": ""}).weight
    assert got == value and type(got) is float


@pytest.mark.parametrize("text", ["off", "no", "yes", "on", "010", "1:30", "2024-01-01", "1.2.3", "0x10", "a=b", "{run}/x"])
def test_words_stay_text(text):
    """YAML 1.1 would read False, 8, 90, a date ... `verify=off` is a value of the viewpoint builder."""
    assert config_from(SFTRecipe, [f"name={text}" if text[0] != "{" else f"name='{text}'"]).name == text


def test_an_empty_override_is_the_empty_text():
    assert config_from(ModelConfig, ["path="], {"path": "x"}).path == ""


@pytest.mark.parametrize("text", ["null", "~"])
def test_none_where_a_field_may_be_none(text):
    assert config_from(ViewpointConfig, [f"examples={text}"], {"examples": 5}).examples is None


def test_overrides_reach_nested_fields_and_list_entries():
    recipe = load_recipe(GRPO_7B, ["data.sources.0.path=mine.parquet", "rewards.1.weight=0.7", "optim.lr=3e-6", "model.freeze=[lm_head]"])
    shipped = load_recipe(GRPO_7B)
    assert recipe.data.sources[0] == dataclasses.replace(shipped.data.sources[0], path="mine.parquet")
    assert [r.weight for r in recipe.rewards] == [0.5, 0.7]
    assert recipe.optim == dataclasses.replace(shipped.optim, lr=3e-6)
    assert recipe.model.freeze == ("lm_head",)
    assert recipe.eval == shipped.eval


def test_overrides_reach_list_entries_that_only_the_defaults_have():
    assert [r.weight for r in config_from(GRPORecipe, ["rewards.0.weight=0.1"]).rewards] == [0.1, 0.5]


def test_an_override_changes_one_place_of_a_yaml_alias(write):
    path = write("kind: quickstart\nsft: {save: &save {every: 7}}\ngrpo: {save: *save}\n")
    recipe = load_recipe(path, ["grpo.save.every=9"])
    assert (recipe.sft.save.every, recipe.grpo.save.every) == (7, 9)


def test_the_last_override_wins():
    assert config_from(OptimConfig, ["lr=1", "lr=2"]).lr == 2.0


# ---- refusing


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.learning_rat=1"], r"^optim\.learning_rat: unknown key\. Valid: .*lr, betas, eps"),
        (["optm.lr=1"], r"^optm: unknown key; did you mean 'optim'\?"),
        (["optim.warmup_step=1"], r"^optim\.warmup_step: unknown key; did you mean 'optim.warmup_steps'\?"),
        (["data.sources.0.pth=x"], r"^data\.sources\.0\.pth: unknown key; did you mean 'data\.sources\.0\.path'\?"),
        (["xyzzy=1"], r"^xyzzy: unknown key\. Valid: "),
        (["lr=1"], r"^override 'lr=1': no such field here; did you mean 'optim\.lr'\?"),
        (["rank=1"], r"^override 'rank=1': no such field here; did you mean 'model\.lora\.rank'\?"),
        (["optim.lr=fast"], r"^optim\.lr: expected float, got 'fast'$"),
        (["optim.lr=true"], r"^optim\.lr: expected float, got True$"),
        (["optim.lr="], r"^optim\.lr: expected float, got ''$"),
        (["steps=1.5"], r"^steps: expected int, got 1\.5$"),
        (["steps=true"], r"^steps: expected int, got True$"),
        (["dist.fsdp=1"], r"^dist\.fsdp: expected bool, got 1$"),
        (["name=7"], r"^name: expected str, got 7; for the text, write"),
        (["loss_weighting=tokens"], r"^loss_weighting: 'tokens' is not one of token, row$"),
        (["optim.betas=[0.9]"], r"^optim\.betas: expected 2 values, got 1$"),
        (["model.freeze=lm_head"], r"^model\.freeze: expected a list, got 'lm_head'$"),
        (["model.freeze=[1]"], r"^model\.freeze\.0: expected str, got 1"),
        (["optim=fast"], r"^optim: expected a mapping of OptimConfig's fields, got 'fast'$"),
        (["data.sources=[{weight: 1}]"], r"^data\.sources\.0\.path: missing; The file"),
        (["optim.lr"], r"^override 'optim\.lr': expected key=value"),
        (["=3"], r"^override '=3': expected key=value"),
        (["model.freeze=[a"], r"^override 'model\.freeze=\[a': the value is not valid YAML"),
        (["data.sources.2.path=x"], r"'2' is not an entry, data\.sources has 2 entries, counted from 0$"),
        (["data.sources.-1.path=x"], r"'-1' is not an entry"),
        (["data.sources.first.path=x"], r"'first' is not an entry"),
        (["model.freeze.0=x"], r"'0' is not an entry, model\.freeze is empty; give the whole list$"),
        (["optim.lr.peak=1"], r"^override 'optim\.lr\.peak=1': optim\.lr holds a value, not fields$"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_rejected_overrides(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(SFT_7B, overrides)


@pytest.mark.parametrize(
    ("cls", "override", "message"),
    [
        (SFTRecipe, "batch_size=0", r"^batch_size: must be at least 1, got 0$"),
        (SFTRecipe, "micro_batch=-2", r"^micro_batch: must be at least 1"),
        (SFTRecipe, "epochs=-1", r"^epochs: must be at least 0"),
        (SFTRecipe, "seed=-1", r"^seed: must be at least 0"),
        (SFTRecipe, "optim.lr=-1e-6", r"^optim\.lr: must be at least 0, got -1e-06$"),
        (SFTRecipe, "optim.warmup_steps=-1", r"^optim\.warmup_steps: must be at least 0"),
        (SFTRecipe, "model.lora.rank=-1", r"^model\.lora\.rank: must be at least 0"),
        (SFTRecipe, "save.keep=0", r"^save\.keep: must be at least 1"),
        (SFTRecipe, "data.workers=-1", r"^data\.workers: must be at least 0"),
        (SFTRecipe, "eval.kv_tokens=-1", r"^eval\.kv_tokens: must be at least 0"),
        (SFTRecipe, "eval.temperature=-1", r"^eval\.temperature: must be at least 0"),
        (GRPORecipe, "minibatch=0", r"^minibatch: must be at least 1, got 0$"),
        (GRPORecipe, "sampling.n=0", r"^sampling\.n: must be at least 2"),
        (GRPORecipe, "sampling.temperature=0", r"^sampling\.temperature: must be above 0"),
        (GRPORecipe, "loss.clip_low=-0.1", r"^loss\.clip_low: must be >= 0, got -0\.1$"),
        (GRPORecipe, "loss.beta=-1", r"^loss\.beta: must be >= 0"),
        (GRPORecipe, "rewards=[]", r"^rewards: at least one is needed"),
    ],
    ids=lambda value: value if isinstance(value, str) and value[0] != "^" else "",
)
def test_values_out_of_range_name_their_field(cls, override, message):
    with pytest.raises(ValueError, match=message):
        config_from(cls, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: dpo\n", r"^kind: 'dpo' is not a recipe kind; expected one of sft, grpo, quickstart$"),
        ("name: x\n", "must be a mapping with a `kind`: sft, grpo or quickstart"),
        ("- 1\n", "must be a mapping with a `kind`"),
        ("", "must be a mapping with a `kind`"),
        ("kind: [sft\n", r"is not valid YAML: .* line 2, column 1"),
        ("kind: sft\nsteps: 1\nsteps: 2\n", "the key 'steps' stands twice .* line 3"),
        ("kind: sft\noptim:\n", r"^optim: expected a mapping of OptimConfig's fields, got None$"),
    ],
)
def test_rejected_files(write, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe(write(text))
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.yaml does not exist"):
        load_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(ValueError, match="cannot be read"):
        load_recipe(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00kind")
    with pytest.raises(ValueError, match="cannot be read"):
        load_recipe(tmp_path / "binary.yaml")


@given(st.text(st.characters(codec="ascii"), min_size=1, max_size=12))
def test_an_unknown_key_is_always_an_error(key):
    known = field_docs(OptimConfig)
    if key in known:
        return
    with pytest.raises(ValueError, match=r"unknown key(\.|; did you mean '\w+'\?) Valid: ") as caught:
        from_dict(OptimConfig, {key: 1})
    assert all(name in str(caught.value) for name in known)


# ---- writing


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_round_trip(path, tmp_path):
    recipe = load_recipe(path)
    (tmp_path / "again.yaml").write_text(to_yaml(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe
    assert recipe != recipe_class(recipe.kind)()


@given(
    text=st.text(max_size=20),
    number=st.floats(min_value=0, allow_nan=False, allow_infinity=False),
    flag=st.booleans(),
    words=st.lists(st.text(max_size=6)),
)
def test_any_value_round_trips(text, number, flag, words):
    recipe = SFTRecipe(
        name=text,
        optim=OptimConfig(lr=number),
        model=ModelConfig(path=text, offload_activations=flag, checkpointing="full", freeze=tuple(words)),
    )
    with tempfile.NamedTemporaryFile("w+", suffix=".yaml") as file:
        file.write(to_yaml(recipe))
        file.flush()
        back = load_recipe(file.name)
    assert back == recipe and type(back.optim.lr) is float


@pytest.mark.parametrize("text", ["", "true", "null", "1", "1e-6", "-.inf", "~", "<<", "a: b", "off", "#x", " x ", "two\nlines", "é"])
def test_a_printed_value_is_an_override_that_gives_it_back(text):
    printed = to_yaml(text)
    assert "\n" not in printed.strip("\n") or "\n" in text
    assert config_from(SFTRecipe, [f"name={printed}"]).name == text


# ---- what a field means


def dataclasses_within(cls: type) -> set[type]:
    found = {cls}
    for hint in typing.get_type_hints(cls).values():
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part):
                found |= dataclasses_within(part)
    return found


DOCUMENTED = set().union(
    *(dataclasses_within(recipe_class(kind)) for kind in ("sft", "grpo", "quickstart")),
    {RenderConfig, ViewpointConfig, SpatialConfig, SourceConfig, RewardConfig, TinyConfig},
)


def test_the_walk_finds_nested_dataclasses():
    assert {SFTRecipe, GRPORecipe, OptimConfig, EvalConfig, SourceConfig, GRPOSpec, AdvantageSpec, RewardConfig, TinyConfig} <= DOCUMENTED


@pytest.mark.parametrize("cls", sorted(DOCUMENTED, key=lambda cls: cls.__name__), ids=lambda cls: cls.__name__)
def test_every_field_has_a_docstring(cls):
    docs = field_docs(cls)
    missing = [f.name for f in dataclasses.fields(cls) if len(docs.get(f.name, "")) < 5]
    assert not missing, f"{cls.__name__}: no docstring below {', '.join(missing)}"
    assert (cls.__doc__ or "").strip() and not cls.__doc__.startswith(f"{cls.__name__}("), f"{cls.__name__} itself has none"


def test_a_missing_docstring_is_seen():
    @dataclass
    class Half:
        """Half documented."""

        told: int = 1
        """What it is."""
        silent: int = 2
        other: list = field(default_factory=list)

    assert field_docs(Half) == {"told": "What it is."}


def test_describe_names_every_leaf_with_its_own_default():
    told = {key: (value, default, doc) for key, value, default, doc in describe(load_recipe(GRPO_7B))}
    assert told["optim.lr"][:2] == (1e-6, 1e-6), "the default of a GRPO recipe, not of AdamW at large"
    assert told["save.every"][1] == 10
    assert told["rewards.1.name"][:2] == ("accuracy", "accuracy")
    assert told["data.sources.0.path"][1] is dataclasses.MISSING
    assert told["steps"] == (150, 150, "Sampling steps.")
    assert all(doc for _, _, doc in told.values())
    assert not any(dataclasses.is_dataclass(value) for value, _, _ in told.values())


# ---- the paper's figures (arXiv 2511.01618), as numbers


def test_sft_7b_has_the_papers_figures():
    recipe = load_recipe(SFT_7B)
    assert recipe.model.path == "Qwen/Qwen2.5-VL-7B-Instruct" and recipe.model.lora.rank == 0
    assert (recipe.epochs, recipe.steps) == (2.0, 0)
    assert (recipe.optim.lr, recipe.optim.warmup_steps) == (5e-6, 50)
    assert recipe.batch_size == 128
    assert [source.weight for source in recipe.data.sources] == [0.9, 0.1]


def test_grpo_7b_has_the_papers_figures():
    recipe = load_recipe(GRPO_7B)
    sft = load_recipe(SFT_7B)
    assert recipe.model.path == f"{sft.run}/{sft.name}/final/model", "stage 2 starts where stage 1 ends"
    assert (recipe.steps, recipe.prompts, recipe.minibatch, recipe.optim.lr) == (150, 1024, 256, 1e-6)
    assert (recipe.sampling.n, recipe.sampling.temperature, recipe.sampling.max_new_tokens) == (16, 1.0, 4096)
    assert recipe.data.max_prompt_tokens == 16000
    assert (recipe.loss.clip_low, recipe.loss.clip_high, recipe.loss.beta) == (0.2, 0.2, 0.01)
    assert recipe.rewards == (RewardConfig("format", 0.5), RewardConfig("accuracy", 0.5, strict=True))
    assert recipe.advantages.scale == "std"
    for source in (*recipe.data.sources, *recipe.eval.sources):
        assert all(tag in source.system for tag in ("<think>", "</think>", "<answer>", "</answer>"))


@pytest.mark.parametrize("text", [".nan", ".inf", "-.inf", "1e999"])
def test_numbers_that_are_none_are_refused_with_their_key(text):
    for key in ("optim.lr", "optim.clip_norm", "rewards.0.weight", "loss.beta", "sampling.temperature"):
        with pytest.raises(ValueError, match=rf"{key}: must be a finite number"):
            config_from(GRPORecipe, [f"{key}={text}"], {})
    with pytest.raises(ValueError, match="lr: must be at least 0"):
        OptimConfig(lr=float("nan"))


@pytest.mark.parametrize("text, value", [("yes", True), ("No", False), ("on", True), ("OFF", False), ("TRUE", True), ("'true'", True)])
def test_switches_as_people_write_them(text, value):
    assert config_from(SFTRecipe, [f"data.together={text}"], {}).data.together is value


@pytest.mark.parametrize(
    "override, problem",
    [
        ("steps=1e3", None),
        ("steps=1_000", None),
        ("steps=1.5", "steps: expected int, got 1.5"),
        ("steps=1,000", "steps: expected int, got '1,000'"),
        ("steps=", "steps: expected int, got ''"),
        ("optim.lr=5%", "optim.lr: expected float, got '5%'"),
        ("optim.lr=null", "optim.lr: expected float, got nothing"),
        ("data.together=1", "data.together: expected bool, got 1"),
        ("model.freeze=lm_head", "model.freeze: expected a list, got 'lm_head'"),
        ("data.sources={path: x}", "data.sources: expected a list"),
        ("name=3", "name: expected str, got 3; for the text, write"),
    ],
)
def test_odd_spellings_are_read_or_refused_with_the_key(override, problem):
    if problem is None:
        assert config_from(SFTRecipe, [override], {}).steps == 1000
        return
    with pytest.raises(ValueError, match=problem):
        config_from(SFTRecipe, [override], {})


def test_home_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = config_from(SFTRecipe, ["run=~/runs/x", "model.path=~/m", "data.image_cache=~/c", "data.sources=[{path: ~/d.jsonl}]"], {})
    found = (recipe.run, recipe.model.path, recipe.data.image_cache, recipe.data.sources[0].path)
    assert found == tuple(str(tmp_path / name) for name in ("runs/x", "m", "c", "d.jsonl"))


def test_keys_without_an_effect_are_told():
    said = list(
        idle(config_from(SFTRecipe, ["epochs=3", "steps=5", "micro_batch=2", "model.lora.alpha=8", "eval.every=5", "stop_steps=3"], {}))
    )
    assert [line.split(" ")[0] for line in said] == ["model.lora.alpha", "eval.every", "epochs", "micro_batch", "stop_steps"]
    assert "epochs = 3.0 has no effect: steps is given" in said
    said = list(
        idle(
            config_from(
                GRPORecipe, ["overlong.penalty=2", "sampling.max_draws=3", "rollout.gpu_memory=0.5", "packing=plain", "pack_tokens=9"], {}
            )
        )
    )
    assert [line.split(" ")[0] for line in said] == ["sampling.max_draws", "rollout.gpu_memory", "overlong.penalty", "pack_tokens"]
    for kind in (SFTRecipe, GRPORecipe):
        assert not list(idle(kind()))
        assert list(idle(config_from(kind, ["optim.lr=0"], {}))) == ["optim.lr = 0 moves no weight: nothing will be learned"]


@pytest.mark.parametrize("name", [SFT_7B, GRPO_7B])
def test_the_7b_recipes_set_nothing_in_vain(name):
    assert not list(idle(load_recipe(name)))

"""Recipes: YAML onto frozen dataclasses, with overrides, errors that name the nearest valid key, and a printout of every field.

A recipe file is one mapping. Its `kind` says which dataclass it fills (sft, grpo, quickstart); each other key is a field, nested
mappings are nested dataclasses. Every field carries a docstring, which `actial recipe show` prints beside its value and default.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from actial_fast.data.stream import SourceConfig
from actial_fast.rewards import RewardConfig
from actial_fast.spec import AdvantageSpec, GRPOSpec


def _at_least(config: Any, low: float, *names: str) -> None:
    for name in names:
        if getattr(config, name) < low:
            raise ValueError(f"{name}: must be at least {low}, got {getattr(config, name)}")


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters through PEFT; rank 0 trains the weights themselves."""

    rank: int = 0
    """Rank of the adapters; 0 = no adapters."""
    alpha: float = 32.0
    """Scale of the adapters: their product is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Dropout on the adapters' input."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the linear layers of the language model that get adapters."""

    def __post_init__(self):
        _at_least(self, 0, "rank", "alpha", "dropout")


@dataclass(frozen=True)
class ModelConfig:
    """Which weights to start from and how they are held."""

    path: str = ""
    """Folder (or hub name) with a Hugging Face checkpoint of a Qwen2.5-VL model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage of the trained weights and of the optimizer's states. Compute is bf16 on CUDA either way."""
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage of weights that are not trained (the base under LoRA, a frozen vision tower, the reference model)."""
    freeze: tuple[str, ...] = ()
    """Parameters whose name starts with one of these are not trained, e.g. model.visual or lm_head."""
    lora: LoRAConfig = LoRAConfig()
    """Low-rank adapters."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention of transformers to use."""
    min_pixels: int = 0
    """Images with fewer pixels are scaled up to this; 0 = as the checkpoint's image processor says."""
    max_pixels: int = 0
    """Images with more pixels are scaled down to this; 0 = as the checkpoint's image processor says."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = 5e-6
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's two averages."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay, applied to matrices only."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up: stay, or fall to `min_lr_ratio` of the peak by the last step."""
    min_lr_ratio: float = 0.0
    """Learning rate at the end of the schedule, as a share of the peak."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 = no clipping."""

    def __post_init__(self):
        _at_least(self, 0, "lr", "eps", "weight_decay", "warmup_steps", "min_lr_ratio", "clip_norm")


@dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation."""

    sources: tuple[SourceConfig, ...] = ()
    """What to evaluate on; empty = no evaluation."""
    every: int = 0
    """Steps between evaluations; 0 = only after the last step."""
    limit: int = 0
    """Rows per evaluation, taken in order; 0 = all."""
    batch_size: int = 64
    """Prompts decoded together on one rank."""
    temperature: float = 0.0
    """0 = greedy; otherwise replies are sampled at this temperature."""
    max_new_tokens: int = 1024
    """Longest reply, in tokens."""

    def __post_init__(self):
        _at_least(self, 0, "every", "limit", "temperature")
        _at_least(self, 1, "batch_size", "max_new_tokens")


@dataclass(frozen=True)
class SaveConfig:
    """Checkpoints and logs."""

    every: int = 100
    """Steps between checkpoints; 0 = only after the last step."""
    keep: int = 2
    """Checkpoints kept; older ones are deleted."""
    tensorboard: bool = True
    """Write TensorBoard scalars into the run folder."""
    wandb: str = ""
    """Weights & Biases project; empty = not used."""

    def __post_init__(self):
        _at_least(self, 0, "every")
        _at_least(self, 1, "keep")


@dataclass(frozen=True)
class DistConfig:
    """How the ranks share the work."""

    fsdp: bool = False
    """Shard weights, gradients and optimizer states over the ranks (FSDP2); otherwise each rank holds a copy."""


@dataclass(frozen=True)
class DataConfig:
    """What is trained on."""

    sources: tuple[SourceConfig, ...] = ()
    """Sources, interleaved by their weights."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What a malformed row does: end the run with its name, or leave its slot empty and go into rejects.jsonl."""
    workers: int = 2
    """Threads that read and decode ahead of the step."""
    max_prompt_tokens: int = 16000
    """A longer prompt is a row-level error (nothing is ever cut inside an image)."""

    def __post_init__(self):
        _at_least(self, 0, "workers")
        _at_least(self, 1, "max_prompt_tokens")


@dataclass(frozen=True)
class SFTRecipe:
    """Supervised fine-tuning: next-token loss on the answers only."""

    kind: Literal["sft"] = "sft"
    """Which loop this recipe is for."""
    name: str = "sft"
    """Name of the stage in logs, checkpoints and the report."""
    run: str = "runs/sft"
    """Folder for checkpoints, metrics and the report."""
    seed: int = 0
    """Seed of shuffling and of adapter weights."""
    model: ModelConfig = ModelConfig()
    """Starting weights."""
    data: DataConfig = DataConfig()
    """Training rows."""
    optim: OptimConfig = OptimConfig()
    """Optimizer."""
    eval: EvalConfig = EvalConfig()
    """Held-out evaluation."""
    save: SaveConfig = SaveConfig()
    """Checkpoints and logs."""
    dist: DistConfig = DistConfig()
    """Ranks."""
    epochs: float = 2.0
    """Passes over the data; ignored when `steps` is given."""
    steps: int = 0
    """Optimizer steps; 0 = as many as `epochs` needs."""
    batch_size: int = 128
    """Rows per optimizer step, over all ranks."""
    micro_batch: int = 4
    """Rows per forward and backward pass on one rank."""
    loss_weighting: Literal["token", "row"] = "token"
    """token: every answer token counts the same. row: every answer counts the same (the share of long answers shrinks)."""
    stop_accuracy: float = 0.0
    """End the stage once every question type reaches this accuracy in an evaluation; 0 = never."""
    stop_steps: int = 0
    """Do not end the stage early before this step."""

    def __post_init__(self):
        _at_least(self, 0, "seed", "epochs", "steps", "stop_accuracy", "stop_steps")
        _at_least(self, 1, "batch_size", "micro_batch")


@dataclass(frozen=True)
class SamplingConfig:
    """How replies are drawn during training."""

    n: int = 16
    """Replies per prompt (the group)."""
    temperature: float = 1.0
    """Softmax temperature of sampling and of the loss's log-probs."""
    max_new_tokens: int = 4096
    """Longest reply, in tokens."""
    batch_size: int = 64
    """Prompts per decoding batch on one rank (each is expanded to n rows)."""

    def __post_init__(self):
        _at_least(self, 1, "n", "max_new_tokens", "batch_size")
        if not self.temperature > 0:
            raise ValueError(f"temperature: must be above 0, got {self.temperature}; training samples, it does not decode greedily")


@dataclass(frozen=True)
class GRPORecipe:
    """Group relative policy optimisation with verifiable rewards."""

    kind: Literal["grpo"] = "grpo"
    """Which loop this recipe is for."""
    name: str = "grpo"
    """Name of the stage in logs, checkpoints and the report."""
    run: str = "runs/grpo"
    """Folder for checkpoints, metrics and the report."""
    seed: int = 0
    """Seed of shuffling and of sampling."""
    model: ModelConfig = ModelConfig()
    """Starting weights; they are also the reference when `loss.beta` is above 0."""
    data: DataConfig = DataConfig()
    """Prompts."""
    sampling: SamplingConfig = SamplingConfig()
    """Replies."""
    rewards: tuple[RewardConfig, ...] = (RewardConfig("format", 0.5), RewardConfig("accuracy", 0.5))
    """Rewards and their weights: names from the registry or module:function."""
    advantages: AdvantageSpec = AdvantageSpec()
    """How rewards become advantages."""
    loss: GRPOSpec = GRPOSpec()
    """What is optimised."""
    optim: OptimConfig = OptimConfig(lr=1e-6, warmup_steps=0)
    """Optimizer."""
    eval: EvalConfig = EvalConfig()
    """Held-out evaluation."""
    save: SaveConfig = SaveConfig(every=10)
    """Checkpoints and logs."""
    dist: DistConfig = DistConfig()
    """Ranks."""
    steps: int = 150
    """Sampling steps."""
    prompts: int = 1024
    """Prompts per step, over all ranks."""
    minibatch: int = 256
    """Prompts (with all their replies) per optimizer step; `prompts` must be a multiple of it."""
    micro_batch: int = 4
    """Replies per forward and backward pass on one rank."""
    skip_zero_variance: bool = True
    """Leave groups whose rewards are all equal out of the update when beta is 0 (their gradient is exactly zero)."""
    log_rollouts: int = 4
    """Groups whose replies are kept for the report, at the first, middle and last step."""

    def __post_init__(self):
        _at_least(self, 0, "seed", "log_rollouts")
        _at_least(self, 1, "steps", "prompts", "minibatch", "micro_batch")
        if not self.rewards:
            raise ValueError("rewards: at least one is needed, for example [{name: accuracy}]")


def recipe_class(kind: str) -> type:
    """The dataclass of a recipe kind; ValueError names the known kinds."""
    if kind == "quickstart":
        from actial_fast.quickstart import QuickstartRecipe  # here, not above: it pulls in the renderer and the builder

        return QuickstartRecipe
    known = {"sft": SFTRecipe, "grpo": GRPORecipe}
    if kind not in known:
        raise ValueError(f"kind: {kind!r} is not a recipe kind; expected one of quickstart, {', '.join(known)}")
    return known[kind]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Any:
    """The recipe in a YAML file with `key.sub=value` overrides applied (values are YAML too; 0, 1, ... index lists).

    Raises ValueError for a file that is no recipe, an unknown key (naming the nearest valid one), a value of the wrong type or outside
    its range, and a malformed override.
    """
    path = Path(path)
    try:
        raw = yaml.load(path.read_text(), Loader=_Loader) or {}
    except FileNotFoundError:
        raise ValueError(f"recipe {path} does not exist; the ones that ship are in recipes/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {path} is not valid YAML: {_one_line(error)}") from None
    if not isinstance(raw, dict) or "kind" not in raw:
        raise ValueError(f"recipe {path} must be a mapping with a `kind`: sft, grpo or quickstart")
    return config_from(recipe_class(str(raw["kind"])), overrides, raw)


def config_from(cls: type, overrides: Sequence[str], raw: dict[str, Any] | None = None) -> Any:
    """An instance of dataclass `cls` from a mapping (or nothing) with `key.sub=value` overrides applied; raises like load_recipe."""
    # Written out in full first: an override may index a list that only the defaults have, and must not reach a YAML alias's other places.
    full = _plain(from_dict(cls, raw or {}))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ValueError(f"override {override!r}: expected key=value, for example optim.lr=1e-5")
        try:
            value = yaml.load(text, Loader=_Loader) if text else ""
        except yaml.YAMLError as error:
            raise ValueError(f"override {override!r}: the value is not valid YAML: {_one_line(error)}") from None
        _assign(full, key.split("."), value, override)
    return from_dict(cls, full)


def _assign(target: Any, keys: list[str], value: Any, override: str) -> None:
    for i, key in enumerate(keys):
        if isinstance(target, list):
            if not key.isdecimal() or int(key) >= len(target):
                holds = f"has {len(target)} entries, counted from 0" if target else "is empty; give the whole list"
                raise ValueError(f"override {override!r}: {key!r} is not an entry, {'.'.join(keys[:i])} {holds}")
            key = int(key)
        elif not isinstance(target, dict):
            raise ValueError(f"override {override!r}: {'.'.join(keys[:i])} holds a value, not fields")
        if i + 1 == len(keys):
            target[key] = value
        elif isinstance(target, dict):
            target = target.setdefault(key, {})  # an unknown key is reported with the nearest one by from_dict
        else:
            target = target[key]


def from_dict(cls: type, raw: Any, where: str = "") -> Any:
    """An instance of dataclass `cls` from plain mappings and lists; ValueError names the field at fault and what it takes."""
    if not isinstance(raw, dict):
        raise ValueError(f"{where or cls.__name__}: expected a mapping of {cls.__name__}'s fields, got {raw!r}")
    hints = _hints(cls)
    for key in raw:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.0)[0]
            raise ValueError(f"{_join(where, key)}: unknown key; did you mean {_join(where, near)!r}? Valid: {', '.join(hints)}")
    values = {key: _convert(hints[key], value, _join(where, key)) for key, value in raw.items()}
    for field in dataclasses.fields(cls):
        if field.name not in values and _default(field) is dataclasses.MISSING:
            raise ValueError(f"{_join(where, field.name)}: missing; {field_docs(cls).get(field.name, 'it has no default')}")
    try:
        return cls(**values)
    except ValueError as error:  # what its __post_init__ says about its fields
        raise ValueError(_join(where, error)) from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{where}: {value!r} is not one of {', '.join(map(str, args))}")
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where}: expected a list, got {value!r}")
        if args[-1] is Ellipsis:
            return tuple(_convert(args[0], v, f"{where}.{i}") for i, v in enumerate(value))
        if len(value) != len(args):
            raise ValueError(f"{where}: expected {len(args)} values, got {len(value)}")
        return tuple(_convert(a, v, f"{where}.{i}") for i, (a, v) in enumerate(zip(args, value, strict=True)))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        quote = f"; for the text, write '\"{value}\"'" if hint is str and isinstance(value, int | float) else ""
        raise ValueError(f"{where}: expected {hint.__name__}, got {value!r}{quote}")
    return value


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _default(field: dataclasses.Field) -> Any:
    """The field's default value; dataclasses.MISSING when it must be given."""
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """The docstring that follows each field in the source of dataclass `cls`."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    docs = {}
    for node, after in itertools.pairwise(body):
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            docs[node.target.id] = " ".join(str(after.value.value).split())
    return docs


def describe(recipe: Any, where: str = "", default: Any = None) -> Iterator[tuple[str, Any, Any, str]]:
    """(key, value, default, docstring) of every leaf field, depth first; nested dataclasses are expanded.

    default: an instance to take the defaults from (a part's may differ from its class's); None takes the fields' own, and
    dataclasses.MISSING stands for a field that must be given.
    """
    docs = field_docs(type(recipe))
    for f in dataclasses.fields(recipe):
        value = getattr(recipe, f.name)
        usual = _default(f) if default is None else getattr(default, f.name)
        key = _join(where, f.name)
        if dataclasses.is_dataclass(value):
            yield from describe(value, key, usual if isinstance(usual, type(value)) else None)
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for i, item in enumerate(value):
                yield from describe(item, f"{key}.{i}", usual[i] if i < len(usual) else None)
        else:
            yield key, value, usual, docs.get(f.name, "")


def to_yaml(value: Any) -> str:
    """A recipe as YAML, every field written out; `load_recipe` reads it back to an equal recipe. A single value gives one line."""
    plain = _plain(value)
    if isinstance(plain, dict):
        return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, width=120)
    return yaml.dump(plain, Dumper=_Dumper, default_flow_style=True, width=10**6).removesuffix("...\n").strip()


def _plain(value: Any) -> Any:
    """Dataclasses as mappings and tuples as lists: what YAML holds."""
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


class _Scalars:
    """Which words are not text: YAML 1.2's. YAML 1.1 reads off and no as false, 1e-6 as text, 010 as 8 and 1:30 as 90."""

    yaml_implicit_resolvers: typing.ClassVar[dict] = {}


class _Loader(_Scalars, yaml.SafeLoader):
    """SafeLoader with these scalars, and with an error for a key that stands twice in one mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(_Scalars, yaml.SafeDumper):
    """SafeDumper that quotes the texts which _Loader would not read back as text, and repeats equal parts instead of naming them."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in (
    ("null", r"|~|[Nn]ull|NULL", ["", "~", "n", "N"]),
    ("bool", r"[Tt]rue|TRUE|[Ff]alse|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][\d_]*)", list("-+0123456789")),
    ("float", r"[-+]?(\d[\d_]*\.[\d_]*|\.\d+|\d[\d_]*(?=[eE]))([eE][-+]?\d+)?|[-+]?\.inf|\.nan", list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)

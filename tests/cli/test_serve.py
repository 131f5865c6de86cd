"""`actial serve`: which folder is served, with what, and the command becoming the server."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from actial_fast.cli.main import main
from actial_fast.data.sources.source import SourceConfig
from actial_fast.model.processor import IMAGE_TEXT, Processor, load_tokenizer
from actial_fast.rollout.serving import Options, command, find, system_of, template_for
from actial_fast.settings.config import to_yaml
from actial_fast.settings.model import LoRAConfig, ModelConfig
from actial_fast.settings.recipe import DataConfig, EvalConfig, GRPORecipe, RolloutConfig, SFTRecipe
from actial_fast.train import checkpoint
from tests.loops import ALONE
from tests.train.saved import config, trained

SYSTEM = 'Think in <think> tags.\nSay "it\'s 5 µm" \\ {{ no }} {% raw %} %} 😀\u2028'
OWN = (  # takes texts alone
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFAULT = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"  # as Qwen2.5-VL's


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A run: sft is finished, with adapters; grpo is finished, under a system prompt; more is not."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    model = ModelConfig(path=str(tiny), lora=LoRAConfig(rank=12), max_pixels=3 * 28**2)
    rows = SourceConfig("rows.jsonl", system=SYSTEM)
    recipes = {
        "grpo": GRPORecipe(name="grpo", data=DataConfig(sources=(rows,), together=False), rollout=RolloutConfig(max_images=3)),
        "sft": SFTRecipe(name="sft", model=model),
        "more": GRPORecipe(name="more"),
    }
    for name, recipe in recipes.items():
        policy, optimizer = trained(config(tiny, "adapters" if name == "sft" else "full"), ALONE)
        saver = checkpoint.Saver(folder / name, ALONE, 2)
        saver.save(1, policy, Processor.load(str(tiny), max_pixels=2 * 28**2), optimizer, {})
        saver.wait() if name == "more" else saver.finish(1)
        (folder / name / "recipe.yaml").write_text(to_yaml(replace(recipe, run=str(folder))))
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"stage": s, "step": 1}) + "\n" for s in ("sft", "grpo", "more")))
    os.utime(folder / "sft/final", (2e9, 2e9))  # as of a copy
    return folder


def served(path, *more, **options):
    made = command(find(str(path), **options), Options("cuda", more=more))
    told = dict(zip(made.words, made.words[1:], strict=False))
    return made, told


def test_the_newest_finished_stage_with_its_system_prompt(run):
    made, told = served(run)
    assert made.words[:5] == ["vllm", "serve", str(run / "grpo/final/model"), "--served-model-name", "mine"]
    assert told["--dtype"] == "bfloat16" and told["--generation-config"] == "vllm"
    assert json.loads(told["--limit-mm-per-prompt"]) == {"image": 3, "video": 0}
    assert json.loads(told["--mm-processor-kwargs"]) == {"size": {"shortest_edge": 28**2, "longest_edge": 2 * 28**2}}
    assert made.system == SYSTEM and told["--chat-template"] == str(run / "grpo/serve.jinja") == str(made.template)
    assert SYSTEM.splitlines()[0] in (run / "grpo/serve.jinja").read_text()


@pytest.mark.parametrize("place", [".", "grpo", "grpo/final", "grpo/final/model"])
def test_any_folder_of_a_stage_means_it(run, place, monkeypatch):
    monkeypatch.chdir(run)
    for path in (place, run / place):
        made, _ = served(path)
        assert Path(made.words[2]).resolve() == run / "grpo/final/model" and made.system == SYSTEM


@pytest.mark.parametrize("place", ["more", "more/step-000001", "more/step-000001/model"])
def test_a_checkpoint_to_go_on_from_is_refused_with_the_command(run, place):
    source = run / "more/step-000001"
    with pytest.raises(ValueError, match=re.escape(f"actial export {source} -o OUT, and serve OUT")):
        find(str(run / place))


def test_adapters_beside_their_base(run, tiny):
    for path, options in ((run / "sft", {"adapter": True}), (run / "sft/final/model", {"adapter": True}), (run / "sft/final/adapter", {})):
        made, told = served(path, **options)
        assert made.words[2] == str(tiny) and told["--lora-modules"] == f"mine={run}/sft/final/adapter" and "--enable-lora" in made.words
        assert told["--max-lora-rank"] == "8" and not made.system
        assert json.loads(told["--mm-processor-kwargs"])["size"]["longest_edge"] == 3 * 28**2, "the recipe's, not the base's"
    about = run / "sft/final/adapter/adapter_config.json"
    plain = about.read_text()
    for change, says in (
        ({"use_dora": True}, "plain LoRA, not DoRA"),
        ({"peft_type": "IA3"}, "plain LoRA, not IA3"),
        ({"target_modules": "model\\.visual\\.x|y"}, "vision tower too"),
        ({"r": 600}, "ranks up to 512, got 600"),
        ({"base_model_name_or_path": "gone"}, "its base, gone, is not there"),
    ):
        about.write_text(json.dumps({**json.loads(plain), **change}))
        with pytest.raises(ValueError, match=says):
            find(str(run / "sft"), adapter=True)
    about.write_text(plain)


def test_mistakes(run, tiny, tmp_path, capsys):
    for args, message in (
        ([tmp_path], "neither a run, a stage of one, nor a checkpoint's folder"),
        (["no/where/at/all"], "no such folder"),
        ([tiny, "--adapter"], "comes without adapters"),
        (["some/name", "--adapter"], "is a hub name"),
        ([tiny, "--gpus", "3"], "--gpus 3: the model's 4 heads cannot be shared out"),
        ([tiny, "--gpus", "0"], "1 or more"),
        ([tiny, "--recipe", "recipes/quickstart.yaml"], "of kind quickstart"),
        ([tiny, "--system", "@nowhere.txt"], "nowhere.txt: No such file"),
        ([tiny, "--run", "--device", "cuda"], "vLLM is not installed here"),
    ):
        assert main(["serve", *map(str, args)]) == 2, args
        assert message in capsys.readouterr().err


def test_the_command_line(run, tiny, tmp_path, capsys):
    line = ["serve", str(run), "--device", "cuda", "--gpus", "2", "--template", str(tmp_path / "t.jinja")]
    assert main([*line, "--system", "Be brief.", "--", "--port", "9000", "--host=0.0.0.0", "--dtype", "float16"]) == 0
    out, err = capsys.readouterr()
    words = shlex.split(out)
    assert words[-5:] == ["--port", "9000", "--host=0.0.0.0", "--dtype", "float16"] and "--tensor-parallel-size" in words
    assert (tmp_path / "t.jinja").exists() and "'Be brief.'" in err
    asked = re.search(r"  printf '(.*)' \"\$\(base64 -w 0 PHOTO.jpg\)\" \| curl -s http://localhost:9000/v1/chat/completions", err)
    assert (
        asked
        and json.loads(asked[1] % "AAAA")["model"] == "mine"
        and "actial eval mine ROWS.jsonl --server http://localhost:9000/v1" in err
    )
    assert main(["serve", str(tiny), "--device", "cpu", "--json", "-"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["url"], told["name"], told["template"]) == ("http://localhost:8000/v1", "model", "") and "float32" in told["command"]
    assert told["command"][:3] == ["python", "-m", "vllm.entrypoints.openai.api_server"]
    assert main(["serve", "Qwen/Qwen2.5-VL-7B-Instruct", "--device", "cuda"]) == 0, "nothing is asked of the hub"
    assert shlex.split(capsys.readouterr().out)[:3] == ["vllm", "serve", "Qwen/Qwen2.5-VL-7B-Instruct"]


def test_it_becomes_the_server(run, tmp_path, capsys, monkeypatch):
    """The same process, so that a scheduler's signals reach it."""
    program = tmp_path / "vllm"
    program.write_text('#!/bin/sh\necho $$ "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    became: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda path, words: became.append([path, *words]))
    assert main(["serve", str(run), "--run", "--device", "cuda", "--", "--port", "9"]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert became == [[str(program), str(program), *words[1:]]] and words[-2:] == ["--port", "9"]
    code = "import os; from actial_fast.cli.serve import _run; print(os.getpid(), flush=True); _run(['vllm', 'serve', 'a b'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    before, after = done.stdout.splitlines()
    assert after == f"{before} serve a b"


def test_the_system_prompt_is_the_sources():
    def of(trained, asked=()):
        data, held = (tuple(SourceConfig("x", system=s) for s in texts) for texts in (trained, asked))
        return system_of(SFTRecipe(data=DataConfig(sources=data), eval=EvalConfig(sources=held)))

    assert (of(["a", "a"]), of([""]), of([]), of(["", "a"], ["a"]), of(["", "a"], [""])) == ("a", "", "", "a", "")
    for trained_, asked in ((["", "a"], []), (["a", "b"], ["b", "c"])):
        with pytest.raises(ValueError, match=r"several system prompts .* --system"):
            of(trained_, asked)


@pytest.mark.parametrize("own", ["ours", OWN, DEFAULT + OWN], ids=["takes parts", "texts alone", "adds a system prompt"])
@pytest.mark.parametrize("system", ["", "Be brief.", SYSTEM, "C:\\new\\u0041 'x' \x1f"])
def test_the_template_asks_as_in_training(tiny, own, system):
    """Rendered texts, parts, and conversations with a system prompt of their own are those of the checkpoint's template, byte for byte."""
    tokenizer = load_tokenizer(str(tiny))
    tokenizer.chat_template = tokenizer.chat_template if own == "ours" else own
    made = template_for(tokenizer, system)
    assert (made is None) == (own == "ours" and not system)
    image, text = {"type": "image"}, lambda t: {"type": "text", "text": t}
    turns = [
        (
            "user",
            [image, text("\n"), {"type": "image_url", "image_url": {"url": "a"}}, text(" Which? ")],
            f"{IMAGE_TEXT}\n{IMAGE_TEXT} Which? ",
        ),
        ("assistant", "A", "A"),
        ("user", "Why?", "Why?"),
    ]
    for first in ([], [("system", [text("Own.")], "Own.")]):
        asked = [{"role": role, "content": parts} for role, parts, _ in (*first, *turns)]
        trained_on = [{"role": role, "content": content} for role, _, content in (*first, *turns)]
        if system and not first:
            trained_on.insert(0, {"role": "system", "content": system})
        as_served = tokenizer.apply_chat_template(asked, chat_template=made, tokenize=False, add_generation_prompt=True)
        assert as_served == tokenizer.apply_chat_template(trained_on, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize(
    "role", ["{% if m.role == 'user' %}{{ m.content }}{% endif %}", "{{ raise_exception('no') if m.role == 'system' }}"]
)
def test_a_template_that_takes_no_system_prompt_is_told(tiny, role):
    tokenizer = load_tokenizer(str(tiny))
    tokenizer.chat_template = f"{{% for m in messages %}}{role}{{% endfor %}}"
    with pytest.raises(ValueError, match="takes no system prompt"):
        template_for(tokenizer, "Be brief.")


def test_a_template_that_takes_parts_alone_is_told(tiny):
    tokenizer = load_tokenizer(str(tiny))
    tokenizer.chat_template = "{% for m in messages %}{{ raise_exception('parts') if m.content is string }}{% endfor %}"
    with pytest.raises(ValueError, match="does not take a user's turn as text"):
        template_for(tokenizer, "")


def test_heads_are_shared_out_where_they_can(tiny):
    assert "--tensor-parallel-size" in command(find(str(tiny)), Options("cuda", gpus=4)).words
    assert not torch.cuda.is_available() or "--dtype" in command(find(str(tiny)), Options("cuda")).words

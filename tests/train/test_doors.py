"""`actial data check` and training ask the same door; checkpoints, templates, folders and disks as people have them."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from actial_fast.cli.main import main
from actial_fast.data.sources.row import BadRow
from actial_fast.data.sources.source import SourceConfig, open_source, scan
from actial_fast.data.sources.stream import Example, Stream
from actial_fast.model.processor import Processor
from actial_fast.packing.images import ImageStore
from actial_fast.settings.config import to_yaml
from actial_fast.settings.recipe import DataConfig, GRPORecipe, SFTRecipe
from actial_fast.train import checkpoint
from actial_fast.train.preflight import doors, problems_of, processor_of
from actial_fast.train.stage import _tell_changed_data
from tests.loops import ALONE


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


ASKED, SAID = turn("user", "<image>Which way?"), turn("assistant", "A")
BAD = {  # rows that training refuses, and the words
    "special token": ([turn("user", "<image>a <|im_end|> b"), SAID], "small.png", "special token <|im_end|>"),
    "strip": ([ASKED, SAID], "strip.png", "one side must not be more than 200 times"),
    "image in an answer": ([turn("user", "q"), turn("assistant", "see <image>")], "small.png", "an answer holds <image>"),
    "surrogate": ([turn("user", "<image>q \ud83d"), SAID], "small.png", "half a surrogate pair"),
    "nul": ([turn("user", "<image>q \0"), SAID], "small.png", "NUL"),
    "long answer": ([ASKED, turn("assistant", "no " * 600)], "small.png", "tokens with its answers, over pack_tokens=512"),
    "long prompt": ([turn("user", "<image>" + "why " * 400), SAID], "small.png", "over max_prompt_tokens=300"),
    "large image": ([ASKED, SAID], "large.png", "patches, over pack_patches=400"),
    "too many pixels": ([ASKED, SAID], "huge.png", "over 1000000 pixels"),
    "lost": ([ASKED, SAID], "gone.png", "does not exist"),
    "no answer": ([ASKED], "small.png", "no assistant turn to train on"),
    "ends with a question": ([ASKED, SAID, turn("user", "and now?")], "small.png", "nothing answers"),
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A file with a good row and one of each bad ones."""
    folder = tmp_path_factory.mktemp("rows")
    for name, size in (("small", (40, 30)), ("strip", (2010, 10)), ("large", (300, 300)), ("huge", (1100, 1000))):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8)).save(folder / f"{name}.png")
    said = [{"messages": [ASKED, SAID], "images": ["small.png"], "truth": "A"}]
    said += [{"messages": messages, "images": [image], "truth": "A"} for messages, image, _ in BAD.values()]
    (folder / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))
    return folder / "r.jsonl"


@pytest.fixture
def recipe(tiny, rows, tmp_path):
    data = DataConfig(
        (SourceConfig(str(rows)),), "skip", workers=0, max_prompt_tokens=300, max_image_pixels=1_000_000, image_cache=str(tmp_path)
    )
    made = SFTRecipe(run=str(tmp_path / "run"), data=data, pack_tokens=512, pack_patches=400, steps=1, batch_size=2)
    return replace(made, model=replace(made.model, path=str(tiny), max_pixels=900 * 900))


def test_the_check_says_what_training_says(recipe, rows, tmp_path, capsys):
    processor = processor_of(recipe)
    (source, encode), *_ = doors(recipe, processor)
    found = scan(open_source(source), lambda row, index: encode(Example(row, index)))
    assert found.rows == 1 + len(BAD) and sum(found.kinds.values()) == 1
    for error, (_, _, reason) in zip(found.bad, BAD.values(), strict=True):
        assert reason in error.reason
    stream = Stream(recipe.data.sources, seed=0, shuffle=False, on_bad_row="skip", rejects=tmp_path / "x.jsonl", workers=0, encode=encode)
    assert len(stream.next_batch(found.rows)) == 1
    told = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [(row["where"], row["reason"]) for row in told] == [(error.where, error.reason) for error in found.bad]
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    assert main(["data", "check", str(tmp_path / "recipe.yaml")]) == 1
    printed = capsys.readouterr().out
    assert f"{found.rows} rows, {len(BAD)} bad" in printed and all(reason in printed for _, _, reason in BAD.values())


def test_the_check_of_a_file_with_a_model_and_without(rows, tiny, capsys):
    assert main(["data", "check", str(rows), "--model", str(tiny)]) == 1
    with_model = capsys.readouterr().out
    assert "nothing answers" in with_model and "were not looked at" not in with_model
    assert main(["data", "check", str(rows)]) == 1
    without = capsys.readouterr().out
    for name in ("special token", "strip", "image in an answer", "surrogate", "nul", "lost"):
        assert BAD[name][2] in without and BAD[name][2] in with_model
    assert "without --model, lengths in tokens" in without


def test_prompts_leave_room_for_a_reply(recipe, tiny):
    grpo = GRPORecipe(model=recipe.model, data=recipe.data, pack_tokens=512, pack_patches=400, steps=1, prompts=2, minibatch=2)
    processor = processor_of(replace(grpo, sampling=replace(grpo.sampling, max_new_tokens=511)))
    row = open_source(recipe.data.sources[0])[0]
    with pytest.raises(BadRow, match=r"prompt of \d+ tokens, and 511 for a reply, over pack_tokens=512"):
        processor.encode_prompt(Example(row, 0))
    assert processor.encode(Example(row, 0)).trained.any()  # a row with its answer needs no room
    assert len(processor_of(replace(grpo, packing="plain")).encode_prompt(Example(row, 0)))


def test_a_reward_that_can_score_nothing_is_a_problem(recipe, rows, tmp_path):
    record = json.loads(rows.read_text().splitlines()[0])
    (rows.parent / "open.jsonl").write_text(json.dumps({**record, "truth": None, "kind": "open"}) + "\n")
    data = replace(recipe.data, sources=(SourceConfig(str(rows.parent / "open.jsonl")),))
    grpo = GRPORecipe(run=str(tmp_path / "run"), model=recipe.model, data=data, steps=1, prompts=2, minibatch=2)
    problems = problems_of(grpo, Processor.encode_prompt, lambda *_: (), tmp_path / "run" / "grpo", ALONE)
    assert [line for line in problems if "rewards: accuracy can score nothing: none of the first 64 rows" in line]


# ---- checkpoints and templates


def with_template(tiny: Path, folder: Path, change) -> Path:
    shutil.copytree(tiny, folder)
    file = folder / "chat_template.jinja"
    file.write_text(change(file.read_text()))
    return folder


def test_a_template_that_opens_think_is_told_at_the_start(tiny, tmp_path, recipe):
    folder = with_template(tiny, tmp_path / "m", lambda text: text + "{%- if add_generation_prompt %}{{- '<think>\\n' }}{%- endif %}")
    with pytest.raises(ValueError, match=r"chat template opens replies with .*<think>"):
        Processor.load(str(folder))
    wrong = replace(recipe, model=replace(recipe.model, path=str(folder)))
    problems = problems_of(wrong, Processor.encode, lambda *_: (), tmp_path / "run" / "sft", ALONE)
    assert [line for line in problems if line.startswith("model.path: the tokenizer and image processor of") and "<think>" in line]


def test_a_template_that_rewrites_history_costs_the_rows_it_touches(tiny, tmp_path, rows):
    body = (
        "{%- for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content.split('</think>')[-1] if m.role == 'assistant' and not loop.last else m.content }}<|im_end|>\n{% endfor %}"
        "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    processor = Processor.load(str(with_template(tiny, tmp_path / "m", lambda text: body)))
    one = open_source(SourceConfig(str(rows)))[0]
    thought = replace(one.turns[1], content="<think>x</think>A")
    assert processor.encode(Example(replace(one, turns=(one.turns[0], thought)), 0)).trained.any()
    twice = Example(replace(one, turns=(one.turns[0], thought, replace(one.turns[0], content="more"), thought)), 0)
    for read in (processor.encode, processor.encode_prompt):
        with pytest.raises(BadRow, match=r"r\.jsonl:1: the chat template rewrites earlier turns"):
            read(twice)


def test_a_template_that_fails_on_a_text(tiny, tmp_path, rows):
    change = "{%- if 'Which' in messages[-1].content %}{{ raise_exception('no') }}{%- endif %}"
    processor = Processor.load(str(with_template(tiny, tmp_path / "m", lambda text: change + text)))
    with pytest.raises(BadRow, match=r"r\.jsonl:1: .*cannot be tokenised \(TemplateError: no"):
        processor.encode(Example(open_source(SourceConfig(str(rows)))[0], 0))


@pytest.mark.parametrize("ends", [5, [5, 7], [7, 10**6], None])
def test_ends_of_the_generation_config(tiny, tmp_path, ends):
    shutil.copytree(tiny, tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({"eos_token_id": ends, "do_sample": True}))
    plain, found = Processor.load(str(tiny)), Processor.load(str(tmp_path / "m"))
    given = ends if isinstance(ends, list) else [ends] if ends else []
    assert set(found.stop_tokens) == {*plain.stop_tokens, *(token for token in given if token < 10**6)}
    found.save(tmp_path / "m")
    kept = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    assert kept == {"eos_token_id": list(found.stop_tokens), "do_sample": True}, "engines end replies where training did"


def test_an_adapter_folder_is_called_one(tmp_path, recipe):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct"}')
    wrong = replace(recipe, model=replace(recipe.model, path=str(tmp_path / "adapter")))
    problems = problems_of(wrong, Processor.encode, lambda *_: (), tmp_path / "run" / "sft", ALONE)
    assert any("holds PEFT adapters" in line and "its base is Qwen/Qwen2.5-VL-7B-Instruct" in line for line in problems)


# ---- folders and disks


def test_someones_copy_of_a_checkpoint_is_no_checkpoint(tmp_path):
    for name in ("step-000004", "step-000004-best", "step-best", "step-000012.old", "step-", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{}")
    assert checkpoint.steps(tmp_path) == [4] and checkpoint.newest(tmp_path).name == "step-000004"


def test_changed_data_is_told_when_a_run_goes_on(recipe, rows, tmp_path, caplog):
    copy = shutil.copy(rows, tmp_path / "mine.jsonl")
    recipe = replace(recipe, data=replace(recipe.data, sources=(SourceConfig(str(copy)),)))
    folder = tmp_path / "stage"
    (folder / "step-000002").mkdir(parents=True)
    (folder / "step-000002" / "state.json").write_text("{}")
    for _ in range(2):
        _tell_changed_data(recipe, folder)
    assert not caplog.text
    stat = os.stat(copy)
    Path(copy).write_bytes(Path(copy).read_bytes().replace(b"Which", b"Where"))
    os.utime(copy, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the same size and time
    _tell_changed_data(recipe, folder)
    assert f"{copy} has changed since this run began" in caplog.text


def test_an_image_store_that_may_only_be_read(tiny, tmp_path, rows, monkeypatch):
    settings = Processor.load(str(tiny)).store.settings
    key = ImageStore(settings, tmp_path / "store").put(rows.parent / "small.png")
    opened = os.open

    def refused(path, flags, *rest):
        if str(path).startswith(str(tmp_path)) and flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, flags, *rest)

    monkeypatch.setattr(os, "open", refused)
    store = ImageStore(settings, tmp_path / "store")
    assert store.put(rows.parent / "small.png") == key and store.pixels(key).shape[2] == 3
    with pytest.raises(ValueError, match=r"cannot keep an image .*Permission denied.*name another folder"):
        store.put(rows.parent / "large.png")

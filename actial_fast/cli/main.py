"""Parses the command line, runs the command, and tells the user's mistakes in one line."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from actial_fast.cli import bench, cache, data, doctor, eval, export, plan, recipe, report, serve, tiny, train
from actial_fast.cli.launch import PEER_LOST
from actial_fast.cli.parser import Completion, Parser, Version
from actial_fast.cli.shared import one_line

SAID = ("ACTIAL_QUIET", "ACTIAL_TRACEBACK")  # -q and -v, for the ranks that are started too; they end with the command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    The user's mistakes end in one line on stderr and status 2, without a traceback (-v, or ACTIAL_TRACEBACK=1, shows it). A run that was
    asked to stop and has saved ends with 130 (Ctrl-C) or 143 (SIGTERM), as schedulers that would start it again expect.
    """
    before = {name: os.environ.get(name) for name in SAID}
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except BrokenPipeError:  # `actial ... | head`
        return 0
    finally:
        _flush()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _flush() -> None:
    """Write what stdout still holds, help and versions too, while a reader that has gone is known for what it is."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(line: list[str]) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads are ruinous where other programs run too
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what the locale cannot print is printed by its number
    first = next((i for i, word in enumerate(line) if word not in ("-q", "--quiet", "-v", "--verbose")), 0)
    parser, words = bench.below(line[first:]) or export.below(line[first:]) or (make_parser(), line[first:])
    words = [*line[:first], *words]
    args, rest = parser.parse_known_args(words)
    # argparse gives an optional list of words up as soon as an option follows the words before it, so it leaves `... -o OUT key=value`
    if rest and hasattr(args, "words") and not any(word.startswith("-") for word in rest):
        args.words, rest = [*args.words, *rest], []
    if rest and not (hasattr(args, "overrides") and all("=" in word and not word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    args.line = line
    if getattr(args, "quiet", False):
        os.environ["ACTIAL_QUIET"] = "1"
    if getattr(args, "verbose", False):
        os.environ["ACTIAL_TRACEBACK"] = "1"
    try:
        return args.run(args) or 0
    except SystemExit as error:
        if (number := getattr(error, "signal", None)) is None:
            raise
        if error.code:
            print(error.code, file=sys.stderr)
        return 128 + int(number)
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        print("actial: interrupted; the same command goes on from where it was", file=sys.stderr)
        return 130
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("ACTIAL_TRACEBACK") or (isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("actial_fast")):
            raise
        rank = int(os.environ.get("RANK", 0))
        if rank and getattr(error, "agreed", False):  # rank 0 says it for all
            return 2
        for line in getattr(error, "problems", None) or [one_line(error)]:
            print(f"actial: {f'rank {rank}: ' if rank else ''}{line}", file=sys.stderr)
        return PEER_LOST if getattr(error, "peer_lost", False) else 2


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command; each group adds its own."""
    parser = Parser(prog="actial", bare=True, description="Viewpoint training of vision-language models: data, SFT, GRPO, evaluation.")
    parser.add_argument("--version", action=Version, help="print versions and end")
    parser.add_argument("--print-completion", action=Completion, help="print a script that completes the command in this shell, and end")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for group in (train, eval, bench, export, serve, report, doctor, plan, recipe, data, cache, tiny):
        group.add(commands)
    return parser

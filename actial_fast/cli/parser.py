"""The parser of every command: argparse's, with the nearest word beside a mistake, and fields that are listed when help is asked for."""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.metadata
import platform
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

CHOICE = re.compile(r"invalid choice: '([^']*)' \(choose from (.*)\)")


class Parser(argparse.ArgumentParser):
    """fields: "module:Class" of the dataclass that words key=value fill; its fields stand below the command's help. bare: what is printed,
    with status 0, when no word follows; else that is argparse's business. further: what words behind `--` are, of a command that hands
    them on to another program; they become `further` of what is parsed."""

    def __init__(self, *args: Any, fields: str = "", bare: bool = False, further: str = "", **more: Any):
        super().__init__(*args, **more)
        self.fields, self.bare, self.further = fields, bare, further
        group = self.add_mutually_exclusive_group()
        group.add_argument("-q", "--quiet", action="store_true", default=argparse.SUPPRESS, help="no progress: results and mistakes alone")
        group.add_argument("-v", "--verbose", action="store_true", default=argparse.SUPPRESS, help="and libraries' messages; tracebacks")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's; nothing at all prints the help of a command that has others below it."""
        words = sys.argv[1:] if args is None else list(args)
        if self.bare and not [word for word in words if word not in ("-q", "--quiet", "-v", "--verbose")]:
            self.print_help()
            self.exit(0)
        if not self.further:
            return super().parse_known_args(words, namespace)
        end = words.index("--") if "--" in words else len(words)
        parsed, unknown = super().parse_known_args(words[:end], namespace)
        parsed.further = words[end + 1 :]
        return parsed, unknown

    def format_help(self) -> str:
        """The help, and the fields that a command takes as key=value, or the words that it hands on."""
        if self.further:
            return super().format_help() + f"\nbehind --:\n  {self.further}\n"
        if not self.fields:
            return super().format_help()
        from actial_fast.settings.config import describe, to_yaml

        module, _, name = self.fields.partition(":")
        lines = [
            f"  {key}={to_yaml(value)}\n      {meaning}"
            for key, value, _, meaning in describe(getattr(importlib.import_module(module), name)())
        ]
        return super().format_help() + "\nfields, key=value, with their defaults:\n" + "\n".join(lines) + "\n"

    def error(self, message: str) -> NoReturn:
        """One line, with the nearest command where there is one like it, and status 2."""
        if found := CHOICE.search(message):
            near = difflib.get_close_matches(found[1], re.findall(r"[\w-]+", found[2]), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            message = f"{found[1]!r} is no command{hint} (`{self.prog} --help` lists them)" if "COMMAND" in message else message + hint
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: error: {message}\n")


class Version(argparse.Action):
    """--version: of the package, and of what matters beside it, without importing any of it."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print it and end."""
        beside = ", ".join(f"{name} {version}" for name in ("torch", "triton", "transformers") if (version := _version(name)))
        print(f"actial_fast {_version('actial-fast') or 'not installed'} ({beside}, Python {platform.python_version()})")
        parser.exit()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


class Completion(argparse.Action):
    """--print-completion SHELL: a script that completes the command in bash, zsh or tcsh."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None):
        super().__init__(option_strings, argparse.SUPPRESS, choices=("bash", "zsh", "tcsh"), help=help)

    def __call__(self, parser: argparse.ArgumentParser, _: Any, shell: Any, *__: Any) -> None:
        """Print it and end."""
        import shtab

        print(shtab.complete(parser, shell))
        parser.exit()

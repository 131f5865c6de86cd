"""A hook of mkdocs: every field of every recipe and every command as tables, from the dataclasses and the parser themselves.

`{{ recipe_fields }}` becomes a section for each dataclass that a recipe can reach, `{{ commands }}` one for each command. Type, default and
meaning are the source's; what numbers are allowed is what the dataclass says when it refuses others.
"""

import argparse
import dataclasses
import importlib
import re
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

from actial_fast.cli import bench, export
from actial_fast.cli.main import make_parser
from actial_fast.settings.config import RECIPES, field_docs, recipe_class, to_yaml

WORDS = {int: "integer", float: "number", bool: "true or false", str: "text"}
PROBES = {int: (-(10**9), 10**9), float: (-1e9, 1e9)}


def on_page_markdown(markdown: str, **kwargs: object) -> str:
    """Called by mkdocs for every page."""
    for name, make in (("recipe_fields", recipe_fields), ("commands", command_sections)):
        if (place := f"{{{{ {name} }}}}") in markdown:
            markdown = markdown.replace(place, make())
    return markdown


# ---- fields


def fields_of(module: str, name: str) -> str:
    """The table of one dataclass."""
    return table(getattr(importlib.import_module(module), name), {})


def recipe_fields() -> str:
    """A section for each dataclass, in the order in which recipes reach them."""
    places: dict[type, list[tuple[str, str, Any]]] = {}
    recipes = {kind: recipe_class(kind) for kind in RECIPES}
    for kind, cls in recipes.items():
        for part, path, default in parts(cls, "", cls(), tuple(recipes.values())):
            places.setdefault(part, []).append((kind, path, default))
    anchors = {cls: cls.__name__.lower() for cls in places}
    return "\n\n".join(section(cls, found, anchors) for cls, found in places.items())


def parts(cls: type, path: str, default: Any, leaves: tuple[type, ...]) -> Iterator[tuple[type, str, Any]]:
    """(dataclass, dotted key, default instance) of a dataclass and all below it, without `leaves`, which are told apart."""
    yield cls, path, default
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        for part in dataclasses_in(hints[field.name]):
            if part in leaves:
                continue
            within = getattr(default, field.name, None)
            listed = typing.get_origin(hints[field.name]) is tuple
            below = f"{path}.{field.name}".lstrip(".") + (".0" if listed else "")
            yield from parts(part, below, within if isinstance(within, part) else None, leaves)


def dataclasses_in(hint: Any) -> list[type]:
    """The dataclasses that a type is made of: itself, an entry's, an alternative's."""
    if dataclasses.is_dataclass(hint):
        return [hint] if isinstance(hint, type) else []
    return list(dict.fromkeys(part for each in typing.get_args(hint) for part in dataclasses_in(each)))


def section(cls: type, places: list[tuple[str, str, Any]], anchors: dict[type, str]) -> str:
    """Heading, places, what differs there, and the table of a dataclass."""
    keys = list(dict.fromkeys(path for _, path, _ in places))
    kinds = [kind for kind, path, _ in places if not path]
    title = f"kind: {kinds[0]}" if kinds else " and ".join(f"`{key}`" for key in keys[:2])
    lines = [f"## {title} {{ #{anchors[cls]} }}", " ".join((cls.__doc__ or "").split("\n\n")[0].split())]
    if not kinds:
        said: dict[str, list[str]] = {}
        for kind, path, _ in places:
            said.setdefault(path, []).append(kind)
        lines.append("In " + "; ".join(f"`{path}` of {', '.join(dict.fromkeys(found))}" for path, found in said.items()) + ".")
    changes = [change for kind, path, default in places for change in differing(cls, kind, path, default)]
    if changes:
        lines.append("Other defaults: " + ", ".join(changes) + ".")
    return "\n\n".join([*lines, table(cls, anchors)])


def differing(cls: type, kind: str, path: str, default: Any) -> Iterator[str]:
    """The plain fields whose default is another at this place than in general."""
    for field in dataclasses.fields(cls) if default is not None and path else ():
        usual, here = usual_value(field), getattr(default, field.name)
        if usual is not dataclasses.MISSING and here != usual and not dataclasses_in(typing.get_type_hints(cls)[field.name]):
            yield f"`{path}.{field.name}` of {kind} is `{to_yaml(here)}`"


def table(cls: type, anchors: dict[type, str]) -> str:
    """The fields of a dataclass: name, what it takes, default, meaning."""
    hints, docs = typing.get_type_hints(cls), field_docs(cls)
    rows = ["| field | takes | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(cls):
        hint, usual = hints[field.name], usual_value(field)
        below = [f"[{part.__name__}](#{anchors[part]})" if part in anchors else part.__name__ for part in dataclasses_in(hint)]
        takes = " or ".join(below) if below else takes_of(hint)
        takes = f"list of {takes}" if below and typing.get_origin(hint) is tuple else takes
        bounds = refused(cls, field.name, hint)
        shown = "needed" if usual is dataclasses.MISSING else "" if below and usual != () else f"`{to_yaml(usual)}`"
        rows.append("| " + " | ".join(map(cell, (f"`{field.name}`", takes + bounds, shown, docs.get(field.name, "")))) + " |")
    return "\n".join(rows)


def cell(text: str) -> str:
    """Text that stays within its cell, and is text where it looks like Markdown or HTML."""
    quoted = re.split(r"(`[^`]*`)", text)
    parts = (part if i % 2 else part.replace("<", "&lt;").replace("*", r"\*") for i, part in enumerate(quoted))
    return "".join(parts).replace("|", r"\|")


def usual_value(field: "dataclasses.Field[Any]") -> Any:
    """The default of a field; MISSING where it has none."""
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def takes_of(hint: Any) -> str:
    """A type in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if arg is type(None) else takes_of(arg) for arg in args)
    if origin is tuple:
        return f"list of {takes_of(args[0])}" if args[-1] is Ellipsis else f"[{', '.join(takes_of(arg) for arg in args)}]"
    return WORDS.get(hint, hint.__name__)


def refused(cls: type, name: str, hint: Any) -> str:
    """What a dataclass says of a number far too low, and of one far too high, where it refuses them on their own account."""
    kinds = [kind for kind in (hint, *typing.get_args(hint)) if kind in PROBES]
    if not kinds or typing.get_origin(hint) is tuple:
        return ""
    needed = {f.name: "x" for f in dataclasses.fields(cls) if usual_value(f) is dataclasses.MISSING}
    said = []
    for probe in PROBES[kinds[0]]:
        try:
            cls(**{**needed, name: probe})
        except ValueError as error:
            owner, _, rule = str(error).partition(": ")
            if owner.split(".")[-1] == name and ", got" in rule:
                said.append(rule.split(", got")[0].removeprefix("must be ").removeprefix("expected "))
    return "".join(f", {rule}" for rule in dict.fromkeys(said))


# ---- commands


def command_sections() -> str:
    """A section for every command."""
    return "\n\n".join(command_section(*each) for each in commands())


def commands() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """(what is typed, its parser) of every command that does something."""
    yield from below("actial", "", make_parser())
    for words in (["bench", "export"], ["bench", "quiz"], ["export", "verl"]):  # parsers of their own, beside sets and checkpoints
        found = bench.below(words) or export.below(words)
        assert found is not None
        yield f"actial {' '.join(words)}", found[0]


def below(line: str, about: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The commands under a parser, or the one that it is."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        parser.description = parser.description or about
        yield line, parser
    for group in groups:
        texts = {choice.dest: choice.help or "" for choice in group._choices_actions}
        for name, sub in group.choices.items():
            yield from below(f"{line} {name}", texts.get(name, ""), sub)


def command_section(line: str, parser: argparse.ArgumentParser) -> str:
    """Heading, what it does, usage, arguments, and the fields that it takes as key=value."""
    usage = " ".join(parser.format_usage().split()).removeprefix("usage: ")
    rows = [
        row(action) for action in parser._actions if action.help != argparse.SUPPRESS and action.dest not in ("help", "quiet", "verbose")
    ]
    parts = [f"## {line}", sentence(parser.description or ""), f"```text\n{usage}\n```"]
    if rows:
        parts.append("\n".join(["| argument | meaning |", "|---|---|", *rows]))
    if of := getattr(parser, "fields", ""):
        parts += ["Fields, `key=value`:", fields_of(*of.split(":"))]
    if parser.epilog:
        parts.append(f"```text\n{parser.epilog.strip()}\n```")
    return "\n\n".join(part for part in parts if part)


def row(action: argparse.Action) -> str:
    """An argument: how it is written, and its help with the default filled in."""
    choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else ""
    shown = action.metavar if isinstance(action.metavar, str) else choices or action.dest.upper()
    spelled = [f"`{name}`" if action.nargs == 0 else f"`{name} {shown}`" for name in action.option_strings] or [f"`{shown}`"]
    told = cell((action.help or "") % {"default": action.default, "prog": "actial"})
    needed = " Needed." if action.option_strings and action.required else ""
    return f"| {cell(', '.join(spelled))} | {told}{needed} |"


def sentence(text: str) -> str:
    """Text as a sentence."""
    text = text.strip()
    return cell(text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")) if text else ""

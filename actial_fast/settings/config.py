"""YAML onto frozen dataclasses, with overrides, errors that name the nearest valid key, and a printout of every field.

A recipe file is one mapping. Its `kind` says which dataclass it fills (sft, grpo, quickstart); each other key is a field, nested
mappings are nested dataclasses. Every field carries a docstring, which `actial recipe show` prints beside its value and default.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib
import inspect
import itertools
import math
import re
import textwrap
import types
import typing
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

RECIPES = {  # kind -> where its dataclass lives: imported on first use, because the quickstart's pulls in the renderer and the builder
    "sft": "actial_fast.settings.recipe:SFTRecipe",
    "grpo": "actial_fast.settings.recipe:GRPORecipe",
    "quickstart": "actial_fast.quickstart:QuickstartRecipe",
}


SWITCHES = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}


def recipe_class(kind: str) -> type:
    """The dataclass of a recipe kind; ValueError names the known kinds."""
    if kind not in RECIPES:
        raise ValueError(f"kind: {kind!r} is not a recipe kind; expected one of {', '.join(RECIPES)}")
    module, _, name = RECIPES[kind].partition(":")
    return getattr(importlib.import_module(module), name)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Any:
    """The recipe in a YAML file with `key.sub=value` overrides applied (values are YAML too; 0, 1, ... index lists).

    Raises ValueError for a file that is no recipe, an unknown key (naming the nearest valid one), a value of the wrong type or outside
    its range, and a malformed override.
    """
    path = Path(path)
    if not path.exists() and path.parent == Path("recipes"):  # outside of the repository: those that ship
        path = Path(__file__).parents[1] / path
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader) or {}
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
        if key.partition(".")[0] not in full and (longer := [path for path in _paths(full) if path.endswith(f".{key}")]):
            raise ValueError(f"override {override!r}: no such field here; did you mean {' or '.join(map(repr, longer[:3]))}?")
        try:
            value = yaml.load(text, Loader=_Loader) if text else ""
        except yaml.YAMLError as error:
            raise ValueError(f"override {override!r}: the value is not valid YAML: {_one_line(error)}") from None
        _assign(full, key.split("."), value, override)
    return from_dict(cls, full)


def _paths(tree: Any, where: str = "") -> Iterator[str]:
    """Every field of a mapping of mappings, by its path."""
    for key, value in tree.items() if isinstance(tree, dict) else ():
        yield _join(where, key)
        yield from _paths(value, _join(where, key))


def _assign(target: Any, keys: list[str], value: Any, override: str) -> None:
    for i, key in enumerate(keys):
        at: str | int = key
        if isinstance(target, list):
            if not key.isdecimal() or int(key) >= len(target):
                holds = f"has {len(target)} entries, counted from 0" if target else "is empty; give the whole list"
                raise ValueError(f"override {override!r}: {key!r} is not an entry, {'.'.join(keys[:i])} {holds}")
            at = int(key)
        elif not isinstance(target, dict):
            raise ValueError(f"override {override!r}: {'.'.join(keys[:i])} holds a value, not fields")
        if i + 1 == len(keys):
            target[at] = value
        elif isinstance(target, dict):
            target = target.setdefault(at, {})  # an unknown key is reported with the nearest one by from_dict
        else:
            target = target[at]


def from_dict(cls: type, raw: Any, where: str = "", base: Any = None) -> Any:
    """An instance of dataclass `cls` from plain mappings and lists; ValueError names the field at fault and what it takes.

    base: an instance that gives the fields which are not in `raw`; None takes their defaults. A part is based on what it would be without.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"{where or cls.__name__}: expected a mapping of {cls.__name__}'s fields, got {raw!r}")
    hints = _hints(cls)
    for key in raw:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)  # silent below a likeness of 0.6
            hint = f"; did you mean {_join(where, near[0])!r}?" if near else "."
            raise ValueError(f"{_join(where, key)}: unknown key{hint} Valid: {', '.join(hints)}")
    without = {field.name: _default(field) if base is None else getattr(base, field.name) for field in dataclasses.fields(cls)}
    values = {key: _convert(hints[key], value, _join(where, key), without[key]) for key, value in raw.items()}
    for name, value in without.items():
        if name not in values and value is dataclasses.MISSING:
            raise ValueError(f"{_join(where, name)}: missing; {field_docs(cls).get(name, 'it has no default')}")
    try:
        return cls(**{**without, **values})
    except ValueError as error:  # what its __post_init__ says about its fields
        raise ValueError(_join(where, error)) from None


def _convert(hint: Any, value: Any, where: str, base: Any = None) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where, base if isinstance(base, hint) else None)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{where}: {value!r} is not one of {', '.join(map(str, args))}")
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where, base)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where}: expected a list, got {value!r}")
        if args[-1] is Ellipsis:
            return tuple(_convert(args[0], v, f"{where}.{i}") for i, v in enumerate(value))
        if len(value) != len(args):
            raise ValueError(f"{where}: expected {len(args)} values, got {len(value)}")
        return tuple(_convert(a, v, f"{where}.{i}") for i, (a, v) in enumerate(zip(args, value, strict=True)))
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ValueError(f"{where}: must be a finite number, got {value}")
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():  # 1e3
        return int(value)
    if hint is bool and isinstance(value, str) and value.lower() in SWITCHES:  # YAML 1.1's words, and Python's
        return SWITCHES[value.lower()]
    if hint is str and isinstance(value, str) and value.startswith("~/"):  # only a path begins so
        return str(Path(value).expanduser())
    if hint is Path and isinstance(value, str):
        return Path(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        quote = f"; for the text, write '\"{value}\"'" if hint is str and isinstance(value, int | float) else ""
        got = "nothing" if value is None else repr(value)
        raise ValueError(f"{where}: expected {hint.__name__}, got {got}{quote}")
    return value


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _default(field: dataclasses.Field[Any]) -> Any:
    """The field's default value; dataclasses.MISSING when it must be given."""
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """The docstring that follows each field in the source of dataclass `cls`."""
    definition = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for node, after in itertools.pairwise(definition.body):
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            assert isinstance(node.target, ast.Name)  # a field is a plain name
            docs[node.target.id] = " ".join(str(after.value.value).split())
    return docs


def describe(recipe: Any, where: str = "", default: Any = None) -> Iterator[tuple[str, Any, Any, str]]:
    """(key, value, default, docstring) of every leaf field, depth first; nested dataclasses are expanded.

    default: an instance to take the defaults from (a part's may differ from its class's); None takes the fields' own, and
    dataclasses.MISSING stands for a field that must be given.
    """
    cls: type = type(recipe)
    docs = field_docs(cls)
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

    yaml_implicit_resolvers: typing.ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}


class _Loader(_Scalars, yaml.SafeLoader):
    """SafeLoader with these scalars, and with an error for a key that stands twice in one mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
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

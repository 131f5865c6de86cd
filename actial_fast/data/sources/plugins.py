"""Finding what a recipe names: something that ships, something that an installed package offers, or module:object from the import path."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any


def find(what: str, name: str, shipped: Mapping[str, str]) -> Any:
    """The object behind a name.

    what: task, reward or format, for messages and for the packages' entry points, whose group is actial_fast.tasks, .rewards or .formats;
    shipped: names of what ships here, as module:object, imported on first use. ValueError when there is none, or it cannot be imported.
    """
    place = shipped.get(name, name)
    if ":" not in place:
        found = {point.name: point for point in entry_points(group=f"actial_fast.{what}s")}
        if name not in found:
            known = ", ".join([*shipped, *sorted(found)])
            raise ValueError(f"unknown {what} {name!r}; use {known}, or module:object for your own")
        place = found[name].value
    module, _, path = place.partition(":")
    if not (module and path):
        raise ValueError(f"{what} {name!r}: expected module:object, for example my_tasks:counting")
    try:
        value: Any = importlib.import_module(module)
        for part in path.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{what} {name!r} cannot be imported ({error}); is the module on PYTHONPATH?") from error
    except Exception as error:
        raise ValueError(f"{what} {name!r} cannot be imported: its module raises {type(error).__name__}: {error}") from error
    return value

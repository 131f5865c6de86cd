"""Figures made of scores: by category, over all, averages of averages, and products over groups of items that count as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

from actial_fast.evaluation.items import Figure, Item, Metric

Key = Callable[[Item], str]


def category(item: Item) -> str:
    """The item's category: what figures are told by unless a set says otherwise."""
    return item.category


def meta(name: str) -> Key:
    """What the item's meta has under a name, as text; '' where it has none."""
    return lambda item: str(item.meta.get(name, ""))


def together(*metrics: Metric) -> Metric:
    """All figures of several metrics, in their order; ValueError for no items, or not one score each."""

    def figures(items: Sequence[Item], scores: Sequence[float]) -> list[Figure]:
        if not items or len(items) != len(scores):
            raise ValueError(f"figures: {len(items)} items and {len(scores)} scores; there must be one score for each of at least one item")
        return [figure for metric in metrics for figure in metric(items, scores)]

    return figures


def micro(name: str = "accuracy", where: Key | None = None) -> Metric:
    """The mean over all items; where: over those alone for which it says something."""

    def figures(items: Sequence[Item], scores: Sequence[float]) -> list[Figure]:
        kept = [score for item, score in zip(items, scores, strict=True) if where is None or where(item)]
        return [Figure(name, sum(kept) / len(kept), len(kept))] if kept else []

    return figures


def each(key: Key = category, name: str = "{}", order: Sequence[str] = ()) -> Metric:
    """A mean for each value of a key, in the order given, the others behind it by name; items without are left out."""

    def figures(items: Sequence[Item], scores: Sequence[float]) -> list[Figure]:
        by_key = _by(key, items, scores)
        known = [value for value in order if value in by_key] + sorted(set(by_key) - set(order))
        return [Figure(name.format(value), sum(by_key[value]) / len(by_key[value]), len(by_key[value])) for value in known]

    return figures


def macro(name: str = "mean of categories", key: Key = category) -> Metric:
    """The mean of the categories' means, each of the same weight."""

    def figures(items: Sequence[Item], scores: Sequence[float]) -> list[Figure]:
        by_key = _by(key, items, scores)
        means = [sum(found) / len(found) for found in by_key.values()]
        return [Figure(name, sum(means) / len(means), sum(map(len, by_key.values())))] if means else []

    return figures


@dataclass(frozen=True)
class Mean:
    """The mean of parts, each a value of a key or a mean of its own: average(Mean("a", Mean("b", "c"))) is (a + (b + c) / 2) / 2."""

    parts: tuple[str | Mean, ...]

    def __init__(self, *parts: str | Mean) -> None:
        object.__setattr__(self, "parts", parts)


def average(name: str, of: Mean, key: Key = category) -> Metric:
    """A mean of means; left out where a part has no items, because it would be another figure."""

    def figures(items: Sequence[Item], scores: Sequence[float]) -> list[Figure]:
        by_key = _by(key, items, scores)

        def value(part: str | Mean) -> tuple[float, int] | None:
            if isinstance(part, str):
                found = by_key.get(part)
                return (sum(found) / len(found), len(found)) if found else None
            inner = [value(each) for each in part.parts]
            known = [each for each in inner if each is not None]
            return (sum(v for v, _ in known) / len(known), sum(n for _, n in known)) if len(known) == len(inner) else None

        whole = value(of)
        return [Figure(name, *whole)] if whole else []

    return figures


def products(name: str, group: Key, by: Key | None = None) -> Metric:
    """Groups of items that are right only if all of them are: the mean over groups of the product of their scores.

    group: what the items of a group share; '' is a group of its own. by: also one figure for each value of this key, of a group's first
    item, called "name: value"."""

    def figures(items: Sequence[Item], scores: Sequence[float]) -> list[Figure]:
        groups: dict[tuple[str, int], list[float]] = {}
        values: dict[tuple[str, int], str] = {}
        for n, (item, score) in enumerate(zip(items, scores, strict=True)):
            key = (group(item), 0) if group(item) else ("", n + 1)
            groups.setdefault(key, []).append(score)
            values.setdefault(key, by(item) if by else "")
        found = []
        for value in [*sorted(set(values.values()) - {""}), None]:
            kept = [scored for key, scored in groups.items() if value is None or values[key] == value]
            title = name if value is None else f"{name}: {value}"
            found.append(Figure(title, sum(map(prod, kept)) / len(kept), sum(map(len, kept)), len(kept)))
        return found

    return figures


def _by(key: Key, items: Sequence[Item], scores: Sequence[float]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for item, score in zip(items, scores, strict=True):
        if value := key(item):
            found.setdefault(value, []).append(score)
    return found

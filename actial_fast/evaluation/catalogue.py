"""The benchmarks by name, and any file as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from actial_fast.data.sources.source import SourceConfig, open_source
from actial_fast.evaluation.figures import each, macro, micro, products, together
from actial_fast.evaluation.items import BenchmarkSet, Figure, Item, Items, Metric, Opened
from actial_fast.evaluation.records import opener
from actial_fast.evaluation.rows import row_items
from actial_fast.evaluation.sets.all_angles import ALL_ANGLES
from actial_fast.evaluation.sets.blink import BLINK
from actial_fast.evaluation.sets.cv_bench import CV_BENCH
from actial_fast.evaluation.sets.mindcube import MINDCUBE, MINDCUBE_FULL
from actial_fast.evaluation.sets.mmsi import MMSI, MMSI_CIRCULAR
from actial_fast.evaluation.sets.sat import SAT
from actial_fast.evaluation.sets.spatialscore import SPATIALSCORE
from actial_fast.evaluation.sets.threedsr import THREEDSR
from actial_fast.evaluation.sets.viewpoint import STRATA, VIEWPOINT, VIEWPOINT_100K
from actial_fast.evaluation.sets.viewspatial import VIEWSPATIAL
from actial_fast.evaluation.sets.vsi import VSI
from actial_fast.evaluation.specs import benchmark, own_prompt, vlmevalkit

SETS = (
    VIEWPOINT,
    VIEWPOINT_100K,
    BLINK,
    CV_BENCH,
    THREEDSR,
    MMSI,
    MMSI_CIRCULAR,
    SAT,
    VIEWSPATIAL,
    SPATIALSCORE,
    VSI,
    MINDCUBE,
    MINDCUBE_FULL,
    ALL_ANGLES,
)
TABLES = (".tsv", ".csv")


def all_sets() -> tuple[BenchmarkSet, ...]:
    """Every benchmark there is a spec for."""
    return SETS


def find(name: str) -> BenchmarkSet:
    """The benchmark of this name, in any case, with or without its dashes; ValueError for one that there is no spec for."""
    plain = name.lower().replace("-", "").replace("_", "")
    found = next((each for each in SETS if each.name.replace("-", "") == plain), None)
    if found is None:
        raise ValueError(f"no benchmark {name!r}; there are {', '.join(each.name for each in SETS)}, and any file is one")
    return found


def open_set(what: str, format: str = "auto") -> Opened:
    """A benchmark by its name (the copy on this machine), as NAME=PATH (the file or folder of one), or any file by its path.

    A file is VLMEvalKit's table (.tsv, .csv), or rows of any format that `actial data` reads (format: one of them, where the file does not
    tell). Raises ValueError when there is no such set or file, or it cannot be read."""
    name, equals, path = what.partition("=")
    if equals and not Path(what).exists():
        of = find(name)
        return Opened(of, of.open(Path(path).expanduser()))
    file = Path(what).expanduser()
    if file.exists():
        of = file_set(file, format)
        return Opened(of, of.open(file))
    try:
        of = find(what)
    except ValueError as error:
        raise ValueError(f"{error}; {what} is none either (looked from {Path.cwd()})") from None
    return Opened(of, of.open(None))


def file_set(path: Path, format: str = "auto") -> BenchmarkSet:
    """The set that a file is by itself: named after it and its folder, its figures by category, over all and over groups of rotations."""
    name = "/".join((*path.resolve().parts[-2:-1], path.stem))
    figures = together(each(), micro(), _where_several(macro(), lambda item: item.category), *STRATA, _circular)
    if path.suffix.lower() in TABLES:
        return benchmark(name, name, str(path), opener(name, str(path), [vlmevalkit(own_prompt)]), figures, "accuracy")

    def open_rows(of: Path | None) -> Items:
        return row_items(open_source(SourceConfig(str(of or path), format)), of or path)

    return benchmark(name, name, str(path), open_rows, figures, "accuracy")


def _where_several(metric: Metric, key: Callable[[Item], str]) -> Metric:
    """A metric that says nothing of less than two values of a key."""
    return lambda items, scores: metric(items, scores) if len({key(item) for item in items}) > 1 else []


def _circular(items: Sequence[Item], scores: Sequence[float]) -> list[Figure]:
    """The product over groups, where there are groups of more than one item."""
    groups = [item.group for item in items if item.group]
    return products("circular", lambda item: item.group)(items, scores) if len(set(groups)) < len(groups) else []

"""The paper's tables with this project's runs in them: its rows as printed, then ours, "not measured" where no run is.

Source of the shape and of the printed figures: arXiv 2511.01618, Tables 1 and A1 and section A.1 (sets/paper.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from actial_fast.evaluation.catalogue import find
from actial_fast.evaluation.sets.mmsi import TYPES
from actial_fast.evaluation.tables import NOT_MEASURED, NOTHING, Result, Table

Column = tuple[str, str, str]  # its head, the set, the set's figure

TABLE_1: tuple[Column, ...] = (
    ("3DSRBench Avg.", "3dsrbench", "circular"),
    ("Height", "3dsrbench", "circular: height"),
    ("Loc.", "3dsrbench", "circular: location"),
    ("Orient.", "3dsrbench", "circular: orientation"),
    ("Multi.", "3dsrbench", "circular: multi_object"),
    ("CV-Bench Avg.", "cv-bench", "CV-Bench avg (four tasks)"),
    ("Rel.", "cv-bench", "Relation"),
    ("Count", "cv-bench", "Count"),
    ("Dist.", "cv-bench", "Distance"),
    ("Depth", "cv-bench", "Depth"),
    ("BLINK Avg.", "blink", "BLINK avg (three tasks)"),
    ("MultiView", "blink", "Multi-view_Reasoning"),
    ("RelDep", "blink", "Relative_Depth"),
    ("SpRel", "blink", "Spatial_Relation"),
)
TABLE_A1: tuple[Column, ...] = (*((kind, "mmsi", kind) for kind in TYPES), ("Avg.", "mmsi", "accuracy"))
SECTION_A1: tuple[Column, ...] = (
    ("Viewpoint-100K test", "viewpoint-100k", "accuracy"),
    ("our viewpoint test", "viewpoint", "accuracy"),
    ("ego translation", "viewpoint", "ego_translation"),
    ("object translation", "viewpoint", "object_translation"),
    ("ego rotation", "viewpoint", "ego_rotation"),
)
TABLES = (
    ("Table 1: 3DSRBench, CV-Bench, BLINK", TABLE_1),
    ("Table A1: MMSI-Bench", TABLE_A1),
    ("Section A.1: Viewpoint-100K", SECTION_A1),
)


def paper_tables(results: Sequence[Result]) -> list[Table]:
    """The tables with these results of scoring.score, of any sets and models; accuracies in per cent."""
    models = list(dict.fromkeys(result["model"] for result in results))
    by_model = {model: {result["set"]: result for result in results if result["model"] == model} for model in models}
    return [_table(title, columns, by_model) for title, columns in TABLES]


def _table(title: str, columns: Sequence[Column], ours: Mapping[str, Mapping[str, Result]]) -> Table:
    printed: dict[str, list[str]] = {}
    for place, (_, name, figure) in enumerate(columns):
        for model, figures in find(name).published.items():
            row = printed.setdefault(model, [NOTHING] * len(columns))
            if figure in figures:
                row[place] = f"{figures[figure]:.1f}"
    rows = [(f"{model} (published)", *row) for model, row in printed.items()]
    rows += [(model, *(_cell(runs.get(name), figure) for _, name, figure in columns)) for model, runs in ours.items()]
    parts = {
        f"{model}: {result['title']} by {result['n']:,} questions drawn with seed {result['settings']['set.seed']}"
        for model, runs in ours.items()
        for result in runs.values()
        if 0 < result["settings"].get("set.limit", 0) <= result["n"] and result["set"] in {name for _, name, _ in columns}
    }
    return Table(title, ("model", *(head for head, _, _ in columns)), tuple(rows), tuple(sorted(parts)))


def _cell(result: Result | None, figure: str) -> str:
    if result is None:
        return NOT_MEASURED
    found = next((f for f in result["figures"] if f["name"] == figure), None)
    return NOT_MEASURED if found is None else f"{100 * found['value']:.1f}"

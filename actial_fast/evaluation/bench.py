"""`actial bench`: models times sets, each pair a folder of replies with figures and a page of errors."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from actial_fast.data.sources.told import told
from actial_fast.evaluation.identity import identity
from actial_fast.evaluation.items import Extract, Opened
from actial_fast.evaluation.judging import Judge
from actial_fast.evaluation.page import write_errors
from actial_fast.evaluation.replies import Folder
from actial_fast.evaluation.run import Asking, Chosen, agreed, ask, folder_of, prepare
from actial_fast.evaluation.scoring import Result, score
from actial_fast.rollout.engines import open_model, usual_dtype
from actial_fast.settings.model import ModelConfig
from actial_fast.train.dist import World, world
from actial_fast.train.lock import locked
from actial_fast.train.stage import versions
from actial_fast.train.stopping import Stop

PATIENCE = 24 * 60  # minutes that a rank which is done waits for the others' last replies


@dataclass(frozen=True)
class Scoring:
    """How replies become figures. extract: another rule than the sets' own, None for these; extractor: its name. judge: reads what rules
    leave open. errors: replies on each page of errors, 0 for no page."""

    extract: Extract | None = None
    extractor: str = ""
    judge: Judge | None = None
    errors: int = 200


def bench(sets: Sequence[Opened], askings: Sequence[Asking], out: Path, scoring: Scoring) -> list[Result]:
    """Put every set to every model, and return the results on rank 0, an empty list elsewhere; every rank calls.

    Replies that are there already, made with the same settings, are not drawn again; a model is loaded only where some are missing. Raises
    ValueError for what cannot be opened, before any model is loaded, and where a folder holds replies that were made otherwise.
    """
    results: list[Result] = []
    with world(PATIENCE) as where, contextlib.ExitStack() as stack:
        stop = stack.enter_context(Stop(where))
        models = []
        for asking in askings:
            served = asking.engine == "server"
            known = {"path": asking.model, "content": "", "step": None} if served else agreed(where, lambda a=asking: identity(a.model))
            models.append((asking if served else replace(asking, dtype=asking.dtype or usual_dtype(where)), known))
        jobs = [
            (asking, [(opened, *_begin(opened, asking, known, out, where, stack)) for opened in sets]) for asking, known in models
        ]
        for asking, asked in jobs:
            with contextlib.ExitStack() as held:
                missing = agreed(where, lambda a=asked: any(len(f.replies()) < len(c.records) or f.split() for _, f, c in a))
                unanswered: list[dict[str, str]] = [{} for _ in asked]
                if missing:
                    longest = max(asking.longest_of(opened.set) for opened in sets)
                    weights = ModelConfig(path=asking.model, dtype=asking.dtype or "float32", min_pixels=asking.min_pixels, max_pixels=asking.max_pixels)  # type: ignore[arg-type]
                    engine, reader = open_model(weights, asking.rollout, where, held, max_prompt=asking.max_prompt, longest_reply=longest)
                    unanswered = [ask(o, asking, chosen, engine, reader, folder, where, stop) for o, folder, chosen in asked]
                if where.main:
                    for (opened, folder, _), without in zip(asked, unanswered, strict=True):
                        results.append(scored(folder, opened, scoring, without))
        where.barrier()
    told.close()
    return results


def scored(folder: Folder, opened: Opened, scoring: Scoring, unanswered: dict[str, str] | None = None) -> Result:
    """The figures of a folder, with its result.json and its page written."""
    rules = {"extract": scoring.extract, "extractor": scoring.extractor}
    result = score(folder, opened.set, **rules, judge=scoring.judge, unanswered=unanswered)  # type: ignore[arg-type]
    if scoring.errors:
        write_errors(folder, scoring.errors, opened.items)
    return result


def _begin(
    opened: Opened, asking: Asking, known: dict[str, Any], out: Path, where: World, stack: contextlib.ExitStack
) -> tuple[Folder, Chosen]:
    """The run's folder, locked until `stack` ends, and the questions."""
    folder = folder_of(out, opened.set.name, asking.name)

    def begin() -> Chosen:
        stack.enter_context(locked(folder.path))
        return prepare(opened, asking, known, versions(where), folder)

    return folder, agreed(where, begin)

"""`actial bench`: models times sets, each pair a folder of replies with figures and a page of errors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from actial_fast.data.sources.told import told
from actial_fast.evaluation.catalogue import all_sets, file_set, find, open_set
from actial_fast.evaluation.identity import identity
from actial_fast.evaluation.items import BenchmarkSet, Items, Opened
from actial_fast.evaluation.judging import Judge
from actial_fast.evaluation.owners import find_extractor
from actial_fast.evaluation.page import write_errors
from actial_fast.evaluation.replies import Folder
from actial_fast.evaluation.run import Asking, Chosen, agreed, ask, folder_of, prepare
from actial_fast.evaluation.scoring import Result, score
from actial_fast.rollout.engines import open_model, usual_dtype
from actial_fast.rollout.protocol import nobody
from actial_fast.settings.model import ModelConfig
from actial_fast.train.dist import World, world
from actial_fast.train.lock import locked
from actial_fast.train.stage import versions
from actial_fast.train.stopping import Stop

PATIENCE = 24 * 60  # minutes that a rank which is done waits for the others' last replies


@dataclass(frozen=True)
class Scoring:
    """How replies become figures. extractor: what finds the answer in a reply, as owners.find_extractor names it. judge: reads what that
    leaves open. errors: replies on each page of errors, 0 for no page."""

    extractor: str = "rules"
    judge: Judge | None = None
    errors: int = 200


def bench(sets: Mapping[str, Opened], askings: Sequence[Asking], out: Path, scoring: Scoring) -> list[Result]:
    """Put every set to every model, and return the results on rank 0, an empty list elsewhere; every rank calls. sets: by the words that
    catalogue.open_set opens them by.

    Replies that are there already, made with the same settings, are not drawn again; a model is loaded only where some are missing. Raises
    ValueError for what cannot be opened, before any model is loaded, and where a folder holds replies that were made otherwise.
    """
    results: list[Result] = []
    with world(PATIENCE) as where, contextlib.ExitStack() as stack:
        stop = stack.enter_context(Stop(where))
        # all that can be refused is looked at before the first model is loaded
        jobs = [
            (asking, [_begin(given, opened, asking, out, where, stack) for given, opened in sets.items()])
            for asking in _settled(askings, where)
        ]
        for asking, runs in jobs:
            results += _run(asking, runs, scoring, where, stop)
            if stop.agreed():  # while a judge was asked
                raise stop.stopped(f"stopped behind {asking.name}; the same command goes on")
    told.close()
    return results


@dataclass(frozen=True)
class _Run:
    """One set put to one model."""

    opened: Opened
    folder: Folder
    chosen: Chosen

    def missing(self) -> bool:
        """Whether replies are still to be drawn, or to be put together."""
        return len(self.folder.replies()) < len(self.chosen.records) or self.folder.split()


def _settled(askings: Sequence[Asking], where: World) -> list[Asking]:
    """With the dtype of weights that nobody chose."""
    return [a if a.engine == "server" else replace(a, dtype=a.dtype or usual_dtype(where)) for a in askings]


def _begin(given: str, opened: Opened, asking: Asking, out: Path, where: World, stack: contextlib.ExitStack) -> _Run:
    """The run's folder, locked until `stack` ends, and the questions."""
    folder = folder_of(out, opened.set.name, asking.name)

    def begin() -> Chosen:
        known: dict[str, Any] = {"path": asking.model, "content": "", "step": None}
        if asking.engine != "server":
            known = identity(asking.model)
        stack.enter_context(locked(folder.path))
        return prepare(given, opened, asking, known, versions(where), folder)

    return _Run(opened, folder, agreed(where, begin))


def _run(asking: Asking, runs: Sequence[_Run], scoring: Scoring, where: World, stop: Stop) -> list[Result]:
    """Draw what is missing with one model, and the results on rank 0."""
    unanswered: list[dict[str, str]] = [{} for _ in runs]
    if agreed(where, lambda: any(run.missing() for run in runs)):
        weights = ModelConfig(
            path=asking.model, dtype=asking.dtype or "float32", min_pixels=asking.min_pixels, max_pixels=asking.max_pixels
        )
        longest = max(asking.longest_of(run.opened.set) for run in runs)
        with contextlib.ExitStack() as held:
            engine, reader = open_model(weights, asking.rollout, where, held, max_prompt=asking.max_prompt, longest_reply=longest)
            unanswered = [ask(run.opened, asking, run.chosen, engine, reader, run.folder, where, stop) for run in runs]
    if not where.main:
        return []
    drawn = zip(runs, unanswered, strict=True)
    return [scored(run.folder, run.opened.set, run.opened.items, scoring, without, lambda: stop.asked) for run, without in drawn]


def scored(
    folder: Folder,
    benchmark: BenchmarkSet,
    pictures: Items | None,
    scoring: Scoring,
    unanswered: Mapping[str, str] | None = None,
    asked_to_stop: Callable[[], bool] = nobody,
) -> Result:
    """The figures of a folder, with its result.json and its page written. pictures: the set as it was opened, where it is at hand."""
    extract = find_extractor(scoring.extractor, benchmark)
    result = score(
        folder,
        benchmark,
        extract=extract,
        extractor=scoring.extractor,
        judge=scoring.judge,
        unanswered=unanswered,
        asked_to_stop=asked_to_stop,
    )
    if scoring.errors:
        write_errors(folder, scoring.errors, pictures)
    return result


def scored_again(folder: Folder, scoring: Scoring) -> Result:
    """The same of a folder whose set is found by its settings; the set's files need not be there. ValueError while a run has the folder."""
    settings = folder.header().settings
    benchmark, pictures = set_of(settings), None
    if scoring.errors:
        with contextlib.suppress(ValueError, OSError):  # then the page has no pictures
            pictures = open_set(settings["set.given"]).items
    with locked(folder.path):
        return scored(folder, benchmark, pictures, scoring)


def set_of(settings: Mapping[str, Any]) -> BenchmarkSet:
    """The set that a run's settings name."""
    names = [each.name for each in all_sets()]
    return find(settings["set.name"]) if settings["set.name"] in names else file_set(Path(settings["set.path"]))

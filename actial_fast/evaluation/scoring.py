"""From replies on disk to figures: by the set's rules or a user's, without the model, and without the pictures."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

from actial_fast.evaluation.intervals import clusters_of_items, intervals
from actial_fast.evaluation.items import BenchmarkSet, Extract, Item
from actial_fast.evaluation.judging import Judge, readings
from actial_fast.evaluation.replies import RESULT, Folder, Kept
from actial_fast.report.paired import compare
from actial_fast.rollout.protocol import nobody

Result = dict[str, Any]


def score(
    folder: Folder,
    benchmark: BenchmarkSet,
    *,
    extract: Extract | None = None,
    extractor: str = "rules",
    judge: Judge | None = None,
    unanswered: Mapping[str, str] | None = None,
    asked_to_stop: Callable[[], bool] = nobody,
) -> Result:
    """Judge the folder's replies anew, write their verdicts and result.json, and return that.

    extract: another rule than the set's, and extractor: its name, for the record. judge: reads what the rules could not, counted apart;
    asked_to_stop: looked at meanwhile. unanswered: questions that got no reply, and why. A question without a reply is wrong. ValueError
    where there is no reply at all.
    """
    header, items = folder.header(), {item.id: item for item in folder.items()}
    kept = folder.settle(items, lambda reply: reply.judged(benchmark.judge(items[reply.id], reply.text, extract)))
    if not kept:
        why = next(iter((unanswered or {}).values()), "the run has not begun")
        raise ValueError(f"{folder.path}: no reply to score ({why})")
    questions = list(items.values())
    scores = [kept[item.id].score if item.id in kept else 0.0 for item in questions]
    result: Result = {
        "set": header.set,
        "title": benchmark.title,
        "model": header.model,
        "settings": dict(header.settings),
        "versions": list(header.versions),
        "extractor": extractor,
        "n": len(questions),
        "clusters": len(set(clusters_of_items(questions))),
        "missing": len(questions) - len(kept),
        "why_missing": dict(Counter((unanswered or {}).values()).most_common(5)),
        "cut": sum(reply.finish == "length" for reply in kept.values()),
        "unread": sum(not reply.rule for reply in kept.values()),
        "rules": dict(Counter(reply.rule or "none" for reply in kept.values()).most_common()),
        "mean_tokens": sum(reply.tokens for reply in kept.values()) / len(kept),
        "headline": benchmark.headline,
        "figures": _figures(questions, scores, benchmark),
        "published": {model: dict(rows) for model, rows in benchmark.published.items()},
    }
    if judge:
        read = readings(folder, judge, benchmark, items, kept, asked_to_stop)
        judged = [read[item.id].score if item.id in read else mine for item, mine in zip(questions, scores, strict=True)]
        result["judge"] = {
            "url": judge.url,
            "model": judge.model,
            "asked": sum(not reply.rule and bool(reply.text.strip()) for reply in kept.values()),
            "read": sum(bool(verdict.rule) for verdict in read.values()),
            "right": sum(verdict.score == 1 for verdict in read.values()),
            "figures": _figures(questions, judged, benchmark),
        }
    (folder.path / RESULT).write_text(json.dumps(result, indent=1))
    return result


def _figures(items: Sequence[Item], scores: Sequence[float], benchmark: BenchmarkSet) -> list[Result]:
    """Each figure with its interval, and what guessing and the most frequent answer would give."""
    chance = {f.name: f.value for f in benchmark.figures(items, [guess(item) for item in items])}
    usual = {f.name: f.value for f in benchmark.figures(items, majority(items))}
    return [
        {
            "name": figure.name,
            "value": figure.value,
            "low": low,
            "high": high,
            "n": figure.n,
            "groups": figure.groups,
            "chance": chance[figure.name],
            "majority": usual[figure.name],
        }
        for figure, low, high in intervals(items, scores, benchmark.figures)
    ]


def guess(item: Item) -> float:
    """The score of a uniform guess among the options; 0 for an open question."""
    if item.options:
        return 1 / len(item.options)
    return 0.5 if item.form == "yes-no" else 0.0


def majority(items: Sequence[Item]) -> list[float]:
    """The scores of always giving the most frequent answer of a category, told by its text: letters are shuffled. (n,)"""
    texts = [_answer_text(item) for item in items]
    counts: dict[str, Counter[str]] = {}
    for item, text in zip(items, texts, strict=True):
        counts.setdefault(item.category, Counter())[text] += 1
    return [float(text == counts[item.category].most_common(1)[0][0]) for item, text in zip(items, texts, strict=True)]


def _answer_text(item: Item) -> str:
    place = ord(item.answer) - ord("A") if item.form == "letter" and len(item.answer) == 1 else -1
    return " ".join((item.options[place] if 0 <= place < len(item.options) else item.answer).casefold().split())


def comparisons(folders: Sequence[Folder]) -> list[Result]:
    """Every two of these runs of one set, compared on the questions that both were asked: the second against the first."""
    told = []
    for first, second in combinations(folders, 2):
        if first.header().set != second.header().set:
            continue
        items = {item.id: item for item in first.items()}
        common = [name for name in items if name in {item.id for item in second.items()}]
        if not common:
            continue
        one, other = ([_score_of(name, kept) for name in common] for kept in (first.replies(), second.replies()))
        paired = compare(one, other, clusters_of_items([items[name] for name in common]))
        told.append({"set": first.header().set, "first": first.header().model, "second": second.header().model, **vars(paired)})
    return told


def _score_of(name: str, kept: Mapping[str, Kept]) -> float:
    return kept[name].score if name in kept else 0.0

"""Leak probes: how often is a small model right that sees one part of a question only?

    text      the question and its options, no picture: which letter
    image 1   the first picture, squeezed to 16 x 16 pixels: where the camera will go, which way it will turn
    image 2   the second one
    names     the places of the two files' names among their object's: no model is shown them, but whoever sorts by name would learn this
    order     the answers to the pair before, and the place in the file

Each is fitted on two thirds of a built set's objects and asked about the others, three times over. What is better than chance is a
shortcut, which a large model finds too. Chance is always giving the most frequent answer; of text, a guess among the options printed.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actial_fast.data.captures.questions import KINDS, LETTERS, OPPOSITE
from actial_fast.data.captures.settings import ViewpointConfig
from actial_fast.data.sources.picture import thumbnail

ASKED = ("ego_translation", "ego_rotation")  # what the object sees is the mirror of the first
NOT_INSTALLED = "scikit-learn is not installed: pip install 'actial-fast[probes]'"
SIDE = 16  # pixels
MOST_PAIRS = 6000  # that are looked at
FOLDS = 3
RARE = 10  # pairs of a move and a turn, of which fewer teach nothing
FEWEST_OBJECTS, FEWEST_PAIRS = 30, 200  # with fewer, chance itself is off by as much as a leak


@dataclass(frozen=True)
class _Pair:
    """One pair of a built set as a probe gets it. texts, letters: of its rows. place: of the pair in its file, in [0, 1]. before: the
    answers to the pair before it there."""

    object: str
    images: tuple[Path, Path]
    answers: tuple[str, str]
    texts: tuple[str, ...]
    letters: tuple[str, ...]
    place: float
    before: tuple[str, str]


def leak_report(out: Path, config: ViewpointConfig) -> tuple[dict[str, Any], list[str]]:
    """What the probes found in out/train.jsonl and out/test.jsonl, for build.json, and a sentence for each leak above config.max_leak.

    {"pairs", "objects", PROBE: {KIND: {"accuracy", "chance", "error", and of pairs with a side "side", "side_chance"}}}; per cent, `error`
    being two standard errors that count objects. {"skipped": why} where they were not run."""
    if not config.probes:
        return {"skipped": "probes=false"}, []
    if importlib.util.find_spec("sklearn") is None:
        return {"skipped": NOT_INSTALLED}, []
    pairs = _sample(_pairs(out), config.seed)
    objects = len({pair.object for pair in pairs})
    if objects < FEWEST_OBJECTS or len(pairs) < FEWEST_PAIRS:
        few = f"{len(pairs)} pairs of {objects} objects say nothing for sure; {FEWEST_PAIRS} of {FEWEST_OBJECTS} are needed"
        return {"skipped": few}, []
    report: dict[str, Any] = {"pairs": len(pairs), "objects": objects, "text": _text(pairs, config.seed)}
    looks: dict[str, Callable[[_Pair], np.ndarray]] = {
        "image 1": lambda pair: _pixels(pair.images[0]),
        "image 2": lambda pair: _pixels(pair.images[1]),
        "names": _ranks(pairs),
        "order": lambda pair: np.array([pair.place, *(answer == side for answer in pair.before for side in OPPOSITE)], float),
    }
    for name, look in looks.items():
        seen = np.stack([look(pair) for pair in pairs])
        report[name] = _answers(pairs, seen, _network if name.startswith("image") else _trees, config.seed)
    _pixels.cache_clear()
    return report, _warnings(report, config.max_leak)


def _warnings(report: dict[str, Any], most: float) -> list[str]:
    """A sentence for each probe, but that of the names, that is further above chance than `most` points, and than chance explains."""
    out = []
    for name in ("text", "image 1", "image 2", "order"):
        for kind, found in report[name].items():
            above = found["accuracy"] - found["chance"]
            if above > max(most, found["error"]):
                out.append(
                    f"{name} alone: {kind} is right in {found['accuracy']}%, by chance {found['chance']}% (max_leak={most:g} points)"
                )
    return out


def _pairs(out: Path) -> list[_Pair]:
    pairs = []
    for name in ("train", "test"):
        with open(out / f"{name}.jsonl", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        before = ("", "")
        for at in range(0, len(rows) - len(KINDS) + 1, len(KINDS)):
            trio = rows[at : at + len(KINDS)]
            meta = trio[0]["meta"]
            answers = (meta[ASKED[0]], meta[ASKED[1]])
            texts = tuple(row["messages"][0]["content"] for row in trio)
            images = (out / trio[0]["images"][0], out / trio[0]["images"][1])
            pairs.append(_Pair(meta["object"], images, answers, texts, tuple(row["truth"] for row in trio), at / len(rows), before))
            before = answers
    return pairs


def _sample(pairs: list[_Pair], seed: int) -> list[_Pair]:
    """At most MOST_PAIRS, of as many objects as possible."""
    draw = random.Random(f"{seed}/probes")
    of: dict[str, list[_Pair]] = {}
    for pair in draw.sample(pairs, len(pairs)):
        of.setdefault(pair.object, []).append(pair)
    rounds = max(map(len, of.values()), default=0)
    return [found[r] for r in range(rounds) for found in of.values() if r < len(found)][:MOST_PAIRS]


@functools.lru_cache(maxsize=2 * MOST_PAIRS)
def _pixels(image: Path) -> np.ndarray:
    return thumbnail(image, str(image), SIDE).reshape(-1) / np.float32(255)


def _ranks(pairs: Sequence[_Pair]) -> Callable[[_Pair], np.ndarray]:
    names: dict[str, set[str]] = {}
    for pair in pairs:
        names.setdefault(pair.object, set()).update(image.name for image in pair.images)
    places = {key: {name: k / len(found) for k, name in enumerate(sorted(found))} for key, found in names.items()}

    def look(pair: _Pair) -> np.ndarray:
        one, two = (places[pair.object][image.name] for image in pair.images)
        return np.array([one, two, two - one])

    return look


def _network(seed: int) -> Any:
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), MLPClassifier((64,), alpha=1e-2, early_stopping=True, max_iter=60, random_state=seed))


def _trees(seed: int) -> Any:
    from sklearn.ensemble import RandomForestClassifier

    return RandomForestClassifier(100, min_samples_leaf=10, random_state=seed)


def _answers(pairs: Sequence[_Pair], seen: np.ndarray, model: Callable[[int], Any], seed: int) -> dict[str, Any]:
    """What a model that is shown `seen` (N, features) says of the move and the turn, both told at once."""
    cells = np.array(["/".join(pair.answers) for pair in pairs])
    names = np.unique(cells)
    scores = np.zeros((len(pairs), len(names)))
    for here, rest in _folds(pairs, seed):
        common = [name for name in names if (cells[rest] == name).sum() >= RARE]
        rest = rest[np.isin(cells[rest], common)]
        if len(common) < 2:  # there is nothing to tell apart
            scores[here, np.searchsorted(names, common[:1])] = 1
            continue
        fitted = model(seed).fit(seen[rest], cells[rest])
        scores[np.ix_(here, np.searchsorted(names, fitted.classes_))] = fitted.predict_proba(seen[here])
    report = {}
    for k, kind in enumerate(ASKED):
        truth = np.array([pair.answers[k] for pair in pairs])
        options = np.unique(truth)
        each = np.stack([scores[:, [name.split("/")[k] == option for name in names]].sum(1) for option in options], 1)
        report[kind] = _figures(pairs, options[each.argmax(1)] == truth, _majority(truth))
        sided = np.isin(truth, list(OPPOSITE))
        if sided.any() and len(options) == len(OPPOSITE) + 1:
            two = np.isin(options, list(OPPOSITE))
            right = options[two][each[:, two].argmax(1)] == truth
            report[kind] |= {"side": _per_cent(right[sided].mean()), "side_chance": _majority(truth[sided])}
    return report


def _text(pairs: Sequence[_Pair], seed: int) -> dict[str, Any]:
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    right = np.zeros((len(pairs), len(KINDS)), bool)
    for k in range(len(KINDS)):
        texts, letters = [pair.texts[k] for pair in pairs], np.array([pair.letters[k] for pair in pairs])
        for here, rest in _folds(pairs, seed):
            if len(np.unique(letters[rest])) < 2:
                right[here, k] = letters[here] == letters[rest][0]
                continue
            counted = CountVectorizer(token_pattern=r"\S+", ngram_range=(1, 3), min_df=3, lowercase=False)
            fitted = make_pipeline(counted, LogisticRegression(max_iter=500)).fit([texts[n] for n in rest], letters[rest])
            right[here, k] = fitted.predict([texts[n] for n in here]) == letters[here]
    return {kind: _figures(pairs, right[:, k], _per_cent(1 / len(LETTERS))) for k, kind in enumerate(KINDS)}


def _folds(pairs: Sequence[_Pair], seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each third of the objects: the numbers of its pairs, and of all others."""
    objects = sorted({pair.object for pair in pairs})
    random.Random(f"{seed}/folds").shuffle(objects)
    fold = {name: k % FOLDS for k, name in enumerate(objects)}
    of = np.array([fold[pair.object] for pair in pairs])
    return [(np.flatnonzero(of == k), np.flatnonzero(of != k)) for k in range(FOLDS)]


def _figures(pairs: Sequence[_Pair], right: np.ndarray, chance: float) -> dict[str, float]:
    off: dict[str, float] = {}
    for pair, each in zip(pairs, right - right.mean(), strict=True):
        off[pair.object] = off.get(pair.object, 0.0) + float(each)
    error = 2 * np.sqrt(sum(each**2 for each in off.values())) / len(pairs)
    return {"accuracy": _per_cent(right.mean()), "chance": chance, "error": _per_cent(error)}


def _majority(truth: np.ndarray) -> float:
    return _per_cent(np.unique(truth, return_counts=True)[1].max() / len(truth))


def _per_cent(share: float) -> float:
    return round(100 * float(share), 1)

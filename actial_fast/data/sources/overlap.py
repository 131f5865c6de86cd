"""What two sources have in common: rows, images or objects. An evaluation on what was trained on says little, and should say so."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from actial_fast.data.sources.row import BadRow
from actial_fast.data.sources.source import SourceConfig, View, open_source

MOST = 200_000  # rows of a source that are looked at
ASKED = ("messages", "conversations", "prompt", "question", "problem")
ANSWERED = ("truth", "correct_answer", "answer", "reward_model")


@dataclass(frozen=True)
class Prints:
    """A source's rows by what tells them apart: digests of (question, images) and of these with the answer, the images, the objects."""

    asked: list[bytes]
    whole: list[bytes]
    images: list[frozenset[Any]]
    objects: frozenset[str]


def overlaps(trained: Sequence[SourceConfig], held: Iterable[tuple[str, SourceConfig]]) -> Iterator[str]:
    """One line for each pair of training sources with rows in common, and for each evaluation source that has rows, images or objects of
    a training source. held: with the key that names each. ValueError where a source cannot be opened."""
    opened = [(source.path, _prints(open_source(source))) for source in trained]
    for k, (path, prints) in enumerate(opened):
        for other, others in opened[:k]:
            known = set(others.whole)
            if count := sum(one in known for one in prints.whole):
                yield f"data.sources: {count} of {len(prints.whole)} rows of {path} are in {other} as well"
    for key, source in held:
        prints = _prints(open_source(source))
        rows = len(prints.asked)
        for path, others in opened:
            known, shown = set(others.asked), frozenset().union(*others.images)
            same = sum(one in known for one in prints.asked)
            seen = sum(bool(one & shown) for one in prints.images)
            objects = prints.objects & others.objects
            if same:
                yield f"{key}: {same} of {rows} rows of {source.path} are trained on, in {path}"
            elif seen:
                yield f"{key}: {seen} of {rows} rows of {source.path} show images that {path}, which is trained on, shows too"
            elif objects:
                yield (
                    f"{key}: {len(objects)} of {len(prints.objects)} objects of {source.path} are objects of {path}, which is "
                    f"trained on: {sorted(objects)[0]}, ..."
                )


def _prints(view: View) -> Prints:
    asked, whole, images, objects = [], [], [], set()
    for place in view.indices[:MOST].tolist():
        try:
            values = view.source.records.some(place, (*ASKED, *ANSWERED, "meta"))
            shown = view.source.pictures(place)
        except BadRow:  # its own error, once it is drawn
            continue
        question, answer = _parts(values)
        asked.append(_digest(question, shown))
        whole.append(_digest(question, shown, answer))
        images.append(frozenset(shown))
        meta = values.get("meta")
        if isinstance(meta, dict) and isinstance(meta.get("object"), str):
            objects.add(meta["object"])
    return Prints(asked, whole, images, frozenset(objects))


def _parts(values: dict[str, Any]) -> tuple[Any, Any]:
    """What a record asks and what it answers."""
    said = next((values[key] for key in ASKED if values.get(key)), "")
    if isinstance(said, list):
        ours = [message for message in said if isinstance(message, dict)]
        answers = [message for message in ours if message.get("role", message.get("from")) in ("assistant", "gpt")]
        return [message for message in ours if message not in answers], [answers, [values.get(key) for key in ANSWERED]]
    return said, [values.get(key) for key in ANSWERED]


def _digest(*parts: Any) -> bytes:
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode("utf-8", "surrogatepass"), digest_size=12).digest()

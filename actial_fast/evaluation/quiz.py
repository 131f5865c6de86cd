"""A human baseline: questions of a set as a page for people, and their downloaded answers as a run like a model's.

FOLDER/quiz.html is what people get; FOLDER/quiz.json has the truths, and stays with whoever scores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from actial_fast.data.sources.row import IMAGE_TAG
from actial_fast.evaluation.export import stem
from actial_fast.evaluation.items import Items, Opened
from actial_fast.evaluation.replies import REPLIES, Folder, Kept, append
from actial_fast.evaluation.run import choose, folder_of
from actial_fast.report.quiz import Asked, quiz_page

PAGE, KEY = "quiz.html", "quiz.json"


def write_quiz(given: str, opened: Opened, folder: Path, count: int, seed: int, on_bad_row: str = "error") -> int:
    """Write the page and the key of `count` questions, drawn by the seed (a few more where whole groups are drawn); return their number.
    given: what opens the set again."""
    chosen = choose(opened.items, count, seed, on_bad_row)
    digest = f"{chosen.digest[:12]}-{seed}-{len(chosen.records)}"
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "set.name": opened.set.name,
        "set.given": given,
        "set.path": str(opened.items.path.resolve()),
        "set.content": chosen.digest,
        "set.limit": count,
        "set.seed": seed,
    }
    questions = [_asked(opened.items, record) for record in chosen.records]
    (folder / PAGE).write_text(
        quiz_page(f"{opened.set.title}: {len(questions)} questions", opened.set.name, digest, questions), encoding="utf-8"
    )
    (folder / KEY).write_text(json.dumps({"quiz": digest, "settings": settings, "records": chosen.records}, default=str))
    return len(questions)


def answers_to(answers: Path, quiz: Path, out: Path) -> Folder:
    """Somebody's answers as a run below `out`, to be scored. quiz: the quiz's folder.

    ValueError where the file holds no answers, or to another quiz. Answering again under the same name replaces the answers.
    """
    try:
        told = json.loads(answers.read_text())
        given, who = dict(told["answers"]), str(told["who"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{answers}: not the answers of a quiz ({error!r}); download them from its page") from None
    if not (quiz / KEY).exists():
        raise ValueError(f"{quiz}: no {KEY}; give the folder that `actial bench quiz` wrote as --quiz")
    key = json.loads((quiz / KEY).read_text())
    if told.get("quiz") != key["quiz"]:
        raise ValueError(f"{answers}: answers to the quiz {told.get('quiz')}, and {quiz} holds {key['quiz']}")
    settings = {**key["settings"], "model.name": who, "engine": "human"}
    folder = folder_of(out, settings["set.name"], f"human-{who}")
    (folder.path / REPLIES).unlink(missing_ok=True)
    folder.begin(settings, {}, key["records"])
    names = [record["id"] for record in key["records"]]
    append(folder.path / REPLIES, (asdict(Kept(i, str(given[i]), None, 0.0, "", 0, "stop")) for i in names if i in given))
    return folder


def _asked(items: Items, record: Mapping[str, Any]) -> Asked:
    item = items[record["index"]]
    choices: tuple[tuple[str, str, str], ...] = ()
    lettered = list(zip(ascii_uppercase, item.options, strict=False))
    if item.form in ("letter", "option") and item.options:
        choices = tuple((letter, letter if item.form == "letter" else text, f"{letter}. {text}") for letter, text in lettered)
    elif item.form == "yes-no":
        choices = (("Y", "yes", "Yes"), ("N", "no", "No"))
    question = stem(item) if choices or not item.options else item.prompt.replace(IMAGE_TAG, "").strip()
    return Asked(record["id"], question, item.images, choices)

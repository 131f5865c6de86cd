"""Which replies of a run are looked at, for report/errors.py."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

from actial_fast.data.sources.row import IMAGE_TAG, BadRow
from actial_fast.evaluation.items import Item, Items
from actial_fast.evaluation.replies import ERRORS, Folder, Kept
from actial_fast.report.errors import Looked, errors_page

LONGEST = 8000  # characters of a reply's end that are shown


def write_errors(folder: Folder, count: int, pictures: Items | None) -> Path:
    """Write the folder's errors.html, with at most `count` of its wrong replies, drawn evenly; return its path.

    pictures: the set as it was opened, for pictures that are no files; None where it is not at hand.
    """
    items, kept, places = folder.items(), folder.replies(), folder.places()
    wrong = [item for item in items if item.id in kept and kept[item.id].score < 1]
    drawn = sorted(random.Random(0).sample(range(len(wrong)), min(count, len(wrong))))
    header = folder.header()
    shown = [_looked(wrong[k], kept[wrong[k].id], _pictures(wrong[k], places, pictures)) for k in drawn]
    lead = f"{len(shown):,} of {len(wrong):,} replies that are not right, of {len(kept):,} in all."
    if pictures is None and any(IMAGE_TAG in item.prompt and not item.images for item in wrong):
        lead += f" Pictures are not shown: {header.settings['set.given']} is not here."
    path = folder.path / ERRORS
    path.write_text(errors_page(f"{header.set}: {header.model}", lead, shown), encoding="utf-8", errors="replace")
    return path


def _looked(item: Item, reply: Kept, pictures: tuple[Path | bytes, ...]) -> Looked:
    verdict = "part" if reply.score > 0 else "wrong" if reply.rule else "cut" if reply.finish == "length" else "unread"
    return Looked(
        id=item.id,
        category=item.category,
        verdict=verdict,
        question=item.prompt.replace(IMAGE_TAG, "").strip(),
        pictures=pictures,
        truth=truth_of(item),
        read=reply.extracted or "",
        rule=reply.rule,
        reply=reply.text if len(reply.text) <= LONGEST else f"[...] {reply.text[-LONGEST:]}",
    )


def truth_of(item: Item) -> str:
    """The answer, a letter with its option's text."""
    place = item.letters.find(item.answer) if item.form == "letter" else -1
    return f"{item.answer}. {item.options[place]}" if 0 <= place < len(item.options) else item.answer


def _pictures(item: Item, places: Mapping[str, int], opened: Items | None) -> tuple[Path | bytes, ...]:
    if item.images and len(item.images) == item.prompt.count(IMAGE_TAG):
        return item.images
    try:
        found = opened[places[item.id]] if opened is not None else None
    except (BadRow, IndexError):
        found = None
    return found.images if found is not None and found.prompt == item.prompt else ()  # the set may have changed since

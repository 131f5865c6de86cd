"""Rows of the data sources as items of a benchmark: any file that trains can be asked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from string import ascii_uppercase

from actial_fast.data.sources.asked import lettered
from actial_fast.data.sources.row import BadRow, Row
from actial_fast.data.sources.source import SourceConfig, View, open_source
from actial_fast.evaluation.items import Form, Item, Items, Opener
from actial_fast.evaluation.records import find_files
from actial_fast.evaluation.specs import open_answer


def item_of(row: Row, number: int) -> Item:
    """The item of a row; BadRow when it has no truth or its prompt does not end with a question. number: from 1, for rows without an id.

    With options it asks for the letter where the truth is one or the question shows them, else for the option's text. Without, for yes
    or no, a number or a text, as the truth is. meta.group says what rows that are right only together share, meta.cluster (else
    meta.object, else the pictures) what an interval counts as one draw."""
    *before, last = row.prompt
    if last.role != "user":
        raise BadRow(row.where, f"the prompt ends with the {last.role}'s turn, not with a question")
    if not row.truth:
        raise BadRow(row.where, "no truth to compare a reply with")
    shown = lettered(last.content)
    options, form, answer = row.choices or shown, FORM_TEXT, row.truth
    letters = ascii_uppercase[: len(options)]
    if options and len(answer) == 1 and answer.upper() in letters and answer not in options:
        answer, form = answer.upper(), "letter"
    elif answer in options:
        form = "option"
        if len(shown) == len(options):  # they may be shown in other words
            answer, form = letters[options.index(answer)], "letter"
    elif not row.accepted:
        answer, form = open_answer(answer)
    return Item(
        id=row.id or str(number),
        prompt=last.content,
        images=row.images,
        answer=answer,
        options=options,
        category=row.kind,
        group=str(row.meta.get("group") or ""),
        cluster=str(row.meta.get("cluster") or row.meta.get("object") or "") or _pictures(row),
        meta=row.meta,
        form=form,
        accepted=row.accepted,
        before=tuple(before),
        where=row.where,
    )


FORM_TEXT: Form = "text"


def _pictures(row: Row) -> str:
    """A name that rows with the same images share."""
    digest = hashlib.blake2b(digest_size=12)
    for image in row.images:
        digest.update(str(image).encode("utf-8", "surrogateescape") if isinstance(image, Path) else image)
    return digest.hexdigest() if row.images else ""


def row_items(view: View, path: Path, item: Callable[[Row, int], Item] = item_of) -> Items:
    """The items of an opened source."""
    return Items(path, len(view), lambda index: item(view[index], index + 1))


def row_opener(
    title: str,
    page: str,
    item: Callable[[Row, int], Item] = item_of,
    *,
    format: str = "auto",
    letters: bool = False,
    repos: Sequence[str] = (),
    files: Sequence[str] = (),
) -> Opener:
    """How a set is opened that is read by a data source; the arguments as records.opener's and SourceConfig's."""

    def open_set(path: Path | None) -> Items:
        found = find_files(title, page, path, repos, files, ())
        items = [row_items(open_source(SourceConfig(str(file), format, letters=letters)), file, item) for file in found]
        return items[0] if len(items) == 1 else joined(items, path or found[0])

    return open_set


def joined(parts: Sequence[Items], path: Path) -> Items:
    """The items of several files as one; an id begins with its file's name."""
    places = [(part, index) for part in parts for index in range(len(part))]

    def get(index: int) -> Item:
        part, at = places[index]
        found = part[at]
        return replace(found, id=f"{part.path.stem}/{found.id}")

    return Items(path, len(places), get)

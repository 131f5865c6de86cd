"""A set as a TSV file that VLMEvalKit takes for a benchmark of one's own, and that opens here again."""

from __future__ import annotations

import base64
import csv
import re
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase

from actial_fast.data.sources.picture import encoded
from actial_fast.data.sources.row import IMAGE_TAG, BadRow
from actial_fast.evaluation.items import Item, Items

LEAD = re.compile(  # what says that options come
    r"(?i)\s*(?:options|choices|(?:please )?(?:choose|select) (?:between|from|among) the following (?:options|choices))\s*[:.]\s*$"
)


def write_tsv(items: Items, out: Path, on_bad_row: str = "error") -> tuple[int, list[BadRow]]:
    """Write the questions of a set; return how many, and the bad rows that were left out (on_bad_row: "skip").

    Columns: index, question, A, B, ..., answer (a letter), category, image (base64; a list where there are several, or the index of an
    earlier row with the same pictures), image_path (their names), and g_index where questions are grouped. VLMEvalKit puts pictures first,
    and the options and its own request for one behind the question, so these leave the prompt; where pictures stand in the middle of a
    text, their places say "image 1". Open questions have no options. Raises ValueError for a set that has both kinds, BadRow for what
    cannot be read.
    """
    rows: list[dict[str, str]] = []
    bad: list[BadRow] = []
    first: dict[tuple[str, ...], str] = {}  # pictures -> the row that has them
    forms = set()
    for place in range(len(items)):
        try:
            item = items[place]
            pictures = [encoded(image, item.where) for image in item.images]
        except BadRow as error:
            if on_bad_row != "skip":
                raise
            bad.append(error)
            continue
        forms.add(bool(item.options))
        index = str(len(rows))
        texts = tuple(base64.b64encode(data).decode() for data, _ in pictures)
        names = [f"{index}_{k}.{kind.lower().replace('jpeg', 'jpg')}" for k, (_, kind) in enumerate(pictures)]
        row = {
            "index": index,
            "question": stem(item),
            **dict(zip(ascii_uppercase, item.options, strict=False)),
            "answer": letter_of(item) if item.options else item.answer,
            "category": item.category,
            "image": first.get(texts) or _cell(texts),
            "image_path": _cell(names),
        }
        if item.group:
            row["g_index"] = item.group
        if texts and sum(map(len, texts)) > 64:  # VLMEvalKit takes shorter cells for indices
            first.setdefault(texts, index)
        rows.append(row)
    if len(forms) > 1:
        raise ValueError(f"{items.path}: open questions beside others; VLMEvalKit scores a file in one way, so export them apart")
    if not rows:
        raise ValueError(f"{items.path}: no usable question" + (f"; the first: {bad[0]}" if bad else ""))
    columns = dict.fromkeys(name for row in rows for name in row)
    letters = [name for name in columns if len(name) == 1]
    order = ["index", "question", *sorted(letters), *(name for name in columns if name not in ("index", "question", *letters))]
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, order, restval="", delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return len(rows), bad


def stem(item: Item) -> str:
    """The question of a prompt: what stands before its options, without places of pictures at either end."""
    text = item.prompt
    if item.options:
        marked = [rf"[(\[]?{letter}[.:)\]]+\s*{re.escape(option)}" for letter, option in zip(ascii_uppercase, item.options, strict=False)]
        plain = [rf"(?:[-*]\s*)?[\"']?{re.escape(option)}[\"']?" for option in item.options]
        for options in (marked, plain):
            if found := re.search(r"[\s,;]*(?:or\s+)?".join(options), text):
                text = LEAD.sub("", text[: found.start()])
                break
    text = re.sub(rf"^(?:\s*{IMAGE_TAG})+", "", text).strip()
    before = item.prompt.count(IMAGE_TAG) - text.count(IMAGE_TAG)
    if not before:
        text = re.sub(rf"^([^<]*)(?:{IMAGE_TAG}\s*)+$", r"\1", text).strip()
    for number in range(before, item.prompt.count(IMAGE_TAG)):
        text = text.replace(IMAGE_TAG, f"image {number + 1}", 1)
    return re.sub(r"^Question:\s*", "", text)


def letter_of(item: Item) -> str:
    """The letter of the right option, also where options have none."""
    return item.answer if item.form == "letter" else ascii_uppercase[item.options.index(item.answer)]


def _cell(values: Sequence[str]) -> str:
    """One value as it is, several as a Python list of texts, which is how VLMEvalKit reads them."""
    return values[0] if len(values) == 1 else str(list(values)) if values else ""

"""What the specs in sets/ are made with: items of multiple-choice questions, VLMEvalKit's layout, and the set itself.

A spec says which files and columns there are (Layout, opener), how a question is asked, the owner's rule for replies (owners.py), the
figures (figures.py) and what was published. See sets/blink.py for a short one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from string import ascii_uppercase

from actial_fast.data.sources.answers import matches
from actial_fast.data.sources.asked import lettered
from actial_fast.evaluation.extraction import rules
from actial_fast.evaluation.items import BenchmarkSet, Extract, Form, Item, Metric, Opener
from actial_fast.evaluation.numbers import number_worth, quantity
from actial_fast.evaluation.owners import paper
from actial_fast.evaluation.records import Layout, Record, letter_of, placed, unlettered

PLEASE = "Please select the correct answer from the options above. \n"  # VLMEvalKit's
LETTER = "Answer with the option's letter from the given choices directly."
LETTER_FORM: Form = "letter"
Ask = Callable[[Record, Sequence[str]], str]


def benchmark(
    name: str,
    title: str,
    page: str,
    open: Opener,
    figures: Metric,
    headline: str,
    *,
    owner: Extract = paper,
    published: Mapping[str, Mapping[str, float]] | None = None,
    max_new_tokens: int = 8192,
) -> BenchmarkSet:
    """A set whose replies are read by extraction.rules and are worth what `worth` says; the rest as in BenchmarkSet."""
    return BenchmarkSet(name, title, page, open, rules, owner, worth, figures, headline, published or {}, max_new_tokens)


def worth(item: Item, extracted: str) -> float:
    """What an answer is worth, in [0, 1]: by the item's measure for a number, by data.sources.answers for a text, else 1 where it is
    the right one or another that is accepted."""
    truths = (item.answer, *item.accepted)
    if item.form == "number":
        return max(number_worth(item, extracted, truth) for truth in truths)
    if item.form == "text":
        return float(matches(extracted, truths, item.options, item.prompt))
    return float(extracted.strip().casefold() in [truth.casefold() for truth in truths])


def letters_of_columns(record: Record) -> tuple[str, ...]:
    """The options of the columns A, B, ..., up to the first that says nothing."""
    found: list[str] = []
    for letter in ascii_uppercase:
        if not record.has(letter):
            break
        found.append(record.text(letter))
    return tuple(found)


def vlmevalkit_prompt(record: Record, options: Sequence[str]) -> str:
    """VLMEvalKit's prompt of a multiple-choice question: hint, question, options, and the request to select one."""
    hint = f"Hint: {record.text('hint')}\n" if record.has("hint") else ""
    lines = "".join(f"{letter}. {option}\n" for letter, option in zip(ascii_uppercase, options, strict=False))
    return f"{hint}Question: {record.needed('question')}\n" + (f"Options:\n{lines}{PLEASE}" if options else "")


def own_prompt(record: Record, options: Sequence[str]) -> str:
    """The prompt that the file has, of the columns `prompt` or `input_prompt`, else VLMEvalKit's."""
    return record.text("prompt", "input_prompt") or vlmevalkit_prompt(record, options)


def vlmevalkit(
    ask: Ask = vlmevalkit_prompt,
    *,
    id: Callable[[Record], str] = lambda record: record.needed("index"),
    category: Callable[[Record], str] = lambda record: record.text("category", "question_type", "task", "l2-category"),
    group: Callable[[Record], str] = lambda record: circular_group(record),
    cluster: Callable[[Record], str] = lambda record: "",
    meta: Sequence[str] = ("split", "source", "qid"),
) -> Layout:
    """VLMEvalKit's table: index, question, answer, the options A, B, ..., image (base64, a list of them, or the index of the row that
    has it) or image_path, and category, split, g_index, qid and others where a set has them. `candidates` may have the options as a
    list or as lines."""

    def item(record: Record) -> Item:
        options = letters_of_columns(record) or unlettered(record.texts("candidates")) or lettered(record.text("question"))
        images = record.images("image") if record.has("image") else record.images("image_path")
        given = record.needed("answer")
        answer, form = (letter_of(given, options, record.where), LETTER_FORM) if options else open_answer(given)
        return Item(
            id=id(record),
            prompt=placed(ask(record, options), images, record.where),
            images=images,
            answer=answer,
            options=options,
            category=category(record),
            group=group(record),
            cluster=cluster(record),
            meta={key: record.text(key) for key in meta if record.has(key)},
            form=form,
            where=record.where,
        )

    return Layout(("index", "question", "answer"), item)


def open_answer(answer: str) -> tuple[str, Form]:
    """The answer to an open question and its form: yes or no, a number (with a unit or not), else a text."""
    if answer.strip().lower().rstrip(".") in ("yes", "no"):
        return answer.strip().lower().rstrip("."), "yes-no"
    found = quantity(answer)
    if found and not re.search(r"\w", answer[: found.at] + answer[found.end :]):
        return answer, "number"
    return answer, "text"


def circular_group(record: Record) -> str:
    """What the rotations of a question share in VLMEvalKit: g_index, or the index without its millions."""
    if record.has("g_index"):
        return record.text("g_index")
    index = record.text("index")
    return str(int(index) % 1_000_000) if index.isdecimal() else index


def choices_item(
    record: Record,
    *,
    id: str,
    prompt: str,
    images: Sequence[str],
    options: Sequence[str],
    answer: str,
    category: str = "",
    cluster: str = "",
    meta: Mapping[str, str] | None = None,
) -> Item:
    """A multiple-choice item. images: the fields that have them; answer: the letter in any of letter_of's spellings, or the option's
    text."""
    found = record.images(*images)
    return Item(
        id=id,
        prompt=placed(prompt, found, record.where),
        images=found,
        answer=letter_of(answer, options, record.where),
        options=tuple(options),
        category=category,
        cluster=cluster,
        meta=meta or {},
        where=record.where,
    )

"""When a reply is right: one rule for the reward, the evaluation, the check of chains of thought and the report.

By default a reply is right where a person would say so: the option's letter in its usual spellings ("B", "(b)", "**B.**", "Option B",
"B: to the right"), the option's text, or for an open question the truth itself, in any case and with the marks around it that models
write; equal numbers are equal. `strict` is the paper's rule: the text in the <answer> tags equals the truth, up to case and white space.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from string import ascii_lowercase

from actial_fast.data.sources.row import IMAGE_TAG, Row
from actial_fast.data.sources.tags import ANSWER_TAG, extract_answer, same_answer, tagged_answer

LONGEST = 300  # characters of an answer, and of a reply's end in which it is looked for: the rest is reasoning
LEAD = re.compile(
    r"(?:(?:so|thus|hence|therefore|and)\b[, ]*)?(?:(?:the|my|final|correct|right|best|true) )*(?:"
    r"(?:answer|option|choice)(?: is| would be| must be| should be)?\s*[:=]\s*|(?:answer|option|choice) (?:is|would be|must be|should be) |"
    r"(?:option|choice|answer) (?=[(\[*\"'`]*[a-z](?:[^a-z0-9]|$)))"
)
PAIRS = (
    ("**", "**"),
    ("__", "__"),
    ("`", "`"),
    ("*", "*"),
    ("$", "$"),
    ('"', '"'),
    ("'", "'"),
    ("\u201c", "\u201d"),
    ("\\(", "\\)"),
    ("\\[", "\\]"),
    ("\\boxed{", "}"),
    ("\\text{", "}"),
    ("\\mathrm{", "}"),
    ("{", "}"),
    ("(", ")"),
    ("[", "]"),
)
LETTER = re.compile(r"\(?([a-z])(?:\)|\]|\.|:|,| [-\u2013\u2014])[.:]?\s*(\S.*)")  # a letter and what follows it
CLAIM = re.compile(r"(?i)\b(?:answer|option|choice)\s*(?:\*\*)?\s*(?:is|:|=)\s*([^\n]{1,200})|\\boxed\{([^{}\n]{1,200})\}")
MARKER = re.compile(r"(?:^|(?<=[\s(]))\(?([A-Z])(?:[.:]|\))(?=\s)")  # where an option of a question begins


def is_right(response: str, row: Row, *, strict: bool = False) -> bool:
    """Whether a reply answers a row that has a truth (or one of its other accepted answers)."""
    asked = next((turn.content for turn in reversed(row.prompt) if turn.role == "user"), "")
    return matches(response, (row.truth, *row.accepted), row.choices, asked, strict=strict)


def matches(response: str, truths: Sequence[str], choices: Sequence[str] = (), asked: str = "", *, strict: bool = False) -> bool:
    """is_right in pieces: the accepted answers, the options' texts, and the question, from which they are read when it has none."""
    if strict:
        return any(same_answer(extract_answer(response), truth) for truth in truths)
    if ANSWER_TAG.search(response):  # several guesses, or half a pair of tags, are no answer
        answer = tagged_answer(response)
        return answer is not None and _answers(answer, truths, choices, asked)
    _, _, said = response.rpartition("</think>")
    if "<think>" in said:  # it never came to an answer
        return False
    if _answers(said, truths, choices, asked):
        return True
    claims = [first or second for first, second in CLAIM.findall(said[-LONGEST:])]
    return bool(claims) and all(_answers(re.split(r"[.!?](?:\s|$)", claim)[0], truths, choices, asked) for claim in claims)


def plain(text: str) -> str:
    """An answer without case, marks around it and words before it."""
    text = re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text)).strip().casefold()
    before = None
    while text != before:
        before = text
        text = re.sub(r"^([a-z])[)\]]$", r"\1", text.strip().rstrip(".,;:!").strip())
        if lead := LEAD.match(text):
            text = text[lead.end() :]
        for left, right in PAIRS:
            inner = text[len(left) : len(text) - len(right)]
            if len(text) > len(left) + len(right) and text.startswith(left) and text.endswith(right) and _closed(inner, left, right):
                text = inner
    return text


def _closed(inner: str, left: str, right: str) -> bool:
    """Whether a pair of marks around `inner` belongs together."""
    if right not in ("}", ")", "]"):
        return right not in inner
    depth = 0
    for letter in inner:
        depth += (letter == left[-1]) - (letter == right)
        if depth < 0:
            return False
    return depth == 0


def lettered_options(question: str) -> tuple[str, ...]:
    """The texts of the options that a question offers as A. ..., B. ... (also (A) or A:), in lines or in one; () when there are none."""
    marks = list(MARKER.finditer(question := question.replace(IMAGE_TAG, " ")))
    found: list[str] = []
    for n, mark in enumerate(marks):
        letter = mark.group(1)
        if letter == "A":
            found = []
        if ord(letter) - ord("A") != len(found):
            continue
        end = next((other.start() for other in marks[n + 1 :] if other.group(1) == chr(ord(letter) + 1)), len(question))
        found.append(question[mark.end() : end].strip().split("\n")[0].strip())
    return tuple(found) if len(found) > 1 and all(found) else ()


def _answers(text: str, truths: Sequence[str], choices: Sequence[str], asked: str) -> bool:
    return len(text.strip()) <= LONGEST and any(_equal(plain(text), plain(truth), truth, choices, asked) for truth in truths)


def _equal(answer: str, truth: str, written: str, choices: Sequence[str], asked: str) -> bool:
    """Of two plain texts. written: the truth as it is in the row."""
    if answer == truth or re.sub(r"\s*,\s*", ",", answer) == re.sub(r"\s*,\s*", ",", truth) or _equal_numbers(answer, truth):
        return bool(answer)
    shown = lettered_options(asked)
    options = [plain(choice) for choice in choices or shown]
    is_letter = len(truth) == 1 and truth in ascii_lowercase and written not in choices
    if is_letter:
        index = ord(truth) - ord("a")
    else:
        index = options.index(truth) if shown and options.count(truth) == 1 else -1  # a letter says nothing where none was shown
        if index < 0:
            return False
    text = options[index] if index < len(options) else ""
    if answer == chr(ord("a") + index) or (answer == text and options.count(text) == 1):
        return True
    both = LETTER.fullmatch(answer)
    if both is None or both.group(1) != chr(ord("a") + index):
        return False
    rest = plain(both.group(2))  # "B. left" is no answer where "left" is A, nor is "B, C"
    if rest in options:
        return rest == text
    return len(rest) > 1 and not re.search(r"\b(?:or|not)\b", rest)


def _equal_numbers(one: str, other: str) -> bool:
    try:
        return Decimal(one.replace(",", "")) == Decimal(other.replace(",", ""))
    except InvalidOperation:
        return False

"""What a chain of thought has to be before it is stored: in form, of some length, nobody's copy, without talk of a given answer, and true.

`check_cot` is the check of one text; a `Check` is that with the rules of a run and a memory of the chains before, so that copies are found.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from actial_fast.data.cot.judge import KINDS, NAMES, Truths, judge
from actial_fast.data.cot.leaks import leak
from actial_fast.data.cot.pairs import PAIR, answers_in
from actial_fast.data.sources.answers import is_right
from actial_fast.data.sources.row import IMAGE_TAG, Row
from actial_fast.data.sources.tags import TAG, is_well_formed, tagged_answer

LETTER = re.compile(r"\b(?:[Oo]ptions?|[Aa]nswers?|[Cc]hoices?)(?: is| are)?:? [\"'(*]*[A-D]\b(?![\w'])")
RUN = 5  # words that make two chains alike where both have them in a row
ALIKE = 0.8  # share of a chain's runs in another one, above which it is a copy; of the template: LIKE_TEMPLATE
LIKE_TEMPLATE = 0.7


@dataclass(frozen=True)
class Rules:
    """What a run asks of its chains beyond form, truth and a right answer."""

    shortest: int = 0
    """words of the reasoning at least"""
    longest: int = 0
    """words of the reasoning at most; 0: any number"""
    states: bool = False
    """whether the reasoning of a viewpoint row has to state what was asked: of a pair all three, of a question its own"""
    undecided: str = "reject"
    """reject or keep chains with a statement that the rules of reading.py cannot decide"""

    def __post_init__(self) -> None:
        if self.shortest < 0 or self.longest < 0 or (self.longest and self.longest < self.shortest):
            raise ValueError(f"shortest={self.shortest}, longest={self.longest}: need 0 <= shortest <= longest words")
        if self.undecided not in ("reject", "keep"):
            raise ValueError(f"undecided={self.undecided!r}; expected 'reject' or 'keep'")


ANY = Rules()
MODELS = {PAIR: Rules(40, 2000, states=True), "": Rules(15, 2000, states=True)}  # of chains by a model: about a pair, about a question


def check_cot(text: str, row: Row, rules: Rules = ANY) -> str | None:
    """Why `text` may not train a model to answer `row`, or None when it may: "what is wrong", or "what is wrong: where".

    Tags must be well formed (as the format reward wants them), the reasoning as long as the rules say, without an image tag and without
    talk of an answer, a prompt or a template that was given (leaks.py), and the answer right: answers.is_right, or for a pair (pairs.py)
    its three answers in order. Where the row has a pair's poses, every statement is held against them (judge.py). Of a question's
    own options, neither the last "answer is X" / "option X" nor the last sentence may name another choice.
    """
    if not row.truth:
        return "row has no truth"
    if not is_well_formed(text):
        return "malformed tags"
    pair = row.kind == PAIR
    if answers_in(tagged_answer(text) or "") != answers_in(row.truth) if pair else not is_right(text, row):
        return "wrong answer"
    thought = reasoning(text)
    if not thought:
        return "no reasoning"
    if IMAGE_TAG in text:
        return "image tag in the text"
    words = len(thought.split())
    if words < rules.shortest:
        return f"too short: {words} words of reasoning, at least {rules.shortest} are wanted"
    if rules.longest and words > rules.longest:
        return f"too long: {words} words of reasoning, at most {rules.longest} are wanted"
    if found := leak(thought):
        return f"talks of a given answer: {found!r}"
    if pair and (letter := LETTER.search(thought)):
        return f"names an option by its letter, which the three questions do not share: {letter.group()!r}"
    reason = _judged(thought, row, rules)
    if reason is None and not pair and _contradicts(thought, row):
        return "reasoning contradicts the answer"
    return reason


def reasoning(text: str) -> str:
    """What stands in the <think> tags of a well-formed reply."""
    opened, closed, *_ = TAG.finditer(text)
    return text[opened.end() : closed.start()].strip()


def _judged(thought: str, row: Row, rules: Rules) -> str | None:
    truths = Truths.of(row.meta)
    if truths is None or row.kind not in (PAIR, *KINDS):
        return None
    verdict = judge(thought, truths)
    if verdict.false:
        return f"false statement: {verdict.false[0]}"
    if verdict.undecided and rules.undecided == "reject":
        return f"undecided statement: {verdict.undecided[0]}"
    missing = [kind for kind in (KINDS if row.kind == PAIR else (row.kind,)) if kind not in verdict.stated]
    return f"not stated: {NAMES[missing[0]]}" if missing and rules.states else None


class Check:
    """check_cot by a run's rules, which also finds copies. Called with a text and its row, it gives the reason against it, or None.

    Args:
        rules: as check_cot has them.
        template: the example that the writer is shown.
        known: ids and texts that are stored already.

    A text that passes is remembered under its row's id; the same row may pass again with another.
    """

    def __init__(self, rules: Rules = ANY, *, template: str = "", known: Iterable[tuple[str, str]] = ()):
        self._rules = rules
        self._template = _runs(reasoning(template)) if template else frozenset()
        self._chains: dict[str, frozenset[int]] = {}
        self._where: dict[int, set[str]] = {}
        for name, text in known:
            self._remember(name, _runs(reasoning(text)))

    def __call__(self, text: str, row: Row) -> str | None:
        if reason := check_cot(text, row, self._rules):
            return reason
        runs = _runs(reasoning(text))
        if runs and len(runs & self._template) >= LIKE_TEMPLATE * len(runs):
            return "copies the template"
        met = Counter(name for run in runs for name in self._where.get(run, ()) if name != row.id)
        if met and met.most_common(1)[0][1] >= ALIKE * len(runs):
            return f"copies another chain: that of {met.most_common(1)[0][0]}"
        self._remember(row.id, runs)
        return None

    def _remember(self, name: str, runs: frozenset[int]) -> None:
        for run in self._chains.pop(name, ()):
            self._where[run].discard(name)
        self._chains[name] = runs
        for run in runs:
            self._where.setdefault(run, set()).add(name)


def _runs(thought: str) -> frozenset[int]:
    """The runs of RUN words in a text, as hashes; sides and numbers all count as one word, since a copy changes these."""
    text = re.sub(r"\b(?:left|right|clockwise|counter-?clockwise|anti-?clockwise)(?:wards?)?\b|\d+", "#", thought.casefold())
    words = re.findall(r"#|[a-z']+", text)
    return frozenset(hash(tuple(words[i : i + RUN])) for i in range(len(words) - RUN + 1))


def _contradicts(thought: str, row: Row) -> bool:
    right = {row.truth.casefold()}
    for labels in ({chr(ord("a") + i), choice.casefold()} for i, choice in enumerate(row.choices)):
        if right & labels:
            right = labels
            break
    texts = "|".join(re.escape(choice) for choice in sorted(row.choices, key=len, reverse=True)) or r"(?!)"
    claim = rf"(?i:\b(?:answer|option|choice)(?:\s+(?:is|must be|would be|should be))?)\s*:?\s*[\"'(*]*(\b[A-Z]\b|(?i:\b(?:{texts})\b))"
    if (claims := re.findall(claim, thought)) and claims[-1].casefold() not in right:
        return True
    last = [sentence for sentence in re.split(r"(?<=[.!?])\s+|\n", thought) if sentence.strip()][-1]
    named = {found.casefold() for found in re.findall(rf"(?i:\b(?:{texts})\b)", last)}
    return len(named) == 1 and not named & right

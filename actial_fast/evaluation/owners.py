"""What a reply answers by the rules of the benchmarks' own scripts, as they are, weaknesses included: for figures beside published ones.

`paper` is what the paper's figures were made with: its answer tags, then VLMEvalKit's can_infer. The others are named after their
benchmark. All take the item's form into account; extraction.rules are this project's own, and better at finding what a reply means.
"""

from __future__ import annotations

import re

from actial_fast.data.sources.tags import tagged_answer
from actial_fast.evaluation.extraction import custom, rules
from actial_fast.evaluation.items import BenchmarkSet, Extract, Found, Item
from actial_fast.evaluation.numbers import METRES, WORD, quantities, spelled

AMOUNT, ANY = r"\d+\.?\d*", "[a-zA-Z]+"  # of SpatialScore's lengths, and what may stand around them
LEADS = ((r"\*\*", r"\*\*"), (r"(?i:approximately|about|roughly)\s*\**", ""), ("", ""))


def find_extractor(name: str, of: BenchmarkSet) -> Extract:
    """The rule by its name: rules (this project's), owner (the set's own script's), paper (VLMEvalKit's behind the paper's tags), or the
    user's `module:function`. ValueError for any other."""
    known = {"rules": of.extract, "owner": of.owner, "paper": paper}
    return known[name] if name in known else custom(name)


def paper(item: Item, reply: str) -> Found:
    """The text in the only pair of <answer> tags, else behind </think>, else all, and from that VLMEvalKit's can_infer.

    A letter: the only one among the words, within the last five of them ("answer is B" anywhere otherwise). An option: the only one that
    occurs, in a text no longer than twice all options. Source: the authors' actial_r1.py; VLMEvalKit's matching_util.py."""
    tagged = tagged_answer(reply)
    text = tagged if tagged is not None else reply.rpartition("</think>")[2]
    if item.form != "letter":
        return rules(item, text)
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    letters = [letter for letter in item.letters if letter in words]
    if len(letters) == 1 and words.index(letters[0]) > len(words) - 5:
        return Found(letters[0], "can_infer: letter")
    claim = re.search(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", text)
    if claim and claim.group(1).upper() in item.letters:
        return Found(claim.group(1).upper(), "can_infer: answer is")
    if len(text) <= 2 * sum(map(len, item.options)):
        found = [letter for letter, option in zip(item.letters, item.options, strict=False) if option.lower() in text.lower()]
        if len(found) == 1:
            return Found(found[0], "can_infer: option text")
    return Found(None)


def _first(pattern: str, text: str, rule: str) -> Found:
    match = re.search(pattern, text)
    return Found(match.group(1).upper(), rule) if match else Found(None)


def mmsi(item: Item, reply: str) -> Found:
    """What stands in backticks, else in braces, else all; there the first letter A to F that no word follows.

    Source: MMSI-Bench's README and lmms-eval's tasks/mmsi_bench/utils.py."""
    for pattern in (r"``([^`]*)``", r"`([^`]*)`", r"\{([^}]*)\}"):
        if match := re.search(pattern, reply):
            reply = match.group(1)
    return _first(r"(?i)\b([A-F])\b(?!\s[a-zA-Z])", reply, "mmsi")


def viewspatial(item: Item, reply: str) -> Found:
    """The first letter A to D of the last line, in either case. Source: ViewSpatial-Bench's evaluate.py."""
    return _first(r"(?i)\b([A-D])\b", reply.split("\n")[-1], "viewspatial")


def mindcube(item: Item, reply: str) -> Found:
    """The last "B." of the text; else, in an <Answer> section if there is one, the last "answer is B", then any letter; else the last
    letter at the beginning of a line, in marks, behind "Answer" or "answer is"; else the last line's. Source: MindCube's extractors.py."""
    section = re.search(r"(?s)<Answer>(.*?)(?:<|$)", reply)
    tries = [(reply, r"([A-E])\.")]
    if section:
        tries += [(section.group(1), pattern) for pattern in (r"[Mm]y answer is ([A-E])", r"[Tt]he answer is ([A-E])", r"\b([A-E])\b")]
    tries += [
        (reply, pattern)
        for pattern in (r"(?:^|\n)(?:Answer: )?([A-E])(?:$|\s)", r"[*\"]([A-E])[*\"]", r"\bAnswer:?\s*([A-E])\b", r"answer is ([A-E])")
    ]
    for text, pattern in tries:
        if found := re.findall(pattern, text):
            return Found(found[-1], "mindcube")
    lines = [letters[0] for line in reply.split("\n") if (letters := re.findall(r"\b([A-E])\b", line))]
    return Found(lines[-1], "mindcube") if lines else Found(None)


def vsi(item: Item, reply: str) -> Found:
    """A letter: the first word without its point. A number: the first of the text, in digits or words.

    Source: lmms-eval's tasks/vsibench/utils.py."""
    if item.form == "number":
        digits, words = re.search(r"-?\d+(?:\.\d+)?", reply), WORD.search(reply)
        if words and (not digits or words.start() < digits.start()):
            return Found(f"{spelled(words.group()):.12g}", "vsi")
        return Found(digits.group(), "vsi") if digits else Found(None)
    return _word(reply.split(" ")[0].rstrip("."), "vsi")


def start(item: Item, reply: str) -> Found:
    """The letter that the reply begins with, be it a word's. Source: lmms-eval's tasks/cv_bench/utils.py."""
    return _first(r"^[(\s]*([A-Za-z])", reply, "start")


def sat(item: Item, reply: str) -> Found:
    """The first word, without marks. Source: lmms-eval's tasks/sat/utils.py."""
    return _word(re.sub(r"[^\w\s]", "", reply).strip().split(" ")[0], "sat")


def _word(word: str, rule: str) -> Found:
    return Found(word.strip().upper(), rule) if word.strip() else Found(None)


def spatialscore(item: Item, reply: str) -> Found:
    """A letter: "answer B", "(B)", a letter by itself, any letter A to F, in this order. yes or no: the first of the two lists of words
    that has one. A length: the first number with a word behind it, which is its unit (an unknown one is read as cm). Other numbers: the
    first.

    Source: SpatialScore's version_0/utils/util.py."""
    text = re.sub(r"</?(?:CONCLUSION|conclusion|ANSWER|answer|ASSISTANT|assistant)>", "", reply).strip()
    if item.form == "letter":
        for pattern in (
            r"(?i)^([A-F])\.?$",
            r"(?i)(?:answer|option)[:\s]*\(?([A-F])\)?\.?",
            r"(?i)(?:^|\s)\(?([A-F])\)\.?(?:$|\s|\.)",
            r"(?i)(?:^|\s)([A-F])\.?(?:$|\s|\.|,)",
            r"(?i)([A-F])",
        ):
            if (found := _first(pattern, reply.strip(), "spatialscore")).text:
                return found
        return Found(None)
    if item.form == "yes-no":
        for word, pattern in (("yes", r"yes|yeah|yep|correct|true|right|agreed?"), ("no", r"no|nope|not|false|wrong|incorrect|disagreed?")):
            if re.search(rf"(?i)\b(?:{pattern})\b", text):
                return Found(word, "spatialscore")
        return Found(None)
    if item.form == "number" and item.measure == "length":
        value, unit = (
            next((match.group(1) for pattern in patterns if (match := re.search(pattern, text))), "")
            for patterns in (
                (r"\\scalar\{([^}]+)\}", *(f"{lead}({AMOUNT})\\s*{ANY}{end}" for lead, end in LEADS)),
                (r"\\distance_unit\{([^}]+)\}", *(f"{lead}{AMOUNT}\\s*({ANY}){end}" for lead, end in LEADS)),
            )
        )
        number = re.search(AMOUNT, value)
        unit = unit.lower().strip()
        return Found(f"{number.group()} {unit if unit in METRES else 'cm'}", "spatialscore") if number and unit else Found(None)
    if item.form == "number":
        numbers = quantities(text)
        return Found(str(numbers[0]), "spatialscore") if numbers else Found(None)
    return rules(item, reply)

"""Numbers in replies, with units, and how near they must be: equal, VSI-Bench's mean relative accuracy, SpatialScore's factor of two."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

from actial_fast.evaluation.items import Found, Item

METRES = {  # unit -> metres
    **dict.fromkeys(("m", "meter", "meters", "metre", "metres"), 1.0),
    **dict.fromkeys(("cm", "centimeter", "centimeters", "centimetre", "centimetres"), 0.01),
    **dict.fromkeys(("mm", "millimeter", "millimeters", "millimetre", "millimetres"), 0.001),
    **dict.fromkeys(("km", "kilometer", "kilometers", "kilometre", "kilometres"), 1000.0),
    **dict.fromkeys(("ft", "foot", "feet", "'", "\u2032"), 0.3048),
    **dict.fromkeys(("in", "inch", "inches", '"', "\u2033"), 0.0254),
    **dict.fromkeys(("yd", "yard", "yards"), 0.9144),
}
ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
WORDS = dict(zip(ONES.split(), range(20), strict=True)) | dict(zip(TENS.split(), range(20, 100, 10), strict=True))
SCALES = {"hundred": 100, "thousand": 1000}
DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
UNIT = "|".join(sorted((re.escape(unit) for unit in METRES), key=len, reverse=True))
NUMBER = re.compile(
    rf"(?<![\w.,/])([-+\u2212]?)({DIGITS})(?:\s*/\s*(\d+(?:\.\d+)?))?(?![\w.]*\d)"
    rf"(?:\s*(?P<unit>(?:{UNIT})(?![A-Za-z\u00b2\u00b3^])|sq(?:uare|\.)?\s*[a-z]+|[a-z]+\u00b2|degrees?\b|\u00b0|%))?",
    re.IGNORECASE,
)
WORD = re.compile(rf"(?i)\b(?:{'|'.join((*WORDS, *SCALES))})(?:(?:[\s-]+(?:and\s+)?)(?:{'|'.join((*WORDS, *SCALES))}))*\b")
RANGE = re.compile(rf"{DIGITS}\s*(?:-|\u2013|to)\s*{DIGITS}")
CLAIM = re.compile(r"(?i)\banswer(?:\s+is|\s+would\s+be)?[*_]{0,2}\s*[:=]?\s*(?:about|approximately|roughly)?\s*")
THETAS = np.linspace(0.5, 0.95, 10)  # the tolerances of mean relative accuracy


@dataclass(frozen=True)
class Quantity:
    """A number and its unit, '' where it has none; `at` to `end` is where it stands in its text."""

    value: float
    unit: str = ""
    at: int = 0
    end: int = 0

    @property
    def metres(self) -> float | None:
        """As a length, None where the unit is none of length."""
        return self.value * METRES[self.unit] if self.unit in METRES else None

    def __str__(self) -> str:
        return f"{self.value:.12g} {self.unit}".strip()


def quantities(text: str) -> list[Quantity]:
    """Every number of a text, in its order: digits (1,234.5, -3, 1/2, 2e-3) and English words (twenty-one), with their units.

    The ends of a range ("2 to 3") are no numbers."""
    ranges = [match.span() for match in RANGE.finditer(text)]
    found = []
    for match in NUMBER.finditer(text):
        if any(low <= match.start(2) < high for low, high in ranges):
            continue
        value = float(match.group(2).replace(",", ""))
        if match.group(3):
            if not float(match.group(3)):
                continue
            value /= float(match.group(3))
        value = -value if match.group(1) in ("-", "\u2212") else value
        found.append(Quantity(value, (match.group("unit") or "").lower(), match.start(), match.end()))
    for match in WORD.finditer(text):
        unit = re.match(rf"\s*({UNIT})(?![A-Za-z])", text[match.end() :])
        end = match.end() + (unit.end() if unit else 0)
        found.append(Quantity(spelled(match.group()), unit.group(1).lower() if unit else "", match.start(), end))
    return _joined(sorted(found, key=lambda quantity: quantity.at), text)


def _joined(found: list[Quantity], text: str) -> list[Quantity]:
    """Lengths in two units, "5 feet 6 inches", as one."""
    joined: list[Quantity] = []
    for each in found:
        last = joined[-1] if joined else None
        if (
            last
            and last.metres
            and each.metres
            and each.metres < METRES[last.unit]
            and re.fullmatch(r"\s*(?:and)?\s*", text[last.end : each.at])
        ):
            joined[-1] = Quantity(last.value + each.metres / METRES[last.unit], last.unit, last.at, each.end)
        else:
            joined.append(each)
    return joined


def spelled(words: str) -> float:
    """The number that English words say: "three hundred and twenty-one"."""
    total, current = 0, 0
    for word in re.findall(r"[a-z]+", words.lower()):
        if word in WORDS:
            current += WORDS[word]
        elif word == "hundred":
            current = max(current, 1) * 100
        elif word == "thousand":
            total, current = total + max(current, 1) * 1000, 0
    return float(total + current)


def quantity(text: str) -> Quantity | None:
    """The first number of a text; None when it has none."""
    return next(iter(quantities(text)), None)


def extract_number(item: Item, text: str) -> Found:
    """The number that a text gives, with its unit: the whole text, \\scalar{} with \\distance_unit{}, the last \\boxed{}, the last
    "answer: ", the only bold one, the only one outside brackets, or the last of the last line that has any."""
    text = text.strip()
    if scalar := re.findall(r"\\+scalar\{([^{}]+)\}", text):
        unit = re.findall(r"\\+distance_unit\{([^{}]+)\}", text)
        if found := quantity(f"{scalar[-1]} {unit[-1] if unit else ''}"):
            return Found(str(found), "scalar")
    inner = text.strip("*_`$\"'() ").rstrip(".,;! ")
    if len(all_of := quantities(inner)) == 1 and not re.search(r"\w", inner[: all_of[0].at] + inner[all_of[0].end :]):
        return Found(str(all_of[0]), "number")
    if boxed := re.findall(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*+)\}", text):
        if found := quantity(re.sub(r"\\(?:text|mathrm)\{|[{}]", " ", boxed[-1])):
            return Found(str(found), "boxed")
    for claim in [*CLAIM.finditer(text)][::-1]:
        if (found := quantity(text[claim.end() : claim.end() + 40])) and found.at <= 3:
            return Found(str(found), "answer")
    bold = [found for part in re.findall(r"\*\*([^*\n]+)\*\*", text) if (found := quantity(part))]
    if len({(each.value, each.unit) for each in bold}) == 1:
        return Found(str(bold[0]), "bold")
    outside = quantities(re.sub(r"\([^()]*\)", " ", text))
    if len(outside) == 1:
        return Found(str(outside[0]), "only number")
    for line in reversed(text.splitlines()):
        if numbers := quantities(re.sub(r"\([^()]*\)", " ", line)):
            return Found(str(numbers[-1]), "last number")
    return Found(None)


def number_worth(item: Item, extracted: str, answer: str) -> float:
    """What a number is worth beside the right one, by the item's `measure`; lengths are compared in the same unit, and one without a
    unit is taken to have the answer's."""
    ours, truth = quantity(extracted), quantity(answer)
    if ours is None or truth is None:
        return 0.0
    one, other = ours.value, truth.value
    if truth.metres is not None and ours.unit:
        if ours.metres is None:
            return 0.0
        one, other = ours.metres, truth.metres
    if item.measure == "mra":
        return mean_relative_accuracy(one, other)
    if item.measure == "length":
        return float(within_factor(one, other))
    return float(math.isclose(one, other, rel_tol=max(item.tolerance, 1e-9), abs_tol=1e-12))


def mean_relative_accuracy(answer: float, truth: float) -> float:
    """VSI-Bench's score of a number: over theta = 0.5, 0.55, ..., 0.95 the share with |answer - truth| / truth <= 1 - theta, in [0, 1].

    In double precision, as the benchmark's own script has it: 4 for 5 gets 0.6, because 1 - 0.8 is there a little less than 0.2. A truth
    of 0 is met by 0 alone. Source: J. Yang et al., Thinking in Space (CVPR 2025), section 3.
    """
    if not truth:
        return float(not answer)
    return float(np.mean(abs(answer - truth) / abs(truth) <= 1 - THETAS))


def within_factor(answer: float, truth: float, factor: float = 2.0) -> bool:
    """Whether two lengths in one unit differ by less than a factor; 0 is only near 0. Source: SpatialScore's script, factor 2."""
    if answer == 0 or truth == 0:
        return answer == truth
    return answer / truth > 0 and max(answer / truth, truth / answer) < factor

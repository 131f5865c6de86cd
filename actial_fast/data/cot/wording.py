"""A chain of thought as sentences and clauses in a plain spelling, for reading.py.

Marks of Markdown go, spellings become one (rightward, right-hand, anticlockwise), and what is spelled like a side but is none goes too: an
object that "left the frame", a "right angle", "left or right" where a question is repeated.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

STANDS = r"(is|was|lies|stands) (?:placed |located |further )?"
SPELLINGS = (
    (r"(?m)^[ \t]*(?:[-*+\u2022#>][ \t]+|\(?\d{1,2}[.)][ \t]+)+", ""),
    (r"[\u2018\u2019\u02bc]", "'"),
    (r"[\u201c\u201d]", '"'),
    (r"[\u2010-\u2012]", "-"),
    (r"\u00ba", "\u00b0"),
    (r"(?<=\d)\s*[-\u2013\u2014~]\s*(?=\d)", " to "),
    (r"[ \t]*[\u2013\u2014][ \t]*|[ \t]+--?[ \t]+", ", "),
    (r"[*_`#]+", ""),
    (r"\bi\.\s?e\.,?", "that is,"),
    (r"\be\.\s?g\.,?", "for example,"),
    (r"\b(approx|deg|approximat|ca|vs|no|fig|pic)\.(?= ?[\da-z])", r"\1"),
)
PLAIN = (
    (r"\b(?:anti|counter)[ -]?clock-?wise\b|\bccw\b", "counterclockwise"),
    (r"\bclock-wise\b|\bcw\b", "clockwise"),
    (r"\b(left|right)[ -]?(?:wards?|handed|hand|most)\b", r"\1"),
    (r"\b(?:the )?(second|first) (?:one|camera|photographer|viewpoint|vantage point|camera position)\b", r"camera-\1"),
    (r"\bcamera (?:position )?(1|one)\b", "camera-first"),
    (r"\bcamera (?:position )?(2|two)\b", "camera-second"),
    (r"\bc(?:am(?:era)?)?[ -]?1\b(?=[ ,.;:'])", "camera-first"),
    (r"\bc(?:am(?:era)?)?[ -]?2\b(?=[ ,.;:'])", "camera-second"),
    (rf"\bcamera-first {STANDS}to the left of camera-second\b", r"camera-second \1 to the right of camera-first"),
    (rf"\bcamera-first {STANDS}to the right of camera-second\b", r"camera-second \1 to the left of camera-first"),
    (r"\b(i|we|you|he|she|they|it)'d\b", r"\1 would"),
    (r"\bif (?:we|you|one|i) (?:now )?(?:compare|imagine|picture|look|consider|think|go by|take|put|place)\b", "comparing"),
    (r"\bon its (left|right) side\b", r"on its \1"),
    (r"\bcan(?:no|')t\b|\bcan not\b", "can not"),
    (r"\b(\w+)n't\b", r"\1 not"),
    (r"\b(it|that|there|what|here|which|who|where)'s\b", r"\1 is"),
    (r"\bfrom (?:the |its )?(?:left|right)(?: side)?(?: of \w+ \w+)? (?:over )?to (?:the |its )?(left|right)(?: side)?\b", r"to the \1"),
    # both sides at once
    (r"\bneither (?:to |on )?(?:the |its )?left nor (?:to |on )?(?:the |its )?right\b", "nowhere"),
    (r"\bneither (?:to |on )?(?:the |its )?right nor (?:to |on )?(?:the |its )?left\b", "nowhere"),
    (r"\b(?:to |on |at )?(?:the |its |my |your )?(?:left|right) ?(?:/|or|nor|and|vs|versus) ?(?:to |on |at )?(?:the |its |my |your )?"
     r"(?:left|right)\b", "sideways"),
    # spelled like a side, and none
    (r"\b(?:has|have|had|having|be|been|what is|nothing|nobody|nowhere) left\b(?! (?:in|of|side|to|by))", "gone"),
    (r"\bleft (?=(?:the|our|my|its|this) (?:frame|picture|view|image|photo|field|sight|scene)\b|unchanged|behind|over\b|out\b)", "gone "),
    (r"\bright (?:angles?|answers?)\b|(?<!the )(?<!its )\bright (?:away|now|there|here|in front|next|"
    r"after|before|behind|above|below|on top)\b", "straight"),
    (r"\b(?:that is|that's|all|is that|quite|exactly|am i) right\b(?=[,.!?]|$)", "so"),
    (r"\b(?:neither|nor|not|no) (?:doubt|question)\b|\bwithout (?:any )?doubt\b|\bdoubtless\b", "surely"),
    (r"\bnot (?:only|just|merely|simply)\b", "both"),
    (r"\bcould not have\b", "can not have"),
)  # fmt: skip
CUTS = re.compile(
    r"""\s*(?:
    (?P<mark>[,;:()"])\s*(?P<after>(?:and|but|so|yet|or|nor|which|who|because|since|as|while|whereas|therefore|hence|thus|then|though|although)\b)?
    |\b(?P<word>and|but|because|since|while|whereas|which|who|though|although|yet|so|if|when|rather\ than|instead\ of
      |as\ opposed\ to|nor|that(?!\ (?:camera|photographer|viewer)\b))\b
    )\s*""",
    re.VERBOSE,
)
LONGEST = 1000  # characters of a sentence: what is longer is none, and is cut, so that reading takes a time in proportion to the text
DENIES = ("rather than", "instead of", "as opposed to", "nor")


@dataclass(frozen=True)
class Clause:
    """text: plain; rest: with all that follows in its sentence; joined: the word or mark that stands before it ("" for the first); label:
    whether a colon follows it."""

    text: str
    rest: str
    joined: str
    label: bool


@dataclass(frozen=True)
class Sentence:
    """said: as it was written; plain: in one spelling; line: the number of its line; asks: whether it is a question; heads: whether it is
    all of its line and has no full stop, as a heading."""

    said: str
    plain: str
    line: int
    asks: bool
    heads: bool

    def clauses(self) -> list[Clause]:
        """Its clauses in order."""
        found, start, joined = [], 0, ""
        for cut in CUTS.finditer(self.plain):
            text = self.plain[start : cut.start()].strip(" .")
            if text:
                found.append(Clause(text, self.plain[start:].strip(), joined, cut["mark"] == ":"))
                joined = ""
            elif cut["mark"] == ":" and found:  # "Rotation (yaw):"
                found[-1] = replace(found[-1], label=True)
            word = cut["word"] or cut["after"] or cut["mark"]
            joined = word if not joined or joined in ',;:()"' or word in ("if", "when") else joined
            start = cut.end()
        if text := self.plain[start:].strip(" .!?"):
            found.append(Clause(text, text, joined, self.plain.endswith(":")))
        return found


def sentences(text: str) -> Iterator[Sentence]:
    """The sentences of a chain of thought."""
    for pattern, spelling in SPELLINGS:
        text = re.sub(pattern, spelling, text, flags=re.IGNORECASE)
    for line, content in enumerate(text.split("\n")):
        parts = [part for part in re.split(r"(?<=[.!?;])[\"')\]]*\s+", content.strip()) if part.strip(" .")]
        for part in (whole[start : start + LONGEST] for whole in parts for start in range(0, len(whole), LONGEST)):
            said = " ".join(part.split())
            if not said:
                continue
            heads = len(parts) == 1 and (said.endswith(":") or (said[-1] not in ".!?;" and len(said.split()) <= 8))
            yield Sentence(said, plain(said), line, said.endswith("?"), heads)


def plain(text: str) -> str:
    """A sentence in lower case and one spelling."""
    text = text.casefold()
    for pattern, spelling in PLAIN:
        text = re.sub(pattern, spelling, text)
    return text

"""Talk of an answer that was given, of the prompt, or of a template: a chain of thought with such a phrase teaches a model to expect one.

PHRASES is the list that is kept; a phrase that slips through belongs there. RULES are what such phrases have in common.
"""

from __future__ import annotations

import re

PHRASES = (
    "answer key",
    "answer sheet",
    "ground truth",
    "ground-truth",
    "gold answer",
    "gold label",
    "gold standard",
    "your hint",
    "as a hint",
    "as hinted",
    "colmap",
    "the metadata",
    "the annotation",
    "camera parameters",
    "the label says",
    "labelled as",
    "labeled as",
    "as an ai",
    "as a language model",
    "as requested",
    "as instructed",
    "as required by",
    "system prompt",
    "reverse-engineer",
    "work backwards",
    "working backwards",
    "back-solve",
    "backtrack from the answer",
    "justify the answer",
    "justify the given",
    "asked to justify",
    "should not mention",
    "must not mention",
    "should not reveal",
    "pretend",
    "worked solution",
)
GIVEN = r"(?:given|provided|supplied|reference|stated|specified|official|known|expected|intended|required|target|desired|true and known)"
ANSWERS = r"(?:(?:correct |right |true |final )?(?:answers?|solutions?|labels?|responses?|truths?))"
ASKED = (
    r"(?:prompt|instructions?|template|hint|example (?:above|provided|given|shown)|task description|"
    r"guidelines?|user|answers?|solutions?|reference|labels?|key)"
)
RULES = (
    r"\bthe hint\b(?! of)",
    rf"\b{GIVEN} {ANSWERS}\b",
    rf"\b{ANSWERS} (?:is |are |was |were |has been |have been |that (?:is|are|was|were) )?(?:already )?(?:given|"
    r"provided|supplied|told|known|specified|stated|fixed)\b",
    rf"\b{ANSWERS} (?:to be|i was|we were|you) (?:given|gave|told|provided)\b",
    r"\b(?:according to|based on|as per|per|following|consistent with|in line with|in accordance with|"
    rf"agrees? with|match(?:es|ing)?|follow) (?:the |this |that |your |my |these |those )*{GIVEN}? ?{ASKED}\b(?! options)",
    rf"\bas (?:the |your |this )?(?:{ASKED}|question)(?:'s \w+)? (?:says?|states?|said|stated|tells?|"
    r"told|indicates?|notes?|mentions?|specif\w+|suggests?|requires?)\b",
    rf"\bthe (?:{ASKED}) (?:says?|states?|tells?|told|indicates?|mentions?|specif\w+|gives?|gave|confirms?|requires?|wants?)\b",
    r"\bas (?:stated|given|told|provided|specified|indicated|mentioned) (?:in|by) the (?:prompt|instructions?|"
    r"question|task|answers?|solution|template|user|hint|reference)",
    r"\b(?:i|we) (?:was|were|am|are|have been|had been|'ve been) (?:told|given|informed|provided with|"
    r"shown) (?:that |in advance |beforehand |the (?:\w+ )?(?:answer|move|solution|truth|result|rotation|"
    r"direction|template)|a template|how|about|which|what)",
    r"\b(?:given|provided|supplied|known) (?:information|facts?|data|truths?|movement|motion|directions?|rotation|angle)\b",
    r"\b(?:told|informed|instructed) (?:me|us|that)\b",
    rf"\b{ANSWERS} (?:that |which )?(?:i|we) (?:have|had|was|were|am|are|got|did)\b",
    r"\btemplate i was\b|\bthe (?:example|template) (?:i|we|you) (?:was|were|am|are|have|gave|showed|got)\b",
    rf"\b(?:since|because|given that|knowing that|as) (?:the |these |my )?{ANSWERS} (?:is|are|must|should|has to|have to|says?)\b",
    r"\b(?:reasoning|analysis|explanation|chain)\b.{0,20}\b(?:has|have|needs?|must|should) (?:to )?(?:agree|"
    r"match|lead|arrive|fit|be consistent|support|end)\b",
    r"\b(?:the |this |that )(?:correct|right|true) (?:answers?|solutions?) (?:provided|given|above|in the prompt)\b",
    r"\b(?:i|we) (?:already )?(?:know|have) the (?:\w+ )?(?:answers?|solution)\b",
    r"\b(?:information|details|facts|statements?|description) (?:in|from|of) (?:the|this|your) (?:prompt|task|instructions?|user)\b",
    r"\bwe (?:already )?know (?:from|that the (?:correct|right) answer)\b",
    r"\bto (?:arrive at|reach|get to|justify|support) the (?:correct|right|given|known|true|desired) (?:answers?|result|conclusion)\b",
)
LEAK = re.compile("|".join([*(rf"\b{re.escape(phrase)}" for phrase in PHRASES), *RULES]), re.IGNORECASE)


def leak(thought: str) -> str | None:
    """The sentence in which a chain of thought speaks of an answer, a prompt or a template that it was given; None where it does not."""
    text = re.sub(r"[*_`]+", "", thought).replace("\u2019", "'")
    found = LEAK.search(text)
    if not found:
        return None
    start = max(text.rfind(mark, 0, found.start()) for mark in ".!?\n") + 1
    ends = [end for mark in ".!?\n" if (end := text.find(mark, found.end())) >= 0]
    return " ".join(text[start : min(ends, default=len(text)) + 1].split())

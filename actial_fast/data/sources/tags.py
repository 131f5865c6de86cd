"""The grammar of a tagged reply, <think>...</think><answer>...</answer>, and when two answers are the same.

Used by the rewards, the evaluation and the chain-of-thought writers, so that all agree on what counts. Every function reads the text once,
left to right: no pattern here can backtrack, whatever a model writes.
"""

from __future__ import annotations

import re

ANSWER_TAG = re.compile(r"</?answer>", re.IGNORECASE)
TAG = re.compile(r"</?(?:think|answer)>", re.IGNORECASE | re.ASCII)  # ASCII: without it the Kelvin sign counts as a k


def is_well_formed(response: str) -> bool:
    """Whether the whole response is one <think>...</think> followed by one <answer>...</answer>.

    Tags count in any case; white space is free before, between and after; a nested, repeated or missing tag fails, and so does any other
    text outside the tags. What stands inside may be anything, also nothing.
    """
    tags = list(TAG.finditer(response))
    if [tag.group().lower() for tag in tags] != ["<think>", "</think>", "<answer>", "</answer>"]:
        return False
    outside = response[: tags[0].start()] + response[tags[1].end() : tags[2].start()] + response[tags[3].end() :]
    return not outside.strip()


def tagged_answer(response: str) -> str | None:
    """The text inside the <answer> tags, stripped; None unless there is exactly one pair (several guesses are not an answer)."""
    tags = [tag for tag in TAG.finditer(response) if "answer" in tag.group().lower()]
    if [tag.group().lower() for tag in tags] != ["<answer>", "</answer>"]:
        return None
    return response[tags[0].end() : tags[1].start()].strip()


def extract_answer(response: str) -> str:
    """What the response answers: the text inside its <answer> tags, or the whole response when it has not just one pair."""
    answer = tagged_answer(response)
    return response.strip() if answer is None else answer


def same_answer(answer: str, truth: str) -> bool:
    """Equality up to case and surrounding white space, as in the paper: "b" is "B", but "B." and "(B)" are not."""
    return answer.strip().casefold() == truth.strip().casefold()

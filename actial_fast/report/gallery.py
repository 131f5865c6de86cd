"""Sampled replies to look at: a card a question with its pictures, the truth, and each reply with its marks and its reward.

Cards with a mistake come first, later steps before earlier ones. A few are open, the others folded. gallery.js shows those of one step,
kind or verdict, or with some words. However many replies a run kept, the page keeps a bounded size.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from actial_fast.data.sources.answers import matches
from actial_fast.data.sources.row import IMAGE_TAG
from actial_fast.data.sources.tags import is_well_formed
from actial_fast.report.chart import number
from actial_fast.report.html import folded
from actial_fast.report.pictures import picture_html

OPEN = 9  # cards that are seen at once
CARDS, REPLIES = 200, 8  # cards of a stage at most, and replies on one
LONGEST = 1200  # characters of a reply; the middle of a longer one is left out
PICTURES = 3_000_000  # bytes of all pictures together
VERDICTS = {"wrong": "a wrong answer", "form": "right, not well-formed", "right": "all right"}

Rollout = Mapping[str, Any]


@dataclass(frozen=True)
class _Group:
    """The replies to one question at one step. right: None where the question has no truth."""

    step: int
    replies: Sequence[Rollout]
    right: Sequence[bool | None]
    formed: Sequence[bool]

    @property
    def verdict(self) -> str:
        return "wrong" if False in self.right else "right" if all(self.formed) else "form"

    @property
    def kind(self) -> str:
        return str(self.replies[0].get("kind", ""))  # not in runs of before


def gallery(run_dir: Path, stage: str, events: Sequence[Mapping[str, Any]]) -> str:
    """The HTML of the "rollouts" events of `stage`; "" when it has none.

    Image paths are relative to `run_dir`; a lost image becomes a note.
    """
    groups = [group for event in events if event["kind"] == "rollouts" and event["stage"] == stage for group in _groups(event)]
    if not groups:
        return ""
    ordered = sorted(groups, key=lambda group: (list(VERDICTS).index(group.verdict), -group.step))
    cards, left = [], PICTURES
    for group in ordered[:CARDS]:
        pictures = "".join(_picture(run_dir, source) for source in group.replies[0]["images"]) if left > 0 else ""
        if left <= 0 and group.replies[0]["images"]:
            pictures = '<span class="lost">pictures are left out: those of the cards above fill the page</span>'
        left -= len(pictures)
        cards.append(_card(group, pictures))
    more = folded(f"{len(cards) - OPEN:,} more", f'<div class="cards">{"".join(cards[OPEN:])}</div>') if len(cards) > OPEN else ""
    head = f'<p class="muted">{_told(groups)}</p>{_choices(ordered[:CARDS])}'
    return f'<div class="gallery">{head}<div class="cards">{"".join(cards[:OPEN])}</div>{more}</div>'


def _groups(event: Mapping[str, Any]) -> list[_Group]:
    found: dict[str, list[Rollout]] = {}
    for rollout in event["rollouts"]:
        found.setdefault(json.dumps([rollout["images"], rollout["prompt"], rollout["truth"]]), []).append(rollout)
    return [
        _Group(
            event["step"],
            replies,
            [matches(r["response"], [str(r["truth"])], asked=r["prompt"]) if str(r["truth"]) else None for r in replies],
            [is_well_formed(r["response"]) for r in replies],
        )
        for replies in found.values()
    ]


def _told(groups: Sequence[_Group]) -> str:
    replies, wrong = sum(len(g.replies) for g in groups), sum(g.right.count(False) for g in groups)
    unformed, steps = sum(g.formed.count(False) for g in groups), sorted({g.step for g in groups})
    where = f"step {steps[0]:,}" if len(steps) == 1 else f"{len(steps):,} steps from {steps[0]:,} to {steps[-1]:,}"
    left = f" The first {CARDS:,} questions are shown." if len(groups) > CARDS else ""
    return (
        f"{replies:,} replies to {len(groups):,} questions, kept at {where}: {wrong:,} wrong, {unformed:,} not well-formed. "
        f"Mistakes come first, later steps before earlier ones.{left}"
    )


def _choices(groups: Sequence[_Group]) -> str:
    """What gallery.js chooses by; it takes `hidden` away."""
    verdicts, kinds, steps = (Counter(getattr(g, name) for g in groups) for name in ("verdict", "kind", "step"))
    selects = [
        ("verdict", "all verdicts", [(name, label, verdicts[name]) for name, label in VERDICTS.items() if verdicts[name]]),
        ("kind", "all kinds", [(kind, kind or "(no kind)", n) for kind, n in sorted(kinds.items())]),
        ("step", "all steps", [(str(step), f"step {step:,}", n) for step, n in sorted(steps.items())]),
    ]
    parts = [
        f'<select data-by="{by}" aria-label="{by}"><option value="*">{every}</option>'
        + "".join(f'<option value="{escape(value)}">{escape(label)} ({n:,})</option>' for value, label, n in options)
        + "</select>"
        for by, every, options in selects
        if len(options) > 1
    ]
    search = '<input type="search" placeholder="words in a card" aria-label="words in a card">'
    return f'<div class="choices" hidden>{"".join(parts)}{search}<output class="muted"></output></div>'


def _card(group: _Group, pictures: str) -> str:
    first, replies = group.replies[0], []
    for reply, right, formed in list(zip(group.replies, group.right, group.formed, strict=True))[:REPLIES]:
        marks = "".join(
            f'<span class="{"good" if ok else "bad"}">{"&#10003;" if ok else "&#10007;"} {label}</span>'
            for ok, label in ((right, "answer"), (formed, "format"))
            if ok is not None
        )
        replies.append(
            f'<div class="reply"><div class="marks">{marks}<span>reward <b>{number(float(reply["reward"]))}</b></span></div>'
            f"<pre>{escape(_shortened(reply['response'])) or '(empty)'}</pre></div>"
        )
    hidden = len(group.replies) - REPLIES
    more = f'<p class="muted">{hidden:,} more replies in events.jsonl</p>' if hidden > 0 else ""
    truth = f"truth <b>{escape(_shortened(str(first['truth'])))}</b>" if str(first["truth"]) else "no truth to compare with"
    about = f"step {group.step:,}" + (f", {escape(group.kind)}" if group.kind else "")
    return (
        f'<article data-verdict="{group.verdict}" data-kind="{escape(group.kind)}" data-step="{group.step}">'
        f'<p class="muted">{about}</p><div class="images">{pictures}</div>'
        f'<pre class="prompt">{escape(_question(first["prompt"]))}</pre><p>{truth}</p>{"".join(replies)}{more}</article>'
    )


def _question(prompt: str) -> str:
    """The text, without the tags of pictures that come before it; others have the picture's number."""
    place = 0
    while prompt.lstrip().startswith(IMAGE_TAG):
        prompt, place = prompt.lstrip().removeprefix(IMAGE_TAG), place + 1
    while IMAGE_TAG in prompt:
        place += 1
        prompt = prompt.replace(IMAGE_TAG, f"[picture {place}]", 1)
    return _shortened(prompt.strip())


def _shortened(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST // 2]}\n[... {len(text) - LONGEST:,} characters ...]\n{text[-LONGEST // 2 :]}"


def _picture(run_dir: Path, source: str) -> str:
    return picture_html(source if source.startswith("data:") else run_dir / source)

"""errors.html: wrong replies of a benchmark run to look at, on one page that needs nothing but itself.

A card has the pictures, the question, the truth and the reply with what was read in it. A few lines of script hide the cards that the
choices at the top leave out; without script all are shown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from actial_fast.report.pictures import picture_html
from actial_fast.report.style import CSS

VERDICTS = {"wrong": "wrong", "part": "partly right", "unread": "no answer found", "cut": "no answer found, cut by the limit"}
PICTURES = 8  # on a card at most: a video's frames would fill the page
MORE_CSS = """
.choices{position:sticky;top:0;background:var(--bg);padding:10px 0;border-bottom:1px solid var(--edge);display:flex;gap:14px;flex-wrap:wrap}
.choices select,.choices input{font:inherit;color:inherit;background:var(--card);border:1px solid var(--edge);border-radius:6px;
 padding:3px 8px}
article[hidden]{display:none}.cards{margin-top:18px}.marks span:first-child{white-space:nowrap}
"""
SCRIPT = """
const selects = [...document.querySelectorAll(".choices select")], search = document.querySelector(".choices input");
const cards = [...document.querySelectorAll("article")], count = document.querySelector(".choices output");
function choose() {
  let shown = 0;
  for (const card of cards) {
    const fits = selects.every(s => !s.value || card.dataset[s.name] === s.value)
      && card.textContent.toLowerCase().includes(search.value.toLowerCase());
    card.hidden = !fits;
    shown += fits;
  }
  count.textContent = shown + " of " + cards.length + " shown";
}
selects.forEach(s => s.addEventListener("change", choose));
search.addEventListener("input", choose);
choose();
"""


@dataclass(frozen=True)
class Looked:
    """One wrong reply. verdict: one of VERDICTS. pictures: paths or encoded bytes. read: what was found in the reply, by `rule`."""

    id: str
    category: str
    verdict: str
    question: str
    pictures: tuple[Path | bytes, ...]
    truth: str
    read: str
    rule: str
    reply: str


def errors_page(title: str, lead: str, shown: Sequence[Looked]) -> str:
    """The page's HTML. lead: a sentence on top, which says what is shown of how many."""
    categories = Counter(each.category for each in shown)
    verdicts = Counter(each.verdict for each in shown)
    options = "".join(
        f'<option value="{escape(name)}">{escape(name or "(none)")} ({n:,})</option>' for name, n in sorted(categories.items())
    )
    kinds = "".join(f'<option value="{name}">{VERDICTS[name]} ({verdicts[name]:,})</option>' for name in VERDICTS if verdicts[name])
    choices = (
        f'<div class="choices"><select name="verdict" aria-label="verdict"><option value="">all verdicts</option>{kinds}</select>'
        f'<select name="category" aria-label="category"><option value="">all categories</option>{options}</select>'
        '<input type="search" placeholder="words in a card" aria-label="words in a card"><output class="muted"></output></div>'
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}{MORE_CSS}</style></head><body>"
        f'<header><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p></header>{choices}'
        f'<section class="cards">{"".join(map(_card, shown))}</section><script>{SCRIPT}</script></body></html>\n'
    )


def _card(each: Looked) -> str:
    mark = f'<span class="bad">&#10007; {VERDICTS[each.verdict]}</span>'
    step = max(1, -(-len(each.pictures) // PICTURES))
    pictures = "".join(map(picture_html, each.pictures[::step]))
    if step > 1:
        pictures += f'<p class="muted">every {step}th of {len(each.pictures)} pictures</p>'
    found = f"read <b>{escape(each.read)}</b> ({escape(each.rule)})" if each.rule else "nothing read"
    return (
        f'<article data-category="{escape(each.category)}" data-verdict="{each.verdict}"><div class="images">{pictures}</div>'
        f'<pre class="prompt">{escape(each.question)}</pre><p>truth <b>{escape(each.truth)}</b>, {found}</p>'
        f'<div class="reply"><div class="marks">{mark}<span>{escape(each.category)} {escape(each.id)}</span></div>'
        f"<pre>{escape(each.reply) or '(empty)'}</pre></div></article>"
    )

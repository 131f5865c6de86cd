"""quiz.html: questions for people, one at a time, on one page that needs nothing but itself and holds no answers.

What somebody chose stays in the browser until it is downloaded as JSON, which `actial score` takes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from actial_fast.report.pictures import picture_html
from actial_fast.report.style import CSS

SIDE = 640  # pixels of a picture's longer side
MORE_CSS = """
main article{max-width:1000px}main .images img{height:auto;max-height:420px}main .images img.pixels{height:240px}
main .question{font-size:17px;white-space:pre-wrap}
main label{display:block;padding:7px 12px;margin:6px 0;border:1px solid var(--edge);border-radius:8px;cursor:pointer}
main label:has(:checked){border-color:var(--c0);font-weight:600}article[hidden]{display:none}
nav{display:flex;gap:12px;align-items:center;margin:16px 0}
button,input[type=text]{font:inherit;color:inherit;background:var(--card);border:1px solid var(--edge);border-radius:6px;padding:6px 14px}
"""
SCRIPT = """
const quiz = JSON.parse(document.getElementById("quiz").textContent), cards = [...document.querySelectorAll("article")];
const store = "actial quiz " + quiz.digest, who = document.getElementById("who"), place = document.querySelector("output");
let state = {at: 0, who: "", answers: {}, seconds: {}}, since = Date.now();
try { state = Object.assign(state, JSON.parse(localStorage.getItem(store) || "{}")); } catch (error) { console.warn(error); }
function keep() { try { localStorage.setItem(store, JSON.stringify(state)); } catch (error) { console.warn(error); } }
function show(at) {
  const now = Date.now(), before = quiz.ids[state.at];
  state.seconds[before] = (state.seconds[before] || 0) + (now - since) / 1000;
  since = now;
  state.at = Math.min(Math.max(at, 0), cards.length - 1);
  cards.forEach((card, k) => { card.hidden = k !== state.at; });
  const done = Object.keys(state.answers).length;
  place.textContent = `question ${state.at + 1} of ${cards.length}, ${done} answered`;
  keep();
}
cards.forEach((card, k) => {
  const id = quiz.ids[k], fields = [...card.querySelectorAll("input")];
  for (const field of fields) {
    if (field.type === "radio") field.checked = state.answers[id] === field.value;
    else field.value = state.answers[id] || "";
    field.addEventListener("input", () => {
      if (field.value.trim()) state.answers[id] = field.value.trim(); else delete state.answers[id];
      show(state.at);
    });
  }
});
who.value = state.who;
who.addEventListener("input", () => { state.who = who.value.trim(); keep(); });
document.getElementById("back").onclick = () => show(state.at - 1);
document.getElementById("next").onclick = () => show(state.at + 1);
document.getElementById("download").onclick = () => {
  show(state.at);
  const told = {quiz: quiz.digest, set: quiz.set, who: state.who || "anonymous", answers: state.answers, seconds: state.seconds};
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(told, null, 1)], {type: "application/json"}));
  link.download = "answers-" + (state.who || "anonymous").replace(/[^A-Za-z0-9]+/g, "-") + ".json";
  link.click();
};
document.addEventListener("keydown", event => {
  if (event.target.type === "text") return;
  if (["ArrowRight", "ArrowLeft", "Enter"].includes(event.key)) {
    event.preventDefault();  // in a group of choices arrows would choose
    show(state.at + (event.key === "ArrowLeft" ? -1 : 1));
  }
  else if (event.key.length === 1) {
    const field = cards[state.at].querySelector(`input[type=radio][data-key="${CSS.escape(event.key.toUpperCase())}"]`);
    if (field) field.click();
  }
});
show(state.at);
"""


@dataclass(frozen=True)
class Asked:
    """One question. choices: (key, what is stored, what is shown) of each option; () for an open one, which gets a line to write in."""

    id: str
    question: str
    pictures: tuple[Path | bytes, ...]
    choices: tuple[tuple[str, str, str], ...]


def quiz_page(title: str, set_name: str, digest: str, questions: Sequence[Asked]) -> str:
    """The page's HTML. digest: names the quiz in the answers that are downloaded."""
    known = json.dumps({"set": set_name, "digest": digest, "ids": [q.id for q in questions]}).replace("<", "\\u003c")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}{MORE_CSS}</style></head><body><header><h1>{escape(title)}</h1>"
        '<p class="muted">Choose with the mouse or with the letter; arrows go on and back. Nothing is sent anywhere: at the end, download '
        "your answers and pass the file on. You may close the page and go on later in the same browser.</p></header>"
        '<nav><label for="who">Your name</label><input type="text" id="who"><button id="back">Back</button><button id="next">Next</button>'
        '<output class="muted"></output><button id="download">Download answers</button></nav>'
        f"<main>{''.join(map(_card, range(len(questions)), questions))}</main>"
        f'<script type="application/json" id="quiz">{known}</script><script>{SCRIPT}</script></body></html>\n'
    )


def _card(number: int, each: Asked) -> str:
    pictures = "".join(picture_html(picture, SIDE) for picture in each.pictures)
    fields = "".join(
        f'<label><input type="radio" name="q{number}" value="{escape(value)}" data-key="{escape(key)}"> {escape(shown)}</label>'
        for key, value, shown in each.choices
    )
    return (
        f'<article hidden><div class="images">{pictures}</div><p class="question">{escape(each.question)}</p>'
        f"{fields or '<input type=text aria-label=answer>'}</article>"
    )

"""The template that a writer is shown: drafted by a model about one pair, corrected by a person beside its images, checked by its poses.

`draft` writes the file to correct, `page` the images, the truths and what the check makes of every statement, to look at while correcting.
"""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path

from actial_fast.data.cot.asking import TRUTHS, read_template
from actial_fast.data.cot.checking import check_cot, reasoning
from actial_fast.data.cot.judge import KINDS, Truths, weighed
from actial_fast.data.cot.pairs import told
from actial_fast.data.cot.reading import Statement
from actial_fast.data.sources.picture import encoded, smaller
from actial_fast.data.sources.row import Row
from actial_fast.data.sources.tags import is_well_formed

PIXELS = 400_000  # of an image on the page
HEAD = """\
# A template for `actial data cot --template`. Correct what is wrong below (the page beside this file shows the images and what was read),
# then give the same command again to have it checked. Lines that begin with # here are no part of it; leave the next one as it is.
"""
STYLE = """\
body{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#1f2430}
img{max-width:48%;margin-right:1%;border-radius:4px}
pre{white-space:pre-wrap;background:#f6f7f9;padding:1em;border-radius:4px}
td,th{text-align:left;padding:.3em .8em .3em 0;vertical-align:top}
.true{color:#1a8a4c}.false{color:#c0262d;font-weight:bold}.undecided{color:#b06a00}"""
WORDS = {
    "ego_translation": "the camera's move, its own perspective",
    "object_translation": "the camera's move, the object's perspective",
    "ego_rotation": "the camera's turn",
    "orbit": "round the object",
    "gain": "a flank came into view",
    "loss": "a flank turned away",
    "frames": "the two frames' sides",
    "angle": "an angle",
    "picture": "from positions in the picture",
}


def draft(path: Path, row: Row, text: str) -> None:
    """Write the file of a new template: a model's coarse text about a pair, to be corrected. ValueError where the file is there already."""
    if path.exists():
        raise ValueError(f"{path} is there already, and may hold corrections; move it away to draft another")
    kept = {key: row.meta[key] for key in (*KINDS, "azimuth_change_deg", "yaw_deg")}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{HEAD}{TRUTHS}{json.dumps({'id': row.id, **kept})}\n{text.strip()}\n")


def page(path: Path, row: Row) -> tuple[Path, str | None]:
    """Write the page beside a template's file: images of `row`, its truths, the text, and what was read from it.

    Returns the page and why the template cannot be used yet, None where it can. ValueError where the file is about another pair; BadRow for
    an image that cannot be read."""
    text, about = read_template(path)
    if about is None or about.meta.get("id") != row.id:
        raise ValueError(f"{path} is not about {row.id}; the line {TRUTHS!r} says what it is about")
    truths = Truths.of(row.meta)
    assert truths is not None, "pairs have poses"
    reason = check_cot(text, row)
    found = weighed(reasoning(text), truths) if is_well_formed(text) else []
    lines = "".join(_line(statement, holds) for statement, holds in found)
    images = "".join(f'<img src="{_data_url(image, row.where)}" alt="image {n}">' for n, image in enumerate(row.images, 1))
    verdict = f'<p class="false">Cannot be used yet: {html.escape(reason)}</p>' if reason else '<p class="true">Passes the check.</p>'
    out = path.with_suffix(".html")
    out.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(row.id)}</title><style>{STYLE}</style>\n'
        f"<h1>{html.escape(row.id)}</h1><p>{images}</p><p>{html.escape(told(row.meta))}</p>\n{verdict}\n<pre>{html.escape(text)}</pre>\n"
        f"<h2>What was read from it</h2><p>A description of what one image shows is not checked: look at it.</p>\n"
        f"<table><tr><th>verdict</th><th>about</th><th>says</th><th>sentence</th></tr>{lines}</table></html>\n",
        encoding="utf-8",
    )
    return out, reason


def _line(statement: Statement, holds: bool | None) -> str:
    verdict = {True: "true", False: "false", None: "undecided"}[holds]
    degrees = f"{statement.low:.0f}" if statement.low == statement.high else f"{statement.low:.0f} to {statement.high:.0f}"
    says = f"{degrees} degrees" if statement.about == "angle" else ("not " if statement.denied else "") + statement.value
    cells = (WORDS[statement.about], says, statement.said)
    return f'<tr class="{verdict}"><td>{verdict}</td>' + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"


def _data_url(image: Path | bytes, where: str) -> str:
    small = smaller(image, where, PIXELS)
    data, kind = (small, "JPEG") if small else encoded(image, where)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"

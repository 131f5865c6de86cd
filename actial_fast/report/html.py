"""What the report's pages are put together with."""

from __future__ import annotations

import hashlib
import os
import re
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from pathlib import Path

from actial_fast.report.style import CSS

SCRIPT = "\n".join(Path(__file__).with_name(f"{name}.js").read_text(encoding="utf-8") for name in ("page", "bars", "gallery"))


def document(title: str, body: str) -> str:
    """A whole page: nothing in it is fetched, and of scripts only ours runs, whatever the texts of a run hold."""
    digest = b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{escape(title)} - actial_fast</title><style>{CSS}</style></head><body>{body}<script>{SCRIPT}</script></body></html>\n"
    )


def section(title: str, content: str) -> str:
    """A titled part of a page; "" without content."""
    return f'<section id="{_anchor(title)}"><h2>{escape(title)}</h2>{content}</section>' if content else ""


def contents(sections: Sequence[str]) -> str:
    """Links to the parts that `section` made."""
    found = [re.match(r'<section id="([^"]*)"><h2>(.*?)</h2>', part) for part in sections]
    links = [f'<a href="#{part[1]}">{part[2]}</a>' for part in found if part]
    return f'<nav class="contents">{"".join(links)}</nav>'


def _anchor(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def folded(title: str, content: str) -> str:
    """Content that is there when it is asked for."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def bullets(lines: Sequence[str]) -> str:
    """Plain lines as a list; "" of none."""
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def write(path: Path, page: str) -> Path:
    """Write a page whole or not at all; return its path."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(page, encoding="utf-8", errors="replace")
    os.replace(temporary, path)
    return path

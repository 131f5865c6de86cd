"""What the report's pages are put together with."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from actial_fast.report.style import CSS


def document(title: str, body: str) -> str:
    """A whole page: nothing in it is fetched."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)} - actial_fast</title><style>{CSS}</style></head><body>{body}</body></html>\n"
    )


def section(title: str, content: str) -> str:
    """A titled part of a page; "" without content."""
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def folded(title: str, content: str) -> str:
    """Content that is there when it is asked for."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def bullets(lines: Sequence[str]) -> str:
    """Plain lines as a list; "" of none."""
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""

"""Sampled replies as cards for the report: the images, the question, the truth, and each reply with its marks and its reward."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

from actial_fast.data.sources.answers import matches
from actial_fast.data.sources.tags import is_well_formed
from actial_fast.report.chart import number

GROUPS, REPLIES = 3, 4  # shown for each of the three moments: groups, and replies of each
IMAGE_BYTES, IMAGE_SIDE = 64_000, 320  # a larger image is embedded as a JPEG of at most this side


def rollout_cards(run_dir: Path, stage: str, events: Sequence[Mapping[str, Any]]) -> str:
    """The HTML of the first, middle and last "rollouts" events of `stage`; "" when it has none.

    Image paths are relative to `run_dir`; a lost image becomes a note.
    """
    moments = sorted((e for e in events if e["kind"] == "rollouts" and e["stage"] == stage), key=lambda e: e["step"])
    moments = [moments[i] for i in sorted({0, len(moments) // 2, len(moments) - 1})] if moments else []
    out = []
    for event in moments:
        groups: dict[str, list[Mapping[str, Any]]] = {}
        for rollout in event["rollouts"]:
            groups.setdefault(json.dumps([rollout["images"], rollout["prompt"], rollout["truth"]]), []).append(rollout)
        cards = "".join(_rollout_group(run_dir, group) for group in list(groups.values())[:GROUPS])
        out.append(f'<h3>Step {event["step"]:,}</h3><div class="cards">{cards}</div>')
    return "".join(out)


def _rollout_group(run_dir: Path, group: Sequence[Mapping[str, Any]]) -> str:
    first = group[0]
    replies = []
    for rollout in group[:REPLIES]:
        formed = is_well_formed(rollout["response"])
        right = matches(rollout["response"], [str(rollout["truth"])], asked=rollout["prompt"])
        marks = "".join(
            f'<span class="{"good" if ok else "bad"}">{"&#10003;" if ok else "&#10007;"} {label}</span>'
            for ok, label in ((right, "answer"), (formed, "format"))
        )
        replies.append(
            f'<div class="reply"><div class="marks">{marks}<span>reward <b>{number(float(rollout["reward"]))}</b></span></div>'
            f"<pre>{escape(rollout['response']) or '(empty)'}</pre></div>"
        )
    hidden = f'<p class="muted">{len(group) - REPLIES} more replies in events.jsonl</p>' if len(group) > REPLIES else ""
    images = "".join(_image(run_dir, image) for image in first["images"])
    return (
        f'<article><div class="images">{images}</div><pre class="prompt">{escape(first["prompt"])}</pre>'
        f"<p>truth <b>{escape(str(first['truth']))}</b></p>{''.join(replies)}{hidden}</article>"
    )


def _image(run_dir: Path, source: str) -> str:
    return picture_html(source if source.startswith("data:") else run_dir / source)


def picture_html(picture: Path | bytes | str, side: int = IMAGE_SIDE) -> str:
    """An <img> that holds the picture (a file, encoded bytes or a data URL), at most `side` pixels long where it is no small file; a note
    in its place when the file is gone, for a page must come out of an old run too."""
    from PIL import Image

    from actial_fast.data.sources.picture import shown

    try:
        if isinstance(picture, str):
            picture = base64.b64decode(picture.partition(",")[2])
        data = picture.read_bytes() if isinstance(picture, Path) else picture
        with Image.open(BytesIO(data)) as opened:
            kind, small = opened.format, max(opened.size) <= 64
            if len(data) > IMAGE_BYTES or kind not in ("PNG", "JPEG"):
                reduced = shown(opened)
                reduced.thumbnail((side, side))
                reduced.save(buffer := BytesIO(), "JPEG", quality=85)
                kind, data = "JPEG", buffer.getvalue()
    except (OSError, ValueError) as error:
        return f'<span class="lost">image not readable: {escape(str(error))}</span>'
    encoded = base64.b64encode(data).decode()
    return f'<img alt="" class="{"pixels" if small else ""}" src="data:image/{kind.lower()};base64,{encoded}">'

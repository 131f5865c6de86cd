"""A picture inside a page: as it is when it is small, else a smaller JPEG."""

from __future__ import annotations

import base64
from html import escape
from io import BytesIO
from pathlib import Path

IMAGE_BYTES, IMAGE_SIDE = 64_000, 320  # a larger image is embedded as a JPEG of at most this side


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

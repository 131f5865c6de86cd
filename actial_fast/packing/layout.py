"""What a packed layout is, and the numpy twin of the extension's (csrc/layout.cpp).

The twin is the readable specification, the oracle of the extension's tests, and its stand-in where it was not built.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Part:
    """A group's share of one micro-batch, as the layout takes it.

    name: the row in messages. ids (Lp,) int64 and trained (Lp,) bool of the prefix; positions (3, Lp) int64, or None to compute M-RoPE's
    from the grids; suffixes: (ids, trained) of each; images: a key per image, equal for the same image, and grids: its (frames, rows,
    columns) in patches; sample: number of its first suffix, or of itself when plain, in the caller's numbering.
    """

    name: str
    ids: np.ndarray
    trained: np.ndarray
    positions: np.ndarray | None = None
    suffixes: tuple[tuple[np.ndarray, np.ndarray], ...] = ()
    images: tuple[Hashable, ...] = ()
    grids: tuple[tuple[int, int, int], ...] = ()
    sample: int = 0


@dataclass(frozen=True)
class Layout:
    """One packed micro-batch of L rows, T of them with loss, G groups with suffix rows, K segments, S samples and M image tokens; int64
    arrays unless said.

    Row i's hidden state predicts token i + 1, a prefix's last row the first token of each of its suffixes. So the last token of a suffix
    or of a plain sequence (a part without suffixes) is only a target and has no row: n tokens of a suffix make n - 1 rows, none and no
    segment for n = 1; L tokens of a plain sequence make L - 1, but it keeps its last row when that is its only one or an image's. A
    prefix with suffixes keeps all of its rows. Rows: [prefixes of parts whose suffixes have rows | these suffixes, in the same order |
    the other parts: plain sequences and prefixes all of whose suffixes have one token], each block in the order of the parts. No segment
    is empty.

    input_ids (L,); position_ids (3, L), which restart after the prefix for every suffix; cu (K + 1,) int32, where each prefix, suffix
    and plain sequence begins and ends; cross_q (G + 1,) int32, a group's suffix rows counted from the first suffix row, cross_k (G + 1,)
    int32, its prefix rows; prefix_rows and suffix_rows, the sizes of the first two blocks. image_slots (M,): rows of image tokens,
    ascending; image_rows (M,): the row that goes there of the merged features of `images`, distinct image keys in order of appearance.
    loss_rows, targets, owner (T,): the row that predicts, the token, the sample, by sample and then by position; samples (S,): their
    numbers in this order, first those of parts in the first two blocks, then those of the others, each in the order of the parts and in a
    part by number; cu_loss (S + 1,): where their loss rows begin and end. A sample's loss rows are those it would have alone; targets in
    a prefix count once for every suffix.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    cu: np.ndarray
    cross_q: np.ndarray
    cross_k: np.ndarray
    prefix_rows: int
    suffix_rows: int
    image_slots: np.ndarray
    image_rows: np.ndarray
    loss_rows: np.ndarray
    targets: np.ndarray
    owner: np.ndarray
    samples: np.ndarray
    cu_loss: np.ndarray
    images: tuple[Hashable, ...]


def image_index(parts: Sequence[Part], merge: int) -> tuple[dict[Hashable, tuple[int, int, int, int]], tuple[Hashable, ...]]:
    """Per distinct image key its (frames, rows, columns, first feature row) in merged tokens; and the keys in order of appearance.

    Raises ValueError when a grid does not divide by `merge`, when a part has as many keys as grids not, or a key two grids.
    """
    found: dict[Hashable, tuple[int, int, int, int]] = {}
    row = 0
    for part in parts:
        if len(part.images) != len(part.grids):
            raise ValueError(f"{part.name}: {len(part.images)} images, but {len(part.grids)} grids")
        for key, (frames, rows, cols) in zip(part.images, part.grids, strict=True):
            if rows % merge or cols % merge or min(frames, rows, cols) < 1:
                raise ValueError(f"{part.name}: a grid of {frames} x {rows} x {cols} patches does not divide into squares of {merge}")
            grid = (int(frames), int(rows) // merge, int(cols) // merge)
            if found.setdefault(key, (*grid, row))[:3] != grid:
                raise ValueError(
                    f"{part.name}: an image has a grid of {grid} merged tokens here and {found[key][:3]} elsewhere; key images apart"
                )
            if found[key][3] == row:
                row += math.prod(grid)
    return found, tuple(found)


def layout_numpy(parts: Sequence[Part], images: dict[Hashable, tuple[int, int, int, int]], image_token: int) -> Layout:
    """The layout; arguments as native.layout's, with the image index of its parts."""
    spans = [_check(part, [images[key] for key in part.images], image_token) for part in parts]
    suffix_rows = [sum(len(ids) - 1 for ids, _ in part.suffixes) for part in parts]
    grouped, others = [i for i, rows in enumerate(suffix_rows) if rows], [i for i, rows in enumerate(suffix_rows) if not rows]
    positions = [_positions(part, span, [images[key][:3] for key in part.images]) for part, span in zip(parts, spans, strict=True)]

    # (part, suffix or None for the prefix) -> tokens that have rows
    texts: dict[tuple[int, int | None], np.ndarray] = {(i, None): parts[i].ids for i in grouped}
    texts |= {(i, j): ids[:-1] for i in grouped for j, (ids, _) in enumerate(parts[i].suffixes) if len(ids) > 1}
    texts |= {(i, None): _prefix(parts[i], image_token) for i in others}
    cu = np.cumsum([0, *map(len, texts.values())], dtype=np.int64)
    start = dict(zip(texts, cu.tolist(), strict=False))
    blocks = [positions[i][:, : len(ids)] if j is None else _after(positions[i], len(ids)) for (i, j), ids in texts.items()]

    samples, losses = [], []
    for i in [*grouped, *others]:
        for j, suffix in enumerate(parts[i].suffixes or [(parts[i].ids[:0], parts[i].trained[:0])]):
            samples.append(parts[i].sample + j)
            losses.append(_losses(parts[i], start[i, None], *suffix, start.get((i, j), 0)))
    counts = [len(rows) for rows, _ in losses]
    per_group = [suffix_rows[i] for i in grouped]
    cross_k = np.cumsum([0, *(len(parts[i].ids) for i in grouped)], dtype=np.int32)
    used = [(start[i, None] + at, images[key]) for i in [*grouped, *others] for at, key in zip(spans[i], parts[i].images, strict=True)]
    return Layout(
        input_ids=_joined(list(texts.values())),
        position_ids=np.concatenate([np.empty((3, 0), np.int64), *blocks], axis=1),
        cu=cu.astype(np.int32),
        cross_q=np.cumsum([0, *per_group], dtype=np.int32),
        cross_k=cross_k,
        prefix_rows=int(cross_k[-1]),
        suffix_rows=sum(per_group),
        image_slots=_joined([row + np.arange(math.prod(image[:3])) for row, image in used]),
        image_rows=_joined([image[3] + np.arange(math.prod(image[:3])) for _, image in used]),
        loss_rows=_joined([rows for rows, _ in losses]),
        targets=_joined([targets for _, targets in losses]),
        owner=np.repeat(np.array(samples, np.int64), counts),
        samples=np.array(samples, np.int64),
        cu_loss=np.cumsum([0, *counts], dtype=np.int64),
        images=tuple(images),
    )


def _prefix(part: Part, image_token: int) -> np.ndarray:
    """The tokens of a prefix that have rows."""
    whole = part.suffixes or len(part.ids) == 1 or part.ids[-1] == image_token
    return part.ids if whole else part.ids[:-1]


def _after(prefix: np.ndarray, rows: int) -> np.ndarray:
    """Positions of a suffix's rows behind a prefix with these."""
    return np.broadcast_to(prefix.max() + 1 + np.arange(rows), (3, rows))


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int64), *arrays])


def _check(part: Part, images: list[tuple[int, int, int, int]], image_token: int) -> list[int]:
    """Where each image's placeholder tokens start in the prefix."""
    _check_shapes(part)
    if not len(part.ids):
        raise ValueError(f"{part.name}: no tokens; leave the row out")
    placeholders = part.ids == image_token
    needed, found = sum(math.prod(image[:3]) for image in images), int(placeholders.sum())
    if found != needed:
        raise ValueError(
            f"{part.name}: {found} image placeholder tokens, but its {len(images)} images need {needed}; a row is never cut: encode it "
            "whole or leave it out"
        )
    starts, at = [], 0
    for i, image in enumerate(images):
        tokens = math.prod(image[:3])
        at += int(np.argmax(placeholders[at:]))
        run = int(np.argmin(np.append(placeholders[at:], False)))
        if run < tokens:
            raise ValueError(f"{part.name}: image {i} needs {tokens} adjacent placeholder tokens and has {run}; encode the row again")
        starts.append(at)
        at += tokens
    for j, (ids, _) in enumerate(part.suffixes):
        name = f"{part.name}: sample {part.sample + j} has"
        if not len(ids):
            raise ValueError(f"{name} an empty suffix; leave it out")
        if (ids == image_token).any():
            raise ValueError(f"{name} an image placeholder token in its suffix; images belong to the prefix, and sampling must ban it")
    return starts


def _check_shapes(part: Part) -> None:
    shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = [
        ("trained", np.shape(trained), (len(ids),)) for ids, trained in [(part.ids, part.trained), *part.suffixes]
    ]
    if part.positions is not None:
        shapes.append(("positions", np.shape(part.positions), (3, len(part.ids))))
    for what, found, wanted in shapes:
        if found != wanted:
            raise ValueError(f"{what}: expected the shape that goes with the number of ids")


def _positions(part: Part, starts: list[int], grids: list[tuple[int, int, int]]) -> np.ndarray:
    return mrope_positions(len(part.ids), starts, grids) if part.positions is None else np.asarray(part.positions)


def mrope_positions(length: int, starts: Sequence[int], grids: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """M-RoPE positions, (3, length) int64, of a sequence whose images start at `starts` with (frames, rows, columns) merged tokens.

    Text counts up in all three rows; an image's tokens share one time and carry their row and column; what follows continues after the
    image's longer side. As transformers' `get_rope_index` of every family in model/families.
    """
    out, at, position = np.empty((3, length), np.int64), 0, 0
    for grid, first in zip(grids, starts, strict=True):
        out[:, at:first] = position + np.arange(first - at)
        position += first - at
        at = first + math.prod(grid)
        out[:, first:at] = position + np.indices(grid).reshape(3, -1)
        position += max(grid[1:])
    out[:, at:] = position + np.arange(length - at)
    return out


def _losses(part: Part, start: int, ids: np.ndarray, trained: np.ndarray, suffix_start: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows that predict the trained tokens of a prefix and one suffix, and these tokens."""
    rows = np.concatenate([start + np.arange(len(part.ids)), suffix_start + np.arange(len(ids))])
    wanted = np.flatnonzero(np.concatenate([part.trained, trained])[1:])
    return rows[wanted], np.concatenate([part.ids, ids])[1:][wanted]

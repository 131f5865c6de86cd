"""The vision tower of an unmodified transformers model, of any of the families, over packed images, without a host sync on CUDA.

Called with grid_thw alone, a tower works out on the device, and reads back, what the grids say: positions, where attention begins and
ends, the order in which windows are visited. The grids are known on the host, so all of it is built there and handed over in the keyword
arguments that transformers takes precomputed; nothing is left in a tower's forward or backward pass that waits for the device.
P patches, I images, m**2 patches to a merged token, S frames, W windows, H width of the language model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.utils.generic import is_flash_attention_requested

from actial_fast.model.attention import remember
from actial_fast.model.families.known import family_of_tower
from actial_fast.packing.batch import Segments
from actial_fast.packing.images import ImageSettings


@dataclass(frozen=True)
class VisionArguments:
    """What a tower needs to know of some images' grids.

    grids: per image (frames, rows, columns) in patches; rows: per image its merged tokens; position_ids (P, 2) int64, row and column of
    every patch; frames: the S segments of P patches that attend to themselves; window_index (P / m**2,) int64, the merged token that
    comes at each place when windows are visited one after the other, and windows: the W segments of that order, at the layers with
    windows; both None for a tower without windows. taps (P, 4) int64 and shares (P, 4) float32: which learned positions make a patch's,
    and how much of each; both None for a tower without.
    """

    grids: tuple[tuple[int, int, int], ...]
    rows: tuple[int, ...]
    position_ids: Tensor
    frames: Segments
    window_index: Tensor | None = None
    windows: Segments | None = None
    taps: Tensor | None = None
    shares: Tensor | None = None

    @property
    def patches(self) -> int:
        """Patches P of all images."""
        return len(self.position_ids)

    def to(self, device: torch.device) -> VisionArguments:
        """The arguments on `device`, without waiting for the copies when they are pinned."""

        def move(segments: Segments) -> Segments:
            return replace(segments, cu=segments.cu.to(device, non_blocking=True))

        names = [name for name in ("position_ids", "window_index", "taps", "shares") if getattr(self, name) is not None]
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, **moved, frames=move(self.frames), windows=None if self.windows is None else move(self.windows))

    def kwargs(self, *, flash: bool) -> dict[str, Any]:
        """Keyword arguments of a tower's forward pass, `grid_thw` among them (on the host, where nobody reads it).

        flash: the tower's attention takes all segments in one call. Others (sdpa, eager) take them one by one and read their bounds on the
        host, which then stay there.
        """
        given = {"grid_thw": torch.tensor(self.grids), "position_ids": self.position_ids, **_bounds(self.frames, "seqlen", flash)}
        if self.windows is not None:
            given |= {"window_index": self.window_index, **_bounds(self.windows, "window_seqlen", flash)}
        if self.taps is not None:
            given |= {"interp_indices": self.taps, "interp_weights": self.shares}
        return given


def _bounds(segments: Segments, name: str, flash: bool) -> dict[str, Any]:
    cu = segments.cu if flash else torch.tensor([0, *segments.lengths]).cumsum(0, dtype=torch.int32)
    return {f"cu_{name}s": cu, f"max_{name}": segments.longest}


def vision_arguments(grids: Sequence[tuple[int, int, int]], config: PreTrainedConfig, *, pin: bool = False) -> VisionArguments:
    """The arguments for images of these grids, one behind the other, on the CPU.

    grids: per image (frames, rows, columns) in patches; config: the tower's, `model.config.vision_config`; pin: in page-locked memory.
    ValueError for no grids, for one whose rows and columns do not divide into merged tokens, and for a tower of another kind.
    """
    family, merge = family_of_tower(config), config.spatial_merge_size
    side, table = family.window(config), family.table(config)
    if not grids:
        raise ValueError("grids: at least one image is needed")
    for i, grid in enumerate(grids):
        if len(grid) != 3 or min(grid) < 1 or grid[1] % merge or grid[2] % merge:
            raise ValueError(
                f"grids[{i}]: {tuple(grid)} is not (frames, rows, columns) in patches, with rows and columns multiples of {merge}"
            )
    frames = [_frame(rows, columns, merge, side, table) for count, rows, columns in grids for _ in range(count)]
    arguments = VisionArguments(
        grids=tuple((int(t), int(h), int(w)) for t, h, w in grids),
        rows=tuple(int(math.prod(grid)) // merge**2 for grid in grids),
        position_ids=_joined([frame.positions for frame in frames], pin),
        frames=_segments(np.array([len(frame.positions) for frame in frames]), pin),
    )
    if table:
        arguments = replace(
            arguments,
            taps=_joined([frame.taps for frame in frames], pin),
            shares=_joined([frame.shares for frame in frames], pin, torch.float32),
        )
    if not side:
        return arguments
    starts = np.cumsum([0, *(len(frame.order) for frame in frames)])
    order = _joined([frame.order for frame in frames], pin)
    order += torch.from_numpy(np.repeat(starts[:-1], np.diff(starts)))
    return replace(arguments, window_index=order, windows=_segments(np.concatenate([frame.windows for frame in frames]), pin))


def check_patches(settings: ImageSettings, config: PreTrainedConfig) -> None:
    """ValueError where an image processor cuts other patches than a tower of this configuration takes."""
    cut = settings.patch, settings.merge, settings.frames
    taken = config.patch_size, config.spatial_merge_size, config.temporal_patch_size
    if cut != taken:
        raise ValueError(
            f"model.path: its image processor cuts for {cut}, its vision tower takes {taken}: pixels along a patch, patches along a merged "
            "token, frames; put the preprocessor_config.json of the same checkpoint there"
        )


@dataclass(frozen=True)
class _Frame:
    """One frame's share of the arguments; the arrays are shared by all frames of its size. windows: patches in each. What a tower has no
    use for is empty."""

    positions: np.ndarray
    order: np.ndarray
    windows: np.ndarray
    taps: np.ndarray
    shares: np.ndarray


@lru_cache(maxsize=256)
def _frame(rows: int, columns: int, merge: int, side: int, table: int) -> _Frame:
    """side: of a window in merged tokens; table: of the learned positions; 0 for a tower without."""
    blocks = np.indices((rows, columns)).reshape(2, rows // merge, merge, columns // merge, merge)
    positions = np.ascontiguousarray(blocks.transpose(1, 3, 2, 4, 0)).reshape(-1, 2)
    order = windows = np.empty(0, np.int64)
    if side:
        y, x = np.indices((rows // merge, columns // merge)).reshape(2, -1) // side
        window = y * (x[-1] + 1) + x
        order, windows = np.argsort(window, kind="stable"), np.bincount(window) * merge**2
    return _Frame(positions, order, windows, *_interpolated(positions, (rows, columns), table))


def _interpolated(positions: np.ndarray, lengths: tuple[int, int], table: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each patch (P, 2) falls in a square table laid over the frame from corner to corner: its four neighbours there (P, 4) int64,
    and the bilinear share of each (P, 4) float32, in the operations of transformers."""
    if not table:
        return np.empty((0, 4), np.int64), np.empty((0, 4), np.float32)
    taps, shares = [], []
    for index, length in zip(positions.T.astype(np.float32), lengths, strict=True):
        place = index * np.float32(table - 1) / np.float32(max(length - 1, 1))
        below = np.floor(place)[:, None]
        neighbours = below.astype(np.int64) + np.arange(2)
        shares.append(np.maximum(np.float32(1) - np.abs(place[:, None] - below - np.arange(2, dtype=np.float32)), 0))
        taps.append(np.clip(neighbours, 0, table - 1))
    down, right = taps
    return (down[:, :, None] * table + right[:, None]).reshape(-1, 4), (shares[0][:, :, None] * shares[1][:, None]).reshape(-1, 4)


def _joined(parts: list[np.ndarray], pin: bool, dtype: torch.dtype = torch.int64) -> Tensor:
    out = torch.empty(sum(map(len, parts)), *parts[0].shape[1:], dtype=dtype, pin_memory=pin)
    np.concatenate(parts, out=out.numpy())
    return out


def _segments(lengths: np.ndarray, pin: bool) -> Segments:
    cu = torch.zeros(len(lengths) + 1, dtype=torch.int32, pin_memory=pin)
    np.cumsum(lengths, out=cu.numpy()[1:])
    return Segments(cu, tuple(lengths.tolist()), int(lengths.max()))


def encode_images(visual: nn.Module, patches: Tensor, arguments: VisionArguments) -> Tensor:
    """The merged features (rows, H) of all images, one behind the other; arguments.rows of each: the tower's `pooler_output` from grid_thw,
    and beside it the further levels of a family that has such, (rows, levels * H).

    visual: the tower, `model.model.visual`, on the attention of `use_packed_attention` or any other of transformers; patches (P, D), as
    the image processor orders them, in the tower's dtype; arguments: `vision_arguments` of the same images, on the patches' device.
    Differentiable in the tower's weights and the patches, also under gradient checkpointing. No host sync on CUDA, forward and
    backward. ValueError for a number of patches that is not that of the grids, and for arguments on another device.
    """
    if len(patches) != arguments.patches:
        raise ValueError(f"patches: {len(patches)} rows, but the grids {arguments.grids} have {arguments.patches}")
    if patches.device != arguments.position_ids.device:
        raise ValueError(f"arguments: on {arguments.position_ids.device}, patches on {patches.device}; use arguments.to(device)")
    for segments in filter(None, (arguments.frames, arguments.windows)):
        remember(segments)
    out = visual(patches, **arguments.kwargs(flash=is_flash_attention_requested(visual.config)))
    return family_of_tower(visual.config).features(out)

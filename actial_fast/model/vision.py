"""The vision tower of an unmodified transformers Qwen2-VL or Qwen2.5-VL over packed images, without a host sync on CUDA.

Called with grid_thw alone, a tower works out on the device, and reads back, what the grids say: positions, where attention begins and
ends, the order in which windows are visited. The grids are known on the host, so all of it is built there and handed over in the keyword
arguments that transformers takes precomputed; nothing is left in a tower's forward or backward pass that waits for the device.
P patches, I images, m**2 patches to a merged token, S frames, W windows, H width of the features.
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
from actial_fast.packing.batch import Segments

WINDOWED, PLAIN = ("qwen2_5_vl_vision",), ("qwen2_vl_vision",)  # towers by the model_type of their config


@dataclass(frozen=True)
class VisionArguments:
    """What a tower needs to know of some images' grids.

    grids: per image (frames, rows, columns) in patches; rows: per image its merged tokens; position_ids (P, 2) int64, row and column of
    every patch; frames: the S segments of P patches that attend to themselves; window_index (P / m**2,) int64, the merged token that
    comes at each place when windows are visited one after the other, and windows: the W segments of that order, at the layers with
    windows; both None for a tower without windows.
    """

    grids: tuple[tuple[int, int, int], ...]
    rows: tuple[int, ...]
    position_ids: Tensor
    frames: Segments
    window_index: Tensor | None = None
    windows: Segments | None = None

    @property
    def patches(self) -> int:
        """Patches P of all images."""
        return len(self.position_ids)

    def to(self, device: torch.device) -> VisionArguments:
        """The arguments on `device`, without waiting for the copies when they are pinned."""

        def move(segments: Segments) -> Segments:
            return replace(segments, cu=segments.cu.to(device, non_blocking=True))

        moved = replace(self, position_ids=self.position_ids.to(device, non_blocking=True), frames=move(self.frames))
        if self.windows is None or self.window_index is None:
            return moved
        return replace(moved, window_index=self.window_index.to(device, non_blocking=True), windows=move(self.windows))

    def kwargs(self, *, flash: bool) -> dict[str, Any]:
        """Keyword arguments of a tower's forward pass, `grid_thw` among them (on the host, where nobody reads it).

        flash: the tower's attention takes all segments in one call. Others (sdpa, eager) take them one by one and read their bounds on the
        host, which then stay there.
        """
        given = {"grid_thw": torch.tensor(self.grids), "position_ids": self.position_ids, **_bounds(self.frames, "seqlen", flash)}
        if self.windows is not None:
            given |= {"window_index": self.window_index, **_bounds(self.windows, "window_seqlen", flash)}
        return given


def _bounds(segments: Segments, name: str, flash: bool) -> dict[str, Any]:
    cu = segments.cu if flash else torch.tensor([0, *segments.lengths]).cumsum(0, dtype=torch.int32)
    return {f"cu_{name}s": cu, f"max_{name}": segments.longest}


def vision_arguments(grids: Sequence[tuple[int, int, int]], config: PreTrainedConfig, *, pin: bool = False) -> VisionArguments:
    """The arguments for images of these grids, one behind the other, on the CPU.

    grids: per image (frames, rows, columns) in patches; config: the tower's, `model.config.vision_config`; pin: in page-locked memory.
    ValueError for no grids, for one whose rows and columns do not divide into merged tokens, and for a tower of another kind.
    """
    windowed = config.model_type in WINDOWED
    if not windowed and config.model_type not in PLAIN:
        raise ValueError(f"config: {config.model_type} is not a vision tower known here; known are {', '.join((*WINDOWED, *PLAIN))}")
    merge, side = config.spatial_merge_size, 0
    if windowed:
        side = config.window_size // merge // config.patch_size
        if not side:
            raise ValueError(f"config.window_size: {config.window_size} pixels hold no merged token of {merge * config.patch_size}")
    if not grids:
        raise ValueError("grids: at least one image is needed")
    for i, grid in enumerate(grids):
        if len(grid) != 3 or min(grid) < 1 or grid[1] % merge or grid[2] % merge:
            raise ValueError(
                f"grids[{i}]: {tuple(grid)} is not (frames, rows, columns) in patches, with rows and columns multiples of {merge}"
            )
    frames = [_frame(rows, columns, merge, side) for count, rows, columns in grids for _ in range(count)]
    arguments = VisionArguments(
        grids=tuple((int(t), int(h), int(w)) for t, h, w in grids),
        rows=tuple(int(math.prod(grid)) // merge**2 for grid in grids),
        position_ids=_joined([frame.positions for frame in frames], pin),
        frames=_segments(np.array([len(frame.positions) for frame in frames]), pin),
    )
    if not windowed:
        return arguments
    starts = np.cumsum([0, *(len(frame.order) for frame in frames)])
    order = _joined([frame.order for frame in frames], pin)
    order += torch.from_numpy(np.repeat(starts[:-1], np.diff(starts)))
    return replace(arguments, window_index=order, windows=_segments(np.concatenate([frame.windows for frame in frames]), pin))


@dataclass(frozen=True)
class _Frame:
    """One frame's share of the arguments; the arrays are shared by all frames of its size. windows: patches in each; it and order are empty
    for a tower without windows."""

    positions: np.ndarray
    order: np.ndarray
    windows: np.ndarray


@lru_cache(maxsize=256)
def _frame(rows: int, columns: int, merge: int, side: int) -> _Frame:
    """side: of a window in merged tokens, 0 for a tower without windows."""
    blocks = np.indices((rows, columns)).reshape(2, rows // merge, merge, columns // merge, merge)
    positions = np.ascontiguousarray(blocks.transpose(1, 3, 2, 4, 0)).reshape(-1, 2)
    if not side:
        return _Frame(positions, np.empty(0, np.int64), np.empty(0, np.int64))
    y, x = np.indices((rows // merge, columns // merge)).reshape(2, -1) // side
    window = y * (x[-1] + 1) + x
    return _Frame(positions, np.argsort(window, kind="stable"), np.bincount(window) * merge**2)


def _joined(parts: list[np.ndarray], pin: bool) -> Tensor:
    out = torch.empty(sum(map(len, parts)), *parts[0].shape[1:], dtype=torch.int64, pin_memory=pin)
    np.concatenate(parts, out=out.numpy())
    return out


def _segments(lengths: np.ndarray, pin: bool) -> Segments:
    cu = torch.zeros(len(lengths) + 1, dtype=torch.int32, pin_memory=pin)
    np.cumsum(lengths, out=cu.numpy()[1:])
    return Segments(cu, tuple(lengths.tolist()), int(lengths.max()))


def encode_images(visual: nn.Module, patches: Tensor, arguments: VisionArguments) -> Tensor:
    """The merged features (rows, H) of all images, one behind the other; arguments.rows of each: the tower's `pooler_output` from grid_thw.

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
    features: Tensor = visual(patches, **arguments.kwargs(flash=is_flash_attention_requested(visual.config))).pooler_output
    return features

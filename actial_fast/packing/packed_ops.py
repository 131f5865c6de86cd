"""Images and embeddings of a packed micro-batch: pixels to patches, and text rows with image rows to the model's input.

CUDA tensors go to the Triton kernels; on the CPU patches are cut by the extension and rows are placed by torch. No host sync on CUDA.
L rows, H hidden size, V vocabulary, F rows of image features, M image rows, I images, P patches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from actial_fast.ops import checks
from actial_fast.ops.library import current_device
from actial_fast.ops.sharding import plain_tensors
from actial_fast.packing import native

if TYPE_CHECKING:
    from actial_fast.packing.images import ImageSettings, ImageStore

ALIGN = 16  # bytes, of an image in a PixelBatch: what one load of the device takes


@dataclass(frozen=True)
class PixelBatch:
    """The pixels of I images as the device takes them.

    pixels (N,) uint8, the images (H, W, 3) behind one another, each from a multiple of 16 bytes on, N a multiple of 16; table (3, I)
    int64: first merged token, first byte, merged tokens in a row of the image; grids: per image (frames, rows, columns) in patches;
    tokens: merged tokens of all images; settings: of the store they come from.
    """

    pixels: Tensor
    table: Tensor
    grids: tuple[tuple[int, int, int], ...]
    tokens: int
    settings: ImageSettings

    def to(self, device: torch.device) -> PixelBatch:
        """The batch on `device`, without waiting for the copy when it is pinned."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ("pixels", "table")}
        return replace(self, **moved)


def collect(store: ImageStore, keys: Iterable[str], *, pin: bool = False) -> PixelBatch:
    """The pixels of the images with these keys, in order, on the CPU; pin: in page-locked memory. KeyError as ImageStore.pixels."""
    keys = list(keys)
    grids, settings = tuple(store.grid(key) for key in keys), store.settings
    merge, sizes = settings.merge, [3 * math.prod(grid) * settings.patch**2 for grid in grids]
    tokens = np.cumsum([0, *(math.prod(grid) // merge**2 for grid in grids)])
    starts = np.cumsum([0, *(-(-size // ALIGN) * ALIGN for size in sizes)])
    pixels = torch.zeros(int(starts[-1]), dtype=torch.uint8, pin_memory=pin)
    flat = pixels.numpy()
    for key, start, size in zip(keys, starts, sizes, strict=False):
        store.copy(key, flat[start : start + size])
    table = torch.from_numpy(np.array([tokens[:-1], starts[:-1], [columns // merge for _, _, columns in grids]], np.int64))
    return PixelBatch(pixels, table.pin_memory() if pin else table, grids, int(tokens[-1]), store.settings)


def patchify(batch: PixelBatch, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normalised patches (P, 3 * frames * patch**2) of all images, in the order and with the values of Qwen2-VL's image processor.

    Rows run over images, then (rows / merge, columns / merge, merge, merge); a row over (channel, frame, y, x). dtype fp32, fp16 or bf16.
    One launch on CUDA. ValueError for another dtype.
    """
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype: expected float32, float16 or bfloat16, got {dtype}")
    settings = batch.settings
    patch, merge, frames = settings.patch, settings.merge, settings.frames
    mean, std = np.array(settings.mean), np.array(settings.std)
    if _on_gpu(batch.pixels):
        from actial_fast.kernels.patchify import patchify as run

        scale, shift = tuple((1 / (255 * std)).tolist()), tuple((-mean / std).tolist())
        sizes = {"patch": patch, "merge": merge, "frames": frames}
        with current_device(batch.pixels):
            return run(batch.pixels, batch.table, batch.tokens, **sizes, scale=scale, shift=shift, dtype=dtype)
    out, at = torch.empty(batch.tokens * merge**2, 3 * frames * patch**2, dtype=dtype), 0
    for (_, rows, columns), start in zip(batch.grids, batch.table[1].tolist(), strict=True):
        shape = rows * patch, columns * patch, 3
        image = batch.pixels[start : start + math.prod(shape)].reshape(shape).numpy()
        patches = native.patchify(image, patch=patch, merge=merge, frames=frames, mean=mean, std=std)
        out[at : at + len(patches)] = torch.from_numpy(patches)
        at += len(patches)
    return out


@plain_tensors
def embed(input_ids: Tensor, table: Tensor, features: Tensor | None, image_slots: Tensor, image_rows: Tensor) -> Tensor:
    """The model's input (L, H), in the table's dtype: row image_slots[j] is features[image_rows[j]], every other row table[input_ids].

    input_ids (L,) int64; table (V, H), the embedding's weight; features (F, H) of any floating dtype, None where there are no images;
    image_slots (M,) int64, ascending, and image_rows (M,) int64, as PackedBatch has them; a feature row may be used any number of times.
    Differentiable once in table and features, each only where it requires a gradient: a feature's is summed over its uses in float32 and
    in a fixed order, the table's leaves out image rows. One launch on CUDA, and no sync: an id or a row out of range gives NaN there
    (nothing is read out of bounds), and a ValueError on the CPU, as arguments do that do not fit together.
    """
    if table.ndim != 2 or not table.is_floating_point() or not len(table):
        raise ValueError(f"table: expected (V, H) floating point with V >= 1, got {checks.text(table)}")
    if features is None:
        features = table.new_empty(0, table.shape[1])
    if features.ndim != 2 or features.shape[1] != table.shape[1] or not features.is_floating_point():
        raise ValueError(f"features: expected (F, {table.shape[1]}) floating point to fit table, got {checks.text(features)}")
    for name, x in (("input_ids", input_ids), ("image_slots", image_slots), ("image_rows", image_rows)):
        if x.ndim != 1 or x.dtype != torch.int64:
            raise ValueError(f"{name}: expected int64 of one dimension, got {checks.text(x)}")
        checks.match(name, x, "table", table, dtype=False)
    checks.match("features", features, "table", table, dtype=False)
    if len(image_slots) != len(image_rows):
        raise ValueError(f"image_rows: expected one for each of {len(image_slots)} image_slots, got {len(image_rows)}")
    if _on_gpu(table):
        from actial_fast.kernels.embedding import embed as run

        with current_device(table):
            return run(input_ids.contiguous(), _rows(table), _rows(features), image_slots.contiguous(), image_rows.contiguous())
    _check_range("input_ids", input_ids, len(table))
    _check_range("image_slots", image_slots, len(input_ids))
    _check_range("image_rows", image_rows, len(features))
    if (image_slots.diff() <= 0).any():
        raise ValueError("image_slots: must ascend; sort them, and image_rows with them")
    placed = features.to(torch.promote_types(features.dtype, torch.float32)).index_select(0, image_rows).to(table.dtype)
    return F.embedding(input_ids, table).index_copy(0, image_slots, placed)


@plain_tensors
def add_features(hidden: Tensor, features: Tensor, image_slots: Tensor, image_rows: Tensor) -> Tensor:
    """hidden (L, H) with features[image_rows[j]] added to row image_slots[j]; indices as `embed` takes them, features (F, H) of any
    floating dtype.

    Differentiable in both; a feature's gradient is summed over its uses in float32 and in a fixed order. No host sync.
    """
    if not len(image_slots):
        return hidden
    wide = features if features.is_cuda else features.to(torch.promote_types(features.dtype, torch.float32))  # CUDA sums so by itself
    return hidden.index_add(0, image_slots, F.embedding(image_rows, wide).to(hidden.dtype))


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda  # a function of its own, so that tests can send CPU tensors through Triton's interpreter


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _check_range(name: str, x: Tensor, limit: int) -> None:
    if len(x) and not 0 <= int(x.min()) <= int(x.max()) < limit:
        raise ValueError(f"{name}: expected values in [0, {limit}), got {int(x.min())} to {int(x.max())}")

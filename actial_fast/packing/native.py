"""The one place that imports the C++ extension, and what runs in its stead where it was not built.

AVAILABLE says whether the extension is in use; WHY_NOT says why it is not and what that costs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from actial_fast.packing.layout import Layout, Part, image_index, layout_numpy
from actial_fast.packing.planning import Capacity, Costs, Plan, plan_python

try:
    from actial_fast import _C
except ImportError as error:
    _C = None
    WHY_NOT = f"the C++ extension could not be imported ({error}); numpy cuts the images, about 3x slower, and Python plans the batches"
else:
    WHY_NOT = ""
AVAILABLE = _C is not None


def patchify(image: np.ndarray, *, patch: int, merge: int, frames: int, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Normalised patches of one image in the order of Qwen2-VL's image processor.

    image (H, W, 3) uint8 with H and W multiples of patch * merge -> (H/patch * W/patch, 3 * frames * patch**2) float32; rows run over
    (H/patch/merge, W/patch/merge, merge, merge), a row is (channel, frame, y, x), values are (v / 255 - mean) / std with mean and std (3,).
    Raises ValueError when the size does not divide.
    """
    scale = (1 / (255 * np.asarray(std, np.float64))).astype(np.float32)
    shift = (-np.asarray(mean, np.float64) / np.asarray(std, np.float64)).astype(np.float32)
    if _C is not None:
        return _C.patchify(np.ascontiguousarray(image), patch, merge, frames, scale.tolist(), shift.tolist())
    return patchify_numpy(image, patch, merge, frames, scale, shift)


def decode_step(*given: np.ndarray, scale: float) -> np.ndarray:
    """One decoding step of one layer: qkv (R, (H + 2 K) D), cos, sin (R, D), keys, values (blocks, S, K, D), which it writes to, slots,
    row, own_table, own_tokens, members, prefix_table, prefix_tokens -> (R, H D), all float32 or as csrc/decode.h says. The twin is
    model/paged.py's, which is also what runs without the extension (AVAILABLE) and in other dtypes."""
    return _C.decode_step(*given, scale)


def add_norm(x: np.ndarray, more: np.ndarray | None, weight: np.ndarray, eps: float) -> np.ndarray:
    """RMSNorm of x + more, which x becomes: x, more (R, H), weight (H,) -> (R, H), all float32. The twins of this, of `gated` and of
    `draw` are torch's operators: in model/trunk.py and rollout/decoder.py."""
    return _C.add_norm(x, more, weight, eps)


def gated(x: np.ndarray) -> np.ndarray:
    """silu(gate) up: x (R, 2 I) float32, a row's gate and up one behind the other -> (R, I)."""
    return _C.gated(x)


def draw(
    logits: np.ndarray, row: np.ndarray, uniforms: np.ndarray | None, temperature: float, banned: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """One token for each of W replies and its log-prob: logits (R, V) float32, row (W,) int64 a reply's row, uniforms (W,) float64 or None
    for the likeliest, banned (B,) int64 ids that are never drawn -> (W,) int64, (W,) float32. ValueError for a temperature of 0."""
    return _C.draw(logits, row, uniforms, temperature, banned)


def patchify_numpy(image: np.ndarray, patch: int, merge: int, frames: int, scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """The twin of the extension's patchify: the oracle of its test, and its stand-in where it was not built."""
    height, width, _ = image.shape
    factor = patch * merge
    if height % factor or width % factor or not image.size:
        raise ValueError(f"image: height and width must be positive multiples of patch * merge = {factor}; resize it first")
    value = image.astype(np.float32) * scale + shift
    value = value.reshape(height // factor, merge, patch, width // factor, merge, patch, 3)
    value = value.transpose(0, 3, 1, 4, 6, 2, 5)[:, :, :, :, :, None]  # (gh/m, gw/m, m, m, C, 1, p, p)
    value = np.broadcast_to(value, (*value.shape[:5], frames, patch, patch))
    return np.ascontiguousarray(value).reshape(-1, 3 * frames * patch * patch)


def plan(
    prefix_tokens: np.ndarray,
    suffix_tokens: np.ndarray,
    suffix_offsets: np.ndarray,
    patches: np.ndarray,
    *,
    capacity: Capacity,
    costs: Costs,
    ranks: int = 1,
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> Plan:
    """Micro-batches per rank for n groups of one prefix and any number of suffixes: ranks balanced by cost, micro-batches packed by both
    capacities, those of a rank by falling cost.

    prefix_tokens, patches (n,) int; suffix_tokens: all suffixes' lengths, group g's from suffix_offsets[g] to suffix_offsets[g + 1] - 1,
    suffix_offsets (n + 1,); a group without suffixes is a plain sequence. A group that does not fit is cut into adjacent micro-batches of
    its rank, prefix and patches counted in each. The seed only breaks ties between groups of equal size. names: what to call a group in
    messages (default: "row g"). Raises ValueError naming the row when a prefix with one suffix, or its images, exceed a capacity or a
    length is below 1.
    """
    given = (prefix_tokens, suffix_tokens, suffix_offsets, patches)
    prefix, suffix, starts, images = (np.ascontiguousarray(x, np.int64) for x in given)
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: expected 0 to 2**64 - 1, got {seed}")
    if _C is not None:
        limits = (capacity.tokens, capacity.patches)
        coefficients = (costs.linear, costs.quadratic, costs.vision, costs.constant)
        per_rank, pieces, offsets = _C.plan(prefix, suffix, starts, images, limits, coefficients, ranks, seed, names)
    else:
        per_rank, pieces, offsets = plan_python(prefix, suffix, starts, images, capacity, costs, ranks, seed, names)
    return Plan(ranks, per_rank, pieces, offsets, costs)


def layout(parts: Sequence[Part], *, image_token: int, merge: int) -> Layout:
    """Every index of one packed micro-batch, from the groups' shares that a plan put into it.

    image_token: the placeholder's id; merge: patches along a side of a merged token. Raises ValueError naming the row when it has no
    tokens, when its images and its placeholder tokens disagree, when an image's tokens are not adjacent, or when a suffix holds one.
    """
    images, keys = image_index(parts, merge)
    if _C is None:
        return layout_numpy(parts, images, image_token)
    given = [(p.name, p.ids, p.trained, p.positions, p.suffixes, tuple(images[key] for key in p.images), p.sample) for p in parts]
    return Layout(**_C.layout(given, image_token), images=keys)

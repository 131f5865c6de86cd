"""The one place that imports the C++ extension, and what runs in its stead where it was not built.

AVAILABLE says whether the extension is in use; WHY_NOT says why it is not and what that costs.
"""

from __future__ import annotations

import numpy as np

try:
    from actial_fast import _C
except ImportError as error:
    _C = None
    WHY_NOT = f"the C++ extension could not be imported ({error}); images are cut into patches by numpy, about 3x slower"
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

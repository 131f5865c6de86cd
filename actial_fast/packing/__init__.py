"""Packed batches: sequences of which nothing is computed twice, from host plan to device tensors.

Here live rows, groups, micro-batches and images as arrays. No model, no loss, no Hugging Face: a trainer with another model can use it.
In order of reading: batch.py (a sequence, a packed batch, which sequences share a beginning), planning.py (what goes on which rank and in
which micro-batch) and layout.py (every index the device needs) with native.py before them (the same two in C++, ../../csrc), images.py
(decoded and resized once, kept on disk within a limit: room.py and claims.py), packed_ops.py (pixels to patches, text and image rows to
the model's input; ../kernels on CUDA).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actial_fast.packing.batch import Batch, Group, PackedBatch, Segments, Sequence, collate, pack, share
    from actial_fast.packing.images import ImageSettings, ImageStore

__all__ = ["Batch", "Group", "ImageSettings", "ImageStore", "PackedBatch", "Segments", "Sequence", "collate", "pack", "share"]


def __getattr__(name: str) -> Any:
    """On first use: recipes name the planner's costs without importing torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(importlib.import_module(f"{__name__}.{'images' if name.startswith('Image') else 'batch'}"), name)

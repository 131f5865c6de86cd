"""Loaded by every Python process whose PYTHONPATH names this folder: the two operators that torchvision's own library would have defined.

PyPI's torchvision is built for a torch with CUDA; beside a CPU torch its library does not load, and importing it fails where it registers
fake kernels for these. Nothing here calls them. Where torchvision fits torch, as in an installation for use, nothing is done.
"""

import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:
    LIBRARY = torch.library.Library("torchvision", "DEF")
    LIBRARY.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    LIBRARY.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

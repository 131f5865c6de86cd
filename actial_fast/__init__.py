"""actial_fast: Actial's two-stage viewpoint training for Qwen2-VL, Qwen2.5-VL and Qwen3-VL, and the ops it is made of.

The two loops are here (sft.py, grpo.py), and folders for all they stand on; each folder's own page says what lives in it. From the ground
up: ops, data -> report, tasks, integrations -> packing -> settings -> model -> train -> rollout -> evaluation -> the loops -> quickstart,
cli. A folder imports from those before it only. The public names are those of `ops`, loaded on first use, so that a process that only
reads data never imports torch.
"""

from typing import TYPE_CHECKING, Any

from actial_fast import ops

if TYPE_CHECKING:
    from actial_fast.ops import *  # noqa: F403

__all__ = ops.__all__


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(ops, name)

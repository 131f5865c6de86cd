"""Which families there are, and how one is found."""

from __future__ import annotations

from typing import Any

from actial_fast.model.families.family import Family
from actial_fast.model.families.qwen2_5_vl import Qwen25VL
from actial_fast.model.families.qwen2_vl import Qwen2VL
from actial_fast.model.families.qwen3_vl import Qwen3VL

FAMILIES: dict[str, Family] = {family.kind: family for family in (Qwen2VL(), Qwen25VL(), Qwen3VL())}
NAMES = ", ".join(family.name for family in FAMILIES.values())


def family_of(model: Any) -> Family:
    """The family of a transformers model or configuration that `known` says yes to."""
    config = getattr(model, "config", model)
    return FAMILIES[config.model_type]


def known(model: Any) -> bool:
    """Whether a transformers model, or configuration, is of one of the families."""
    return getattr(getattr(model, "config", model), "model_type", None) in FAMILIES


def family_of_tower(vision: Any) -> Family:
    """By the tower's configuration. ValueError for another family's."""
    for family in FAMILIES.values():
        if vision.model_type == family.tower_kind:
            return family
    kinds = ", ".join(family.tower_kind for family in FAMILIES.values())
    raise ValueError(f"config: {vision.model_type} is not a vision tower known here; known are {kinds}")

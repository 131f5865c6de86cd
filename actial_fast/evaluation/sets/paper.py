"""The rows of the paper's tables, per cent, as printed. Source: arXiv 2511.01618 (NeurIPS 2025), Tables 1 and A1 and section A.1.

The models: Qwen2.5-VL-7B is the base, Actial-7B both stages, "SFT only" is w/o G.E. in the paper, "GRPO only" w/o K.I., "one-stage SFT" the
ablation model of section A.3.
"""

from __future__ import annotations

from collections.abc import Sequence

BASE, SFT, GRPO, BOTH, ONE_STAGE, HUMANS = "Qwen2.5-VL-7B", "SFT only", "GRPO only", "Actial-7B", "one-stage SFT", "humans"


def table(figures: Sequence[str], rows: dict[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Rows of a table with these columns."""
    return {model: dict(zip(figures, values, strict=True)) for model, values in rows.items()}

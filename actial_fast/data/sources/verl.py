"""verl's parquet rows: prompt (messages), images, reward_model.ground_truth, data_source and ability.

The prompt is used as it is, so rows are for sampling (GRPO, evaluation): they carry a truth but no assistant turn.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from actial_fast.data.sources.row import BadRow, Row, Turn
from actial_fast.data.sources.table import Table


class VerlSource:
    """Random access to the rows of a verl table."""

    def __init__(self, path: Path):
        self._table = Table(path)
        names = set(self._table.column_names)
        if len(self._table) and not {"prompt", "reward_model"} <= names:
            raise ValueError(f"{path}: verl's format needs the columns prompt and reward_model; it has {sorted(names)}")
        self._kinds = [name for name in ("data_source", "ability") if name in names]

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Row:
        """Row `index`; BadRow when the prompt is not a list of text messages or the ground truth is missing."""
        record, where = self._table[index], self._table.where(index)
        prompt = record["prompt"]
        if not isinstance(prompt, list) or not all(isinstance(turn, dict) for turn in prompt):
            raise BadRow(where, "prompt is not a list of messages")
        if not all(isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str) for turn in prompt):
            raise BadRow(where, "a prompt message without a text role and content")
        reward = record["reward_model"]
        truth = reward.get("ground_truth") if isinstance(reward, dict) else None
        if truth is None or not str(truth).strip():
            raise BadRow(where, "empty answer (reward_model.ground_truth)")
        extra = record.get("extra_info")
        return Row(
            turns=tuple(Turn(turn["role"], turn["content"]) for turn in prompt),
            images=self._table.images(record.get("images"), index),
            truth=str(truth).strip(),
            kind=self.kind(index),
            id=str(extra["index"]) if isinstance(extra, dict) and extra.get("index") is not None else "",
            where=where,
        ).check()

    def kind(self, index: int) -> str:
        """data_source and ability of row `index`, joined by a slash when it has both."""
        return "/".join(str(value) for name in self._kinds if (value := self._table.value(index, name)))

    def images(self, index: int) -> tuple[pa.Scalar, ...]:
        """The images of row `index` as Table.cell has them."""
        return self._table.cell(index, "images") if "images" in self._table.column_names else ()

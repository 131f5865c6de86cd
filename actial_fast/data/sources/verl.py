"""verl's rows, from parquet or JSON: prompt (messages), images, reward_model.ground_truth, data_source, ability and extra_info.

The prompt is used as it is, so rows are for sampling (GRPO, evaluation): they carry a truth but no assistant turn. A ground truth may be a
list of texts, or have one under `target` (as Search-R1's), any of which is right. The options are extra_info's `choices` (or options,
answer_choices, answers), else those that the question offers, and the kind its `question_type`, else data_source and ability. extra_info,
and what other keys there are, is what a reward sees as `row.meta`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from actial_fast.data.sources.asked import offered
from actial_fast.data.sources.fields import (
    IMAGE_KEYS,
    absent,
    conversation,
    first_name,
    images_of,
    name_of,
    parsed,
    refuse,
    rest,
    texts,
    truths,
)
from actial_fast.data.sources.reader import Reader
from actial_fast.data.sources.row import BadRow, Row

CHOICES = ("choices", "options", "answer_choices", "answers")  # of extra_info
EXTRA_KINDS = ("question_type", "kind")  # of extra_info


class VerlSource(Reader):
    """Random access to the rows of one file or folder."""

    name, columns = "verl's format", ("prompt", "reward_model")
    kind_keys = ("data_source", "ability")

    def row(self, record: Mapping[str, Any], where: str, index: int) -> Row:
        """A prompt, its images and its ground truth; BadRow when the prompt is not a list of messages or the truth is missing."""
        meta = rest(record, ("prompt", "reward_model", *IMAGE_KEYS, *self.kind_keys), where)
        told = parsed(record.get("extra_info"), "extra_info", where)
        extra: Mapping[str, Any] = {} if absent(told) else told
        refuse(extra, [key for key in extra if key not in ("need_tools_kwargs", "interaction_kwargs")], where, "extra_info")
        prompt = parsed(record.get("prompt"), "prompt", where)
        if not isinstance(prompt, list):
            raise BadRow(where, "prompt is not a list of messages")
        turns, parts = conversation(prompt, "prompt", where)
        if turns and turns[-1].role == "assistant":
            raise BadRow(where, "the prompt ends with an assistant message, which a reply would have to go on with; that is not supported")
        reward = parsed(record.get("reward_model"), "reward_model", where)
        given = reward.get("ground_truth") if isinstance(reward, Mapping) else None
        truth, accepted = truths(given.get("target") if isinstance(given, Mapping) else given, "reward_model.ground_truth", where)
        if not truth:
            raise BadRow(where, "empty answer (reward_model.ground_truth)")
        key = next((key for key in CHOICES if isinstance(extra.get(key), list) and extra[key]), None)
        question = next((turn.content for turn in reversed(turns) if turn.role == "user"), "")
        choices = texts(extra[key], f"extra_info.{key}", where) if key else offered(question, (truth, *accepted))
        return Row(
            turns=turns,
            images=images_of(record, self.records.folder, where, parts=parts),
            truth=truth,
            kind=self.kind(index),
            choices=choices,
            id=name_of(extra.get("index"), "extra_info.index", where),
            where=where,
            meta=meta,
            accepted=accepted,
        ).check()

    def kind(self, index: int) -> str:
        """The question_type of row `index`'s extra_info, else its data_source and ability, joined by a slash when it has both."""
        some, where = self.records.some(index, (*self.kind_keys, "extra_info")), self.records.where(index)
        extra = parsed(some.get("extra_info"), "extra_info", where)
        if isinstance(extra, Mapping) and (name := first_name(extra, EXTRA_KINDS, where)):
            return name
        return "/".join(name for key in self.kind_keys if (name := name_of(some.get(key), f"`{key}`", where)))

"""Chains of thought by files: the requests of a batch in OpenAI's format, for whoever runs it cheaper and later, and its results.

A request is a line {"custom_id", "method", "url", "body"}, a result a line {"custom_id", "response": {"status_code", "body"}, "error"}, in
any order and in any number of files.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actial_fast.data.cot.asking import asking, asking_again
from actial_fast.data.cot.writer import Check, NoText, Written, rejected_before, unwritten
from actial_fast.data.sources.row import BadRow, Row, shortened
from actial_fast.data.sources.source import Source
from actial_fast.rollout.client import Answer, NoCompletion, Used, answer_of
from actial_fast.rollout.protocol import Draw
from actial_fast.rollout.server import messages_of
from actial_fast.rollout.thoughts import judged

URL = "/v1/chat/completions"
MOST_REQUESTS = 50_000  # of a file, as OpenAI takes them
MOST_BYTES = 190_000_000  # the same
LONGEST_ID = 64  # characters of a custom_id that everybody takes


def custom_id(row: Row) -> str:
    """What a row's request is called: its id, or a hash of it where that is long."""
    return row.id if len(row.id) <= LONGEST_ID else hashlib.sha256(row.id.encode()).hexdigest()[:LONGEST_ID]


def write_requests(
    source: Source,
    out: Path,
    path: Path,
    draw: Draw,
    *,
    model: str,
    template: str = "",
    seed: int = 0,
    count: int = 0,
    pixels: int = 0,
) -> tuple[int, list[Path]]:
    """Write a request for every row of `source` that has no chain in `out` yet to `path`, and path-2, path-3, ... where a file is full.

    A row that was rejected, with its text in `out`.rejects.jsonl, is asked again and told why. draw: temperature and, unless 0,
    max_new_tokens; pixels: as server.messages_of. Rows that cannot be read or shown get no request: with the results they are rejected.
    Returns the number of requests, and the files.
    """
    again = rejected_before(out)
    paths: list[Path] = []
    requests = held = size = 0
    file = None
    try:
        for row in unwritten(source, out, seed, count):
            asked = asking(row, template)
            if row.id in again:
                asked = asking_again(asked, *again[row.id])
            try:
                body: dict[str, Any] = {"model": model, "messages": messages_of(asked, pixels), "temperature": draw.temperature}
            except BadRow:
                continue
            body["seed"] = int(np.random.SeedSequence([seed, requests]).generate_state(1)[0] >> 1)
            if draw.max_new_tokens:
                body["max_tokens"] = draw.max_new_tokens
            line = json.dumps({"custom_id": custom_id(row), "method": "POST", "url": URL, "body": body}) + "\n"
            if file is None or held == MOST_REQUESTS or size + len(line) > MOST_BYTES:
                if file is not None:
                    file.close()
                paths.append(path if not paths else path.with_stem(f"{path.stem}-{len(paths) + 1}"))
                path.parent.mkdir(parents=True, exist_ok=True)
                file, held, size = paths[-1].open("w"), 0, 0
            file.write(line)
            requests, held, size = requests + 1, held + 1, size + len(line)
    finally:
        if file is not None:
            file.close()
    return requests, paths


class Results:
    """A writer for writer.write_cot that has the results of a batch. `used` is what they have cost; unread: lines that are no result.

    paths: the files of results, and of errors where there are any. ValueError where none of their lines is a result."""

    def __init__(self, paths: Sequence[Path], check: Check):
        self.used, self.unread = Used(), 0
        self._check = check
        self._found: dict[str, Answer | str] = {}
        for path in paths:
            with path.open(encoding="utf-8", errors="replace") as file:
                for line in file:
                    if line.strip():
                        self._read(line)
        if not self._found:
            raise ValueError(f"{', '.join(map(str, paths))}: no line is the result of a batch, with a custom_id")

    def _read(self, line: str) -> None:
        try:
            record = json.loads(line)
            name, response, error = record["custom_id"], record.get("response"), record.get("error")
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            self.unread += 1
            return
        try:
            if not isinstance(response, dict) or response.get("status_code", 200) != 200:
                raise NoCompletion(shortened(json.dumps(error or response), 200))
            answer = answer_of(response.get("body"))
        except NoCompletion as error:
            self._found.setdefault(name, f"failed in the batch: {error}")
        else:
            self._found[name] = answer
            self.used = self.used.plus(answer)

    def __call__(self, rows: Sequence[Row], rngs: Sequence[random.Random], done: Callable[[int, Written], None]) -> None:
        """As writer.Writer says."""
        for i, row in enumerate(rows):
            found = self._found.get(custom_id(row), "not in the results")
            if isinstance(found, str):
                done(i, NoText(found))
            else:
                done(i, judged(found.text, found.finished, found.why, row, self._check)[1])

"""Chains of thought from a strong model: whatever engine replies, it is asked, and asked again after a reply that cannot be used."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from actial_fast.data.cot.asking import asking, asking_again, check_template
from actial_fast.data.cot.checking import check_cot
from actial_fast.data.cot.writer import Check, NoText, WriterError, Written
from actial_fast.data.sources.row import BadRow, Row
from actial_fast.data.sources.stream import Example
from actial_fast.rollout.protocol import Draw, Engine, Reader, Reply, Watch, awake

CUT = "cut off: the reply reached the limit of tokens before its end"


class EngineWriter:
    """A writer for writer.write_cot: every row is asked about once, and up to `reasks` times more after rejected replies; the last stands.

    Args:
        engine: who replies, with the weights it has.
        reader: makes the engine's prompts: its Processor, or a server's Rows.
        draw: the temperature and the longest reply; n is 1.
        template: an example reply that a person has corrected; by default the built-in one for the kind of row.
        reasks: how often a rejected reply is sent back with the reason.
        check: says why a text cannot be used, as write_cot's.

    ValueError for a template that is malformed itself. A row without a reply is a WriterError, one whose reply is no text a NoText; what
    the engine raises ends the run.
    """

    def __init__(self, engine: Engine, reader: Reader, draw: Draw, *, template: str = "", reasks: int = 2, check: Check = check_cot):
        if template:
            check_template(template)
        assert draw.n == 1, "one text a row"
        self._engine, self._reader, self._draw = engine, reader, draw
        self._template, self._reasks, self._check = template, reasks, check

    def __call__(self, rows: Sequence[Row], rngs: Sequence[random.Random], done: Callable[[int, Written], None]) -> None:
        """As writer.Writer says."""
        waiting = {i: asking(row, self._template) for i, row in enumerate(rows)}
        with awake(self._engine, 0):
            for attempt in range(self._reasks + 1):
                if waiting:
                    waiting = self._round(waiting, rows, rngs, done, last=attempt == self._reasks)

    def _round(
        self,
        asked: dict[int, Row],
        rows: Sequence[Row],
        rngs: Sequence[random.Random],
        done: Callable[[int, Written], None],
        *,
        last: bool,
    ) -> dict[int, Row]:
        """Ask about each; what is to be asked again."""
        prompts, places = [], []
        for place, row in asked.items():
            try:
                prompts.append(self._reader.encode_prompt(Example(row, place)))
                places.append(place)
            except BadRow as error:
                done(place, error)
        again: dict[int, Row] = {}

        def drawn(replies: dict[int, list[Reply]]) -> None:
            for i, (reply,) in replies.items():
                place = places[i]
                text = (self._reader.decode(reply.ids) if reply.text is None else reply.text).strip()
                reason, written = judged(text, reply.finished, reply.why, rows[place], self._check)
                if reason is None or last:
                    done(place, written)
                else:
                    again[place] = asking_again(asked[place], text, reason)

        keys = [(rngs[place].getrandbits(32),) for place in places]
        watch = Watch(drawn=drawn, failed=lambda i, reason: done(places[i], WriterError(reason)))
        if prompts:
            self._engine.generate(prompts, self._draw, keys, watch)
        return dict(sorted(again.items()))


def judged(text: str, finished: bool, why: str, row: Row, check: Check) -> tuple[str | None, Written]:
    """Why a reply cannot be used, or None, and what was written: the text, or that it is none."""
    if why:
        return why, NoText(why)
    reason = check(text, row)
    if reason is not None and not finished and reason == "malformed tags":
        return CUT, NoText(CUT, text)
    return reason, text

"""Chains of thought from a strong model: whatever engine replies, it is asked, and asked again after a reply that cannot be used."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from actial_fast.data.cot.asking import TEMPLATE, asking, asking_again, check_template
from actial_fast.data.cot.writer import WriterError, Written, check_cot
from actial_fast.data.sources.row import BadRow, Row
from actial_fast.data.sources.stream import Example
from actial_fast.rollout.protocol import Draw, Engine, Reader, Reply, Watch, awake


class EngineWriter:
    """A writer for cot.write_cot: every row is asked about once, and up to `reasks` times more after rejected replies; the last one stands.

    Args:
        engine: who replies, with the weights it has.
        reader: makes the engine's prompts: its Processor, or a server's Rows.
        draw: the temperature and the longest reply; n is 1.
        template: an example reply that a person has corrected.
        reasks: how often a rejected reply is sent back with the reason.

    ValueError for a template that is malformed itself. A row without a reply is a WriterError; what the engine raises ends the run.
    """

    def __init__(self, engine: Engine, reader: Reader, draw: Draw, *, template: str = TEMPLATE, reasks: int = 2):
        check_template(template)
        assert draw.n == 1, "one text a row"
        self._engine, self._reader, self._draw = engine, reader, draw
        self._template, self._reasks = template, reasks

    def __call__(self, rows: Sequence[Row], rngs: Sequence[random.Random], done: Callable[[int, Written], None]) -> None:
        """As cot.Writer says."""
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
                reason = check_cot(text, rows[place])
                if reason is None or last:
                    done(place, text)
                else:
                    again[place] = asking_again(asked[place], text, reason)

        keys = [(rngs[place].getrandbits(32),) for place in places]
        watch = Watch(drawn=drawn, failed=lambda i, reason: done(places[i], WriterError(reason)))
        if prompts:
            self._engine.generate(prompts, self._draw, keys, watch)
        return dict(sorted(again.items()))

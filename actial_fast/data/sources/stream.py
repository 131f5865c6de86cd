"""An endless stream over a mixture of sources whose whole state is one integer.

Position p of the mixture belongs to a fixed (source, row): the source from a periodic pattern that keeps every source within one draw of
its exact share, the row from a permutation drawn from (seed, source, epoch). Runs of adjacent rows with the same images are permuted as
one, so that a batch has the questions about an image together and the image once. So shuffling, resuming and sharding by rank are functions
of the position alone, and a checkpoint stores nothing but `stream.position`.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np

from actial_fast.data.sources.mixing import interleave
from actial_fast.data.sources.row import BadRow, Row
from actial_fast.data.sources.source import Rejects, Source, SourceConfig, open_source, runs
from actial_fast.data.sources.told import told

LOOKAHEAD = 32  # rows a Pass reads ahead


@dataclass(frozen=True)
class Example:
    """A row as it was drawn. position: where in the stream; encoded: what the stream's `encode` made of it, None without one.

    Images stay as the row has them (paths or encoded bytes): `encode` decodes what it needs, into the image store for one."""

    row: Row
    position: int
    encoded: Any = None


Encode = Callable[[Example], Any]
Positions = range | list[int]


def _load(source: Source, index: int, position: int, encode: Encode | None) -> Example | BadRow:
    try:
        example = Example(source[index], position)
        return replace(example, encoded=encode(example)) if encode else example
    except BadRow as error:
        return error


class Stream:
    """An endless, resumable stream of examples over a mixture of sources.

    Args:
        sources: what to mix, by weight.
        seed: of the shuffles; the same seed gives the same stream on every machine and for any number of ranks.
        shuffle: a new permutation of each source every epoch; False keeps the file's order.
        together: shuffle runs of adjacent rows with the same images (source.runs), keeping the rows of a run adjacent and in order, instead
            of single rows; for that, every row's images are looked up once when the stream is made. The border of a batch, or of a rank's
            share of it, may cut a run, and in a mixture rows of other sources may lie between its rows. Without shared images, and with
            False, single rows are permuted. A position means another row when seed, shuffle or together is another.
        on_bad_row: "error" raises BadRow (file, row, reason) from next_batch; "skip" leaves the slot empty, counts it in `rejected` and
            records the row once in `rejects`.
        rejects: a JSON Lines file for skipped rows, or None. With several ranks, one file a rank (x.rank0.jsonl).
        workers: threads that read and encode ahead, one batch beyond the one handed out; 0 works in the calling thread.
        encode: called in those threads with each example; what it returns becomes `encoded`, and a BadRow it raises (for an image that
            cannot be decoded, say) makes the row a bad row.
        rank, world: this process and how many share each batch.
        spread: this rank has every world-th position of a batch instead of a contiguous share, so that each has some of its beginning.

    Raises ValueError for a source that cannot be opened, bad weights, or an unknown policy.
    """

    def __init__(
        self,
        sources: Sequence[SourceConfig],
        *,
        seed: int,
        shuffle: bool = True,
        together: bool = True,
        on_bad_row: str = "error",
        rejects: Path | None = None,
        workers: int = 2,
        encode: Encode | None = None,
        rank: int = 0,
        world: int = 1,
        spread: bool = False,
    ):
        _check_policy(on_bad_row)
        assert 0 <= rank < world, f"rank {rank} of {world}"
        self._pattern, self._before, self._counts = interleave([config.weight for config in sources])
        self._sources = [open_source(config) for config in sources]
        self._seed, self._shuffle, self._skip = seed, shuffle, on_bad_row == "skip"
        if shuffle:
            self._runs = [runs(source) if together else np.arange(len(source) + 1) for source in self._sources]
        self._rank, self._world, self._spread = rank, world, spread
        self._rejects, self._encode = Rejects(rejects, rank, world), encode
        self._pool = ThreadPoolExecutor(workers, "stream") if workers else None
        self._ahead: tuple[Positions, list[Future[Example | BadRow]]] | None = None  # of all ranks, and one future per slot of this rank
        self._orders: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._barren = 0  # empty slots since the last good one
        self.position = 0
        """The cursor: draws of the mixture so far, over all ranks."""
        self.rejected = 0
        """Slots this rank has left empty because of bad rows (a bad row counts every time it is drawn)."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each source."""
        return tuple(len(source) for source in self._sources)

    @property
    def epoch_length(self) -> int:
        """The first number of draws after which every row of every source has been drawn at least once.

        The source that is largest for its weight decides; smaller ones have been seen several times by then. With equal weight per row it
        is the number of rows.
        """
        return max(self._draws_until(k, len(source)) for k, source in enumerate(self._sources))

    def _draws_until(self, k: int, rows: int) -> int:
        cycles, rest = divmod(rows - 1, int(self._counts[k]))
        return cycles * len(self._pattern) + int(np.flatnonzero(self._pattern == k)[rest]) + 1

    def locate(self, position: int) -> tuple[int, int]:
        """(source, row index in that source) of a position: a pure function of it, the seed and the sources."""
        k, before = self.turn(position)
        epoch, at = divmod(before, len(self._sources[k]))
        return k, int(self._order(k, epoch)[at]) if self._shuffle else at

    def turn(self, position: int) -> tuple[int, int]:
        """(source, how many positions before this one are that source's)."""
        cycle, place = divmod(position, len(self._pattern))
        k = int(self._pattern[place])
        return k, cycle * int(self._counts[k]) + int(self._before[place])

    def _order(self, k: int, epoch: int) -> np.ndarray:
        if (k, epoch) not in self._orders:
            self._orders[k, epoch] = _shuffled(self._runs[k], np.random.default_rng([self._seed, k, epoch]))
            if len(self._orders) > 2 * len(self._sources):  # the epochs at either side of a batch
                self._orders.popitem(last=False)
        return self._orders[k, epoch]

    def seek(self, position: int) -> None:
        """Continue from `position`; what was read ahead for another position is dropped by the next batch."""
        assert position >= 0, position
        self.position = position

    def next_batch(self, n: int, admit: Callable[[int], bool] | None = None) -> list[Example]:
        """Draw `n` positions for all ranks together, and return this rank's share of them, in order.

        Shares differ by at most one slot; under "skip" bad rows leave the list shorter (it may be empty), and every rank still agrees on
        the position. admit: positions that it refuses are passed over; it must come to admit some, and the same on all ranks. Raises BadRow
        under "error" (the position stays, so a retry meets the same row), and ValueError when two epochs' worth of slots held no good row.
        """
        assert n > 0, n
        positions = self._next(self.position, n, admit)
        if self._ahead and self._ahead[0] != positions:
            self._drop_ahead()
        slots = self._ahead[1] if self._ahead else self._submit(positions)
        self._ahead = None
        results = [slot.result() for slot in slots]
        batch = []
        for result in results:
            if isinstance(result, Example):
                batch.append(result)
                self._barren = 0
                continue
            if not self._skip:
                raise result
            self._rejects.add(result)
            self.rejected += 1
            self._barren += 1
            if self._barren >= 2 * self.epoch_length:  # a lone good row may be first in one epoch and last in the next
                raise ValueError(f"no usable row in {self._barren} draws, two epochs; the last one: {result}")
        self.position = positions[-1] + 1
        if self._pool:
            after = self._next(self.position, n, admit)
            self._ahead = (after, self._submit(after))
        return batch

    @staticmethod
    def _next(position: int, n: int, admit: Callable[[int], bool] | None) -> Positions:
        return range(position, position + n) if admit is None else list(islice(filter(admit, count(position)), n))

    def _submit(self, positions: Positions) -> list[Future[Example | BadRow]]:
        n, rank, world = len(positions), self._rank, self._world
        futures = []
        for p in positions[rank::world] if self._spread else positions[n * rank // world : n * (rank + 1) // world]:
            k, index = self.locate(p)
            futures.append(_submit(self._pool, self._sources[k], index, p, self._encode))
        return futures

    def _drop_ahead(self) -> None:
        for future in self._ahead[1] if self._ahead else ():
            future.cancel()
        self._ahead = None

    def close(self) -> None:
        """Stop the worker threads, and say how often what was told of rows was met. The stream cannot be used afterwards."""
        self._drop_ahead()
        told.close()
        if self._pool:
            self._pool.shutdown(cancel_futures=True)


class Pass:
    """Every row of the sources once, in order, one source after the other: what evaluation iterates over.

    Iterating yields Example, whose `position` counts rows over all sources and ranks. `len` is the number of rows this rank visits.

    Args:
        sources: one or several; weights are not used.
        limit: stop after the first so many rows over all ranks; 0 for all.
        on_bad_row, rejects, workers, encode: as for Stream.
        rank, world: this process takes the positions rank, rank + world, ...

    Raises ValueError as Stream does, and BadRow while iterating under "error".
    """

    def __init__(
        self,
        sources: SourceConfig | Sequence[SourceConfig],
        *,
        limit: int = 0,
        on_bad_row: str = "error",
        rejects: Path | None = None,
        workers: int = 2,
        encode: Encode | None = None,
        rank: int = 0,
        world: int = 1,
    ):
        _check_policy(on_bad_row)
        assert 0 <= rank < world, f"rank {rank} of {world}"
        self._sources = [open_source(config) for config in ([sources] if isinstance(sources, SourceConfig) else sources)]
        total = sum(len(source) for source in self._sources)
        self._positions = range(rank, min(limit or total, total), world)
        self._skip, self._rejects = on_bad_row == "skip", Rejects(rejects, rank, world)
        self._workers, self._encode = workers, encode
        self.rejected = 0
        """Bad rows this rank has skipped."""

    def __len__(self) -> int:
        return len(self._positions)

    def __iter__(self) -> Iterator[Example]:
        pool = ThreadPoolExecutor(self._workers, "stream") if self._workers else None
        places = ((source, index) for source in self._sources for index in range(len(source)))
        todo = islice(enumerate(places), self._positions.start, self._positions.stop, self._positions.step)
        ahead: deque[Future[Example | BadRow]] = deque()
        try:
            while True:
                for position, (source, index) in islice(todo, (LOOKAHEAD if pool else 1) - len(ahead)):
                    ahead.append(_submit(pool, source, index, position, self._encode))
                if not ahead:
                    return
                result = ahead.popleft().result()
                if isinstance(result, Example):
                    yield result
                    continue
                if not self._skip:
                    raise result
                self._rejects.add(result)
                self.rejected += 1
        finally:
            if pool:
                pool.shutdown(cancel_futures=True)


def _submit(pool: ThreadPoolExecutor | None, source: Source, index: int, position: int, encode: Encode | None) -> Future[Example | BadRow]:
    if pool:
        return pool.submit(_load, source, index, position, encode)
    future: Future[Example | BadRow] = Future()
    future.set_result(_load(source, index, position, encode))
    return future


def _shuffled(starts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The rows 0, 1, ... in an order in which the runs are permuted and each keeps its own. starts: int64 (runs + 1,), as from runs()."""
    order = rng.permutation(len(starts) - 1)
    lengths = np.diff(starts)[order]
    places = np.cumsum(lengths) - lengths  # at which each run begins
    return np.repeat(starts[order] - places, lengths) + np.arange(starts[-1])


def _check_policy(on_bad_row: str) -> None:
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f'on_bad_row is {on_bad_row!r}; use "error" to stop at a bad row or "skip" to count it and go on')

"""How many bytes a product's operands cost in HBM, for an order of its tiles: a replay through an L2 that forgets the oldest block.

One block a multiprocessor, all in lockstep: in each step of the inner dimension the resident tiles ask for their blocks of both operands,
each once. T rows, H inner, V columns as in head.py; for the gradients the roles of the axes change. What the product writes is left out,
and so is the hardware's real replacement policy, which no vendor publishes: figures are to tell orders of tiles apart.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from actial_fast.kernels.head import HALF_TILES, row_group

L2_MIB = 50  # of an H100; half of it is near to each multiprocessor
MULTIPROCESSORS = 132


@dataclass(frozen=True)
class Shape:
    """rows x inner @ inner x columns in tiles of (m, n, k), 16-bit operands."""

    rows: int
    columns: int
    inner: int
    tile: tuple[int, int, int] = (128, 256, 64)

    @property
    def tiles(self) -> tuple[int, int, int]:
        sizes = (self.rows, self.columns, self.inner)
        return tuple(-(-size // block) for size, block in zip(sizes, self.tile, strict=True))  # type: ignore[return-value]

    @property
    def least(self) -> int:
        """Bytes of both operands, each read once."""
        return 2 * self.inner * (self.rows + self.columns)


Order = Callable[[int, int, int], tuple[int, int]]  # tile's number, tiles of rows, tiles of columns -> its row and column


def rows_fastest(tile: int, tiles_m: int, tiles_n: int) -> tuple[int, int]:
    return tile % tiles_m, tile // tiles_m


def columns_fastest(tile: int, tiles_m: int, tiles_n: int) -> tuple[int, int]:
    return tile // tiles_n, tile % tiles_n


def grouped(group: int) -> Order:
    """Rows fastest within groups of `group` tiles of rows: `tile_place` of kernels/head.py."""

    def order(tile: int, tiles_m: int, tiles_n: int) -> tuple[int, int]:
        first = tile // (group * tiles_n) * group
        height = min(group, tiles_m - first)
        within = tile - first * tiles_n
        return first + within % height, within // height

    return order


def replay(shape: Shape, order: Order, l2_mib: float = L2_MIB, multiprocessors: int = MULTIPROCESSORS) -> float:
    """Bytes read from HBM."""
    tiles_m, tiles_n, steps = shape.tiles
    total, (m, n, k) = tiles_m * tiles_n, shape.tile
    room, used, missed = int(l2_mib * 2**20), 0, 0
    held: OrderedDict[tuple[str, int, int], int] = OrderedDict()
    for first in range(0, total, multiprocessors):
        places = [order(tile, tiles_m, tiles_n) for tile in range(first, min(first + multiprocessors, total))]
        rows, columns = sorted({row for row, _ in places}), sorted({column for _, column in places})
        for step in range(steps):
            for name, size, indices in (("a", 2 * m * k, rows), ("b", 2 * n * k, columns)):
                for index in indices:
                    block = (name, index, step)
                    if block in held:
                        held.move_to_end(block)
                        continue
                    held[block] = size
                    missed, used = missed + size, used + size
                    while used > room:
                        used -= held.popitem(last=False)[1]
    return missed


def measure() -> list[dict[str, object]]:
    """A record for each of the three products at the recipe's sizes: the least bytes, those of the shipped order, and of the plain one."""
    vocab, width, chunk = 152064, 3584, 1792
    groups = grouped(row_group(HALF_TILES[9], width, 2))
    cases: list[tuple[str, Shape, Order, Order]] = [
        (f"logits, {rows:,} rows", Shape(rows, vocab, width), groups, rows_fastest) for rows in (chunk, 8192, 32768)
    ]
    cases.append((f"d hidden, {chunk:,} rows, a quarter of V", Shape(chunk, width, vocab // 4), rows_fastest, rows_fastest))
    cases.append((f"d weight, {chunk:,} rows", Shape(vocab, width, chunk), columns_fastest, columns_fastest))
    return [
        {"product": name, "least": shape.least, "shipped": round(replay(shape, shipped)), "plain": round(replay(shape, plain))}
        for name, shape, shipped, plain in cases
    ]

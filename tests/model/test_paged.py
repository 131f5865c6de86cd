"""Attention over blocks against dense attention in float64: what the CPU does, and the kernel."""

import math

import numpy as np
import pytest
import torch

from actial_fast.kernels.decode import decode
from actial_fast.model.paged import Pages, Reads, _read, turned
from tests.attention_case import DEVICE, relative

SIZE = 16
# for each prompt its tokens, and how many tokens of its own each of its replies has
GROUPS = {
    "one reply": [(5, [1])],
    "a prompt's replies": [(37, [1, 16, 17, 40])],
    "several prompts": [(16, [3, 3]), (1, [20]), (100, [2, 1, 33, 16, 5])],
    "many replies": [(20, [1 + k % 19 for k in range(40)])],
}
HEADS = {"ratio 1": (3, 3), "ratio 2": (4, 2), "ratio 7": (7, 1), "ratio 7 of 2": (14, 2)}


class Case:
    """Pages with shuffled blocks, the rows of these groups in a shuffled order, and what they must give."""

    def __init__(self, groups, heads, dim, dtype, seed=0):
        rng, make = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        spans = [prompt for prompt, _ in groups] + [own for _, owns in groups for own in owns]
        need = [-(-n // SIZE) for n in spans]
        free = rng.permutation(np.arange(1, sum(need) + 1))
        blocks = np.split(free, np.cumsum(need)[:-1])
        shape = (2, len(free) + 1, SIZE, heads[1], dim)
        keys, values = (torch.full(shape, math.nan, dtype=torch.float64) for _ in range(2))
        held = []
        for span, mine in zip(spans, blocks, strict=True):
            k, v = (torch.randn(2, span, heads[1], dim, generator=make, dtype=torch.float64) for _ in range(2))
            slots = torch.from_numpy((mine[:, None] * SIZE + np.arange(SIZE)).reshape(-1)[:span])
            keys.flatten(1, 2)[:, slots], values.flatten(1, 2)[:, slots] = k, v
            held.append((k, v))
        members = [(g, len(groups) + i) for i, g in enumerate(g for g, (_, owns) in enumerate(groups) for _ in owns)]
        order = rng.permutation(len(members))
        members = [members[i] for i in order]
        rows = [[r for r, (g, _) in enumerate(members) if g == wanted] for wanted in range(len(groups))]
        most = max(map(len, rows))
        padded = np.array([r + [-1] * (most - len(r)) for r in rows], np.int32)
        place = np.empty(len(members), np.int64)
        place[padded[padded >= 0]] = np.flatnonzero(padded.reshape(-1) >= 0)
        self.q = 2 * torch.randn(len(members), heads[0], dim, generator=make, dtype=torch.float64)
        self.scale, self.dtype = 0.7 * dim**-0.5, dtype
        self.own = self._reads(
            np.arange(len(members), dtype=np.int32)[:, None], np.arange(len(members)), [m for _, m in members], blocks, spans
        )
        self.prefix = self._reads(padded, place, range(len(groups)), blocks, spans)
        if DEVICE == "cpu":  # the CPU reads past the end, and weighs it with 0
            keys, values = keys.nan_to_num(), values.nan_to_num()
        self.keys_held, self.values_held = keys.to(DEVICE, dtype), values.to(DEVICE, dtype)
        self.keys = [[torch.cat([held[g][part][layer], held[m][part][layer]]) for g, m in members] for layer in (0, 1) for part in (0, 1)]

    @staticmethod
    def _reads(rows, place, spans, blocks, lengths):
        spans = list(spans)
        width = max(len(blocks[s]) for s in spans)
        table = np.array([[*blocks[s], *[0] * (width - len(blocks[s]))] for s in spans], np.int32)
        tokens = np.array([lengths[s] for s in spans], np.int32)
        return Reads(*(torch.from_numpy(np.ascontiguousarray(x)).to(DEVICE) for x in (rows, table, tokens, place)))

    def exact(self, layer, queries):
        """(R, H, D) in float64, every row with all its keys."""
        out = []
        for r, q in enumerate(queries):
            k, v = (self.keys[2 * layer + part][r].repeat_interleave(len(q) // self.keys[0][r].shape[1], 1) for part in (0, 1))
            weights = (torch.einsum("hd,khd->hk", q, k) * self.scale).softmax(-1)
            out.append(torch.einsum("hk,khd->hd", weights, v))
        return torch.stack(out)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32] if DEVICE == "cpu" else [torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [24, 30])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_rows_attend_to_their_prompt_and_to_their_own(groups, heads, dim, dtype):
    """With keys and queries turned by their positions, and the new token's key and value where they belong; float32 on the CPU is the
    extension, float64 its twin."""
    case = Case(groups, heads, dim, torch.float64)
    make = torch.Generator().manual_seed(1)
    k, v = (torch.randn(len(case.q), heads[1], dim, generator=make, dtype=torch.float64) for _ in range(2))
    angles = torch.randn(len(case.q), dim // 2, generator=make, dtype=torch.float64).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    last = [(int(t) - 1) for t in case.own.tokens]
    slots = torch.tensor([int(case.own.table[r, t // SIZE]) * SIZE + t % SIZE for r, t in enumerate(last)])
    held, turns = ([x.to(DEVICE, dtype) for x in pair] for pair in ((case.keys_held, case.values_held), (cos, sin)))
    pages = Pages(*held, slots.to(DEVICE), *turns, case.own, case.prefix)
    for layer in (0, 1):
        apart = [x.flatten(1).to(DEVICE, dtype) for x in (case.q, k, v)]
        found = pages.step(layer, apart if layer else [torch.cat(apart, 1)], case.scale).unflatten(1, (heads[0], dim))
        for r in range(len(case.q)):  # the oracle's new token
            case.keys[2 * layer][r][-1], case.keys[2 * layer + 1][r][-1] = turned(k, cos, sin)[r], v[r]
        exact = case.exact(layer, turned(case.q, cos, sin))
        assert relative(found, exact) < {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize(
    ("heads", "dim", "dtype"),
    [(*shape, dtype) for shape in (((4, 2), 24), ((14, 2), 64), ((3, 3), 128)) for dtype in (torch.float32, torch.bfloat16)]
    + [((4, 2), 24, torch.float16)],
    ids=str,
)
def test_the_kernel_reads_blocks(groups, heads, dim, dtype):
    """Each part of the kernel equals the CPU's, whatever lies beyond the last token (NaN here) or in nobody's block."""
    case = Case(groups, heads, dim, torch.float64)
    q = case.q.to(dtype)
    keys, values = (x.to("cpu", dtype) for x in (case.keys_held[1], case.values_held[1]))
    for reads in (case.own, case.prefix):
        poisoned = [x.clone() for x in (keys, values)]
        read = torch.zeros(keys.shape[:2], dtype=torch.bool)
        for blocks, tokens in zip(reads.table.tolist(), reads.tokens.tolist(), strict=True):
            slots = [blocks[t // SIZE] * SIZE + t % SIZE for t in range(tokens)]
            read.view(-1)[slots] = True
        for x in poisoned:
            x[~read] = math.nan
        out, lse = decode(*(x.to(DEVICE) for x in (q, *poisoned)), reads.rows, reads.table, reads.tokens, case.scale)
        expected, expected_lse = _read(
            q.double().cpu(), keys.double(), values.double(), Reads(*(x.cpu() for x in vars(reads).values())), case.scale
        )
        close = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
        assert relative(out.cpu(), expected) < close and (lse.cpu() - expected_lse).abs().max() < close


def test_a_row_that_no_item_has_is_not_written():
    case = Case(GROUPS["a prompt's replies"], (4, 2), 24, torch.float32)
    rows = case.prefix.rows.clone()
    rows[0, 1] = -1
    q = case.q.to(DEVICE, torch.float32)
    held = case.keys_held[0], case.values_held[0]
    full, _ = decode(q, *held, case.prefix.rows, case.prefix.table, case.prefix.tokens, case.scale)
    part, _ = decode(q, *held, rows, case.prefix.table, case.prefix.tokens, case.scale)
    kept = [r for r in case.prefix.rows[0].tolist() if r != int(case.prefix.rows[0, 1])]
    assert torch.equal(full[kept], part[kept])


def test_keys_go_where_the_slots_say():
    nothing = torch.empty(0)
    pages = Pages.empty((2, 4, SIZE, 2, 8), torch.float32, torch.device("cpu")).at(torch.tensor([17, 63, 0]), nothing, nothing)
    k, v = torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    pages.write(1, k, v)
    assert torch.equal(pages.keys[1].flatten(0, 1)[[17, 63, 0]], k) and torch.equal(pages.values[1].flatten(0, 1)[[17, 63, 0]], v)
    assert not pages.keys[0].any() and pages.keys[1].flatten(0, 1).any(-1).any(-1).sum() == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_replies_that_share_a_row_each_keep_its_key_and_value(dtype):
    """What two replies in one row are told is what each alone is told; afterwards each has all of its own."""
    case = Case([(20, [18]), (7, [2])], (4, 2), 24, torch.float32)
    qkv = torch.randn(2, 8 * 24, generator=torch.Generator().manual_seed(2)).to(dtype)
    cos, sin = torch.randn(2, 2, 24, generator=torch.Generator().manual_seed(3)).to(dtype)
    slots = torch.tensor([3 * SIZE + 1, 0, 2 * SIZE + 5])
    given = [x.cpu().to(dtype) for x in (case.keys_held, case.values_held)]
    found = []
    for row, of in ((None, [0, 2]), (torch.tensor([0, 0, 1]), [0, 1, 2])):
        reads = [Reads(*(x.cpu() for x in vars(reads).values())) for reads in (case.own, case.prefix)]
        pages = Pages(*(x.clone() for x in given), slots[of], cos, sin, *reads, row)
        out = pages.step(1, [qkv], 0.3)
        found.append((out, pages.keys[1].flatten(0, 1), pages.values[1].flatten(0, 1)))
    (alone, keys, values), (shared, both, both_values) = found
    assert torch.equal(alone, shared)
    for x, y in ((keys, both), (values, both_values)):
        assert torch.equal(x[slots[[0, 2]]], y[slots[[0, 2]]]) and torch.equal(y[slots[1]], y[slots[0]])

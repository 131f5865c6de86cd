"""What is measured without a GPU: instruments on code and tiles whose answer is known, kernels against their committed figures."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from actial_fast.kernels import head
from bench.evidence import budget, cycles, l2, page, sass
from bench.evidence.__main__ import PARTS, committed, worse
from bench.evidence.budget import Sweep
from bench.evidence.sass import Instruction

ROOT = Path(__file__).parents[2]


def program(*lines: str) -> list[Instruction]:
    """Instructions from "name" or "name > index" (a branch, conditional where a ? follows), one cycle each, EXIT at the end."""
    code = []
    for i, line in enumerate([*lines, "EXIT"]):
        name, _, target = line.partition(" > ")
        following = () if name == "EXIT" else (int(target.rstrip("?")), i + 1)[: 2 if target.endswith("?") else 1] if target else (i + 1,)
        code.append(Instruction(16 * i, "@P0" if target.endswith("?") else "", name, "", 1, None, None, (), following))
    return code


def test_the_loop_is_the_shortest_way_around():
    """What a condition can leave out is left out; code moved out of the way does not count as a loop."""
    code = program("MOV", "HGMMA", "BRA > 5?", "LDG", "LDG", "FADD", "BRA > 8?", "BRA > 1?", "STG", "BRA > 7?")
    assert sass.cycle(code, 1) == [1, 2, 5, 6, 7]
    assert sass.cycle(code, 1, also=8) == [1, 2, 5, 6, 8, 9, 7]
    assert sass.cycle(code, 0) is None and sass.cycle(code, 1, also=0) is None
    assert sass.loops(code, [0, 1, 5, 3]) == [[1, 2, 5, 6, 7], [3, 4, 5, 6, 7, 1, 2]]
    assert sass.straight(code, 1) == [0, 1, 2, 5, 6, 8, 9, 10]


def test_cycles_obey_stalls_scoreboards_pipes_and_barriers():
    def timed(*fields: dict, warps: int = 1) -> int:
        return cycles.simulate([dataclasses.replace(program("MOV")[0], **one) for one in fields], warps)

    assert timed({}, {}, {}) == 3 and timed({}, {}, {}, warps=2) == 6
    assert timed({"stall": 5}, {}) == 6
    assert timed({"name": "LDG.E", "writes": 2}, {"waits": (1,)}, {"waits": (2,)}) == 601
    assert timed({"name": "LDG.E", "reads": 0}, {"waits": (0,)}) == 13
    assert timed(*[{"name": "MUFU.EX2"}] * 4) == 25 and timed(*[{"name": "MUFU.EX2"}] * 4, warps=2) == 57  # one every 8 cycles
    assert timed(*[{"name": "FADD"}] * 4, warps=2) == 8 and timed(*[{"name": "FMNMX"}] * 4, warps=2) == 15
    assert timed({"name": "BAR.SYNC", "stall": 9}, {}, warps=2) == 23  # both at 0 and 1, then 20 cycles for each


def test_accesses_are_told_apart_by_width():
    names = (
        "LDG.E.128",
        "STG.E.EF.128",
        "LDG.E.ENL2.256",
        "LDG.E.64.CONSTANT",
        "LDG.E",
        "LDG.E.STRONG.GPU",
        "STG.E.U16",
        "LDG.E.S8",
        "LDS.128",
    )
    assert [budget.width(name) for name in names] == [16, 16, 32, 8, 4, 4, 2, 1, 0]


def test_the_budget_counts_what_comes_from_memory():
    sweep = ["LDG.E.128", "FADD", "FADD", "LDG.E.U16"]
    one = program(*sweep, "BRA > 0?")
    assert budget.sweeps(one) == [Sweep(5, 1, 0)] and budget.instructions("any", one) == 5
    two = program(*sweep, "BRA > 0?", "LDG.E.128", "FADD", "STG.E.128", "BRA > 5?")
    assert budget.instructions("any", two) == 5  # the dearer loop
    assert budget.instructions("grpo_logits_kernel", two) == (5 + 4) / 2  # 16 bytes read once, 16 written
    assert budget.share("H100 SXM", 2048 * budget.SUSTAINED / budget.CARDS["H100 SXM"][1]) == pytest.approx(1)


@pytest.mark.parametrize("order", [l2.rows_fastest, l2.columns_fastest, l2.grouped(3), l2.grouped(16)])
def test_replay(order):
    """Every order makes every tile once; an L2 that holds all reads each operand once, one that holds nothing reads for every wave."""
    shape = l2.Shape(rows=7 * 128, columns=5 * 256, inner=2 * 64)
    assert len({order(tile, 7, 5) for tile in range(35)}) == 35 and {order(tile, 7, 5) for tile in range(35)} <= {
        (row, column) for row in range(7) for column in range(5)
    }
    assert l2.replay(shape, order, l2_mib=100, multiprocessors=4) == shape.least
    assert l2.replay(shape, order, l2_mib=0, multiprocessors=1) == 35 * 2 * 2 * (128 + 256) * 64


def test_a_group_of_rows_stays_in_l2():
    shape = l2.Shape(rows=32 * 128, columns=64 * 256, inner=8 * 64)  # 4 MiB of rows, in 2 MiB
    assert l2.replay(shape, l2.grouped(8), l2_mib=2, multiprocessors=8) < 0.4 * l2.replay(
        shape, l2.rows_fastest, l2_mib=2, multiprocessors=8
    )


@triton.jit
def place_kernel(rows, columns, tiles_m, tiles_n, group, BLOCK: tl.constexpr):
    tile = tl.arange(0, BLOCK)
    m, n = head.tile_place(tile, tiles_m, tiles_n, group)
    tl.store(rows + tile, m)
    tl.store(columns + tile, n)


@pytest.mark.parametrize("group", [1, 3, 7, 20])
def test_the_replayed_order_is_the_kernels(group):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, columns = torch.empty((2, 64), dtype=torch.int32, device=device)
    place_kernel[(1,)](rows, columns, 7, 5, group, BLOCK=64)
    order = l2.grouped(group)
    assert list(zip(rows.tolist(), columns.tolist(), strict=True))[:35] == [order(tile, 7, 5) for tile in range(35)]
    assert min(rows[35:].tolist()) >= 0  # what the last programs ask for in advance: rows that exist, or that a mask leaves out


@triton.jit
def wasteful_kernel(x, y, STEP: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + STEP * at))


@pytest.mark.skipif(torch.cuda.is_available(), reason="counted in Triton's interpreter")
def test_the_ledger_sees_sectors():
    from bench.evidence import ledger

    x, y = torch.zeros(4096), torch.zeros(256)
    for step, sectors in ((1, 32), (2, 64), (16, 256)):
        with ledger.recorded() as traffic:
            wasteful_kernel[(1,)](x, y, STEP=step, BLOCK=256)
            wasteful_kernel[(1,)](x, y, STEP=step, BLOCK=256)
        assert traffic["wasteful_kernel"].touched == 32 * (sectors + 32) and traffic["wasteful_kernel"].asked == 2 * 2 * 4 * 256


@pytest.mark.skipif(torch.cuda.is_available(), reason="counted in Triton's interpreter")
def test_kernels_touch_what_their_docstrings_say():
    from bench.evidence import ledger

    found = ledger.measure()
    assert not worse("ledger", found, []) and len({one["kernel"] for one in found}) >= 15
    assert min(one["touched_over_least"] for one in found) >= 1  # the least is one


def test_machine_code_is_not_dearer_than_committed():
    """The plain cases on sm_90; `make evidence` has all of them. Compiled in a process without the interpreter."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.evidence", "--only", "machine", "l2", "--quick"]
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing is over its limit" in done.stdout


def test_what_is_worse_is_named():
    before = committed("machine")
    product, streaming = (next(one for one in before if name in one) for name in ("loop", "shares"))
    assert not worse("machine", before, before)
    for record, name in ((product, "epilogue_cycles"), (product, "issue_share"), (streaming, "instructions_per_16_bytes")):
        (told,) = worse("machine", [record | {name: 1.06 * record[name]}], before)
        assert record["kernel"] in told and name in told
        assert not worse("machine", [record | {name: 1.04 * record[name]}], before)
    assert "8 instructions on local memory" in worse("machine", [product | {"spills": 8}], before)[0]
    assert "no committed figure" in worse("machine", [product], [])[0]
    (told,) = worse("l2", [{"product": "p", "shipped": 106}], [{"product": "p", "shipped": 100}])
    assert "shipped 106" in told
    assert worse("ledger", [{"kernel": "k", "touched_over_least": 1.03}], [])


def test_of_the_peers_what_quack_makes_of_ours_is_gated():
    peers = committed("peers")
    ours, theirs = ([one for one in peers if one["peer"] == "quack" and one["variant"].startswith("head=") == own] for own in (True, False))
    assert len(ours) == 5 and len(theirs) == 1 and not worse("peers", peers, peers)
    assert {one["kernel"] for one in ours} == {"softmax_part", "row_scaled", "plain"} and not any(one["spills"] for one in ours)
    (told,) = worse("peers", [ours[0] | {"epilogue_cycles": 1.06 * ours[0]["epilogue_cycles"]}], peers)
    assert told.startswith("quack: softmax_part, head='quack', stores exponentials: epilogue_cycles")
    assert "2 instructions on local memory" in worse("peers", [ours[0] | {"spills": 2}], peers)[0]
    assert not worse("peers", [theirs[0] | {"spills": 2, "epilogue_cycles": 9e9}], peers)


def test_the_page_shows_what_is_committed():
    for part in PARTS:
        about = json.loads((ROOT / f"bench/results/evidence/{part}.json").read_text())["about"]
        assert "no GPU ran anything" in about["measured"]
    for name, told in page.tables().items():
        assert (ROOT / f"bench/results/evidence/{name}.md").read_text() == told, f"run python -m bench.evidence.page: {name}.md is old"

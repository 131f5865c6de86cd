"""The planner: the extension against its twin, what a plan promises, and both the planner and the layout under sanitizers."""

import json
import math
import shutil
import subprocess
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actial_fast.packing import native
from actial_fast.packing.planning import Capacity, Costs
from bench.host import planner
from tests.packing.plans import COSTS, SETTINGS, outcome, plan_of, same, without_extension

ROOT = Path(__file__).parents[2]


groups_st = st.lists(
    st.tuples(st.integers(1, 50), st.lists(st.integers(1, 40), max_size=7), st.sampled_from([0, 0, 4, 16, 30])), max_size=24
)
plans_st = st.fixed_dictionaries(
    {
        "groups": groups_st,
        "capacity": st.builds(Capacity, st.integers(90, 300), st.integers(30, 90)),
        "costs": st.sampled_from([COSTS, Costs(0.0, 1.0, 0.0), Costs(1.0, 0.0, 0.0), Costs(0.1, 0.03, 7.7, 3.0)]),
        "ranks": st.integers(1, 5),
        "seed": st.sampled_from([0, 1, 2**64 - 1]),
    }
)

# ---- the planner


@SETTINGS
@given(plans_st)
def test_the_extension_plans_as_its_twin(case):
    same(plan_of(**case), without_extension(lambda: plan_of(**case)))


@settings(SETTINGS, max_examples=40)
@given(plans_st, st.sampled_from([Capacity(70, 20), Capacity(90, 29), Capacity(3_000_000, 2**31 - 1), Capacity(70_001, 70_001)]))
def test_it_fails_as_its_twin_and_plans_at_any_capacity(case, capacity):
    case |= {"capacity": capacity}
    same(outcome(lambda: plan_of(**case)), outcome(lambda: without_extension(lambda: plan_of(**case))))


@pytest.mark.parametrize("seed", range(3))
def test_the_twin_agrees_on_many_real_lengths(seed):
    groups = [
        *rollouts(np.random.default_rng(seed), 60),
        *((int(n), (), 0) for n in np.random.default_rng(seed).lognormal(6, 0.9, 400).clip(1, 5000)),
    ]
    how = {"capacity": Capacity(100_000, 6_000) if seed else Capacity(5_000, 6_000), "ranks": 4, "seed": seed}
    same(plan_of(groups, **how), without_extension(lambda: plan_of(groups, **how)))


@SETTINGS
@given(plans_st)
def test_a_plan_keeps_its_promises(case):
    groups, capacity, ranks = case["groups"], case["capacity"], case["ranks"]
    plan = plan_of(**case)
    batches = [[plan.micro_batch(r, i) for i in range(plan.per_rank)] for r in range(ranks)]
    where, load = {}, np.zeros(ranks)
    for r, rank in enumerate(batches):
        for i, pieces in enumerate(rank):
            tokens = patches = 0
            assert [g for g, _, _ in pieces] == sorted({g for g, _, _ in pieces}), "a group twice in a micro-batch, or out of order"
            for g, first, end in pieces:
                prefix, suffixes, images = groups[g]
                where.setdefault(g, []).append((r, i, first, end))
                tokens += prefix + sum(suffixes[first:end])
                patches += images
                pairs = prefix**2 / 2 + sum(n**2 / 2 + n * prefix for n in suffixes[first:end])
                load[r] += case["costs"].linear * (prefix + sum(suffixes[first:end])) + case["costs"].quadratic * pairs
                load[r] += case["costs"].vision * images
            assert (tokens, patches) == (plan.totals("tokens")[r, i], plan.totals("patches")[r, i])
            assert tokens <= capacity.tokens and patches <= capacity.patches
    np.testing.assert_allclose(plan.totals("cost").sum(1), load + plan.per_rank * case["costs"].constant, rtol=1e-12)
    assert sorted(where) == list(range(len(groups)))
    for g, pieces in where.items():
        prefix, suffixes, _ = groups[g]
        pieces.sort()
        assert [end for *_, end in pieces] == [*(first for *_, first, _ in pieces[1:]), len(suffixes)] and pieces[0][2] == 0
        assert all(b[:2] == (a[0], a[1] + 1) for a, b in pairwise(pieces)), "a cut group's micro-batches are not adjacent"
        fits = prefix + sum(suffixes) <= capacity.tokens
        assert (len(pieces) == 1) == fits
    used = [sum(map(bool, rank)) for rank in batches]
    assert all(all(rank[:n]) for rank, n in zip(batches, used, strict=True)) and plan.per_rank == max(used), "empty ones come last"


@SETTINGS
@given(plans_st)
def test_micro_batches_run_by_falling_cost(case):
    plan = plan_of(**case)
    if len(plan.pieces) == len(case["groups"]):  # none was cut, so none has to stay beside another
        assert (np.diff(plan.totals("cost"), axis=1) <= 1e-9).all()


@SETTINGS
@given(plans_st)
def test_no_two_micro_batches_of_a_rank_could_be_one(case):
    plan, groups, capacity = plan_of(**case), case["groups"], case["capacity"]
    for r in range(case["ranks"]):
        whole = []
        for i in range(plan.per_rank):
            pieces = plan.micro_batch(r, i)
            if pieces and all((first, end) == (0, len(groups[g][1])) for g, first, end in pieces):
                whole.append((plan.totals("tokens")[r, i], plan.totals("patches")[r, i]))
        for i, (tokens, patches) in enumerate(whole):
            assert all(tokens + t > capacity.tokens or patches + p > capacity.patches for t, p in whole[i + 1 :])


@SETTINGS
@given(plans_st)
def test_ranks_are_as_even_as_the_largest_group_allows(case):
    plan = plan_of(**case)
    costs = Counter()
    for piece in plan.pieces:
        costs[int(piece["group"])] += piece["cost"]
    load = plan.totals("cost").sum(1) - plan.per_rank * case["costs"].constant
    assert load.max() - load.min() <= max(costs.values(), default=0) * (1 + 1e-9) + 1e-9


def test_swaps_find_what_largest_first_does_not():
    sizes = [(n, (), 0) for n in (30, 30, 20, 20, 20)]  # largest first gives 70 and 50
    plan = plan_of(sizes, capacity=Capacity(100, 1), costs=Costs(1, 0, 0), ranks=2)
    np.testing.assert_array_equal(plan.totals("cost").sum(1), [60, 60])


def test_the_seed_breaks_ties_and_nothing_else():
    rng = np.random.default_rng(0)
    distinct = [(int(n), (), 0) for n in rng.permutation(np.arange(1, 200))]
    equal = [(50, (), 0)] * 200
    how = {"capacity": Capacity(300, 1), "ranks": 3}
    same(plan_of(distinct, seed=0, **how), plan_of(distinct, seed=1, **how))
    first, again, other = (plan_of(equal, seed=seed, **how) for seed in (0, 0, 1))
    same(first, again)
    assert (first.pieces["group"] != other.pieces["group"]).any()


def rollouts(rng: np.random.Generator, count: int) -> list[tuple[int, tuple[int, ...], int]]:
    """Prompts of about 800 tokens with two images of about 320 merged tokens, 16 completions each."""
    images = rng.integers(250, 391, (count, 2)).sum(1)
    replies = rng.lognormal(math.log(300) - 0.32, 0.8, (count, 16)).clip(40, 1000).astype(int)
    return [(int(n) + int(rng.integers(100, 220)), tuple(map(int, r)), 4 * int(n)) for n, r in zip(images, replies, strict=True)]


@pytest.mark.parametrize(("count", "bound"), [(512, 1.01), (64, 1.01)])
def test_ranks_are_balanced_on_both_resources(count, bound):
    cost = (
        plan_of(rollouts(np.random.default_rng(0), count), capacity=Capacity(16_384, 16_384), costs=Costs(), ranks=8).totals("cost").sum(1)
    )
    assert cost.max() / cost.mean() <= bound


def test_lognormal_lengths_fill_micro_batches():
    lengths = np.random.default_rng(0).lognormal(6.8, 0.5, 100_000).clip(1, 8192).astype(int)
    n, none = len(lengths), np.empty(0, int)
    start = time.thread_time()
    plan = native.plan(lengths, none, np.zeros(n + 1, int), np.zeros(n, int), capacity=Capacity(8192, 1), costs=Costs(), ranks=8)
    assert time.thread_time() - start < 1, "ten times slower than the 1,000,000 lengths a second asked for"
    assert lengths.sum() / (8192 * 8 * plan.per_rank) >= 0.997


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([(10, (5,), 0), (101, (), 0)], "b: 101 tokens do not fit into a micro-batch of 100; raise"),
        ([(10, (5,), 0), (60, (5, 41), 0)], "b: suffix 1 of 41 tokens does not fit after its prefix of 60 into a micro-batch of 100"),
        ([(10, (5,), 0), (60, (5,), 51)], "b: 51 vision patches do not fit into a micro-batch of 50; raise the patch capacity"),
        ([(10, (5,), 0), (0, (5,), 0)], "b: no tokens"),
        ([(10, (5,), 0), (5, (5, 0), 0)], "b: suffix 1 has no tokens"),
        ([(10, (5,), 0), (5, (5,), -1)], "b: a negative number of patches"),
        ([(10, (5,), 0), (5, (2**62,), 0)], f"b: suffix 0 of {2**62} tokens does not fit"),
    ],
)
def test_a_row_that_fits_nowhere_is_named(groups, message):
    ours = outcome(lambda: plan_of(groups, capacity=Capacity(100, 50), names=["a", "b"]))
    assert isinstance(ours, str) and ours.startswith(message)
    assert ours == without_extension(lambda: outcome(lambda: plan_of(groups, capacity=Capacity(100, 50), names=["a", "b"])))
    assert outcome(lambda: plan_of(groups, capacity=Capacity(100, 50))) == ours.replace("b:", "row 1:", 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Capacity(0, 1), "capacity.tokens"),
        (lambda: Capacity(1, 2**31), "capacity.patches"),
        (lambda: Costs(linear=math.nan), "costs.linear"),
        (lambda: Costs(vision=-1.0), "costs.vision"),
        (lambda: plan_of([(1, (), 0)], capacity=Capacity(9, 9), ranks=0), "ranks"),
        (lambda: plan_of([(1, (), 0)], capacity=Capacity(9, 9), seed=-1), "seed"),
        (lambda: native.plan([1], [1], [0, 2], [0], capacity=Capacity(9, 9), costs=COSTS), "offsets"),
        (lambda: native.plan([1, 1], [1, 1], [0, 2, 1], [0, 0], capacity=Capacity(9, 9), costs=COSTS), "offsets"),
        (lambda: native.plan([1], [], [0, 0], [0, 0], capacity=Capacity(9, 9), costs=COSTS), "prefix, suffix, offsets and patches: "),
    ],
)
def test_wrong_settings_are_named(call, message):
    ours = outcome(call)
    assert isinstance(ours, str) and ours.startswith(message) and ours == without_extension(lambda: outcome(call))


def test_the_bench_tells_every_side_and_what_is_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    planner.main(["--sizes", "500", "--rounds", "1", "--json", str(tmp_path / "out.json")])
    result, told = json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out
    sides = {row["side"]: row for row in result["lengths"]}
    assert sides["ours"]["fill"] > 0.9 and sides["ours"]["micro_batches"] <= sides["ours, 8 ranks"]["micro_batches"]
    assert sides["TRL bfd"] == {"lengths": 500, "side": "TRL bfd", "status": "not installed"}
    assert {row["side"]: row.get("imbalance", 9) <= 1.01 for row in result["ranks"]}["ours"] and told.count("not installed") == 3


# ---- sanitizers


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Path:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    out = tmp_path_factory.mktemp("driver") / "driver"
    flags = [
        "-std=c++17",
        "-O0",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-ffp-contract=off",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
    ]
    sources = [ROOT / "tests/packing/planner_driver.cpp", ROOT / "csrc/planner.cpp", ROOT / "csrc/layout.cpp"]
    subprocess.run([compiler, *flags, f"-I{ROOT / 'csrc'}", *sources, "-o", out], check=True)
    return out


def test_nothing_is_read_or_written_out_of_place(driver):
    rng, cases = np.random.default_rng(0), []
    for _ in range(150):
        groups = [
            (int(rng.integers(1, 50)), tuple(map(int, rng.integers(1, longest, rng.integers(0, 8)))), int(rng.integers(0, 40)))
            for longest in rng.choice([2, 3, 40, 40], rng.integers(0, 25))  # suffixes of one token have no rows
        ]
        cases.append(
            (groups, Capacity(int(rng.integers(85, 300)), int(rng.integers(38, 90))), int(rng.integers(1, 6)), int(rng.integers(9)))
        )
    cases += [([(1, (2**63 - 1,), 0)], Capacity(2**31 - 1, 1), 1, 0), ([(2**31 - 2, (1, 1), 0)], Capacity(2**31 - 2, 1), 1, 0)]
    lines = []
    for groups, capacity, ranks, seed in cases:
        rows = [" ".join(map(str, (prefix, patches, len(suffixes), *suffixes))) for prefix, suffixes, patches in groups]
        lines.append(f"{ranks} {seed} {capacity.tokens} {capacity.patches} {len(groups)} {' '.join(rows)}")
    done = subprocess.run([driver], input="\n".join(lines), capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr[-2000:]

    def told(plan):
        if isinstance(plan, str):
            return plan
        pieces = (str(piece[name]) for piece in plan.pieces for name in ("group", "first", "end"))
        return " ".join([str(plan.per_rank), *map(str, plan.offsets), *pieces])

    expected = [told(without_extension(lambda c=c: outcome(lambda: plan_of(c[0], capacity=c[1], ranks=c[2], seed=c[3])))) for c in cases]
    assert done.stdout.splitlines() == expected
    assert sum(line.startswith("row") for line in expected) < 75


def test_the_sanitizer_is_awake(driver):
    done = subprocess.run([driver, "overrun"], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr

"""Groups on their way between ranks: balanced, all still there, as few moved as possible, and the same wherever it is computed."""

import itertools
import json
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh

from actial_fast.packing.planning import Costs
from actial_fast.train.balance import SLACK, Size, assign, exchange, ranks_of_shares
from actial_fast.train.dist import World

COSTS = Costs()


def rollouts(count: int, seed: int = 0) -> list[Size]:
    """Groups with up to four images and lognormal replies, far apart in cost."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 5, count)
    replies = rng.lognormal(5.3, 0.8, (count, 8)).clip(20, 2000).astype(int)
    return [Size(int(200 + 320 * i), tuple(map(int, r)), int(1280 * i)) for i, r in zip(images, replies, strict=True)]


def cost_of(size: Size, costs: Costs = COSTS) -> float:
    pairs = size.prefix**2 / 2 + sum(n**2 / 2 + n * size.prefix for n in size.suffixes)
    return costs.linear * (size.prefix + sum(size.suffixes)) + costs.quadratic * pairs + costs.vision * size.patches


def loads(sizes: list[Size], owner: np.ndarray, ranks: int) -> np.ndarray:
    return np.bincount(owner, [cost_of(s) for s in sizes], ranks)


@pytest.mark.parametrize("seed", range(5))
def test_64_groups_are_balanced_over_4_ranks(seed):
    sizes, home = rollouts(64, seed), np.repeat(np.arange(4), (40, 4, 0, 20))
    load = loads(sizes, assign(sizes, home, 4, COSTS), 4)
    assert load.max() / load.mean() <= 1.02
    before = loads(sizes, home, 4)
    assert before.max() / before.mean() > 2


def test_patches_and_pairs_count_as_tokens_do():
    home = np.zeros(4, np.int64)
    for heavy, light, costs in (
        (Size(50, (), 1000), Size(50), Costs(1.0, 0.0, 0.1, 0.0)),  # 150 and 50
        (Size(100, (100,)), Size(115), Costs(0.0, 1.0, 0.0, 0.0)),  # 20,000 and 6,612
        (Size(100, (100, 100)), Size(100), Costs(1.0, 0.0, 0.0, 0.0)),
    ):
        owner = assign([heavy, light, light, light], home, 2, costs).tolist()
        assert owner.count(owner[0]) == 1, "one as heavy as the other three"


def test_what_can_stay_stays():
    sizes, home = rollouts(64), np.repeat(np.arange(4), (30, 14, 12, 8))
    cost = np.array([cost_of(s) for s in sizes])
    owner = assign(sizes, home, 4, COSTS)
    kept = {names: cost[np.array(names)[owner] == home].sum() for names in itertools.permutations(range(4))}
    assert kept[0, 1, 2, 3] == pytest.approx(max(kept.values()))  # any other naming of the shares moves more
    assert kept[0, 1, 2, 3] > 1.1 * np.mean(list(kept.values()))


def test_nothing_moves_where_it_is_balanced_enough():
    home, costs = np.array([0, 0, 1, 1]), Costs(1.0, 0.0, 0.0, 0.0)

    def moved(more: int) -> list[int]:
        return assign([Size(5000 + more), Size(5000), Size(5000), Size(5000 - more)], home, 2, costs).tolist()

    within = int(SLACK * 10_000)
    assert moved(within) == home.tolist()
    assert moved(within + 1)[0] == moved(within + 1)[3] and sorted(moved(within + 1)) == [0, 0, 1, 1]


def test_nowhere_to_go_and_nothing_to_move():
    none = np.zeros(0, np.int64)
    assert len(assign([], none, 3, COSTS)) == 0
    free = Costs(0.0, 0.0, 0.0, 0.0)
    home = np.array([0, 0, 2])
    assert assign([Size(5)] * 3, home, 3, free) is home
    few = assign([Size(5)] * 2, np.array([6, 6]), 8, COSTS).tolist()
    assert few.count(6) == 1


def test_a_group_without_tokens_is_named_by_its_rank():
    with pytest.raises(ValueError, match="group 1 of rank 2: no tokens"):
        assign([Size(5), Size(5), Size(5), Size(0)], np.array([0, 0, 2, 2]), 3, COSTS)


@given(st.integers(1, 5).flatmap(lambda n: st.lists(st.lists(st.integers(0, 9), min_size=n, max_size=n), min_size=n, max_size=n)))
def test_ranks_of_shares_is_the_best_permutation(kept):
    kept = np.array(kept, np.float64)
    n = len(kept)
    found = ranks_of_shares(kept)
    assert sorted(found.tolist()) == list(range(n))
    best = max(sum(kept[i, p[i]] for i in range(n)) for p in itertools.permutations(range(n)))
    assert kept[np.arange(n), found].sum() == best


def test_one_rank_keeps_its_list():
    groups = [["a"], ["b"]]
    assert exchange(groups, [Size(1), Size(2)], World(0, 1, torch.device("cpu")), COSTS) is groups
    with pytest.raises(AssertionError, match="2 groups, but 1 sizes"):
        exchange(groups, [Size(1)], World(0, 1, torch.device("cpu")), COSTS)


# ---- three processes


@dataclass(frozen=True)
class Thing:
    """Stands for a Sample."""

    name: str
    ids: np.ndarray


CASES = {
    "uneven": (9, 2, 1),
    "one has all": (0, 12, 0),
    "one has none": (5, 0, 5),
    "none": (0, 0, 0),
    "fewer than ranks": (0, 2, 0),
    "balanced": (1, 1, 1),
}


def local_groups(counts: tuple[int, ...], rank: int) -> tuple[list[list[Thing]], list[Size]]:
    sizes = [Size(700, (50,) * 4)] * 3 if counts == (1, 1, 1) else rollouts(sum(counts), seed=7)
    first = sum(counts[:rank])
    mine = range(first, first + counts[rank])
    return [[Thing(f"{g}.{i}", np.arange(100 * g + i)) for i in range(1 + g % 3)] for g in mine], [sizes[g] for g in mine]


def on_rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    where = World(rank, world, torch.device("cpu"), init_device_mesh("cpu", (world,)))
    result = {}
    for name, counts in CASES.items():
        groups, sizes = local_groups(counts, rank)
        given = [list(group) for group in groups]
        moved = exchange(groups, sizes, where, COSTS)
        assert groups == given, "the caller's list is left as it was"
        for group in moved:
            for thing in group:
                g, i = map(int, thing.name.split("."))
                assert np.array_equal(thing.ids, np.arange(100 * g + i))
        result[name] = [[thing.name for thing in group] for group in moved]
    try:
        exchange([["x"]], [Size(0 if rank == 1 else 4)], where, COSTS)
    except ValueError as error:
        result["refused"] = str(error)
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(on_rank, (3, str(folder)), nprocs=3)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(3)]


@pytest.mark.parametrize("case", CASES)
def test_every_group_is_whole_and_where_it_was_assigned(case, ranks):
    counts = CASES[case]
    local = [local_groups(counts, rank) for rank in range(3)]
    names = [[thing.name for thing in group] for groups, _ in local for group in groups]
    sizes = [size for _, part in local for size in part]
    target = assign(sizes, np.repeat(np.arange(3), counts), 3, COSTS)
    for rank in range(3):
        assert ranks[rank][case] == [name for name, to in zip(names, target, strict=True) if to == rank]


def test_the_cases_move_something_and_balance(ranks):
    counts = CASES["uneven"]
    sizes = [size for rank in range(3) for size in local_groups(counts, rank)[1]]
    load = [sum(cost_of(sizes[int(group[0].split(".")[0])]) for group in ranks[rank]["uneven"]) for rank in range(3)]
    assert max(load) / np.mean(load) < 1.1
    assert [len(ranks[rank]["balanced"]) for rank in range(3)] == [1, 1, 1]
    assert sorted(len(ranks[rank]["fewer than ranks"]) for rank in range(3)) == [0, 1, 1]


def test_all_ranks_refuse_together(ranks):
    assert {part["refused"] for part in ranks} == {"group 0 of rank 1: no tokens; leave the row out"}

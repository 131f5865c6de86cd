"""Rewards as slow, failing services: calls side by side and beside the caller, time-outs, retries, what failures do, batches, groups."""

import asyncio
import itertools
import math
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from actial_fast.data.sources.row import Row
from actial_fast.settings.config import from_dict
from actial_fast.tasks import calls, rewards
from actial_fast.tasks.rewards import DEFAULT_REWARDS, RewardConfig, Scorer, probe, score

ROW, OTHER = Row((), truth="B", where="file.jsonl:7"), Row((), truth="C", where="file.jsonl:8")
ROOT = Path(__file__).parents[2]
GOOD = "<think>a</think><answer>B</answer>"
LONG = 30.0  # seconds that only a broken build waits


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr(calls, "FIRST_PAUSE", 0.002)


@pytest.fixture
def own(monkeypatch):
    """own(function, ...) -> the config of a reward that is this function."""
    module = types.ModuleType("rewards_of_this_test")
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def config(function, **options) -> RewardConfig:
        name = f"{getattr(function, '__name__', 'reward')}{len(vars(module))}".replace("<lambda>", "reward")
        setattr(module, name, function)
        return RewardConfig(f"{module.__name__}:{name}", **options)

    return config


def both(function):
    """The function as `def` and as `async def`, its waits in threads."""

    async def coroutine(*args):
        return await asyncio.to_thread(function, *args)

    return [function, coroutine]


def test_a_group_can_be_looked_at_once_all_of_its_calls_have_ended(own):
    """By one reply, by group, in batches that are not full, and after a failure; looking changes nothing of what results() tells."""
    gate = threading.Event()

    def waits(response, row):
        gate.wait(LONG)
        return float(len(response))

    def sizes(responses, rows):
        return [1.0] * len(responses)

    def raises(response, row):
        raise RuntimeError("no")

    with Scorer([own(waits), own(sizes, call="batch", batch_size=3, workers=0)]) as scorer:
        scorer.submit("a", ["x", "yy"], ROW)
        assert scorer.peek("a") is None
        gate.set()
        scorer.submit("b", ["zzz", "u"], OTHER)  # fills the batch of three; its other reply waits
        deadline = time.monotonic() + LONG
        while scorer.peek("a") is None and time.monotonic() < deadline:
            time.sleep(0.01)
        seen = scorer.peek("a").copy()
        assert seen.tolist() == [[1, 1], [2, 1]] and scorer.peek("b") is None
        found = scorer.results().groups
        assert np.array_equal(found["a"], seen) and found["b"].tolist() == [[3, 1], [1, 1]]
    with Scorer([own(raises, workers=0, on_error="nan", max_failures=1.0)]) as scorer:
        scorer.submit("a", ["x"], ROW)
        assert scorer.peek("a") is None
        assert np.isnan(scorer.results().groups["a"]).all()


# ---- side by side, and beside the caller


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_as_many_calls_at_a_time_as_there_are_workers(own, kind):
    under_way, peak, full = 0, 0, threading.Event()
    lock = threading.Lock()

    def judge(response, row):
        nonlocal under_way, peak
        with lock:
            under_way += 1
            peak = max(peak, under_way)
            if under_way == 16:
                full.set()
        assert full.wait(LONG), "16 calls never ran at a time"
        time.sleep(0.2)
        with lock:
            under_way -= 1
        return float(response)

    began = time.perf_counter()
    table = score([str(i) for i in range(32)], [ROW] * 32, [own(both(judge)[kind != "def"], workers=16)])
    assert time.perf_counter() - began < 3.2  # two rounds of 0.2 s; one after the other it would be 6.4 s
    assert peak == 16 and table[:, 0].tolist() == list(range(32))


def test_coroutines_share_one_loop_and_one_thread_and_wait_side_by_side(own):
    places, arrived = set(), []

    async def judge(response, row):
        places.add((threading.current_thread(), asyncio.get_running_loop()))
        arrived.append(response)
        while len(arrived) < 40:
            await asyncio.sleep(0.001)
        return 1

    assert score(["a"] * 40, [ROW] * 40, [own(judge, workers=40, timeout=LONG)]).sum() == 40
    assert len(places) == 1 and threading.main_thread() not in {thread for thread, _ in places}


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_groups_are_scored_while_others_are_sampled(own, kind):
    """submit returns with calls under way, and a group is through before the next is there."""
    sampled, through = threading.Event(), threading.Event()

    def judge(response, row):
        assert sampled.wait(LONG)
        if row is ROW:
            through.set()
        return len(response)

    with Scorer([own(both(judge)[kind != "def"], timeout=LONG), *DEFAULT_REWARDS]) as scorer:
        scorer.submit("first", ["a"], ROW)
        sampled.set()
        assert through.wait(LONG), "scored only when results are asked for"
        scorer.submit(2, ["bb", GOOD], OTHER)
        groups = scorer.results().groups
    assert list(groups) == ["first", 2] and {table.dtype for table in groups.values()} == {np.dtype("float32")}
    assert groups["first"].tolist() == [[1, 0, 0]] and groups[2].tolist() == [[2, 0, 0], [len(GOOD), 1, 0]]


@pytest.mark.parametrize("seed", range(3))
def test_results_do_not_depend_on_the_order_in_which_calls_end(own, seed):
    rng, ends = random.Random(seed), []

    def late(response, row):
        time.sleep(rng.random() / 50)
        ends.append(response)
        return hash((response, row.truth)) % 1000

    async def late_async(response, row):
        await asyncio.sleep(rng.random() / 50)
        return hash((response, row.truth)) % 1000

    def late_batch(responses, rows):
        time.sleep(rng.random() / 50)
        return [hash((response, row.truth)) % 1000 for response, row in zip(responses, rows, strict=True)]

    def late_group(responses, row):
        return late_batch(responses, [row] * len(responses))

    rewards = [own(late), own(late_async), own(late_batch, call="batch", batch_size=3), own(late_group, call="group")]
    with Scorer(rewards) as scorer:
        for g in range(6):
            scorer.submit(g, [f"{g}/{i}" for i in range(1 + g)], (ROW, OTHER)[g % 2])
        groups = scorer.results().groups
    assert ends != sorted(ends), "the calls ended in order: the test shows nothing"
    for g, table in groups.items():
        expected = [hash((f"{g}/{i}", (ROW, OTHER)[g % 2].truth)) % 1000 for i in range(1 + g)]
        np.testing.assert_array_equal(table, np.array([expected] * 4, np.float32).T)


def test_built_ins_and_workers_0_are_called_on_the_spot(own, monkeypatch):
    monkeypatch.setattr(rewards, "start", None)  # what leads to threads
    seen = []
    with Scorer([*DEFAULT_REWARDS, own(lambda response, row: seen.append(threading.current_thread()), workers=0)]) as scorer:
        scorer.submit(0, [GOOD, ""], ROW)
        assert seen == [threading.main_thread()] * 2, "before submit returns"
        np.testing.assert_array_equal(scorer.results().groups[0], np.array([[1, 1, math.nan], [0, 0, math.nan]], np.float32))


def test_threads_and_the_loop_are_daemons_and_reused_by_the_next_scorer(own):
    """So a function may keep a client for its thread or its event loop."""
    threads, loops = set(), set()

    def plain(response, row):
        threads.add(threading.current_thread())
        return 1

    async def coroutine(response, row):
        loops.add((threading.current_thread(), asyncio.get_running_loop()))
        return await asyncio.to_thread(plain, response, row)

    for _ in range(3):
        with Scorer([own(plain, workers=3), own(coroutine, workers=3)]) as scorer:
            for g in range(40):
                scorer.submit(g, ["a"], ROW)
            scorer.results()
    assert len(threads) <= 6 and len(loops) == 1
    assert all(thread.daemon for thread in threads | {thread for thread, _ in loops})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_loop_that_was_ended_is_replaced(own):
    async def ends_it(response, row):
        async def leaves():
            raise SystemExit

        if response == "end":
            asyncio.create_task(leaves())  # noqa: RUF006
            await asyncio.sleep(LONG)
        return 1

    config = own(ends_it, workers=1, timeout=0.2, retries=0, on_error="nan", max_failures=1.0)
    with Scorer([config]) as scorer:
        scorer.submit(0, ["end", "b", "c"], ROW)
        np.testing.assert_array_equal(scorer.results().groups[0][:, 0], [math.nan, 1, 1])


def test_a_forked_child_makes_its_own_threads(own):
    config = own(lambda response, row: 1, timeout=5.0, retries=0)
    score(["a"], [ROW], [config])
    context = multiprocessing.get_context("fork")
    child = context.Process(target=score, args=(["a"], [ROW], [config]))
    child.start()
    child.join(LONG)
    child.kill()
    assert child.exitcode == 0


def test_nothing_to_score():
    assert score([], []).shape == (0, 2)
    with Scorer(DEFAULT_REWARDS) as scorer:
        scorer.submit("empty", [], ROW)
        assert scorer.results().groups["empty"].shape == (0, 2)
        assert scorer.results().groups == {}


# ---- batches and groups


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_batches_are_filled_over_groups_and_groups_are_whole(own, kind):
    batches, groups = [], []

    def batch(responses, rows):
        batches.append(list(zip(responses, [row.truth for row in rows], strict=True)))
        return np.array([float(response) for response in responses])

    def group(responses, row):
        groups.append((responses, row.truth))
        return [None if response == "4" else float(response) + 0.5 for response in responses]

    rewards = [own(both(f)[kind != "def"], call=call, batch_size=3, workers=1) for f, call in ((batch, "batch"), (group, "group"))]
    with Scorer(rewards) as scorer:
        scorer.submit("x", ["0", "1"], ROW)
        scorer.submit("y", ["2", "3", "4"], OTHER)
        tables = scorer.results().groups
        scorer.submit("z", ["5"], ROW)
        assert scorer.results().groups["z"].tolist() == [[5, 5.5]]
    assert batches == [[("0", "B"), ("1", "B"), ("2", "C")], [("3", "C"), ("4", "C")], [("5", "B")]]
    assert groups == [(["0", "1"], "B"), (["2", "3", "4"], "C"), (["5"], "B")]
    np.testing.assert_array_equal(np.concatenate([*tables.values()]), [[0, 0.5], [1, 1.5], [2, 2.5], [3, 3.5], [4, math.nan]])


def test_score_takes_neighbours_with_the_same_row_for_a_group(own):
    sizes = own(lambda responses, row: [len(responses)] * len(responses), call="group")
    assert score(["a"] * 6, [ROW, ROW, OTHER, ROW, ROW, ROW], [sizes])[:, 0].tolist() == [2, 2, 1, 3, 3, 3]


# ---- what fails


@pytest.mark.parametrize(
    "call, value, told",
    [
        ("one", "good", r"it gave 'good' \(str\); a finite number or None is wanted"),
        ("one", "1", r"it gave '1' \(str\)"),
        ("one", math.inf, r"it gave inf \(float\); a finite"),
        ("one", -math.inf, r"it gave -inf"),
        ("one", 1e39, r"it gave 1e\+39"),
        ("one", [1.0], r"it gave \[1.0\] \(list\).*needs call: batch or call: group"),
        ("one", {"score": 1}, r"it gave \{'score': 1\} \(dict\)"),
        ("batch", 1.0, r"it gave 1.0 \(float\); with call: batch it must give a list of 2"),
        ("batch", [1.0], r"it gave 1 values; with call: batch it must give a list of 2"),
        ("batch", None, r"it gave None \(NoneType\); with call: batch"),
        ("batch", {1: 1, 2: 2}, r"\(dict\); with call: batch"),
        ("batch", {1.0, 2.0}, r"\(set\); with call: batch"),
        ("batch", "ab", r"\(str\); with call: batch"),
        ("batch", [1.0, "b"], r"it gave 'b' \(str\)"),
        ("group", [1.0, math.inf], r"it gave inf"),
        ("group", [1.0, 2.0, 3.0], r"it gave 3 values; with call: group it must give a list of 2"),
    ],
)
@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_value_that_is_no_reward_names_reward_row_and_value(own, call, value, told, kind):
    config = own(both(lambda *_: value)[kind != "def"], call=call, retries=0)
    with pytest.raises(ValueError, match=f"^reward {config.name!r} failed on row 'file.jsonl:7': ValueError: .*{told}"):
        score(["a", "b"], [ROW, ROW], [config])


def test_a_failed_batch_names_its_rows(own):
    config = own(lambda responses, rows: 1 / 0, call="batch", retries=0)
    rows = [Row((), where=f"f:{i}") for i in range(4)]
    with pytest.raises(ValueError, match=r"failed on rows 'f:0', 'f:1' and 2 more: ZeroDivisionError: division by zero$"):
        score(["a"] * 4, rows, [config])


def test_none_and_nan_are_unscorable_and_no_failures(own):
    with Scorer([own(lambda response, row: {"a": None, "b": math.nan, "c": np.float64(2), "d": True}[response])]) as scorer:
        scorer.submit(0, list("abcd"), ROW)
        scores = scorer.results()
    np.testing.assert_array_equal(scores.groups[0][:, 0], [math.nan, math.nan, 2, 1])
    assert scores.failed == (0,) and scores.causes == ()


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_retries_until_it_works(own, kind):
    seen = []

    def flaky(response, row):
        seen.append(response)
        if len(seen) == 1:
            raise ConnectionError("busy")
        return "no number" if len(seen) == 2 else 5

    config = own(both(flaky)[kind != "def"], retries=2)
    assert score(["a"], [ROW], [config]).tolist() == [[5]] and len(seen) == 3


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_so_many_retries_and_then_the_last_cause(own, retries):
    seen = itertools.count(1)

    def down(response, row):
        raise ConnectionError(f"attempt {next(seen)}")

    tries = rf" \({retries + 1} tries\)" if retries else ""
    with pytest.raises(ValueError, match=rf"row 'file.jsonl:7': ConnectionError: attempt {retries + 1}{tries}$") as caught:
        score(["a"], [ROW], [own(down, retries=retries)])
    assert isinstance(caught.value.__cause__, ConnectionError) and next(seen) == retries + 2


def test_pauses_before_retries_double_up_to_a_limit(own, monkeypatch):
    pauses, sleep = [], asyncio.sleep
    monkeypatch.setattr(calls, "LONGEST_PAUSE", 0.01)
    monkeypatch.setattr(calls.asyncio, "sleep", lambda seconds: pauses.append(seconds) or sleep(seconds))
    with pytest.raises(ValueError):
        score(["a"], [ROW], [own(lambda *_: 1 / 0, retries=5)])
    assert pauses == [0.002, 0.004, 0.008, 0.01, 0.01]


def test_nan_for_what_failed_counted_with_its_cause(own):
    def picky(response, row):
        return 1 if response == "fine" else 1 / 0

    rewards = [own(picky, on_error="nan", retries=0, max_failures=0.25), own(picky, on_error="nan", retries=0, workers=0, max_failures=0.5)]
    with Scorer([*rewards, DEFAULT_REWARDS[0]]) as scorer:
        scorer.submit("x", ["fine", "bad"], ROW)
        scorer.submit("y", ["fine", "fine"], OTHER)
        scores = scorer.results()
        np.testing.assert_array_equal(scores.groups["x"], [[1, 1, 0], [math.nan, math.nan, 0]])
        assert scores.failed == (1, 1, 0), "a share that is not above max_failures is allowed"
        assert len(scores.causes) == 2 and "failed on row 'file.jsonl:7': ZeroDivisionError" in scores.causes[0]
        scorer.submit("x", ["fine"], ROW)
        assert scorer.results().failed == (0, 0, 0), "counted since the last time"


def test_too_many_failures_end_the_run_with_the_first_cause(own):
    config = own(lambda response, row: 1 if response == "fine" else int(response), on_error="nan", retries=0, max_failures=0.25)
    with Scorer([config]) as scorer:
        scorer.submit("x", ["bad", "worse"], ROW)
        scorer.submit("y", ["fine", "fine"], OTHER)
        with pytest.raises(ValueError, match=r"row 'file.jsonl:7': .*'bad'; 2 or more of 4 replies went without, max_failures is 0.25"):
            scorer.results()


def test_a_failed_batch_counts_all_of_its_replies(own):
    config = own(
        lambda responses, rows: 1 / 0 if "bad" in responses else [1] * len(rows), call="batch", batch_size=4, on_error="nan", retries=0
    )
    for limit in (0.5, 0.49):
        with Scorer([RewardConfig(**{**vars(config), "max_failures": limit})]) as scorer:
            scorer.submit(0, ["bad", *["fine"] * 7], ROW)
            if limit == 0.5:
                scores = scorer.results()
                assert scores.failed == (4,) and np.isnan(scores.groups[0][:, 0]).tolist() == [True] * 4 + [False] * 4
            else:
                with pytest.raises(ValueError, match="4 or more of 8"):
                    scorer.results()


def test_too_many_failures_are_noticed_before_the_last_call_has_ended(own):
    def down(response, row):
        if response == "bad":
            raise ConnectionError("down")
        threading.Event().wait(LONG)

    with Scorer([own(down, on_error="nan", retries=0, workers=1, timeout=LONG)]) as scorer:
        scorer.submit(0, ["bad", "bad", "slow"], ROW)
        began = time.perf_counter()
        with pytest.raises(ValueError, match=r"1 or more of 3"):
            scorer.results()
    assert time.perf_counter() - began < LONG / 2


def test_a_scorer_goes_on_after_an_error_without_what_was_under_way(own):
    seen = []

    def judge(response, row):
        seen.append(response)
        return 1 / 0 if response == "bad" else 1

    with Scorer([own(judge, retries=0, workers=1)]) as scorer:
        scorer.submit("x", ["bad", *["later"] * 500], ROW)
        with pytest.raises(ValueError, match="ZeroDivisionError"):
            scorer.results()
        scorer.submit("x", ["fine"], ROW)
        assert scorer.results().groups["x"].tolist() == [[1]]
    assert len(seen) < 502, "calls that nobody waits for are not made"


# ---- time-outs


def test_a_plain_function_that_hangs_is_left_behind_and_its_slot_is_free(own):
    end = threading.Event()

    def hangs(response, row):
        return end.wait(LONG) if response == "hang" else 1

    with Scorer([own(hangs, workers=1, timeout=0.2, retries=1, on_error="nan", max_failures=0.4)]) as scorer:
        scorer.submit(0, ["hang", "b", "c"], ROW)
        scores = scorer.results()
        end.set()
    np.testing.assert_array_equal(scores.groups[0][:, 0], [math.nan, 1, 1])
    assert scores.failed == (1,) and "TimeoutError: no answer within 0.2 s (2 tries)" in scores.causes[0]


def test_a_late_answer_is_not_taken(own):
    table, late = [], threading.Event()

    def judge(response, row):
        if not table:
            table.append(1)
            late.wait(LONG)
            return 7
        late.set()
        time.sleep(0.05)
        return 1

    assert score(["a"], [ROW], [own(judge, timeout=0.3, retries=1)]).tolist() == [[1]]


def test_a_coroutine_out_of_time_is_cancelled(own):
    ended = []

    async def hangs(response, row):
        try:
            await asyncio.sleep(0 if response == "b" else LONG)
        except asyncio.CancelledError:
            ended.append(response)
            raise
        return 1

    with Scorer([own(hangs, workers=1, timeout=0.2, retries=0, on_error="nan", max_failures=1.0)]) as scorer:
        scorer.submit(0, ["a", "b"], ROW)
        np.testing.assert_array_equal(scorer.results().groups[0][:, 0], [math.nan, 1])
        assert ended == ["a"]


def test_a_coroutine_that_ignores_its_cancellation_is_not_waited_for(own):
    end = threading.Event()

    async def stubborn(response, row):
        while not end.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                pass
        return 1

    began = time.perf_counter()
    with Scorer([own(stubborn, workers=1, timeout=0.1, retries=0)]) as scorer:
        scorer.submit(0, ["a"], ROW)
        with pytest.raises(ValueError, match=r"no answer within 0.1 s$"):
            scorer.results()
        end.set()
    assert time.perf_counter() - began < LONG / 2


def test_a_coroutine_that_blocks_its_loop_is_told_and_harms_no_other(own, monkeypatch):
    monkeypatch.setattr(calls, "PATIENCE", 0.3)
    end = threading.Event()

    async def blocks(response, row):
        return 1 if response == "b" else end.wait(LONG)

    with Scorer([own(blocks, workers=1, timeout=0.2, retries=0, on_error="nan", max_failures=1.0)]) as scorer:
        scorer.submit(0, ["a", "b"], ROW)
        scores = scorer.results()
        np.testing.assert_array_equal(scores.groups[0][:, 0], [math.nan, 1])
        assert "it blocks the event loop: await asyncio.to_thread" in scores.causes[0]
        end.set()


def test_the_functions_own_timeouterror_is_its_own(own):
    def gives_up(response, row):
        raise TimeoutError("the judge is asleep")

    for function in (gives_up, both(gives_up)[1]):
        with pytest.raises(ValueError, match=r"TimeoutError: the judge is asleep$"):
            score(["a"], [ROW], [own(function, retries=0)])


HANGS = """
import asyncio, threading, time
from actial_fast.data.sources.row import Row
from actial_fast.tasks import calls, rewards
from actial_fast.tasks.rewards import RewardConfig, Scorer
calls.PATIENCE = 0.2
def plain(response, row): threading.Event().wait()
async def in_a_thread(response, row): await asyncio.to_thread(threading.Event().wait)
async def blocking(response, row): threading.Event().wait()
async def waiting(response, row): await asyncio.Event().wait()
if __name__ == "__main__":
    import sys
    scorer = Scorer([RewardConfig("hangs:" + sys.argv[1], timeout=float(sys.argv[2]), retries=0)])
    if sys.argv[3] == "close":
        with scorer:
            scorer.submit(0, ["a"] * 4, Row((), where="f:1"))
            scorer.results()
    scorer.submit(0, ["a"] * 4, Row((), where="f:1"))
    time.sleep(0.3)
    print("the end")
"""


@pytest.mark.parametrize("how", ["close", "leave"])
@pytest.mark.parametrize("judge", ["plain", "in_a_thread", "blocking", "waiting"])
def test_a_judge_that_hangs_never_keeps_the_process_from_ending(tmp_path, judge, how):
    (tmp_path / "hangs.py").write_text(HANGS)
    script = [sys.executable, str(tmp_path / "hangs.py"), judge, "0.2" if how == "close" else "3600", how]
    run = subprocess.run(script, capture_output=True, text=True, timeout=60, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)})
    if how == "close":
        assert run.returncode == 1 and "ValueError: reward 'hangs:" in run.stderr and "no answer within 0.2 s" in run.stderr
    else:
        assert run.returncode == 0 and run.stdout == "the end\n" and not run.stderr, run.stderr


# ---- errors that are not the judge's


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("kind", ["def", "async def", "on the spot"])
def test_exit_and_interrupt_pass_whatever_the_policy(own, error, kind):
    async def coroutine(response, row):
        return plain(response, row)

    def plain(response, row):
        seen.append(response)
        if response == "bad":
            raise error("enough")
        return 1

    seen = []

    config = own(coroutine if kind == "async def" else plain, workers=0 if kind == "on the spot" else 2, on_error="nan", max_failures=1.0)
    with Scorer([config]) as scorer:
        with pytest.raises(error, match="enough"):
            scorer.submit(0, ["bad"], ROW)
            assert kind != "on the spot", "told when it happens"
            scorer.results()
        scorer.submit(1, ["fine"], ROW)  # its threads are whole
        assert scorer.results().groups[1].tolist() == [[1]]
    assert seen == ["bad", "fine"], "nothing to retry"


@pytest.mark.parametrize("raised", [asyncio.CancelledError("inner"), StopIteration("inner")])
@pytest.mark.parametrize("kind", ["def", "async def"])
def test_odd_exceptions_are_failures_like_any_other(own, raised, kind):
    async def coroutine(response, row):
        raise raised

    def plain(response, row):
        raise raised

    with pytest.raises(ValueError, match=r"failed on row 'file.jsonl:7': .*(inner|StopIteration)"):
        score(["a"], [ROW], [own(coroutine if kind == "async def" else plain, retries=0, timeout=5.0)])


def test_everything_wrong_with_the_functions_is_told_at_once(own, tmp_path, monkeypatch):
    (tmp_path / "raises_at_import.py").write_text("raise KeyError('API_KEY')\n")
    monkeypatch.syspath_prepend(tmp_path)

    async def coroutine(response, row):
        return 1

    wrong = [
        RewardConfig("acuracy"),
        RewardConfig("no_such_module_here:f"),
        RewardConfig("raises_at_import:f"),
        own(lambda response: 1),
        own(lambda response, row, *, extra: 1),
        own(coroutine, workers=0),
    ]
    with pytest.raises(ValueError) as caught:
        Scorer([*DEFAULT_REWARDS, *wrong])
    for told in (
        "unknown reward 'acuracy'",
        "is the module on PYTHONPATH?",
        "its module raises KeyError: 'API_KEY'",
        "takes (response); with call: one it gets (response, row)",
        "takes (response, row, *, extra)",
        "is an async def, which is never called on the spot",
    ):
        assert told in str(caught.value)


@pytest.mark.parametrize(
    "options, told",
    [
        ({"workers": -1}, r"^rewards.workers: must be at least 0, got -1"),
        ({"batch_size": 0}, r"^rewards.batch_size: must be at least 1"),
        ({"retries": -1}, r"^rewards.retries: must be at least 0"),
        ({"timeout": 0}, r"^rewards.timeout: must be above 0 and finite, got 0"),
        ({"timeout": math.inf}, r"^rewards.timeout: must be a finite number, got inf"),
        ({"max_failures": 1.5}, r"^rewards.max_failures: must be a share from 0 to 1, got 1.5"),
        ({"call": "all"}, r"^rewards.call: 'all' is not one of one, batch, group"),
        ({"on_error": "zero"}, r"^rewards.on_error: 'zero' is not one of error, nan"),
        ({"call": "group"}, r"^rewards.call: accuracy is a built-in"),
    ],
)
def test_a_recipe_that_makes_no_sense(options, told):
    with pytest.raises(ValueError, match=told):
        from_dict(RewardConfig, {"name": "accuracy", **options}, "rewards")


def test_callables_of_every_kind(own):
    class Judge:
        async def __call__(self, response, row):
            return 1

    class Heir(Judge):
        pass

    async def scaled(factor, response, row):
        return factor

    assert score(["a"], [ROW], [own(Judge()), own(Heir()), own(partial(scaled, 3))]).tolist() == [[1, 1, 3]]


# ---- the preflight


def test_probe_tells_every_problem_in_a_line_each(own):
    seen = []

    def fine(response, row):
        seen.append((response, row))
        return 1

    def down(response, row):
        raise ConnectionError("no\nroute")

    assert probe([*DEFAULT_REWARDS, own(fine), own(lambda responses, row: [1] * len(responses), call="group")], ROW) == []
    assert len(seen) == 2 and all(row is ROW for _, row in seen)
    assert score([response for response, _ in seen], [ROW, ROW]).tolist() == [[1, 1], [1, 1]], "well formed, and right"
    problems = probe(
        [RewardConfig("acuracy"), own(fine), own(down, retries=0, on_error="nan", max_failures=1.0), own(fine, call="batch", retries=0)],
        ROW,
    )
    assert [
        bool(part in line) for part, line in zip(("unknown reward", "ConnectionError: no route", "a list of 2"), problems, strict=True)
    ] == [True] * 3
    assert not any("\n" in line for line in problems)

"""The schedule of replies: a budget that is kept for any prompts, every reply drawn to its end, and the figures it was made for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actial_fast.rollout.graphs import rows_of_graph
from actial_fast.rollout.schedule import Schedule, blocks_for


def run(schedule, lengths, prompts, drops=()):
    """Draw replies of these lengths, checking what must hold at every step; the rows of each step, and the order in which prompts ended.

    drops: prompts to be given up, each at the step of its number.
    """
    blocks, size, n = schedule.free, schedule.size, schedule.n
    drawn = dict.fromkeys(range(len(lengths)), 0)
    rows, ended, left = [], [], {}
    while not schedule.done:
        if len(rows) in drops:
            schedule.skip(drops[len(rows)])
        before = set(schedule.active.tolist())
        read, back = schedule.admit()
        for place in set(schedule.active.tolist()) - before:
            reply = int(schedule.reply[place])
            assert schedule.drawn[place] == left.pop(reply, 0) and ((place, drawn[reply]) in back) == (drawn[reply] > 0)
        assert all(prompt in schedule.prefixes for prompt in read)
        for place in schedule.grow().tolist():
            left[int(schedule.reply[place])] = int(schedule.drawn[place])
        active = schedule.active
        if not len(active):
            assert not schedule.done or drops, "nothing is decoded, and replies are left"
            continue
        held = schedule.table[active]
        prefixes = [b for own in schedule.prefixes.values() for b in own.tolist()]
        used = [*held[held > 0].tolist(), *prefixes]
        assert len(used) == len(set(used)) and set(used) <= set(range(1, blocks + 1)), "a block has two owners"
        assert len(used) + schedule.free == blocks
        for place in active.tolist():
            prompt = schedule.reply[place] // n
            assert len(schedule.prefixes[prompt]) == blocks_for(prompts[prompt] - 1, size)
            assert (schedule.table[place, : schedule.drawn[place] // size + 1] > 0).all(), "its next token has no block"
        rows.append(len(active))
        for reply in schedule.reply[active].tolist():
            drawn[reply] += 1
        over = active[[drawn[r] == lengths[r] for r in schedule.reply[active].tolist()]]
        ended += schedule.advance(over)
    assert schedule.free == blocks and not schedule.prefixes, "memory is still held"
    return rows, ended, drawn


@given(st.data())
def test_any_mix_of_prompts_stays_within_the_budget(data):
    prompts = data.draw(st.lists(st.integers(2, 16_000), min_size=1, max_size=8))
    n, limit = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 300))
    size, places = data.draw(st.sampled_from([16, 32])), data.draw(st.integers(1, 12))
    least = blocks_for(max(prompts) - 1, size) + blocks_for(limit, size)
    blocks = least + data.draw(st.integers(0, 200))
    lengths = data.draw(st.lists(st.integers(1, limit), min_size=len(prompts) * n, max_size=len(prompts) * n))
    rows, ended, drawn = run(Schedule(prompts, n, limit, blocks=blocks, size=size, places=places), lengths, prompts)
    assert list(drawn.values()) == lengths and sorted(ended) == list(range(len(prompts)))
    assert max(rows) <= places


def test_replies_leave_where_memory_runs_short_and_come_back():
    prompts, n, limit = [40, 40], 4, 64
    schedule = Schedule(prompts, n, limit, blocks=3 + 3 + 8, size=16, places=8)
    rows, _, drawn = run(schedule, [64] * 8, prompts)
    assert set(drawn.values()) == {64} and max(rows) > min(rows)
    assert sum(rows) == 8 * 64, "a reply was drawn twice"


def test_a_prompt_that_is_given_up_makes_room():
    prompts = [20, 20, 20]
    schedule = Schedule(prompts, 2, 10, blocks=100, size=16, places=4)
    _, ended, drawn = run(schedule, [10] * 6, prompts, drops={4: 0, 7: 2})
    assert ended == [1] and [drawn[r] for r in range(6)] == [4, 4, 10, 10, 3, 3]


def test_a_budget_too_small_for_one_reply_is_refused():
    with pytest.raises(ValueError, match=r"kv_tokens: a prompt of 100 tokens and one reply of up to 50 need 176, and there are 160"):
        Schedule([100], 2, 50, blocks=10, size=16, places=2)


def one_after_the_other(lengths, batch):
    """Forward passes in sequence and the rows they compute where batches of so many replies follow one another, and rows that have ended
    leave once they are half of those there: the sampler that this schedule replaced."""
    steps = computed = 0
    for start in range(0, len(lengths), batch):
        left = np.sort(lengths[start : start + batch])
        alive = len(left)
        for step in range(int(left[-1])):
            steps, computed = steps + 1, computed + alive
            running = int((left > step + 1).sum())
            alive = running if 2 * running <= alive else alive
    return steps, computed


@pytest.mark.parametrize("seed", range(3))
def test_the_simulated_step_of_a_7b_run(seed):
    """128 prompts of 800 tokens x 16 a rank, lognormal replies with a mean of about 292 up to 4,096, in the 45 GB beside a 7B; `-s` prints
    the figures that the README has of seed 0."""
    rng = np.random.default_rng(seed)
    sigma = 0.8
    drawn = rng.lognormal(np.log(300) - sigma**2 / 2, sigma, (128, 16)).astype(int)
    lengths = np.clip(drawn, 1, 4096).ravel()
    schedule = Schedule([800] * 128, 16, 4096, blocks=785_000 // 16, size=16, places=1024)
    steps = computed = 0
    while not schedule.done:
        schedule.admit()
        assert not len(schedule.grow()), "memory ran short"
        active = schedule.active
        steps, computed = steps + 1, computed + rows_of_graph(len(active))
        schedule.advance(active[schedule.drawn[active] + 1 == lengths[schedule.reply[active]]])
    before, rows = one_after_the_other(lengths, 16 * 16)
    print(f"forward passes {before} -> {steps}, rows in use {lengths.sum() / rows:.2f} -> {lengths.sum() / computed:.2f}")
    assert steps <= max(3000, lengths.max()) and steps < before / 3
    assert lengths.sum() / computed >= 0.95 > lengths.sum() / rows

"""Being asked to stop while ranks agree on it."""

from types import SimpleNamespace

import pytest

from actial_fast.train.stopping import GivenUp, Stop


def test_who_is_asked_while_ranks_agree_says_so_the_next_time():
    """A signal that comes while the others are waited for is not lost, and leads this rank nowhere alone."""
    stop: Stop

    def waits(value: float) -> float:
        stop.asked = True  # the signal
        return value

    stop = Stop(SimpleNamespace(max=waits))
    assert not stop.agreed() and stop.asked
    stop._where.max = lambda value: value
    assert stop.agreed()
    with pytest.raises(GivenUp):
        stop.leave()


def test_a_rank_learns_that_another_was_asked():
    stop = Stop(SimpleNamespace(max=lambda value: max(value, 1.0)))
    assert not stop.asked and stop.agreed() and stop.asked

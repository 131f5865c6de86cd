"""What the tests of the planner and of the layout share: plans of tuples, and the extension beside its twins."""

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from actial_fast.packing import native
from actial_fast.packing.planning import Costs, Plan

COSTS = Costs(1.0, 3.1e-5, 0.098, 5.0)
SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def plan_of(groups, **how) -> Plan:
    """A plan of groups given as (prefix tokens, suffix lengths, patches)."""
    prefix, suffixes, patches = zip(*groups, strict=True) if groups else ((), (), ())
    ends = np.cumsum([0, *map(len, suffixes)])
    how = {"costs": COSTS, **how}
    return native.plan(np.array(prefix, int), np.array([n for s in suffixes for n in s], int), ends, np.array(patches, int), **how)


def without_extension(call):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_C", None)
        return call()


def outcome(call):
    try:
        return call()
    except ValueError as error:
        return str(error)


def same(ours, theirs):
    """Whether two results are equal to the last bit, or two messages."""
    if isinstance(ours, str) or isinstance(theirs, str):
        assert ours == theirs
        return
    for field in fields(ours):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype and a.shape == b.shape, field.name
        np.testing.assert_array_equal(a, b, err_msg=field.name)

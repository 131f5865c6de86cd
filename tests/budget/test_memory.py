"""The plan's memory beside the process's, at a small size; all cases and a larger size: `python -m bench.step.memory`."""

import pytest

from bench.step.memory import CLOSE, SMALL, create, in_process

CASES = "packed, checkpoints", "NF4", "decoding"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    create(folder, 192, 4)
    create(folder / SMALL, 64, 2)
    return folder


@pytest.mark.parametrize("name", [CASES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in CASES[1:])])
def test_a_process_holds_what_the_plan_says(checkpoint, name):
    row = in_process(name, checkpoint)
    assert row["measured_mb"] > 100, "large enough to say something"
    assert abs(row["off"]) <= CLOSE, row

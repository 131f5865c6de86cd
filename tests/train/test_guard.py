"""Steps that are not finite leave no trace, and one process has a folder."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from actial_fast.train.guard import Guard, NonFinite
from actial_fast.train.lock import locked

ROOT = Path(__file__).parents[2]


def guarded(limit=3):
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.1, fused=True)
    return parameter, optimizer, Guard(optimizer, limit)


def step(parameter, guard, loss=1.0, grad=1.0):
    parameter.grad = torch.full((4,), grad)
    return guard.step(torch.tensor(loss), parameter.grad.norm())


@pytest.mark.parametrize(("loss", "grad"), [(1.0, float("nan")), (1.0, float("inf")), (float("nan"), 1.0), (float("-inf"), 1.0)])
def test_a_step_that_is_not_finite_leaves_weights_and_moments(loss, grad):
    parameter, optimizer, guard = guarded()
    assert step(parameter, guard)
    weights, state = parameter.detach().clone(), {k: v.clone() for k, v in optimizer.state[parameter].items()}
    assert not step(parameter, guard, loss, grad)
    assert torch.equal(parameter, weights) and all(torch.equal(optimizer.state[parameter][k], v) for k, v in state.items())
    assert parameter.grad is None and guard.skipped() == [1] and guard.in_a_row == 1
    assert step(parameter, guard) and not torch.equal(parameter, weights)
    assert guard.skipped() == [] and guard.in_a_row == 0


def test_the_steps_that_follow_are_those_of_a_run_without_it():
    (one, _, first), (two, _, second) = guarded(), guarded()
    for grad in (1.0, float("nan"), -0.5, 2.0):
        step(one, first, grad=grad)
        if grad == grad:
            step(two, second, grad=grad)
    assert torch.equal(one, two)


def test_too_many_in_a_row_end_the_run_and_name_the_rows():
    parameter, _, guard = guarded(limit=3)
    for _ in range(2):
        step(parameter, guard, loss=float("nan"))
    guard.skipped()
    guard.check(["a.jsonl:1"])
    step(parameter, guard, loss=float("nan"))
    guard.skipped()
    with pytest.raises(NonFinite, match=r"3 optimizer steps in a row .* the last held r0, r1, r2, r3, r4 and 2 more\. Lower optim\.lr"):
        guard.check([f"r{i}" for i in range(7)])


def test_a_folder_is_one_process_s_and_free_once_that_is_gone(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from actial_fast.train.lock import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('mine', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(ValueError, match=rf"run is in use by process {other.pid} on .*; wait for it"), locked(tmp_path / "run"):
            pass
    finally:
        other.kill()
        other.wait()
    with locked(tmp_path / "run"):
        pass

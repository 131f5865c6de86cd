"""The clock of a step: phases and the rest add up to it, on a CPU and on a device that gets to its work later; per device over ranks."""

from types import SimpleNamespace

import pytest
import torch

from actial_fast.train import phases as module
from actial_fast.train.dist import World
from actial_fast.train.phases import Phases, measured_rate
from tests.loops import ALONE

CUDA = World(0, 1, torch.device("cuda", 0))


class Machine:
    """A host's clock, and a device that does one thing after the other. spend: the host works; launch: it enqueues; wait: for all of it."""

    def __init__(self):
        self.now, self.done, self.waited = 100.0, 0.0, 0.0

    def spend(self, seconds):
        self.now += seconds

    def launch(self, seconds):
        self.done = max(self.done, self.now) + seconds

    def wait(self):
        self.now = max(self.now, self.done)


@pytest.fixture
def machine(monkeypatch):
    made = Machine()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = max(made.now, made.done)

        def synchronize(self):
            made.waited += max(0.0, self.at - made.now)
            made.now = max(made.now, self.at)

        def elapsed_time(self, end):
            assert made.now >= end.at, "not done yet"
            return 1e3 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    monkeypatch.setattr(module.time, "perf_counter", lambda: made.now)
    return made


def seconds(figures: dict[str, float]) -> dict[str, float]:
    parts = {name.removeprefix("seconds/"): value for name, value in figures.items() if name.startswith("seconds/")}
    assert sum(parts.values()) == pytest.approx(figures["seconds"], abs=1e-9), "the parts are not the whole"
    return {name: pytest.approx(value, abs=1e-9) for name, value in parts.items()}


def test_a_phase_that_comes_back_adds_up_and_one_inside_another_has_its_own_time(machine):
    phases = Phases(ALONE)
    machine.spend(0.5)
    for _ in range(2):
        with phases("update"):
            machine.spend(2)
            with phases("plan"):
                machine.spend(0.25)
                with phases("plan"):
                    machine.spend(0.5)
            machine.spend(1)
    with phases("data"):
        machine.spend(4)
    machine.spend(0.25)
    assert seconds(phases.metrics()) == {"data": 4, "plan": 1.5, "update": 6, "other": 0.75}
    machine.spend(1)
    assert seconds(phases.metrics()) == {"other": 1}, "a new window"


def test_on_a_device_a_phase_has_the_time_of_what_it_enqueued(machine):
    phases = Phases(CUDA)
    for _ in range(2):  # events of the first window are used again
        with phases("sample"):
            machine.launch(2)
            machine.wait()
            machine.spend(1)
        with phases("update"):
            machine.launch(5)
            machine.spend(0.1)
        with phases("plan"):
            machine.spend(0.5)  # the device hides it
        with phases("update"):
            machine.launch(2)
        machine.wait()
        before = machine.waited
        figures = phases.metrics()
        assert machine.waited == before, "after the step's wait there is nothing to wait for"
        assert seconds(figures) == {"sample": 3, "plan": 0, "update": 7, "other": 0}
        assert figures["peak_gib"] == 3


def test_a_phase_is_timed_when_it_raises(machine):
    phases = Phases(ALONE)
    with pytest.raises(KeyError), phases("save"):
        machine.spend(3)
        raise KeyError
    assert seconds(phases.metrics()) == {"save": 3, "other": 0}


def test_rates_are_per_device_and_the_peak_is_the_largest(machine):
    asked = []

    def total(values):  # the other rank: as much of everything, and a peak of a TiB
        asked.append(values)
        return [2 * v for v in values[:-2]] + [values[-2] + 1024, values[-1]]

    phases = Phases(SimpleNamespace(rank=1, size=2, device=torch.device("cpu"), total=total), ceiling=4.0)
    with phases("update"):
        machine.spend(2)
    with phases("sample"):
        machine.spend(6)
    phases.add("update", tokens=100, flops=3e12)
    phases.add("update", tokens=20, flops=1e12)
    phases.add("sample", tokens=12, flops=4e12)
    figures = phases.metrics()
    assert figures["tokens_per_s/update"] == 60 and figures["tokens_per_s/sample"] == 2
    assert figures["tflops/update"] == 2 and figures["mfu/update"] == 0.5 and figures["tflops"] == 1 and figures["mfu"] == 0.25
    assert figures["peak_gib"] == 1024 and len(asked) == 1, "one message a step"
    assert not any(name.startswith(("mfu", "tokens")) for name in phases.metrics())


def test_what_is_no_phase_is_refused():
    phases = Phases(ALONE)
    with pytest.raises(AssertionError, match="not a phase"), phases("lunch"):
        pass
    with pytest.raises(AssertionError, match="inside phase"), phases("data"):
        phases.metrics()


def test_the_rate_is_measured_without_drawing_from_the_runs_numbers():
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    rate = measured_rate(torch.device("cpu"))
    assert rate["tflops"] > 0 and "float32" in rate["what"] and torch.equal(torch.rand(3), want)

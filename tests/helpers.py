"""Things that tests run in other processes: a reward, and the command line with a fault planted in it."""

import os
import signal
import sys
import threading


def short(response: str, row) -> float:
    """More for shorter replies: a reward that random weights earn by chance and can learn."""
    return 1.0 / (1 + len(response) / 8)


def fifth(response: str, row) -> float:
    """1 for one reply in five, so that groups of equal rewards are common."""
    return float(len(response) % 5 == 0)


def _plant() -> None:
    from actial_fast.report.metrics import MetricLog

    kill_at, fail_rank = os.environ.get("ACTIAL_TEST_KILL_AT"), os.environ.get("ACTIAL_TEST_FAIL_RANK")
    step = MetricLog.step

    def faulty(self, number, metrics):
        step(self, number, metrics)
        if kill_at and number == int(kill_at):
            for thread in threading.enumerate():  # the save of an earlier step, which may take longer than this tiny model's step
                if thread.name.startswith("checkpoint"):
                    thread.join()
            os.kill(os.getpid(), signal.SIGKILL)
        if fail_rank and os.environ["RANK"] == fail_rank and number == 2:
            raise RuntimeError(f"rank {fail_rank} fails on purpose")

    MetricLog.step = faulty


if __name__ == "__main__":
    from actial_fast.cli.main import main

    _plant()
    status = main(sys.argv[1:])
    if "RANK" in os.environ:
        from tests.faults import leave

        leave(status)
    sys.exit(status)

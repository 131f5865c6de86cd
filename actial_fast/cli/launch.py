"""Several GPUs of this machine: the same command once a GPU, started and watched by torchrun."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

PEER_LOST = 3  # the exit status of a rank that ended because another one had
GRACE = 300  # seconds between being asked to stop and being ended: a forward pass, and a checkpoint, at the 7B's size


def launch(gpus: int, words: Sequence[str]) -> int:
    """Run `actial WORDS` on `gpus` ranks, and return the exit status: 0 when all have finished, else not.

    ValueError when the machine has GPUs, but fewer. Without any, ranks share the CPU's cores.
    """
    import logging

    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    if 0 < torch.cuda.device_count() < gpus:
        raise ValueError(f"--gpus {gpus}: this machine has {torch.cuda.device_count()}; give a number from 1 to that")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // gpus)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks say what happened, and the lines below
    options = ["--standalone", f"--nproc-per-node={gpus}", f"--shutdown-timeout={GRACE}", "-m", "actial_fast.cli"]
    try:
        run(parse_args([*options, *words]))
    except SignalException as asked:
        print(f"actial: asked to stop ({asked.sigval.name}); the same command goes on from the last checkpoint", file=sys.stderr)
        return 128 + asked.sigval
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        if codes <= {128 + signal.SIGINT, 128 + signal.SIGTERM}:  # somebody has asked a rank to stop, and all have, and have said so
            return max(codes)
        # ranks that ended because another had, or that torchrun then ended, are no cause; a signal is one, then an error of a rank's own
        caused = (PEER_LOST, -signal.SIGTERM)
        rank, failure = min(error.failures.items(), key=lambda item: (item[1].exitcode in caused, item[1].exitcode >= 0, item[0]))
        if failure.exitcode == 2:  # the user's mistake, which a rank has named
            return 2
        why = f"was ended by {failure.signal_name()}" if failure.exitcode < 0 else f"ended with status {failure.exitcode}"
        print(f"actial: rank {rank} {why}; the same command goes on from the last checkpoint", file=sys.stderr)
        return 1
    return 0

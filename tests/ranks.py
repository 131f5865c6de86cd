"""Programs of the tests that several ranks run."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PATIENCE = 280.0  # seconds
TAKEN = "address already in use"  # the port that was free a moment ago


def on_ranks(module: str, *args: object, ranks: int = 2) -> Any:
    """What `python -m module ...` prints last on rank 0, as JSON, run by `ranks` processes with torchrun's environment. A rank that fails
    ends the others, which would wait for it."""
    while True:
        codes, said, errors = _run([sys.executable, "-m", module, *map(str, args)], ranks)
        if not any(codes):
            return json.loads(said[0].splitlines()[-1])
        if not any(TAKEN in error.lower() for error in errors):
            raise AssertionError("\n".join(f"rank {r}: {c}: {e[-3000:]}" for r, (c, e) in enumerate(zip(codes, errors, strict=True)) if c))


def _run(command: list[str], ranks: int) -> tuple[list[int], list[str], list[str]]:
    """Exit codes, outputs and errors of the ranks."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        files = [[Path(folder) / f"{rank}.{kind}" for rank in range(ranks)] for kind in ("out", "err")]
        processes = []
        for rank in range(ranks):
            environment = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT)}
            with files[0][rank].open("w") as out, files[1][rank].open("w") as err:
                processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=err))
        deadline = time.monotonic() + PATIENCE
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes) and time.monotonic() < deadline:
            time.sleep(0.05)
        for process in processes:
            process.kill()
        codes = [process.wait() for process in processes]
        said, errors = ([file.read_text(errors="replace") for file in kind] for kind in files)
        return codes, said, errors

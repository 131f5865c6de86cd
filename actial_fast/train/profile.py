"""A window of steps under torch.profiler, for https://ui.perfetto.dev: kernels, operators and this package's named ranges.

RUN/profile/STAGE-step-000003-rank0.json.gz has one step, from its first row to its checkpoint; ranges: "phase NAME" of train.phases, and
the groups of kernels of ops.ranges.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

from torch.profiler import ProfilerActivity, profile

from actial_fast.ops import ranges
from actial_fast.settings.running import ProfileConfig
from actial_fast.train.dist import World


class Window:
    """The recipe's window. Use as a context manager around the loop, and call `at` where a step begins."""

    def __init__(self, config: ProfileConfig, run: Path, stage: str, where: World):
        self._first, self._last = config.steps if where.main or config.all_ranks else (0, 0)
        self._config, self._where = config, where
        self._open: tuple[profile, Path] | None = None
        self._name = str(run / "profile" / f"{stage}-step-{{:06d}}-rank{where.rank}.json.gz")

    def at(self, step: int) -> None:
        """Step `step` (from 1) begins: what was open is written, and the step recorded if it is in the window."""
        if self._open is not None:
            self.close()
        if self._first <= step <= self._last:
            self._begin(step)

    def close(self) -> None:
        """Write what is open, if anything is."""
        if self._open is None:
            return
        (made, path), self._open = self._open, None
        ranges.show(False)
        made.stop()
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".tmp-{path.name}")  # ends in .gz, by which the profiler compresses
        made.export_chrome_trace(str(part))
        os.replace(part, path)

    def _begin(self, step: int) -> None:
        cuda = [ProfilerActivity.CUDA] if self._where.device.type == "cuda" else []
        made = profile(
            activities=[ProfilerActivity.CPU, *cuda], profile_memory=self._config.memory, with_stack=self._config.stacks, record_shapes=True
        )
        made.start()
        ranges.show(True)
        self._open = (made, Path(self._name.format(step)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

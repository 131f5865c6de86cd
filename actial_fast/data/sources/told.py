"""What is unusual about rows and pictures but no error: told once a kind, with the first row it was met in, and counted."""

from __future__ import annotations

import logging
import threading
from collections import Counter

log = logging.getLogger("actial_fast.data")


class Told:
    """Counts what is told. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def __call__(self, kind: str, where: str) -> None:
        """Tell of `kind`, a sentence's beginning such as "an animation: its first frame is shown", unless it was told before."""
        with self._lock:
            self._counts[kind] += 1
            first = self._counts[kind] == 1
        if first:
            log.warning("%s: %s (told once; counted at the end)", where, kind)

    def close(self) -> None:
        """Say how often each kind was met, of those that were met more than once, and forget them."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        for kind, count in counts.items():
            if count > 1:
                log.warning("%d times: %s", count, kind)


told = Told()

"""Slow calls behind the caller's back: many at a time, each with a time-out and retries, and none that keeps the process from ending.

One thread, an event loop in which nothing but this file's code runs, watches the time. Plain functions run in daemon threads: Python cannot
stop a thread, so one that is out of time is left behind and another takes its place. Coroutines run in one more event loop in one more
thread and are cancelled; one that blocks that loop (time.sleep, requests) is left behind with it, and another loop takes its place. All of
them are the process's, started by its first call: what a function keeps for its thread or its event loop (a client, say) stays usable.
"""

from __future__ import annotations

import asyncio
import functools
import os
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from queue import SimpleQueue
from typing import Any

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 8.0  # seconds before a retry: the pause doubles from the first to the longest
PATIENCE = 1.0  # seconds in which an event loop that is not blocked answers


@dataclass(frozen=True)
class Outcome:
    """What became of a call: its value, or the error of the last try, which may be SystemExit or KeyboardInterrupt; tries counts them."""

    value: Any = None
    error: BaseException | None = None
    tries: int = 1


class Lane:
    """How calls of one kind are made: `workers` at a time, `timeout` seconds a try, `retries` further tries after a failure."""

    def __init__(self, workers: int, timeout: float, retries: int) -> None:
        self.slots, self.timeout, self.retries = asyncio.Semaphore(workers), timeout, retries


def attempt(run: Callable[[], Any]) -> Outcome:
    """One try, here and now. Every error becomes part of the outcome."""
    try:
        return Outcome(run())
    except asyncio.CancelledError as error:
        return Outcome(error=RuntimeError(f"the call was cancelled from within ({error!r})"))
    except BaseException as error:
        return Outcome(error=error)


async def _attempt(run: Callable[[], Awaitable[Any]]) -> Outcome:
    try:
        return Outcome(await run())
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        return Outcome(error=RuntimeError(f"the call was cancelled from within ({error!r})"))
    except BaseException as error:  # SystemExit too: raised through the event loop, it would end it
        return Outcome(error=error)


def start(run: Callable[[], Any], lane: Lane, *, coroutine: bool = False) -> Future[Outcome]:
    """Call `run` (coroutine: await what it returns) as soon as the lane has a slot free. Cancelling the future abandons the call."""
    engine = _engine()
    return asyncio.run_coroutine_threadsafe(engine.tries(run, lane, coroutine), engine.watch.loop)


class _Engine:
    """The process's threads and event loops."""

    def __init__(self) -> None:
        self.threads = _DaemonThreads()
        self.watch = _Loop("calls", self.threads)
        self.coroutines = _Loop("coroutines", self.threads)

    async def tries(self, run: Callable[[], Any], lane: Lane, coroutine: bool) -> Outcome:
        async with lane.slots:
            pause, tries = FIRST_PAUSE, 1
            while True:
                outcome = await self._try(run, lane.timeout, coroutine)
                if not isinstance(outcome.error, Exception) or tries > lane.retries:
                    return replace(outcome, tries=tries)
                await asyncio.sleep(pause)
                pause, tries = min(2 * pause, LONGEST_PAUSE), tries + 1

    async def _try(self, run: Callable[[], Any], timeout: float, coroutine: bool) -> Outcome:
        if coroutine and not self.coroutines.thread.is_alive():  # something raised SystemExit in a task of its own
            self.coroutines = _Loop("coroutines", self.threads)
        loop = self.coroutines
        future = asyncio.run_coroutine_threadsafe(_attempt(run), loop.loop) if coroutine else self.threads.submit(attempt, run)
        try:
            async with asyncio.timeout(timeout):
                return await asyncio.wrap_future(future)
        except TimeoutError:  # ours: those of the function are in its outcome
            hint = ""
            if coroutine and not await loop.answers():
                hint = "; it blocks the event loop: await asyncio.to_thread(...) what does not await, or make it a plain function"
                if loop is self.coroutines:
                    self.coroutines = _Loop("coroutines", self.threads)
            return Outcome(error=TimeoutError(f"no answer within {timeout:g} s{hint}"))


@functools.cache
def _engine() -> _Engine:
    return _Engine()


os.register_at_fork(after_in_child=_engine.cache_clear)  # threads stay in the parent


class _DaemonThreads(ThreadPoolExecutor):
    """Threads on demand, as many as there are calls, reused. Unlike its base's, they never keep the process from ending: an event loop has
    it for asyncio.to_thread and name look-ups, where only a ThreadPoolExecutor is accepted."""

    def __init__(self) -> None:
        super().__init__(1)
        self._free: list[SimpleQueue[tuple[Future[Any], Callable[[], Any]]]] = []

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            inbox = self._free.pop()
        except IndexError:
            inbox = SimpleQueue()
            threading.Thread(target=self._serve, args=(inbox,), name="call", daemon=True).start()
        inbox.put((future, partial(function, *args, **kwargs)))
        return future

    def _serve(self, inbox: SimpleQueue[tuple[Future[Any], Callable[[], Any]]]) -> None:
        while True:
            future, run = inbox.get()
            value, error = None, None
            if called := future.set_running_or_notify_cancel():
                try:
                    value = run()
                except BaseException as raised:
                    error = raised
            self._free.append(inbox)  # before whoever waits for the future makes the next call
            if called:
                future.set_exception(error) if error is not None else future.set_result(value)
            del future, run, value, error

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Nothing: an event loop that closes calls it, and there are others."""


class _Loop:
    """An event loop in a daemon thread of its own."""

    def __init__(self, name: str, threads: ThreadPoolExecutor) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.set_default_executor(threads)
        self.thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self.thread.start()

    async def answers(self) -> bool:
        """False when one of its tasks blocks it."""
        if not self.thread.is_alive():
            return True
        try:
            async with asyncio.timeout(PATIENCE):
                await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self.loop))
            return True
        except TimeoutError:
            return False

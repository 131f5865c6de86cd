"""Slow calls behind the caller's back: many at a time, each with a time-out and retries, and none that keeps the process from ending.

One thread, an event loop in which nothing but this file's code runs, watches the time. Plain functions run in daemon threads: Python cannot
stop a thread, so one that is out of time is left behind and another takes its place. Coroutines run in one more event loop in one more
thread and are cancelled; one that blocks that loop (time.sleep, requests) is left behind with it, and another loop takes its place.
"""

from __future__ import annotations

import asyncio
import threading
import time
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


class Calls:
    """Calls under way. Threads start with the first one; close() abandons what has not ended."""

    def __init__(self) -> None:
        self._threads = _DaemonThreads()
        self._watch: _Loop | None = None
        self._loops: list[_Loop] = []  # where coroutines run: in the last one; those before it are blocked

    def start(self, run: Callable[[], Any], lane: Lane, *, coroutine: bool = False) -> Future[Outcome]:
        """Call `run` (coroutine: await what it returns) as soon as one of the slots is free. Cancelling the future abandons the call."""
        if self._watch is None:
            self._watch = _Loop("calls", self._threads)
        return asyncio.run_coroutine_threadsafe(self._tries(run, lane, coroutine), self._watch.loop)

    def close(self) -> None:
        """Abandon what has not ended, and end all threads but those that hang."""
        for loops in ([self._watch] if self._watch else []), self._loops:  # the first cancels what runs in the others
            for loop in loops:
                loop.stop()
            patience = time.monotonic() + 2 * PATIENCE
            for loop in loops:
                loop.thread.join(max(0.0, patience - time.monotonic()))
        self._threads.stop()
        self._watch, self._loops = None, []

    async def _tries(self, run: Callable[[], Any], lane: Lane, coroutine: bool) -> Outcome:
        async with lane.slots:
            pause, tries = FIRST_PAUSE, 1
            while True:
                outcome = await self._try(run, lane.timeout, coroutine)
                if not isinstance(outcome.error, Exception) or tries > lane.retries:
                    return replace(outcome, tries=tries)
                await asyncio.sleep(pause)
                pause, tries = min(2 * pause, LONGEST_PAUSE), tries + 1

    async def _try(self, run: Callable[[], Any], timeout: float, coroutine: bool) -> Outcome:
        if coroutine:
            loop = self._coroutine_loop()
            future = asyncio.run_coroutine_threadsafe(_attempt(run), loop.loop)
        else:
            future = self._threads.submit(attempt, run)
        try:
            async with asyncio.timeout(timeout):
                return await asyncio.wrap_future(future)
        except TimeoutError:  # ours: those of the function are in its outcome
            hint = ""
            if coroutine and not await _answers(loop):
                hint = "; it blocks the event loop: await asyncio.to_thread(...) what does not await, or make it a plain function"
                if loop is self._loops[-1]:
                    self._loops.append(_Loop("coroutines", self._threads))
            return Outcome(error=TimeoutError(f"no answer within {timeout:g} s{hint}"))

    def _coroutine_loop(self) -> _Loop:
        if not self._loops or not self._loops[-1].thread.is_alive():
            self._loops.append(_Loop("coroutines", self._threads))
        return self._loops[-1]


class _DaemonThreads(ThreadPoolExecutor):
    """Threads on demand, as many as there are calls, reused. Unlike its base's, they never keep the process from ending: an event loop has
    it for asyncio.to_thread and name look-ups, where only a ThreadPoolExecutor is accepted."""

    def __init__(self) -> None:
        super().__init__(1)
        self._free: list[SimpleQueue[Callable[[], None] | None]] = []
        self._ended = False

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            inbox = self._free.pop()
        except IndexError:
            inbox = SimpleQueue()
            threading.Thread(target=self._serve, args=(inbox,), name="call", daemon=True).start()
        inbox.put(partial(_resolve, future, partial(function, *args, **kwargs)))
        return future

    def _serve(self, inbox: SimpleQueue[Callable[[], None] | None]) -> None:
        while (job := inbox.get()) is not None:
            job()
            del job
            self._free.append(inbox)
            if self._ended:
                return

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Nothing: event loops call it when they close, and there are several."""

    def stop(self) -> None:
        self._ended = True
        for inbox in self._free:
            inbox.put(None)


def _resolve(future: Future[Any], run: Callable[[], Any]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(run())
        except BaseException as error:
            future.set_exception(error)


class _Loop:
    """An event loop in a daemon thread of its own."""

    def __init__(self, name: str, threads: ThreadPoolExecutor) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.set_default_executor(threads)
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.loop.run_forever()
        finally:
            self.loop.close()

    def stop(self) -> None:
        """Have it cancel its tasks and end, now or once it is no longer blocked."""
        if self.thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._finish(), self.loop)

    async def _finish(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=PATIENCE)
        self.loop.call_soon(self.loop.stop)


async def _answers(loop: _Loop) -> bool:
    if not loop.thread.is_alive():
        return False
    try:
        async with asyncio.timeout(PATIENCE):
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop.loop))
        return True
    except TimeoutError:
        return False

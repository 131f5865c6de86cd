"""Rewards: what a sampled response is worth. The recipe's default is 0.5 * format + 0.5 * accuracy.

Your own is a function that the recipe names as module:function. It gives a number, or None (or NaN) for a response that it cannot score,
which then counts as its group's mean there: neither punished nor favoured. `call` in the recipe says what it gets, `def` or `async def` how
it is run:

    def short(response, row):                             # call: one (the default), one reply
        return 1 / (1 + len(response))
    # rewards: [{name: "mine:short"}]

    async def judge(response, row):                       # awaited, up to `workers` at a time, beside the sampling of other prompts
        return await ask_a_server(row.truth, response)
    # rewards: [{name: "mine:judge", workers: 64, timeout: 30, on_error: nan}]

    def model(responses, rows):                           # call: batch, lists of up to batch_size, of any prompts -> a list
        return reward_model(responses, [row.truth for row in rows])
    # rewards: [{name: "mine:model", call: batch, batch_size: 64, workers: 1}]

    def rare(responses, row):                             # call: group, all replies to one prompt -> a list
        return [1 / responses.count(response) for response in responses]
    # rewards: [{name: "mine:rare", call: group}]

What fails is an error with the reward, the row and the cause (`on_error: error`), or a NaN that is counted (`on_error: nan`): never a
silent 0, which would train on a bug. The built-in ones are in named.py.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Hashable, Mapping, Sequence, Set
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from actial_fast.data.sources.row import Row
from actial_fast.tasks.calls import Lane, Outcome, attempt, start
from actial_fast.tasks.named import SHIPPED, Reward, accuracy_reward, find_reward

LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class RewardConfig:
    """One term of the reward."""

    name: str
    """format (of the row's task), accuracy, task (what the row's task gives), or module:function for your own, `def` or `async def`."""
    weight: float = 1.0
    """Factor of this term in the total."""
    strict: bool = False
    """accuracy: as in the paper, only the text in the <answer> tags counts, if it is the truth up to case; else as people judge answers."""
    call: Literal["one", "batch", "group"] = "one"
    """What your function gets. one: (response, row), gives a number or None. batch: (responses, rows), lists of up to `batch_size`, of any
    prompts. group: (responses, row), all replies to one prompt. The last two give a list with a number or None for each response."""
    batch_size: int = 32
    """call: batch: most responses in one call."""
    workers: int = 8
    """Calls under way at a time, beside the sampling of other prompts; a plain function runs in that many threads. 0: no threads, the
    function is called on the spot, once and without a time-out, as the built-ins always are; for what is quick or must have the main
    thread."""
    timeout: float = 60.0
    """Seconds for one try. Then an `async def` is cancelled, a plain function left to itself in its thread; both are failures."""
    retries: int = 2
    """Further tries after one that raised, timed out or gave something that is no reward, after 0.25, 0.5, 1, ... seconds."""
    on_error: Literal["error", "nan"] = "error"
    """After the last try. error: the run ends, with the reward, the row and the cause. nan: these replies go without this term, counted."""
    max_failures: float = 0.1
    """on_error: nan: the run ends where more than this share of a rank's replies failed in a step."""

    def __post_init__(self) -> None:
        for name, low in (("batch_size", 1), ("workers", 0), ("retries", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}: must be at least {low}, got {getattr(self, name)}")
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"timeout: must be above 0 and finite, got {self.timeout}")
        if not 0 <= self.max_failures <= 1:
            raise ValueError(f"max_failures: must be a share from 0 to 1, got {self.max_failures}")
        if self.name in SHIPPED and self.call != "one":
            raise ValueError(f"call: {self.name} is a built-in, which takes one reply, got {self.call}")
        if self.strict and self.name != "accuracy":
            raise ValueError(f"strict: only accuracy has it, and this is {self.name}")


DEFAULT_REWARDS = (RewardConfig("format", 0.5), RewardConfig("accuracy", 0.5))


@dataclass(frozen=True)
class Scores:
    """What was scored since the last time. One column a reward, in the recipe's order, not weighted.

    groups: key -> (replies, k) float32, in the order of submission, NaN where a reward could not score or failed. failed: replies that
    went without because a call failed, one number a reward. causes: for each reward with such replies, the first failure, in words.
    """

    groups: dict[Hashable, np.ndarray]
    failed: tuple[int, ...]
    causes: tuple[str, ...]


class Scorer:
    """Scores groups of replies while others are still being sampled. Made once for a run, used by one thread, as a context manager.

    submit() starts the calls for a group and returns; results() waits for all that was submitted. No result depends on the order in which
    calls end. Leaving the context abandons what has not ended; a judge that hangs never keeps the process from ending.

    Raises ValueError, when made, with everything that is wrong with the rewards' names and functions.
    """

    def __init__(self, rewards: Sequence[RewardConfig]) -> None:
        self._terms, problems = _terms(rewards)
        if problems:
            raise ValueError("; ".join(problems))
        self.failed = (0,) * len(self._terms)
        """Replies that went without a reward because a call failed, one number a reward, in the last `results`."""
        self._started: list[_Started] = []
        self._groups: dict[Hashable, np.ndarray] = {}
        self._calls: dict[Hashable, list[_Started]] = {}

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self._forget()

    def submit(self, key: Hashable, responses: Sequence[str], row: Row) -> None:
        """Start scoring all replies to one prompt. key: names the group in results(), once until then. Failures are told by results()."""
        assert key not in self._groups, f"group {key!r} is submitted twice"
        table = self._groups[key] = np.full((len(responses), len(self._terms)), np.nan, np.float32)
        replies = [_Reply(key, response, row, table, i) for i, response in enumerate(responses)]
        for term in self._terms:
            if term.config.call == "one":
                for reply in replies:
                    self._start(term, [reply])
            elif term.config.call == "group":
                self._start(term, replies)
            else:
                term.waiting += replies
                while len(term.waiting) >= term.config.batch_size:
                    self._start(term, term.waiting[: term.config.batch_size])
                    del term.waiting[: term.config.batch_size]

    def peek(self, key: Hashable) -> np.ndarray | None:
        """The rewards (replies, k) of a group that was submitted, as results() will tell them, once all its calls have ended without a
        failure; None before, and after one. Never waits."""
        calls = self._calls.get(key, [])
        waiting = any(reply.key == key for term in self._terms for reply in term.waiting)  # for their batch to fill
        if waiting or not all(call.future.done() and call.future.result().error is None for call in calls):
            return None
        for call in calls:
            call.fill(call.future.result())
        return self._groups[key]

    def results(self) -> Scores:
        """Wait for all groups submitted since the last time, and forget them.

        Raises ValueError where a reward fails under `on_error: error`, or for more than `max_failures` of the replies: it names the reward,
        the row and the cause, and abandons the calls still under way. SystemExit and KeyboardInterrupt of a reward pass.
        """
        for term in self._terms:
            self._start(term, term.waiting)
        groups, started = self._groups, self._started
        replies, failed = sum(map(len, groups.values())), [0] * len(self._terms)
        causes: dict[int, str] = {}
        try:
            for call in started:
                outcome, config, k = call.future.result(), call.term.config, call.term.column
                if outcome.error is None:
                    call.fill(outcome)
                    continue
                cause = _told(call, outcome)
                if config.on_error == "error":
                    raise ValueError(cause) from outcome.error
                failed[k] += len(call.replies)
                causes.setdefault(k, cause)
                if failed[k] > config.max_failures * replies:
                    share = f"{failed[k]} or more of {replies} replies went without, max_failures is {config.max_failures:g}"
                    raise ValueError(f"{causes[k]}; {share}") from outcome.error
        finally:
            self._forget()
        self.failed = tuple(failed)
        return Scores(groups, tuple(failed), tuple(causes[k] for k in sorted(causes)))

    def _forget(self) -> None:
        for call in self._started:
            call.future.cancel()
        self._started, self._groups, self._calls = [], {}, {}
        for term in self._terms:
            term.waiting = []

    def _start(self, term: _Term, replies: list[_Reply]) -> None:
        if not replies:
            return
        run = partial(_call_async if term.coroutine else _call, term, replies)
        if term.lane is None:
            future: Future[Outcome] = Future()
            future.set_result(_passing(attempt(run)))
        else:
            future = start(run, term.lane, coroutine=term.coroutine)
        self._started.append(_Started(term, replies, future))
        for key in {reply.key for reply in replies}:
            self._calls.setdefault(key, []).append(self._started[-1])


def score(responses: Sequence[str], rows: Sequence[Row], rewards: Sequence[RewardConfig] = DEFAULT_REWARDS) -> np.ndarray:
    """Score n responses to their n rows with k rewards, and wait. Neighbours with the very same row are a group.

    Returns float32 (n, k), one column a reward, not weighted; NaN where a reward cannot score the response. Raises as Scorer does.
    """
    assert len(responses) == len(rows), f"{len(responses)} responses for {len(rows)} rows"
    with Scorer(rewards) as scorer:
        for _, group in itertools.groupby(range(len(rows)), key=lambda i: id(rows[i])):
            first, *others = group
            scorer.submit(first, responses[first : first + 1 + len(others)], rows[first])
        tables = scorer.results().groups.values()
    return np.concatenate([np.empty((0, len(rewards)), np.float32), *tables])


def probe(rewards: Sequence[RewardConfig], row: Row) -> list[str]:
    """What is wrong with the rewards, one line each, none when they can be used: each is imported, and called as in a run, with its
    time-out and retries, with a group of two well-formed replies to this row."""
    terms, problems = _terms(rewards)
    replies = [f"<think>{thought}</think><answer>{row.truth or 'A'}</answer>" for thought in ("It shows.", "I see.")]
    for config in [replace(term.config, on_error="error") for term in terms]:
        try:
            score(replies, [row, row], [config])
        except ValueError as error:
            problems.append(" ".join(str(error).split()))
    return problems


@dataclass(frozen=True)
class _Reply:
    """A response of a group, and the place of its rewards: table[i]."""

    key: Hashable
    response: str
    row: Row
    table: np.ndarray
    i: int


@dataclass
class _Term:
    """A reward at work. lane is None for one that is called on the spot; waiting: replies that do not fill a batch yet."""

    config: RewardConfig
    column: int
    function: Reward
    coroutine: bool
    lane: Lane | None
    waiting: list[_Reply] = field(default_factory=list)


@dataclass(frozen=True)
class _Started:
    term: _Term
    replies: list[_Reply]
    future: Future[Outcome]

    def fill(self, outcome: Outcome) -> None:
        """Put the rewards of a call that went well in their places."""
        for reply, value in zip(self.replies, outcome.value, strict=True):
            reply.table[reply.i, self.term.column] = value


def _terms(rewards: Sequence[RewardConfig]) -> tuple[list[_Term], list[str]]:
    """The rewards that can be used, and what is wrong with the others."""
    terms, problems = [], []
    for column, config in enumerate(rewards):
        try:
            function = partial(accuracy_reward, strict=True) if config.strict else find_reward(config.name)
        except ValueError as error:
            problems.append(str(error))
            continue
        either = function, inspect.getattr_static(type(function), "__call__", None)  # an object may be called with await, too
        coroutine = any(map(inspect.iscoroutinefunction, either))
        wanted = {"one": "(response, row)", "batch": "(responses, rows)", "group": "(responses, row)"}[config.call]
        if not _takes_two(function):
            problems.append(f"reward {config.name!r} takes {inspect.signature(function)}; with call: {config.call} it gets {wanted}")
        elif coroutine and not config.workers:
            problems.append(f"reward {config.name!r} is an async def, which is never called on the spot; workers: must be at least 1")
        else:
            on_the_spot = config.name in SHIPPED or not config.workers
            lane = None if on_the_spot else Lane(config.workers, config.timeout, config.retries)
            terms.append(_Term(config, column, function, coroutine, lane))
    return terms, problems


def _takes_two(function: Reward) -> bool:
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # some written in C have none
        return True
    try:
        signature.bind(None, None)
    except TypeError:
        return False
    return True


def _arguments(term: _Term, replies: list[_Reply]) -> tuple[Any, Any]:
    if term.config.call == "one":
        return replies[0].response, replies[0].row
    responses = [reply.response for reply in replies]
    return responses, [reply.row for reply in replies] if term.config.call == "batch" else replies[0].row


def _call(term: _Term, replies: list[_Reply]) -> list[float]:
    return _numbers(term.function(*_arguments(term, replies)), term.config.call, len(replies))


async def _call_async(term: _Term, replies: list[_Reply]) -> list[float]:
    return _numbers(await term.function(*_arguments(term, replies)), term.config.call, len(replies))


def _numbers(value: Any, call: str, n: int) -> list[float]:
    """What a call gave, as n numbers, NaN for None; ValueError when it is something else."""
    if call == "one":
        return [_number(value)]
    wanted = f"with call: {call} it must give a list of {n}, a number or None for each response"
    if isinstance(value, str | bytes | Mapping | Set) or not hasattr(value, "__len__"):
        raise ValueError(f"it gave {_short(value)}; {wanted}")
    values = list(value)
    if len(values) != n:
        raise ValueError(f"it gave {len(values)} values; {wanted}")
    return [_number(each) for each in values]


def _number(value: Any) -> float:
    if value is None:
        return math.nan
    try:
        number = math.inf if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError):
        number = math.inf
    if abs(number) > LARGEST:
        hint = "; what takes and gives lists needs call: batch or call: group" if isinstance(value, list | tuple | np.ndarray) else ""
        raise ValueError(f"it gave {_short(value)}; a finite number or None is wanted{hint}")
    return number


def _short(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) < 60 else text[:57] + '...'} ({type(value).__name__})"


def _passing(outcome: Outcome) -> Outcome:
    """The outcome of a call on the spot. Ctrl-C in one is not kept for later."""
    if outcome.error is not None and not isinstance(outcome.error, Exception):
        raise outcome.error
    return outcome


def _told(call: _Started, outcome: Outcome) -> str:
    """The failure in words; SystemExit and KeyboardInterrupt pass."""
    error = _passing(outcome).error
    rows = list(dict.fromkeys(repr(reply.row.where or reply.row.id) for reply in call.replies))
    where = f"row {rows[0]}" if len(rows) == 1 else f"rows {', '.join(rows[:2])}" + (f" and {len(rows) - 2} more" if len(rows) > 2 else "")
    tries = f" ({outcome.tries} tries)" if outcome.tries > 1 else ""
    return f"reward {call.term.config.name!r} failed on {where}: {type(error).__name__}: {error}{tries}"

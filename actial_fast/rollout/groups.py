"""The groups of each step, in turn: prompts from the stream, n replies to each from the engine, scored while others are still being drawn,
and of these the ones that the step learns from.

A step has one draw of prompts, or with dynamic sampling as many as it takes. With rollout.ahead the groups of a step are drawn before the
update of the step in front of it, from the weights which that one begins with. Only an engine with weights of its own can do so beside the
update, in a thread; the embedded one draws from the module that is being updated, so it draws first and the update follows: the same
groups, nothing saved. A run that goes on finds what was drawn ahead on the disk, where it stays as long as a checkpoint needs it.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Sequence as Many
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

from actial_fast.data.sources.stream import Example, Stream
from actial_fast.model.processor import Processor
from actial_fast.report.metrics import MetricLog
from actial_fast.rollout.choosing import Gate, Race, advantages_of, chosen, differ, fines, next_size, totals_of
from actial_fast.rollout.episodes import play, restored, text_of, whole
from actial_fast.rollout.kept import Kept
from actial_fast.rollout.protocol import Draw, Engine, Reply, Watch, awake, never
from actial_fast.settings.recipe import GRPORecipe
from actial_fast.tasks.rewards import Scorer
from actial_fast.train.dist import Agreed, World
from actial_fast.train.phases import Timer, untimed
from actial_fast.train.samples import Sample
from actial_fast.train.stage import State, draw
from actial_fast.train.stopping import NEVER, Stop


@dataclass(frozen=True)
class Drawn:
    """The groups of a step. examples, samples: this rank's, `sampling.n` samples to an example, in the order of the stream; version: the
    step whose weights the replies are from; cursor: what they were drawn by; failed: replies, on this rank, that each reward failed on;
    figures: of all ranks'."""

    examples: list[Example]
    samples: list[Sample]
    version: int
    cursor: State
    failed: tuple[int, ...]
    figures: dict[str, float]


@dataclass
class _Begun:
    """Groups of a step on their way, by their positions: of this rank, but for tables (n, R), which are of all."""

    step: int
    version: int
    cursor: State
    kept: Kept | None
    race: Race | None
    board: str
    examples: dict[int, Example] = field(default_factory=dict)
    texts: dict[int, list[str]] = field(default_factory=dict)
    replies: dict[int, list[Reply]] = field(default_factory=dict)
    tables: dict[int, np.ndarray] = field(default_factory=dict)
    unread: set[int] = field(default_factory=set)  # submitted, and their rewards not seen yet
    found: set[int] = field(default_factory=set)  # on the disk
    last: float = math.inf  # groups behind do not count: they may have been drawn and scored or not
    failed: tuple[int, ...] = ()
    draws: int = 0
    halved: int = 0  # times that memory ran short on this rank, and the rest was drawn with half of it
    halvings: int = 0  # the same of all ranks
    asked: int = 0  # groups, over all ranks
    held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)  # the engine, awake
    thread: Future[None] | None = None


class Groups:
    """The groups of one run's steps. As a context manager, which ends what was begun ahead. cursor: as `cursor` was when the run ended that
    goes on; replies: where finished groups go, and those of an interrupted run come from."""

    def __init__(
        self,
        engine: Engine,
        processor: Processor,
        stream: Stream,
        recipe: GRPORecipe,
        where: World,
        scorer: Scorer,
        *,
        cursor: State | None = None,
        replies: Kept | None = None,
        log: MetricLog | None = None,
        stop: Stop = NEVER,
        phase: Timer = untimed,
    ):
        self._engine, self._processor, self._stream, self._recipe, self._where = engine, processor, stream, recipe, where
        self._scorer, self._replies, self._log, self._stop, self._phase = scorer, replies, log, stop, phase
        gate = recipe.sampling.gate
        self._gate = Gate(gate, recipe, stream, (cursor or {}).get("gate")) if gate.on else None
        self._ahead: Drawn | _Begun | None = None
        self._silent: Counter[str] = Counter()  # steps in which a reward scored nothing
        self._ended = False  # whoever draws in the thread is to leave off

    @property
    def cursor(self) -> State:
        """What the next groups are drawn by, for a checkpoint: of those of the next step where these have been drawn or begun."""
        if self._ahead is not None:
            return self._ahead.cursor
        return {"position": self._stream.position} | ({"gate": self._gate.state} if self._gate else {})

    def of(self, step: int) -> Drawn:
        """The groups of a step, drawn ahead or now, with the weights that the step begins with. Every rank calls. Raises GivenUp when a
        stop was asked."""
        if self._ahead is not None:
            assert isinstance(self._ahead, Drawn), "settle comes first"
            drawn, self._ahead = self._ahead, None
            return drawn
        resumed = bool(self._recipe.rollout.ahead) and step > 1  # these were drawn ahead of the checkpoint, and are on the disk
        begun = self._begin(step, step - 1)
        drawn = self._whole(begun, self._stop)
        if resumed:
            anew = self._where.total([len({p for p in begun.replies if p <= begun.last} - begun.found)])[0]
            if anew:
                text = f"{anew:.0f} groups drawn ahead were not on the disk and were drawn with newer weights than in an unbroken run"
                self._tell(step, "redrawn", text, groups=anew)
            drawn = replace(drawn, version=drawn.version - (not anew))
        return drawn

    def ahead(self, step: int) -> None:
        """Begin the groups of the step after the next update, with the weights before it. An engine whose module is the trainer's has drawn
        them on return; another draws until `settle`. Every rank calls. Raises GivenUp when a stop was asked."""
        assert self._ahead is None
        begun = self._begin(step, step - 2)
        if self._engine.own:
            self._ahead = self._whole(begun, self._stop)
            return
        self._ahead = begun
        with self._phase("sync"):
            begun.held.enter_context(awake(self._engine, begun.version))
        examples = self._draw(begun)
        pool = ThreadPoolExecutor(1, "sampling")
        begun.thread = pool.submit(self._generate, begun, examples, NEVER)
        pool.shutdown(wait=False)

    def settle(self) -> None:
        """Wait for what was begun ahead. A stop waits with it: after the update nobody could draw with these weights again. Every rank
        calls."""
        if isinstance(self._ahead, _Begun):
            begun = self._ahead
            assert begun.thread is not None
            with self._phase("sample"):
                begun.thread.result()
            self._ahead = self._made(begun, NEVER)

    def forget(self, needed: Many[int]) -> None:
        """Remove replies from the disk, but those of these steps."""
        if self._replies and self._where.main:
            self._replies.forget(needed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        if isinstance(self._ahead, _Begun):
            if self._ahead.thread is not None:
                self._ahead.thread.exception()
            self._ahead.held.close()

    # ---- one step's

    def _begin(self, step: int, version: int) -> _Begun:
        kept, dynamic = self._replies.at(step) if self._replies else None, self._recipe.sampling.oversample > 0
        board = f"qualified/{self._recipe.run}/{self._recipe.name}/{step}"
        return _Begun(step, version, self.cursor, kept, Race(self._recipe.prompts, board, self._where) if dynamic else None, board)

    def _whole(self, begun: _Begun, stop: Stop) -> Drawn:
        """All of a step's, here and now."""
        examples = self._draw(begun)
        with self._phase("sync"):
            begun.held.enter_context(awake(self._engine, begun.version))
        with begun.held:
            with self._phase("sample"):
                self._generate(begun, examples, stop)
            return self._made(begun, stop)

    def _draw(self, begun: _Begun) -> list[Example]:
        """This rank's prompts of the step's next draw."""
        good = sum(differ(table, self._recipe) for table in begun.tables.values())
        size = next_size(len(begun.tables), good, self._recipe)
        with self._phase("data"):
            examples = draw(self._stream, size, self._where, self._gate.admits if self._gate else None)
        begun.draws += 1
        begun.examples |= {example.position: example for example in examples}
        return examples

    def _generate(self, begun: _Begun, examples: list[Example], stop: Stop) -> None:
        """Replies to these, and the calls that score them begun. Waits for no other rank."""
        n, sampling = self._recipe.sampling.n, self._recipe.sampling
        positions = [example.position for example in examples]

        def drawn(groups: dict[int, list[Reply]], new: bool = True) -> None:
            if begun.kept and new:
                begun.kept.add({positions[i]: group for i, group in groups.items()})
            for i, group in groups.items():
                position, texts = positions[i], [text_of(self._processor, reply) for reply in group]
                begun.replies[position], begun.texts[position] = group, texts
                self._scorer.submit(position, texts, examples[i].row)
                begun.unread.add(position)
            self._enter(begun)

        def dropped(i: int) -> bool:
            assert begun.race is not None
            if begun.race.due():
                self._enter(begun)
            return begun.race.lost(positions[i])

        there = begun.kept.load(positions, n) if begun.kept else {}
        begun.found |= there.keys()
        have = {i: restored(self._processor, examples[i], there[p]) for i, p in enumerate(positions) if p in there}
        drawn(have, new=False)
        asked = Draw(n, sampling.temperature, sampling.max_new_tokens, sampling.kv_tokens)
        keys = [(self._recipe.seed, position) for position in positions]

        def short() -> None:
            begun.halved += 1

        watch = Watch(have, drawn, asked=lambda: stop.asked or self._ended, dropped=dropped if begun.race else never, short=short)
        groups = play(self._engine, self._processor, examples, asked, keys, watch)
        told = {position for position, group in zip(positions, groups, strict=True) if group}
        assert told <= begun.replies.keys(), "the engine kept a group to itself"

    def _enter(self, begun: _Begun) -> None:
        """Tell the race of groups that have been scored since the last time."""
        if begun.race is None:
            return
        seen = {p: table for p in begun.unread if (table := self._scorer.peek(p)) is not None}
        begun.unread -= seen.keys()
        begun.race.enter([p for p, table in seen.items() if differ(self._fined(begun, p, table), self._recipe)])

    def _fined(self, begun: _Begun, position: int, table: np.ndarray) -> np.ndarray:
        """A group's rewards (n, R), with the fine of its lengths behind them where there is one."""
        overlong, limit = self._recipe.overlong, self._recipe.sampling.max_new_tokens
        if not overlong.buffer:
            return table
        fine = fines([max(map(len, reply.turns)) for reply in begun.replies[position]], overlong, limit)
        return np.column_stack([table, np.where(np.isnan(table).all(1), np.nan, fine)]).astype(np.float32)

    def _made(self, begun: _Begun, stop: Stop) -> Drawn:
        """The step's groups once what was drawn is scored, after further draws where it takes them."""
        recipe, dynamic = self._recipe, begun.race is not None
        if not dynamic:
            begun.held.close()  # no more will be drawn
        while True:
            with self._phase("score"):
                stop.leave()
                self._score(begun)
                positions, good = chosen(begun.tables, recipe)
            if not dynamic or good == recipe.prompts or begun.draws == recipe.sampling.max_draws:
                break
            examples = self._draw(begun)
            with self._phase("sample"):
                self._generate(begun, examples, stop)
        begun.held.close()
        if dynamic and self._where.main:
            self._where.wipe(begun.board)
        with self._phase("score"):
            if dynamic and good == recipe.prompts:
                begun.last = positions[-1]
            counted = {p: table for p, table in begun.tables.items() if p <= begun.last}
            self._tell_silent(begun.step, np.concatenate([*counted.values()]))
            figures: dict[str, float] = {}
            if dynamic:
                self._tell_short(begun, good)
                figures = {"drawn": len(counted), "kept": good, "given_up": begun.asked - len(counted), "draws": begun.draws}
                figures = {f"sampling/{name}": value for name, value in figures.items()}
            if begun.halvings:
                figures["sampling/halved"] = begun.halvings
                self._tell(begun.step, "short_of_memory", f"memory ran short {begun.halvings} times; batches of replies are smaller now")
            if self._gate:
                self._gate.learn(counted)
                figures |= self._gate.figures()
            samples = self._samples(begun, positions)
        mine = [begun.examples[p] for p in positions if p in begun.replies]
        return Drawn(mine, samples, begun.version, begun.cursor, begun.failed, figures)

    def _tell_short(self, begun: _Begun, good: int) -> None:
        wanted = self._recipe.prompts
        if good < wanted:
            text = f"after {begun.draws} draws {good} of {wanted} groups have rewards that differ; others fill the step"
            self._tell(begun.step, "short", text, groups=good)

    def _tell_silent(self, step: int, rewards: np.ndarray) -> None:
        """Say where a reward that counts has scored none of a step's replies: what is learned is then not what the recipe asks for."""
        for reward, unscored in zip(self._recipe.rewards, np.isnan(rewards).all(0), strict=False):
            if not unscored or not reward.weight:
                continue
            self._silent[reward.name] += 1
            times = self._silent[reward.name]
            text = f"reward {reward.name} scored none of {len(rewards)} replies and counts nothing; steps of this kind so far: {times}"
            if times & (times - 1) == 0:  # the first, the second, the fourth, ...
                self._tell(step, "unscored", text, reward=reward.name, replies=len(rewards), steps=times)

    def _tell(self, step: int, kind: str, text: str, **more: Any) -> None:
        if self._log is not None:
            self._log.event(kind, {**more, "text": text}, step)
            self._log.say(f"{self._recipe.name} step {step}: {text}")

    def _score(self, begun: _Begun) -> None:
        """Wait for the rewards of this rank's groups, and learn those of all ranks. A reward that fails on one ends all with its name."""
        problem, failed = "", begun.failed or (0,) * len(self._recipe.rewards)
        tables: list[tuple[int, np.ndarray]] = []
        try:
            scores = self._scorer.results()
            tables = [(p, self._fined(begun, p, scores.groups[p])) for p in begun.replies if p in scores.groups]
            begun.failed = tuple(a + b for a, b in zip(failed, scores.failed, strict=True))
        except ValueError as error:
            problem = str(error)
        told = self._where.gather([(problem, len(begun.examples), begun.halved, tables)])
        if problems := [p for p, *_ in told if p]:
            raise Agreed(problems[0])
        begun.asked, begun.halvings = sum(asked for _, asked, _, _ in told), sum(halved for _, _, halved, _ in told)
        begun.tables |= {p: table for *_, each in told for p, table in each}

    def _samples(self, begun: _Begun, positions: list[int]) -> list[Sample]:
        """This rank's samples of the step that these positions make, over all ranks."""
        recipe, n = self._recipe, self._recipe.sampling.n
        rewards = np.concatenate([begun.tables[p] for p in positions])
        advantages, totals = advantages_of(rewards, recipe), totals_of(rewards, recipe)
        passed_over = begun.race is not None or self._gate is not None
        steps = recipe.prompts // recipe.minibatch
        samples = []
        for g, position in enumerate(positions):
            if position not in begun.replies:  # another rank's
                continue
            for k, reply in enumerate(begun.replies[position]):
                samples.append(
                    Sample(
                        sequence=whole(begun.examples[position].encoded, reply, self._processor),
                        text=begun.texts[position][k],
                        sampled=reply.logprobs if reply.own is None else reply.logprobs[reply.own],
                        rewards=begun.tables[position][k],
                        reward=float(totals[g * n + k]),
                        advantage=float(advantages[g * n + k]),
                        # of the global batch, so that ranks do not change which prompts go together
                        minibatch=(g if passed_over else position) % steps,
                        finished=reply.finished,
                    )
                )
        return samples


def settled(recipe: GRPORecipe, engine: Engine) -> GRPORecipe:
    """The recipe with importance_correction on or off, where it leaves that to the engine."""
    if recipe.importance_correction != "auto":
        return recipe
    return replace(recipe, importance_correction="on" if recipe.rollout.ahead or not engine.own else "off")

"""Replies in turns: a model acts, its row's environment answers, perhaps with a picture, and the model goes on, up to the task's most
turns.

A turn is a reply like any other, to the conversation so far; what an environment says stands between replies and is never trained. So an
engine needs nothing for it: all episodes take their first turn, then those that go on their second, and so on, each a prompt of its own
from the second turn on. An episode ends when the environment has nothing more to say, after the task's last turn, where the model ends the
text and not its turn only, or where it does not fit: a reply that its limit cut, a conversation longer than a prompt may be.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field, replace

import numpy as np

from actial_fast.data.sources.row import BadRow, Row
from actial_fast.data.sources.stream import Example
from actial_fast.data.sources.task import Environment, Observation, Transcript, begun, task_of
from actial_fast.model.processor import Processor
from actial_fast.packing.batch import Sequence, mrope_positions
from actial_fast.rollout.protocol import UNWATCHED, Draw, Engine, Reader, Reply, Watch, never


def play(
    engine: Engine, reader: Reader, examples: Many[Example], draw: Draw, keys: Many[tuple[int, ...]], watch: Watch = UNWATCHED
) -> list[list[Reply]]:
    """engine.generate for examples as `reader` encoded them; rows whose task has an environment are played to their ends.

    An episode's reply has all of its turns, `draw.max_new_tokens` of each at most. A group of episodes is told to `watch` when all have
    ended; `watch.have` holds whole ones, as `restored` makes them of kept ones. Raises ValueError, naming the row, for what an environment
    raises, and where the engine cannot go on with a conversation (a server).
    """
    prompts = [example.encoded for example in examples]
    have = dict(watch.have or {})
    games = {i for i, example in enumerate(examples) if task_of(example.row).environment and i not in have}
    if not games:
        return engine.generate(prompts, draw, keys, watch)
    if not isinstance(reader, Processor):
        named = examples[min(games)].row.task
        raise ValueError(f"task {named} is played in turns, which needs token ids: use the embedded engine or vLLM, not a server")
    first: dict[int, list[Reply]] = {}

    def told(made: dict[int, list[Reply]]) -> None:
        first.update({i: group for i, group in made.items() if i in games})
        if watch.drawn and (others := {i: group for i, group in made.items() if i not in games}):
            watch.drawn(others)

    drawn = engine.generate(prompts, draw, keys, replace(watch, drawn=told))
    groups = [group if i not in games else [] for i, group in enumerate(drawn)]
    episodes = {i: [_Episode(reader, examples[i], draw.max_new_tokens).turn(reply) for reply in group] for i, group in first.items()}
    while not watch.asked():
        episodes = {i: group for i, group in episodes.items() if not watch.dropped(i)}
        ended = {i: [episode.reply for episode in group] for i, group in episodes.items() if all(episode.over for episode in group)}
        for i, group in ended.items():
            groups[i] = group
            del episodes[i]
        if ended and watch.drawn:
            watch.drawn(ended)
        left = [(i, k) for i, group in episodes.items() for k, episode in enumerate(group) if not episode.over]
        if not left:
            break
        _take_turn(engine, episodes, left, draw, keys, watch)
    return groups


def restored(processor: Processor, example: Example, replies: Many[Reply]) -> list[Reply]:
    """Kept replies with the pictures that the environment shows again when they are played to it; others as they are.

    ValueError, naming the row, for an environment that answers otherwise than it did."""
    return [reply if reply.own is None else _played_again(processor, example, reply) for reply in replies]


def text_of(processor: Reader, reply: Reply) -> str:
    """A reply's text; of an episode the Transcript of its turns."""
    if reply.own is None:
        return processor.decode(reply.ids) if reply.text is None else reply.text
    return Transcript(tuple(processor.decode(turn) for turn in reply.turns))


def whole(prompt: Sequence, reply: Reply, processor: Processor) -> Sequence:
    """A prompt, none of it trained, with a reply, of which what the model drew is."""
    before = replace(prompt, trained=np.zeros(len(prompt), bool))
    if reply.own is None:
        return before.extended(reply.ids)
    grids = tuple(map(processor.store.grid, reply.images))
    tail = mrope_positions(reply.ids, grids, processor.image_token, processor.merge) + before.positions.max() + 1
    return replace(
        before,
        ids=np.concatenate([before.ids, reply.ids]),
        trained=np.concatenate([before.trained, reply.own]),
        positions=np.concatenate([before.positions, tail], axis=1),
        images=before.images + reply.images,
        grids=before.grids + grids,
    )


def _take_turn(
    engine: Engine,
    episodes: dict[int, list[_Episode]],
    left: list[tuple[int, int]],
    draw: Draw,
    keys: Many[tuple[int, ...]],
    watch: Watch,
) -> None:
    """One more reply of each of these episodes, of those that are not dropped or stopped meanwhile."""
    chosen = [episodes[i][k] for i, k in left]
    mine = [(*keys[i], k, episode.number) for (i, k), episode in zip(left, chosen, strict=True)] if keys else []
    gone = (lambda j: watch.dropped(left[j][0])) if watch.dropped is not never else never
    inner = Watch(asked=watch.asked, dropped=gone, short=watch.short)
    replies = engine.generate([episode.prompt for episode in chosen], replace(draw, n=1), mine, inner)
    for episode, group in zip(chosen, replies, strict=True):
        if group:
            episode.turn(group[0])


@dataclass
class _Episode:
    """One reply in turns, as far as it has come. prompt: the conversation that the next turn replies to; ids, logprobs (0 for the
    environment's), own: part after part; number: of turns taken."""

    processor: Processor
    example: Example
    longest: int
    prompt: Sequence = field(init=False)
    environment: Environment = field(init=False)
    ids: list[np.ndarray] = field(default_factory=list)
    logprobs: list[np.ndarray] = field(default_factory=list)
    own: list[np.ndarray] = field(default_factory=list)
    images: tuple[str, ...] = ()
    number: int = 0
    over: bool = False
    finished: bool = True

    def __post_init__(self) -> None:
        environment, self.prompt = begun(self.row), self.example.encoded
        assert environment is not None
        self.environment = environment

    @property
    def row(self) -> Row:
        return self.example.row

    @property
    def reply(self) -> Reply:
        """All turns as one reply."""
        parts = (np.concatenate(each) for each in (self.ids, self.logprobs, self.own))
        ids, logprobs, own = parts
        return Reply(ids, logprobs, self.finished, own=own, images=self.images)

    def turn(self, drawn: Reply) -> _Episode:
        """Take a turn, and hear the environment."""
        self._add(drawn.ids, drawn.logprobs, True)
        self.number, self.finished = self.number + 1, drawn.finished
        if not drawn.finished or drawn.ids[-1] == self.processor.text_end or self.number == task_of(self.row).turns:
            self.over = True
            return self
        try:
            answer = self.environment.step(self.processor.decode(drawn.ids))
            if answer is not None and not isinstance(answer, Observation):
                raise TypeError(f"it gave a {type(answer).__name__}, and not an Observation or None")
            heard = self.processor.heard(answer.text, answer.images, self.row.where) if answer is not None else None
        except Exception as error:
            raise self._failed(error) from error
        self.over = heard is None
        if heard is not None:
            ids, images = heard
            said = Reply(np.concatenate([*self.ids, ids]), np.empty(0, np.float32), True)
            own, shown = np.concatenate([*self.own, np.zeros(len(ids), bool)]), self.images + images
            following = whole(self.example.encoded, replace(said, own=own, images=shown), self.processor)
            if self.processor.overfull(following, self.longest):
                self.over, self.finished = True, False
            else:
                self.prompt, self.images = replace(following, trained=np.zeros(len(following), bool)), shown
                self._add(ids, np.zeros(len(ids), np.float32), False)
        return self

    def _add(self, ids: np.ndarray, logprobs: np.ndarray, own: bool) -> None:
        self.ids.append(ids)
        self.logprobs.append(logprobs)
        self.own.append(np.full(len(ids), own))

    def _failed(self, error: Exception) -> ValueError:
        told = error.reason if isinstance(error, BadRow) else f"{type(error).__name__}: {error}"
        return ValueError(f"{self.row.where}: the environment of task {self.row.task} failed on turn {self.number}: {told}")


def _played_again(processor: Processor, example: Example, reply: Reply) -> Reply:
    # as long as its turns were: what fitted then fits now, and where it ended for want of room it is not asked again
    episode = _Episode(processor, example, 0)
    turns = reply.turns
    for number, ids in enumerate(turns, 1):
        if episode.over:
            break
        last = number == len(turns)
        episode.turn(Reply(ids, np.zeros(len(ids), np.float32), finished=not last))
    again = episode.reply
    if not np.array_equal(again.ids, reply.ids):
        raise ValueError(
            f"{example.row.where}: the environment of task {example.row.task} answers kept replies otherwise than it did; what it answers "
            "must depend on the row and the replies alone (or remove the run's folder of replies)"
        )
    return replace(reply, images=again.images)

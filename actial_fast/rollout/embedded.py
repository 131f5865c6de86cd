"""Replies drawn with the trainer's own module, by continuous batching: nothing to install, and no second copy of the weights.

A prompt is read once, packed with others, each of its images once; its keys and values serve all of its replies, and a reply that ends
makes room for the next one at once (schedule.py, decoder.py). Replies to a prompt that are the same so far share a row where steps are not
recorded, until the token in which they differ. Each token is drawn by inverting the distribution's cumulative sum at a
uniform number that is fixed by the prompt's key, the reply's number and the place, so what is replied does not depend on what else is
decoded beside it, nor on the number of ranks, and a run that goes on draws what the interrupted one would have. Only the last bits of
log-probs depend on it, as of every matrix product of another size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace

import numpy as np
import torch

from actial_fast.model.policy import Policy
from actial_fast.model.processor import Processor
from actial_fast.packing.batch import Sequence
from actial_fast.rollout.decoder import Decoder, Rows, serving
from actial_fast.rollout.memory import kv_budget
from actial_fast.rollout.protocol import UNWATCHED, Draw, Reply, Watch, never
from actial_fast.rollout.schedule import Schedule, blocks_for
from actial_fast.train.offload import Offload
from actial_fast.train.sharding import gathered, recover
from actial_fast.train.shortage import NoRoom, largest_of, ran_out

SIZE = 16  # tokens of a block
MOST_ROWS = 1024  # replies decoded at once: by then a step is bound by arithmetic, and more rows only wait for each other
READ_TOKENS, READ_PATCHES = 8192, 32768  # of prompts read in one pass, unless a single one has more
SMALLEST = 1 / MOST_ROWS  # of a batch: a reply at a time
IMAGES_AHEAD = 64  # prompts ahead whose images' features are kept when they are there


class Embedded:
    """The engine that replies with the trainer's own module, whose weights are gathered while it is awake."""

    own = True

    def __init__(self, policy: Policy, processor: Processor, offload: Offload | None = None):
        """offload: what leaves the device while it is awake."""
        self.version = -1
        self._policy, self._processor = policy, processor
        self._offload = offload or Offload(None, enabled=False)
        self._held = contextlib.ExitStack()
        self._size = 1.0  # share of the usual memory for a batch: halved each time that it runs out
        self._broke = False  # a pass since the last `wake` did not come to its end

    def wake(self) -> None:
        """Gather sharded weights, where what is not needed meanwhile has left."""
        self._held.callback(self._offload.back)
        self._offload.out()
        self._held.enter_context(gathered(self._policy))

    def sync(self, version: int) -> None:
        """They are the trainer's own."""
        self.version = version

    def sleep(self) -> None:
        """Back to this rank's share of them."""
        self._held.close()
        if self._broke:
            recover(self._policy)
            self._broke = False

    def recover(self) -> None:
        """Whatever a pass that broke off left of the module's state and of its memory."""
        recover(self._policy)

    def close(self) -> None:
        """Nothing is left to end."""

    def generate(self, prompts: Many[Sequence], draw: Draw, keys: Many[tuple[int, ...]], watch: Watch = UNWATCHED) -> list[list[Reply]]:
        """As the protocol says. Where memory runs out, what is left is drawn with half as much at a time, and so is all that comes later.

        ValueError where the longest prompt with one reply does not fit into draw.kv_tokens, or into memory; NoRoom where memory runs out
        over one reply alone.
        """
        assert draw.temperature == 0 or len(keys) == len(prompts), "one key per prompt"
        have = watch.have or {}
        replies = [have.get(i, []) for i in range(len(prompts))]
        wanted = [i for i in range(len(prompts)) if i not in have]
        if not wanted:
            return replies
        while not self._drawn(prompts, draw, keys, watch, wanted, replies):
            self._size, self._broke = self._size / 2, True
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # what the batch held that is gone
            if watch.short:
                watch.short()
            wanted = [i for i in wanted if not replies[i] and not watch.dropped(i)]
            if not wanted:
                break
        return replies

    def _drawn(
        self, prompts: Many[Sequence], draw: Draw, keys: Many[tuple[int, ...]], watch: Watch, wanted: list[int], replies: list[list[Reply]]
    ) -> bool:
        """Fill in the replies to the wanted prompts; False where memory ran out before all are there, and less may do."""
        mine = [prompts[i] for i in wanted]
        try:
            with serving(self._policy):
                batch = Batching(self._policy, self._processor, mine, draw, [keys[i] for i in wanted] if keys else [], self._size)
                for complete in batch.run(watch, wanted):
                    groups = {wanted[k]: group for k, group in complete.items()}
                    for i, group in groups.items():
                        replies[i] = group
                    if watch.drawn:
                        watch.drawn(groups)
        except Exception as error:
            if not ran_out(error):
                raise
            if self._size <= SMALLEST:
                raise NoRoom(f"one reply at a time to {len(mine)} prompts; the largest is {largest_of(mine)} ({error})") from error
            return False
        return True


@dataclass
class Places:
    """Of S places for replies of up to L tokens: tokens (S, L) int64 and logprobs (S, L) float32 drawn so far, and the uniform numbers
    (S, L) float64 to draw with, zeros for greedy."""

    tokens: np.ndarray
    logprobs: np.ndarray
    uniforms: np.ndarray


class Batching:
    """One `generate`: prompts P, places S, replies of up to L tokens. size: share of the usual batch that is read and decoded at once."""

    def __init__(
        self, policy: Policy, processor: Processor, prompts: Many[Sequence], draw: Draw, keys: Many[tuple[int, ...]], size: float = 1.0
    ):
        for prompt in prompts:
            assert len(prompt) > 1 and (prompt.positions[:, -1] == prompt.positions.max()).all(), "a prompt ends with text"
        self._prompts, self._draw, self._keys = prompts, draw, keys
        lengths, limit = [len(p) for p in prompts], draw.max_new_tokens
        replies = len(prompts) * draw.n
        everything = sum(blocks_for(n - 1, SIZE) for n in lengths) + replies * blocks_for(limit, SIZE)
        blocks = min(everything, (draw.kv_tokens or kv_budget(policy)) // SIZE)
        if size < 1:
            least = blocks_for(max(lengths) - 1, SIZE) + blocks_for(limit, SIZE)
            blocks = max(min(least, blocks), int(size * blocks))
        places = min(replies, max(1, int(size * MOST_ROWS)))
        self._reads = READ_TOKENS * size, READ_PATCHES * size
        self.schedule = Schedule(lengths, draw.n, limit, blocks=blocks, size=SIZE, places=places)
        shape = places, limit
        self._at = Places(np.zeros(shape, np.int64), np.zeros(shape, np.float32), np.zeros(shape))
        self._same = np.zeros(places, np.int64)  # a number for each place, equal where the replies there are, to the last token
        self._last = np.array([p.ids[-1] for p in prompts])
        self._next = np.array([p.positions[0, -1] for p in prompts])  # the position of that token
        self._held = np.array(lengths) - 1  # tokens of each prompt that are not its replies' own
        self._table = np.zeros((len(prompts), max(blocks_for(n - 1, SIZE) for n in lengths)), np.int32)
        most = draw.n, self.schedule.table.shape[1], self._table.shape[1]
        self._decoder = Decoder(
            policy,
            processor,
            blocks=blocks,
            size=SIZE,
            temperature=draw.temperature,
            most=most,
            positions=int(self._next.max()) + limit,
        )
        self._random: dict[int, np.ndarray] = {}  # (n, L) of prompts whose replies are not all complete
        self._left: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # tokens and log-probs of replies that had to leave
        self._made: dict[int, dict[int, Reply]] = {}

    def run(self, watch: Watch, names: Many[int]) -> Iterator[dict[int, list[Reply]]]:
        """Replies by prompt, of those that are complete, after each step that completed any. names: the prompts', as `watch` knows them."""
        schedule, n = self.schedule, self._draw.n
        while not schedule.done and not watch.asked():
            if watch.dropped is not never:  # those that wait as well: they need not be read
                for prompt in [p for p in schedule.open if watch.dropped(names[p])]:
                    schedule.skip(prompt)
                    self._forget(prompt)
            self._admit()
            for place in schedule.grow().tolist():
                drawn = schedule.drawn[place]
                self._left[int(schedule.reply[place])] = self._at.tokens[place, :drawn].copy(), self._at.logprobs[place, :drawn].copy()
            if not len(schedule.active):
                continue
            ended = self._step()
            complete = schedule.advance(ended)
            if complete:
                yield {prompt: [self._made[prompt][k] for k in range(n)] for prompt in complete}
                for prompt in complete:
                    self._forget(prompt)

    def _forget(self, prompt: int) -> None:
        self._made.pop(prompt, None)
        self._random.pop(prompt, None)
        for reply in [r for r in self._left if r // self._draw.n == prompt]:
            del self._left[reply]

    def _admit(self) -> None:
        """Read what waiting replies need that now find room."""
        schedule, n = self.schedule, self._draw.n
        if not schedule.waiting:
            return
        before = set(schedule.active.tolist())
        prompts, back = schedule.admit()
        reads: list[tuple[Sequence, np.ndarray]] = []
        for prompt in prompts:
            blocks = schedule.prefixes[prompt]
            self._table[prompt, : len(blocks)] = blocks
            reads.append((_cut(self._prompts[prompt]), _slots(blocks)[: self._held[prompt]]))
        for place in [p for p in schedule.active.tolist() if p not in before]:
            prompt, k = divmod(int(schedule.reply[place]), n)
            self._same[place] = -1 - prompt  # those that have begun have numbers from 0 on
            if self._draw.temperature:
                if prompt not in self._random:
                    self._random[prompt] = np.random.default_rng(self._keys[prompt]).random((n, self._draw.max_new_tokens))
                self._at.uniforms[place] = self._random[prompt][k]
        for place, drawn in back:
            prompt = int(schedule.reply[place]) // n
            self._same[place] = -1 - len(self._prompts) - place
            self._at.tokens[place, :drawn], self._at.logprobs[place, :drawn] = self._left.pop(int(schedule.reply[place]))
            whole = self._prompts[prompt].extended(self._at.tokens[place, : drawn - 1])
            own = _slots(schedule.table[place])[:drawn]
            reads.append((whole, np.concatenate([np.zeros(self._held[prompt], np.int64), own])))
        ahead = max(prompts, default=0) + 1
        keep = {key for p in self._prompts[ahead : ahead + IMAGES_AHEAD] for key in p.images}
        for chunk in _chunks(reads, *self._reads):
            later = keep.union(*(s.images for s, _ in reads))
            self._decoder.read([s for s, _ in chunk], np.concatenate([slots for _, slots in chunk]), list(later))

    def _step(self) -> np.ndarray:
        """A token for every active reply; the places of those that it ends."""
        schedule, at = self.schedule, self._at
        places = schedule.active
        drawn = schedule.drawn[places]
        rows = self._rows(places, drawn)
        tokens, logprobs, stops = self._decoder.step(rows)
        if self._decoder.shares:
            _, self._same[places] = np.unique(rows.row * (tokens.max() + 1) + tokens, return_inverse=True)
        at.tokens[places, drawn], at.logprobs[places, drawn] = tokens, logprobs
        over = stops | (drawn + 1 == self._draw.max_new_tokens)
        for place, length, stopped in zip(places[over].tolist(), (drawn[over] + 1).tolist(), stops[over].tolist(), strict=True):
            prompt, k = divmod(int(schedule.reply[place]), self._draw.n)
            reply = Reply(at.tokens[place, :length].copy(), at.logprobs[place, :length].copy(), stopped)
            self._made.setdefault(prompt, {})[k] = reply
        return places[over]

    def _rows(self, places: np.ndarray, drawn: np.ndarray) -> Rows:
        schedule, at = self.schedule, self._at
        first = row = np.arange(len(places))
        if self._decoder.shares:
            _, first, row = np.unique(self._same[places], return_index=True, return_inverse=True)
        own, length = schedule.table[places], drawn[first]
        prompts = schedule.reply[places[first]] // self._draw.n
        sizes = np.bincount(prompts)
        groups = np.flatnonzero(sizes)
        order, sizes = np.argsort(prompts, kind="stable"), sizes[groups]
        real = np.arange(sizes.max()) < sizes[:, None]
        members = np.full(real.shape, -1, np.int32)
        members[real] = order
        place = np.empty_like(order)
        place[order] = np.flatnonzero(real)
        held = self._held[groups]
        return Rows(
            row=row,
            tokens=np.where(length > 0, at.tokens[places[first], length - 1], self._last[prompts]),
            positions=self._next[prompts] + length,
            slots=own[np.arange(len(places)), drawn // SIZE].astype(np.int64) * SIZE + drawn % SIZE,
            uniforms=at.uniforms[places, drawn],
            own_table=own[first, : int(length.max()) // SIZE + 1],
            own_tokens=length + 1,
            members=members,
            place=place,
            prefix_table=self._table[groups, : blocks_for(int(held.max()), SIZE)],
            prefix_tokens=held,
        )


def _cut(prompt: Sequence) -> Sequence:
    """The prompt without its last token, which its replies begin with."""
    return replace(prompt, ids=prompt.ids[:-1], trained=prompt.trained[:-1], positions=prompt.positions[:, :-1])


def _slots(blocks: np.ndarray) -> np.ndarray:
    return (blocks.astype(np.int64)[:, None] * SIZE + np.arange(SIZE)).reshape(-1)


def _chunks(reads: list[tuple[Sequence, np.ndarray]], most: float, patches_most: float) -> Iterator[list[tuple[Sequence, np.ndarray]]]:
    """In passes of bounded size, in order."""
    chunk: list[tuple[Sequence, np.ndarray]] = []
    tokens = patches = 0
    for read in reads:
        more = len(read[0]), read[0].patches
        if chunk and (tokens + more[0] > most or patches + more[1] > patches_most):
            yield chunk
            chunk, tokens, patches = [], 0, 0
        chunk.append(read)
        tokens, patches = tokens + more[0], patches + more[1]
    if chunk:
        yield chunk

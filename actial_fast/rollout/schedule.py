"""Which replies are decoded together, and which blocks of key-value memory they hold; all on the host, no tensors.

A prompt's keys and values are held once, in blocks of its own, for as long as a reply to it is still to be drawn. A reply holds blocks for
its own tokens and gets them one by one, as it grows. A reply that ends makes room at once: for another reply to the same prompt, then for
the next prompt. Where memory runs short the youngest reply leaves, with what it has drawn, and comes back once there is room. The last
token of a prompt counts as a reply's own, so that every reply begins by reading it, and needs nothing of how its prompt was read.

S places for replies, N replies to each prompt. Blocks are counted from 1: block 0 is nobody's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence, Set

import numpy as np


def blocks_for(tokens: int, size: int) -> int:
    """Blocks of `size` tokens that hold so many."""
    return -(-tokens // size)


class Schedule:
    """Replies by number, i * N + k being the k-th to prompt i, through at most `places` places of memory for `blocks` blocks of `size`.

    prompts: their lengths, at least 2 each. limit: the longest reply. ValueError where the longest prompt with one reply does not fit.

    A step is `admit`, whatever reads the new prompts, `grow`, the decoding of `active`, and `advance` with those that ended.
    """

    def __init__(self, prompts: Sequence[int], n: int, limit: int, *, blocks: int, size: int, places: int):
        self.n, self.size = n, size
        self._prompts = prompts
        longest = max(prompts, default=2)
        least = blocks_for(longest - 1, size) + blocks_for(limit, size)
        if blocks < least:
            raise ValueError(
                f"kv_tokens: a prompt of {longest} tokens and one reply of up to {limit} need {least * size}, and there are "
                f"{blocks * size}; free memory, raise it, or lower max_new_tokens or max_prompt_tokens"
            )
        self._waiting = deque(range(len(prompts) * n))
        self._free = list(range(blocks, 0, -1))
        self._free_places = list(range(places - 1, -1, -1))
        self.prefixes: dict[int, np.ndarray] = {}
        """The blocks of each prompt that is held, of all its tokens but the last."""
        self._left = np.full(len(prompts), n)  # replies of each prompt that are not complete
        self.active = np.empty(0, np.int64)
        """(R,) the places in use, the longest there first."""
        self.reply = np.zeros(places, np.int64)
        """(S,) the reply at a place."""
        self.drawn = np.zeros(places, np.int64)
        """(S,) tokens of it that are drawn: so many of its own are held before a step, and one more after it."""
        self.table = np.zeros((places, blocks_for(limit, size)), np.int32)
        """(S, blocks of a reply) its blocks, 0 where it has none yet."""
        self._returned: dict[int, int] = {}  # replies that had to leave -> tokens they had drawn

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    @property
    def waiting(self) -> bool:
        """True when replies have no place yet, or none any more."""
        return bool(self._waiting)

    @property
    def done(self) -> bool:
        """True when no reply is left."""
        return not len(self.active) and not self._waiting

    @property
    def open(self) -> list[int]:
        """Prompts with replies that are not complete, begun or not."""
        return np.flatnonzero(self._left).tolist()

    def skip(self, prompt: int) -> None:
        """Leave out the replies to a prompt that are not complete."""
        self._waiting = deque(reply for reply in self._waiting if reply // self.n != prompt)
        self._leave(self.active[self.reply[self.active] // self.n == prompt])
        self._release(prompt)
        self._left[prompt] = 0

    def admit(self) -> tuple[list[int], list[tuple[int, int]]]:
        """Give places to as many waiting replies as find room: the prompts that must be read for them, and (place, tokens drawn before)
        of those that come back, whose own tokens must be read too."""
        prompts: list[int] = []
        back: list[tuple[int, int]] = []
        new: list[int] = []
        limit = self.table.shape[1]
        growing = int((self.table[self.active, -1] == 0).sum())  # replies that may want another block
        while self._waiting and self._free_places:
            reply = self._waiting[0]
            prompt, before = reply // self.n, self._returned.get(reply, 0)
            own = blocks_for(before + 1, self.size)
            prefix = 0 if prompt in self.prefixes else blocks_for(self._prompts[prompt] - 1, self.size)
            # room for the next block of everybody who may grow, so that nobody has to leave again at once
            need = prefix + own + (growing + (own < limit) if new or len(self.active) else 0)
            if need > self.free:
                self._release_idle({prompt, *(self.reply[new] // self.n).tolist()})
            if need > self.free:
                break
            self._waiting.popleft()
            self._returned.pop(reply, None)
            if prefix:
                self.prefixes[prompt] = self._take(prefix)
                prompts.append(prompt)
            place = self._free_places.pop()
            self.reply[place], self.drawn[place] = reply, before
            self.table[place, :own] = self._take(own)
            new.append(place)
            growing += own < limit
            if before:
                back.append((place, before))
        if new:
            self.active = np.concatenate([self.active, np.array(new, np.int64)])
        return prompts, back

    def grow(self) -> np.ndarray:
        """A block for every active reply whose next token begins one; the places of those that had to leave for it."""
        gone = []
        while True:
            begins = self.active[self.drawn[self.active] % self.size == 0]
            begins = begins[self.table[begins, self.drawn[begins] // self.size] == 0]
            if len(begins) > self.free:
                self._release_idle()
            if len(begins) <= self.free:
                break
            youngest = self.active[-1]
            reply = int(self.reply[youngest])
            self._returned[reply] = int(self.drawn[youngest])
            self._leave(self.active[-1:])
            self._waiting.appendleft(reply)
            gone.append(youngest)
        self.table[begins, self.drawn[begins] // self.size] = self._take(len(begins))
        return np.array(gone, np.int64)

    def advance(self, ended: np.ndarray) -> list[int]:
        """Every active reply has drawn a token; those at the places `ended` are complete. The prompts all of whose replies are."""
        self.drawn[self.active] += 1
        prompts = self.reply[ended] // self.n
        np.subtract.at(self._left, prompts, 1)
        complete = [prompt for prompt in dict.fromkeys(prompts.tolist()) if not self._left[prompt]]
        self._leave(ended)
        for prompt in complete:
            self._release(prompt)
        return complete

    def _take(self, count: int) -> np.ndarray:
        cut = len(self._free) - count
        taken, self._free = self._free[cut:], self._free[:cut]
        return np.array(taken, np.int32)

    def _release(self, prompt: int) -> None:
        self._free.extend(self.prefixes.pop(prompt, np.empty(0, np.int32)).tolist())

    def _release_idle(self, but: Set[int] = frozenset()) -> None:
        """Free the prompts that no active reply reads; they are read again when one does."""
        needed = but | set((self.reply[self.active] // self.n).tolist())
        for prompt in [p for p in self.prefixes if p not in needed]:
            self._release(prompt)

    def _leave(self, places: np.ndarray) -> None:
        if len(places):
            held = self.table[places]
            self._free.extend(held[held > 0].tolist())
            self.table[places] = 0
            self._free_places.extend(places.tolist())
            stays = np.ones(len(self.reply), bool)
            stays[places] = False
            self.active = self.active[stays[self.active]]

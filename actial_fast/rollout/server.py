"""A model behind an OpenAI-compatible address, vLLM's server among others, that replies to rows: for evaluation and chains of thought.

It has a tokenizer, a chat template and weights of its own, so rows are sent as messages, with their images as they are, and text comes
back. There are no token ids and no log-probs that a policy could be trained on, and no way to hand it the policy's weights.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from actial_fast.data.sources.picture import decode
from actial_fast.data.sources.row import IMAGE_TAG, Row
from actial_fast.data.sources.stream import Example
from actial_fast.packing.batch import Sequence
from actial_fast.rollout.client import Answer, Client, Unanswered, parts
from actial_fast.rollout.protocol import UNWATCHED, Draw, Reply, Watch

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionMessageParam

PAUSE = 0.2  # seconds between looks at what the caller wants


@dataclass(frozen=True)
class Question(Sequence):
    """A prompt as a server gets it: a row, without tokens."""

    row: Row | None = None


class Rows:
    """The reader whose prompts are the rows themselves."""

    def encode_prompt(self, example: Example) -> Question:
        """The row; BadRow where an image of it cannot be decoded."""
        for image in example.row.images:
            decode(image, example.row.where)
        none = np.empty(0, np.int64)
        return Question(none, none.astype(bool), np.empty((3, 0), np.int64), row=example.row)

    def decode(self, ids: np.ndarray) -> str:
        """Never asked: a server's replies have their text."""
        raise AssertionError("a server's ids mean nothing here")


class Server:
    """The engine that asks a server, `workers` questions at a time. Its prompts come from `Rows`. draw.max_new_tokens 0 is the server's own
    limit; a question that it does not answer, after all retries, has failed. pixels: larger images are scaled down to so many before they
    are sent; 0 sends them as they are."""

    own = False

    def __init__(self, client: Client, workers: int, pixels: int = 0):
        self.version = -1
        self._client, self._workers, self._pixels = client, workers, pixels

    def wake(self) -> None:
        """It is awake, or not ours to wake."""

    def sleep(self) -> None:
        """Others may be asking it."""

    def sync(self, version: int) -> None:
        """It has the weights it was started with, whatever the version."""
        self.version = version

    def recover(self) -> None:
        """Nothing is left of a failure."""

    def close(self) -> None:
        """Nothing is held."""

    def generate(self, prompts: Many[Sequence], draw: Draw, keys: Many[tuple[int, ...]], watch: Watch = UNWATCHED) -> list[list[Reply]]:
        """As the protocol says, but that a key only becomes a request's seed, which a server need not heed. ValueError, naming the address,
        where it refuses or does not answer."""
        have = watch.have or {}
        replies: list[list[Reply]] = [have.get(i, []) for i in range(len(prompts))]
        with ThreadPoolExecutor(self._workers) as pool:
            running: dict[int, list[Future[Answer]]] = {}
            for i, prompt in enumerate(prompts):
                if i not in have:
                    row = cast(Question, prompt).row
                    assert row is not None, "a server's prompts are rows"
                    key = keys[i] if keys else (i,)
                    running[i] = [pool.submit(self._ask, row, draw, (*key, k)) for k in range(draw.n)]
            try:
                while running and not watch.asked():
                    for i in [i for i in running if watch.dropped(i)]:
                        for future in running.pop(i):
                            future.cancel()
                    wait([f for group in running.values() for f in group if not f.done()], PAUSE, FIRST_COMPLETED)
                    done = {}
                    for i in [i for i, group in running.items() if all(f.done() for f in group)]:
                        try:
                            replies[i] = done[i] = [_reply(f.result()) for f in running.pop(i)]
                        except Unanswered as error:
                            if watch.failed is None:
                                raise
                            watch.failed(i, str(error))
                    if done and watch.drawn:
                        watch.drawn(done)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        return replies

    def _ask(self, row: Row, draw: Draw, key: tuple[int, ...]) -> Answer:
        messages = messages_of(row, self._pixels)
        seed = int(np.random.SeedSequence(key).generate_state(1)[0] >> 1)
        return self._client.ask(
            messages,
            temperature=draw.temperature,
            seed=seed,
            max_tokens=draw.max_new_tokens or None,
        )


def messages_of(row: Row, pixels: int = 0) -> list[ChatCompletionMessageParam]:
    """A row's prompt as OpenAI messages, its images in them, those of more than `pixels` (0: any number) scaled down. BadRow as parts."""
    messages = [{"role": turn.role, "content": turn.content} for turn in row.prompt]
    used = 0
    for message, turn in zip(messages, row.prompt, strict=True):
        if count := turn.content.count(IMAGE_TAG):
            message["content"] = parts(turn.content, row.images[used : used + count], row.where, pixels)  # type: ignore[assignment]
            used += count
    return cast("list[ChatCompletionMessageParam]", messages)


def _reply(answer: Answer) -> Reply:
    return Reply(np.full(answer.tokens, -1), np.full(answer.tokens, np.nan, np.float32), answer.finished, answer.text, answer.why)

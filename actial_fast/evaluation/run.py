"""Putting a benchmark to a model: every reply is on the disk, with its verdict, before the next one is drawn.

A run that is stopped or killed goes on where it was when it is started again, on any number of ranks: a reply depends on its question's
place in the set and the seed alone. Bad questions are found before the model is loaded, but for damage in the middle of a picture.
"""

from __future__ import annotations

import os
import random
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from actial_fast.data.sources.picture import glance
from actial_fast.data.sources.row import BadRow
from actial_fast.data.sources.source import Rejects
from actial_fast.data.sources.stream import Example
from actial_fast.evaluation.items import BenchmarkSet, Item, Items, Opened
from actial_fast.evaluation.replies import Folder, Kept, append, digest_of, record_of
from actial_fast.packing.batch import Sequence as Prompt
from actial_fast.rollout.protocol import Draw, Engine, Reader, Reply, Watch, awake
from actial_fast.settings.recipe import RolloutConfig
from actial_fast.settings.sampling import at_least
from actial_fast.train.dist import Agreed, World
from actial_fast.train.stopping import Stop

CHUNK = 512  # prompts given to an engine at a time; the next ones are made meanwhile
EVERY = 10.0  # seconds between lines of progress
REJECTS = "rejects.jsonl"
GONE = 32  # questions in a row without a reply: the server is gone, not the question
ONLY = {  # what an engine alone knows
    "min_pixels": ("embedded", "vllm"),
    "dtype": ("embedded", "vllm"),
    "max_prompt": ("embedded", "vllm"),
    "kv_tokens": ("embedded",),
    "tensor_parallel": ("vllm",),
    "gpu_memory": ("vllm",),
    "max_images": ("vllm",),
}


@dataclass(frozen=True)
class Asking:
    """How questions are put. model: a checkpoint folder, a hub name, or the name that a server knows. name: what tables call it. engine,
    url, workers: as RolloutConfig. temperature: 0 = greedy. max_new_tokens: longest reply, 0 = the set's own. system: system prompt, None =
    the set's own. min_pixels, max_pixels: of images, 0 = the checkpoint's. dtype: of the weights, "" = the computation's. limit: so many
    questions, drawn by `seed`, 0 = all. on_bad_row: "error" or "skip". kv_tokens, max_prompt, tensor_parallel, gpu_memory, max_images: what
    the engine may hold."""

    model: str
    name: str
    engine: Literal["embedded", "vllm", "server"] = "embedded"
    url: str = ""
    workers: int = 32
    temperature: float = 0.0
    max_new_tokens: int = 0
    system: str | None = None
    min_pixels: int = 0
    max_pixels: int = 0
    dtype: Literal["", "float32", "bfloat16"] = ""
    limit: int = 0
    seed: int = 0
    on_bad_row: str = "error"
    kv_tokens: int = 0
    max_prompt: int = 16000
    tensor_parallel: int = 1
    gpu_memory: float = 0.9
    max_images: int = 32

    def __post_init__(self) -> None:
        at_least(self, 0, "temperature", "max_new_tokens", "min_pixels", "max_pixels", "limit", "seed", "kv_tokens")
        at_least(self, 1, "workers", "max_prompt")
        for field in fields(self):
            engines = ONLY.get(field.name, (self.engine,))
            if self.engine not in engines and getattr(self, field.name) != field.default:
                raise ValueError(f"{field.name}: is for the engine {' or '.join(engines)}, and this is {self.engine}; leave it out")

    @property
    def rollout(self) -> RolloutConfig:
        """The engine's own settings."""
        served = {"url": self.url, "model": self.model} if self.engine == "server" else {}
        held = {"tensor_parallel": self.tensor_parallel, "gpu_memory": self.gpu_memory, "max_images": self.max_images}
        return RolloutConfig(engine=self.engine, workers=self.workers, **held, **served)  # type: ignore[arg-type]

    def system_of(self, benchmark: BenchmarkSet) -> str:
        """The system prompt for a set."""
        return benchmark.system if self.system is None else self.system

    def longest_of(self, benchmark: BenchmarkSet) -> int:
        """Tokens of the longest reply for a set."""
        return self.max_new_tokens or benchmark.max_new_tokens


@dataclass(frozen=True)
class Chosen:
    """The questions of a run: items.jsonl's records of them, in the set's order. digest: of all of the set. bad: those left out."""

    records: list[dict[str, Any]]
    digest: str
    bad: list[BadRow]


def choose(items: Items, limit: int, seed: int, on_bad_row: str) -> Chosen:
    """Read every item once, and draw a subset by the seed: whole groups, until there are `limit` questions or a few more.

    BadRow for the first bad item, unless on_bad_row is "skip"; ValueError where none is left.
    """
    bad: list[BadRow] = []
    records: list[dict[str, Any]] = []
    times: defaultdict[str, int] = defaultdict(int)

    def read() -> Iterator[Item]:
        for index in range(len(items)):
            try:
                item = items[index]
                for image in item.images:
                    glance(image, item.where)
            except BadRow as error:
                if on_bad_row != "skip":
                    raise
                bad.append(error)
                continue
            times[item.id] += 1
            if times[item.id] > 1:  # an id that its owner gave twice
                item = replace(item, id=f"{item.id} #{times[item.id]}")
            records.append(record_of(item, index))
            yield item

    digest = digest_of(read())
    if not records:
        raise ValueError(f"{items.path}: no usable question" + (f"; the first: {bad[0]}" if bad else ""))
    if limit and limit < len(records):
        groups: defaultdict[str, list[int]] = defaultdict(list)
        for place, record in enumerate(records):
            groups[f"group {record['group']}" if record["group"] else f"item {record['id']}"].append(place)
        names = sorted(groups)
        random.Random(seed).shuffle(names)
        drawn: list[int] = []
        while len(drawn) < limit:
            drawn += groups[names.pop()]
        records = [records[place] for place in sorted(drawn)]
    return Chosen(records, digest, bad)


def prepare(given: str, opened: Opened, asking: Asking, model: Mapping[str, Any], versions: Mapping[str, Any], folder: Folder) -> Chosen:
    """Choose the questions and make the run's folder, or go on with it; ValueError as Folder.begin and choose raise it. One rank calls.

    given: what opens the set again. model: the checkpoint as identity gives it, or what a server is."""
    chosen, benchmark = choose(opened.items, asking.limit, asking.seed, asking.on_bad_row), opened.set
    settings = {
        "set.name": benchmark.name,
        "set.given": given,
        "set.path": str(opened.items.path.resolve()),
        "set.content": chosen.digest,
        "set.limit": asking.limit,
        "set.seed": asking.seed,
        "model.name": asking.name,
        **{f"model.{key}": value for key, value in model.items()},
        "engine": asking.engine,
        "engine.url": asking.url,
        "dtype": asking.dtype,
        "min_pixels": asking.min_pixels,
        "max_pixels": asking.max_pixels,
        "temperature": asking.temperature,
        "max_new_tokens": asking.longest_of(benchmark),
        "system": asking.system_of(benchmark),
    }
    folder.begin(settings, versions, chosen.records)
    rejects = Rejects(folder.path / REJECTS)
    for error in chosen.bad:
        rejects.add(error)
    return chosen


def agreed(where: World, work: Callable[[], Any]) -> Any:
    """What rank 0 makes of `work`, on every rank; its ValueError too. Every rank calls."""
    made: list[Any] = []
    if where.main:
        try:
            made = [work(), ""]
        except (ValueError, OSError) as error:
            made = [None, str(error) or repr(error)]
    value, problem = where.gather(made)
    if problem:
        raise Agreed(problem)
    return value


def ask(
    opened: Opened, asking: Asking, chosen: Chosen, engine: Engine, reader: Reader, folder: Folder, where: World, stop: Stop
) -> dict[str, str]:
    """Draw the replies that the folder does not have yet, each judged by the set's rules; every rank calls, and each draws its share.

    Returns the questions that got no reply, and why; the same on every rank. Raises BadRow, naming it, for a picture that cannot be read,
    unless on_bad_row is "skip", and Stopped once `stop` was asked.
    """
    order = [record["id"] for record in chosen.records]
    had = set(agreed(where, lambda: list(folder.settle(order))))
    left = [record for record in chosen.records if record["id"] not in had]
    mine = left[where.rank :: where.size]
    out, rejects = folder.file_of(where.rank, where.size), Rejects(folder.path / REJECTS, where.rank, where.size)
    draw = Draw(1, asking.temperature, asking.longest_of(opened.set), asking.kv_tokens)
    unanswered: dict[str, str] = {}
    progress = Progress(f"{opened.set.title}, {asking.name}", len(order), folder, enabled=where.main and not os.environ.get("ACTIAL_QUIET"))
    if left:
        with awake(engine, 0), ThreadPoolExecutor(1, "prompts") as pool:
            # as many on every rank: those that share an engine draw in lock-step
            rounds = -(-len(left) // (where.size * CHUNK))
            chunks = [mine[k * CHUNK : (k + 1) * CHUNK] for k in range(rounds)]
            ahead = [pool.submit(_prompts, chunk, opened, asking, reader) for chunk in chunks[:1]]
            for number in range(len(chunks)):
                questions = ahead.pop().result()
                ahead += [pool.submit(_prompts, chunk, opened, asking, reader) for chunk in chunks[number + 1 : number + 2]]
                for bad in questions.bad.values():
                    rejects.add(bad)
                unanswered |= {name: bad.reason for name, bad in questions.bad.items()}
                keys = [(asking.seed, place) for place in questions.places]
                engine.generate(questions.prompts, draw, keys, _watch(questions, opened.set, reader, out, progress, unanswered, stop))
                if stop.agreed() if asking.tensor_parallel > 1 else stop.asked:
                    break
    if stop.agreed():
        raise stop.stopped(f"stopped with {folder.drawn():,} of {len(order):,} replies to {opened.set.name}; the same command goes on")
    together = dict(where.gather(list(unanswered.items())))
    agreed(where, lambda: len(folder.settle(order)))
    progress.close()
    return together


@dataclass(frozen=True)
class _Questions:
    """Prompts of an engine, and what each is for. bad: items that cannot be asked."""

    prompts: list[Prompt]
    names: list[str]
    places: list[int]
    items: list[Item]
    bad: dict[str, BadRow]


def _prompts(records: Sequence[Mapping[str, Any]], opened: Opened, asking: Asking, reader: Reader) -> _Questions:
    made = _Questions([], [], [], [], {})
    for record in records:
        try:
            item = opened.items[record["index"]]
            prompt = reader.encode_prompt(Example(item.row(asking.system_of(opened.set)), record["index"]))
        except BadRow as error:
            if asking.on_bad_row != "skip":
                raise
            made.bad[record["id"]] = error
            continue
        made.prompts.append(prompt)
        made.names.append(record["id"])
        made.places.append(record["index"])
        made.items.append(replace(item, images=()))
    return made


def _watch(
    questions: _Questions,
    benchmark: BenchmarkSet,
    reader: Reader,
    out: Path,
    progress: Progress,
    unanswered: dict[str, str],
    stop: Stop,
) -> Watch:
    """Judges and keeps each reply as soon as it is drawn, and notes the questions that get none; ValueError after GONE in a row."""
    in_a_row: list[str] = []

    def drawn(replies: dict[int, list[Reply]]) -> None:
        kept = []
        for i, (reply,) in replies.items():
            text = reader.decode(reply.ids) if reply.text is None else reply.text
            kept.append(_kept(questions.names[i], text, questions.items[i], reply, benchmark))
        append(out, map(asdict, kept))
        in_a_row.clear()
        progress.look(sum(reply.tokens for reply in kept))

    def failed(index: int, why: str) -> None:
        unanswered[questions.names[index]] = why
        in_a_row.append(why)
        if len(in_a_row) >= GONE:
            raise ValueError(f"the last {GONE} questions got no reply ({why}); replies so far are kept, and the same command goes on")

    return Watch(drawn=drawn, failed=failed, asked=lambda: stop.asked)


def _kept(name: str, text: str, item: Item, reply: Reply, benchmark: BenchmarkSet) -> Kept:
    verdict = benchmark.judge(item, text)
    finish = "stop" if reply.finished else "length"
    return Kept(name, text, verdict.extracted, verdict.score, verdict.rule, len(reply.ids), finish)


class Progress:
    """A line on stderr now and then: replies of all ranks, those a second of this start, and the time left."""

    def __init__(self, title: str, total: int, folder: Folder, *, enabled: bool):
        self._title, self._total, self._folder, self._enabled = title, total, folder, enabled
        self._begun = self._told = time.monotonic()
        self._before = folder.drawn() if enabled else 0
        self._tokens = 0

    def look(self, tokens: int) -> None:
        """Some replies more, of so many tokens, on this rank."""
        self._tokens += tokens
        if self._enabled and time.monotonic() - self._told >= EVERY:
            self._tell()

    def close(self) -> None:
        """The last line, where anything was drawn."""
        if self._enabled and self._tokens:
            self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        seconds, done = max(1e-9, self._told - self._begun), self._folder.drawn()
        rate = (done - self._before) / seconds
        left = f", {duration((self._total - done) / rate)} left" if rate > 0 and done < self._total else ""
        speed = f"{rate:.1f} a second, {self._tokens / seconds:,.0f} tokens a second on this rank"
        print(f"{self._title}: {done:,} of {self._total:,} replies, {speed}{left}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Of so many seconds, in the unit that suits: 40 s, 12 min, 3.5 h."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def folder_of(out: Path, set_name: str, model_name: str) -> Folder:
    """Where a model's replies to a set lie below `out`."""
    return Folder(out / slug(set_name) / slug(model_name))


def slug(name: str) -> str:
    """A name as a folder has it."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "unnamed"

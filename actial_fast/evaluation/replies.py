"""What a benchmark run keeps on disk: enough to go on after a kill, and to score the replies again without the model or the pictures.

FOLDER/run.json            what the replies were made with (a Header)
FOLDER/items.jsonl         the questions with their truths, pictures by name only
FOLDER/replies.jsonl       one line a reply, on disk before the next one is drawn
FOLDER/replies.rank3.jsonl while several ranks draw: those of one rank, until rank 0 has put all into replies.jsonl
FOLDER/judged.jsonl        what a judging model said of replies that no rule could read
FOLDER/result.json         figures; FOLDER/errors.html: replies to look at
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actial_fast.data.sources.jsonl import recover
from actial_fast.data.sources.row import Turn
from actial_fast.evaluation.items import Item, Verdict

HEADER, ITEMS, REPLIES, JUDGED, RESULT, ERRORS = "run.json", "items.jsonl", "replies.jsonl", "judged.jsonl", "result.json", "errors.html"


@dataclass(frozen=True)
class Kept:
    """One reply. id: its item's. text: as the model wrote it. extracted, score, rule: the verdict by rules. tokens: of the reply. finish:
    "stop", or "length" where the limit cut it."""

    id: str
    text: str
    extracted: str | None
    score: float
    rule: str
    tokens: int
    finish: str

    def judged(self, verdict: Verdict) -> Kept:
        """The same reply under another verdict."""
        return dataclasses.replace(self, extracted=verdict.extracted, score=verdict.score, rule=verdict.rule)


@dataclass(frozen=True)
class Header:
    """What replies were made with. settings: by their names in dots; a run that goes on must have the same. versions: of what ran, one
    entry for each time that they were others."""

    settings: Mapping[str, Any]
    versions: tuple[Mapping[str, Any], ...] = ()

    @property
    def set(self) -> str:
        """The set's name, or its file's."""
        return str(self.settings["set.name"])

    @property
    def model(self) -> str:
        """What the model is called in tables."""
        return str(self.settings["model.name"])


class Folder:
    """The folder of one model's replies to one set."""

    def __init__(self, path: Path):
        self.path = path

    def header(self) -> Header:
        """ValueError where the folder holds no run."""
        file = self.path / HEADER
        if not file.exists():
            raise ValueError(f"{self.path}: no {HEADER}; give the folder of a benchmark run, or one above several")
        written = json.loads(file.read_text())
        return Header(written["settings"], tuple(written["versions"]))

    def begin(self, settings: Mapping[str, Any], versions: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> None:
        """Make the folder, or go on with it. records: of the items, as record_of makes them. ValueError, naming what differs, where its
        replies were made with other settings."""
        file = self.path / HEADER
        history: tuple[Mapping[str, Any], ...] = (versions,)
        if file.exists():
            before = self.header()
            changed = _changed(before.settings, settings)
            if changed and (self.replies() or self.split()):
                shown = ", ".join(f"{k} ({before.settings.get(k)!r} before, {settings.get(k)!r} now)" for k in changed)
                raise ValueError(f"{self.path} holds replies made otherwise: {shown}; choose another folder with -o, or delete it")
            same = before.versions and before.versions[-1] == versions
            history = before.versions if same else (*before.versions, versions)
        self.path.mkdir(parents=True, exist_ok=True)
        _write(self.path / ITEMS, "".join(f"{json.dumps(record, default=_plain)}\n" for record in records))
        _write(file, json.dumps({"settings": dict(settings), "versions": history}, indent=1, default=_plain))

    def items(self) -> list[Item]:
        """The questions, in the set's order, pictures that are files by their paths and others left out."""
        return items_of(_lines(self.path / ITEMS))

    def places(self) -> dict[str, int]:
        """Item's id -> its place in the set as its owner publishes it."""
        return {record["id"]: record["index"] for record in _lines(self.path / ITEMS)}

    def replies(self) -> dict[str, Kept]:
        """Those in replies.jsonl by their items' ids; a last line that a kill cut off is removed."""
        return {reply.id: reply for reply in reversed(_replies(self.path / REPLIES))}

    def settle(self, order: Iterable[str], change: Callable[[Kept], Kept] | None = None) -> dict[str, Kept]:
        """Put the replies of all ranks into replies.jsonl, each once and in this order, and return them by id. change: of each."""
        found = {reply.id: reply for part in reversed([self.path / REPLIES, *self._parts()]) for reply in reversed(_replies(part))}
        kept = {i: found[i] if change is None else change(found[i]) for i in order if i in found}
        if kept or (self.path / REPLIES).exists():
            _write(self.path / REPLIES, "".join(f"{json.dumps(asdict(reply))}\n" for reply in kept.values()))
        for part in self._parts():
            part.unlink()
        return kept

    def split(self) -> bool:
        """Whether replies of several ranks are still to be put together."""
        return bool(self._parts())

    def drawn(self) -> int:
        """How many replies all ranks have written so far, at a look."""
        files = [self.path / REPLIES, *self._parts()]
        return sum(file.read_bytes().count(b"\n") for file in files if file.exists())

    def file_of(self, rank: int, ranks: int) -> Path:
        """Where a rank writes."""
        return self.path / (REPLIES if ranks == 1 else f"replies.rank{rank}.jsonl")

    def _parts(self) -> list[Path]:
        return sorted(self.path.glob("replies.rank*.jsonl"))


def _replies(file: Path) -> list[Kept]:
    """Those of a file, its cut last line removed; ValueError where it holds something else."""
    try:
        return [Kept(**record) for record in recover(file)]
    except TypeError as error:
        raise ValueError(f"{file}: a line of it is no reply ({error}); move it away") from None


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings that differ in earnest: where a set or a checkpoint lies is nothing to its replies."""
    known = now.get("model.content") and before.get("model.content") == now.get("model.content")
    free = ("set.given", "set.path", *(("model.path", "model.step") if known else ()))
    return [k for k in dict.fromkeys((*before, *now)) if before.get(k) != now.get(k) and k not in free]


def append(file: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Add lines to a file and wait until they are on the disk. ValueError where it does not take them."""
    try:
        with open(file, "a") as out:
            out.write("".join(f"{json.dumps(record)}\n" for record in records))
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        raise ValueError(
            f"{file}: cannot keep replies ({error.strerror}); free space on the disk, and give the same command again"
        ) from None


def runs_below(paths: Iterable[Path]) -> list[Folder]:
    """The runs in these folders or anywhere below them, in order, each once. ValueError for a path with none."""
    found: dict[Path, Folder] = {}
    for path in paths:
        own = sorted(file.parent for file in path.rglob(HEADER) if (file.parent / ITEMS).exists()) if path.is_dir() else []
        if not own:
            raise ValueError(f"{path}: no benchmark run in it or below; `actial bench SET --model M -o {path}` makes one")
        found.update({folder.resolve(): Folder(folder) for folder in own})
    return list(found.values())


def picture_name(picture: Path | bytes) -> str:
    """What tells a picture from others: its file's path, or a digest of its bytes."""
    return str(picture) if isinstance(picture, Path) else f"blake2b:{hashlib.blake2b(picture, digest_size=16).hexdigest()}"


def record_of(item: Item, index: int) -> dict[str, Any]:
    """An item as items.jsonl has it. index: its place in the set."""
    fields = {f.name: getattr(item, f.name) for f in dataclasses.fields(item)}
    before = [vars(turn) for turn in item.before]
    return {**fields, "images": [picture_name(p) for p in item.images], "before": before, "index": index}


def digest_of(items: Iterable[Item]) -> str:
    """A name that items have only with these prompts, options, answers and pictures (files by their names and sizes)."""
    total = hashlib.blake2b(digest_size=12)
    for item in items:
        pictures = [f"{p.name} {p.stat().st_size if p.exists() else 0}" if isinstance(p, Path) else picture_name(p) for p in item.images]
        total.update(
            json.dumps([item.id, [vars(t) for t in item.before], item.prompt, item.options, item.answer, item.accepted, pictures]).encode()
        )
    return total.hexdigest()


def items_of(records: Iterable[Mapping[str, Any]]) -> list[Item]:
    """Items as record_of wrote them, pictures that are files by their paths and others left out."""
    return [_item(record) for record in records]


def _item(record: Mapping[str, Any]) -> Item:
    fields = {key: value for key, value in record.items() if key != "index"}
    fields["images"] = tuple(Path(name) for name in record["images"] if not name.startswith("blake2b:"))
    fields["before"] = tuple(Turn(**turn) for turn in record["before"])
    return Item(**{**fields, "options": tuple(record["options"]), "accepted": tuple(record["accepted"])})


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    try:
        with open(file) as lines:
            yield from map(json.loads, lines)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); give the run's command again, which writes it anew") from None


def _plain(value: Any) -> Any:
    """NumPy's numbers and arrays as JSON has them, anything else as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, path)

"""A language model that reads replies which no rule could: it says which answer a reply gives, and never learns the truth.

What it says is kept beside the replies, one line each, so that it is asked once, and it is counted apart from what the rules found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from actial_fast.data.sources.jsonl import recover
from actial_fast.data.sources.row import IMAGE_TAG, Row, Turn
from actial_fast.data.sources.stream import Example
from actial_fast.evaluation.items import BenchmarkSet, Item, Verdict
from actial_fast.evaluation.replies import JUDGED, Folder, Kept, append
from actial_fast.rollout.client import Client
from actial_fast.rollout.protocol import Draw, Reply, Watch, nobody
from actial_fast.rollout.server import Rows, Server

RULE = "judge"  # of a verdict that a judging model's reading led to
NONE = "NONE"
LONGEST = 4000  # characters of a reply's end that the judge is shown
TOKENS = 2048  # of what it says: models that reason need some first

INSTRUCTION = """\
You read what a student answered to a question about pictures, which you do not see. Say which answer the student gives in the end; whether
it is right is not your business, and you do not solve the question yourself.
{how}
If the student gives no answer, or several, reply with {none}. Reply with nothing else.

Question:
{question}

What the student answered:
{reply}"""
LETTER = "Reply with the letter of the option that the student chooses, alone."
OPEN = "Reply with the student's answer alone: yes or no, a number with its unit, or the few words that answer the question."


@dataclass(frozen=True)
class Judge:
    """Who judges: url, an OpenAI-compatible address, and the model's name there. workers: questions at a time."""

    url: str
    model: str
    workers: int = 32


def readings(
    folder: Folder,
    judge: Judge,
    benchmark: BenchmarkSet,
    items: Mapping[str, Item],
    kept: Mapping[str, Kept],
    asked_to_stop: Callable[[], bool] = nobody,
) -> dict[str, Verdict]:
    """The verdicts on replies that the rules found no answer in, by item's id, as the judge reads them; an empty reply has none.

    ValueError, naming the address, where it refuses; a reply that it does not answer for stays without a verdict.
    """
    file = folder.path / JUDGED
    open_ones = {name: reply for name, reply in kept.items() if not reply.rule and reply.text.strip() and name in items}
    said = {(r["id"], r["reply"]): r["said"] for r in recover(file) if (r["url"], r["model"]) == (judge.url, judge.model)}
    asked = [name for name, reply in open_ones.items() if (name, _hash(reply)) not in said]
    rows, reader = [_row(items[name], open_ones[name]) for name in asked], Rows()
    prompts = [reader.encode_prompt(Example(row, k)) for k, row in enumerate(rows)]

    def drawn(replies: dict[int, list[Reply]]) -> None:
        records = []
        for k, (reply,) in replies.items():
            key = asked[k], _hash(open_ones[asked[k]])
            said[key] = reply.text or ""
            records.append({"id": key[0], "reply": key[1], "said": said[key], "url": judge.url, "model": judge.model})
        append(file, records)

    server = Server(Client(judge.url, judge.model), judge.workers)
    keys = [(int(np.frombuffer(_hash(open_ones[name]).encode()[:4], np.uint32)[0]),) for name in asked]
    server.generate(prompts, Draw(1, 0.0, TOKENS), keys, Watch(drawn=drawn, failed=lambda k, why: None, asked=asked_to_stop))
    found = {}
    for name, reply in open_ones.items():
        if (text := said.get((name, _hash(reply)))) is not None:
            found[name] = _verdict(benchmark, items[name], text)
    return found


def _verdict(benchmark: BenchmarkSet, item: Item, said: str) -> Verdict:
    answer = said.rpartition("</think>")[2].strip()
    if answer.strip(".").upper() == NONE:
        return Verdict(None, 0.0, "")
    verdict = benchmark.judge(item, answer)
    return Verdict(verdict.extracted, verdict.score, RULE if verdict.rule else "")


def _row(item: Item, reply: Kept) -> Row:
    question = item.prompt.replace(IMAGE_TAG, "").strip()
    said = reply.text[-LONGEST:].encode("utf-8", "replace").decode()  # half a surrogate pair cannot be sent
    text = INSTRUCTION.format(how=LETTER if item.form == "letter" else OPEN, none=NONE, question=question, reply=said)
    return Row(turns=(Turn("user", text.replace(IMAGE_TAG, "image")),), where=f"the judge's question about {item.id}")


def _hash(reply: Kept) -> str:
    return hashlib.blake2b(reply.text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()

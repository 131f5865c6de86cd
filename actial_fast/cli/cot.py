"""`actial data cot` and `actial data template`: chains of thought for the cold start, and the example that their writer is shown."""

from __future__ import annotations

import argparse
import contextlib
import functools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actial_fast.cli.shared import Commands, add_format, check_model, progress, rows_of, settle

if TYPE_CHECKING:
    from actial_fast.data.cot.checking import Check
    from actial_fast.data.cot.writer import Writer
    from actial_fast.data.sources.row import Row
    from actial_fast.rollout.client import Used

PIXELS = 1024 * 1024  # of an image that is sent to a server, unless told otherwise


def add(data: Commands) -> None:
    """The commands of this group, below `actial data`."""
    cot = data.add_parser("cot", help="pseudo chains of thought for the cold start, checked against the poses")
    cot.add_argument("source", help="rows with a truth")
    cot.add_argument("-o", "--out", type=Path, required=True, help="JSONL to write or to go on with")
    cot.add_argument(
        "--count",
        type=int,
        default=0,
        help="chains to write, of rows or pairs drawn from the source (default: all; the paper uses about 1000)",
    )
    cot.add_argument("--per", choices=("pair", "question"),
                     help="one chain about each pair of viewpoint rows, as in the paper, or for each question (default: pair, if "
                     "a model writes about viewpoint rows)")  # fmt: skip
    cot.add_argument("--questions", choices=("one", "all"), default="one",
                     help="which of a pair's questions get its chain: one drawn at random, or "
                     "all (default: %(default)s)")  # fmt: skip
    cot.add_argument("--style", choices=("full", "short"), default="full", help="how much is written from poses, without a model")
    cot.add_argument("--template", type=Path, help="a file with an example that a person has corrected (see actial data template)")
    _add_writer(cot)
    cot.add_argument("--reasks", type=int, default=2, help="how often a rejected reply is sent back with the reason (default: %(default)s)")
    cot.add_argument("--min-words", type=int, help="shortest reasoning by a model (default: 40 about a pair, 15 about a question)")
    cot.add_argument("--max-words", type=int, help="longest reasoning by a model; 0: any (default: 2000)")
    cot.add_argument("--undecided", choices=("reject", "keep"), default="reject",
                     help="chains with a statement that cannot be decided (default: "
                     "%(default)s)")  # fmt: skip
    cot.add_argument(
        "--batch-out", type=Path, metavar="FILE", help="write the requests that are still wanted in OpenAI's batch format, and stop"
    )
    cot.add_argument("--batch-in", type=Path, nargs="+", metavar="FILE", help="take the replies from the results of a batch")
    cot.set_defaults(run=_cot)

    template = data.add_parser(
        "template", help="the example for `data cot`: drafted by a model, corrected by you beside its images, checked"
    )
    template.add_argument("source", help="viewpoint rows with poses")
    template.add_argument(
        "-o", "--out", type=Path, required=True, help="text to draft; once it is there, it is checked and its page drawn anew"
    )
    template.add_argument("--pair", default="", help="id of the pair it is about (default: drawn by the seed)")
    _add_writer(template)
    template.set_defaults(run=_template)


def _add_writer(parser: argparse.ArgumentParser) -> None:
    add_format(parser)
    parser.add_argument("--model", default="",
                        help="a checkpoint folder or hub name that writes them, or with --endpoint or --batch-out the name "
                        "that it is known by; without a model they are written from the rows' poses")  # fmt: skip
    parser.add_argument("--endpoint", default="", help="an OpenAI-compatible base URL, for example http://localhost:8000/v1")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the model's replies (default: %(default)s)")
    parser.add_argument(
        "--max-new-tokens", type=int, help="the model's longest reply (default: the endpoint's own limit; 2048 without one)"
    )
    parser.add_argument("--image-pixels", type=int, default=PIXELS,
                        help="larger images are scaled down to so many pixels before they are "
                        "sent; 0 sends them as they are (default: %(default)s)")  # fmt: skip
    parser.add_argument(
        "--timeout", type=float, default=120.0, help="with --endpoint: seconds to wait for a server to send anything (default: %(default)s)"
    )
    parser.add_argument(
        "--retries", type=int, default=5, help="with --endpoint: times that a failed request is repeated (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=8, help="with --endpoint: requests at a time (default: %(default)s)")
    parser.add_argument(
        "--price", type=float, nargs=2, metavar=("READ", "WRITTEN"), help="what a million tokens cost; the sum is told at the end"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of which rows are drawn, of wordings and of replies")


def _cot(args: argparse.Namespace) -> int:
    from actial_fast.data.cot.asking import check_template, read_template
    from actial_fast.data.cot.pairs import Pairs, viewpoints_only
    from actial_fast.data.cot.writer import rows_drawn, write_cot

    modelled = bool(args.model or args.batch_in)
    if args.batch_out and args.batch_in:
        raise ValueError("--batch-out writes requests and --batch-in takes their results: give one of them")
    if (args.endpoint or args.batch_out) and not args.model:
        raise ValueError("--model: the name of the model that the endpoint or the batch serves is needed")
    if (args.batch_out or args.batch_in) and args.endpoint:
        raise ValueError("--endpoint asks at once and a batch later: give one of them")
    if args.per == "pair" and not modelled:
        raise ValueError("--per pair needs a model (--model, --endpoint or --batch-in); chains from poses are written by question")
    text, about = read_template(args.template) if args.template else ("", None)
    if text:
        check_template(text, about)
    source: Any = rows_of(args)
    if args.per == "pair" or (args.per is None and modelled and viewpoints_only(source)):
        source = Pairs(source, seed=args.seed, every=args.questions == "all")
    total = len(rows_drawn(source, args.seed, args.count))  # before a model is loaded, which takes long
    if args.batch_out:
        return _requests(args, source, text)
    check = _check(args, isinstance(source, Pairs), text) if modelled else None
    with _writer(args, text, check) as writer, progress("chains of thought", total) as advance:
        more = {"check": check} if check else {}
        done = write_cot(source, args.out, writer, seed=args.seed, count=args.count, progress=lambda number, total: advance(number), **more)
    what = "pair" if isinstance(source, Pairs) else "row"
    there = f" ({done.kept} were there already)" if done.kept else ""
    print(f"{args.out}: {_number(done.written, what)} written{there}, {sum(done.rejected.values())} rejected")
    for reason, count in done.rejected.items():
        print(f"  {count:6}  {reason}")
    if done.rejected:
        print(f"each is kept with its reason in {args.out.with_suffix('.rejects.jsonl')}; the same command tries them again")
    return 0


def _check(args: argparse.Namespace, pairs: bool, template: str) -> Check:
    """The check of a run's chains: a model's have to be of some length and nobody's copy."""
    from dataclasses import replace

    from actial_fast.data.cot.asking import PAIR_TEMPLATE, TEMPLATE
    from actial_fast.data.cot.checking import MODELS, Check
    from actial_fast.data.cot.pairs import PAIR
    from actial_fast.data.cot.writer import stored_chains

    rules = MODELS[PAIR if pairs else ""]
    longest = rules.longest if args.max_words is None else args.max_words
    rules = replace(rules, undecided=args.undecided, shortest=rules.shortest if args.min_words is None else args.min_words, longest=longest)
    return Check(rules, template=template or (PAIR_TEMPLATE if pairs else TEMPLATE), known=stored_chains(args.out))


def _requests(args: argparse.Namespace, source: Any, template: str) -> int:
    from actial_fast.rollout.batches import write_requests
    from actial_fast.rollout.protocol import Draw

    draw = Draw(temperature=args.temperature, max_new_tokens=args.max_new_tokens or 0)
    count, paths = write_requests(
        source,
        args.out,
        args.batch_out,
        draw,
        model=args.model,
        template=template,
        seed=args.seed,
        count=args.count,
        pixels=args.image_pixels,
    )
    print(
        f"{', '.join(map(str, paths)) or args.batch_out}: {_number(count, 'request')}" + ("" if count else "; every chain is there already")
    )
    if count:
        print(
            f"have them run, then give their results to: actial data cot {args.source} -o {args.out} --batch-in RESULTS, and the same "
            "options"
        )
    return 0


@contextlib.contextmanager
def _writer(args: argparse.Namespace, template: str, check: Check | None) -> Iterator[Writer]:
    """Who writes chains of thought: the poses, the results of a batch, a model that is loaded here, or a server."""
    from actial_fast.data.cot.poses import geometric_cot
    from actial_fast.data.cot.writer import one_by_one

    if check is None:
        yield one_by_one(functools.partial(geometric_cot, style=args.style))
        return
    if args.batch_in:
        from actial_fast.rollout.batches import Results

        results = Results(args.batch_in, check)
        if results.unread:
            print(f"no result of a batch: {_number(results.unread, 'line')}")
        yield results
        _cost(results.used, args.price)
        return
    with _asking(args, template, check, args.reasks) as writer:
        yield writer


@contextlib.contextmanager
def _asking(args: argparse.Namespace, template: str, check: Any, reasks: int) -> Iterator[Writer]:
    """A model that is asked: on a server, or loaded here. What it used is told at the end."""
    from actial_fast.rollout.protocol import Draw, Engine, Reader
    from actial_fast.rollout.thoughts import EngineWriter

    engine: Engine
    reader: Reader
    if args.endpoint:
        from actial_fast.rollout.client import Client
        from actial_fast.rollout.server import Rows, Server

        client = Client(args.endpoint, args.model, retries=args.retries, timeout=args.timeout)
        engine, reader = Server(client, args.workers, args.image_pixels), Rows()
        draw = Draw(temperature=args.temperature, max_new_tokens=args.max_new_tokens or 0)
        try:
            yield EngineWriter(engine, reader, draw, template=template, reasks=reasks, check=check)
        finally:
            _cost(client.used, args.price)
        return
    from actial_fast.rollout.engines import open_checkpoint
    from actial_fast.train.dist import world

    check_model(args.model)
    settle()
    with world() as where:
        if where.size > 1:
            raise ValueError("actial data cot is one process; have the model served on several GPUs and use --endpoint")
        engine, reader = open_checkpoint(args.model, where, args.seed)
        draw = Draw(temperature=args.temperature, max_new_tokens=args.max_new_tokens or 2048)
        yield EngineWriter(engine, reader, draw, template=template, reasks=reasks, check=check)


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _cost(used: Used, price: list[float] | None) -> None:
    """Tell the tokens that replies took, and what they cost."""
    if not used.replies:
        return
    cost = f", {(used.read * price[0] + used.written * price[1]) / 1e6:,.2f} by the price given" if price else ""
    print(f"{_number(used.replies, 'answer')}: {used.read:,} tokens read, {used.written:,} written, as the server counts them{cost}")


def _template(args: argparse.Namespace) -> int:
    from actial_fast.data.cot.asking import read_template
    from actial_fast.data.cot.pairs import Pairs
    from actial_fast.data.cot.template import draft, page

    pairs = Pairs(rows_of(args))
    rows = (pairs[i] for i in range(len(pairs)))
    if args.out.exists():
        about = read_template(args.out)[1]
        name = about.meta.get("id", "") if about else ""
    else:
        name = args.pair or pairs[random.Random(args.seed).randrange(len(pairs))].id
    row = next((row for row in rows if row.id == name), None)
    if row is None:
        raise ValueError(f"{args.source} has no pair {name!r}; an id is a row's without its question, as car/0001/000-001")
    if not args.out.exists():
        if not args.model:
            raise ValueError("--model: a model drafts the text; with --endpoint the name that it is served by")
        draft(args.out, row, _drafted(args, row))
        print(f"{args.out}: drafted, to be corrected")
    shown, reason = page(args.out, row)
    print(f"{shown}: the images, and what was read from the text")
    print(f"it cannot be used yet: {reason}" if reason else f"it passes; use it with: actial data cot --template {args.out}")
    return 1 if reason else 0


def _drafted(args: argparse.Namespace, row: Row) -> str:
    """A model's text about a pair, whatever it is worth."""
    written: list[Any] = []
    with _asking(args, "", lambda text, row: None, 0) as writer:
        writer([row], [random.Random(args.seed)], lambda i, text: written.append(text))
    if not isinstance(written[0], str):
        raise ValueError(f"no text for {row.id}: {written[0]}")
    return written[0]

"""`actial bench` and `actial score`: benchmarks put to models, and replies scored again; a benchmark for another program, or for people."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actial_fast.cli.parser import Parser
from actial_fast.cli.shared import Commands, add_json, check_model, settle, text_or_file, write_json

if TYPE_CHECKING:
    from actial_fast.evaluation.bench import Scoring
    from actial_fast.evaluation.run import Asking

OUT = "runs/bench"
SETS = "a set's name (`actial bench --list`), NAME=PATH where its files lie, or a file: VLMEvalKit's TSV or rows of any format"


def add(commands: Commands) -> None:
    """The commands of this group."""
    more = "`actial bench export SET -o FILE.tsv` writes a set for VLMEvalKit, `actial bench quiz SET -o FOLDER` a page for people."
    about = "benchmarks by their owners' rules: replies kept, figures with intervals, tables"
    bench = commands.add_parser("bench", help=about, epilog=more)
    bench.add_argument("words", nargs="*", metavar="SET", help=f"{SETS}; with --table, folders of runs")
    bench.add_argument("--model", action="append", default=[], metavar="[NAME=]M", help="a checkpoint folder or hub name, or with --server "
                       "the name it is known by; several times for several models; NAME is for the tables")  # fmt: skip
    bench.add_argument("-o", "--out", type=Path, default=Path(OUT), help="folder for OUT/SET/MODEL (default: %(default)s)")
    bench.add_argument("--list", action="store_true", help="the sets by name, and where their owners publish them")
    bench.add_argument(
        "--table", choices=("paper",), help="no run: the paper's tables, with the runs in these folders and the published rows"
    )
    how = bench.add_argument_group("how it is asked, kept with the replies")
    how.add_argument("--engine", choices=("embedded", "vllm"), default="embedded", help="who draws replies (default: %(default)s)")
    how.add_argument("--server", default="", metavar="URL", help="ask what is served at this OpenAI-compatible base URL instead")
    how.add_argument("--temperature", type=float, default=0.0, help="0 = greedy (default)")
    how.add_argument("--max-new-tokens", type=int, default=0, help="longest reply (default: the set's own)")
    how.add_argument("--system", help="system prompt, or @FILE with it (default: the set's own; '' for the questions' own)")
    how.add_argument("--min-pixels", type=int, default=0, help="smaller pictures are scaled up (default: as the checkpoint says)")
    how.add_argument("--max-pixels", type=int, default=0, help="larger pictures are scaled down, also for a server (default: as the "
                     "checkpoint says)")  # fmt: skip
    how.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="", help="of the weights (default: bfloat16 on CUDA, else float32)"
    )
    how.add_argument("--limit", type=int, default=0, help="so many questions, drawn by --seed, groups whole (default: all)")
    how.add_argument("--seed", type=int, default=0, help="of the subset and of sampling (default: 0)")
    how.add_argument("--on-bad-row", choices=("error", "skip"), default="error", help="what a question does that cannot be used")
    held = bench.add_argument_group("what it may take")
    held.add_argument("--gpus", type=int, metavar="N", help="this machine's GPUs to use, a rank each (default: one process)")
    held.add_argument("--workers", type=int, default=32, help="requests to a server or judge at a time (default: %(default)s)")
    held.add_argument("--kv-tokens", type=int, default=0, help="embedded: most tokens whose keys and values are held (default: what fits)")
    held.add_argument("--max-prompt-tokens", type=int, default=16000, help="a longer question is a bad row (default: %(default)s)")
    held.add_argument("--max-images", type=int, default=32, help="vllm: most pictures of a question (default: %(default)s)")
    held.add_argument("--tensor-parallel", type=int, default=1, help="vllm: neighbouring ranks that share a model (default: 1)")
    held.add_argument("--gpu-memory", type=float, default=0.9, help="vllm: share of the device's memory (default: %(default)s)")
    _add_scoring(bench)
    bench.set_defaults(run=_bench)

    score = commands.add_parser("score", help="score the replies of benchmark runs again, by the same or other rules; no model is needed")
    score.add_argument("words", nargs="+", metavar="RUN", help="folders of runs, or answers that were downloaded from a quiz's page")
    score.add_argument(
        "--quiz", type=Path, metavar="FOLDER", help="of answers: what `actial bench quiz` wrote (default: the answers' folder)"
    )
    score.add_argument("-o", "--out", type=Path, default=Path(OUT), help="of answers: folder for OUT/SET/human-NAME (default: %(default)s)")
    score.add_argument("--workers", type=int, default=32, help="requests to a judge at a time (default: %(default)s)")
    _add_scoring(score)
    score.set_defaults(run=_score)


def below(line: Sequence[str]) -> tuple[Parser, list[str]] | None:
    """The parser of `bench export` or `bench quiz`, where a command line begins so, and the words behind; None for other lines."""
    if line[:2] == ["bench", "export"]:
        parser = Parser(prog="actial bench export", description="A set as a TSV file for VLMEvalKit.")
        parser.add_argument("set", metavar="SET", help=SETS)
        parser.add_argument("-o", "--out", type=Path, required=True, help="the .tsv file")
        parser.set_defaults(run=_export)
    elif line[:2] == ["bench", "quiz"]:
        about = "Questions of a set as a page for people, whose answers `actial score` takes."
        parser = Parser(prog="actial bench quiz", description=about)
        parser.add_argument("set", metavar="SET", help=SETS)
        parser.add_argument("-o", "--out", type=Path, required=True, help="folder for quiz.html and its key")
        parser.add_argument("--count", type=int, default=100, help="questions (default: %(default)s)")
        parser.add_argument("--seed", type=int, default=0, help="of the choice (default: 0)")
        parser.set_defaults(run=_quiz)
    else:
        return None
    parser.add_argument("--on-bad-row", choices=("error", "skip"), default="error", help="what a question does that cannot be used")
    return parser, list(line[2:])


def _add_scoring(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how replies are scored and shown")
    group.add_argument("--extractor", default="rules", help="what finds the answer in a reply: rules (this project's, default), owner (the "
                       "set's own), paper (VLMEvalKit's behind the paper's tags), or module:function")  # fmt: skip
    group.add_argument("--judge", default="", metavar="URL", help="an OpenAI-compatible base URL whose model reads what rules could not")
    group.add_argument("--judge-model", default="", metavar="NAME", help="the name that it knows the model by")
    group.add_argument(
        "--errors", type=int, default=200, help="wrong replies on each run's errors.html, 0 = no page (default: %(default)s)"
    )
    group.add_argument("--as", dest="form", choices=("text", "markdown", "latex"), default="text", help="of the tables (default: text)")
    add_json(parser)


def _bench(args: argparse.Namespace) -> int:
    from actial_fast.evaluation import catalogue

    if args.list:
        for each in catalogue.all_sets():
            print(f"{each.name:16} {each.title}: {each.page}")
        return 0
    if not args.words:
        raise ValueError("bench: name at least one set or file, or --list for the sets there are")
    if args.table:
        return _paper(args)
    if not args.model:
        raise ValueError("bench: --model M is missing, a checkpoint folder or hub name, or with --server the name it is known by")
    askings, scoring = _askings(args), _scoring(args)
    sets = {_given(word): catalogue.open_set(word) for word in args.words}
    _distinct([each.set.name for each in sets.values()], "sets", "put them into folders of other names, or to other folders with -o")
    if args.gpus not in (None, 1) and "RANK" not in os.environ:
        from actial_fast.cli.launch import launch

        if args.gpus < 1:
            raise ValueError(f"--gpus {args.gpus}: give the number of GPUs to use, 1 or more")
        return launch(args.gpus, args.line)
    from actial_fast.evaluation.bench import bench

    settle()
    results = bench(sets, askings, args.out, scoring)
    if int(os.environ.get("RANK", 0)) == 0:
        from actial_fast.evaluation.run import folder_of

        _show(args, results, [folder_of(args.out, each.set.name, asking.name).path for asking in askings for each in sets.values()])
    return 0


def _askings(args: argparse.Namespace) -> list[Asking]:
    from actial_fast.evaluation.identity import label
    from actial_fast.evaluation.run import Asking

    system = None if args.system is None else text_or_file(args.system)
    if args.server and args.engine != "embedded":
        raise ValueError(f"--server {args.server} and --engine {args.engine}: one of them draws the replies; leave the other out")
    askings = []
    for word in args.model:
        name, named, model = word.partition("=")
        if not named or Path(word).exists():  # a path may hold one too
            name, model = "", word
        if not args.server:
            check_model(model)
        askings.append(
            Asking(
                model=model,
                name=name or (model if args.server else label(model)),
                engine="server" if args.server else args.engine,
                url=args.server,
                workers=args.workers,
                temperature=args.temperature,
                max_new_tokens=args.max_new_tokens,
                system=system,
                min_pixels=args.min_pixels,
                max_pixels=args.max_pixels,
                dtype=args.dtype,
                limit=args.limit,
                seed=args.seed,
                on_bad_row=args.on_bad_row,
                kv_tokens=args.kv_tokens,
                max_prompt=args.max_prompt_tokens,
                tensor_parallel=args.tensor_parallel,
                gpu_memory=args.gpu_memory,
                max_images=args.max_images,
            )
        )
    _distinct([asking.name for asking in askings], "models", "name them: --model NAME=M")
    return askings


def _scoring(args: argparse.Namespace) -> Scoring:
    from actial_fast.evaluation.bench import Scoring
    from actial_fast.evaluation.judging import Judge

    if bool(args.judge) != bool(args.judge_model):
        raise ValueError("--judge and --judge-model belong together: an OpenAI-compatible base URL, and the model's name there")
    judge = Judge(args.judge, args.judge_model, args.workers) if args.judge else None
    if args.errors < 0:
        raise ValueError(f"--errors {args.errors}: give a number of replies, 0 for no page")
    return Scoring(extractor=args.extractor, judge=judge, errors=args.errors)


def _score(args: argparse.Namespace) -> int:
    from actial_fast.evaluation.bench import scored_again
    from actial_fast.evaluation.quiz import answers_to
    from actial_fast.evaluation.replies import runs_below

    scoring, folders = _scoring(args), []
    for word in map(Path, args.words):
        folders += [answers_to(word, args.quiz or word.parent, args.out)] if word.is_file() else runs_below([word])
    results = [scored_again(folder, scoring) for folder in folders]
    _show(args, results, [folder.path for folder in folders])
    return 0


def _paper(args: argparse.Namespace) -> int:
    from actial_fast.evaluation.paper_tables import paper_tables
    from actial_fast.evaluation.replies import RESULT, runs_below

    files = [folder.path / RESULT for folder in runs_below(map(Path, args.words))]
    results = [json.loads(file.read_text()) for file in files if file.exists()]
    if not results:
        raise ValueError(f"{args.words[0]}: its runs have no figures yet; `actial score {args.words[0]}` makes them")
    _print(args, paper_tables(results), {"results": results})
    return 0


def _show(args: argparse.Namespace, results: Sequence[Mapping[str, Any]], folders: Sequence[Path]) -> None:
    """A table a set with all of its models, and below what two models differ by."""
    from actial_fast.evaluation.replies import ERRORS, Folder
    from actial_fast.evaluation.scoring import comparisons
    from actial_fast.evaluation.tables import comparison_table, set_table, summary_table

    names = list(dict.fromkeys(result["set"] for result in results))
    tables = [set_table([result for result in results if result["set"] == name]) for name in names]
    tables += [summary_table(results)] if len(names) > 1 else []
    pairs = comparisons([Folder(path) for path in folders])
    _print(args, [*tables, *([comparison_table(pairs)] if pairs else [])], {"results": list(results), "comparisons": pairs})
    if args.form == "text" and args.json != "-" and args.errors:
        print("\n".join(f"replies to look at: {path / ERRORS}" for path in folders))


def _print(args: argparse.Namespace, tables: Sequence[Any], figures: Mapping[str, Any]) -> None:
    from actial_fast.evaluation.tables import FORMS

    if args.json != "-":
        print("\n\n".join(FORMS[args.form](table) for table in tables))
    if args.json:
        write_json(figures, args.json)


def _export(args: argparse.Namespace) -> int:
    from actial_fast.evaluation.catalogue import open_set
    from actial_fast.evaluation.export import write_tsv

    count, bad = write_tsv(open_set(args.set).items, args.out, args.on_bad_row)
    print(f"{args.out}: {count:,} questions" + (f", {len(bad):,} left out, the first: {bad[0]}" if bad else ""))
    return 0


def _quiz(args: argparse.Namespace) -> int:
    from actial_fast.evaluation.catalogue import open_set
    from actial_fast.evaluation.quiz import KEY, PAGE, write_quiz

    if args.count < 1:
        raise ValueError(f"--count {args.count}: a quiz has at least one question")
    count = write_quiz(_given(args.set), open_set(args.set), args.out, args.count, args.seed, args.on_bad_row)
    print(f"{args.out / PAGE}: {count:,} questions, without their answers, which are in {KEY}")
    print(f"score what people download from it: actial score answers-NAME.json --quiz {args.out}")
    return 0


def _given(word: str) -> str:
    """A word that catalogue.open_set takes, with its path whole, so that it opens the same from any folder."""
    name, equals, path = word.partition("=")
    if equals and not Path(word).exists():
        return f"{name}={Path(path).expanduser().resolve()}"
    file = Path(word).expanduser()
    return str(file.resolve()) if file.exists() else word


def _distinct(names: Sequence[str], what: str, how: str) -> None:
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two {what} are called {twice!r}; {how}")

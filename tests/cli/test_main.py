"""The command line as a user meets it: help, each data command end to end, evaluation, report, and mistakes told in one line."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from actial_fast.cli.main import main
from actial_fast.data.sources.own import JsonlSource
from actial_fast.data.sources.source import SourceConfig, open_source
from actial_fast.data.sources.tags import is_well_formed, tagged_answer
from actial_fast.report.metrics import MetricLog
from actial_fast.settings.config import describe, load_recipe
from actial_fast.settings.recipe import GRPORecipe, SFTRecipe

ROOT = Path(__file__).parents[2]
COMMANDS = [
    [],
    ["quickstart"],
    ["sft"],
    ["grpo"],
    ["eval"],
    ["export"],
    ["serve"],
    ["report"],
    ["doctor"],
    ["recipe"],
    ["recipe", "list"],
    ["recipe", "init"],
    ["recipe", "show"],
    ["cache"],
    ["data"],
    ["data", "render"],
    ["data", "viewpoint"],
    ["data", "spatial"],
    ["data", "cot"],
    ["data", "template"],
    ["data", "inspect"],
    ["data", "check"],
    ["data", "jigsaw"],
    ["data", "sparkle"],
    ["data", "boxes"],
    ["tiny"],
]


@pytest.fixture
def actial(capsys, monkeypatch):
    """actial("data", "check", path, status=0) -> (stdout, stderr)."""
    monkeypatch.delenv("ACTIAL_TRACEBACK", raising=False)

    def run(*args, status: int = 0) -> tuple[str, str]:
        try:
            got = main([str(arg) for arg in args])
        except SystemExit as error:  # argparse
            got = error.code or 0
        out, err = capsys.readouterr()
        assert got == status, f"exit status {got}\n{out}\n{err}"
        return out, err

    return run


@pytest.fixture
def mistake(actial):
    """mistake("data", "check", "nowhere") -> the one line on stderr that it ends with, status 2, nothing but a progress bar before it."""

    def run(*args) -> str:
        _, err = actial(*args, status=2)
        *before, last = err.splitlines()
        assert last.startswith("actial: ") and all("0:00:00" in line or "-:--:--" in line or not line for line in before), err
        return last

    return run


# ---- help and arguments


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help(command, actial):
    out, _ = actial(*command, "--help")
    assert out.startswith(" ".join(["usage: actial", *command]))


def test_every_positional_and_option_is_explained():
    import argparse

    from actial_fast.cli.main import make_parser

    def walk(parser):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for sub in action.choices.values():
                    yield from walk(sub)
            elif action.dest not in ("help", "folder"):
                yield parser.prog, action

    found = list(walk(make_parser()))
    assert len(found) > 30
    silent = [f"{prog} {action.dest}" for prog, action in found if not action.help]
    assert not silent


@pytest.mark.parametrize("args", [["fly"], ["data", "fly"], ["eval"], ["report"], ["data", "check", "a", "b=c"], ["doctor", "x"]])
def test_wrong_words_are_usage_errors(args, actial):
    _, err = actial(*args, status=2)
    assert err.startswith("usage: actial") and "error:" in err.splitlines()[-1]


@pytest.mark.parametrize("args", [[], ["data"], ["recipe"], ["-q"], ["data", "-v"]], ids=" ".join)
def test_a_command_that_has_others_below_it_is_its_own_help(args, actial):
    out, _ = actial(*args)
    assert out.startswith(" ".join(["usage: actial", *(word for word in args if word[0] != "-")])) and "--help" in out


def test_the_nearest_command_is_named(actial):
    for args, near in ((["evall"], "'eval'"), (["data", "viewpont"], "'viewpoint'"), (["xyzzy"], None)):
        _, err = actial(*args, status=2)
        last = err.splitlines()[-1]
        assert f"'{args[-1]}' is no command" in last and ("did you mean" in last) == (near is not None) and (near or "") in last


def test_version(actial):
    out, _ = actial("--version")
    assert re.fullmatch(rf"actial_fast \S+ \(torch {re.escape(version('torch'))}, triton \S+, transformers \S+, Python 3\S+\)\n", out)


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion(shell, actial):
    out, _ = actial("--print-completion", shell)
    assert "quickstart" in out and (shell == "tcsh" or "--gpus" in out)


def test_bash_completes_a_command(actial, tmp_path):
    script = tmp_path / "actial.sh"
    script.write_text(
        actial("--print-completion", "bash")[0] + '\nCOMP_WORDS=(actial data vi); COMP_CWORD=2\n_shtab_actial\necho "${COMPREPLY[@]}"\n'
    )
    assert subprocess.run(["bash", str(script)], capture_output=True, text=True, check=True).stdout.split() == ["viewpoint"]


@pytest.mark.parametrize("command", ["render", "viewpoint", "spatial"])
def test_the_fields_of_a_data_command_are_in_its_help(command, actial):
    from actial_fast.data.captures.render import RenderConfig
    from actial_fast.data.captures.settings import ViewpointConfig
    from actial_fast.data.captures.spatial import SpatialConfig

    out, _ = actial("data", command, "--help")
    listed = out.partition("fields, key=value, with their defaults:")[2]
    cls = {"render": RenderConfig, "viewpoint": ViewpointConfig, "spatial": SpatialConfig}[command]
    for key, _, _, meaning in describe(cls()):
        assert f"\n  {key}=" in listed and meaning in listed, key


def test_quiet_and_verbose(actial, lab, tmp_path, monkeypatch):
    _, err = actial("-q", "-v", "doctor", status=2)
    assert "not allowed with" in err
    with pytest.raises(ValueError, match="nowhere"):
        main(["recipe", "show", "nowhere.yaml", "-v"])
    actial("-q", "recipe", "list")
    assert not {"ACTIAL_QUIET", "ACTIAL_TRACEBACK"} & set(os.environ), "they are of one command"


def test_recipes_that_ship_are_listed_and_copied(actial, mistake, tmp_path, monkeypatch):
    out, _ = actial("recipe", "list")
    names = [line.split()[0] for line in out.splitlines()]
    assert names == sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    assert all(len(line.split()) > 4 for line in out.splitlines()), "a line says what each is for"
    monkeypatch.chdir(tmp_path)
    actial("recipe", "init", "actial-1x24")
    assert load_recipe("actial-1x24.yaml") == load_recipe(ROOT / "recipes" / "actial-1x24.yaml")
    assert "is there already" in mistake("recipe", "init", "actial-1x24")
    assert "no such recipe; those that ship: actial-1x24" in mistake("recipe", "init", "actial-2x24")


def test_the_cache_is_listed_and_cleared(actial, tmp_path, monkeypatch):
    from actial_fast.packing.images import ImageSettings, ImageStore

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "0 B" in actial("cache")[0]
    store = ImageStore(ImageSettings(14, 2, 2, 1, 10**9, 3, mean=(0.5,) * 3, std=(0.3,) * 3))
    key = store.put(Image.new("RGB", (56, 56), "red"))
    store.pixels(key)
    (tmp_path / "actial_fast" / "0123.arrow").write_bytes(bytes(5000))
    (one, two) = json.loads(actial("cache", "--json", "-")[0])
    assert (one["what"], one["path"], one["used"], two["what"], two["used"]) == ("images", str(store.folder), True, "tables", False)
    assert 3 * 56 * 56 < one["bytes"] < 10_000 and two["bytes"] >= 5000
    other = str(store.put(Image.new("RGB", (56, 56), "blue")))
    out, _ = actial("cache", "--clear", "all")
    assert "in use" in out and not list((tmp_path / "actial_fast").glob("*.arrow"))
    assert store.hold(key) and not store.hold(other), "only what somebody still needs stays"
    folder = store.folder
    del store, key
    assert "in use" not in actial("cache", "--clear", "all", "--older-than", 1)[0] and list(folder.glob("*/*"))
    earlier = folder.parent / "0123456789abcdef"
    earlier.mkdir()
    (earlier / "pixels").write_bytes(bytes(50))
    assert len(json.loads(actial("cache", "--json", "-")[0])) == 2
    assert "0 B" in actial("cache", "--clear", "images")[0] and not list(folder.glob("*/*")) and not earlier.exists()


def test_images_are_pruned_least_recently_used_first(actial, mistake, tmp_path, monkeypatch):
    from actial_fast.packing.images import ImageSettings, ImageStore

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = ImageStore(ImageSettings(14, 2, 2, 1, 10**9, 3, mean=(0.5,) * 3, std=(0.3,) * 3), tmp_path / "elsewhere")
    keys = [str(store.put(np.full((280, 280, 3), i, np.uint8))) for i in range(4)]
    os.utime(store.folder / keys[2][:2] / keys[2], (0, 0))
    told = json.loads(actial("cache", "--images", tmp_path / "elsewhere", "--prune", 0.0008, "--json", "-")[0])
    assert [one["what"] for one in told] == ["images"] and told[0]["bytes"] < 800_000
    assert [store.hold(key) for key in keys] == [True, True, False, True]
    assert "no such folder" in mistake("cache", "--images", tmp_path / "nowhere")
    assert "0 or more" in mistake("cache", "--prune", -1)


def test_overrides_may_stand_before_or_after_options(lab, tmp_path, actial):
    for n, args in enumerate(
        (
            [lab.captures, "-o", "{}", "test_examples=6", "pairs_per_object=2"],
            [lab.captures, "test_examples=6", "-o", "{}", "pairs_per_object=2"],
            ["-o", "{}", lab.captures, "test_examples=6", "pairs_per_object=2"],
        )
    ):
        out = tmp_path / str(n)
        actial("data", "viewpoint", *(out if arg == "{}" else arg for arg in args))
        config = json.loads((out / "build.json").read_text())["config"]
        assert (config["test_examples"], config["pairs_per_object"]) == (6, 2)


def test_in_a_process_of_its_own(lab, tmp_path):
    """No traceback, the right status, and help and mistakes without loading torch."""
    script = "import sys; from actial_fast.cli.main import main; status = main(); print('torch' in sys.modules); sys.exit(status)"

    def run(*args):
        return subprocess.run([sys.executable, "-c", script, *map(str, args)], capture_output=True, text=True, cwd=ROOT, check=False)

    done = run("data", "check", lab.questions / "nowhere.jsonl")
    assert done.returncode == 2 and done.stdout == "False\n"
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("actial: data source")
    done = run("data", "check", lab.questions / "test.jsonl")
    assert done.returncode == 0 and done.stdout.endswith("False\n")
    assert "━" not in done.stdout, "progress belongs on stderr"


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["recipe", "show", str(ROOT / "recipes" / "actial-7b-sft.yaml")], 0),  # more than stdout holds
        (["recipe", "list"], 0),
        (["--version"], 0),
        (["recipe", "show", "nowhere.yaml"], 2),
    ],
)
def test_a_reader_that_has_gone_is_no_error(words, status):
    env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}  # with it nothing is left for the end
    command = [sys.executable, "-m", "actial_fast.cli", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=env)
    process.stdout.close()
    _, told = process.communicate(timeout=120)
    assert process.returncode == status and bool(told) == bool(status) and b"Broken pipe" not in told


def test_the_traceback_is_there_for_who_asks(monkeypatch):
    monkeypatch.setenv("ACTIAL_TRACEBACK", "1")
    with pytest.raises(ValueError, match="does not exist"):
        main(["recipe", "show", "nowhere.yaml"])


def test_an_error_of_ours_keeps_its_traceback(monkeypatch, lab):
    monkeypatch.setattr("actial_fast.data.sources.source.scan", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["data", "check", str(lab.questions / "test.jsonl")])


def test_a_missing_package_is_named(monkeypatch, lab, mistake, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name == "actial_fast.data.captures.sheet" or name.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    line = mistake("data", "inspect", lab.questions / "test.jsonl", "-o", tmp_path / "x.png")
    assert "needs matplotlib" in line and "pip install 'actial-fast[train]'" in line


# ---- recipes


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipe_show_prints_every_field(path, actial):
    out, _ = actial("recipe", "show", path)
    lines = out.splitlines()
    assert lines[0].startswith(f"# {path}: ")
    shown = {line.split("=", 1)[0]: (line, lines[i + 1]) for i, line in enumerate(lines) if line[0] not in "# "}
    fields = {key: doc for key, _, _, doc in describe(load_recipe(path))}
    assert shown.keys() == fields.keys()
    assert all(doc == " " * 4 + fields[key] for key, (_, doc) in shown.items())


def test_recipe_show_tells_what_differs_from_the_default(actial):
    out, _ = actial("recipe", "show", ROOT / "recipes" / "actial-7b-grpo.yaml", "optim.lr=3e-6", "save.wandb=")
    lines = out.splitlines()
    assert "optim.lr=3.0e-06   # default: 1.0e-06" in lines
    assert "steps=150" in lines and "save.wandb=''" in lines
    assert "data.sources.0.path=data/SAT_train.parquet   # no default" in lines


def test_what_recipe_show_prints_can_be_given_back(actial):
    """Each printed key=value is an override: together they make the default recipe this one."""
    path = ROOT / "recipes" / "actial-7b-grpo.yaml"
    out, _ = actial("recipe", "show", path)
    given = [line.split("   #")[0] for line in out.splitlines() if line[0] not in "# "]
    assert load_recipe(path, given) == load_recipe(path)


def test_mistakes_in_recipes(mistake, tmp_path):
    recipe = ROOT / "recipes" / "actial-7b-sft.yaml"
    assert "did you mean 'optim.lr'?" in mistake("recipe", "show", recipe, "optim.lrr=1")
    assert "expected key=value" in mistake("recipe", "show", recipe, "optim.lr")
    assert "nowhere.yaml does not exist" in mistake("sft", "nowhere.yaml")
    for number in (0, -2):
        assert f"--gpus {number}: give the number of GPUs to use, 1 or more" in mistake("sft", recipe, "--gpus", number)
    assert "is a recipe for `actial sft`, not for `actial grpo`" in mistake("grpo", recipe, f"run={tmp_path}")
    assert not list(tmp_path.iterdir())


def test_a_rank_of_another_launcher_starts_no_ranks(mistake, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    told = mistake("grpo", ROOT / "recipes" / "actial-7b-grpo.yaml", "--gpus", 8)
    assert "--gpus 8: another launcher has started 2 of this machine's ranks already; leave the option out" in told


# ---- data


def test_data_from_captures_to_a_checked_file(tmp_path, actial):
    captures, questions, spatial = tmp_path / "captures", tmp_path / "q", tmp_path / "s"
    out, _ = actial("data", "render", "-o", captures, "families=[vehicle]", "objects=3", "views=8", "workers=1")
    assert f"{captures}: 3 captures, 24 images\n" in out
    assert re.search(r"^3 captures rendered in \d+\.\d s \(\d[\d,]* images/s\)$", out, re.M) and "already" not in out
    assert len(list(captures.glob("vehicle/*/images/*.png"))) == 24
    out, _ = actial("data", "render", "-o", captures, "families=[vehicle]", "objects=3", "views=8", "workers=1")
    assert f"{captures}: 3 captures, 24 images\n3 captures were there already\n" in out and "rendered in" not in out

    out, _ = actial("data", "viewpoint", captures, "-o", questions, "test_examples=60", "pairs_per_object=4", "workers=1")
    train, test = JsonlSource(questions / "train.jsonl"), JsonlSource(questions / "test.jsonl")
    assert f"train.jsonl: {len(train)} rows, 8 pairs, from 2 objects\n" in out
    assert f"test.jsonl: {len(test)} rows, 4 pairs, from 1 object (60 were asked for" in out
    assert (len(train), len(test)) == (24, 12)

    out, _ = actial("data", "spatial", captures, "-o", spatial, "--test-objects", questions / "test.jsonl", "train_per_kind=3")
    rows = open_source(SourceConfig(str(spatial / "train.parquet")))
    assert re.search(rf"train\.parquet: {len(rows)} rows \(facing_side \d+, closer \d+, .*\), from 2 objects", out)
    assert re.search(r"test\.parquet: \d+ rows .*, from 1 object$", out.strip())

    out, _ = actial("data", "viewpoint", captures, "-o", questions, "test_examples=6", "validation_examples=6", "workers=1")
    assert re.search(r"validation\.jsonl: 6 rows, 2 pairs, from 1 object$", out, re.M)
    held = ("--test-objects", questions / "test.jsonl", "--validation-objects", questions / "validation.jsonl")
    out, _ = actial("data", "spatial", captures, "-o", spatial, *held, "train_per_kind=3", "validation_per_kind=3")
    assert re.search(r"validation\.parquet: [1-9]\d* rows .*, from 1 object$", out, re.M)

    for path in (questions / "train.jsonl", spatial / "train.parquet"):
        out, _ = actial("data", "check", path)
        lines, source = out.splitlines(), open_source(SourceConfig(str(path)))
        assert lines[:2] == [f"{path}: {len(source)} rows, 0 bad", "good rows by question type:"]
        kinds = Counter(source[i].kind for i in range(len(source)))
        assert lines[2:-1] == [f"  {rows:8}  {kind}" for kind, rows in sorted(kinds.items())] and len(kinds) > 1
        assert lines[-1].startswith("without --model")


def test_a_broken_capture_is_counted_with_its_reason(lab, tmp_path, actial):
    captures = tmp_path / "captures"
    for n, path in enumerate(sorted(lab.captures.glob("*/*"))[:3]):
        (captures / "a").mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-r", path, captures / "a" / str(n)], check=True)
    model = captures / "a" / "1" / "sparse" / "0" / "images.bin"
    model.write_bytes(model.read_bytes()[:-100])
    out, _ = actial("data", "viewpoint", captures, "-o", tmp_path / "q", "test_examples=6", "workers=1")
    line = next(line for line in out.splitlines() if line.startswith("captures left out:"))
    assert line.startswith("captures left out: 1 ") and line.endswith(f"each is named in {tmp_path / 'q' / 'build.json'}")
    assert list(json.loads((tmp_path / "q" / "build.json").read_text())["rejected_captures"]) == ["a/1"]


def test_data_cot_writes_continues_and_rejects(lab, tmp_path, actial, mistake):
    out = tmp_path / "cot.jsonl"
    printed, _ = actial("data", "cot", lab.questions / "train.jsonl", "-o", out, "--count", 5, "--style", "short")
    assert printed == f"{out}: 5 rows written, 0 rejected\n"
    rows = JsonlSource(out)
    assert len(rows) == 5
    for i in range(5):
        answer = rows[i].turns[-1].content
        assert is_well_formed(answer) and tagged_answer(answer) == rows[i].truth
    printed, _ = actial("data", "cot", lab.questions / "train.jsonl", "-o", out, "--count", 5, "--style", "short")
    assert printed == f"{out}: 0 rows written (5 were there already), 0 rejected\n"

    other = tmp_path / "other.jsonl"  # no poses: nothing can be written from geometry
    printed, _ = actial("data", "cot", lab.spatial / "train.parquet", "-o", other, "--count", 3)
    assert printed.splitlines()[0] == f"{other}: 0 rows written, 3 rejected"
    assert f"{tmp_path / 'other.rejects.jsonl'}" in printed.splitlines()[-1]
    assert len((tmp_path / "other.rejects.jsonl").read_text().splitlines()) == 3

    assert "count is 100000, but there are only" in mistake(
        "data", "cot", lab.questions / "train.jsonl", "-o", tmp_path / "x", "--count", 100000
    )
    assert "--model: the name of the model" in mistake("data", "cot", lab.questions / "train.jsonl", "-o", out, "--endpoint", "http://x/v1")
    assert "nowhere.txt: No such file" in mistake(
        "data", "cot", lab.questions / "train.jsonl", "-o", out, "--endpoint", "http://x/v1", "--model", "m", "--template", "nowhere.txt"
    )


def test_data_inspect_draws_what_is_asked_for(lab, tmp_path, actial, mistake):
    source = lab.questions / "train.jsonl"
    sizes = {}
    for rows in (1, 4):
        out, _ = actial("data", "inspect", source, "-o", tmp_path / "new" / f"{rows}.png", "--rows", rows, "--kind", "ego_rotation")
        assert out == f"{tmp_path / 'new' / f'{rows}.png'}\n"
        with Image.open(out.strip()) as image:
            sizes[rows] = image.size
    assert sizes[4][0] == sizes[1][0] and sizes[4][1] > 3 * sizes[1][1]
    assert "nowhere.jsonl does not exist" in mistake("data", "inspect", tmp_path / "nowhere.jsonl")
    line = mistake("data", "inspect", source, "--kind", "colour", "-o", tmp_path / "x.png")
    assert "no row of kind colour; it has 'ego_rotation'" in line
    assert "no rows to draw" in mistake("data", "inspect", source, "--rows", 0, "-o", tmp_path / "x.png")


def test_data_check_names_bad_rows_and_why(lab, actial):
    lines = (lab.questions / "train.jsonl").read_text().splitlines()[:30]
    lines[2] = lines[2][:-5]
    lines[6] = lines[6].replace("<image>", "", 1)
    record = json.loads(lines[9])
    record["images"][0] = "gone.png"
    lines[9] = json.dumps(record)
    bad = lab.questions / "bad.jsonl"
    bad.write_text("\n".join(lines) + "\n")
    out, _ = actial("data", "check", bad, status=1)
    assert out.startswith(f"{bad}: 30 rows, 3 bad\n")
    named = out.split("bad rows:\n")[1].splitlines()
    assert named.pop() == "without --model, lengths in tokens and the model's chat template were not looked at"
    assert [line.split(": ")[0].strip() for line in named] == [f"{bad}:{n}" for n in (3, 7, 10)]
    assert "not JSON" in named[0] and "1 <image> tags but 2 images" in named[1] and "gone.png does not exist" in named[2]
    assert "         1  image does not exist\n" in out
    counts = re.findall(r"^ +(\d+)  (?:ego|object)_", out, re.M)
    assert sum(map(int, counts)) == 27
    out, _ = actial("data", "check", bad, "--show", 1, status=1)
    assert "the first 1 bad rows (--show 0 names all):\n" in out and f"{bad}:7" not in out
    assert "{" not in out and "BadRow" not in out, "for people"


def test_one_split_of_a_folder(lab, actial, tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"SAT_{split}.parquet").write_bytes((lab.spatial / f"{split}.parquet").read_bytes())
    _, error = actial("data", "check", tmp_path, status=2)
    assert "several splits: test (SAT_test.parquet); train (SAT_train.parquet); set split to one of them" in error
    out, _ = actial("data", "check", tmp_path, "--split", "test")
    assert out.startswith(f"{tmp_path}: ") and " 0 bad" in out


def test_mistakes_in_data_commands(lab, tmp_path, mistake):
    nowhere = tmp_path / "nowhere"
    assert f"captures folder {nowhere} does not exist" in mistake("data", "viewpoint", nowhere, "-o", tmp_path / "o")
    assert f"no capture below {tmp_path}" in mistake("data", "viewpoint", tmp_path, "-o", tmp_path / "o")
    line = mistake("data", "spatial", lab.captures, "-o", tmp_path / "o", "--test-objects", nowhere)
    assert f"{nowhere}: No such file or directory" in line
    (tmp_path / "other.jsonl").write_text("[1, 2]\n")
    line = mistake("data", "spatial", lab.captures, "-o", tmp_path / "o", "--test-objects", tmp_path / "other.jsonl")
    assert "not the test.jsonl of a viewpoint build" in line
    assert f"data source {nowhere} does not exist" in mistake("data", "check", nowhere)
    assert "use jsonl, sharegpt, sat, verl" in mistake("data", "check", lab.questions / "test.jsonl", "--format", "shargpt")
    assert "did you mean 'objects'?" in mistake("data", "render", "-o", tmp_path / "o", "objetcs=3")
    assert "families: 'car' is not known" in mistake("data", "render", "-o", tmp_path / "o", "families=[car]")
    assert f"in {nowhere}" in mistake("data", "render", "-o", tmp_path / "o", "--meshes", nowhere)
    assert "min_angle < max_angle" in mistake("data", "viewpoint", lab.captures, "-o", tmp_path / "o", "min_angle=120")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(lab, tmp_path, mistake):
    (tmp_path / "shut").mkdir(mode=0o500)
    assert "Permission denied" in mistake("data", "viewpoint", lab.captures, "-o", tmp_path / "shut" / "q")


def test_a_file_where_a_folder_belongs(lab, tmp_path, mistake):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in mistake("data", "viewpoint", lab.captures, "-o", tmp_path / "file", "workers=1")


# ---- evaluation, report, doctor


def test_eval_prints_a_table_and_writes_the_figures(lab, tmp_path, actial):
    figures = tmp_path / "new" / "figures.json"
    out, _ = actial(
        "eval",
        lab.model,
        lab.questions / "test.jsonl",
        lab.spatial / "test.parquet",
        "--limit",
        6,
        "--max-new-tokens",
        4,
        "--json",
        figures,
    )
    results = json.loads(figures.read_text())
    assert len(results) == 2, "two files called test.* keep apart"
    for name, table in results.items():
        assert table["overall"]["n"] == 6 and set(table) == {"kinds", "overall"}, "rows are for a run's record"
        assert f"{name}\n" in out or f"\n{name}" in out
    table = next(table for table in results.values() if "ego_rotation" in table["kinds"])
    assert sum(kind["n"] for kind in table["kinds"].values()) == 6
    assert all(kind["chance"] == pytest.approx(1 / 3) for kind in table["kinds"].values())
    for word in ("question type", "ego_rotation", "interval", "chance", "majority", "all"):
        assert word in out
    assert out.count("question type") == 2


def test_mistakes_in_eval_come_before_the_model_is_loaded(lab, tmp_path, mistake, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("actial_fast.evaluation.evaluate.evaluate_checkpoint", never)
    source = lab.questions / "test.jsonl"
    assert f"model {tmp_path / 'nowhere'}: no such folder" in mistake("eval", tmp_path / "nowhere", source)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert "model runs/nowhere: no such folder" in mistake("eval", "runs/nowhere", source)
    assert "nowhere.jsonl does not exist" in mistake("eval", lab.model, source, tmp_path / "nowhere.jsonl")
    assert "kv_tokens: must be at least 0" in mistake("eval", lab.model, source, "--kv-tokens", -1)


def test_eval_of_a_folder_without_a_model(lab, tmp_path, mistake):
    assert str(tmp_path) in mistake("eval", tmp_path, lab.questions / "test.jsonl")


def test_report(tmp_path, actial, mistake):
    with MetricLog(tmp_path / "run", stage="sft", total=3, tensorboard=False) as log:
        for step in (1, 2, 3):
            log.step(step, {"loss": 1.0 / step})
    out, _ = actial("report", tmp_path / "run")
    path = Path(out.strip().splitlines()[-1])
    assert path == tmp_path / "run" / "report.html" and "<svg" in path.read_text()
    assert "is this the folder of a run?" in mistake("report", tmp_path)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    for where, options in ((tmp_path / "run" / "compared.html", ()), (tmp_path / "x.html", ("-o", tmp_path / "x.html"))):
        out, _ = actial("report", tmp_path / "run", tmp_path / "other", *options)
        assert Path(out.strip()) == where and "<h1>run / other</h1>" in where.read_text()
    assert "given twice" in mistake("report", tmp_path / "run", tmp_path / "run")


def test_doctor(capsys):
    status = main(["doctor"])
    out = capsys.readouterr().out
    assert (status == 0) == ("Everything that is needed works." in out)
    for name in ("torch", "transformers", "C++ extension", "CUDA", "pycolmap"):
        assert re.search(rf"^  {re.escape(name)} +(works|installed|not here|broken) ", re.sub(r"\x1b\[[\d;]*m", "", out), re.M)


def test_training_from_the_command_line(lab, tmp_path, actial):
    """Both loops through a recipe file, --on-bad-row standing after the recipe, and the final model named."""
    recipes = {"sft": SFTRecipe, "grpo": GRPORecipe}
    sizes = {"sft": ["batch_size=2"], "grpo": ["prompts=2", "minibatch=2", "sampling.n=2", "sampling.max_new_tokens=3"]}
    for kind in recipes:
        (tmp_path / f"{kind}.yaml").write_text(f"kind: {kind}\ndata: {{sources: [{{path: {lab.questions / 'train.jsonl'}}}]}}\n")
        out, _ = actial(
            kind,
            tmp_path / f"{kind}.yaml",
            "--on-bad-row",
            "skip",
            f"run={tmp_path}/run",
            f"model.path={lab.model}",
            "steps=1",
            "save.tensorboard=false",
            *sizes[kind],
        )
        final = tmp_path / "run" / kind / "final" / "model"
        assert out.splitlines()[-1] == f"finished: {final}" and (final / "model.safetensors").exists()
        assert load_recipe(tmp_path / "run" / kind / "recipe.yaml").data.on_bad_row == "skip"


def test_in_a_locale_that_has_not_all_letters(tmp_path):
    """Files are UTF-8 whatever the locale says; what it cannot print or open is told."""
    text = '{"id": "é", "messages": [{"role": "user", "content": "<image>Où?"}], "images": ["ö.png"], "truth": "à"}\n'
    (tmp_path / "r.jsonl").write_bytes(text.encode())
    recipe = "kind: sft\nmodel: {path: m}\ndata:\n  sources: [{path: r.jsonl, system: réponds}]\n"
    (tmp_path / "r.yaml").write_bytes(recipe.encode())
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    said = {}
    for words in (["recipe", "show", "r.yaml"], ["data", "check", "r.jsonl"]):
        done = subprocess.run([sys.executable, "-m", "actial_fast.cli", *words], capture_output=True, cwd=tmp_path, env=plain)
        said[words[0]] = (done.returncode, done.stdout + done.stderr)
    assert said["recipe"][0] == 0 and rb"r\xE9ponds" in said["recipe"][1]
    assert said["data"][0] == 1 and b"ascii, this locale's, cannot spell; set PYTHONUTF8=1" in said["data"][1]

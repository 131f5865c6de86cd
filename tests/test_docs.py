"""The pages: they build without a warning and without network, and say what the code does."""

import ast
import html
import importlib.util
import inspect
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tarfile
import typing
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import actial_fast
from actial_fast.cli import bench, export
from actial_fast.cli.main import main, make_parser
from actial_fast.data.sources.picture import decode
from actial_fast.data.sources.source import FORMATS, SourceConfig, open_source
from actial_fast.kernels import chunks
from actial_fast.kernels.head import make_head
from actial_fast.ops import api
from actial_fast.ops import chunks as chunks_cpu
from actial_fast.ops.spec import NAMED, AdvantageSpec, GRPOSpec
from actial_fast.settings.config import RECIPES, field_docs, load_recipe, recipe_class
from bench.kernels.accuracy import markdown

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built pages, every warning an error, every request to the network one too."""
    folder = tmp_path_factory.mktemp("site")
    nowhere = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_built_and_filled_in(site):
    assert {page.stem for page in PAGES} <= {page.stem for page in site.glob("*.html")}
    for page in PAGES:
        assert "{{" not in (site / f"{page.stem}.html").read_text().split("<article")[1], page


def test_a_page_asks_no_other_host(site):
    """Scripts, styles, pictures, frames and fonts lie beside the pages."""
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|link|img|iframe|source|video)\b[^>]*?\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>", page.read_text())
        assert not loaded, (page, loaded)
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(\s*[\"']?(https?:)?//|@import", style.read_text()), style


def test_formulas_are_drawn_and_the_search_works_from_a_folder(site):
    losses = (site / "losses.html").read_text()
    written = re.findall(r"\\\((.*?)\\\)|\\\[(.*?)\\\]", (ROOT / "docs/losses.md").read_text(), flags=re.S)
    assert losses.count("<math") == len(written) and "arithmatex" not in losses and "merror" not in losses
    index = (site / "search/search_index.js").read_text()
    assert index.startswith("var __index = {") and "dual_clip" in index
    assert "IFrameWorker" in (site / "assets/iframe-worker.js").read_text() and "assets/iframe-worker.js" in losses


def test_the_recipes_page_has_every_field(site):
    """Those of every dataclass that a recipe reaches, with the words of its docstring."""
    page, seen = (ROOT / "docs/recipes.md").read_text(), set()
    assert "{{ recipe_fields }}" in page
    text = html.unescape(re.sub(r"<[^>]+>", "", (site / "recipes.html").read_text()))
    words = plain(text)
    waiting = [recipe_class(kind) for kind in RECIPES]
    while waiting:
        cls = waiting.pop()
        if cls in seen:
            continue
        seen.add(cls)
        hints = typing.get_type_hints(cls)
        for field, meaning in field_docs(cls).items():
            assert f"\n{field}\n" in text and plain(meaning)[:60] in words, (cls, field)
            waiting += [part for part in (hints[field], *typing.get_args(hints[field])) if is_dataclass(part)]
    assert len(seen) > 20
    assert "integer, at least 1" in text and "number, a share above 0 and up to 1" in text  # bounds are the refusals of the dataclasses


def plain(text: str) -> str:
    """Letters and digits alone: what Markdown does not change."""
    return re.sub(r"\W", "", text)


def test_the_command_page_has_every_command_and_option(site):
    text = html.unescape(re.sub(r"<[^>]+>", "", (site / "command.html").read_text()))
    for line, parser in described().commands():
        assert f"\n{line}" in text, line
        for action in parser._actions:
            assert all(name in text for name in action.option_strings if action.dest not in ("help", "quiet", "verbose")), (line, action)
    assert "\nactial data render" in text and "\nactial bench quiz" in text


def described():
    """The hook that writes these pages, as mkdocs loads it."""
    spec = importlib.util.spec_from_file_location("described", ROOT / "docs/described.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_argument_of_an_op_has_a_row():
    table = (ROOT / "docs/api.md").read_text().split("{ #arguments }")[1].split(":::")[0]
    told = {name for row in re.findall(r"^\| (`.*?) \|", table, flags=re.M) for name in re.findall(r"`(\w+)`", row)}
    ops = [getattr(api, name) for name in api.__all__ if inspect.isfunction(getattr(api, name)) and name != "token_weights"]
    assert len(ops) == 8 and told == {name for op in ops for name in inspect.signature(op).parameters}


def test_the_reference_has_every_public_name(site):
    reference = (site / "api.html").read_text()
    for name in actial_fast.__all__:
        places = [f'id="{getattr(actial_fast, name).__module__}.{name}"'] if name != "STATS" else []
        assert any(place in reference for place in [*places, f'id="actial_fast.ops.api.{name}"']), name


def test_every_named_loss_has_a_row_and_every_field_an_equation(site):
    losses = (site / "losses.html").read_text()
    for name in NAMED:
        assert f"<td><code>{name}</code></td>" in losses
    text = (ROOT / "docs/losses.md").read_text()
    for field in fields(GRPOSpec):
        assert field.name in text or field.name.replace("_pos", "").replace("_neg", "") in text, field.name


def test_the_numerics_page_shows_what_was_measured():
    """Its table is a file of results, and that file is the rendering of the raw ones."""
    results = ROOT / "bench/results/cpu-2core"
    rows = json.loads((results / "accuracy.json").read_text())["rows"]
    assert (results / "accuracy.md").read_text().strip() == markdown(rows).strip()
    assert '--8<-- "bench/results/cpu-2core/accuracy.md"' in (ROOT / "docs/numerics.md").read_text()


def prose(page: Path) -> str:
    """A page without code blocks and inline code."""
    return re.sub(r"`[^`]*`", "", re.sub(r"```.*?```", "", page.read_text(), flags=re.S))


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.stem)
def test_no_measured_figure_is_written_by_hand(page):
    """Those come from results files through docs/tables.py."""
    unit = r"(s|ms|seconds|minutes|hours|KiB|MiB|GiB|MB|GB|%|x|times|[TG]?FLOPs?|(tokens|images)/s)"
    assert not [m.group() for m in re.finditer(rf"(?<![\w.])\d[\d.,]*\s*{unit}(?![\w])", prose(page))]


# ---- commands

COMMANDS = [
    (page.name, line)
    for page in [*PAGES, ROOT / "README.md"]
    for block in re.findall(r"```[^\n]*\n(.*?)```", page.read_text(), flags=re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith(("actial ", "$ actial "))
]


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[line[:60] for _, line in COMMANDS])
def test_a_command_is_one_that_there_is(page, line):
    """It parses, and a recipe that ships takes its keys. Words in capitals and in brackets stand for the reader's own."""
    words = [word for word in shlex.split(re.sub(r"[\[\]]|\|.*$", "", line.removeprefix("$ ")) if "{" not in line else line, comments=True)]
    words = words[1 : next((i for i, word in enumerate(words) if word in (">", "&&", "|")), None)]
    if words[0].startswith("--"):
        return
    if "..." in words:  # as a line above it
        return
    parser, words = bench.below(words) or export.below(words) or (make_parser(), words)
    args, rest = parser.parse_known_args(words)
    assert all("=" in word for word in rest), rest
    recipe = getattr(args, "recipe", "")
    if recipe.startswith("recipes/"):
        load_recipe(ROOT / recipe, [*args.overrides, *rest])


@pytest.fixture(scope="module")
def pages_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pages")


@pytest.mark.parametrize(
    ("line", "smaller", "said"),
    [
        ("actial recipe list", "", "actial-7b-grpo"),
        ("actial recipe init actial-1x24 -o mine.yaml", "", "mine.yaml"),
        ("actial recipe show recipes/actial-7b-sft.yaml", "", "optim.lr=5.0e-06"),
        ("actial bench --list", "", "blink"),
        ("actial cache", "", "actial_fast: "),
        ("actial data render -o runs/mine/captures objects=10", "objects=2 views=8", "8 captures"),
        ("actial data viewpoint runs/mine/captures -o runs/mine/viewpoint", "examples=20 test_examples=8", "train.jsonl: 20 rows"),
        ("actial data inspect runs/mine/viewpoint/train.jsonl -o runs/mine/sheet.png", "", "sheet.png"),
        ("actial data check runs/mine/viewpoint/train.jsonl", "", "20 rows, 0 bad"),
    ],
    ids=lambda value: value[:40],
)
def test_a_quick_command_does_what_its_page_says(line, smaller, said, pages_folder, monkeypatch, capsys):
    """As it stands on a page, one after the other, smaller where drawing would take long."""
    assert any(re.sub(r"\s*#.*", "", on_page).removeprefix("$ ") == line for _, on_page in COMMANDS), line
    monkeypatch.chdir(pages_folder)
    assert main([*shlex.split(line)[1:], *smaller.split()]) == 0
    assert said in capsys.readouterr().out


# ---- the examples of data formats

EXAMPLES = re.findall(r'```json title="(\S+)"\n(.*?)```', (ROOT / "docs/formats.md").read_text(), flags=re.S)


def test_every_format_has_an_example():
    assert {Path(name).stem for name, _ in EXAMPLES} >= {*FORMATS} - {"jsonl"} | {"rows", "parts"}


@pytest.mark.parametrize(("name", "text"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_an_example_is_read_as_it_stands(name, text, tmp_path):
    """Its rows come out of the reader that training uses, found by their keys, with pictures that decode and something to learn."""
    for picture in ("a.png", "b.png"):
        Image.new("RGB", (56, 56), "teal").save(tmp_path / picture)
    if name.endswith(".tar"):
        members = json.loads(text)
        with tarfile.open(tmp_path / name, "w") as shard:
            for member, said in members.items():
                picture = isinstance(said, str) and said.endswith(".png")
                (tmp_path / "member").write_text(said if isinstance(said, str) else json.dumps(said))
                shard.add(tmp_path / said if picture else tmp_path / "member", member)
        count = len({member.partition(".")[0] for member in members})
    else:
        (tmp_path / name).write_text(text)
        count = len(json.loads(text)) if name.endswith(".json") else len(text.strip().splitlines())
    rows = open_source(SourceConfig(str(tmp_path / name)))
    assert len(rows) == count
    for row in (rows[i] for i in range(count)):
        assert row.images and all(decode(image, "row").shape == (56, 56, 3) for image in row.images)
        assert row.truth or row.turns[-1].role == "assistant"


# ---- troubleshooting


def literals(folder: Path) -> list[str]:
    """Every text of a package's source, NUL for what an f-string fills in."""
    found = []
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_every_message_that_is_explained_can_be_said():
    """Its words stand in one text of the source, in their order."""
    texts = literals(ROOT / "actial_fast")
    messages = re.findall(r"^\| `(.*?)` \|", (ROOT / "docs/troubleshooting.md").read_text(), flags=re.M)
    assert len(messages) > 35
    for message in messages:
        words = [re.escape(part.strip()) for part in message.split("...") if part.strip()]
        pattern = re.compile(".*?".join(words), re.S)
        assert sum(map(len, words)) > 12 and any(pattern.search(text) for text in texts), message


# ---- the memory page

MEMORY = (ROOT / "docs/memory.md").read_text()
SIZES = [
    (torch.float32, 151, 64, 0.1),
    (torch.float32, 152064, 3584, 700),
    (torch.bfloat16, 152064, 3584, 700),
    (torch.bfloat16, 1031, 64, 3),
]


@pytest.mark.parametrize(("dtype", "V", "H", "budget"), SIZES)
def test_the_formula_for_the_cpu_is_the_one_that_cuts(dtype, V, H, budget):
    hidden, weight = (torch.empty(n, H, dtype=dtype, device="meta") for n in (100_000, V))
    (rows,) = chunks_cpu.plan(hidden, weight, budget)[0][0]
    share = 1 if dtype == torch.float32 else 0.75
    assert r"b = e \, (3 V + 3 H)" in MEMORY and "the block gets a quarter of \\(W\\)" in MEMORY
    assert rows.stop - rows.start == math.floor(share * budget * 2**20 / (4 * (3 * V + 3 * H)))


@pytest.mark.parametrize(("dtype", "V", "H", "budget"), SIZES)
def test_the_formula_for_cuda_is_the_one_that_cuts(dtype, V, H, budget):
    hidden, weight = (torch.empty(n, H, dtype=dtype, device="meta") for n in (100_000, V))
    head = make_head(hidden, weight, torch.empty(100_000, dtype=torch.int64, device="meta"), None, 1.0, None)
    e, p = dtype.itemsize, 64 if dtype == torch.float32 else 128
    without = 12 * math.ceil(V / p) + 64
    assert r"b = e \, \lceil V \rceil_{64} + H (e + 16) + 12 \, \lceil V / p \rceil + 64" in MEMORY
    need = e * math.ceil(V / 64) * 64 + H * (e + 16) + without
    assert (chunks.row_bytes(head, False), chunks.row_bytes(head, True)) == (without, need)
    fit, (_, stop) = math.floor(budget * 2**20 / need), chunks.cut(head, True, budget)[0]
    assert stop == fit or (stop < fit and stop % 64 == 0 and fit - stop < 256)


# ---- the migration tables


def table_rows(page: str) -> list[list[str]]:
    lines = [line for line in (ROOT / "docs" / page).read_text().splitlines() if line.startswith("| `") and "`GRPOConfig`" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def names(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


@pytest.mark.parametrize("page", ["from-liger.md", "from-trl.md"])
def test_the_fields_of_ours_that_a_table_names_exist(page):
    cells = " ".join(row[1] for row in table_rows(page))
    known = {"GRPOSpec": GRPOSpec, "AdvantageSpec": AdvantageSpec}
    found = re.findall(r"`(GRPOSpec|AdvantageSpec)\.(\w+)", cells)
    assert len(found) > 10
    for owner, name in found:
        assert name in {f.name for f in fields(known[owner])} | {"named"}, name


def test_every_argument_of_liger_has_a_row():
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    told = [name for row in table_rows("from-liger.md") for name in names(row[0])]
    theirs = [
        name
        for function in (LigerFusedLinearGRPOLoss.__init__, LigerFusedLinearGRPOLoss.forward)
        for name in inspect.signature(function).parameters
        if name != "self"
    ]
    assert sorted(told) == sorted(theirs)


def trl_defaults() -> dict:
    from trl import GRPOConfig

    return {f.name: f.default for f in fields(GRPOConfig) if f.default is not MISSING}


def test_every_field_of_trl_that_a_table_names_exists():
    told = {name for row in table_rows("from-trl.md") for name in names(row[0])}
    assert len(told) > 20 and told <= set(trl_defaults())


def test_a_field_of_trl_sets_the_field_of_ours_beside_it():
    from actial_fast.integrations.trl_loss import spec_of

    other = {bool: lambda x: not x, float: lambda x: x + 1.5, str: lambda x: {"token": "sequence", "sequence_mask": "token_truncate"}[x]}
    base = trl_defaults() | {"vllm_importance_sampling_clip_min": 0.0, "delta": 2.0, "epsilon_high": 0.3, "loss_type": "grpo"}
    before, seen = spec_of(SimpleNamespace(**base)), 0
    for row in table_rows("from-trl.md"):
        (name, *more), found = names(row[0]), re.findall(r"`GRPOSpec\.(\w+)`", row[1])
        if more or len(found) != 1 or row[0] == "`loss_type`":
            continue
        value = 0.5 if name == "top_entropy_quantile" else other[type(base[name])](base[name])
        value = 0.4 if name == "epsilon_high" else value
        after = spec_of(SimpleNamespace(**base | {name: value}))
        changed = {f.name for f in fields(GRPOSpec) if getattr(after, f.name) != getattr(before, f.name)}
        assert changed == set(found), (name, changed)
        seen += 1
    assert seen > 12


# ---- the code on the pages

BLOCKS = [(page.stem, block) for page in PAGES for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)]


@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_what_a_page_imports_exists(page, block):
    assert imported(block), page


def test_what_the_table_of_imports_names_exists():
    lines = re.findall(r"`(from actial_fast[\w.]* import [\w, ]+)`", (ROOT / "docs/import.md").read_text())
    assert len(lines) >= 4 and all(imported(line) for line in lines)


def imported(code: str) -> bool:
    """Whether every name that the code takes from our package is defined there, read from the source: no trainer is imported."""
    found = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    for node in found:
        path = ROOT / Path(*node.module.split("."))
        source = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
        tree = ast.parse(source.read_text())
        defined = {x.name for x in tree.body if isinstance(x, (ast.FunctionDef, ast.ClassDef))} | {
            alias.name for x in ast.walk(tree) if isinstance(x, ast.ImportFrom) for alias in x.names
        }
        if node.module == "actial_fast":  # its names are those of the ops
            defined |= set(actial_fast.__all__)
        assert {alias.name for alias in node.names} <= defined, ast.unparse(node)
    return bool(found)

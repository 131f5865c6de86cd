"""The house: which folder may import which, read from the source with ast."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Lower floors never import from higher ones, nor rooms on one floor from each other. A room is a folder, or a module beside the folders.
FLOORS = [
    {"ops", "data"},
    {"report", "tasks", "integrations"},
    {"packing"},
    {"settings"},
    {"model"},
    {"train"},
    {"rollout"},
    {"budget", "handover"},
    {"evaluation"},
    {"sft", "grpo"},
    {"quickstart", "doctor"},
    {"cli"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
DATA = [{"sources"}, {"captures", "cot", "made"}]  # the same inside data
TRANSFORMERS = {"model", "data", "rollout", "budget", "evaluation", "integrations"}  # rooms that may know them
QUIET = "cli.shared"  # imports transformers to silence its progress bars
VLLM = ["rollout.vllm", "rollout.vllm_inside"]  # what imports it
TRAINERS = {"trl", "verl", "liger_kernel"}  # other people's, each in its module of integrations
# what sends CUDA tensors to the kernels, each its own
DOORS = {"ops.library", "ops.rounding", "model.attention", "model.paged", "packing.packed_ops"}


def modules_of(top: str) -> dict[str, Path]:
    """Dotted name below `top` -> file; the kernels, linked into the package, are looked at by themselves."""
    found = {".".join(path.relative_to(ROOT / top).with_suffix("").parts): path for path in sorted((ROOT / top).rglob("*.py"))}
    return {name: path for name, path in found.items() if top != "actial_fast" or not name.startswith("kernels.")}


MODULES = modules_of("actial_fast")
BENCH = modules_of("bench")
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
CODE = [m for m in MODULES if not m.endswith("__init__")]


def room(module: str) -> str:
    return module.split(".")[0]


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Everything a module imports, at its top or inside functions, and whether that is for type checkers only."""
    tree = ast.parse(path.read_text())
    typing = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in typing) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: an import says where from, not how many folders up"
            yield from ((f"{node.module}.{alias.name}", id(node) in typing) for alias in node.names)
            yield str(node.module), id(node) in typing


def tops(path: Path) -> set[str]:
    return {name.split(".")[0] for name, _ in imports(path)}


def own(modules: dict[str, Path], top: str, module: str, *, typing: bool = True) -> set[str]:
    """Modules of `top` that one of them imports."""
    names = {name.removeprefix(f"{top}.") for name, only_typing in imports(modules[module]) if typing or not only_typing}
    return {name for name in names if name in modules and name != module}


def test_every_room_has_a_floor():
    assert {room(m) for m in CODE} == set(FLOOR), "a folder of the package and FLOORS differ: place it where it belongs"
    assert {m.split(".")[1] for m in CODE if room(m) == "data"} == set.union(*DATA)


@pytest.mark.parametrize("module", CODE)
def test_folders_import_downwards(module):
    for other in own(MODULES, "actial_fast", module):
        here, there = room(module), room(other)
        assert here == there or FLOOR[there] < FLOOR[here], f"{module} imports {other}: {there} is not below {here}"


@pytest.mark.parametrize("module", [m for m in CODE if room(m) == "data"])
def test_folders_of_data_import_downwards(module):
    floor = {name: i for i, names in enumerate(DATA) for name in names}
    for other in own(MODULES, "actial_fast", module):
        here, there = module.split(".")[1], other.split(".")[1]
        assert here == there or floor[there] < floor[here], f"{module} imports {other}"


@pytest.mark.parametrize(("top", "modules"), [("actial_fast", MODULES), ("bench", BENCH)])
def test_no_circles(top, modules):
    order = graphlib.TopologicalSorter({m: own(modules, top, m, typing=False) for m in modules if not m.endswith("__init__")})
    order.prepare()  # raises CycleError, which names the circle


def test_folders_say_what_lives_in_them():
    for path in [path for name, path in (MODULES | BENCH).items() if name.endswith("__init__")]:
        assert (ast.get_docstring(ast.parse(path.read_text())) or "").strip(), f"{path} has no docstring"


def test_files_are_short():
    long = {name: lines for name, path in MODULES.items() if (lines := len(path.read_text().splitlines())) > 400}
    assert not long, "nobody reads these in one sitting"


@pytest.mark.parametrize("module", CODE)
def test_nobody_imports_a_loop_bench_or_tests(module):
    if room(module) not in {"quickstart", "cli"}:
        assert not {room(other) for other in own(MODULES, "actial_fast", module)} & {"sft", "grpo"}
    assert not tops(MODULES[module]) & {"bench", "tests", "kernels"}


@pytest.mark.parametrize("module", CODE)
def test_transformers_stays_in_its_rooms(module):
    heavy = tops(MODULES[module]) & {"transformers", "peft", "tokenizers"}
    assert not heavy or room(module) in TRANSFORMERS or module == QUIET, f"{module} imports {heavy}"


@pytest.mark.parametrize("module", CODE)
def test_other_trainers_stay_in_integrations(module):
    theirs = tops(MODULES[module]) & TRAINERS
    assert not theirs or room(module) == "integrations", f"{module} imports {theirs}"


def test_vllm_is_imported_where_it_is_used():
    """Inside functions: it takes seconds, and is rarely there."""
    assert [m for m in CODE if "vllm" in tops(MODULES[m])] == VLLM
    top = [node for m in VLLM for node in ast.parse(MODULES[m].read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not any((getattr(node, "module", None) or node.names[0].name).split(".")[0] == "vllm" for node in top)


@pytest.mark.parametrize("module", [m for m in CODE if room(m) in {"data", "settings", "tasks"}])
def test_rows_recipes_and_rewards_need_no_torch(module):
    assert "torch" not in tops(MODULES[module])


def test_one_module_imports_the_extension():
    assert [m for m in CODE if any(name == "actial_fast._C" for name, _ in imports(MODULES[m]))] == ["packing.native"]


def test_the_reference_needs_torch_only():
    assert tops(MODULES["ops.reference"]) == {"__future__", "torch", "actial_fast"}


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_a_kernel_needs_torch_and_triton_only(path):
    for name, _ in imports(path):
        top = name.split(".")[0]
        assert (
            top in {"torch", "triton", *(["quack"] if path.stem == "quack_gemms" else [])}
            or top in sys.stdlib_module_names
            or f"{name}.".startswith("actial_fast.kernels.")
        ), name


@pytest.mark.parametrize("module", CODE)
def test_only_the_doors_know_the_kernels(module):
    text = MODULES[module].read_text()
    assert "triton" not in tops(MODULES[module])
    assert module in DOORS or "actial_fast.kernels" not in text


def test_the_cpu_path_never_imports_triton():
    code = (
        "import sys, torch, actial_fast as a; before = 'triton' in sys.modules; h, w = torch.ones(2, 4), torch.ones(5, 4)\n"
        "a.linear_logprob(h, w, torch.tensor([0, 1])); a.group_advantages(torch.ones(2), torch.tensor([0, 0]), a.AdvantageSpec())\n"
        "print(before, 'triton' in sys.modules, any('kernels' in m for m in sys.modules if m.startswith('actial_fast')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == ["False"] * 3


def test_importing_the_package_pulls_in_nothing_heavy():
    heavy = ("torch", "transformers", "peft", "pycolmap", "datasets", "matplotlib", *sorted(TRAINERS))
    code = f"import sys, actial_fast.ops, actial_fast.packing, actial_fast.settings.recipe; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("module", CODE)
def test_nothing_is_ever_unpickled(module):
    calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(MODULES[module].read_text())) if isinstance(node, ast.Call)}
    assert not tops(MODULES[module]) & {"pickle", "cloudpickle", "dill", "joblib"} and "torch.load" not in calls

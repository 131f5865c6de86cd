"""The house: which module may import which, read from the source with ast."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "actial_fast"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if "kernels" not in path.relative_to(PACKAGE).parts
}
# Lower rooms never import from higher ones; modules on one floor may import each other.
FLOORS = [
    {"spec", "native", "planning", "layout", "style", "chart", "statistics"},
    {"reference", "chunked", "chunked_kl", "chunked_logits"},
    {"library"},
    {"operators", "operators_logits"},
    {"checks", "ops", "metrics", "doctor"},
    {"packing", "packed_ops", "images", "rewards", "data"},
    {"attention", "features", "vision"},
    {"config", "recipe", "processor", "cards", "report"},
    {"model", "tiny", "integrations"},
    {"dist", "balance", "rollout"},
    {"checkpoint", "evaluate", "training", "rounds"},
    {"sft", "grpo"},
    {"quickstart"},
    {"cli"},
]
TRANSFORMERS = {"model", "attention", "vision", "tiny", "processor", "rollout.embedded", "cli"}  # cli only quiets its progress bars
TRAINERS = {"trl", "verl", "liger_kernel"}  # other people's, each in its module of integrations
LOOPS = {"sft", "grpo"}
DOORS = {"library", "attention", "packed_ops"}  # what sends CUDA tensors to the kernels, each its own


KERNELS = sorted((PACKAGE.parent / "kernels").glob("*.py"))


def room(module: str) -> str:
    return module.split(".")[0]


def floor(module: str) -> int:
    found = [i for i, rooms in enumerate(FLOORS) if room(module) in rooms]
    assert found, f"{module} has no floor: add it to FLOORS where it belongs"
    return found[0]


def imports(module: str) -> set[str]:
    """Everything a module imports, at its top or inside functions."""
    return imports_of(MODULES[module], module.split(".")[:-1])


def imports_of(path: Path, package: list[str]) -> set[str]:
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(["actial_fast", *package[: len(package) - node.level + 1], *([base] if base else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names} | {base}
    return found


def own(module: str) -> set[str]:
    names = {name.removeprefix("actial_fast.") for name in imports(module) if name.startswith("actial_fast.")}
    return {name for name in names if name in MODULES and not name.endswith("__init__")}


CODE = [m for m in MODULES if not m.endswith("__init__")]


@pytest.mark.parametrize("module", CODE)
def test_imports_go_one_way(module):
    for other in own(module):
        assert floor(other) <= floor(module), f"{module} imports {other}, which lives above it"


@pytest.mark.parametrize("module", CODE)
def test_nobody_imports_a_loop_bench_or_tests(module):
    if room(module) not in {"quickstart", "cli"}:
        assert not {room(other) for other in own(module)} & LOOPS
    assert not {name.split(".")[0] for name in imports(module)} & {"bench", "tests", "kernels"}


@pytest.mark.parametrize("module", CODE)
def test_transformers_stays_in_its_rooms(module):
    heavy = {name.split(".")[0] for name in imports(module)} & {"transformers", "peft", "tokenizers"}
    assert not heavy or module in TRANSFORMERS or room(module) == "integrations", f"{module} imports {heavy}"


@pytest.mark.parametrize("module", CODE)
def test_other_trainers_stay_in_integrations(module):
    theirs = {name.split(".")[0] for name in imports(module)} & TRAINERS
    assert not theirs or room(module) == "integrations", f"{module} imports {theirs}"


@pytest.mark.parametrize("module", [m for m in CODE if room(m) == "data"])
def test_data_needs_no_torch(module):
    assert "torch" not in {name.split(".")[0] for name in imports(module)}


def test_one_module_imports_the_extension():
    assert [m for m in CODE if "_C" in MODULES[m].read_text() and "import _C" in MODULES[m].read_text()] == ["native"]


def test_the_reference_needs_torch_only():
    assert {name.split(".")[0] for name in imports("reference")} == {"__future__", "torch", "actial_fast"}


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_a_kernel_needs_torch_and_triton_only(path):
    for name in imports_of(path, []):
        top = name.split(".")[0]
        assert top in {"torch", "triton"} or top in sys.stdlib_module_names or f"{name}.".startswith("actial_fast.kernels."), name


@pytest.mark.parametrize("module", CODE)
def test_only_the_door_knows_the_kernels(module):
    text = MODULES[module].read_text()
    assert "triton" not in {name.split(".")[0] for name in imports(module)}
    assert module in DOORS or "actial_fast.kernels" not in text


def test_the_cpu_path_never_imports_triton():
    code = (
        "import sys, torch, actial_fast as a; before = 'triton' in sys.modules; h, w = torch.ones(2, 4), torch.ones(5, 4)\n"
        "a.linear_logprob(h, w, torch.tensor([0, 1])); a.group_advantages(torch.ones(2), torch.tensor([0, 0]), a.AdvantageSpec())\n"
        "print(before, 'triton' in sys.modules, any('kernels' in m for m in sys.modules if m.startswith('actial_fast')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == ["False"] * 3


def test_importing_the_package_pulls_in_nothing_heavy():
    heavy = ("transformers", "peft", "pycolmap", "datasets", "matplotlib", *sorted(TRAINERS))
    code = f"import sys, actial_fast; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("module", CODE)
def test_nothing_is_ever_unpickled(module):
    names = {name.split(".")[0] for name in imports(module)}
    calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(MODULES[module].read_text())) if isinstance(node, ast.Call)}
    assert not names & {"pickle", "cloudpickle", "dill", "joblib"} and "torch.load" not in calls

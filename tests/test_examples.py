"""The examples run as a reader would run them, with the base dependencies only, and do what they say."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "plain_loop.py"
PROBE = """
import runpy, sys
sys.modules.update(dict.fromkeys(sys.argv[2:]))  # importing any of these raises ImportError
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def modules_of_the_extras() -> set[str]:
    """Top-level modules of the distributions that the optional dependencies name, and of the libraries that an example could lean on."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = {re.match(r"[\w.-]+", line)[0].lower() for lines in extras.values() for line in lines} | {"trl", "liger-kernel", "accelerate"}
    installed = importlib.metadata.packages_distributions()
    return {module for module, names in installed.items() if wanted & {name.lower() for name in names}} | {"transformers", "peft", "trl"}


def test_the_plain_loop_learns_with_the_base_dependencies_alone():
    blocked = sorted(modules_of_the_extras())
    assert {"transformers", "peft", "trl", "PIL", "yaml"} <= set(blocked) and not {"torch", "numpy", "triton"} & set(blocked)
    run = subprocess.run(
        [sys.executable, "-c", PROBE, str(EXAMPLE), *blocked], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    rewards = [float(x) for x in re.findall(r"reward (\d\.\d+)", run.stdout)]
    assert len(rewards) == 7, run.stdout
    assert rewards[0] < 0.02 and rewards[-1] > 0.8, run.stdout  # chance is 1 / 512


def test_the_blocked_modules_cannot_be_imported():
    """The test above proves something only if the block works."""
    script = "import sys; sys.argv = ['', '']; sys.modules.update(dict.fromkeys(['transformers'])); import transformers"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 1 and "ModuleNotFoundError" in run.stderr


@pytest.mark.parametrize("path", sorted(EXAMPLE.parent.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short_and_imports_torch_and_us_only(path):
    text = path.read_text()
    assert len(text.splitlines()) < 40
    nodes = list(ast.walk(ast.parse(text)))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} == {"torch", "actial_fast"}

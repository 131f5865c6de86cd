"""The examples run as a reader would run them, with the base dependencies only, and do what they say."""

import ast
import importlib.metadata
import os
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


def test_trls_trainer_learns_to_look_with_our_loss():
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, str(EXAMPLE.parent / "trl_grpo.py")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment | {"PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == 0, run.stderr
    rewards = [float(x) for x in re.findall(r"reward (\d\.\d+)", run.stdout)]
    assert len(rewards) == 6, run.stdout
    assert rewards[0] < 0.6 and rewards[-1] > 0.85, run.stdout  # half of the letters are right by chance


def test_the_plain_loop_is_short_and_imports_torch_and_us_only():
    text = EXAMPLE.read_text()
    assert len(text.splitlines()) < 40
    nodes = list(ast.walk(ast.parse(text)))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} == {"torch", "actial_fast"}


AS_VERL_USERS = """
import importlib.util, runpy, sys, types
if importlib.util.find_spec("ray") is None:  # verl's package imports it, what runs here does not use it
    sys.modules["ray"] = types.ModuleType("ray")
    sys.modules["ray"].ObjectRef = None
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.mark.skipif(importlib.util.find_spec("verl") is None, reason="verl is not installed")
def test_our_loss_in_verls_registry_learns_and_equals_verls_own():
    script = [sys.executable, "-c", AS_VERL_USERS, str(EXAMPLE.parent / "verl_loss.py")]
    run = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    steps = re.findall(r"reward (\d\.\d+), clipped (\d\.\d+), loss (\S+), verl's (\S+), .* (\S+)\n", run.stdout)
    assert len(steps) == 8 and all(ours == theirs and float(gap) < 1e-6 for _, _, ours, theirs, gap in steps), run.stdout
    assert float(steps[0][0]) < 0.25 and float(steps[-1][0]) > 0.6 and any(float(clipped) > 0.02 for _, clipped, *_ in steps), run.stdout


def test_without_verl_its_example_says_what_to_install():
    script = [sys.executable, "-c", PROBE, str(EXAMPLE.parent / "verl_loss.py"), "verl"]
    run = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 1 and run.stderr.startswith("This example runs beside verl") and "pip install verl==0.9.1" in run.stderr

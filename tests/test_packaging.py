"""What is installed: the wheel's and the sdist's contents, a build without a compiler, what importing costs, and (`make package`) a clean
installation with the base dependencies only."""

import os
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {"train", "bench", "budget", "probes", "dev", "flash", "quack", "trl", "verl", "vllm"}
TRAINERS = ("transformers", "trl", "verl", "liger_kernel", "peft", "triton")
SMOKE = """
import importlib.util, pathlib, torch
import actial_fast
from actial_fast import AdvantageSpec, GRPOSpec, group_advantages, linear_grpo_loss
from actial_fast.packing import native
from actial_fast.ops import reference
assert "site-packages" in actial_fast.__file__ and native.AVAILABLE, native.WHY_NOT
assert not [name for name in ("transformers", "trl", "peft", "PIL", "yaml") if importlib.util.find_spec(name)]
torch.manual_seed(0)
targets, ends = torch.randint(0, 50, (12,)), torch.tensor([0, 3, 7, 12])
advantages = group_advantages(torch.tensor([1.0, 0.0, 0.5]), torch.zeros(3, dtype=torch.int64), AdvantageSpec())
advantages = advantages.repeat_interleave(ends.diff())
spec = GRPOSpec.named("dapo", beta=0.04)
old, ref = (-4 + 0.1 * torch.randn(12) for _ in range(2))
gradients = []
for function in (linear_grpo_loss, reference.linear_grpo_loss):
    torch.manual_seed(1)
    hidden, head = torch.randn(12, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    weights = actial_fast.token_weights(spec, ends)
    loss = function(hidden, head, targets, advantages, old, ref, spec, token_weight=weights)[0]
    loss.backward()
    gradients.append((loss.detach(), hidden.grad, head.grad))
for ours, plain in zip(*gradients, strict=True):
    assert plain.abs().max() > 1e-3
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=2e-5)  # ratios of up to a hundred
shipped = pathlib.Path(actial_fast.__file__).parent
assert (shipped / "recipes/quickstart.yaml").is_file() and (shipped / "py.typed").is_file() and (shipped / "kernels/head.py").is_file()
print("smoke test passed")
"""


def copied(to: Path) -> Path:
    """The repository without what was built in it."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__", ".*", "build", "runs", "dist", "*.egg-info", "results")
    return shutil.copytree(ROOT, to / "repository", symlinks=True, ignore=ignored)


def run(*command: object, **kwargs: object) -> str:
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel built where no compiler works, unpacked, and what the build said."""
    folder = tmp_path_factory.mktemp("wheel")
    command = (sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", folder, copied(folder))
    said = run(*command, env={**os.environ, "CC": "/bin/false", "CXX": "/bin/false"})
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked", said


def shipped(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def expected() -> set[str]:
    """What an installation needs of the repository, symlinks followed."""
    package = ROOT / "actial_fast"
    found = {path for path in package.rglob("*.py")} | set(package.glob("kernels/*.py"))
    found |= {*package.glob("recipes/*.yaml"), *package.glob("report/*.js")}
    return {str(path.relative_to(ROOT)) for path in found} | {"actial_fast/py.typed"}


def test_a_wheel_holds_the_package_and_nothing_else(built):
    unpacked, _ = built
    (info,) = unpacked.glob("*.dist-info")
    held = {path for path in shipped(unpacked) if not path.startswith(info.name)}
    assert held == expected()
    assert {"actial_fast/kernels/head.py", "actial_fast/recipes/quickstart.yaml", "actial_fast/data/sources/row.py"} <= held
    assert not (unpacked / "actial_fast/kernels").is_symlink()
    assert {path.name for path in (info / "licenses").iterdir()} == {"LICENSE", "NOTICE"}


def test_base_dependencies_and_extras(built):
    (metadata,) = built[0].glob("*.dist-info/METADATA")
    message = message_from_string(metadata.read_text())
    base = {name_of(need) for need in message.get_all("Requires-Dist") if "extra ==" not in need}
    assert base == {"torch", "triton", "numpy"}
    assert set(message.get_all("Provides-Extra")) == EXTRAS and message["License-Expression"] == "Apache-2.0"


def name_of(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement).group().lower().replace("_", "-")


def test_what_make_test_installs_is_pinned():
    pinned = {name_of(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")}
    needed = {name_of(need) for extra in ("train", "dev", "bench", "probes") for need in PROJECT["optional-dependencies"][extra]}
    assert needed <= pinned, needed - pinned


def test_without_a_compiler_the_build_goes_on_and_says_what_is_slower(built):
    unpacked, said = built
    assert "WITHOUT its C++ extension" in said and "no C++17 compiler" in said
    code = (
        "import numpy, actial_fast; from actial_fast.packing import native\n"
        "print(actial_fast.__file__); print(native.AVAILABLE); print(native.WHY_NOT)\n"
        "image = numpy.zeros((28, 28, 3), numpy.uint8)\n"
        "print(native.patchify(image, patch=14, merge=2, frames=2, mean=numpy.zeros(3), std=numpy.ones(3)).shape)"
    )
    alone = {**os.environ, "PYTHONPATH": f"{unpacked}:{sysconfig.get_path('purelib')}"}  # -S: without the editable installation's finder
    where, available, why, shape = run(sys.executable, "-SP", "-c", code, env=alone).splitlines()
    assert where.startswith(str(unpacked)) and available == "False" and shape == "(4, 1176)"
    assert "slower" in why and "Python plans" in why


def test_importing_loads_no_trainer_and_takes_little_more_than_torch():
    """Every public name, in three fresh processes; processor time, because the time on the clock shakes with other load."""
    code = (
        "import sys, time; start = time.process_time()\n"
        "import torch; torch_alone = time.process_time() - start; before = set(sys.modules)\n"
        "from actial_fast import *; print((time.process_time() - start) / torch_alone)\n"
        f"print(*[name for name in {TRAINERS} if name in sys.modules], *['actial_fast.ops.api' in x for x in (sys.modules, before)])"
    )
    ratios = []
    for _ in range(3):
        ratio, loaded = run(sys.executable, "-c", code).splitlines()
        assert loaded == "True False"
        ratios.append(float(ratio))
    assert statistics.median(ratios) < 1.5, ratios


@pytest.mark.slow
def test_a_clean_installation_of_what_is_released(tmp_path):
    """sdist, wheel from the sdist in a clean environment, and the wheel in a fresh venv with the base dependencies only."""
    run(sys.executable, "-m", "build", "--outdir", tmp_path / "dist", copied(tmp_path))
    (sdist,), (wheel,) = (tmp_path / "dist").glob("*.tar.gz"), (tmp_path / "dist").glob("*.whl")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2]: member for member in archive for name in [member.name]}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").iterdir()}
    assert expected() | sources | {"LICENSE", "NOTICE", "CHANGELOG.md", "pyproject.toml", "setup.py"} <= set(held)
    assert not any(member.issym() for member in held.values()) and not any(name.endswith(".so") for name in held)
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    (extension,) = names - expected()
    assert extension.startswith("actial_fast/_C.")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    run(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", "torch")
    run(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel)
    installed = {name_of(line) for line in run(python, "-m", "pip", "list", "--format=freeze").splitlines()}
    assert {"actial-fast", "torch", "numpy"} <= installed and not installed & {"transformers", "pillow", "pyyaml", "trl"}
    print(run(python, "-m", "pip", "check"), run(python, "-c", SMOKE, cwd=tmp_path))
    assert "usage: actial" in run(tmp_path / "venv/bin/actial", "--help", cwd=tmp_path)


def test_the_recipes_that_ship_are_found_outside_of_the_repository(tmp_path):
    said = run(sys.executable, "-P", "-m", "actial_fast.cli", "recipe", "show", "recipes/quickstart.yaml", cwd=tmp_path)
    assert "quickstart" in said and not list(tmp_path.iterdir())

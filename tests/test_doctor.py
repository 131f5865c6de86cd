"""The doctor tells the truth about this machine, and survives what it is there to find: missing, damaged and crashing packages."""

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest

from actial_fast import doctor as module
from actial_fast.cli.main import main
from actial_fast.doctor import SUPPORTED, Check, doctor
from actial_fast.packing import native

ROOT = Path(__file__).resolve().parents[1]
FACTS = {"threads": 4, "cuda_build": "13.0", "devices": [], "nccl": "2.29.3", "gloo": True, "bf16_cpu": True}


def test_this_machine():
    checks = doctor()
    found = {check.name: check for check in checks}
    assert len(found) == len(checks)
    for name in ("torch", "numpy", "transformers"):
        assert (found[name].state, found[name].version) == ("works", importlib.metadata.version(name)), found[name]
    assert found["python"].state == found["Pillow"].state == found["gloo"].state == found["disk"].state == "works"
    assert found["peft"].state in ("installed", "not here")
    assert (found["C++ extension"].state == "works") == native.AVAILABLE
    assert all(check.detail for check in checks if check.state in ("not here", "broken"))
    groups = [check.group for check in checks]
    assert list(dict.fromkeys(groups)) == ["Core", "Devices", "Training", "Optional"] and groups == sorted(
        groups, key=["Core", "Devices", "Training", "Optional"].index
    )


def test_supported_versions_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    stated = {"python": project["requires-python"]}
    for requirement in (*project["dependencies"], *project["optional-dependencies"]["train"]):
        name, bounds = re.match(r"([\w-]+)([^;]*)", requirement).groups()
        stated[name] = bounds
    for name, (first, beyond) in SUPPORTED.items():
        bounds = dict(re.findall(r"(>=|<)\s*([\d.]+)", stated[name]))
        assert bounds == {**({">=": first} if first else {}), "<": beyond}, name


@pytest.mark.parametrize(
    ("name", "version", "state", "says"),
    [
        ("torch", "2.11.0", "works", "2.11 to below 2.15"),
        ("torch", "2.14.1+cu130", "works", ""),
        ("torch", "2.10.2", "broken", 'pip install "torch>=2.11,<2.15"'),
        ("torch", "2.15.0rc1", "broken", "outside the tested range"),
        ("transformers", "5.9.0", "broken", "outside the tested range"),
        ("numpy", "2.10.0", "broken", "interpreter fails"),  # 10 > 4 as numbers, not as text
        ("numpy", "2.3.9", "works", ""),
        ("numpy", "2.4.0", "broken", 'interpreter fails.*pip install "numpy<2.4"'),
        ("triton", None, "broken", "not installed"),
    ],
)
def test_versions(monkeypatch, name, version, state, says):
    monkeypatch.setattr(module, "_installed", lambda _: version)
    check = module._version(name)
    assert check.state == state and re.search(says, check.detail), check


@pytest.mark.parametrize(("version", "state"), [("3.10.14", "broken"), ("3.11.7", "works"), ("3.13.0", "works"), ("3.14.0", "broken")])
def test_a_python_that_was_not_tried_is_told(monkeypatch, version, state):
    monkeypatch.setattr(module.platform, "python_version", lambda: version)
    assert module._version("python").state == state


def test_the_interpreter_mode_is_shown(monkeypatch):
    monkeypatch.setattr(module, "_installed", lambda _: "3.6.0")
    for value, shown in (("1", True), ("0", False)):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        assert ("TRITON_INTERPRET is set" in module._version("triton").detail) == shown


def fake_package(folder, name, code):
    (folder / f"{name}-1.5.dist-info").mkdir(parents=True)
    (folder / f"{name}-1.5.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
    (folder / f"{name}.py").write_text(code)


@pytest.mark.parametrize(
    ("code", "state", "says"),
    [
        ("", "works", "drawing"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "broken", "ends the process with SIGSEGV"),
        ("raise ImportError('libfoo.so.3: cannot open')", "broken", r"drawing: ImportError: libfoo\.so\.3: cannot open; pip install"),
        ("raise SystemExit(3)", "broken", "exit status 3"),
        ("import time; time.sleep(60)", "broken", "no answer within 1 s"),
    ],
    ids=["good", "segfault", "importerror", "exit", "hang"],
)
def test_a_package_that_fails_is_a_finding(tmp_path, monkeypatch, code, state, says):
    fake_package(tmp_path, "crayon", code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    if "sleep" in code:
        monkeypatch.setattr(module, "IMPORT_SECONDS", 1)
    check = module._package("Training", "Crayon", "crayon", "crayon", "drawing", "pip install crayon")
    assert (check.state, check.version) == (state, "1.5") and re.search(says, check.detail), check


def test_a_file_in_this_folder_does_not_pass_for_a_package(tmp_path, monkeypatch):
    (tmp_path / "colorsys.py").write_text("raise RuntimeError('not the package')")
    monkeypatch.chdir(tmp_path)
    assert module._child("import colorsys; print('fine')") == ("fine\n", "")


def test_a_missing_package_names_its_cure_and_counts_only_when_needed():
    absent = module._package("Training", "Crayon", "no-such-distribution", "crayon", "drawing", "pip install crayon")
    assert absent == Check("Training", "Crayon", "not here", "", "drawing: pip install crayon")
    assert module._package("Training", "rich", "no-such-distribution", "rich", "tables", "pip install rich").state == "broken"
    assert "needs an NVIDIA GPU" in module._accelerator("X", "no-such-distribution", "x", "speed", "x", gpu=False).detail
    assert module._accelerator("X", "no-such-distribution", "x", "speed", "x", gpu=True).detail == "speed: pip install x"


def test_the_extension(monkeypatch):
    monkeypatch.setattr(native, "AVAILABLE", False)
    monkeypatch.setattr(native, "WHY_NOT", "no compiler was there")
    check = module._extension()
    assert check.state == "not here" and "no compiler was there" in check.detail and "pip install -e ." in check.detail
    monkeypatch.setattr(native, "AVAILABLE", True)
    assert module._extension().state == "works"
    monkeypatch.delattr("actial_fast.packing.native")
    monkeypatch.setitem(sys.modules, "actial_fast.packing.native", None)
    assert module._extension().state == "broken"


def test_devices(monkeypatch):
    hopper, volta, wrong = (
        ["H100", "9.0", 70 * 2**30, 80 * 2**30, True, True],
        ["V100", "7.0", 2**30, 2**34, False, True],
        ["A100", "8.0", 2**30, 2**34, True, False],
    )
    found = {c.name: c for c in module._devices({**FACTS, "devices": [hopper, volta, wrong]})}
    assert found["CUDA 0"].state == "works" and "H100, capability 9.0, 70.0 of 80.0 GiB free" in found["CUDA 0"].detail
    assert [found[f"bf16 on CUDA {i}"].state for i in range(3)] == ["works", "not here", "broken"]
    assert "CUDA" not in found and (found["NCCL"].state, found["NCCL"].version) == ("works", "2.29.3")
    monkeypatch.setattr(module.shutil, "which", lambda _: None)
    monkeypatch.setattr(module.os.path, "exists", lambda _: False)
    for build, why in (("", "built without CUDA"), ("13.0", "no NVIDIA driver")):
        check = next(c for c in module._devices({**FACTS, "cuda_build": build}) if c.name == "CUDA")
        assert check.state == "not here" and why in check.detail
    monkeypatch.setattr(module.shutil, "which", lambda _: "nvidia-smi")
    assert any("CUDA_VISIBLE_DEVICES" in c.detail for c in module._devices(FACTS))
    assert {c.name: c.state for c in module._devices({**FACTS, "gloo": False, "nccl": False, "bf16_cpu": False})}.items() >= {
        "gloo": "not here",
        "NCCL": "not here",
        "bf16 on the CPU": "broken",
    }.items()


def test_a_torch_that_cannot_be_imported_does_not_end_the_doctor(monkeypatch, capsys):
    monkeypatch.setattr(module, "TRAINING", ())
    monkeypatch.setattr(module, "ACCELERATORS", ())
    monkeypatch.setattr(module, "TORCH_PROBE", "raise ImportError('libcudart.so.13: no such file')")
    monkeypatch.setenv("COLUMNS", "160")  # wide enough that the reason is not wrapped
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"torch +broken +ImportError: libcudart\.so\.13: no such file", out) and "Broken: torch." in out


def test_the_printout_is_aligned_without_colour_codes_and_without_rich(monkeypatch, capsys):
    checks = [
        Check("Core", "short", "works", "1.0", "fine"),
        Check("Core", "a longer name", "not here", "", "word " * 60),
        Check("Optional", "thing", "installed", "12.5.1+cu130", "x"),
    ]
    monkeypatch.setattr(module, "doctor", lambda: checks)
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "Everything that is needed works." in out
    lines = out.splitlines()
    assert max(map(len, lines)) <= 100
    column = next(line for line in lines if "fine" in line).index("fine")
    assert [line for line in lines if line.startswith(" " * column)] and all(
        line[column - 1] == " " and line[column] != " " for line in lines if line.startswith("  ")
    )

"""GPUs as one writes them."""

import math

import pytest

from actial_fast.budget import gpus


@pytest.mark.parametrize(
    ("text", "count", "memory", "name"),
    [
        ("8x80", 8, 80, "H100"),
        ("8x80GB", 8, 80, "H100"),
        (" 4 X 48 gb ", 4, 48, "L40S"),
        ("1x24", 1, 24, "4090"),
        ("8x141", 8, 141, "H200"),
        ("8xH100", 8, 80, "H100"),
        ("8xh200", 8, 141, "H200"),
        ("8xA100", 8, 80, "A100"),
        ("8xA100-40", 8, 40, "A100-40"),
        ("8xA100-80GB", 8, 80, "A100"),
        ("2xRTX 4090", 2, 24, "4090"),
        ("1xRTX A6000", 1, 48, "A6000"),
        ("4xNVIDIA L40S", 4, 48, "L40S"),
        ("3x64", 3, 64, None),
        ("16x80.5", 16, 80.5, None),
    ],
)
def test_what_one_writes(text, count, memory, name):
    machine = gpus.parse(text)
    assert (machine.count, machine.memory) == (count, memory * gpus.GB)
    assert (machine.sheet.name if machine.sheet else None) == name
    assert machine.guessed == text.strip()[-1].isdigit() or "GB" in text.upper() or not name or machine.sheet.memory == memory
    assert 0 < machine.usable < machine.memory


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("0x80", "no GPU at all"),
        ("8x", "8x80, 4x48"),
        ("x80", "8x80, 4x48"),
        ("", "8x80, 4x48"),
        ("80", "one GPU of that size is 1x80"),
        ("8*80", "did you mean 8x80"),
        ("8,80", "did you mean 8x80"),
        ("8x80x2", "80x2 is not among"),
        ("8xTPU", "TPU is not among L4, A10"),
        ("8xA100-64", "not among"),
        ("1x2", "no GPU's memory"),
        ("1x9000", "no GPU's memory"),
        ("-1x80", "got '-1x80'"),
        ("8x-80", "not among"),
        ("1xnan", "not among"),
    ],
)
def test_what_one_mistypes_is_told_with_how_to_write_it(text, hint):
    with pytest.raises(ValueError, match="--gpus: write how many and their memory in GB, like 8x80") as found:
        gpus.parse(text)
    assert hint in str(found.value)


def test_several_ranks_leave_less_of_each_device():
    assert gpus.parse("1x80").usable - gpus.parse("2x80").usable == gpus.CHANNELS


def test_the_host_is_known_where_it_was_said():
    machine = gpus.parse("1x80")
    assert math.isinf(gpus.with_host(machine, None).host) and gpus.with_host(machine, 64).host == 64e9
    with pytest.raises(ValueError, match="--host"):
        gpus.with_host(machine, 0)

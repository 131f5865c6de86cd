"""The error table: ours is never the worst and within twice torch in the same dtype, and the table tells everything it should."""

import copy
import json

import pytest
import torch

from bench.kernels import accuracy

SIZES = (12, 16, 67, 3)  # T, H, V, S


@pytest.fixture(scope="module")
def rows():
    return accuracy.measure(SIZES)


def test_ours_is_never_the_worst_and_within_twice_torch(rows):
    assert accuracy.findings(rows) == []


def test_every_implementation_is_measured_or_listed_with_a_reason(rows):
    assert len(rows) == len(accuracy.DTYPES) * len(accuracy.CASES) * len(accuracy.IMPLEMENTATIONS)
    for row in rows:
        answered = [name for name in accuracy.QUANTITIES if row.get(f"{name}_max") is not None]
        assert bool(row["missing"]) != bool(answered), row
        if row["ours"] and not row["missing"]:
            assert len(answered) == len(accuracy.QUANTITIES), row
    ran = {row["implementation"] for row in rows if not row["missing"]}
    assert {"torch eager", "TRL chunked log-prob", "Liger fused linear GRPO"} <= ran and sum("Triton" in name for name in ran) == 2
    text = accuracy.markdown(rows)
    for row in rows:
        assert f"| {row['implementation']} |" in text
    assert accuracy.DEVICE == "cuda" or "needs a GPU" in text


@pytest.mark.parametrize("column", ["logp_max", "entropy_rms", "dhidden_rms", "dweight_max"])
def test_a_larger_error_of_ours_is_found(rows, column):
    rows = copy.deepcopy(rows)
    row = next(row for row in rows if row["ours"] and not row["missing"] and row["case"] == "scale 16")
    row[column] = 1.0
    found = accuracy.findings(rows)
    assert len(found) == 2 and all(column in line and row["implementation"] in line for line in found)
    row[column] = float("inf")  # what NaN counts as
    assert len(accuracy.findings(rows)) == 2


def test_not_a_number_counts_as_infinitely_wrong():
    inputs = accuracy.make("scale 1", accuracy.DTYPES["float32"], SIZES, seed=0)
    answers = {name: value.clone() for name, value in inputs.exact.items()}
    assert set(accuracy.errors(answers, inputs.exact).values()) == {0.0}
    answers["logp"][3] = float("nan")
    assert accuracy.errors(answers, inputs.exact)["logp_max"] == float("inf")


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(rows):
    assert accuracy.measure(SIZES, 0, cases=("scale 4",)) == [row for row in rows if row["case"] == "scale 4"]
    first, other = (accuracy.make("scale 4", accuracy.DTYPES["float32"], SIZES, seed) for seed in (0, 1))
    assert not torch.equal(first.hidden, other.hidden)


def test_the_cases_are_what_their_names_say():
    largest = {name: accuracy.make(name, accuracy.DTYPES["bfloat16"], SIZES, 0).largest_logit for name in accuracy.CASES}
    assert 2 < largest["scale 1"] < 8 and 30 < largest["scale 16"] < 120
    inputs = accuracy.make("all near -10^4", accuracy.DTYPES["bfloat16"], SIZES, 0)
    assert (inputs.hidden.double() @ inputs.weight.double().T).max() < -9900
    inputs = accuracy.make("one dominant token", accuracy.DTYPES["bfloat16"], SIZES, 0)
    assert (inputs.hidden.double() @ inputs.weight.double().T).softmax(-1)[:, 7].min() > 0.99


def test_a_table_that_is_cut_off_leaves_what_it_has(monkeypatch, tmp_path):
    make = accuracy.make
    monkeypatch.setattr(accuracy, "SIZES", {accuracy.DEVICE: SIZES})
    monkeypatch.setattr(accuracy, "make", lambda case, *rest: make(case, *rest) if case == next(iter(accuracy.CASES)) else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        accuracy.main(["--json", str(tmp_path / "new" / "a.json")])
    rows = json.loads((tmp_path / "new" / "a.json").read_text())["rows"]
    assert len(rows) == len(accuracy.IMPLEMENTATIONS) and any(row.get("logp_max") for row in rows)

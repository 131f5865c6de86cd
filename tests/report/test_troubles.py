"""Signs of trouble: each is found where it was planted, with its steps, and a run that goes well has none."""

from pathlib import Path

import pytest

from actial_fast.evaluation.statistics import Record, accuracy_table
from actial_fast.report.troubles import SIGNS, signs, warned


def run(**changed):
    """120 quiet steps of GRPO, but for those metrics: {step: value}."""
    quiet = {
        "zero_variance_groups": 0.3,
        "kl": 0.02,
        "grad_norm": 0.4,
        "clip_fraction": 0.05,
        "finished": 0.99,
        "rejected_rows": 0,
        "response_length": 90,
    }
    return [{"stage": "grpo", "step": i} | {k: changed.get(k, {}).get(i, v) for k, v in quiet.items()} for i in range(1, 121)]


def span(first, last, value):
    return dict.fromkeys(range(first, last + 1), value)


def table(*accuracies):
    """Evaluations every 50 steps, with intervals of 3 points to either side."""
    return {"v": {"sft": {50 * i: {"overall": {"accuracy": a, "interval": [a - 0.03, a + 0.03]}} for i, a in enumerate(accuracies)}}}


@pytest.mark.parametrize(
    ("changed", "begins", "worst"),
    [
        ({"zero_variance_groups": span(61, 120, 0.8)}, "grpo steps 69 to 120: more than half of the groups", "(at worst 80%)"),
        ({"kl": {40: 0.11, 90: 0.2}}, "grpo steps 40, 90: the KL", "(at worst 0.2)"),
        ({"kl": {i: 0.3 for i in (25, 50, 75, 100, 115)}}, "grpo steps 25, 50, 75 and 2 more times: the KL", "(at worst 0.3)"),
        ({"grad_norm": {77: 4.1}}, "grpo step 77: the gradient's norm", "(at worst 4.1)"),
        ({"clip_fraction": span(1, 20, 0.25)}, "grpo steps 20 to 24: more than a fifth", "(at worst 25%)"),
        ({"finished": span(101, 120, 0.5)}, "grpo steps 104 to 120: more than a tenth of the replies", "(at worst 50%)"),
        ({"response_length": span(61, 120, 800)}, "grpo steps 66 to 120: replies were more than 3 times as long", "(at worst 800)"),
        ({"rejected_rows": span(30, 120, 3)}, "grpo step 30: rows could not be used", "(at worst 3)"),
    ],
    ids=["equal rewards", "kl", "kl, often", "gradient", "clipped", "cut off", "long", "rejected"],
)
def test_planted(changed, begins, worst):
    (line,) = signs(run(**changed), {})
    assert line.startswith(begins) and worst in line and line.endswith(".")


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"zero_variance_groups": span(50, 56, 0.8)},  # a few steps of it
        {"kl": {40: 0.09}},
        {"kl": span(1, 120, 0.0) | {60: 0.009}},  # nothing grows to next to nothing
        {"grad_norm": {5: 40.0}},  # the first steps have nothing to be compared with
        {"response_length": span(1, 60, 8.0)},  # longer than it was, and short
    ],
)
def test_quiet(changed):
    assert signs(run(**changed), {}) == []


def test_figures_that_are_no_numbers():
    (line,) = signs(run(kl=span(7, 9, float("nan")) | {50: float("inf")}), {})
    assert line.startswith("grpo steps 7 to 9, 50: kl was NaN or infinite.")
    assert signs(run(entropy=span(1, 120, float("nan"))), {}) == [], "and others are not asked about"


def test_a_short_run_has_no_means():
    assert signs([r for r in run(zero_variance_groups=span(1, 120, 1.0)) if r["step"] < 20], {}) == []


def test_steps_that_are_logged_now_and_then_are_one_range():
    few = [record for record in run(zero_variance_groups=span(1, 120, 0.9)) if record["step"] % 3 == 0]
    assert signs(few, {})[0].startswith("grpo steps 60 to 120: ")


@pytest.mark.parametrize(
    ("accuracies", "told"), [((0.5, 0.9, 0.8), True), ((0.5, 0.9, 0.85), False), ((0.9, 0.8, 0.9), False), ((0.4,), False)]
)
def test_accuracy_after_its_peak(accuracies, told):
    lines = signs([], table(*accuracies))
    assert [line.startswith("sft step 100: accuracy on v fell from 90.0% at step 50 to 80.0%") for line in lines] == [True] * told


def answered(right, of=40, pairs=True):
    """An evaluation in which the first `right` of `of` rows are."""
    records = [Record("a", k < right, True, 1, "x", 2, (f"{k}",), row=f"row{k:05d}" if pairs else "") for k in range(of)]
    return accuracy_table(records)


@pytest.mark.parametrize(
    ("best", "last", "why"),
    [
        (answered(36), answered(30), "the paired 95% interval of the change lies below 0"),  # their own intervals meet
        (answered(36, pairs=False), answered(30, pairs=False), ""),
        (answered(36, pairs=False), answered(10, pairs=False), "the 95% intervals do not meet"),
        (answered(36), answered(35), ""),
        (answered(36), answered(40, of=80), ""),  # other rows: no fall of anything
    ],
    ids=["paired", "not paired", "not paired, far", "one row", "other rows"],
)
def test_accuracy_is_compared_on_the_same_rows(best, last, why):
    lines = signs([], {"v": {"sft": {50: best, 100: last}}})
    assert [why in line for line in lines] == [True] * bool(why)


def test_what_a_run_warned_of():
    def event(kind, about):
        return {"stage": "sft", "step": 1200, "kind": kind, kind: about}

    assert warned(
        [event("skipped", {"rows": list("abcde")}), event("redrawn", {"text": "so it is"}), {"stage": "a", "step": 1, "kind": "eval"}]
    ) == [
        "sft step 1,200: loss or gradient was NaN or infinite and was not applied; rows a, b, c and 2 more",
        "sft step 1,200: so it is",
    ]


def test_every_sign_is_of_a_metric_that_a_loop_records():
    package = Path(__file__).parents[2] / "actial_fast"
    loops = "".join((package / path).read_text(encoding="utf-8") for path in ("sft.py", "grpo.py", "train/samples.py"))
    assert [sign.metric for sign in SIGNS if f'"{sign.metric}"' not in loops] == []

"""Losses of held-out rows on the page of a run, and on that of two."""

import math
import re

import pytest

from actial_fast.report.compared import write_comparison
from actial_fast.report.held_out import losses_of, risen
from actial_fast.report.metrics import MetricLog, read_metrics
from actial_fast.report.page import write_report


def run(folder, losses, stage="sft", name="own/val <b>"):
    """A stage of ten steps a measurement, in which the training loss falls."""
    with MetricLog(folder, stage=stage, total=10 * len(losses) - 10, tensorboard=False) as log:
        for place, loss in enumerate(losses):
            for step in range(10 * place - 9, 10 * place + 1) if place else ():
                log.step(step, {"loss": 3 / step, "seconds": 0.1})
            log.losses(10 * place, {name: (loss, math.exp(min(loss, 700)), 1234, 60)})
    return folder


def test_a_page_has_the_first_the_least_and_the_last(tmp_path):
    page = write_report(run(tmp_path, [2.5, 1.25, 1.5])).read_text()
    assert "<b>2.5000</b> at sft step 0 &rarr; <b>1.5000</b> at sft step 20" in page and "own/val &lt;b&gt;" in page
    table = re.search(r"<th>own/val &lt;b&gt;</th>.*?</tr>", page).group()
    assert re.findall(r"\d\.\d{4}", table) == ["2.5000", "1.2500", "1.5000"] and "perplexity 12.18" in table and "1,234" in table
    assert "Loss of held-out rows" in page and "training rows" in page
    assert "the loss of own/val &lt;b&gt; has risen from 1.2500 at step 10 to 1.5000" in page
    assert "perplexity</figcaption>" not in page and "No evaluation yet" not in page


@pytest.mark.parametrize(
    ("losses", "told"), [([2.0, 1.0, 1.01], 0), ([2.0, 1.0, 1.1], 1), ([2.0], 0), ([math.nan, 1.0, 2.0], 1), ([1.0, 2.0], 1)]
)
def test_a_loss_has_risen_where_it_is_a_fiftieth_above_the_least(losses, told, tmp_path):
    assert len(risen(losses_of(read_metrics(run(tmp_path, losses))))) == told


def test_a_loss_without_end_is_drawn_as_none(tmp_path):
    page = write_report(run(tmp_path, [math.inf, math.nan, 1.0])).read_text()
    assert "values are NaN or infinite" in page and "<b>1.0000</b> at sft step 20" in page


def test_two_runs_have_their_losses_in_one_picture(tmp_path):
    page = write_comparison([run(tmp_path / "one", [2.0, 1.0]), run(tmp_path / "two", [2.0, 1.5])], tmp_path / "both.html").read_text()
    figure = next(part for part in page.split("<figure") if "Loss of held-out rows" in part)
    for label in ("one", "two"):
        assert f"training rows, {label}" in figure and f"own/val &lt;b&gt;, {label}" in figure


def test_a_stage_of_grpo_has_no_training_loss_beside_them(tmp_path):
    with MetricLog(tmp_path, stage="grpo", total=1, tensorboard=False) as log:
        log.losses(0, {"own": (2.0, 7.4, 5, 1)})
        log.step(1, {"loss": 0.1, "reward": 0.5})
        log.losses(1, {"own": (1.0, 2.7, 5, 1)})
    figure = next(part for part in write_report(tmp_path).read_text().split("<figure") if "Loss of held-out rows" in part)
    assert "training rows" not in figure

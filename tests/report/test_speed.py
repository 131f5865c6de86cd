"""Bars of a step's phases: how high, how many, in which order; and runs that say nothing of them."""

import math
import re

import pytest

from actial_fast.report.bars import BARS, stacked_bars
from actial_fast.report.chart import BOTTOM, HEIGHT, TOP
from actial_fast.report.metrics import MetricLog
from actial_fast.report.page import write_report
from actial_fast.report.speed import COLOUR, _seconds

COLOURS = dict.fromkeys("ab", "red")


def rectangles(figure: str) -> list[list[tuple[float, float, float, float]]]:
    """Of each part its bars: left, top, width, height."""
    shapes = re.findall(r'class="bars" style="[^"]*" d="([^"]*)"', figure)
    shape = re.compile(r"M([\d.]+),([\d.]+)h([\d.]+)v([\d.]+)H[\d.]+z")
    return [[tuple(map(float, found)) for found in shape.findall(path)] for path in shapes]


def test_parts_stand_on_one_another_in_proportion():
    lower, upper = rectangles(stacked_bars("t", {"a": {1: 1.0, 2: 3.0}, "b": {1: 2.0, 2: 1.0}}, "s", 2, COLOURS))
    unit = (HEIGHT - BOTTOM - TOP) / 1.04 / 4
    assert [h for *_, h in lower] == pytest.approx([unit, 3 * unit], abs=0.1)
    assert [h for *_, h in upper] == pytest.approx([2 * unit, unit], abs=0.1)
    for (left, top, width, height), (x, y, w, h) in zip(lower, upper, strict=True):
        assert (
            (x, w) == (left, width) and y + h == pytest.approx(top, abs=0.11) and top + height == pytest.approx(HEIGHT - BOTTOM, abs=0.11)
        )


@pytest.mark.parametrize("last", [1, BARS, BARS + 1, 1000, 12345])
def test_there_are_never_more_bars_than_can_be_told_apart(last):
    figure = stacked_bars("t", {"a": {step: float(step % 2) + 1 for step in range(1, last + 1)}}, "s", last, COLOURS)
    (bars,) = rectangles(figure)
    together = math.ceil(last / BARS)
    assert len(bars) == math.ceil(last / together) <= BARS and ("is the mean of" in figure) == (together > 1)
    assert all(w > 0 for _, _, w, _ in bars) and len(figure) < 30_000
    if together > 1 and last % (2 * together) == 0:
        assert len({h for *_, h in bars}) == 1, "a mean of as many of both"


def test_a_bar_far_above_the_rest_is_cut_and_told():
    figure = stacked_bars("t", {"a": {step: 1.0 for step in range(1, 11)}, "b": {10: 99.0}}, "s", 10, COLOURS)
    assert "1 of 10 bars above the axis, up to 100" in figure
    lower, upper = rectangles(figure)
    assert len(lower) == 10 and len(upper) == 1 and upper[0][1] >= TOP and upper[0][3] == pytest.approx(3 * lower[0][3], abs=0.3)


def test_steps_without_a_value_leave_no_bar_and_what_is_not_finite_no_height():
    (bars,) = rectangles(stacked_bars("t", {"a": {2: 1.0, 4: math.nan, 5: 1.0}}, "s", 6, COLOURS))
    assert (
        len(bars) == 2 and stacked_bars("t", {}, "s", 6, {}) == "" and rectangles(stacked_bars("t", {"a": {1: 0.0}}, "s", 1, COLOURS)) == []
    )


def test_a_step_has_its_line_and_what_came_behind_it(tmp_path):
    with MetricLog(tmp_path, stage="s", total=2, tensorboard=False) as log:
        for step in (1, 2):
            log.step(step, {"loss": 1.0, "seconds": 3.0, "seconds/update": 2.5, "seconds/zebra": 0.25, "seconds/other": 0.25})
        log.event("phases", {"seconds/save": 7.0, "seconds/other": 0.5, "peak_gib": 1.0}, 2)
        log.event("phases", {"seconds/eval": 9.0, "seconds/other": 0.0}, 0)  # before the first step: nobody's
    from actial_fast.report.metrics import read_events, read_metrics

    parts = _seconds(read_metrics(tmp_path), read_events(tmp_path), "s")
    assert list(parts) == ["update", "save", "zebra", "other"] and list(COLOUR)[-2:] == ["save", "eval"]
    assert parts == {"update": {1: 2.5, 2: 2.5}, "save": {2: 7.0}, "zebra": {1: 0.25, 2: 0.25}, "other": {1: 0.25, 2: 0.75}}
    html = write_report(tmp_path).read_text()
    assert html.count('aria-label="Seconds of a step, s"') == 1 and html.count('class="bars"') == 4


def test_a_run_of_before_has_no_such_section(tmp_path):
    with MetricLog(tmp_path, stage="s", total=1, tensorboard=False) as log:
        log.step(1, {"loss": 1.0, "seconds": 3.0, "tokens_per_s": 10.0, "sampling_seconds": 2.0})
    html = write_report(tmp_path).read_text()
    assert "Where the time goes" not in html and 'aria-label="Seconds per step"' in html

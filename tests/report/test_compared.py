"""Several runs on one page: what differs, the same rows, and the curves in one picture."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from actial_fast.report.chart import DASHES
from actial_fast.report.compared import labels, write_comparison
from actial_fast.report.metrics import read_events
from actial_fast.report.page import write_report
from actial_fast.report.paired import paired
from tests.report.test_page import log_evals, result, whole_page, write_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of one recipe but for a learning rate; the second stopped in its GRPO, and its rows are the same."""
    root = tmp_path_factory.mktemp("runs")
    for seed, (name, steps) in enumerate((("a", 40), ("b", 20))):
        run = write_run(root / name, ("sft", "grpo"), (40, steps), finished=name == "a", rows=True, seed=seed)
        recipe = f"run: runs/{name}\nsteps: 5\nsft:\n  optim: {{lr: {'1e-3' if name == 'a' else '2e-3'}, warmup: 1}}\n"
        recipe += f"  data: {{sources: [{{path: runs/{name}/t.jsonl, weight: 1}}, {{path: x, weight: {1 if name == 'a' else 2}}}]}}\n"
        (run / "recipe.yaml").write_text(recipe)
        (run / "versions.json").write_text(json.dumps({"torch": "2.13", "driver": name}))
    return root / "a", root / "b"


def test_two_runs_stand_side_by_side(runs):
    a, b = runs
    html, _, text = whole_page(write_comparison([a, b], a / "compared.html"))
    tables = [[e for e in read_events(run) if e["kind"] == "eval"][-1]["result"] for run in runs]
    change = paired(*tables)
    assert change.low < 0 < change.high
    difference, *ends = (f"{100 * share:+.1f}".replace("-", "\u2212") for share in (change.difference, change.low, change.high))
    assert f"a after grpo \u2192 b after grpo: {difference} points, 95% interval {' to '.join(ends)}: no clear change" in text
    assert f"the same 300 rows; right only a after grpo: {change.only_first}, only b after grpo: {change.only_second}" in text
    (differ,) = re.findall("What differs in the recipes</h2>(.*?)</section>", html, re.DOTALL)
    assert re.findall("<tr><th>(.*?)</th>(.*?)</tr>", differ)[1:] == [
        ("sft.optim.lr", '<td data-label="a">1e-3</td><td data-label="b">2e-3</td>'),
        ("sft.data.sources[1].weight", '<td data-label="a">1</td><td data-label="b">2</td>'),
    ]
    assert "driver" in text and "a finished" in text.replace(": ", " ") and "unfinished: last record is grpo step 20" in text
    charts = dict(re.findall(r'aria-label="([^"]*)">.*?<script type="application/json">(.*?)</script>', html))
    kl = json.loads(charts["KL to the reference, per token"])
    assert [(line["name"], line["colour"], line["dash"]) for line in kl["lines"]] == [("a", 0, ""), ("b", 1, "")]
    assert kl["spans"][0][3] == 40 and [len(line["stages"]["grpo"][1]) for line in kl["lines"]] == [40, 20]
    reward = json.loads(charts["Reward and its parts"])
    assert [(line["name"], line["colour"], line["dash"]) for line in reward["lines"]] == [
        (f"{name}, {run}", colour, DASHES[k])
        for colour, name in enumerate(("reward", "reward/format", "reward/accuracy"))
        for k, run in enumerate("ab")
    ]


def test_curves_over_time_have_each_runs_own_pace(runs, tmp_path):
    """Twice as slow a run ends twice as late; pauses between steps take no time, and evaluations stand where their step ended."""
    folders = []
    for name, pace in (("quick", 40.0), ("slow", 80.0)):
        run = Path(shutil.copytree(runs[0], tmp_path / name))
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        (run / "metrics.jsonl").write_text("".join(json.dumps({**r, "seconds": pace, "seconds/update": pace}) + "\n" for r in records))
        folders.append(run)
    html, _, _ = whole_page(write_comparison(folders, tmp_path / "compared.html"))
    charts = dict(re.findall(r'aria-label="([^"]*)">.*?<script type="application/json">(.*?)</script>', html))
    loss, reward = (json.loads(charts[f"{title} over minutes"]) for title in ("Supervised loss", "Reward"))
    assert [span[0::3] for span in loss["spans"]] == [["sft", 54]] and [span[0::3] for span in reward["spans"]] == [["grpo", 54]]
    places = [line["stages"]["sft"][0] for line in loss["lines"]]
    assert places == [[round(pace * n / 60, 3) for n in range(1, 41)] for pace in (40, 80)]
    by_step = json.loads(charts["Supervised loss, all stages (nats per answer token)"])
    assert [line["stages"]["sft"][1] for line in loss["lines"]] == [line["stages"]["sft"][1] for line in by_step["lines"]]
    (name,) = (title for title in charts if title.startswith("Accuracy over minutes"))
    at = [line["stages"]["grpo"][0] for line in json.loads(charts[name])["lines"]]
    evaluated = [e["step"] for e in read_events(folders[0]) if e["kind"] == "eval" and e["stage"] == "grpo"]
    assert at == [[round(pace * n / 60, 3) for n in evaluated] for pace in (40, 80)]
    html, _, _ = whole_page(write_report(folders[0]))
    assert "<summary>Learning by time</summary>" in html and "Reward over minutes" in html


def test_a_page_of_one_run_is_not_touched_and_alike_runs_differ_in_nothing(runs, tmp_path):
    a, _ = runs
    twin = tmp_path / "a"
    shutil.copytree(a, twin)
    page = write_report(a).read_bytes()
    _, _, text = whole_page(write_comparison([a, twin], tmp_path / "c.html"))
    assert (a / "report.html").read_bytes() == page
    assert text.count("Nothing.") == 2 and "+0.0 points; no interval, as all 100 clusters of rows changed alike: no clear change" in text


def test_single_stages_have_their_recipes_and_files_of_a_run_one_name(tmp_path):
    table = result(np.random.default_rng(1), 0.9, 0.0, rows=True)
    for name, lr in (("x", "1e-3"), ("y", "2e-3")):
        log_evals(tmp_path / name, "sft", (1, f"{name}/test", table), (2, f"{name}/test", table))
        (tmp_path / name / "sft").mkdir()
        (tmp_path / name / "sft" / "recipe.yaml").write_text(f"kind: sft\nrun: {tmp_path / name}\noptim: {{lr: {lr}}}\n")
    (tmp_path / "y" / "sft" / "step-000001").mkdir()
    html, _, text = whole_page(write_comparison([tmp_path / "x", tmp_path / "y"], tmp_path / "c.html"))
    assert '<tr><th>optim.lr</th><td data-label="x">1e-3</td><td data-label="y">2e-3</td></tr>' in html and "{run}/test" in text
    assert "y: unfinished: last record is sft step 2, last checkpoint step 1" in text and "no clear change (the same 300 rows" in text


def test_names_that_are_alike_are_told_apart(tmp_path):
    assert labels([tmp_path / "x" / "run", tmp_path / "y" / "run", tmp_path / "x" / "other"]) == ["x/run", "y/run", "x/other"]


def test_runs_that_cannot_be_compared_are_refused(runs, tmp_path):
    a, b = runs
    many = [([a], "give 2 to 4"), ([a, b] * 3, "give 2 to 4"), ([a, b, a], "given twice"), ([a, tmp_path], "folder of a run")]
    for folders, match in many:
        with pytest.raises(ValueError, match=match):
            write_comparison(folders, tmp_path / "c.html")
    assert not (tmp_path / "c.html").exists()

"""The report of synthetic runs: whole, partial, broken off; nothing fetched, nothing unescaped, the figures those of the events."""

import base64
import hashlib
import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from actial_fast.evaluation.statistics import Record, accuracy_table
from actial_fast.report import chart
from actial_fast.report.chart import Guide, Series, line_chart, moving_average, number
from actial_fast.report.metrics import MetricLog
from actial_fast.report.page import write_report
from actial_fast.report.paired import paired

KINDS = ("ego_translation", "object_translation", "ego_rotation")
VOID = {"meta", "br", "img", "line", "path", "circle", "input"}


def result(rng, right, formed, n=300, rows=False):
    records = []
    for i in range(n):
        well = bool(rng.random() < formed)
        truth = ("left", "right")[rng.integers(2)]
        row = f"row{i:05d}" if rows else ""
        records.append(Record(KINDS[i % 3], bool(rng.random() < right), well, 24 if well else 2, truth, 3, (f"{i // 3}",), row=row))
    return accuracy_table(records)


def write_run(run, stages=("base", "sft", "grpo"), steps=(240, 400, 80), finished=True, rows=False, seed=0):
    """A run as the quickstart would leave it: a plateau and a drop in SFT, the format rate rising in GRPO."""
    rng = np.random.default_rng(seed)
    run.mkdir(parents=True, exist_ok=True)
    for i in range(2):
        pixels = np.add.outer(np.arange(28) * 4, np.arange(28) * 3)[..., None] + np.array([40 * i, 60, 20])
        Image.fromarray((pixels + rng.integers(0, 30, pixels.shape)).astype(np.uint8)).save(run / f"view{i}.png")
    for stage, total in zip(stages, steps, strict=True):
        with MetricLog(run, stage=stage, total=total, tensorboard=False) as log:
            for step in range(1, total + 1):
                done = step / total
                common = {"grad_norm": float(rng.lognormal(-0.5, 0.4)), "lr": 1e-3 * min(1, step / 50), "seconds": 0.2}
                common["tokens_per_s"] = float(rng.normal(9000, 500))
                if stage != "grpo":
                    drop = 1 / (1 + np.exp(18 * (done - 0.45)))
                    log.step(step, {"loss": float((0.06 + 0.66 * drop) * rng.lognormal(0, 0.1)), "answer_tokens": 130.0, **common})
                    if step == 1 and stage == "base":
                        log.event("eval", {"held-out": result(rng, 0.33, 0.0, rows=rows)}, step=0)
                    if step % 40 == 0:
                        log.event("eval", {"held-out": result(rng, 0.5 + 0.46 * (1 - drop), 0.1, rows=rows)})
                    continue
                formed = 0.12 + 0.8 * (1 - np.exp(-4 * done))
                parts = {"reward/format": float(np.clip(rng.normal(formed, 0.05), 0, 1)), "reward/accuracy": float(formed * 0.93)}
                grpo = {"loss": float(rng.normal(0, 0.01)), "reward": sum(parts.values()) / 2, **parts, "kl": 0.02 * done + 0.001}
                grpo |= {"response_length": 10 + 12 * done, "entropy": 0.8 - 0.5 * done, "clip_fraction": 0.02, "ratio_max": 1.0}
                log.step(step, {**grpo, "zero_variance_groups": 0.3 * done, **common})
                if step % 20 == 0 or step == 1:
                    log.event("eval", {"held-out": result(rng, 0.94, formed, rows=rows)}, step=step if step > 1 else 0)
                if step in (1, total // 2, total):
                    log.event("rollouts", rollouts(step / total))
    if finished:
        (run / "summary.json").write_text(json.dumps({"seed": 0, "seconds": {"base": 61.25, "sft": 90.5}, "images_per_s": 1234.5}))
        (run / "recipe.yaml").write_text("kind: quickstart\nseed: 0\n# <angle> & ampersand\n")
        (run / "versions.json").write_text(json.dumps({"python": "3.11.2", "torch": "2.13.0+cpu", "machine": "2 CPU threads"}))
    return run


def rollouts(done):
    out = []
    for group in range(4):
        for sample in range(5):
            good = (group + sample) / 8 < 0.3 + done
            text = "<think>The second camera stands further left, so seen from <b>it</b> the car turns.</think> <answer>A</answer>"
            reply = text if good else ("A", "B <answer>", "")[sample % 3]
            images, prompt = (
                ["view0.png", "view1.png"],
                f"<image><image>Question {group}: which way did the camera move?\nA. left B. right C. not",
            )
            out.append({"images": images, "prompt": prompt, "response": reply, "reward": float(good), "truth": "A"})
    return out


class Page(HTMLParser):
    """The page's tags (checked to nest), text and the addresses it names."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text, self.sources = [], [], [], []
        self.feed(html)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.text += [" "] * (tag in ("dt", "dd", "th", "td", "p", "h2", "h3"))
        self.sources += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.open[-1:] not in (["script"], ["style"]):
            self.text.append(data)


def page_of(run):
    return whole_page(write_report(run))


def whole_page(path):
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    places = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert all(source.startswith("data:image/") or source.removeprefix("#") in places for source in page.sources)
    assert not re.search(r"https?:|@import|url\(|<link", html)
    scripts = [attrs for tag, attrs in page.tags if tag == "script"]
    assert scripts[-1] == {} and all(attrs == {"type": "application/json"} for attrs in scripts[:-1]), "values, and one script of ours"
    digest = base64.b64encode(hashlib.sha256(html.rpartition("<script>")[2].partition("</script>")[0].encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}';" in html
    return html, page, " ".join("".join(page.text).split())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = write_run(tmp_path_factory.mktemp("runs") / "quickstart")
    return run, *page_of(run)


def test_whole_run_shows_every_part(whole):
    _, html, _, text = whole
    for title in (
        "Supervised loss, sft",
        "Supervised loss, all stages",
        "Accuracy by type (held-out)",
        "Format and correctness (held-out)",
        "Reward and its parts",
        "Response length",
        "KL to the reference",
        "Entropy",
        "Clip fraction",
        "Tokens per second",
        "Gradient norm",
        "Learning rate",
    ):
        assert f'aria-label="{title}' in html, title
    for words in (
        "seed 0",
        "seconds / base 61.25",
        "torch 2.13.0+cpu",
        "# <angle> & ampersand",
        "step 1",
        "step 40",
        "step 80",
        "finished",
    ):
        assert words in text, words
    assert len(html) < 500_000 and not re.search(r"\bnan\b|\binf\b", html)


def test_sections_come_in_the_order_of_their_weight(whole):
    _, html, _, _ = whole
    titles = ["Evaluation", "Learning", "GRPO", "Sampled replies: grpo", "Speed and optimisation", "Stages", "Summary"]
    assert re.findall("<h2>([^<]*)", html) == re.findall('<a href="#[^"]*">([^<]*)', html) == [*titles, "Versions and machine"]
    assert "<details><summary>recipe.yaml</summary>" in html


def percent(share):
    return f"{100 * share:.1f}"


def test_table_gives_the_figures_of_the_events(whole):
    run, html, _, _ = whole
    evals = [e for e in map(json.loads, (run / "events.jsonl").read_text().splitlines()) if e["kind"] == "eval"]
    last = {e["stage"]: e["result"] for e in evals}
    shown = {"before base": evals[0]["result"], **{f"after {stage}": result for stage, result in last.items()}}
    (table,) = re.findall("<h3>held-out</h3>(.*?)</table>", html, re.DOTALL)
    labels = re.findall('colspan="2">([^<]*?) <', table)
    shown |= {"before grpo": next(e["result"] for e in evals if e["stage"] == "grpo")} if "before grpo" in labels else {}
    assert set(labels) == set(shown)
    for kind in (*KINDS, "all"):
        (row,) = re.findall(rf"<th>{kind}</th>(.*?)</tr>", table)
        figures = [shown[label]["overall"] if kind == "all" else shown[label]["kinds"][kind] for label in labels]
        assert re.findall("<td data-label=.*?>([^<]*)", row) == [str(figures[-1]["n"]), "33.3", percent(figures[-1]["majority"])]
        cells = re.findall('<td class="share.*?><b>([^<]*)</b>.*?<small>([^<]*)</small>', row)
        pairs = (("accuracy", "interval"), ("well_formed_and_correct", "well_formed_and_correct_interval"))
        assert cells == [(percent(f[share]), "&ndash;".join(map(percent, f[ends]))) for f in figures for share, ends in pairs]
        bars = re.findall(r"class=\"share first\" data-label=.*?><b>([\d.]+)</b><span class='bar'>.*?<b style='left:([\d.]+)%'>", row)
        assert bars == [(percent(f["accuracy"]),) * 2 for f in figures] and row.count("'bar'") == len(figures)
    changes = [f"{percent(shown[label]['overall']['accuracy'])}%</b> {label}" for label in labels[-4:]]
    assert f"Accuracy on <i>held-out</i>: <b>{' &rarr; <b>'.join(changes)} <span" in html
    assert f"after sft <small>well-formed {percent(last['sft']['overall']['format_rate'])}%" in table


def log_evals(run, stage, *tables):
    """tables: (step, name, result)."""
    with MetricLog(run, stage=stage, total=2, tensorboard=False) as log:
        log.step(2, {"reward" if stage == "grpo" else "loss": 1.0})
        for step, name, table in tables:
            log.event("eval", {name: table}, step=step)


@pytest.fixture(scope="module")
def stages_with_their_own(tmp_path_factory):
    """Two stages that evaluate something of their own, then sft and grpo; the sampled evaluation is logged before the greedy one."""
    run, rng, warm = tmp_path_factory.mktemp("runs") / "r", np.random.default_rng(3), "v at temperature 1"
    tables = {"sft": result(rng, 0.9, 0.0, rows=True), "grpo": result(rng, 0.95, 1.0, rows=True)}
    sampled = {"sft": result(rng, 0.8, 0.1, rows=True), "start": result(rng, 0.8, 0.1, 150), "grpo": result(rng, 0.7, 0.9, 240, rows=True)}
    assert len({percent(t["overall"]["accuracy"]) for t in (*tables.values(), *sampled.values())}) == 5
    for stage in ("front", "ring"):
        log_evals(run, stage, *((step, f"r/{stage}-test", result(rng, 0.9, 0.0)) for step in (1, 2)))
    log_evals(run, "sft", (1, "v", tables["grpo"]), (2, warm, sampled["sft"]), (2, "v", tables["grpo"]), (2, "v", tables["sft"]))
    log_evals(run, "grpo", (0, warm, sampled["start"]), (2, warm, sampled["grpo"]), (2, "v", tables["grpo"]), (2, "s", tables["sft"]))
    return tables, sampled, *page_of(run)


def test_headline_is_greedy_accuracy_and_sampled_format(stages_with_their_own):
    tables, sampled, html, _, text = stages_with_their_own
    a, b = (percent(tables[stage]["overall"]["accuracy"]) for stage in ("sft", "grpo"))
    c, d = (percent(sampled[stage]["overall"]["well_formed_and_correct"]) for stage in ("sft", "grpo"))
    majority = percent(tables["grpo"]["overall"]["majority"])
    assert f"Accuracy on v: {a}% after sft \u2192 {b}% after grpo (chance 33.3%, majority {majority}%)." in text
    assert f"Well-formed and correct on v at temperature 1: {c}% after sft \u2192 {d}% after grpo." in text
    assert html.count('class="lead"') == 2


def test_first_lines_and_tables_compare_stages_on_the_same_rows(stages_with_their_own):
    tables, sampled, html, _, text = stages_with_their_own
    lines = re.findall("<li>(after sft .*?)</li>", html)
    told = [paired(tables["sft"], tables["grpo"]), paired(sampled["sft"], sampled["grpo"], "well_formed_and_correct")]
    for line, change, verdict in zip(lines, told, ("no clear change", "better"), strict=True):
        ends = [f"{100 * share:+.1f}".replace("-", "&minus;") for share in (change.difference, change.low, change.high)]
        assert line.startswith("after sft &rarr; after grpo: <b>{} points</b>, 95% interval {} to {}: ".format(*ends))
        assert f">{verdict}<" in line and f"right only after sft: {change.only_first}, only after grpo: {change.only_second})" in line
    assert "(the same 300 rows;" in lines[0] and "(the same 240 rows;" in lines[1], "only those that both moments had"
    (table,) = re.findall("<h3>v</h3>(.*?)</table>", html, re.DOTALL)
    shown = [paired(tables["sft"], tables["grpo"], kind=kind) for kind in (*sorted(KINDS), None)]
    cells = re.findall(
        '<td class="change first" data-label="change of accuracy, after sft to after grpo"><b class="[a-z]*">([^<]*)</b><small>([^<]*)',
        table,
    )
    assert [c[0].replace("&minus;", "-") for c in cells] == [f"{100 * change.difference:+.1f}" for change in shown]
    assert "change <small>of accuracy on the same rows,<br>after sft &rarr; after grpo<" in table and html.count("change <small>") == 2
    assert "recorded without their rows" not in text


def test_stages_that_cannot_be_compared_are_no_change(tmp_path):
    """Runs from before evaluations had their rows, stages of other rows, and rows that all hang together."""
    rng = np.random.default_rng(7)
    log_evals(tmp_path / "old", "sft", (2, "v", result(rng, 0.9, 0.0)))
    log_evals(tmp_path / "old", "grpo", (2, "v", result(rng, 0.9, 0.9)))
    html, _, text = page_of(tmp_path / "old")
    assert "recorded without their rows" in text and " points" not in text and "change <small>" not in html
    one = [accuracy_table([Record("a", right, True, 1, "x", 2, ("same",), row=f"row{k:05d}") for k in range(9)]) for right in (False, True)]
    log_evals(tmp_path / "one", "sft", (2, "v", one[0]))
    log_evals(tmp_path / "one", "grpo", (2, "v", one[1]))
    assert "+100.0 points; no interval, as all rows hang together: no clear change" in page_of(tmp_path / "one")[2]


@pytest.mark.parametrize(("rows", "verdict"), [(4, "no clear change"), (9, "better")])
def test_few_rows_that_change_alike_are_not_called_clear(tmp_path, rows, verdict):
    for stage, right in (("sft", False), ("grpo", True)):
        records = [Record("a", right, True, 1, "x", 2, (f"{k}",), row=f"row{k:05d}") for k in range(rows)]
        log_evals(tmp_path, stage, (2, "v", accuracy_table(records)))
    assert f"+100.0 points; no interval, as all {rows} clusters of rows changed alike: {verdict}" in page_of(tmp_path)[2]


def test_greedy_stands_before_sampled_and_what_no_later_stage_repeats_is_folded(stages_with_their_own):
    _, _, html, _, _ = stages_with_their_own
    assert re.findall("<h3>([^<]*)", html) == ["v", "v at temperature 1", "s", "r/ring-test", "r/front-test"]
    folded = re.findall("<details>(.*?)</details>", html, re.DOTALL)[0]
    assert re.findall("<h3>([^<]*)", folded) == ["r/ring-test", "r/front-test"]
    assert "Accuracy by type (r/ring-test)" in folded and "Format and correctness" not in folded
    assert html.count('aria-label="Accuracy by type (s)"') == 0 and html.count('aria-label="Accuracy by type (v)"') == 1
    assert "and correct" not in folded and html.count("and correct</th>") == 2 + 2


@pytest.mark.parametrize(
    ("stages", "order"),
    [
        (("ring", "sft", "grpo"), ["main", "main at temperature 1", "extra", "ring"]),
        (("ring", "sft"), ["main", "main at temperature 1", "extra", "ring"]),
        (("ring", "grpo"), ["extra", "ring", "main", "main at temperature 1"]),
        (("grpo",), ["extra", "main", "main at temperature 1"]),
    ],
)
def test_last_supervised_stage_orders_the_evaluations_and_names_the_headline(tmp_path, stages, order):
    """Whatever pretraining evaluated in passing, and GRPO first; a stage of GRPO alone orders its own."""
    rng = np.random.default_rng(5)
    tables = {name: result(rng, 0.9, 0.5) for name in ("extra", "ring", "main", "main at temperature 1")}
    seen = {"ring": ("extra", "ring", "extra"), "sft": ("main at temperature 1", "main", "extra")}
    seen["grpo"] = ("extra", "main at temperature 1", "main")
    for stage in stages:
        log_evals(tmp_path, stage, *((2, name, tables[name]) for name in seen[stage]))
    html, _, _ = page_of(tmp_path)
    assert re.findall("<h3>([^<]*)", html) == sorted(order, key=lambda name: name == "ring")  # folded away, after the others
    assert f"Accuracy on <i>{order[0]}</i>" in html


def test_rows_that_stages_are_stopped_by_make_no_headline(tmp_path):
    rng = np.random.default_rng(8)
    for stage, right in (("sft", 0.8), ("grpo", 0.9)):
        names = ("set/validation", "set/test", "dev set", "devices")
        log_evals(tmp_path, stage, *((2, name, result(rng, right, 0.0)) for name in names))
    html, _, _ = page_of(tmp_path)
    assert re.findall("<h3>([^<]*)", html) == ["set/test", "devices", "set/validation", "dev set"]
    assert "Accuracy on <i>set/test</i>" in html


@pytest.mark.parametrize(("kinds", "whole"), [((), 0), (("a",), 1), (("a", "b"), 0)])
def test_last_chart_of_an_odd_number_takes_its_row(tmp_path, kinds, whole):
    """Learning draws the loss of sft, an accuracy an evaluation and the loss of all stages: 2, 3 or 4 charts."""
    rng = np.random.default_rng(6)
    log_evals(tmp_path, "sft", *((step, name, result(rng, 0.9, 0.0)) for name in kinds for step in (1, 2)))
    html, _, _ = page_of(tmp_path)
    (learning,) = re.findall('<h2>Learning</h2><div class="grid">(.*?)</div></section>', html, re.DOTALL)
    figures = re.findall(r"<figure( class=\"whole\")?>.*?viewBox=\"0 0 (\d+) .*? x2=\"(\d+)", learning)
    narrow, wide = (("", f"{chart.WIDTH:.0f}"), (' class="whole"', f"{chart.WIDE:.0f}"))
    ends = [str(int(float(width) - chart.RIGHT)) for _, width, _ in figures]
    assert [f[:2] for f in figures] == [narrow] * (2 + len(kinds) - whole) + [wide] * whole and [f[2] for f in figures] == ends


def test_sampled_evaluation_alone_makes_the_headline(tmp_path):
    tables = [result(np.random.default_rng(seed), 0.9, 0.5) for seed in (1, 2, 3)]
    log_evals(tmp_path, "sft", (2, "v", tables[0]), (2, "v at temperature 1", tables[1]))
    log_evals(tmp_path, "grpo", (2, "v at temperature 1", tables[2]))
    assert "Accuracy on v at temperature 1:" in page_of(tmp_path)[2]


def test_replies_are_escaped_marked_and_have_their_images(whole):
    _, html, page, text = whole
    assert "<b>it</b>" not in html and "seen from <b>it</b> the car" in text
    marked = re.findall(r'<div class="marks"><span class="(\w+)">[^<]*</span><span class="(\w+)">.*?<pre>(.*?)</pre>', html, re.DOTALL)
    assert {(marks, reply) for *marks, reply in ((a, b, r) for a, b, r in marked) for marks in [tuple(marks)]} == {
        (("good", "good"), next(r for _, _, r in marked if r.startswith("&lt;think"))),
        (("good", "bad"), "A"),
        (("bad", "bad"), "B &lt;answer&gt;"),
        (("bad", "bad"), "(empty)"),
    }
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 3 * 4 * 2 and all("pixels" in attrs["class"] for attrs in images)
    shown = Image.open(io.BytesIO(base64.b64decode(images[0]["src"].partition(",")[2])))
    assert shown.size == (28, 28)


@pytest.mark.parametrize(("stages", "steps"), [(("sft",), (50,)), (("grpo",), (30,)), (("grpo",), (1,)), (("sft", "grpo"), (3, 2))])
def test_partial_and_unfinished_runs(tmp_path, stages, steps):
    html, _, text = page_of(write_run(tmp_path / "r", stages, steps, finished=False))
    assert f"unfinished: last record is {stages[-1]} step {steps[-1]}" in text
    assert ("Supervised loss" in html) == ("sft" in stages)
    assert ("Reward and its parts" in html) == ("grpo" in stages)
    assert "Recipe" not in text
    (tmp_path / "r" / stages[-1] / "final" / "model").mkdir(parents=True)
    assert f" finished: last record is {stages[-1]} step {steps[-1]}" in page_of(tmp_path / "r")[2]


@pytest.mark.parametrize(
    ("right", "formed", "rows", "shown"), [(0.9, 0.5, 150, False), (0.9, 0.5, 600, True), (0.6, 0.5, 150, True), (0.9, 0.9, 150, True)]
)
def test_start_of_grpo_is_shown_unless_it_repeats_the_end_of_sft(tmp_path, right, formed, rows, shown):
    """Fewer rows and the same within the interval: no column; more rows, another accuracy or another format: a column."""
    end, start, last = (result(np.random.default_rng(4), *how) for how in ((0.9, 0.5, 300), (right, formed, rows), (0.95, 1.0, 300)))
    log_evals(tmp_path, "sft", (2, "v", end))
    log_evals(tmp_path, "grpo", (0, "v", start), (2, "v", last))
    _, _, text = page_of(tmp_path)
    assert "after sft" in text and ("before grpo" in text) == shown
    assert (f", n {rows}" in text) == shown


def test_evaluation_alone_is_a_report(tmp_path):
    with MetricLog(tmp_path, stage="eval", total=0, tensorboard=False) as log:
        log.event("eval", {"<blink>": result(np.random.default_rng(1), 0.9, 0.9)})
    html, _, text = page_of(tmp_path)
    assert "before eval" not in text and "Accuracy on <blink>: " in text and "% eval (chance 33.3%" in text and "<blink>" not in html


def test_charts_of_one_value_are_folded_under_what_they_say(tmp_path):
    with MetricLog(tmp_path, stage="grpo", total=9, tensorboard=False) as log:
        for step in range(1, 10):
            log.step(step, {"reward": step / 9, "clip_fraction": 0.0, "finished": 1.0, "ratio": 1.0 + step / 9, "kl": math.nan})
    html, _, _ = page_of(tmp_path)
    (section,) = re.findall("<h2>GRPO</h2>(.*?)</section>", html, re.DOTALL)
    shown, folded = section.split("<details>")
    assert folded.startswith("<summary>Always the same: Finished replies 100%, Clip fraction 0</summary>")
    assert re.findall("<figcaption>([^<]*)", folded) == ["Finished replies", "Clip fraction"]
    assert re.findall("<figcaption>([^<]*)", shown) == ["Reward and its parts", "KL to the reference, per token", "Probability ratio"]


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def test_whatever_a_run_holds_stays_text(tmp_path):
    """Names, replies, notes and files that try to be more: only our script is one, and it does not hold them."""
    folder = tmp_path / "<img src=x onerror=alert(3)>"
    with MetricLog(folder, stage=f"s{HOSTILE}", total=2, tensorboard=False) as log:
        for step in (1, 2):
            log.step(step, {"reward": step, f"m{HOSTILE}": step, f"seconds/{HOSTILE}": 1.0, "loss": 1.0})
            log.event("eval", {f"e{HOSTILE}": accuracy_table([Record(f"k{HOSTILE}", step == 2, True, 1, "x", 2, row="row00000")])}, step)
        log.event("rollouts", [{"images": ["data:" + HOSTILE], "prompt": HOSTILE, "response": HOSTILE, "reward": 1.0, "truth": HOSTILE}])
        log.event("skipped", {"rows": [HOSTILE]})
        log.event("rate", {"tflops": 1.0, "what": HOSTILE})
    (folder / "summary.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    (folder / "recipe.yaml").write_text(HOSTILE)
    html, page, _ = page_of(folder)
    assert html.count("<script>") == 1 and "<img src=x" not in html and "alert(1)" not in html.rpartition("<script>")[2]
    assert not [attrs for tag, attrs in page.tags if tag == "img"] and not [
        a for _, attrs in page.tags for a in attrs if a.startswith("on")
    ]


def test_values_lie_beside_a_chart(tmp_path):
    """Every step up to 5,000 of a line; of more, the extremes; what is not finite is null; lines that are told apart stay apart."""
    losses = [None if step == 7 else 1000 if step == 4321 else 2 + step % 3 for step in range(1, 6001)]
    records = [{"stage": "sft", "step": k, "loss": loss, "one": 1 + k * 1e-7} for k, loss in enumerate(losses, 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    html, _, _ = page_of(tmp_path)
    data = {
        title: json.loads(values)
        for title, values in re.findall(r'aria-label="([^"]*)">.*?<script type="application/json">(.*?)</script>', html)
    }
    loss = data["Supervised loss, all stages (nats per answer token)"]
    ((steps, values),) = loss["lines"][0]["stages"].values()
    assert len(steps) == len(values) <= 5001 and dict(zip(steps, values, strict=True))[4321] == 1000 and None in values
    assert loss["spans"] == [["sft", chart.LEFT, chart.WIDTH - chart.RIGHT, 6000]]
    assert len(set(data["one"]["lines"][0]["stages"]["sft"][1])) > 500
    assert len(html) < 1_000_000


def test_lost_and_large_images_and_data_uris(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (900, 1200, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    Image.fromarray(noise[:8, :8]).save(buffer := io.BytesIO(), "PNG")
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    with MetricLog(tmp_path, stage="grpo", total=1, tensorboard=False) as log:
        reply = {"prompt": "p", "response": "r", "reward": 0.0, "truth": "t"}
        log.event("rollouts", [{"images": ["large.png", uri, "gone.png"], **reply}], step=1)
    _, page, text = page_of(tmp_path)
    large, small = (attrs["src"] for tag, attrs in page.tags if tag == "img")
    assert Image.open(io.BytesIO(base64.b64decode(large.partition(",")[2]))).size == (320, 240)
    assert small == uri
    assert "image not readable" in text and "gone.png" in text


def test_nan_is_said_not_hidden(tmp_path):
    with MetricLog(tmp_path, stage="sft", total=3, tensorboard=False) as log:
        for step, loss in ((1, 1.0), (2, float("nan")), (3, 2.0)):
            log.step(step, {"loss": loss, "grad_norm": float("nan")})
    html, _, text = page_of(tmp_path)
    assert "1 of 3 values are NaN or infinite" in text and "3 of 3 values are NaN or infinite" in text
    assert not re.search(r"\bnan\b", html)


def test_a_folder_without_a_run_and_a_broken_summary_are_told(tmp_path):
    with pytest.raises(ValueError, match=r"no metrics\.jsonl"):
        write_report(tmp_path)
    write_run(tmp_path, ("sft",), (2,))
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"summary\.json: not valid JSON"):
        write_report(tmp_path)


def path_points(svg, css):
    (d,) = re.findall(rf'<path class="{css}"[^>]* d="([^"]*)"', svg)
    return [tuple(map(float, p.split(","))) for p in re.findall(r"[ML]([\d.,-]+)", d)], d


def test_lines_stand_where_their_values_say():
    """The y of every point against the tick labels' own scale; the second stage starts where the first one ends."""
    series = Series("a", {"one": [(0, 0.0), (50, 5.0), (100, 10.0)], "two": [(10, 2.5)]})
    svg = line_chart("t", [series], {"one": 100, "two": 10})
    ticks = {
        float(label): float(y) - 3.5
        for y, label in re.findall(r'<text class="tick" text-anchor="end" x="40.0" y="([\d.]+)">([\d.]+)<', svg)
    }
    assert {0.0, 10.0} <= set(ticks)
    per_unit = (ticks[10.0] - ticks[0.0]) / 10
    one, two = re.findall(r'<path class="line"[^>]* d="([^"]*)"', svg)
    points = [tuple(map(float, p.split(","))) for p in re.findall(r"[ML]([\d.,-]+)", one)]
    assert [y for _, y in points] == pytest.approx([ticks[0.0] + per_unit * v for v in (0, 5, 10)], abs=0.11)
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=0.11)
    (rule,) = re.findall(r'<line class="rule" x1="([\d.]+)"', svg)
    assert points[-1][0] == pytest.approx(float(rule), abs=0.11)
    assert two.startswith(f"M{chart.WIDTH - chart.RIGHT:.1f},")


def test_log_axis_spikes_and_gaps():
    values = [(s, 1.0) for s in range(5000)]
    values[1234] = (1234, 90.0)
    values[3000] = (3000, float("nan"))
    svg = line_chart("t", [Series("a", {"s": values})], {"s": 4999}, may_log=True)
    raw, d = path_points(svg, "raw")
    assert "(log scale)" in svg and d.count("M") == 2 and len(raw) < 700
    assert min(y for _, y in raw) < chart.TOP + 20 < sorted(y for _, y in raw)[1]  # the one spike is still there
    linear = line_chart("t", [Series("a", {"s": [(0, 0.0), (1, 90.0)]})], {"s": 1}, guides=[Guide("chance", 30.0)], may_log=True)
    assert "(log scale)" not in linear and 'class="guide"' in linear and "chance <b>30</b>" in linear
    assert line_chart("t", [Series("a", {})], {"s": 1}) == ""


def test_close_up_cuts_the_descent_and_says_so():
    values = [(s, 8.0 if s < 20 else 0.5 if s < 60 else 0.1) for s in range(100)]
    series = Series("a", {"s": values})
    (whole, _), (close, _) = (path_points(line_chart("t", [series], {"s": 99}, top=top), "raw") for top in (100.0, 0.6))
    assert (
        len(whole) == 100
        and len(close) == 80
        and "20 of 100 values above the axis, up to 8" in line_chart("t", [series], {"s": 99}, top=0.6)
    )
    fall = [max(y for _, y in line) - min(y for _, y in line[-80:]) for line in (whole, close)]
    assert fall[0] < 20 and fall[1] > 100 and min(y for _, y in close) >= chart.TOP


def test_plateau_and_drop_fill_the_close_up_of_the_loss(tmp_path):
    """Whatever the loss starts from: the step from 0.5 to 0.1 takes more than half of the picture's height."""
    with MetricLog(tmp_path, stage="sft", total=200, tensorboard=False) as log:
        for step in range(1, 201):
            log.step(step, {"loss": 9.0 if step < 20 else 0.5 if step < 120 else 0.1})
    html, _, _ = page_of(tmp_path)
    raw, _ = path_points(re.search('aria-label="Supervised loss, sft.*?</svg>', html)[0], "raw")
    assert raw[-1][1] - raw[-100][1] > 0.5 * (chart.HEIGHT - chart.TOP - chart.BOTTOM)


def test_moving_average_and_labels():
    line = [(x, 2.0 * x + (-1) ** x) for x in range(200)]
    smooth = moving_average(line)
    middle = [abs(v - 2.0 * x) for x, v in smooth[10:-10]]
    assert max(middle) < 0.35 and moving_average(line[:14]) == line[:14]
    labels = {0: "0", 0.25: "0.25", 1234: "1234", 15_000: "15k", 2_500_000: "2.5M", 3e-6: "3e-06", 999.7: "1000", -0.5: "-0.5"}
    assert {value: number(value) for value in labels} == labels
    narrow = line_chart("t", [Series("a", {"s": [(0, 0.9996), (1, 1.0004)]})], {"s": 1})
    ticks = re.findall(r'text-anchor="end" x="40.0"[^>]*>([^<]*)<', narrow)
    assert len(ticks) >= 4 and len(set(ticks)) == len(ticks)

"""The report of synthetic runs: whole, partial, broken off; nothing fetched, nothing unescaped, the figures those of the events."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from actial_fast import chart
from actial_fast.chart import Guide, Series, line_chart, moving_average, number
from actial_fast.metrics import MetricLog
from actial_fast.report import write_report
from actial_fast.statistics import Record, accuracy_table

KINDS = ("ego_translation", "object_translation", "ego_rotation")
VOID = {"meta", "br", "img", "line", "path", "circle"}


def result(rng, right, formed, n=300):
    records = []
    for i in range(n):
        well = bool(rng.random() < formed)
        truth = ("left", "right")[rng.integers(2)]
        records.append(Record(KINDS[i % 3], bool(rng.random() < right), well, 24 if well else 2, truth, 3))
    return accuracy_table(records)


def write_run(run, stages=("base", "sft", "grpo"), steps=(240, 400, 80), finished=True):
    """A run as the quickstart would leave it: a plateau and a drop in SFT, the format rate rising in GRPO."""
    rng = np.random.default_rng(0)
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
                        log.event("eval", {"held-out": result(rng, 0.33, 0.0)}, step=0)
                    if step % 40 == 0:
                        log.event("eval", {"held-out": result(rng, 0.5 + 0.46 * (1 - drop), 0.1)})
                    continue
                formed = 0.12 + 0.8 * (1 - np.exp(-4 * done))
                parts = {"reward/format": float(np.clip(rng.normal(formed, 0.05), 0, 1)), "reward/accuracy": float(formed * 0.93)}
                grpo = {"loss": float(rng.normal(0, 0.01)), "reward": sum(parts.values()) / 2, **parts, "kl": 0.02 * done + 0.001}
                grpo |= {"response_length": 10 + 12 * done, "entropy": 0.8 - 0.5 * done, "clip_fraction": 0.02, "ratio_max": 1.0}
                log.step(step, {**grpo, "zero_variance_groups": 0.3 * done, **common})
                if step % 20 == 0 or step == 1:
                    log.event("eval", {"held-out": result(rng, 0.94, formed)}, step=step if step > 1 else 0)
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
        self.text.append(data)


def page_of(run):
    html = write_report(run).read_text(encoding="utf-8")
    page = Page(html)
    assert all(source.startswith("data:image/") for source in page.sources)
    assert not re.search(r"https?:|@import|url\(|<script|<link", html)
    return html, page, " ".join("".join(page.text).split())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = write_run(tmp_path_factory.mktemp("runs") / "quickstart")
    return run, *page_of(run)


def test_whole_run_shows_every_part(whole):
    _, html, _, text = whole
    for title in (
        "Supervised loss",
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
        "Step 1",
        "Step 40",
        "Step 80",
        "finished",
    ):
        assert words in text, words
    assert len(html) < 500_000 and not re.search(r"\bnan\b|\binf\b", html)


def test_headline_and_table_give_the_figures_of_the_events(whole):
    run, _, _, text = whole
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    evals = [e for e in events if e["kind"] == "eval"]
    last = {e["stage"]: e["result"] for e in evals}
    first = next(e["result"] for e in evals if e["step"] == 0)
    grpo = [e["result"] for e in evals if e["stage"] == "grpo"]
    shown = {"before base": first, "after base": last["base"], "after sft": last["sft"], "before grpo": grpo[0], "after grpo": last["grpo"]}
    for label, table in shown.items():
        assert f"{100 * table['overall']['accuracy']:.1f}% {label}" in text
    share = [f"{100 * table['overall']['well_formed_and_correct']:.1f}%" for table in (grpo[0], grpo[-1])]
    assert f"well-formed and correct: {share[0]} before grpo, {share[1]} after" in text
    for kind in KINDS:
        low, high = last["sft"]["kinds"][kind]["interval"]
        assert f"{100 * last['sft']['kinds'][kind]['accuracy']:.1f} {100 * low:.1f}\u2013{100 * high:.1f}" in text
    assert "chance 33.3%" in text


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
    assert len(images) == 3 * 3 * 2 and all("pixels" in attrs["class"] for attrs in images)
    shown = Image.open(io.BytesIO(base64.b64decode(images[0]["src"].partition(",")[2])))
    assert shown.size == (28, 28)


@pytest.mark.parametrize(("stages", "steps"), [(("sft",), (50,)), (("grpo",), (30,)), (("grpo",), (1,)), (("sft", "grpo"), (3, 2))])
def test_partial_and_unfinished_runs(tmp_path, stages, steps):
    html, _, text = page_of(write_run(tmp_path / "r", stages, steps, finished=False))
    assert f"unfinished: last record is {stages[-1]} step {steps[-1]}" in text
    assert ("Supervised loss" in html) == ("sft" in stages)
    assert ("Reward and its parts" in html) == ("grpo" in stages)
    assert "Recipe" not in text


def test_the_same_result_is_not_shown_twice(tmp_path):
    same, later = (result(np.random.default_rng(seed), 0.9, 0.5) for seed in (1, 2))
    for stage, results in (("sft", [same]), ("grpo", [same, later])):
        with MetricLog(tmp_path, stage=stage, total=2, tensorboard=False) as log:
            for i, table in enumerate(results):
                log.event("eval", {"test": table}, step=2 * i + 2 * (stage == "sft"))
    _, _, text = page_of(tmp_path)
    assert "after sft" in text and "after grpo" in text and "% before grpo (" not in text


def test_headline_is_about_what_most_stages_share_and_no_format_takes_no_table(tmp_path):
    rng = np.random.default_rng(3)
    for stage, names in (("base", ["warm-up"]), ("sft", ["viewpoint"]), ("grpo", ["viewpoint", "spatial"])):
        with MetricLog(tmp_path, stage=stage, total=2, tensorboard=False) as log:
            log.event("eval", {name: result(rng, 0.9, 0.0 if name == "warm-up" else 0.5) for name in names}, step=2)
    html, _, text = page_of(tmp_path)
    assert text.index("Accuracy on viewpoint:") < text.index("Evaluation: viewpoint")
    assert re.findall(r"Evaluation: (\S+)", text) == ["viewpoint", "spatial", "warm-up"]
    assert text.count("No reply was well-formed.") == 1 and text.index("No reply") > text.index("Evaluation: warm-up")
    assert "Format and correctness (warm-up)" not in html and "Format and correctness (spatial)" in html


def test_evaluation_alone_is_a_report(tmp_path):
    with MetricLog(tmp_path, stage="eval", total=0, tensorboard=False) as log:
        log.event("eval", {"<blink>": result(np.random.default_rng(1), 0.9, 0.9)})
    html, _, text = page_of(tmp_path)
    assert "before eval" in text and "<blink>" in text and "<blink>" not in html


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

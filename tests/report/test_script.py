"""page.js in a browser: what it tells, draws and chooses; skipped where there is no Chromium."""

import html as markup
import json
import math
import re
import shutil
import subprocess

import pytest

from actial_fast.report.page import write_report
from tests.report.test_page import write_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no Chromium")]

DRIVER = """{  // a scope of its own, beside the page's
const told = {};
const all = (of, what) => [...of.querySelectorAll(what)], svg = f => f.querySelector("svg");
const figure = title => all(document, "figure").find(f => svg(f).getAttribute("aria-label").startsWith(title));
const at = (f, share, type = "pointermove") => {
  const box = svg(f).getBoundingClientRect(), clientX = box.left + share * box.width, clientY = box.top + box.height / 2;
  svg(f).dispatchEvent(new PointerEvent(type, {clientX, clientY, pointerType: "mouse", button: 0, bubbles: true}));
};
const tip = f => f.querySelector(".told").hidden ? null : all(f, ".told > b, .told > span").map(each => each.textContent);
const ticks = f => all(f, "svg .tick").map(each => each.textContent);
const numbers = f => all(f, "path.line, path.raw").map(path => path.getAttribute("d").match(/[\\d.]+/g).map(Number));
const drag = (f, a, b) => { at(f, a, "pointerdown"); at(f, b); at(f, b, "pointerup"); };
const press = (f, label) => all(f, ".tools button").find(each => each.textContent === label).click();
const key = (f, name) => svg(f).dispatchEvent(new KeyboardEvent("keydown", {key: name}));
try {ACTIONS} catch (error) { told.error = error.stack; }
document.body.append(Object.assign(document.createElement("pre"), {id: "out", textContent: JSON.stringify(told)}));
}"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    run = write_run(tmp_path_factory.mktemp("runs") / "run", ("sft", "grpo"), (400, 80))
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for k, record in enumerate(records):
        record |= {"seconds/update": 0.5 + (k == 100), "seconds/other": 0.25}
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return write_report(run), records


def dom(path):
    """The page as it is once its scripts have run."""
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={path.parent / 'profile'}",
        "--window-size=1200,900",
    ]
    command += ["--virtual-time-budget=2000", "--dump-dom", path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def driven(path, tmp_path, actions):
    """What the actions put into `told`."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", path.read_text())  # it would not let the driver run
    (tmp_path / "page.html").write_text(text.replace("</body>", f"<script>{DRIVER.replace('ACTIONS', actions)}</script></body>"))
    (found,) = re.findall(r'<pre id="out">(.*?)</pre>', dom(tmp_path / "page.html"), re.DOTALL)
    told = json.loads(markup.unescape(found))
    assert "error" not in told, told
    return told


def test_our_script_runs_and_no_other(page, tmp_path):
    """Even if a text of a run came to be markup, the page's policy would not run it."""
    hostile = "<script>document.body.className = 'taken'</script><img src=x onerror=\"document.body.className = 'taken'\">"
    (tmp_path / "page.html").write_text(page[0].read_text().replace("</header>", f"{hostile}</header>"))
    found = dom(tmp_path / "page.html")
    assert found.count('class="tools"') > 10 and '<body class="taken"' not in found and "<body>" in found


def test_values_zoom_smoothing_log_axis_and_legend(page, tmp_path):
    path, records = page
    told = driven(
        path,
        tmp_path,
        """
    const loss = figure("Supervised loss, sft"), reward = figure("Reward"), first = svg(loss).innerHTML;
    const soften = by => { loss.chart.select.value = by; loss.chart.select.onchange(); };
    at(loss, 0.5); told.middle = tip(loss);
    at(loss, 0.5, "pointerleave"); told.left = tip(loss);
    drag(loss, 0.5, 0.6); told.zoomed = ticks(loss); told.resettable = !all(loss, ".tools button").at(-1).hidden;
    for (let i = 0; i < 9; i++) press(loss, "+");
    told.closest = ticks(loss);
    at(loss, 0.5); told.close = tip(loss);
    press(loss, "reset"); told.same = svg(loss).innerHTML === first;
    drag(loss, 0.5, 0.505); told.click = svg(loss).innerHTML.includes("here") && loss.chart.untouched;
    const end = numbers(loss)[1].at(-1);
    soften(3); told.smoother = numbers(loss)[1].at(-1) !== end;
    soften(0); told.raw = all(loss, "path.raw").length;
    key(loss, "Escape");
    press(loss, "log"); told.log = ticks(loss).filter(t => t.includes("."));
    told.pressed = loss.querySelector(".tools [aria-pressed]").getAttribute("aria-pressed");
    key(loss, "Escape"); key(loss, "ArrowRight"); key(loss, "ArrowRight"); told.arrow = tip(loss);
    const paths = all(reward, "svg path").length;
    reward.querySelector("[data-line]").click();
    told.hidden = paths - all(reward, "svg path").length; at(reward, 0.5); told.without = tip(reward).length;
    reward.querySelector("[data-line]").click(); told.back = reward.chart.untouched;
    """,
    )
    sft = {record["step"]: record for record in records if record["stage"] == "sft"}
    step = int(told["middle"][0].split()[-1])
    assert 170 < step < 200, "the middle of the picture, whose axis stands at its left"
    assert float(told["middle"][1].split()[-1]) == pytest.approx(sft[step]["loss"], rel=1e-3) and told["left"] is None
    assert told["resettable"] and told["same"] and told["click"] and told["smoother"] and told["raw"] == 0
    shown = [int(tick) for tick in told["zoomed"] if tick.isdigit()]
    assert shown and all(180 <= tick <= 250 for tick in shown), "a tenth of 400 steps"
    closest = sorted(int(tick) for tick in told["closest"] if tick.isdigit())
    assert 2 <= len(closest) <= 6 and closest[-1] - closest[0] <= 4 and closest[0] <= int(told["close"][0].split()[-1]) <= closest[-1] + 1
    assert len(told["log"]) >= 2 and told["pressed"] == "true" and told["arrow"][0] == "sft step 2"
    assert (told["hidden"], told["without"], told["back"]) == (2, 3, True)


def test_what_it_draws_is_what_was_drawn(page, tmp_path):
    """Its picture of the whole is Python's, up to the digits that went along."""
    told = driven(
        page[0],
        tmp_path,
        """
    told.worst = {}; told.charts = 0;
    for (const f of document.querySelectorAll("figure")) {
      if (!f.chart || f.chart.data.parts) continue;
      const python = numbers(f); f.chart.svg.innerHTML = f.chart.shapes(); const own = numbers(f); told.charts += 1;
      const off = python.length !== own.length || python.some((d, i) => d.length !== own[i].length) ? 1e9
        : Math.max(...python.flatMap((d, i) => d.map((v, k) => Math.abs(v - own[i][k]))));
      if (off > 0.5) told.worst[f.chart.svg.getAttribute("aria-label")] = off;
    }
    """,
    )
    assert told["worst"] == {} and told["charts"] > 15


def test_bars_tell_their_parts(page, tmp_path):
    told = driven(
        page[0],
        tmp_path,
        """
    const bars = figure("Seconds of a step, sft");
    at(bars, 0.5); told.many = tip(bars);
    for (let i = 0; i < 9; i++) press(bars, "+");
    at(bars, 0.5); told.one = tip(bars);
    """,
    )
    assert told["many"][0].startswith("sft steps ") and told["many"][0].endswith(", mean")
    assert told["many"][1:] == ["update 0.5", "other 0.25", "together 0.75"]
    assert re.fullmatch(r"sft step \d+", told["one"][0]) and told["one"][1:] == told["many"][1:]


def test_the_gallery_is_chosen_from(page, tmp_path):
    told = driven(
        page[0],
        tmp_path,
        """
    const gallery = document.querySelector(".gallery"), [verdict, step] = all(gallery, "select"), search = gallery.querySelector("input");
    const shown = () => all(gallery, "article").filter(card => !card.hidden).length;
    told.bar = !gallery.querySelector(".choices").hidden; told.all = shown(); told.open = gallery.querySelector("details").open;
    search.value = "QUESTION 2"; search.oninput(); told.words = shown(); told.opened = gallery.querySelector("details").open;
    told.said = gallery.querySelector("output").textContent;
    step.value = "80"; step.onchange(); told.both = shown();
    search.value = "<b>it</b>"; search.oninput(); told.markup = shown();
    search.value = "nowhere"; search.oninput(); told.none = shown(); told.folded = gallery.querySelector("details").hidden;
    search.value = ""; step.value = "*"; search.oninput(); told.again = shown();
    """,
    )
    assert (
        told["bar"] and (told["all"], told["open"]) == (12, False) and (told["words"], told["opened"], told["said"]) == (3, True, "3 of 12")
    )
    assert told["both"] == 1 and told["markup"] >= 1 and (told["none"], told["folded"], told["again"]) == (0, True, 12)


def test_a_long_run_keeps_a_small_page(tmp_path):
    names = [f"metric{k}" for k in range(30)]
    records = [
        {"stage": "sft", "step": step} | {name: math.sin(step / (k + 2)) + 2 for k, name in enumerate(names)} for step in range(1, 5001)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    path = write_report(tmp_path)
    assert path.stat().st_size < 3_000_000
    assert driven(path, tmp_path, 'told.charts = document.querySelectorAll("figure .tools").length;')["charts"] == len(names)

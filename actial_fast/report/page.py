"""report.html: what a run did, on one page that needs nothing but itself (inline SVG, images and script, no fetch; light and dark).

Without a script, and printed, all of it is there; the script tells values, zooms, smooths and searches.
"""

from __future__ import annotations

import time
from html import escape
from pathlib import Path

from actial_fast.report.curves import Runs, by_time, grid, grpo, learning, optimisation, speed
from actial_fast.report.evaluations import evaluation, headline
from actial_fast.report.gallery import gallery
from actial_fast.report.held_out import loss_charts, loss_table, losses_of
from actial_fast.report.html import bullets, contents, document, folded, section, write
from actial_fast.report.run import read_run
from actial_fast.report.stages import pairs, stage_table
from actial_fast.report.troubles import signs, warned


def write_report(run_dir: Path, path: Path | None = None) -> Path:
    """Write the page (whole or not at all), to RUN/report.html unless told, and return its path.

    Raises ValueError when the folder has neither metrics nor events, or when one of its files cannot be read.
    """
    run = read_run(Path(run_dir))
    alone = {"": run}
    told = f'<p class="muted">actial_fast run &middot; {time.strftime("%Y-%m-%d %H:%M")} &middot; {escape(run.state)}</p>'
    sections = [
        section("What went wrong", bullets(warned(run.events))),
        section("Signs of trouble", bullets(signs(run.metrics, run.evals))),
        section("Evaluation", evaluation(run) + loss_table(losses_of(run.metrics))),
        section("Learning", grid([*loss_charts(alone), *learning(alone)])),
        section("GRPO", grid(grpo(alone))),
        *(section(f"Sampled replies: {stage}", gallery(run.folder, stage, run.events)) for stage in run.steps),
        section("Where the time goes", _where_the_time_goes(alone)),
        section("Speed and optimisation", grid(optimisation(alone))),
        section("Stages", stage_table(run)),
        section("Summary", pairs(run.summary)),
        section("Versions and machine", pairs(run.versions)),
        *(folded(name, f"<pre>{escape(text)}</pre>") for name, text in run.recipes.items()),
    ]
    head = f"<header>{told}<h1>{escape(run.name)}</h1>{headline(run)}</header>{contents(sections)}"
    return write(path or run.folder / "report.html", document(run.name, head + "".join(sections)))


def _where_the_time_goes(alone: Runs) -> str:
    drawn, learnt = grid(speed(alone)), grid(by_time(alone))
    return drawn + (folded("Learning by time", learnt) if drawn and learnt else "")

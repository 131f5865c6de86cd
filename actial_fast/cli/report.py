"""`actial report`: the page of a run, or of several."""

from __future__ import annotations

import argparse
from pathlib import Path

from actial_fast.cli.shared import Commands


def add(commands: Commands) -> None:
    """The commands of this group."""
    report = commands.add_parser("report", help="one page of what a run did, or of several runs side by side")
    report.add_argument("folder", nargs="+", type=Path, metavar="RUN", help="the run's folder; with more, the first is what the others are "
                        "compared with")  # fmt: skip
    report.add_argument("-o", "--out", type=Path, metavar="FILE", help="where the page goes (default: RUN/report.html, of several "
                        "RUN/compared.html)")  # fmt: skip
    report.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> int:
    from actial_fast.report.compared import write_comparison
    from actial_fast.report.page import write_report

    first, *others = args.folder
    if others:
        print(write_comparison(args.folder, args.out or first / "compared.html"))
    else:
        print(write_report(first, args.out))
    return 0

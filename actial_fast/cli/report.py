"""`actial report`: the page of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from actial_fast.cli.shared import Commands


def add(commands: Commands) -> None:
    """The commands of this group."""
    report = commands.add_parser("report", help="write RUN/report.html")
    report.add_argument("folder", type=Path, metavar="RUN")
    report.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> int:
    from actial_fast.report.page import write_report

    print(write_report(args.folder))
    return 0

"""`actial doctor`: what works on this machine."""

from __future__ import annotations

import argparse

from actial_fast.cli.shared import Commands


def add(commands: Commands) -> None:
    """The commands of this group."""
    doctor = commands.add_parser("doctor", help="which backends work here, and why the others do not")
    doctor.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from actial_fast.doctor import main as run

    return run()

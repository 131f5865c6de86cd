"""`actial doctor`: what works on this machine."""

from __future__ import annotations

import argparse
import dataclasses

from actial_fast.cli.shared import Commands, add_json, write_json


def add(commands: Commands) -> None:
    """The commands of this group."""
    doctor = commands.add_parser("doctor", help="which backends work here, and why the others do not")
    add_json(doctor)
    doctor.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from actial_fast.doctor import doctor, show

    checks = doctor()
    if args.json != "-":
        show(checks)
    if args.json:
        write_json([dataclasses.asdict(check) for check in checks], args.json)
    return int(any(check.state == "broken" for check in checks))

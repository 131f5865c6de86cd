"""`actial export`: a checkpoint of a run as folders that transformers and PEFT open."""

from __future__ import annotations

import argparse
from pathlib import Path

from actial_fast.cli.shared import Commands


def add(commands: Commands) -> None:
    """The commands of this group."""
    export = commands.add_parser("export", help="a Hugging Face folder (and PEFT adapter) from a checkpoint of a run")
    export.add_argument("checkpoint", type=Path, help="RUN/STAGE for its newest checkpoint, or RUN/STAGE/step-000100")
    export.add_argument("-o", "--out", type=Path, required=True, help="folder to write; adapters go into its subfolder adapter/")
    export.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="",
        help="of the weights (default: as trained, and float32 where adapters are merged into them)",
    )
    export.add_argument(
        "--base",
        choices=("trained", "original"),
        default="trained",
        help="what adapters are merged into: the weights as they were in training, rounded to model.frozen_dtype and NF4, which gives the "
        "model that was trained; or those of model.path (default: trained)",
    )
    export.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    from actial_fast.cli.shared import settle
    from actial_fast.train.checkpoint import newest
    from actial_fast.train.export import export_to

    settle()
    source = newest(args.checkpoint)
    done = export_to(source, args.out, dtype=args.dtype, base=args.base)
    print(f"{args.out}: {source} in {done.dtype}, for from_pretrained")
    if done.rounding is not None:
        print(f"{args.out / 'adapter'}: its adapters, for PEFT; in the folder above they are merged")
    if done.held:
        what = "the base in NF4, as it was trained" if args.base == "trained" else "the original base, which they were not trained on"
        print(f"merged into {what}; {done.held} of its weights were held in 4 bits (see adapter/README.md)")
    if done.rounding:
        print(
            f"rounding to {done.dtype} changed the merged weights by {done.rounding:.2g} of what the adapters changed"
            + ("; use --dtype float32, or the adapters" if done.rounding > 0.05 else "")
        )
    return 0

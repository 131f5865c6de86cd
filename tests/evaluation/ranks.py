"""A benchmark run on the ranks of a test; rank 0 tells how many replies each of them drew."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

from actial_fast.evaluation import run
from actial_fast.evaluation.bench import Scoring, bench
from tests.evaluation.kit import pairs
from tests.evaluation.test_run import asking


def main() -> None:
    lab = SimpleNamespace(model=Path(sys.argv[1]), questions=Path(sys.argv[2]))
    out, append, drawn = Path(sys.argv[3]), run.append, []

    def counted(file, records):
        records = list(records)
        drawn.extend(records)
        append(file, records)

    run.append = counted
    results = bench({"pairs": pairs(lab)}, [asking(lab)], out, Scoring(errors=0))
    (out / f"drawn{os.environ['RANK']}").write_text(str(len(drawn)))
    if os.environ["RANK"] == "0":
        print(json.dumps({"results": len(results), "drawn": [int((out / f"drawn{r}").read_text()) for r in (0, 1)]}))


if __name__ == "__main__":
    main()

"""`python -m actial_fast.cli`: the `actial` command, for the ranks that a launcher starts and for those without it on their PATH."""

import os
import sys

from actial_fast.cli.main import main

try:
    status = main()
except SystemExit as ended:  # a message is an error, as Python has it
    status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    if isinstance(ended.code, str):
        print(ended.code, file=sys.stderr)
if "RANK" in os.environ:
    # everything is written and closed; threads of libraries that meet the end of the interpreter can abort a rank that has finished
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
sys.exit(status)

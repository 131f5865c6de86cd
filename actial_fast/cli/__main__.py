"""`python -m actial_fast.cli`: the `actial` command, for torchrun and for those without it on their PATH."""

import sys

from actial_fast.cli.main import main

sys.exit(main())

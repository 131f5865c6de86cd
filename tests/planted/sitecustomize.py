"""On the path of a run's ranks (PYTHONPATH=tests/planted), plants the faults that ACTIAL_TEST_FAULTS names: see tests/faults.py."""

import os

if "RANK" in os.environ and os.environ.get("ACTIAL_TEST_FAULTS"):
    from tests.faults import plant

    planted = plant(os.environ["ACTIAL_TEST_FAULTS"], int(os.environ["RANK"]))  # kept: they go with it

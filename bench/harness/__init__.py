"""How anything here is timed and shown: timing.py (clocks, memory, the machine), table.py, compare.py (against baselines), plot.py."""

"""Work of the host alone: planner.py (fill, balance and speed of the planner), data.py (images and examples a second)."""

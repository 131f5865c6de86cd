"""One update of a model. update.py times it on a CPU beside TRL, step.py on a GPU at the 7B's size (step_side.py: one side of it;
shapes.py, models.py: what is timed); ledger.py counts its FLOPs against the least there can be (minimum.py: that of samples); costs.py
fits the planner's coefficients."""

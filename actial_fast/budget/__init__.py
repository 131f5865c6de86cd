"""What a recipe takes: memory of each GPU and host, disk, and time, known before the run.

In reading order: gpus (what there is), models (widths, from a checkpoint or by name), workload (how long its rows are), trace (what
the model's own code holds, found without memory for it), shares (weights, moments and what else is exact), phases (all of it, phase
by phase), rates and seconds (how long), plan (the whole, and what to change where it does not fit), said (the plan as text), fits (the
same, asked by the loops before a model is loaded). Nothing here trains or loads weights.
"""

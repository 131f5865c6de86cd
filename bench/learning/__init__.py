"""What training makes of a model: ablation.py (the paper's stages, one left out at a time), tasks.py (the tasks that ship)."""

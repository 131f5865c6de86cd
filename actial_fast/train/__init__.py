"""What the two loops have in common: ranks, passes over micro-batches, the run's state.

Here lives nothing that knows which loop it serves; the loops themselves are ../sft.py and ../grpo.py. In order of reading: stage.py (open a
stage, resume, optimizer, stop), rounds.py (the passes of a step) with balance.py (groups moved between ranks), dist.py (the ranks, FSDP2),
checkpoint.py (each rank's part, written whole or not at all, no pickle), export.py (from a checkpoint to a Hugging Face folder).
"""

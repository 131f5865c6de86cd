"""What the two loops have in common: ranks, passes over micro-batches, the run's state.

Here lives nothing that knows which loop it serves; the loops themselves are ../sft.py and ../grpo.py. In order of reading:
a run's beginning and end: stage.py (open a stage, resume), preflight.py (what would go wrong later) with lock.py
    and packages.py,
    optim.py (AdamW in what memory there is, learning rates) with quantised.py (moments in 8 bits),
    guard.py (steps that a NaN cannot reach), stopping.py (signals), checkpoint.py (each rank's part, whole or not at all, no pickle),
    export.py (from a checkpoint to a Hugging Face folder);
a step: dist.py (the ranks, FSDP2), rounds.py (its passes) with balance.py (groups moved between ranks), samples.py (replies for GRPO),
    offload.py (what is not needed while an engine samples, and memory that is locked);
what is seen of it: phases.py (where its time goes) with account.py (tokens and FLOPs), mismatch.py (the sampler against the trainer),
    profile.py (a window of steps for Perfetto).
"""

"""The model: a Hugging Face vision-language model that takes packed batches, and what prepares its input.

Here lives all that knows the architecture; no optimizer, no ranks, no loss. In order of reading: policy.py (freeze, adapters, the forward
passes), weights.py (a checkpoint's weights onto a model, row by row) with tensors.py (safetensors files), processor.py (rows to tokens, the
only preprocessing there is), attention.py (prompt-once attention, put on an unmodified model; ../kernels on CUDA), vision.py (the tower
without host syncs), features.py (its output over micro-batches and passes), flops.py (the least that a pass needs), tiny.py (a model of
under a million parameters, for the quickstart and the tests).
"""

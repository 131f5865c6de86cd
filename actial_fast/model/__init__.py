"""The model: a Hugging Face vision-language model that takes packed batches, and what prepares its input.

Here lives all that knows the architecture; no optimizer, no ranks, no loss. In order of reading: families/ (what is particular to one;
family.py is the contract), policy.py (freeze, adapters, the forward passes), weights.py (a checkpoint's weights onto a model, row by row)
with tensors.py (safetensors files), processor.py (rows to tokens, the only preprocessing there is), attention.py (prompt-once attention,
put on an unmodified model; ../kernels on CUDA), vision.py (the tower without host syncs), features.py (its output over micro-batches and
passes), adapters.py (low-rank adapters, through PEFT), nf4.py (a base in 4 bits under them, through bitsandbytes), trunk.py (the layers
without gradients, for sampling) over paged.py (keys and values in blocks), flops.py (what a pass needs), tiny.py (a model of
under two million parameters, for the quickstart and the tests).
"""

import logging

# PEFT imports bitsandbytes where it is installed, which then warns of a package for CPUs that nothing here needs, and whose name is that of
# our folder of kernels in a clone
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

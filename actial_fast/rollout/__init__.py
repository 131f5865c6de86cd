"""Engines that reply to prompts: token ids in, token ids and their log-probs out.

Here live samplers only; rewards are in ../tasks, what is done with replies in ../grpo.py and ../evaluation. embedded.py samples from the
trainer's own module: one prefill a group, keys and values expanded to its replies. vllm.py has vLLM in the process, which handover.py gives
the weights; server.py asks whatever an address serves, for evaluation. engines.py chooses by a recipe.
"""

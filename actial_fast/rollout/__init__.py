"""Engines that reply to prompts: token ids in, token ids and their log-probs out; and the groups that a step learns from.

Here live samplers and what a step draws with them; rewards are in ../tasks, what is done with replies in ../grpo.py and ../evaluation. In
order of reading: protocol.py (what an engine is), engines.py (which one), embedded.py (sampling from the trainer's own module) with
schedule.py (which replies run), decoder.py (their next tokens) and memory.py (how many fit), groups.py (a step's groups: drawn, scored,
chosen) with choosing.py (which of them) and kept.py (replies on the disk).
"""

"""Engines that reply to prompts: token ids in, token ids and their log-probs out; and the groups that a step learns from.

Here live engines and what a step draws with them; rewards are in ../tasks, what is done with replies in ../grpo.py and ../evaluation. In
order of reading: protocol.py (what an engine is), engines.py (which one a recipe asks for); embedded.py (sampling from the trainer's own
module) with schedule.py (which replies run), decoder.py (their next tokens), graphs.py and memory.py (how many fit); vllm.py (vLLM in the
process) with vllm_inside.py (what is changed in it), which handover.py gives the weights; server.py (whatever an address serves, for
evaluation and chains of thought) with client.py; groups.py (a step's groups: drawn, scored, chosen) with choosing.py (which of them) and
kept.py (replies on the disk); thoughts.py (chains of thought for the cold start, from any of them).
"""

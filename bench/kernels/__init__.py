"""The ops beside their peers. ops.py times them (problems.py: the inputs and what is right; sides.py, peers.py: who takes part;
rounds.py: in turns); accuracy.py and loss_memory.py measure errors and memory.

Without a GPU: resources.py reads the machine code of every launch (cases.py, compile_only.py, usage.py). With one: memcheck.py, tune.py.
"""

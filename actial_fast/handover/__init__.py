"""A recipe for another trainer, for when one node is outgrown: its rows, its reward and its settings as files that verl takes.

overrides.py says each setting in verl's words, refusals.py what verl cannot do and what it does otherwise, rows.py writes the rows, and
folder.py all of it. verl itself is not imported: what is written is held against it in its own environment, by `make test-verl`.
"""

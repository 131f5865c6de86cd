"""Rows from files. row.py is the one row type, source.py opens a file as a sequence of rows (jsonl.py, sharegpt.py, sat.py, verl.py: a
format each; table.py: parquet), stream.py draws from several for ever and resumes by one integer (mixing.py), tags.py reads tagged replies.

A format of your own is one file here. Nothing here makes rows or knows a model.
"""

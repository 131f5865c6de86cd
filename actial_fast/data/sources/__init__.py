"""Rows from files. row.py is the one row type, picture.py what an image looks like, fields.py how a record's fields are read, source.py
opens files as a sequence of rows (own.py, sharegpt.py, sat.py, verl.py, easyr1.py, webdataset.py: a format each, on reader.py; places.py:
where the files are; jsonl.py, table.py, tsv.py and shards.py: what is in them), stream.py draws from several for ever and resumes by one
integer (mixing.py), tags.py reads tagged replies, answers.py judges them, overlap.py tells what sources share and stats.py what one holds,
content.py whether a file has changed, told.py what is unusual.

A format of your own is one file here. Nothing here makes rows or knows a model.
"""

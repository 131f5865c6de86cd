"""Rows made from nothing or from any pictures, for the tasks that ship: jigsaw.py, sparkle.py, boxes.py, written by files.py.

Each draws its pictures, or takes a folder of yours, and writes train.jsonl and test.jsonl; the tasks in ../../tasks say what replies are
worth.
"""

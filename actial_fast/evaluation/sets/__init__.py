"""The benchmarks, a file each: which files and columns, which prompt, which rules find the answer, which figures are told and what was
published. A new one is a file here and a line in ../catalogue.py."""

"""The families of vision-language models that this project trains, a file each: qwen2_vl.py, qwen2_5_vl.py, qwen3_vl.py.

Read family.py first: the contract, which is all that the rest of the package knows of a family. A new one is a file that fulfils it and
a line in known.py; tests/model/test_families.py then holds it against transformers.
"""

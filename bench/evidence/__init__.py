"""What can be known of the kernels' speed without a GPU: from their machine code, from the bytes that they ask for, from replayed tiles.

Here live the measurements, their limits and what draws them; not the checks of resources (bench/kernels/resources.py), and nothing that
times a run. In order of reading: sass.py (machine code read back), cycles.py (a model of issue), products.py and budget.py (what they say
of a product and of a memory-bound kernel), machine.py (the same for all of ours), ledger.py (bytes, in Triton's interpreter), l2.py (tile
orders), peers.py (other packages' kernels), page.py (tables and plots of docs/evidence.md). `python -m bench.evidence` measures all of it
again and compares with bench/results/evidence; what each figure proves is told in docs/evidence.md.
"""

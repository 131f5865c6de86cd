"""How good a model is: replies to rows with a truth, scored and counted.

Here lives measuring, not training. For a run's own held-out rows: evaluate.py makes and scores the replies, statistics.py turns records
into tables with chance, majority and intervals. For benchmarks, in reading order: items.py (what one is made of), sets/ and catalogue.py
(those there are), extraction.py and owners.py (what a reply answers), figures.py; run.py (replies, kept by replies.py), scoring.py,
intervals.py, judging.py; tables.py, paper_tables.py, page.py; export.py and quiz.py for other programs and for people. bench.py puts them
together.
"""

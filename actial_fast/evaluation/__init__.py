"""How good a model is: replies to rows with a truth, scored and counted.

Here lives measuring, not training; a reader for a published benchmark would go here. evaluate.py makes and scores the replies,
statistics.py turns records into tables with chance, majority and intervals.
"""

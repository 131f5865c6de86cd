"""Seeing a run: what it logs (metrics.py), and the one page made from that (page.py, from speed.py, chart.py, cards.py and style.py).

Reads a run's folder; knows nothing of models or loops.
"""

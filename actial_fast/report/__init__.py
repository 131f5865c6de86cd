"""Seeing a run: what it logs (metrics.py, paired.py), and the pages made from that.

Read run.py (a folder's record), page.py (one run) and compared.py (several), then what they put together: evaluations.py, held_out.py
(losses), troubles.py, gallery.py, stages.py, curves.py (which charts there are), chart.py, bars.py and speed.py (how they are drawn);
html.py, style.py and the scripts page.js, bars.js and gallery.js are every page's frame. errors.py and quiz.py are pages of a benchmark,
holdings.py is one of data. Reads a run's folder; knows nothing of models or loops.
"""

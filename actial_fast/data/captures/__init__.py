"""Questions with proven answers, from photographs whose cameras are known. Read geometry.py (angles between cameras) and colmap.py (a
capture from its files), then moves.py (which pairs, and what the camera did), viewpoint.py (their questions, with questions.py, split.py
and settings.py), spatial.py (other ones), basics.py (the quickstart's stand-in for pretraining). crops.py cuts pictures of panned cameras
out of photographs; probes.py looks for shortcuts in what was built.

reconstruct.py makes captures of your own photographs (sfm.py: of one object's), render.py where there are none (shapes.py, raycast.py);
sheet.py draws rows as a picture to look at.
"""

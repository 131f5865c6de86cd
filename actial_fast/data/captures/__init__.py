"""Questions with proven answers, from photographs whose cameras are known. Read geometry.py (angles between cameras) and colmap.py (a
capture from its files), then viewpoint.py and spatial.py (the questions), basics.py (the quickstart's stand-in for pretraining).

reconstruct.py makes captures of your own photographs (sfm.py: of one object's), render.py where there are none (shapes.py, raycast.py);
sheet.py draws rows as a picture to look at.
"""

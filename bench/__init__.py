"""Measurements; each runs as `python -m bench.FOLDER.NAME` and none is imported by the package.

harness/ times, tabulates, compares and plots; kernels/ measures the ops beside their peers; step/ a whole update; host/ the planner and the
making of data; learning/ what training makes of a model. gate.py runs on one GPU all that only a GPU can tell. results/ and baselines/ hold
what was measured, a folder a machine.
"""

"""Tests of the engine that is vLLM, in an environment of their own: make test-vllm."""

import importlib.util
import os
from pathlib import Path

SITE = Path(__file__).parent / "site"
if importlib.util.find_spec("vllm") and str(SITE) not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
    spec = importlib.util.spec_from_file_location("torchvision_operators", SITE / "sitecustomize.py")
    OPERATORS = importlib.util.module_from_spec(spec)  # for this process
    spec.loader.exec_module(OPERATORS)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(SITE), os.environ.get("PYTHONPATH"))))  # for those it starts

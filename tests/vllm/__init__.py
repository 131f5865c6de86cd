"""Tests of the engine that is vLLM, in an environment of their own: make test-vllm.

test_engine.py: what it draws, against the packed trainer and the embedded engine; test_adapters.py: the same with LoRA; test_ranks.py: two
ranks, sharded, in processes of their own (scenes.py); test_loop.py: GRPO from end to end; test_serving.py: the
server of `actial serve`, against plain transformers.
"""

import importlib.util
import os
from pathlib import Path

SITE = Path(__file__).parent / "site"
if importlib.util.find_spec("vllm"):  # elsewhere these tests are collected, and not run
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # vLLM compiles what ranks log-probs, which takes longer than these tests
    if str(SITE) not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        spec = importlib.util.spec_from_file_location("torchvision_operators", SITE / "sitecustomize.py")
        OPERATORS = importlib.util.module_from_spec(spec)  # for this process
        spec.loader.exec_module(OPERATORS)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(SITE), os.environ.get("PYTHONPATH"))))  # for those it starts

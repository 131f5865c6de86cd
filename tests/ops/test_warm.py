"""After warm_up no call compiles anything, whatever its number of rows. Compiled without a GPU, in a process of its own: the interpreter,
which is on in this one, compiles nothing. Run as a module, this file prints what each call compiles as JSON."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from actial_fast import GRPOSpec, warm_up

ROOT = Path(__file__).parents[2]
H, V = 256, 4096
# label: spec, the rows that it passes, whether the head learns
CALLS = {
    "dapo": (GRPOSpec.named("dapo"), ("old_logp",), True),
    "gspo": (GRPOSpec.named("gspo"), ("old_logp",), True),
    "frozen, reference, entropy": (GRPOSpec(beta=0.1, entropy_coef=0.01), ("old_logp", "sampler_logp"), False),
    "sequences, masks": (GRPOSpec.named("gspo", importance="sequence_truncate"), ("old_logp", "sampler_logp", "policy_mask"), False),
    "cross-entropy": (None, (), True),
}


def test_nothing_is_compiled_afterwards():
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-m", "tests.ops.test_warm"], cwd=ROOT, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == CALLS.keys()
    for label, (first, *later) in found.items():
        assert len(first) >= 4, f"{label}: warm_up compiles"
        assert later and not any(later), label


def test_a_cpu_has_nothing_to_compile():
    weight = torch.randn(V, H, requires_grad=True)
    warm_up(weight, GRPOSpec())
    assert weight.grad is None


def test_unknown_rows_are_named():
    with pytest.raises(ValueError, match="given: unknown logp; expected names out of old_logp, ref_logp"):
        warm_up(torch.randn(V, H), GRPOSpec(), given=("logp",))


def compiled() -> dict[str, list[list[str]]]:
    """Of every entry of CALLS: the kernels that warm_up compiles, then those that calls with other numbers of rows compile beyond them."""
    from actial_fast import linear_cross_entropy, linear_grpo_loss, linear_logprob
    from actial_fast.ops import checks
    from bench.kernels.compile_only import compile_only

    # tensors on meta, which have no numbers and no autocast, take the kernels' way
    torch.Tensor.is_cuda, checks._device = property(lambda x: x.is_meta), lambda name, x: None
    torch.autocast, torch.is_autocast_enabled = lambda *_, **__: contextlib.nullcontext(), lambda *_: False

    def rows(T: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(T, dtype=dtype, device="meta")

    def call(T: int, label: str, weight: torch.Tensor) -> None:
        spec, given, _ = CALLS[label]
        hidden = torch.empty(T, H, dtype=torch.bfloat16, device="meta", requires_grad=True)
        targets = rows(T, torch.int64)
        with torch.no_grad():
            linear_logprob(hidden, weight, targets)
        if spec is None:
            linear_cross_entropy(hidden, weight, targets, rows(T), workspace_mb=4).backward()
            return
        more = {name: rows(T, torch.bool if name == "policy_mask" else torch.float32) for name in given if name != "old_logp"}
        if spec.needs_sequences("sampler_logp" in given):
            more["cu_seqlens"] = torch.tensor([*range(0, T, 77), T], dtype=torch.int32)
        reference = rows(T) if spec.beta > 0 else None
        loss = linear_grpo_loss(hidden, weight, targets, rows(T), rows(T), reference, spec, token_weight=rows(T), **more, workspace_mb=4)
        loss.loss.backward()

    found = {}
    for label, (spec, given, learns) in CALLS.items():
        weight = torch.empty(V, H, dtype=torch.bfloat16, device="meta", requires_grad=learns)
        with compile_only(90) as launches:
            warm_up(weight, spec, given=given)
        known = {launch.compiled.hash for launch in launches}
        found[label] = [sorted({launch.function.fn.__name__ for launch in launches})]
        for T in (1, 129, 700, 1024, 2047):
            with compile_only(90) as launches:
                call(T, label, weight)
            found[label].append(sorted({launch.function.fn.__name__ for launch in launches if launch.compiled.hash not in known}))
    return found


if __name__ == "__main__":
    print(json.dumps(compiled()))

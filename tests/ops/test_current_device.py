"""Triton launches on the current device: whoever reaches a kernel makes the tensors' device the current one.

On a fake GPU: the Python around the launches runs, and each launch notes which device `torch.cuda.device` had made the current one.
"""

import contextlib
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from actial_fast import (
    AdvantageSpec,
    GRPOSpec,
    group_advantages,
    grpo_loss_from_logits,
    linear_cross_entropy,
    linear_grpo_loss,
    linear_kl,
    linear_logprob,
    logprob_from_logits,
    ops,
)
from actial_fast.model import attention, paged
from actial_fast.packing import packed_ops
from actial_fast.packing.images import ImageSettings
from tests.no_sync import fake_cuda

OTHER = torch.device("cuda", 1)
T, H, V = 12, 32, 64


def put(*shape: int, dtype=torch.float32, device=OTHER) -> torch.Tensor:
    return torch.ones(shape).to(device, non_blocking=True).to(dtype)


def rows(dtype=torch.float32) -> torch.Tensor:
    return put(T, dtype=dtype)


def head(count: int = 1) -> list[torch.Tensor]:
    return [x for _ in range(count) for x in (put(T, H, dtype=torch.bfloat16), put(V, H, dtype=torch.bfloat16))]


def grpo(spec: GRPOSpec, function, *inputs: torch.Tensor) -> None:
    cu_seqlens = torch.tensor([0, 5, T])
    function(*inputs, rows(torch.int64), rows(), rows(), rows(), spec, token_weight=rows(), cu_seqlens=cu_seqlens)


def images() -> packed_ops.PixelBatch:
    settings = ImageSettings(14, 2, 2, 1, 1 << 20, 3, (0.5,) * 3, (0.5,) * 3)
    table = torch.tensor([[0], [0], [2]]).to(OTHER, non_blocking=True)
    return packed_ops.PixelBatch(put(56 * 56 * 3, dtype=torch.uint8), table, ((1, 4, 4),), 4, settings)


def reads() -> paged.Reads:
    given = put(2, 1, dtype=torch.int32), put(2, 4, dtype=torch.int32), put(2, dtype=torch.int32), put(2, dtype=torch.int64)
    return paged.Reads(*given)


CALLS = {
    "linear_logprob": lambda: linear_logprob(*head(), rows(torch.int64)),
    "linear_grpo_loss": lambda: grpo(GRPOSpec(beta=0.01), linear_grpo_loss, *head()),
    "gspo": lambda: grpo(GRPOSpec.named("gspo", beta=0.01), linear_grpo_loss, *head()),
    "linear_cross_entropy": lambda: linear_cross_entropy(*head(), rows(torch.int64), rows()),
    "linear_kl": lambda: linear_kl(*head(2)),
    "logprob_from_logits": lambda: logprob_from_logits(put(T, V), rows(torch.int64)),
    "grpo_loss_from_logits": lambda: grpo(GRPOSpec(beta=0.01), grpo_loss_from_logits, put(T, V)),
    "group_advantages": lambda: group_advantages(rows(), rows(torch.int64), AdvantageSpec()),
    "token_kl": lambda: ops.token_kl(rows(), rows()),
    "merge": lambda: attention.merge(put(T, 4, 16), put(4, T), put(T, 4, 16), put(4, T)),
    "decode": lambda: paged._read(put(2, 4, 32), put(8, 16, 2, 32), put(8, 16, 2, 32), reads(), 0.1),
    "patchify": lambda: packed_ops.patchify(images()),
    "embed": lambda: packed_ops.embed(rows(torch.int64), put(V, H), None, put(0, dtype=torch.int64), put(0, dtype=torch.int64)),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is faked, which takes a machine without one")
@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_launch_is_on_the_device_of_its_tensors(call):
    current, launched = [torch.device("cuda", 0)], []

    @contextlib.contextmanager
    def device(x):
        current.append(x)
        yield
        current.pop()

    def launch(self, *args, **kwargs):
        launched.append(current[-1])
        return SimpleNamespace()

    with fake_cuda(), mock.patch("torch.cuda.device", device), contextlib.ExitStack() as stack:
        for kernel in ("interpreter.InterpretedFunction", "jit.JITFunction"):
            stack.enter_context(mock.patch(f"triton.runtime.{kernel}.run", launch))
        call()
    assert launched and set(launched) == {OTHER}, launched
    assert current == [torch.device("cuda", 0)], "not put back"

"""The policy's weights as another engine takes them: under the names that files have, whole, tensor after tensor.

A tensor is gathered when it is asked for and forgotten here at once, so that no rank ever holds a second model. Sharded blocks are not
made whole by FSDP for it: its memory would have to outlive whatever still refers to it on the other side.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from actial_fast.model.families.known import family_of
from actial_fast.model.nf4 import quantized
from actial_fast.model.policy import Policy
from actial_fast.model.weights import base_name


def checkpoint_weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """The policy's weights under their names in a Hugging Face checkpoint, whole, in the dtype of its computation, without adapters.

    One tensor at a time is gathered from the ranks' rows, in that dtype; whoever takes it decides how long it lives. Every rank iterates.
    """
    file_name = family_of(policy.base).file_name
    for name, parameter in policy.named_parameters():
        if ".lora_" not in name:
            yield file_name(base_name(name)), _whole(parameter, policy.compute_dtype)
    for name, layer in quantized(policy).items():  # as the trainer computes with them, and not as they were before
        yield file_name(name), layer.dequantized(policy.compute_dtype)


def adapters(policy: Policy) -> tuple[dict[str, Tensor], list[str]]:
    """Copies of the adapters' tensors under PEFT's names, whole, and the layers that have them. Every rank calls.

    Copies, since vLLM scales what it gets in place.
    """
    found = {
        f"base_model.model.{base_name(name).replace('.default.', '.')}": _whole(parameter, policy.compute_dtype).clone()
        for name, parameter in policy.named_parameters()
        if ".lora_" in name
    }
    return found, sorted({name.split(".lora_")[0].rpartition(".")[2] for name in found})


def _whole(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    value = parameter.detach().to(dtype)  # before it is gathered
    return value.full_tensor() if isinstance(value, DTensor) else value

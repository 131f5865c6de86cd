"""What is put inside vLLM, where it has no setting for what vllm.py needs of it."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from actial_fast.train.dist import World

ADAPTER = 1  # the number that vLLM knows our adapters by


class View:
    """What is put before vLLM's sampler: see vllm.py."""

    def __init__(self, banned: Tensor):
        self.temperature = 1.0
        self._banned = banned

    def put_on(self, model: nn.Module) -> None:
        """From now on the model's logits are log-probs at the temperature, minus infinity where banned."""
        plain: Callable[..., Tensor | None] = model.compute_logits  # type: ignore[assignment]

        def compute_logits(*args: Any, **kwargs: Any) -> Tensor | None:
            logits = plain(*args, **kwargs)
            if logits is None:  # of a rank that does not sample
                return None
            self._banned = self._banned.to(logits.device)
            logits = logits.float() if self.temperature == 1 else logits.float() / self.temperature
            return logits.log_softmax(-1).index_fill_(-1, self._banned, -torch.inf)

        model.compute_logits = compute_logits  # type: ignore[assignment]


def take_adapters(worker: Any, tensors: dict[str, Tensor], targets: list[str], lora: Any) -> None:
    """Runs in vLLM's worker: our adapters in the place of those it has, without a folder in between."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    manager = worker.model_runner.lora_manager._adapter_manager
    mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
    made = LoRAModel.from_lora_tensors(
        lora_model_id=ADAPTER,
        tensors=tensors,
        peft_helper=PEFTHelper.from_dict({"r": lora.rank, "lora_alpha": lora.alpha, "use_rslora": lora.rslora, "target_modules": targets}),
        device="cpu",
        dtype=worker.model_runner.lora_config.lora_dtype,
        weights_mapper=mapper.get_rename_mapper() if mapper is not None else None,
    )
    manager.remove_adapter(ADAPTER)
    manager.add_adapter(made)
    manager.activate_adapter(ADAPTER)


@contextlib.contextmanager
def shared_memory(where: World, ranks: int) -> Iterator[None]:
    """On a CPU ranks that share an engine meet in memory that vLLM gives the same name in every run and never removes: after a run that
    was killed, or beside another, none could start. Here each engine's has a name of its own, and none once all its ranks hold it."""
    if ranks == 1:
        yield
        return
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed as Shared

    name = where.gather([secrets.token_hex(8)])[where.rank // ranks * ranks]
    plain = Shared.make_group_name
    Shared.make_group_name = staticmethod(lambda communicator: f"{plain(communicator)}-{name}")
    try:
        yield
    finally:
        Shared.make_group_name = staticmethod(plain)
        for left in Path("/dev/shm").glob(f"*-{name}_*"):
            left.unlink(missing_ok=True)

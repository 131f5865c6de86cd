"""FusedGRPOTrainer on ranks that shard their models with FSDP2, beside TRL on one rank and on these: test_trl_sharded.py starts them.

accelerate shards on accelerators alone. `as_accelerators` has it take the processes of this machine for some, with gloo between them; what
follows is accelerate's, TRL's and PyTorch's own.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import Qwen2ForCausalLM
from trl import GRPOTrainer

from actial_fast.integrations.trl import FusedGRPOTrainer, patch_trl
from tests.head_cases import difference
from tests.integrations.test_trl import (
    MODELS,
    STEPS,
    TOKENIZER,
    TOLERANCE,
    Options,
    assert_same_training,
    make_batch,
    make_trainer,
    run,
    text_model,
    trained,
)

SHARDED = {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}}


def as_accelerators(ranks: bool) -> None:
    """The next trainers are sharded over all ranks, or are each rank's own."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    backend = ("gloo", DistributedType.MULTI_GPU) if ranks else (None, DistributedType.NO)
    PartialState._prepare_backend = lambda *_: backend
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


def tied() -> Qwen2ForCausalLM:
    config = text_model().config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config)


def whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def sharded(kind: type[GRPOTrainer], model, folder: Path) -> GRPOTrainer:
    """A trainer as its train() prepares it."""
    trainer = make_trainer(kind, model, folder, **SHARDED)
    model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.create_optimizer())
    trainer.model = trainer.model_wrapped = model
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return trainer


def steps(folder: Path) -> None:
    """Losses of a rank are those of TRL alone on its batch, gradients their mean over ranks, metrics those of TRL sharded."""
    options = Options("dapo", beta=0.04), Options("bnpo", "sequence", off_policy=0.05, importance="sequence_truncate")
    for name, make in {**MODELS, "tied": tied}.items():
        as_accelerators(False)
        alone = make_trainer(GRPOTrainer, make(), folder)
        batch = make_batch(alone, name.startswith("images"), seed=3 + dist.get_rank())
        mean = batch["num_items_in_batch"].float()
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
        want = [run(alone, batch | {"num_items_in_batch": mean}, o, STEPS) for o in options]
        as_accelerators(True)
        both = {kind: sharded(kind, make(), folder) for kind in (GRPOTrainer, FusedGRPOTrainer)}
        for o, expected in zip(options, want, strict=True):
            theirs, ours = (run(t, batch | {"num_items_in_batch": mean * dist.get_world_size()}, o, STEPS) for t in both.values())
            assert_near(ours.losses, expected.losses, (name, o))
            assert ours.gradients.keys() == expected.gradients.keys() and len(expected.gradients) > 3, (name, o)
            for parameter, gradient in expected.gradients.items():
                dist.all_reduce(gradient)
                gradient /= dist.get_world_size()
                got = whole(ours.gradients[parameter])
                assert gradient.abs().max() > 0 and difference(got, gradient) < TOLERANCE, (name, o, parameter)
            assert list(ours.metrics) == list(theirs.metrics) and "entropy" in theirs.metrics, (name, o)
            for metric, values in theirs.metrics.items():
                assert_near(ours.metrics[metric], values, (name, o, metric))


def assert_near(got: list[float], want: list[float], what: object) -> None:
    assert got == pytest.approx(want, rel=TOLERANCE, abs=TOLERANCE / 10, nan_ok=True), what


def training(folder: Path) -> None:
    """All of train(), two updates of each generation, with a reference: logs and weights are TRL's, sharded alike."""
    as_accelerators(True)
    for adapters in (False, True):
        want, got = (trained(kind, folder, adapters, **SHARDED) for kind in (GRPOTrainer, FusedGRPOTrainer))
        assert got.processes == dist.get_world_size()
        assert_same_training(*(gathered(x) for x in (want, got)))


def gathered(result: SimpleNamespace) -> SimpleNamespace:
    assert all(isinstance(x, DTensor) for x in result.weights.values())
    return SimpleNamespace(logs=result.logs, weights={name: whole(x) for name, x in result.weights.items()})


def bfloat16(folder: Path) -> list[dict]:
    """At learning rate 0, two passes over each generation: the logs of a run in which every ratio is 1."""
    as_accelerators(True)
    narrow = {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 3e-4, "loss_type": "grpo", "learning_rate": 0.0}
    fused = trained(FusedGRPOTrainer, folder, bf16=True, **narrow, **SHARDED)
    with patch_trl():
        patched = trained(GRPOTrainer, folder, bf16=True, **narrow, **SHARDED)
    return fused.logs[:-1] + patched.logs[:-1]


def main() -> None:
    part, folder = sys.argv[1], Path(sys.argv[2]) / os.environ["RANK"]
    text_model().save_pretrained(folder / "model")  # before there are several ranks, of which one would save
    TOKENIZER.save_pretrained(folder / "model")
    dist.init_process_group("gloo")
    print(json.dumps({"steps": steps, "training": training, "bfloat16": bfloat16}[part](folder)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

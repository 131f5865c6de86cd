"""What a recipe says of how its stage is run: the optimizer, the ranks, what is kept of it and what is looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from actial_fast.settings.sampling import at_least


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its schedule, and how its states are held."""

    lr: float = 5e-6
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's two averages."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay, applied to matrices only."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up: stay, or fall to `min_lr_ratio` of the peak by the last step."""
    min_lr_ratio: float = 0.0
    """Learning rate at the end of the schedule, as a share of the peak."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 = no clipping."""
    max_skipped: int = 5
    """An optimizer step whose loss or gradient is NaN or infinite is skipped; so many in a row end the run."""
    kind: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"
    """adamw: two moments of 4 bytes a weight. adamw8bit: of 1 byte, by bitsandbytes. paged_adamw8bit: the same in memory that the driver
    moves to the host and back when the device has too little, on CUDA."""
    master: bool = False
    """model.dtype: bfloat16: keep a float32 copy of the trained weights, which the steps are made on. Without it steps are rounded up or
    down at random, in proportion, so that those smaller than a weight's last bit are made in the mean."""
    offload: Literal["none", "sampling", "always"] = "none"
    """What lies on the host, in pinned memory. sampling: while replies are drawn, the optimizer's states and GRPO's reference. always: the
    states at all times, which pass through the device piece by piece during a step, and the reference while replies are drawn."""

    def __post_init__(self) -> None:
        at_least(self, 0, "lr", "eps", "weight_decay", "warmup_steps", "min_lr_ratio", "clip_norm")
        at_least(self, 1, "max_skipped")
        if self.kind == "paged_adamw8bit" and self.offload != "none":
            raise ValueError(f"offload: the driver moves the states of paged_adamw8bit itself; {self.offload} is for the other kinds")


@dataclass(frozen=True)
class DistConfig:
    """How the ranks share the work."""

    fsdp: bool = False
    """Shard weights, gradients and optimizer states over the ranks (FSDP2); otherwise each rank holds a copy."""
    reshard: Literal["block", "step"] = "block"
    """fsdp: how long gathered weights are kept. block: a layer's until it has run, forward and backward. step: all of them, from the first
    micro-batch of a pass to the last, which takes their whole size on every device and saves gathering them twice a micro-batch."""
    reduce: Literal["pass", "step"] = "pass"
    """fsdp: when gradients are summed over ranks. pass: behind every backward pass. step: once, behind the last one of an optimizer step,
    for which every device adds gradients of the whole model up, in float32."""
    replicate: int = 1
    """fsdp: groups of ranks that each hold a whole model between them; with as many as there are machines (2 to 4), weights are gathered
    within one, and only gradients go between them, once a step."""
    fit: Literal["refuse", "warn"] = "refuse"
    """What becomes of a run that the memory of its devices, or of this machine, or the disk is too small for by the budget (`actial plan`):
    it does not begin, or it is told and goes on."""
    timeout: float = 60.0
    """Minutes that a rank waits for another, for the last replies and their rewards among others, before the run ends."""

    def __post_init__(self) -> None:
        at_least(self, 1e-3, "timeout")
        at_least(self, 1, "replicate")
        for name, default in (("reshard", "block"), ("reduce", "pass"), ("replicate", 1)):
            if not self.fsdp and getattr(self, name) != default:
                raise ValueError(f"{name}: says how sharded weights travel, and none are sharded; set fsdp to true, or {name} to {default}")


@dataclass(frozen=True)
class SaveConfig:
    """Checkpoints and logs."""

    every: int = 100
    """Steps between checkpoints; 0 = only after the last step."""
    keep: int = 2
    """Checkpoints kept; older ones are deleted."""
    tensorboard: bool = True
    """Write TensorBoard scalars into the run folder."""
    wandb: str = ""
    """Weights & Biases project; empty = not used."""

    def __post_init__(self) -> None:
        at_least(self, 0, "every")
        at_least(self, 1, "keep")


@dataclass(frozen=True)
class ProfileConfig:
    """A window of steps to look at in https://ui.perfetto.dev: RUN/profile has a trace of each."""

    steps: tuple[int, int] = (0, 0)
    """First and last step to record; [0, 0] = none. Recorded steps are slower, and their files large: two or three will do."""
    all_ranks: bool = False
    """Record every rank, not rank 0 alone."""
    memory: bool = False
    """Record allocations as well."""
    stacks: bool = False
    """Record where in the Python code each operator was called, which slows the host down."""

    def __post_init__(self) -> None:
        first, last = self.steps
        if not (first == last == 0 or 1 <= first <= last):
            raise ValueError(f"steps: expected the first and the last step, from 1, or [0, 0] for none, got {list(self.steps)}")

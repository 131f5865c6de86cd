"""The recipes of the two loops: everything that a run of `actial sft` or `actial grpo` can be told, with its default and its meaning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from actial_fast.data.sources.picture import MAX_PIXELS
from actial_fast.data.sources.source import SourceConfig
from actial_fast.ops.spec import AdvantageSpec, GRPOSpec
from actial_fast.packing.images import GB, MOST
from actial_fast.packing.planning import Costs
from actial_fast.settings.model import ModelConfig, checkpointed
from actial_fast.settings.running import DistConfig, OptimConfig, ProfileConfig, SaveConfig
from actial_fast.settings.sampling import OverlongConfig, SamplingConfig, at_least
from actial_fast.tasks.rewards import RewardConfig


@dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation."""

    sources: tuple[SourceConfig, ...] = ()
    """What to evaluate on, by replies to its rows; empty = no replies are drawn."""
    loss_sources: tuple[SourceConfig, ...] = ()
    """What to measure the loss on, without a reply: of the answers in its rows, in nats per token, and its exponential, the perplexity. For
    text that has no one right answer; a source may stand here and in `sources`."""
    every: int = 0
    """Steps between evaluations; 0 = only after the last step."""
    before: bool = False
    """SFT: also before the first step, for the figures of the model that it begins with; GRPO always does."""
    limit: int = 0
    """Rows per evaluation, taken in order; 0 = all."""
    temperature: float = 0.0
    """0 = greedy; otherwise replies are sampled at this temperature."""
    max_new_tokens: int = 1024
    """Longest reply, in tokens."""
    strict: bool = False
    """A reply is right only if the text in its <answer> tags, or all of it where it has none, is the truth up to case, as in the paper;
    otherwise an answer that a person would call right is right (the option's letter in its usual spellings, or its text)."""
    kv_tokens: int = 0
    """As sampling.kv_tokens."""
    fatal: bool = False
    """Whether an evaluation that fails (a bad row, too little memory) ends the run; otherwise it is logged with its cause."""

    def __post_init__(self) -> None:
        at_least(self, 0, "every", "limit", "temperature", "kv_tokens")
        at_least(self, 1, "max_new_tokens")


@dataclass(frozen=True)
class RolloutConfig:
    """Who draws replies, in training and in evaluation."""

    engine: Literal["embedded", "vllm", "server"] = "embedded"
    """embedded: the trainer's own module. vllm: an engine in each rank's process, which gets the weights of every step. server: a model
    behind an OpenAI-compatible address, for `actial eval` and `actial bench`, since it cannot be given weights."""
    ahead: int = 0
    """GRPO: 1 = the replies of a step are drawn with the weights that the step before it began with, beside that step's update where the
    engine has weights of its own; `importance_correction` then weighs them. 0 = with the weights that the step begins with."""
    tensor_parallel: int = 1
    """vllm: neighbouring ranks that hold one copy of the model together; 1 wherever a device has room for the whole."""
    gpu_memory: float = 0.6
    """vllm on CUDA: share of the device's memory for weights, keys and values while sampling. On a CPU keys and values have 1 GiB."""
    max_images: int = 8
    """vllm: most images of a prompt."""
    url: str = ""
    """server: its base URL, for example http://localhost:8000/v1; the key, where it wants one, is in $OPENAI_API_KEY."""
    model: str = ""
    """server: the name that it knows the model by."""
    workers: int = 32
    """server: requests at a time."""

    def __post_init__(self) -> None:
        if self.ahead not in (0, 1):
            raise ValueError(f"ahead: replies are drawn 0 steps ahead or 1, got {self.ahead}; older weights are not kept")
        at_least(self, 1, "tensor_parallel", "max_images", "workers")
        if not 0 < self.gpu_memory <= 1:
            raise ValueError(f"gpu_memory: a share above 0 and up to 1, got {self.gpu_memory}")
        if self.engine == "server" and not (self.url and self.model):
            raise ValueError("engine: server needs url and model, the address and the name that it knows the model by")


def _weights_reach(rollout: RolloutConfig) -> None:
    if rollout.engine == "server":
        raise ValueError(
            "rollout.engine: a server keeps the weights that it was started with, so its replies would not be this policy's; set it to "
            "embedded or vllm here, and use a server with `actial eval --server` or `actial data cot --endpoint`"
        )


def _master_differs(model: ModelConfig, optim: OptimConfig) -> None:
    if optim.master and model.dtype == "float32":
        raise ValueError("optim.master: float32 weights need no copy in float32; set it to false, or model.dtype to bfloat16")


def _adapters_reach(model: ModelConfig, rollout: RolloutConfig) -> None:
    for name in ("dora", "tower", "merger"):
        if rollout.engine == "vllm" and getattr(model.lora, name):
            raise ValueError(f"model.lora.{name}: vLLM takes plain adapters of the language model only; set rollout.engine to embedded")


@dataclass(frozen=True)
class DataConfig:
    """What is trained on."""

    sources: tuple[SourceConfig, ...] = ()
    """Sources, interleaved by their weights."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What a malformed row does: end the run with its name, or leave its slot empty and go into rejects.jsonl."""
    workers: int = 2
    """Threads that read and decode ahead of the step."""
    max_prompt_tokens: int = 16000
    """A longer prompt is a row-level error (nothing is ever cut inside an image)."""
    max_image_pixels: int = MAX_PIXELS
    """An image with more pixels is a row-level error; smaller ones are scaled as the model's limits say."""
    together: bool = True
    """Draw rows together that stand next to each other in their file and show the same images, so that these are computed once."""
    image_cache: str = ""
    """Folder of decoded and resized images, 3 bytes a pixel, kept for later runs; empty = ~/.cache/actial_fast/images."""
    image_cache_gb: float = MOST / GB
    """GB that the images in that folder may take, those of other runs among them; beyond it the least recently used ones are removed, and
    decoded again when they are drawn again. 0 = no limit."""

    def __post_init__(self) -> None:
        at_least(self, 0, "workers", "image_cache_gb")
        if self.image_cache_gb == float("inf"):
            raise ValueError("image_cache_gb: for no limit set it to 0, got inf")
        at_least(self, 1, "max_prompt_tokens", "max_image_pixels")


@dataclass(frozen=True)
class SFTRecipe:
    """Supervised fine-tuning: next-token loss on the answers only."""

    kind: Literal["sft"] = "sft"
    """Which loop this recipe is for."""
    name: str = "sft"
    """Name of the stage in logs, checkpoints and the report."""
    run: str = "runs/sft"
    """Folder for checkpoints, metrics and the report."""
    seed: int = 0
    """Seed of shuffling and of adapter weights."""
    model: ModelConfig = ModelConfig()
    """Starting weights."""
    data: DataConfig = DataConfig()
    """Training rows."""
    optim: OptimConfig = OptimConfig()
    """Optimizer."""
    eval: EvalConfig = EvalConfig()
    """Held-out evaluation."""
    rollout: RolloutConfig = RolloutConfig()
    """Who draws the replies of evaluations."""
    save: SaveConfig = SaveConfig()
    """Checkpoints and logs."""
    dist: DistConfig = DistConfig()
    """Ranks."""
    profile: ProfileConfig = ProfileConfig()
    """Steps to record for a profile."""
    epochs: float = 2.0
    """Passes over the data; ignored when `steps` is given."""
    steps: int = 0
    """Optimizer steps; 0 = as many as `epochs` needs."""
    batch_size: int = 128
    """Rows per optimizer step, over all ranks."""
    packing: Literal["packed", "plain"] = "packed"
    """packed: no padding, shared beginnings and images computed once. plain: padded batches through the unmodified model, the oracle."""
    pack_tokens: int = 24576
    """packed: most tokens per forward and backward pass on one rank."""
    pack_patches: int = 65536
    """packed: most image patches per forward and backward pass on one rank."""
    costs: Costs = Costs()
    """packed: what a pass costs, by which the ranks' shares are balanced; `python -m bench.step.costs` measures it."""
    micro_batch: int = 4
    """plain: rows per forward and backward pass on one rank."""
    loss_weighting: Literal["token", "row"] = "token"
    """token: every answer token counts the same. row: every answer counts the same (the share of long answers shrinks)."""
    stop_accuracy: float = 0.0
    """End the stage once every question type reaches this accuracy in an evaluation; 0 = never."""
    stop_steps: int = 0
    """Do not end the stage early before this step."""

    def __post_init__(self) -> None:
        at_least(self, 0, "seed", "epochs", "steps", "stop_accuracy", "stop_steps")
        at_least(self, 1, "batch_size", "micro_batch", "pack_tokens", "pack_patches")
        checkpointed(self.model, self.packing)
        _master_differs(self.model, self.optim)
        _weights_reach(self.rollout)
        _adapters_reach(self.model, self.rollout)


@dataclass(frozen=True)
class GRPORecipe:
    """Group relative policy optimisation with verifiable rewards."""

    kind: Literal["grpo"] = "grpo"
    """Which loop this recipe is for."""
    name: str = "grpo"
    """Name of the stage in logs, checkpoints and the report."""
    run: str = "runs/grpo"
    """Folder for checkpoints, metrics and the report."""
    seed: int = 0
    """Seed of shuffling and of sampling."""
    model: ModelConfig = ModelConfig()
    """Starting weights; they are also the reference when `loss.beta` is above 0."""
    data: DataConfig = DataConfig(together=False)
    """Prompts; questions about the same images need not come together here, since each is sampled `sampling.n` times anyway."""
    sampling: SamplingConfig = SamplingConfig()
    """Replies."""
    rollout: RolloutConfig = RolloutConfig()
    """Who draws them."""
    rewards: tuple[RewardConfig, ...] = (RewardConfig("format", 0.5), RewardConfig("accuracy", 0.5))
    """Rewards and their weights: names from the registry or module:function."""
    advantages: AdvantageSpec = AdvantageSpec()
    """How rewards become advantages."""
    overlong: OverlongConfig = OverlongConfig()
    """Replies that are too long."""
    loss: GRPOSpec = GRPOSpec()
    """What is optimised."""
    optim: OptimConfig = OptimConfig(lr=1e-6, warmup_steps=0)
    """Optimizer."""
    eval: EvalConfig = EvalConfig()
    """Held-out evaluation."""
    save: SaveConfig = SaveConfig(every=10)
    """Checkpoints and logs."""
    dist: DistConfig = DistConfig()
    """Ranks."""
    profile: ProfileConfig = ProfileConfig()
    """Steps to record for a profile."""
    steps: int = 150
    """Sampling steps."""
    prompts: int = 1024
    """Prompts per step, over all ranks."""
    minibatch: int = 256
    """Prompts (with all their replies) per optimizer step; `prompts` must be a multiple of it."""
    packing: Literal["packed", "plain"] = "packed"
    """packed: no padding, a group's prompt and images computed once. plain: padded batches through the unmodified model, the oracle."""
    pack_tokens: int = 24576
    """packed: most tokens per forward and backward pass on one rank."""
    pack_patches: int = 65536
    """packed: most image patches per forward and backward pass on one rank."""
    costs: Costs = Costs()
    """packed: what a pass costs, by which the ranks' shares are balanced; `python -m bench.step.costs` measures it."""
    micro_batch: int = 4
    """plain: replies per forward and backward pass on one rank."""
    skip_zero_variance: bool = True
    """Leave groups whose rewards are all equal out of the update where their gradient is exactly zero: when `loss.beta` and
    `loss.entropy_coef` are 0 and `loss.top_entropy` is 1."""
    skip_old_logp: bool = True
    """Take the policy's own log-probs for the old ones of a step's first mini-batch, which is exact, instead of computing them before."""
    skip_reference: bool = True
    """Do without the reference where `loss.beta` is 0; false logs the KL all the same."""
    importance_correction: Literal["auto", "on", "off"] = "auto"
    """Weight the policy term by policy / sampler probability; how is `loss.importance`, truncated or masked, by token or sequence, within
    the bounds of `loss`. auto = on where another engine than the trainer's own code draws, and with `rollout.ahead`."""
    log_rollouts: int = 4
    """Groups whose replies are kept for the report, at the first, middle and last step."""

    def __post_init__(self) -> None:
        at_least(self, 0, "seed", "log_rollouts")
        at_least(self, 1, "steps", "prompts", "minibatch", "micro_batch", "pack_tokens", "pack_patches")
        checkpointed(self.model, self.packing)
        _master_differs(self.model, self.optim)
        _weights_reach(self.rollout)
        _adapters_reach(self.model, self.rollout)
        if not self.rewards:
            raise ValueError("rewards: at least one is needed, for example [{name: accuracy}]")
        if not any(reward.weight for reward in self.rewards):
            raise ValueError("rewards: all weights are 0, so that nothing would be learned; give one a weight")
        names, sampling = [r.name for r in self.rewards], self.sampling
        if sampling.gate.on and sampling.gate.reward not in names:
            raise ValueError(f"sampling.gate.reward: {sampling.gate.reward!r} is not one of the rewards, {', '.join(names)}")
        if self.overlong.buffer > sampling.max_new_tokens:
            raise ValueError(
                f"overlong.buffer: must be at most sampling.max_new_tokens, {sampling.max_new_tokens}, got {self.overlong.buffer}"
            )
        if self.rollout.ahead and self.rollout.engine != "embedded" and self.model.lora.dropout:
            raise ValueError("model.lora.dropout: with rollout.ahead, vLLM would draw between the update's random numbers; set it to 0")
        if self.rollout.ahead and self.rollout.engine == "vllm" and self.optim.offload == "sampling":
            raise ValueError(
                "optim.offload: with rollout.ahead, vLLM draws beside the update, which needs the states; set it to none or always"
            )
        if self.rollout.ahead and self.importance_correction == "off":
            raise ValueError(
                "importance_correction: off would take replies of older weights for the policy's own; rollout.ahead needs auto or on"
            )

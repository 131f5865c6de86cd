"""What a recipe says of the model: which weights it starts from, how they are held, and what of them is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from actial_fast.settings.sampling import at_least


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters through PEFT; rank 0 trains the weights themselves."""

    rank: int = 0
    """Rank of the adapters; 0 = no adapters."""
    alpha: float = 32.0
    """Scale of the adapters: their product is multiplied by alpha / rank, or as `rslora` says."""
    dropout: float = 0.0
    """Dropout on the adapters' input."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the linear layers of the language model that get adapters."""
    tower: bool = False
    """Adapters on the linear layers of the vision tower's blocks too, which is then trained: an image passes it once in every pass."""
    merger: bool = False
    """Adapters on the linear layers of the merger too, between the tower and the language model; it counts as the tower's."""
    rslora: bool = False
    """Rank-stabilised: the product is multiplied by alpha / sqrt(rank), so that a higher rank does not weaken each of its directions."""
    dora: bool = False
    """Weight-decomposed: the length of each row of an adapted weight is trained beside its direction; its norm is taken in every pass."""

    def __post_init__(self) -> None:
        at_least(self, 0, "rank", "alpha", "dropout")
        for name in ("tower", "merger", "rslora", "dora"):
            if getattr(self, name) and not self.rank:
                raise ValueError(f"{name}: is about adapters, and there are none; set rank above 0")
        if self.rank and not (self.targets or self.tower or self.merger):
            raise ValueError("targets: no layer gets adapters; name some, or set tower or merger")

    @property
    def scale(self) -> float:
        """What the adapters' product is multiplied by; 0 where there are none."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank) if self.rank else 0.0


@dataclass(frozen=True)
class ModelConfig:
    """Which weights to start from and how they are held."""

    path: str = ""
    """Folder (or hub name) with a Hugging Face checkpoint of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage of the weights that are not frozen, and of their gradients. Of bfloat16, optim.master says how small steps are kept. Compute
    is bf16 on CUDA either way."""
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage of weights that are not trained (the base under LoRA, a frozen vision tower, the reference model)."""
    freeze: tuple[str, ...] = ()
    """Parameters whose name starts with one of these are not trained, e.g. model.visual or lm_head."""
    lora: LoRAConfig = LoRAConfig()
    """Low-rank adapters."""
    checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass recomputes of the language model's layers, to the same loss and gradients. full: all of a layer but its input,
    for about a third more compute. selective: all but its input and the attention, which is the dearest part of long rows."""
    tower_checkpointing: Literal["none", "full"] = "none"
    """The same of the vision tower's layers, where it is trained."""
    offload_activations: bool = False
    """What checkpointing keeps waits for the backward pass in pinned host memory, and not on the device."""
    quantize: Literal["none", "nf4"] = "none"
    """nf4: under adapters the linear layers of the language model are held in 4 bits a weight, through bitsandbytes; tower, merger,
    embedding, head and norms stay in frozen_dtype."""
    quantize_twice: bool = True
    """nf4: the scale that 64 weights share is held in 8 bits instead of 32."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4"] = "sdpa"
    """Kernels of the attention. packing: packed: sdpa and flash_attention_2 are the flash kernels compiled into PyTorch, 3 (Hopper) and 4
    (Hopper, Blackwell) those of the packages flash-attn-3 and flash-attn-4. packing: plain: transformers' attention of that name."""
    liger: Literal["auto", "on", "off"] = "auto"
    """Liger's RMSNorm, SwiGLU and rotary kernels in the model, on CUDA; auto = where liger-kernel is installed."""
    min_pixels: int = 0
    """Images with fewer pixels are scaled up to this; 0 = as the checkpoint's image processor says."""
    max_pixels: int = 0
    """Images with more pixels are scaled down to this; 0 = as the checkpoint's image processor says."""

    def __post_init__(self) -> None:
        if self.offload_activations and self.checkpointing == self.tower_checkpointing == "none":
            raise ValueError("offload_activations: moves what checkpoints keep, and there are none; set checkpointing to selective or full")
        if self.quantize != "none" and not self.lora.rank:
            raise ValueError(f"quantize: {self.quantize} weights cannot be trained, only adapters beside them; set lora.rank above 0")
        if self.quantize == "none" and not self.quantize_twice:
            raise ValueError("quantize_twice: nothing is quantised; set quantize to nf4, or leave it out")


def checkpointed(model: ModelConfig, packing: str) -> None:
    """ValueError where checkpointing asks for what a path cannot do."""
    if packing == "plain" and model.checkpointing == "selective":
        if model.attention != "sdpa":
            raise ValueError(f"model.checkpointing: of {model.attention} attention selective cannot keep the output; set it to full")
        if model.offload_activations:
            raise ValueError(
                "model.offload_activations: packing: plain moves what full checkpoints keep only; set model.checkpointing to full"
            )

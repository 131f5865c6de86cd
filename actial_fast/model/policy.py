"""Loading, freezing, adapters, and the module that the loops call: an unmodified transformers model whose head is handed to the caller."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedConfig

from actial_fast.integrations.liger import apply_liger
from actial_fast.model.activations import use_checkpoints
from actial_fast.model.adapters import add_adapters, draw_adapters
from actial_fast.model.attention import is_packed, use_flash, use_packed_attention
from actial_fast.model.families.known import family_of
from actial_fast.model.nf4 import fill_nf4, hold_in_nf4, nf4_problem
from actial_fast.model.vision import VisionArguments, check_patches, encode_images, vision_arguments
from actial_fast.model.weights import fill, misfits, open_weights, resolve, skeleton
from actial_fast.ops.ranges import named
from actial_fast.packing.batch import Batch, PackedBatch
from actial_fast.packing.packed_ops import PixelBatch, embed, patchify
from actial_fast.settings.model import LoRAConfig, ModelConfig

NF4_NOTE = """\
These adapters were trained beside a base in NF4: {path}, the linear layers of its language model in 4 bits. Open it the same way

    BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant={twice},
                       llm_int8_skip_modules=["model.visual", "lm_head"])

to get the model that was trained. Beside the base in 16 bits they give another one, as far away as rounding to 4 bits takes it.
"""


@dataclass(frozen=True)
class ImageBatch:
    """Images as the vision tower takes them: their pixels, and everything that it would otherwise compute from their grids with syncs."""

    pixels: PixelBatch
    arguments: VisionArguments

    @staticmethod
    def of(pixels: PixelBatch, config: PreTrainedConfig) -> ImageBatch:
        """config: the tower's. ValueError where it takes other patches."""
        check_patches(pixels.settings, config)
        return ImageBatch(pixels, vision_arguments(pixels.grids, config, pin=pixels.pixels.is_pinned()))

    def to(self, device: torch.device) -> ImageBatch:
        """The batch on `device`, without a sync."""
        return ImageBatch(self.pixels.to(device), self.arguments.to(device))


class Policy(nn.Module):
    """A vision-language model of transformers that yields hidden states and lets the caller apply the head.

    The head's matrix (V, H) is passed to a function inside forward, where sharded weights are whole, so that log-probs and losses are
    computed by fused ops from hidden states and no logits of every token exist.
    """

    def __init__(self, model: Any, compute_dtype: torch.dtype, config: ModelConfig | None = None):
        """model: of one of the families, maybe in a PeftModel; config: what it was loaded by; a policy without one cannot be saved."""
        super().__init__()
        self.model = model
        self.compute_dtype = compute_dtype
        self.config = config or ModelConfig()
        self.travel: Any = None
        """What train.sharding settled for it, where it is sharded."""
        for module in (self.base.model.get_input_embeddings(), self.base.lm_head):
            module.lend = MethodType(_lend, module)

    @property
    def base(self) -> Any:
        """The transformers model, without the adapters' wrapper."""
        return self.model.get_base_model() if self.adapted else self.model

    @property
    def adapted(self) -> bool:
        """True when low-rank adapters are trained instead of the weights."""
        return isinstance(self.model, PeftModel)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def hidden_dtype(self) -> torch.dtype:
        """Of hidden states, keys and values: the computation's, or the weights' own on a CPU, where nothing is cast."""
        held: torch.dtype = self.base.model.get_input_embeddings().weight.dtype
        return held if self.compute_dtype == torch.float32 else self.compute_dtype

    @property
    def trains_tower(self) -> bool:
        """True when any weight of the vision tower is trained."""
        return any(p.requires_grad for p in self.base.model.visual.parameters())

    def forward(self, inputs: dict[str, Any] | Batch | PackedBatch | ImageBatch, head: Callable[[Any, Tensor], Any] | None = None) -> Any:
        """head(x, head matrix (V, H)), x the hidden states (T, H) of a batch's loss rows, or the trunk's outputs for keyword arguments; of
        images, without a head, their merged features (rows, levels * H), one behind the other, the levels of an image side by side."""
        base = self.base
        low = self.compute_dtype != torch.float32
        with torch.autocast(self.device.type, self.compute_dtype, enabled=low):
            if isinstance(inputs, ImageBatch):
                with named("patchify"):
                    patches = patchify(inputs.pixels, self.compute_dtype if low else torch.float32)
                with named("tower"):
                    return encode_images(base.model.visual, patches.to(patches.dtype if low else base.model.visual.dtype), inputs.arguments)
            assert head is not None, "only images go without a head"
            if isinstance(inputs, PackedBatch):
                hidden = self._packed(inputs)[inputs.loss_rows]
            elif isinstance(inputs, Batch):
                with named("patchify"):
                    arguments = inputs.model_inputs()
                with named("trunk"):
                    hidden = base.model(**arguments, use_cache=False).last_hidden_state.flatten(0, 1)[inputs.loss_rows]
            else:
                with named("trunk"):
                    hidden = base.model(**inputs)
            with named("head"):
                return base.lm_head.lend(head, hidden)

    def _packed(self, batch: PackedBatch) -> Tensor:
        """Hidden states (L, H) of a packed batch, whose shared prefixes pass the layers once."""
        assert is_packed(self.base), "packed rows would see each other: load with packed=True"
        assert batch.features is not None or not batch.images, "the images of a packed batch pass the tower first (features.Features)"
        trunk = self.base.model
        batch = batch.split(trunk.language_model.config.hidden_size)
        with named("embedding"):
            embeds = trunk.get_input_embeddings().lend(
                lambda table: embed(batch.input_ids, table, batch.features, batch.image_slots, batch.image_rows)
            )
        with named("trunk"):
            out = trunk.language_model(
                inputs_embeds=embeds[None],
                position_ids=batch.position_ids[:, None],
                attention_mask=None,  # and none is built: the attention reads the batch's segments
                use_cache=False,
                packed=batch,
            )
        return out.last_hidden_state[0]

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by the name they have in this module."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def adapter_off(self) -> contextlib.AbstractContextManager[None]:
        """The model as it was before its adapters, for the time of a with block."""
        assert self.adapted, "there is no adapter to switch off"
        return self.model.disable_adapter()


def _lend(module: nn.Module, use: Callable[..., Any], *args: Tensor) -> Any:
    """use(*args, the module's weight), which sharding takes for a forward pass of the module, and gathers its weight."""
    return use(*args, module.weight)


def load_policy(
    config: ModelConfig, device: torch.device, seed: int, *, packed: bool = False, place: Callable[[Policy], Policy] | None = None
) -> Policy:
    """The policy of a recipe on `device`, in train mode, with what is frozen frozen; packed: able to take packed batches.

    place: shards the policy while it has no memory yet, so that each rank reads and holds its own rows only; every rank calls.
    ValueError where the checkpoint is not one of a known family, whole, or where the recipe does not fit it.
    """
    folder = resolve(config.path)
    stored = open_weights(folder)
    lora = config.lora.rank > 0
    if config.quantize == "nf4" and (problem := nf4_problem()):
        raise ValueError(problem)
    dtype = getattr(torch, config.frozen_dtype if lora else config.dtype)
    model = skeleton(folder, dtype, "sdpa" if packed else config.attention)
    if wrong := misfits(model, stored, config.path):
        raise ValueError("; ".join(wrong))
    policy = assembled(model, config, device, packed=packed)
    policy = place(policy) if place else policy
    fill(policy, stored, device)
    fill_nf4(policy, stored, device, dtype)
    draw_adapters(policy, seed)
    return policy.train()


def assembled(model: Any, config: ModelConfig, device: torch.device, *, packed: bool) -> Policy:
    """The policy of a recipe around a model on the meta device: adapters, checkpoints, what is frozen, and the attention; no memory yet."""
    lora = config.lora.rank > 0
    compute = torch.bfloat16 if device.type == "cuda" else torch.float32
    if lora:
        model = add_adapters(model, config)
    for prefix in config.freeze:
        names = [n for n, _ in model.named_parameters() if n.removeprefix("base_model.model.").startswith(prefix)]
        if not names:
            known = sorted({".".join(n.split(".")[:2]) for n, _ in model.named_parameters()})
            raise ValueError(f"model.freeze: no parameter starts with {prefix!r}; the model has {', '.join(known)}")
        for name in names:
            parameter = model.get_parameter(name)
            parameter.requires_grad_(False)
            if not lora:
                parameter.data = parameter.data.to(getattr(torch, config.frozen_dtype))
    _check_tower(model, config)
    if _uses_liger(config, device):
        apply_liger(model)
    policy = Policy(model, compute, config)
    if not policy.trained():
        raise ValueError("model.freeze: every parameter is frozen, nothing is left to train")
    if packed:
        _choose_flash(config.attention, device)
        use_packed_attention(policy.base)
        family_of(policy.base).prepare(policy.base)
    if config.quantize == "nf4":
        hold_in_nf4(policy.base.model.language_model, twice=config.quantize_twice, dtype=compute)
    trunk = policy.base.model
    use_checkpoints(trunk.language_model, trunk.visual, config, packed=packed)
    return policy


def _check_tower(model: nn.Module, config: ModelConfig) -> None:
    """ValueError where model.freeze leaves nothing of what adapters were asked for."""
    for key, part in (("tower", "visual.blocks."), ("merger", "visual.merger.")):
        if getattr(config.lora, key) and not any(part in name and p.requires_grad for name, p in model.named_parameters()):
            raise ValueError(f"model.freeze: freezes all that model.lora.{key} is to train; shorten the one, or set the other to false")


def _choose_flash(attention: str, device: torch.device) -> None:
    """The kernels of packed attention by their name in a recipe, for the whole process."""
    if attention == "eager":
        raise ValueError("model.attention: packed attention has no eager form; set it to sdpa, or packing to plain")
    if device.type == "cuda":
        use_flash({"flash_attention_3": "FA3", "flash_attention_4": "FA4"}.get(attention, "FA2"))
    elif attention != "sdpa":
        raise ValueError(f"model.attention: {attention} needs CUDA, and this is {device.type}; set it to sdpa")


def load_reference(
    config: ModelConfig, device: torch.device, *, packed: bool = False, place: Callable[[Policy], Policy] | None = None
) -> Policy:
    """A frozen copy of the starting weights, to measure the KL against (with adapters, switch those off instead); place as above."""
    config = replace(config, lora=LoRAConfig(), quantize="none", quantize_twice=True, dtype=config.frozen_dtype, freeze=())
    config = replace(config, checkpointing="none", tower_checkpointing="none", offload_activations=False)  # no backward pass
    return load_policy(config, device, seed=0, packed=packed, place=place).requires_grad_(False).eval()


def _uses_liger(config: ModelConfig, device: torch.device) -> bool:
    installed = importlib.util.find_spec("liger_kernel") is not None
    if config.liger == "on" and not (installed and device.type == "cuda"):
        lacks = "liger-kernel is not installed" if not installed else f"this is {device.type}"
        raise ValueError(f"model.liger: on needs CUDA and liger-kernel, and {lacks}; set it to auto or off")
    return config.liger != "off" and installed and device.type == "cuda"


def save_settings(policy: Policy, model: Path, adapter: Path) -> None:
    """Everything of a Hugging Face folder but its weights: config and generation config into `model`, and with adapters PEFT's
    configuration into `adapter`. Both folders are made.
    """
    model.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(policy.base.config)
    config.architectures = [family_of(config).model.__name__]
    config.save_pretrained(model)
    policy.base.generation_config.save_pretrained(model)
    if policy.adapted:
        settings = copy.copy(policy.model.peft_config["default"])
        settings.inference_mode, settings.base_model_name_or_path = True, policy.config.path
        settings.save_pretrained(str(adapter))
        if policy.config.quantize == "nf4":
            (adapter / "README.md").write_text(
                NF4_NOTE.format(path=policy.config.path, twice=policy.config.quantize_twice), encoding="utf-8"
            )

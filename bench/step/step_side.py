"""One side of bench.step.step, in the process that it has to itself: the model, the update, the clock, the profile."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.utils import is_flash_attn_2_available

from actial_fast import grpo, ops, sft
from actial_fast.model.attention import use_packed_attention
from actial_fast.model.flops import minimum
from actial_fast.model.policy import Policy
from actial_fast.ops.spec import GRPOSpec
from actial_fast.settings.model import LoRAConfig, ModelConfig
from actial_fast.settings.recipe import GRPORecipe, SFTRecipe
from actial_fast.train.dist import World
from bench.harness.timing import CUDA, DEVICE, Tick, clock, gemm, gpu_state, release, seconds_of
from bench.step.minimum import work_of
from bench.step.models import config_of, with_adapters
from bench.step.shapes import Shape
from bench.step.update import CLIP_NORM, LEARNING_RATE, Case, _status, make_case, trl_side

DEVICE_TYPE = torch.autograd.DeviceType.CUDA if CUDA else torch.autograd.DeviceType.CPU
DTYPE = torch.bfloat16 if CUDA else torch.float32
RANK, ANSWERS = 16, 3  # of the adapters; to a prompt in SFT
SAMPLED = 4096  # numbers of each gradient that are compared
WHERE = World(0, 1, torch.device(DEVICE))


def measure(
    name: str, shape: Shape, *, rounds: int, divide: int, seconds: float, gradient: Path, tell: Callable[[dict[str, Any]], None]
) -> None:
    """Times the side `name`, tells its row, profiles one more update and tells the row again.

    divide: of the micro-batches' size; seconds: what the side should take, by which fewer rounds may be made than `rounds`, but at least
    one; gradient: file for the beginning of every parameter's gradient; images are kept beside it. Raises what the side raises,
    torch.OutOfMemoryError among it.

    In the row: seconds.first is the warm-up, compilation and the copy of the gradient included; host_seconds: until the host had enqueued
    an update; tokens: prompts and completions, as a path sees them that shares nothing; peak_mib: on a GPU all that was allocated, weights
    included, on a CPU what the process grew by; parts in seconds, of the round with the median,
    those that took any.
    """
    began, folder = time.monotonic(), gradient.parent
    loop, trained, path = name.split("/")
    ceiling = measured_ceiling(shape)
    prompts, n = (shape.sft_prompts, ANSWERS) if loop == "sft" else (shape.prompts, shape.n)
    case = make_case(prompts, n, shape.mean, str(folder / loop))
    model, settings = random_model(shape, case, packed=path == "ours")
    settings |= {"divide": divide, "clip_norm": CLIP_NORM}
    if trained == "lora":
        tuned, settings["lora_rank"] = with_adapters(model, ModelConfig(lora=LoRAConfig(rank=RANK))), RANK
    else:
        tuned = model.requires_grad_(True)
    work = work_of(case.samples, case.image_token)
    flops = minimum(model, work, backward=True)
    parameters = [p for p in tuned.parameters() if p.requires_grad]
    optimizer, settings["optimizer"] = optimizer_of(parameters, eight_bit=trained == "full")
    accumulate, more = accumulator(loop, path, tuned, case, shape, divide, str(folder / "trl"))
    update = Update(model, parameters, optimizer, accumulate)
    held = _reset_peak()
    state = gpu_state()

    first = update(save=gradient)
    made = [update()]
    while len(made) < rounds and time.monotonic() - began + 2 * made[-1].seconds < seconds:
        made.append(update())
    typical = sorted(made, key=lambda taken: taken.seconds)[len(made) // 2]
    median = statistics.median(taken.seconds for taken in made)
    row = {
        "status": "measured",
        "settings": settings | more,
        "seconds": {"median": median, "min": min(x.seconds for x in made), "rounds": len(made), "first": first.seconds},
        "host_seconds": typical.host,
        "tokens": work.tokens,
        "tokens_per_s": work.tokens / median,
        "predicted_tokens": sum(map(len, case.samples)),
        "images": len(work.images),
        "flops": flops,
        "tflops": sum(flops.values()) / median / 1e12,
        "ceiling": ceiling,
        "mfu": sum(flops.values()) / median / 1e12 / ceiling["tflops"],
        "peak_mib": _peak() - held,
        "loss": first.loss,
        "gradient_norm": first.norm,
        "parts": typical.parts,
        "gpu_before": state,
        "gpu_after": gpu_state(),
    }
    tell(row)
    row["profile"] = profile(update)
    tell(row | {"outside_kernels": max(0.0, 1 - row["profile"]["busy_seconds"] / median) if CUDA else None})


def measured_ceiling(shape: Shape) -> dict[str, Any]:
    """The best of ten torch.mm in the step's dtype, at the head's size."""
    rows, hidden, vocabulary = shape.ceiling, shape.text["hidden_size"], shape.text["vocab_size"]
    call = gemm(*(torch.randn(n, hidden, dtype=DTYPE, device=DEVICE) for n in (rows, vocabulary)))
    call()
    best = min(seconds_of(call) for _ in range(10))
    del call
    release()
    what = f"the best torch.mm, {DTYPE}, ({rows}, {hidden}) x ({hidden}, {vocabulary})"
    return {"what": what, "tflops": 2 * rows * hidden * vocabulary / best / 1e12}


def random_model(shape: Shape, case: Case, *, packed: bool) -> tuple[Qwen2_5_VLForConditionalGeneration, dict[str, Any]]:
    """The model on this machine's device, made there, in train mode with gradient checkpointing; and what is told of it."""
    attention = "flash_attention_2" if CUDA and is_flash_attn_2_available() else "sdpa"
    torch.manual_seed(0)
    with torch.device(DEVICE):
        config = config_of(case.tokenizer, shape.text, shape.vision)
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=DTYPE, attn_implementation=attention)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if packed:
        use_packed_attention(model)
    told = {"dtype": str(DTYPE).removeprefix("torch."), "attention": "packed" if packed else attention, "gradient_checkpointing": True}
    return model.train(), told


def optimizer_of(parameters: list[nn.Parameter], *, eight_bit: bool) -> tuple[torch.optim.Optimizer, str]:
    """The optimizer and its name."""
    if not eight_bit:
        return torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True), "torch.optim.AdamW, fused"
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(
        parameters, lr=LEARNING_RATE, weight_decay=0.0
    ), f"bitsandbytes {bitsandbytes.__version__} AdamW8bit"


def accumulator(
    loop: str, path: str, model: nn.Module, case: Case, shape: Shape, divide: int, folder: str
) -> tuple[Callable[[], Tensor | float], dict[str, Any]]:
    """The function that makes loss and gradients, and what is told of it."""
    micro_batch = max(1, shape.micro_batch // divide)
    if path == "trl":
        side = trl_side(model, case, micro_batch, folder, bf16=CUDA)
        side.prepare()
        return side.accumulate, side.settings
    policy = Policy(model, DTYPE)
    processor = SimpleNamespace(
        image_token=case.tokenizer.convert_tokens_to_ids("<|image_pad|>"), pad=case.tokenizer.pad_token_id, merge=2, store=case.store
    )
    sizes = {"packing": "packed" if path == "ours" else "plain", "micro_batch": micro_batch, "pack_tokens": shape.pack_tokens // divide}
    told = {"micro_batch": micro_batch} if path == "plain" else {"pack_tokens": sizes["pack_tokens"]}
    if loop == "sft":
        recipe, rows = SFTRecipe(**sizes), [sample.sequence for sample in case.samples]
        return lambda: sft._accumulate(policy, processor, rows, recipe, WHERE)[0], told
    recipe = GRPORecipe(**sizes, loss=GRPOSpec(beta=0.0), prompts=case.prompts, minibatch=case.prompts)
    counts = sum(map(len, case.samples)), len(case)

    def accumulate() -> Tensor:
        (rounds,) = grpo._passes(policy, None, processor, [case.samples], recipe, WHERE).updates
        return grpo._accumulate(policy, case.samples, counts, rounds, recipe, WHERE)[ops.STATS.index("loss")]

    return accumulate, told


@dataclass(frozen=True)
class Taken:
    """One update: seconds of the wall and until the host had enqueued everything, loss, gradient norm, and seconds by part."""

    seconds: float
    host: float
    loss: float
    norm: float
    parts: dict[str, float]


class Update:
    """A side's update, called as often as wanted; the device is idle at both ends."""

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        parameters: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        accumulate: Callable[[], Tensor | float],
    ):
        self.parameters, self.optimizer, self.accumulate = parameters, optimizer, accumulate
        self._marks: list[tuple[Tick, str]] = []
        for module, part, field in (
            (model.model.visual, "vision", "pooler_output"),
            (model.model.language_model, "language", "last_hidden_state"),
        ):
            module.register_forward_pre_hook(lambda *_, part=part: self._mark(f"{part}_forward"))
            module.register_forward_hook(lambda module, args, out, part=part, field=field: self._left(out[field], part))

    def __call__(self, save: Path | None = None) -> Taken:
        """save: where the beginning of every gradient goes, outside of the clock."""
        self._marks.clear()
        _wait()
        began = time.perf_counter()
        self._mark("other")
        with mock.patch.object(torch.autograd, "backward", self._backward(torch.autograd.backward)):
            loss = self.accumulate()
        if save:
            np.save(save, torch.cat([_beginning(p) for p in self.parameters]).cpu().numpy())
        self._mark("optimizer")
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._mark("end")
        host = time.perf_counter() - began
        _wait()
        seconds = time.perf_counter() - began
        return Taken(seconds, host, float(loss), float(norm), self._parts())

    def _mark(self, part: str) -> None:
        self._marks.append((clock(), part))

    def _left(self, out: Tensor, part: str) -> None:
        self._mark("head" if part == "language" else "other")
        if out.requires_grad:
            out.register_hook(lambda grad: self._mark(f"{part}_backward"))

    def _backward(self, run: Callable[..., None]) -> Callable[..., None]:
        def marked(*args: Any, **kwargs: Any) -> None:
            run(*args, **kwargs)
            self._mark("other")

        return marked

    def _parts(self) -> dict[str, float]:
        found: defaultdict[str, float] = defaultdict(float)
        for (start, part), (end, _) in zip(self._marks, self._marks[1:], strict=False):
            found[part] += end - start
        return dict(found)


def _beginning(parameter: nn.Parameter) -> Tensor:
    values = parameter.detach() if parameter.grad is None else parameter.grad
    return values.flatten()[:SAMPLED].float() * (parameter.grad is not None)


def profile(update: Callable[[], object]) -> dict[str, Any]:
    """One more update under the profiler: seconds in which anything ran on the device, and what ran longest. On a CPU operators stand in
    for kernels."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if CUDA else activity.CPU]) as profiler:
        update()
    found = profiler.profiler.kineto_results.events()  # a list of the profiler's own events would take minutes to build
    return summed((e.name(), e.start_ns(), e.duration_ns()) for e in found if e.device_type() == DEVICE_TYPE)


def summed(events: Iterable[tuple[str, int, int]]) -> dict[str, Any]:
    """What events (name, start and duration in nanoseconds) amount to. busy_seconds: of the union of their intervals. Waits are none."""
    spans, names = [], defaultdict(list)
    for name, start, took in events:
        if not name.endswith(" Sync") and name != "Stream Wait Event":
            spans.append((start, start + took))
            names[name].append(took)
    busy, until = 0, 0
    for start, end in sorted(spans):
        busy += max(0, end - max(start, until))
        until = max(until, end)
    longest = sorted(names.items(), key=lambda item: -sum(item[1]))[:10]
    return {
        "busy_seconds": busy / 1e9,
        "kernels": len(spans),
        "longest": [{"name": name[:160], "calls": len(took), "seconds": sum(took) / 1e9} for name, took in longest],
    }


def _wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def _reset_peak() -> float:
    """MiB that count for nothing: none of a GPU's, and on a CPU what the process holds before its first update."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        return 0.0
    return _status("VmRSS")


def _peak() -> float:
    """MiB at the worst: of the GPU's allocator, weights included, or of this process."""
    return torch.cuda.max_memory_allocated() / 2**20 if CUDA else _status("VmHWM")

"""Out of memory as an answer: what was under way, how large it was, and which keys would make it smaller."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Many

from torch import OutOfMemoryError

from actial_fast.packing.batch import Sequence
from actial_fast.settings.recipe import GRPORecipe, SFTRecipe

SIGNS = ("can't allocate memory", "not enough memory", "out of memory", "cannot allocate memory")  # of RuntimeErrors: the CPU's allocator


class OutOfMemory(ValueError):
    """This rank ran out of memory; says in which phase, over what, and what to change. The others end because this one does."""


class NoRoom(MemoryError):
    """Memory ran out over something that can be named. part: of a phase, where it has keys of its own."""

    def __init__(self, what: str, part: str = ""):
        super().__init__(what)
        self.part = part


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the device or on the host."""
    if isinstance(error, OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)


@contextlib.contextmanager
def over(what: Callable[[], str], part: str = "") -> Iterator[None]:
    """In a with block that runs out of memory, NoRoom says over what."""
    try:
        yield
    except Exception as error:
        if not ran_out(error) or isinstance(error, NoRoom):
            raise
        raise NoRoom(f"{what()} ({_line(error)})", part) from error


@contextlib.contextmanager
def told(phase: str, keys: Mapping[str, str]) -> Iterator[None]:
    """A phase that runs out of memory raises OutOfMemory. keys: what to change, by phase or part of one."""
    try:
        yield
    except Exception as error:
        if not ran_out(error):
            raise
        part = error.part if isinstance(error, NoRoom) else ""
        what = str(error) if isinstance(error, NoRoom) else _line(error)
        advice = keys.get(part or phase, "")
        raise OutOfMemory(
            f"out of memory in phase {phase}{f', {part}' if part else ''}: {what}{f'; {advice}' if advice else ''}"
        ) from error


def batch_of(sequences: Many[Sequence], *, padded: bool = False) -> str:
    """A batch in words: its tokens, patches and rows with loss, and its largest item by the row of the file that it comes from."""
    if not sequences:
        return "a batch that only keeps this rank in step with the others"
    tokens = max(map(len, sequences)) * len(sequences) if padded else sum(map(len, sequences))
    images = {key: s for s in sequences for key in s.images}
    patches = sum(s.patches for s in {s.images: s for s in images.values()}.values())
    rows = sum(int(s.trained[1:].sum()) for s in sequences)
    return f"a batch of {tokens:,} tokens, {patches:,} patches and {rows:,} loss rows; its largest item is {largest_of(sequences)}"


def largest_of(sequences: Many[Sequence]) -> str:
    """The longest sequence in words."""
    longest = max(sequences, key=len)
    name = longest.where or "without a name"
    return f"{name} with {len(longest):,} tokens and {len(longest.images)} image{'s' * (len(longest.images) != 1)}"


def keys_of(recipe: SFTRecipe | GRPORecipe) -> dict[str, str]:
    """By phase, and part of one: the two keys that make it smaller and are not spent yet, the cheaper one first."""
    model, packed = recipe.model, recipe.packing == "packed"
    size = f"lower pack_tokens ({recipe.pack_tokens})" if packed else f"lower micro_batch ({recipe.micro_batch})"
    fewer = f"lower pack_patches ({recipe.pack_patches})" if packed else f"lower model.max_pixels ({model.max_pixels or 'none'})"
    deeper = {"none": "set model.checkpointing to selective", "selective": "set model.checkpointing to full"}.get(model.checkpointing, "")
    if not deeper:
        deeper = "set model.offload_activations to true" if not model.offload_activations else fewer
    states = "set optim.offload to always, or optim.kind to adamw8bit"
    shares = (
        "train adapters (model.lora.rank)"
        if recipe.dist.fsdp
        else "set dist.fsdp to true over several GPUs, or train adapters (model.lora.rank)"
    )
    held = f"set model.frozen_dtype to bfloat16, or {shares}" if model.frozen_dtype == "float32" else shares
    out = {
        "load": held,
        "update": f"{deeper}, or {size}" if deeper != fewer else f"{size}, or {fewer}",
        "optimizer": states,
        "old": f"{size}, or {fewer}",
        "reference": f"{size}, or {fewer}",
        "sync": "set optim.offload to sampling, or rollout.engine to vllm",
        "eval": _kept("eval", recipe.eval.kv_tokens, recipe.eval.max_new_tokens),
        "save": states,
    }
    if isinstance(recipe, GRPORecipe):
        out["sample"] = _kept("sampling", recipe.sampling.kv_tokens, recipe.sampling.max_new_tokens)
    return out


def _kept(name: str, tokens: int, longest: int) -> str:
    """What keys and values take."""
    first = f"lower {name}.kv_tokens ({tokens})" if tokens else f"set {name}.kv_tokens (0, which is as much as there is)"
    return f"{first}, or lower {name}.max_new_tokens ({longest})"


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__

"""Every phase of a run, and what its fullest moment holds on a device, on the host and on the disk.

An item is a name and its bytes. A phase has several moments that may be the fullest (the tower's pass, the language model's, the head, the
backward pass), and the largest of them counts. CUDA's own memory and what the allocator cannot use are the machine's (gpus.Machine.usable).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

from actial_fast.budget.gpus import GB, Machine
from actial_fast.budget.models import Shapes
from actial_fast.budget.shares import Shares, shares_of
from actial_fast.budget.trace import Activations, mask_bytes, traced
from actial_fast.budget.workload import Workload
from actial_fast.ops.workspace import LEAST, share_of
from actial_fast.rollout.decoder import DRAWN_AT_ONCE
from actial_fast.rollout.embedded import MOST_ROWS, READ_PATCHES, READ_TOKENS
from actial_fast.rollout.memory import SHARE
from actial_fast.settings.recipe import GRPORecipe, SFTRecipe
from actial_fast.train.optim import PIECE

Recipe = SFTRecipe | GRPORecipe
Items = dict[str, float]

DRAWING = 30  # bytes for an element of logits (rollout/decoder.py)
PAGED = "paged_adamw8bit"
ENGINE = 2.0 * GB  # assumed: what vLLM holds beside weights, keys and values
ASLEEP = 1.5 * GB  # assumed: what it keeps while it sleeps
PROCESS = 3.0 * GB  # assumed: host memory of a rank's process with CUDA, PyTorch and threads that read rows
BLOCKS_IN_FLIGHT = 2  # layers whose gathered weights, or gradients, FSDP has at once: the running one and the next


@dataclass(frozen=True)
class Phase:
    """name; device: items of one rank's fullest moment; room: bytes that a rank can have there; host, disk: items of a whole machine.
    kv_tokens: tokens whose keys and values find room, where replies are drawn, and kv_needed the fewest that do."""

    name: str
    device: Items
    room: float
    host: Items = field(default_factory=dict)
    disk: Items = field(default_factory=dict)
    kv_tokens: int | None = None
    kv_needed: int = 0

    @property
    def held(self) -> float:
        """Bytes on a device."""
        return sum(self.device.values())

    @property
    def spare(self) -> float:
        """Bytes that are left of a device's, below 0 where it does not fit."""
        return self.room - self.held

    @property
    def fits(self) -> bool:
        """Whether a device holds it, the longest prompt and reply included."""
        return self.spare >= 0 and (self.kv_tokens is None or self.kv_tokens >= self.kv_needed)


@dataclass(frozen=True)
class Size:
    """A micro-batch: tokens, image patches, its longest row where it is padded, and how many tokens are predicted, at most all."""

    tokens: int
    patches: int
    longest: int
    predicted: int = 1 << 62


@dataclass(frozen=True)
class Case:
    """What phases are computed from. known: the rows are the data's, so that a step with few of them fills no micro-batch."""

    recipe: Recipe
    shapes: Shapes
    machine: Machine
    workload: Workload

    @property
    def low(self) -> bool:
        """Whether it computes in 16 bits."""
        return self.machine.cuda

    @property
    def width(self) -> int:
        """Bytes of a number of hidden states, keys and values."""
        return 2 if self.low or self.shapes.head_bytes == 2 else 4

    @property
    def sharded(self) -> bool:
        """Whether FSDP shards it."""
        return self.recipe.dist.fsdp and self.machine.count > 1

    @cached_property
    def shares(self) -> Shares:
        """What each rank holds of the model."""
        return shares_of(self.recipe, self.shapes, self.machine)

    def activations(self) -> Activations:
        """Traced, which takes a few seconds the first time."""
        model, packed = self.recipe.model, self.recipe.packing == "packed"
        return traced(self.shapes.config, model, packed=packed, low=self.low, sharded=self.low and self.sharded)

    def with_recipe(self, recipe: Recipe, shapes: Shapes) -> Case:
        """The same of another recipe."""
        return replace(self, recipe=recipe, shapes=shapes)


def largest_batch(case: Case) -> Size:
    """The largest micro-batch that a rank meets: a full one, or, of rows that are known, all that it has of an optimizer step."""
    recipe, load = case.recipe, case.workload
    share = load.images / load.prompt
    grpo = isinstance(recipe, GRPORecipe)
    reply = recipe.sampling.max_new_tokens if isinstance(recipe, GRPORecipe) else load.reply
    longest = int(load.longest or (recipe.data.max_prompt_tokens if recipe.packing == "packed" else load.prompt)) + int(
        reply if grpo else 0
    )
    if recipe.packing == "plain":
        tokens = recipe.micro_batch * longest
        return Size(tokens, int(4 * share * recipe.micro_batch * (longest - (reply if grpo else 0))), longest)
    tokens, patches = recipe.pack_tokens, min(recipe.pack_patches, int(4 * share * recipe.pack_tokens))
    if load.longest:
        rows = -(-(recipe.minibatch if isinstance(recipe, GRPORecipe) else recipe.batch_size) // case.machine.count)
        most = rows * (load.longest + (recipe.sampling.n * reply if isinstance(recipe, GRPORecipe) else 0))
        tokens, patches = min(tokens, int(most)), min(patches, int(4 * share * rows * load.longest))
    return Size(tokens, patches, longest)


def phases_of(case: Case, size: Size | None = None, held: Activations | None = None) -> list[Phase]:
    """Every phase, for a micro-batch of this size (default: the largest that a rank meets) and these activations (default: traced)."""
    size, held = size or largest_batch(case), held or case.activations()
    shares = case.shares
    out = [_load(case, shares), _update(case, shares, held, size), _save(case, shares)]
    recipe = case.recipe
    if isinstance(recipe, GRPORecipe):
        out.insert(1, _drawing(case, shares, held, "sample", recipe.sampling.max_new_tokens))
        if recipe.rollout.engine == "vllm":
            out.insert(1, _sync(case, shares))
    if recipe.eval.sources:
        out.append(_drawing(case, shares, held, "eval", recipe.eval.max_new_tokens))
    return out if case.machine.cuda else [_on_host(phase, case.machine.count) for phase in out]


def _on_host(phase: Phase, ranks: int) -> Phase:
    """Of a machine without GPUs: the ranks' devices are the host."""
    shared = {name: size / ranks for name, size in phase.host.items()}
    return replace(phase, device=phase.device | shared, host={})


def _resident(case: Case, shares: Shares, *, drawing: bool = False) -> Items:
    """What a rank's device holds throughout; drawing: of the time in which replies are drawn."""
    optim, cuda = case.recipe.optim, case.machine.cuda
    away = optim.offload == "always" or (drawing and optim.offload == "sampling")
    items = {"weights": shares.weights, "masters": shares.masters * (not away)}
    items["moments"] = 0.0 if away or optim.kind == PAGED else shares.moments
    items["reference"] = 0.0 if drawing and optim.offload != "none" and not _beside(case) else shares.reference
    if optim.offload == "always":
        items["buffers of the moments"] = _step_buffers(case, shares)
    if not cuda:  # what leaves the device stays on the host, which is the same
        items |= {"moments": shares.moments, "masters": shares.masters, "reference": shares.reference}
        if optim.offload == "sampling":
            items["host's copies"] = shares.moments + shares.masters + shares.reference
    return {name: size for name, size in items.items() if size}


def _beside(case: Case) -> bool:
    """Whether replies are drawn beside the update, which needs the reference."""
    return case.recipe.rollout.engine == "vllm" and case.recipe.rollout.ahead > 0


def _step_buffers(case: Case, shares: Shares) -> float:
    """Of the two pieces of the states that are on the device at once."""
    each = shares.checkpoint / case.shapes.trained - min(w.bytes for w in case.shapes.weights if w.trained)
    return 2.0 * _piece(case) * each


def _piece(case: Case) -> int:
    """Numbers of the largest piece that a step is made on at once: rows of one parameter."""
    return min(PIECE, max(w.numel for w in case.shapes.weights if w.trained))


def _host(case: Case, shares: Shares) -> Items:
    """What a machine's host holds throughout beside the images, whose file the system caches as it likes."""
    count, optim = case.machine.count, case.recipe.optim
    items = {"processes": PROCESS * count} if case.machine.cuda else {}
    if case.machine.cuda and (optim.offload == "always" or optim.kind == PAGED):
        items["moments"] = (shares.moments + shares.masters * (optim.offload == "always")) * count
    return items


def _load(case: Case, shares: Shares) -> Phase:
    device = {"weights": shares.weights, "one tensor on its way": shares.largest}
    return Phase("load", device, case.machine.usable, _host(case, shares))


def _update(case: Case, shares: Shares, held: Activations, size: Size) -> Phase:
    moments = list(_moments(case, shares, held, size))
    fullest = max(moments, key=lambda items: sum(items.values()))
    base = _resident(case, shares) | {"gradients": shares.gradients}
    if case.machine.cuda and case.recipe.rollout.engine == "vllm" and isinstance(case.recipe, GRPORecipe):
        beside = case.recipe.rollout.gpu_memory * case.machine.memory
        base |= {"vLLM": beside} if _beside(case) else {"vLLM, asleep": ASLEEP}
    host = _host(case, shares)
    if case.recipe.model.offload_activations and case.machine.cuda:
        kept = _kept(case, held, size, offloaded=True)
        host["kept activations"] = kept * case.machine.count
    return Phase("update", {k: v for k, v in (base | fullest).items() if v}, case.machine.usable, host)


def _moments(case: Case, shares: Shares, held: Activations, size: Size) -> Iterator[Items]:
    """The moments of a micro-batch's pass that may be the fullest, each as the items beyond what is always there."""
    text, vision = case.shapes.config.text_config, case.shapes.config.vision_config
    layers, blocks, width = text.num_hidden_layers, vision.depth, case.width
    trained = case.shapes.trains_tower and size.patches > 0
    features = width * size.patches / 4 * case.shapes.levels * text.hidden_size
    if not trained:
        features = max(features, _features_of_step(case, width))
    kept = _kept(case, held, size)
    gathered = min(BLOCKS_IN_FLIGHT * shares.block + shares.tied, shares.gathered)
    if case.recipe.dist.reshard == "step":
        gathered = shares.gathered
    summed = {"gradients of the whole model": shares.whole_gradients} if case.recipe.dist.reduce == "step" else {}
    cast = {"16-bit copies of weights": shares.cast}
    if case.recipe.model.quantize == "nf4":
        cast["a matrix in 16 bits"] = shares.matrix
    tower = held.tower.forward(size.patches, blocks) if trained else held.looking(size.patches)
    eyes = held.tower.kept(size.patches, blocks) if trained and not case.recipe.model.offload_activations else 0.0
    yield {"activations": eyes + tower + _pixels(case, size.patches), "gathered weights": gathered, **summed}
    # autocast's copies are counted by the trace, in the forward pass
    forward = held.language.forward(size.tokens, layers)
    mask = mask_bytes(size.tokens, size.longest) if case.recipe.packing == "plain" else 0.0
    yield {"activations": kept + forward + mask, "features": features, "gathered weights": gathered, **summed}
    vocabulary = text.vocab_size * text.hidden_size
    predicted = min(size.tokens, size.predicted)
    rows = 2 * width * predicted * text.hidden_size  # hidden states and their gradient
    most = share_of(case.machine.memory / 2**20) if case.machine.cuda else LEAST  # MiB of the ops that start from hidden states
    work = min(most * 2**20, predicted * text.vocab_size * (2 if case.low else 12))
    head = work
    if case.shapes.trains_head:
        rounded = 2.0 * vocabulary if case.low and not shares.cast and case.recipe.model.dtype == "bfloat16" else 0.0
        head = max(work + 4.0 * vocabulary, 8.0 * vocabulary + rounded)  # the gradient, then times what came from above
    ends = max(gathered, min(shares.ends + shares.block, shares.gathered))
    yield {"activations": kept + mask, "features": features, "head": head + rows, "gathered weights": ends, **cast, **summed}
    reduced = 0.0
    if case.sharded and case.low and case.shapes.trained:
        # 16-bit gradients of a group and the float32 message that sums them, of the head or of layers, whichever is more
        reduced = 3.0 * max(shares.ends if case.shapes.trains_head else 0.0, BLOCKS_IN_FLIGHT * shares.block)
        reduced = min(reduced, 6.0 * case.shapes.trained)
    back = {"features": features, "gathered weights": gathered, "gradients on their way": reduced, **summed}
    yield {"activations": kept + held.language.backward(size.tokens) + mask, **back}
    if trained:
        yield {"activations": eyes + held.tower.backward(size.patches), **back}
    optim = case.recipe.optim
    lean = optim.kind != "adamw" or optim.offload == "always" or case.recipe.model.dtype != "float32"
    yield {"the optimizer's step": 16.0 * _piece(case) * lean}


def _pixels(case: Case, patches: float) -> float:
    """Of images as they come to the tower, a byte for each colour of each pixel."""
    vision = case.shapes.config.vision_config
    return patches * float(vision.in_channels * vision.patch_size**2)


def _kept(case: Case, held: Activations, size: Size, *, offloaded: bool = False) -> float:
    """Bytes that wait for the backward pass: on the device, or, offloaded, those of checkpoints on the host."""
    text, vision, model = case.shapes.config.text_config, case.shapes.config.vision_config, case.recipe.model
    layers, blocks = text.num_hidden_layers, vision.depth
    language, tower = held.language.kept(size.tokens, layers), held.tower.kept(size.patches, blocks)
    inside = (held.language.layer * layers)(size.tokens) if model.checkpointing != "none" else 0.0
    seen = (held.tower.layer * blocks)(size.patches) if model.tower_checkpointing != "none" else 0.0
    if offloaded:
        return inside + seen
    return language + tower - (inside + seen if model.offload_activations and case.machine.cuda else 0.0)


def _features_of_step(case: Case, width: int) -> float:
    """Of a frozen tower: an image's features are kept from a step's first pass to its last."""
    recipe = case.recipe
    rows = recipe.minibatch if isinstance(recipe, GRPORecipe) else 0
    several = isinstance(recipe, GRPORecipe) and (recipe.prompts > recipe.minibatch or recipe.loss.beta > 0)
    rows = recipe.prompts if several and isinstance(recipe, GRPORecipe) else rows
    wide = width * case.shapes.levels * float(case.shapes.config.text_config.hidden_size)
    return rows / case.machine.count * case.workload.images * wide * several


def _sync(case: Case, shares: Shares) -> Phase:
    engine = 2.0 * case.shapes.numel / case.recipe.rollout.tensor_parallel
    device = _resident(case, shares, drawing=True) | {"vLLM's weights": engine, "one tensor on its way": shares.largest / 2}
    return Phase("sync", device, case.machine.usable, _away(case, shares))


def _away(case: Case, shares: Shares) -> Items:
    """The host's items while replies are drawn."""
    items, optim = _host(case, shares), case.recipe.optim
    if case.machine.cuda and optim.offload == "sampling":
        items["moments"] = (shares.moments + shares.masters) * case.machine.count
    if case.machine.cuda and optim.offload != "none" and shares.reference and not _beside(case):
        items["reference"] = shares.reference * case.machine.count
    return items


def _drawing(case: Case, shares: Shares, held: Activations, name: str, longest: int) -> Phase:
    recipe, text, width = case.recipe, case.shapes.config.text_config, case.width
    kv = width * case.shapes.kv_elements
    prompt = case.workload.longest or recipe.data.max_prompt_tokens
    needed = prompt + longest
    device = _resident(case, shares, drawing=True)
    if recipe.rollout.engine == "server" and name == "eval":
        return Phase(name, device, case.machine.usable, _away(case, shares))
    if recipe.rollout.engine == "vllm" and case.machine.cuda:
        share = recipe.rollout.gpu_memory * case.machine.memory
        tokens = int((share - ENGINE - 2.0 * case.shapes.numel / recipe.rollout.tensor_parallel) // kv)
        device |= {"vLLM": share}
        return Phase(name, device, case.machine.usable, _away(case, shares), kv_tokens=max(0, tokens), kv_needed=needed)
    cast = shares.cast
    head = width * float(text.vocab_size * text.hidden_size) if case.low and case.shapes.head_bytes == 4 and not case.sharded else 0.0
    device |= {"gathered weights": shares.gathered, "16-bit copies of weights": cast + head}
    if recipe.model.quantize == "nf4":
        device["a matrix in 16 bits"] = shares.matrix
    # images pass the tower first, then their prompts are read
    grpo = recipe if isinstance(recipe, GRPORecipe) and name == "sample" else None
    prompts, n = _prompts(case, grpo)
    read = min(max(READ_TOKENS, prompt), prompts * case.workload.prompt)
    looked = min(READ_PATCHES, 4 * read * case.workload.images / case.workload.prompt)
    rows = min(float(MOST_ROWS), prompts * n)
    drawing = (DRAWING if case.low else 4) * min(float(DRAWN_AT_ONCE), rows * text.vocab_size)
    device["drawing"] = max(held.reading(read), held.looking(looked) + _pixels(case, looked), drawing)
    device = {k: v for k, v in device.items() if v}
    room = max(0.0, case.machine.usable - sum(device.values()) + device["drawing"])  # what is free when the budget is asked for
    most = max(0.0, room - device["drawing"])
    asked = float(grpo.sampling.kv_tokens * kv) if grpo else 0.0
    wanted = asked or min(SHARE * room, most)  # of its own choosing it takes less where drawing finds too little
    everything = prompts * (case.workload.prompt + n * longest) * kv
    device["keys and values"] = max(min(wanted, everything), float(needed * kv))
    tokens = int(min(wanted, most) // kv)
    return Phase(name, device, case.machine.usable, _away(case, shares), kv_tokens=tokens, kv_needed=needed)


def _prompts(case: Case, grpo: GRPORecipe | None) -> tuple[float, int]:
    """How many prompts of a rank are replied to, where that is known, and how many replies each has."""
    rows = grpo.prompts * max(1.0, grpo.sampling.oversample) if grpo else float(case.recipe.eval.limit or "inf")
    return rows / case.machine.count, grpo.sampling.n if grpo else 1


def _save(case: Case, shares: Shares) -> Phase:
    keep = case.recipe.save.keep + 1
    device = _resident(case, shares)
    host = _host(case, shares) | {"the checkpoint being written": shares.checkpoint}
    disk = {f"{keep} checkpoints": keep * shares.checkpoint, "the final model": shares.final}
    return Phase("save", device, case.machine.usable, host, disk)

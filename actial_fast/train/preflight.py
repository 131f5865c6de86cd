"""What can be known to go wrong before the model is loaded, all of it at once."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from actial_fast.data.sources.overlap import overlaps
from actial_fast.data.sources.picture import decode
from actial_fast.data.sources.row import BadRow, Row
from actial_fast.data.sources.source import Source, SourceConfig, open_source
from actial_fast.data.sources.stream import Example
from actial_fast.data.sources.task import begun, find_task
from actial_fast.data.sources.told import log
from actial_fast.model.adapters import unplaced
from actial_fast.model.families.known import FAMILIES
from actial_fast.model.nf4 import nf4_problem
from actial_fast.model.processor import Processor
from actial_fast.model.vision import check_patches
from actial_fast.model.weights import check_checkpoint, config_at, kind_of, module_name, open_weights, resolve
from actial_fast.packing.batch import Sequence
from actial_fast.packing.images import GB, ImageStore
from actial_fast.packing.room import kept
from actial_fast.settings.recipe import GRPORecipe, SFTRecipe
from actial_fast.tasks.rewards import probe
from actial_fast.train.dist import Agreed, World
from actial_fast.train.packages import vllm_problem
from actial_fast.train.quantised import problem as problem_of_states
from actial_fast.train.sharding import unfit

FIRST = 4  # rows of a source that are read and encoded
TRUTHS = 64  # rows among which one must have a truth to evaluate with
NEIGHBOURS = 64  # rows by which it is guessed how many share their images

Encode = Callable[[Processor, Example], Sequence]
Room = Callable[[SFTRecipe | GRPORecipe, Path, World, Processor | None], Iterable[str]]


class Unready(Agreed):
    """A run that would fail later. problems: one line each."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(problems))
        self.problems = problems


def problems_of(recipe: SFTRecipe | GRPORecipe, encode: Encode, room: Room, folder: Path, where: World) -> list[str]:
    """What would end a run of this recipe, one line each; nothing is changed but that the images of the rows looked at are stored. What its
    sources have in common is only told, in the log.

    encode: what the loop makes of each row; room: says what memory and disk are too small for; folder: the stage's.
    """
    with contextlib.suppress(ValueError, OSError):  # a source that cannot be opened is one of the problems
        asked = {source: "eval.sources" for source in recipe.eval.sources}
        held = {source: "eval.loss_sources" for source in recipe.eval.loss_sources} | asked  # one that is in both is told once
        for line in overlaps(recipe.data.sources, [(key, source) for source, key in held.items()]):
            log.warning(line)
    return [" ".join(problem.split()) for problem in _problems(recipe, encode, room, folder, where)]


def _problems(recipe: SFTRecipe | GRPORecipe, encode: Encode, room: Room, folder: Path, where: World) -> Iterator[str]:
    if unsharded := unfit(recipe.dist, where):
        yield unsharded
    yield from (misfits := check_checkpoint(recipe.model.path) or _unplaced(recipe))
    processor = None
    try:
        processor = processor_of(recipe)
    except (ValueError, OSError) as error:
        if not misfits:
            yield f"model.path: the tokenizer and image processor of {recipe.model.path!r} cannot be used: {error}"
    if not misfits and processor is not None:
        try:
            check_patches(processor.store.settings, config_at(resolve(recipe.model.path)).vision_config)
        except ValueError as error:
            yield str(error)
    if not misfits:
        yield from room(recipe, folder, where, processor)
    if not recipe.data.sources:
        yield "data.sources: none given"
    row: Row | None = None
    pixels = largest = 0.0
    for source in recipe.data.sources:
        rows, problems = _first(source, processor, encode, skip=recipe.data.on_bad_row == "skip")
        yield from (f"data.sources: {problem}" for problem in problems)
        row = row or next(iter(rows), None)
        if processor is not None and rows and not problems:
            each, of_all = _pixel_bytes(source, rows, processor)
            pixels, largest = pixels + of_all, max(largest, each)
    if processor is not None:
        yield from _no_room(processor.store, pixels, min(pixels, largest * _under_way(recipe)))
    for source in recipe.eval.sources:
        rows, problems = _first(source, processor, Processor.encode_prompt, skip=recipe.data.on_bad_row == "skip", truths=True)
        yield from (f"eval.sources: {problem}" for problem in problems)
    for source in recipe.eval.loss_sources:
        _, problems = _first(source, processor, Processor.encode, skip=recipe.data.on_bad_row == "skip")
        yield from (f"eval.loss_sources: {problem}" for problem in problems)
    if isinstance(recipe, GRPORecipe) and row is not None and not any(map(_opens_with_truth, recipe.data.sources)):
        if any(reward.name == "accuracy" and reward.weight for reward in recipe.rewards):
            yield f"rewards: accuracy can score nothing: none of the first {TRUTHS} rows of any source has a truth"
    if isinstance(recipe, GRPORecipe) and row is not None:
        yield from (f"rewards: {problem}" for problem in probe(recipe.rewards, row))
    if problem := problem_of_states(recipe.optim.kind, where.device):
        yield problem
    if recipe.model.quantize == "nf4" and (problem := nf4_problem()):
        yield problem
    if recipe.rollout.engine == "vllm":
        if problem := vllm_problem():
            yield problem
        in_turns = [s.task for s in (*recipe.data.sources, *recipe.eval.sources) if _in_turns(s.task)]
        if in_turns and recipe.rollout.tensor_parallel > 1:
            yield (
                f"rollout.tensor_parallel: task {in_turns[0]} is played in turns, of which ranks take as many as their own episodes need; "
                "set it to 1, or rollout.engine to embedded"
            )
        if where.size % (parts := recipe.rollout.tensor_parallel):
            yield f"rollout.tensor_parallel: {parts} does not divide the {where.size} ranks"
    for package, wanted, off in (
        ("tensorboard", recipe.save.tensorboard, "save.tensorboard=false"),
        ("wandb", bool(recipe.save.wandb), "save.wandb="),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            yield f"save.{package}: {package} is not installed; pip install {package}, or {off}"


def _in_turns(task: str) -> bool:
    """Whether a task has an environment; one that is not there is said before."""
    try:
        return find_task(task).environment is not None
    except ValueError:
        return False


def _unplaced(recipe: SFTRecipe | GRPORecipe) -> list[str]:
    """Adapters that find no layer in the checkpoint."""
    folder = resolve(recipe.model.path)
    weights, family = open_weights(folder), FAMILIES[kind_of(folder)]
    matrices = [module_name(name).removesuffix(".weight") for name in weights.names if len(weights.shape(name)) == 2]
    return unplaced(recipe.model.lora, family, matrices) if recipe.model.lora.rank else []


def available_memory() -> float:
    """Bytes of memory that processes may still take; infinity where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return math.inf


def _under_way(recipe: SFTRecipe | GRPORecipe) -> int:
    """Rows whose images are needed at one time: a step's, and the next one's, which are read ahead; with replies ahead another one's."""
    return 2 * recipe.batch_size if isinstance(recipe, SFTRecipe) else (2 + recipe.rollout.ahead) * recipe.prompts


def _no_room(store: ImageStore, pixels: float, step: float) -> Iterator[str]:
    """What is wrong with a store for so many bytes of images, of which so many are needed at one time."""
    if 0 < store.most < step:
        yield (
            f"data.image_cache_gb: the images of the rows under way need about {step / GB:.3g} GB, more than {store.most / GB:.3g}; raise "
            "it or lower model.max_pixels"
        )
    there = sum(file.bytes for file in kept(store.folder))
    wanted = min(pixels, store.most) if store.most else pixels
    if wanted - there > (free := shutil.disk_usage(store.folder).free):
        yield (
            f"data.image_cache: the images need about {wanted / GB:.1f} GB, of which {store.folder} has {there / GB:.1f} and room for "
            f"{free / GB:.1f}; name a folder on a larger disk, or lower data.image_cache_gb or model.max_pixels"
        )


def _pixel_bytes(config: SourceConfig, rows: list[Row], processor: Processor) -> tuple[float, float]:
    """About how much the images of a row, and of a whole source, take in the store: those of its first rows, and these for as many rows as
    show images of their own."""
    source = open_source(config)
    looked = min(NEIGHBOURS, len(source))
    own = 1.0
    with contextlib.suppress(BadRow):
        shown = [source.images(index) for index in range(looked)]
        own = len(set(shown)) / looked if all(shown) else 1.0  # rows about the same images stand together
    keys = [key for row in rows for key in (processor.store.put(image, row.where) for image in row.images)]
    each = sum(processor.store.pixels(key).nbytes for key in keys) / len(rows)
    return each, own * len(source) * each


def processor_of(recipe: SFTRecipe | GRPORecipe) -> Processor:
    """The recipe's preprocessing: its checkpoint's, within its limits. What does not fit into a pass is an error of its row."""
    model, data, packed = recipe.model, recipe.data, recipe.packing == "packed"
    return Processor.load(
        model.path,
        min_pixels=model.min_pixels,
        max_pixels=model.max_pixels,
        max_prompt=data.max_prompt_tokens,
        max_tokens=recipe.pack_tokens if packed else 0,
        room=recipe.sampling.max_new_tokens if isinstance(recipe, GRPORecipe) else 0,
        max_patches=recipe.pack_patches if packed else 0,
        image_cache=data.image_cache,
        image_cache_gb=data.image_cache_gb,
        max_image_pixels=data.max_image_pixels,
    )


def doors(recipe: SFTRecipe | GRPORecipe, processor: Processor) -> Iterator[tuple[SourceConfig, Callable[[Example], Sequence]]]:
    """Each source of a recipe, of its training and its evaluation, and what the loop makes of an example of it: BadRow for a bad row."""
    encode = Processor.encode if isinstance(recipe, SFTRecipe) else Processor.encode_prompt
    for source in recipe.data.sources:
        yield source, functools.partial(encode, processor)
    for source in recipe.eval.sources:
        yield source, processor.encode_prompt
    for source in recipe.eval.loss_sources:
        yield source, processor.encode


def _first(
    config: SourceConfig, processor: Processor | None, encode: Encode, *, skip: bool, truths: bool = False
) -> tuple[list[Row], list[str]]:
    """The good ones of a source's first rows, and what is wrong with it. skip: bad rows may be, as long as one is good."""
    try:
        source = open_source(config)
    except (ValueError, OSError) as error:
        return [], [str(error)]
    good, bad = [], []
    for index in range(min(FIRST, len(source))):
        try:
            row = source[index]
            for image in row.images if processor is None else ():
                decode(image, row.where)
            if processor is not None:
                encode(processor, Example(row, index))
            begun(row)
            good.append(row)
        except BadRow as error:
            bad.append(str(error))
    if skip and good:
        bad = []
    if truths and not bad and not _has_truth(source):
        bad.append(f"{config.path}: none of the first {min(TRUTHS, len(source))} rows has a truth to compare with")
    return good, bad


def _opens_with_truth(config: SourceConfig) -> bool:
    try:
        return _has_truth(open_source(config))
    except (ValueError, OSError):  # said before
        return True


def _has_truth(source: Source) -> bool:
    for index in range(min(TRUTHS, len(source))):
        try:
            row = source[index]
            if row.truth or row.task:  # a task scores by what it finds in meta, too
                return True
        except BadRow:
            continue
    return False

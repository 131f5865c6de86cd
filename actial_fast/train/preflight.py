"""What can be known to go wrong before the model is loaded, all of it at once."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

from actial_fast.data.sources.row import BadRow, Row, decode
from actial_fast.data.sources.source import Source, SourceConfig, open_source
from actial_fast.data.sources.stream import Example
from actial_fast.model.processor import Processor
from actial_fast.packing.batch import Sequence
from actial_fast.settings.recipe import GRPORecipe, SFTRecipe
from actial_fast.tasks.rewards import probe
from actial_fast.train.dist import Agreed

FIRST = 4  # rows of a source that are read and encoded
TRUTHS = 64  # rows among which one must have a truth to evaluate with

Encode = Callable[[Processor, Example], Sequence]


class Unready(Agreed):
    """A run that would fail later. problems: one line each."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(problems))
        self.problems = problems


def problems_of(recipe: SFTRecipe | GRPORecipe, encode: Encode) -> list[str]:
    """What would end a run of this recipe, one line each; nothing is changed but that the images of the rows looked at are stored.

    encode: what the loop makes of each row.
    """
    return [" ".join(problem.split()) for problem in _problems(recipe, encode)]


def _problems(recipe: SFTRecipe | GRPORecipe, encode: Encode) -> Iterator[str]:
    processor = None
    try:
        processor = _processor(recipe)
    except (ValueError, OSError) as error:
        yield f"model.path: {recipe.model.path!r} has no tokenizer and image processor that can be read ({error})"
    if not recipe.data.sources:
        yield "data.sources: none given"
    row: Row | None = None
    for source in recipe.data.sources:
        rows, problems = _first(source, processor, encode, skip=recipe.data.on_bad_row == "skip")
        yield from (f"data.sources: {problem}" for problem in problems)
        row = row or next(iter(rows), None)
    for source in recipe.eval.sources:
        rows, problems = _first(source, processor, Processor.encode_prompt, skip=recipe.data.on_bad_row == "skip", truths=True)
        yield from (f"eval.sources: {problem}" for problem in problems)
    if isinstance(recipe, GRPORecipe) and row is not None:
        yield from (f"rewards: {problem}" for problem in probe(recipe.rewards, row))
    for package, wanted, off in (
        ("tensorboard", recipe.save.tensorboard, "save.tensorboard=false"),
        ("wandb", bool(recipe.save.wandb), "save.wandb="),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            yield f"save.{package}: {package} is not installed; pip install {package}, or {off}"


def _processor(recipe: SFTRecipe | GRPORecipe) -> Processor:
    model, data = recipe.model, recipe.data
    limits = {"min_pixels": model.min_pixels, "max_pixels": model.max_pixels, "max_prompt": data.max_prompt_tokens}
    return Processor.load(model.path, **limits, image_cache=data.image_cache)


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
            good.append(row)
        except BadRow as error:
            bad.append(str(error))
    if skip and good:
        bad = []
    if truths and not bad and not _has_truth(source):
        bad.append(f"{config.path}: none of the first {min(TRUTHS, len(source))} rows has a truth to compare with")
    return good, bad


def _has_truth(source: Source) -> bool:
    for index in range(min(TRUTHS, len(source))):
        try:
            if source[index].truth:
                return True
        except BadRow:
            continue
    return False

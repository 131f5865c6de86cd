"""How long a recipe's rows are: those of its data where they are here, else an assumption, and called one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from actial_fast.data.sources.places import exists, is_remote
from actial_fast.data.sources.row import BadRow
from actial_fast.data.sources.source import SourceConfig, open_source
from actial_fast.data.sources.stream import Example
from actial_fast.model.processor import Processor
from actial_fast.packing.batch import Sequence
from actial_fast.settings.recipe import GRPORecipe, SFTRecipe
from actial_fast.train.preflight import processor_of

LOOKED_AT = 16  # rows of a source
PROMPT, IMAGES, REPLY, ANSWER = 800, 640, 300, 60  # tokens, assumed: two images of 320 merged tokens and a question; a reply; an answer


@dataclass(frozen=True)
class Workload:
    """Means over rows, in tokens. prompt: of a prompt with its images; images: those of images among them; reply: of a reply, or of what
    is trained of a row. longest: of any prompt, or row, that was looked at, 0 where none was; rows: how many were; evaluated: rows of one
    evaluation, 0 where nobody knows."""

    prompt: float
    images: float
    reply: float
    longest: int = 0
    rows: int = 0
    evaluated: int = 0

    @property
    def about(self) -> str:
        """Where the figures are from."""
        lengths = f"prompts of {self.prompt:.0f} tokens, {self.images:.0f} of them of images, and {self.reply:.0f} more"
        return f"{lengths} ({f'means of {self.rows} rows of the data' if self.rows else 'assumed'})"


def assumed(
    recipe: SFTRecipe | GRPORecipe, prompt: float | None = None, images: float | None = None, reply: float | None = None
) -> Workload:
    """The recipe's rows, nothing being known of them but what is given. ValueError for what cannot be."""
    prompt = PROMPT if prompt is None else prompt
    images = min(IMAGES, 0.8 * prompt) if images is None else images
    if reply is None:
        reply = min(REPLY, recipe.sampling.max_new_tokens) if isinstance(recipe, GRPORecipe) else ANSWER
    if not 0 < prompt or not 0 <= images < prompt or not 0 < reply:
        raise ValueError(f"--prompt, --images, --reply: tokens, the images' among the prompt's; got {prompt:g}, {images:g}, {reply:g}")
    return Workload(prompt, images, reply, evaluated=evaluated(recipe))


def evaluated(recipe: SFTRecipe | GRPORecipe) -> int:
    """Rows of one evaluation: all sources', or the limit's where that is fewer; 0 where a source is not here and nothing limits it."""
    rows = 0
    for config in recipe.eval.sources:
        try:
            here = len(open_source(config))
        except (ValueError, OSError):
            here = 0
        if not here and not recipe.eval.limit:
            return 0
        rows += min(here or recipe.eval.limit, recipe.eval.limit or here)
    return rows


def known(recipe: SFTRecipe | GRPORecipe) -> Workload | None:
    """From the recipe's data, where they and the checkpoint's tokenizer are here."""
    sources = [s for s in recipe.data.sources if not is_remote(s.path) and exists(Path(s.path))]
    if not sources or not Path(recipe.model.path).is_dir():
        return None
    try:
        processor = processor_of(recipe)
    except (ValueError, OSError):
        return None
    return looked_at(recipe, processor)


def looked_at(recipe: SFTRecipe | GRPORecipe, processor: Processor, rows: int = LOOKED_AT) -> Workload | None:
    """From the first rows of the recipe's sources, by their weights; None where there are none to be read. Replies are assumed. Images are
    put into the store, as a run would."""
    grpo = isinstance(recipe, GRPORecipe)
    encode: Callable[[Processor, Example], Sequence] = Processor.encode_prompt if grpo else Processor.encode
    found: list[tuple[float, list[Sequence]]] = []
    for source in recipe.data.sources:
        if read := _first(source, processor, encode, rows):
            found.append((source.weight / len(read), read))
    if not found:
        return None
    total = sum(weight * len(read) for weight, read in found)

    def mean(of: Callable[[Sequence], float]) -> float:
        return sum(weight * of(s) for weight, read in found for s in read) / total

    trained = 0.0 if grpo else mean(lambda s: float(s.trained.sum()))
    images = mean(lambda s: s.patches / processor.merge**2)
    known = Workload(mean(len) - trained, images, trained or assumed(recipe).reply, evaluated=evaluated(recipe))
    every = [s for _, read in found for s in read]
    return replace(known, longest=max(map(len, every)), rows=len(every))


def _first(config: SourceConfig, processor: Processor, encode: Any, rows: int) -> list[Sequence]:
    """What can be read of a source's first rows; what is wrong with it preflight says."""
    try:
        source = open_source(config)
    except (ValueError, OSError):
        return []
    out = []
    for index in range(min(rows, len(source))):
        try:
            out.append(encode(processor, Example(source[index], index)))
        except BadRow:
            continue
    return out

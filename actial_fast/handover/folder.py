"""The folder that `actial export verl` writes: rows, reward and a script that starts verl's trainer with the recipe's settings."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path

from actial_fast.data.sources.row import BadRow
from actial_fast.data.sources.source import Source, open_source
from actial_fast.handover.overrides import Override, hydra, overrides, place_of
from actial_fast.handover.refusals import check, told
from actial_fast.handover.rows import Limits, copies, named, shares, write
from actial_fast.settings.recipe import GRPORecipe
from actial_fast.tasks.rewards import RewardConfig
from actial_fast.tasks.verl import score_function

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
SCRIPT = """#!/usr/bin/env bash
# GRPO by verl 0.9.1 as {recipe} has it; written by `actial export verl`, actial_fast {version}.
#
#   bash run.sh                            on one node of 8 GPUs
#   NODES=4 GPUS=8 bash run.sh             in a Ray cluster of four; this folder must be there on all of them
#   bash run.sh trainer.save_freq=5        with further overrides, which come last
#
# Where verl scores, actial_fast must be installed (pip install --no-deps, into verl's environment), because reward.py asks it.
# GRPO alone is handed over; a stage of SFT before it stays with `actial sft`. What verl does otherwise than `actial grpo`:
{told}
set -euo pipefail
here="$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)"
here="${{here//\\'/\\\\\\'}}" # within Hydra's quotes
overrides=(
{overrides}
  trainer.nnodes="${{NODES:-1}}"
  trainer.n_gpus_per_node="${{GPUS:-8}}"
)
exec "${{PYTHON:-python3}}" -m verl.trainer.main_ppo "${{overrides[@]}}" "$@"
"""
REWARD = '''"""The reward of {recipe} for verl, which run.sh names as reward.custom_reward_function; written by `actial export verl`."""

from actial_fast.tasks.rewards import RewardConfig
from actial_fast.tasks.verl import score_function

compute_score = score_function(
    [
{rewards}
    ],
    strict={strict},  # of "acc", in evaluations
)
'''


@contextmanager
def silent(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Progress that nobody is shown."""
    yield lambda done: None


@dataclass(frozen=True)
class Handed:
    """What was written. files: name -> what it is; bad: rows that were left out; told: what verl does otherwise, a line each."""

    files: dict[str, str]
    bad: list[BadRow]
    told: list[str]


def hand_over(recipe: GRPORecipe, name: str, out: Path, progress: Progress = silent) -> Handed:
    """Write the recipe for verl 0.9.1 into the folder `out`, which is whole or absent.

    name: of the recipe, for what the files say of themselves; progress: for a file and the number of rows that it will be made of, a
    context whose value is told the rows done. Raises Refused with everything that verl cannot do, BadRow for a row that cannot be used
    unless data.on_bad_row is skip, and ValueError for sources, rewards or a model that cannot be used, and where `out` is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: there is something already; name a folder that is new or empty")
    check(recipe)
    score_function(recipe.rewards)
    name = " ".join(name.split()).replace("\\", "/").replace('"', "'")  # it goes into a comment and a docstring
    pixels, out = _pixels(recipe), out.resolve()
    temporary = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        done = _write(recipe, name, temporary, Limits(pixels, recipe.data.max_image_pixels), progress)
        os.replace(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return done


def _write(recipe: GRPORecipe, name: str, folder: Path, limits: Limits, progress: Progress) -> Handed:
    files, bad, rows, skip = {}, [], [], recipe.data.on_bad_row == "skip"
    parts = recipe.data.sources
    sources = dict(zip(named(parts), map(open_source, parts), strict=True))
    looked_at: dict[str, Source] = dict(zip(named(recipe.eval.sources), map(open_source, recipe.eval.sources), strict=True))
    trained = ["train.parquet"] if len(parts) == 1 else [f"train-{i}.parquet" for i in range(1, len(parts) + 1)]
    for file, (source, opened) in zip(trained, sources.items(), strict=True):
        with progress(file, len(opened)) as advance:
            done = write(folder / file, {source: opened}, limits, split="train", skip=skip, advance=advance)
        files[file] = f"{done.rows:,} rows of {source} with {done.images:,} images"
        rows.append(done.rows)
        bad += done.bad
    validation = ""
    if looked_at:
        validation, limit = "val.parquet", recipe.eval.limit
        total = sum(min(limit or len(each), len(each)) for each in looked_at.values())
        with progress(validation, total) as advance:
            done = write(folder / validation, looked_at, limits, split="validation", limit=limit, skip=skip, advance=advance)
        files[validation] = f"{done.rows:,} rows of {', '.join(looked_at)} with {done.images:,} images"
        bad += done.bad
    numbers = copies(rows, [part.weight for part in parts])
    total = sum(n * number for n, number in zip(rows, numbers, strict=True))
    if total < recipe.prompts:
        raise ValueError(f"prompts: verl leaves out what does not fill a step, and there are {total} rows for steps of {recipe.prompts}")
    lines = told(recipe)
    if len(parts) > 1:
        got = ", ".join(f"{share:.3f}" for share in shares(rows, numbers))
        weights = ", ".join(f"{part.weight / sum(p.weight for p in parts):.3f}" for part in parts)
        lines.append(f"data.sources.weight: a file stands in data.train_files as often as gives shares of {got} for {weights}")
    if bad:
        lines.append(f"data.on_bad_row: {len(bad)} rows were left out when this was written; rejects.txt has them")
        (folder / "rejects.txt").write_text("".join(f"{error}\n" for error in bad), encoding="utf-8")
        files["rejects.txt"] = "rows that were left out, and why"
    listed = [file for file, number in zip(trained, numbers, strict=True) for _ in range(number)]
    (folder / "run.sh").write_text(_script(name, overrides(recipe, listed, validation, limits.pixels), lines), encoding="utf-8")
    (folder / "run.sh").chmod(0o755)
    rewards = "\n".join(f"        {_said(reward)}," for reward in recipe.rewards)
    text = REWARD.format(recipe=name, rewards=rewards, strict=recipe.eval.strict)
    (folder / "reward.py").write_text(text, encoding="utf-8")
    files |= {"reward.py": "the reward, by actial_fast", "run.sh": "starts verl's trainer with the recipe's settings"}
    return Handed(files, bad, lines)


def _script(name: str, settings: list[Override], lines: list[str]) -> str:
    written = "\n".join(f"#   - {' '.join(line.split())}" for line in lines)
    return SCRIPT.format(
        recipe=name,
        version=version("actial-fast"),
        told=written,
        overrides="\n".join(f"  {_word(each)}  # {each.why}" for each in settings),
    )


def _word(override: Override) -> str:
    """An override as one word of a shell, with $here left to it."""
    text = f"{override.key}={hydra(override.value)}"
    ours = "$here" in text  # with names that this project gave, and nothing else that a shell reads
    return f'"{text}"' if ours or ("'" in text and not set('"$`\\!') & set(text)) else shlex.quote(text)


def _said(reward: RewardConfig) -> str:
    """A reward as Python makes it, without what is at its default."""
    values = {field.name: getattr(reward, field.name) for field in fields(reward)}
    usual = {field.name: field.default for field in fields(reward)}
    return f"RewardConfig({', '.join(f'{key}={value!r}' for key, value in values.items() if value != usual[key])})"


def _pixels(recipe: GRPORecipe) -> tuple[int, int]:
    """Fewest and most pixels of a resized image: the recipe's limits, or else the checkpoint's."""
    model = recipe.model
    if model.min_pixels and model.max_pixels:
        return model.min_pixels, model.max_pixels
    from actial_fast.model.processor import pixel_limits  # brings transformers, of which verl's environment has another one

    path, problem = place_of(model.path), "there is no such folder"
    try:
        if Path(path).is_dir() or not Path(path).is_absolute():
            return pixel_limits(path, model.min_pixels, model.max_pixels)
    except (OSError, ValueError) as error:
        problem = str(error).strip().splitlines()[0]
    raise ValueError(
        f"model.min_pixels, model.max_pixels: where they are 0 the limits of images are the checkpoint's, and {path} cannot be read "
        f"({problem}); set both"
    )

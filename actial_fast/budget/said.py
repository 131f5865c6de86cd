"""A plan as text: what fits in a line, then phase by phase, and, where it does not, what to change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from actial_fast.budget.gpus import GB
from actial_fast.budget.phases import Phase
from actial_fast.budget.plan import Change, Plan, batch_of, changes
from actial_fast.budget.seconds import Range
from actial_fast.settings.config import to_yaml
from actial_fast.settings.recipe import GRPORecipe


def verdict(made: Plan) -> str:
    """One line: fits, with the least margin, or does not, by how much and where."""
    machine = made.case.machine
    where = f"{machine.name}, {machine.usable / GB:.1f} GB of each usable" if machine.cuda else f"{machine.name}, {gb(machine.host)} free"
    if made.fits:
        least = min(made.phases, key=lambda p: p.spare)
        return f"fits {where}: {gb(least.spare)} to spare in the fullest phase, {least.name}"
    bad = sorted((p for p in made.phases if not p.fits), key=lambda p: p.spare)
    said = [f"{bad[0].name} {problem(bad[0])}"] if bad else []
    if len(bad) > 1:
        said.append(f"nor do{'es' if len(bad) == 2 else ''} {', '.join(p.name for p in bad[1:])} fit")
    if made.host_spare < 0:
        said.append(f"the host lacks {gb(-made.host_spare)}")
    return f"does not fit {where}: {'; '.join(said)}"


def problem(phase: Phase) -> str:
    """What is wrong with a phase that does not fit."""
    if phase.spare < 0:
        return f"needs {gb(phase.held)}, {gb(-phase.spare)} too much"
    return f"has room for {phase.kv_tokens:,} tokens' keys and values, and the longest prompt with one reply needs {phase.kv_needed:,}"


def gb(size: float) -> str:
    """Bytes, as one reads them."""
    return f"{size / GB:.1f} GB" if size >= 0.95e8 else f"{size / 1e6:.0f} MB"


def spoken(seconds: Range) -> str:
    """A range of seconds, in the unit that it is in."""
    for unit, size in (("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds.high >= 2 * size or unit == "s":
            low, high = seconds.low / size, seconds.high / size
            return f"{_short(low)} to {_short(high)} {unit}"
    raise AssertionError


def _short(x: float) -> str:
    return f"{x:.0f}" if x >= 10 else f"{x:.1f}" if x >= 0.1 else "0"


def opening(made: Plan, sizes: Sequence[int], device: str, start: int, total: int, *, bounds: bool) -> Iterator[str]:
    """The first lines of a run. sizes: rows of each source; device: what it runs on; start: the step it goes on from, of `total`; bounds:
    memory is at most what the plan says. A time stands there only where the plan has rates."""
    case, recipe = made.case, made.case.recipe
    numel, trained = case.shapes.numel, case.shapes.trained
    yield f"{counted(numel)} parameters, {counted(trained)} of them trained ({_percent(trained / numel)}), on {device}"
    rows = f"{sum(sizes):,} rows" + (f" of {len(sizes)} sources" if len(sizes) > 1 else "")
    if isinstance(recipe, GRPORecipe):
        step = f"{recipe.prompts:,} prompts x {recipe.sampling.n} replies"
    else:
        step = f"{recipe.batch_size:,} rows"
    left = f"; {total - start:,} are left, from step {start:,}" if start else ""
    yield f"{rows}; {total:,} steps of {step}{left}"
    fullest = max(made.phases, key=lambda phase: phase.held)
    room = "usable" if case.machine.cuda else "free" if case.machine.count == 1 else "free for each"
    held = f"{'at most ' if bounds else ''}{gb(fullest.held)} a rank for the model and its passes"
    memory = f"{held}, in {fullest.name}, of {gb(case.machine.usable)} {room}"
    if made.rates is None:
        yield f"expected: {memory}; no time before the first steps, since nothing is known of this machine's speed"
        return
    aside = ["checkpoints"] + (["evaluations"] if recipe.eval.sources or recipe.eval.loss_sources else [])
    each = made.seconds["step"]
    took = f"a step {spoken(each)}, {total - start:,} of them {spoken(each * (total - start))}, {' and '.join(aside)} aside"
    yield f"expected: {memory}; {took} ({made.rates.about})"


def counted(number: int) -> str:
    """How many numbers a model has, as one reads them."""
    return f"{number / 1e9:.2f}e9" if number >= 1e8 else f"{number / 1e6:.1f}e6" if number >= 1e6 else f"{number:,}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def text(made: Plan, name: str, *, advice: bool = True) -> str:
    """All of a plan, as `actial plan` prints it. name: of the recipe."""
    return "\n".join(_lines(made, name, advice))


def _lines(made: Plan, name: str, advice: bool) -> Iterator[str]:
    case, size = made.case, batch_of(made)
    yield f"{name}: {verdict(made)}"
    yield ""
    yield f"{counted(case.shapes.numel)} parameters, {counted(case.shapes.trained)} trained; {case.workload.about}"
    yield f"micro-batches of up to {size.tokens:,} tokens and {size.patches:,} patches"
    yield ""
    yield f"{'phase':<8}{'GB a rank':>10}{'spare':>8}  {'time':<18} of that"
    for phase in made.phases:
        took = spoken(made.seconds[phase.name]) if phase.name in made.seconds else ""
        items = ", ".join(f"{item} {size / GB:.1f}" for item, size in sorted(phase.device.items(), key=lambda x: -x[1]) if size >= 5e7)
        mark = "" if phase.fits else "  <- does not fit"
        yield f"{phase.name:<8}{phase.held / GB:>10.1f}{phase.spare / GB:>8.1f}  {took:<18} {items or 'next to nothing'}{mark}"
    yield ""
    if case.workload.evaluated and "eval" in made.seconds:
        yield f"eval: {case.workload.evaluated:,} rows, replies as above, none over {case.recipe.eval.max_new_tokens:,} tokens"
    if made.pack_tokens:
        yield f"largest pack_tokens that fits: {made.pack_tokens:,} (the recipe has {case.recipe.pack_tokens:,})"
    for phase in made.phases:
        if phase.kv_tokens is not None:
            held = f"keys and values of {phase.kv_tokens:,} tokens find room"
            yield f"{phase.name}: {held}; a longest prompt with one reply needs {phase.kv_needed:,}"
    if case.machine.cuda:
        fullest = max(made.phases, key=lambda p: sum(p.host.values()))
        items = ", ".join(f"{item} {size / GB:.1f}" for item, size in fullest.host.items())
        of = f" of {gb(case.machine.host)}" if case.machine.host < float("inf") else " (give --host GB to have it checked)"
        yield f"host memory: {gb(sum(fullest.host.values()))}{of}, in {fullest.name}: {items}"
    disk = next(p.disk for p in made.phases if p.disk)
    yield f"disk: {gb(sum(disk.values()))}: {', '.join(f'{item} {gb(size)}' for item, size in disk.items())}"
    if made.rates:
        yield f"a step: {spoken(made.seconds['step'])} ({made.rates.about})"
    else:
        yield "a step: no time, since nothing is known of this GPU's speed; name it, like 8xH100, or give --rates"
    if not made.fits and advice:
        yield ""
        yield from _advice(made)


def _advice(made: Plan) -> Iterator[str]:
    single, together = changes(made)
    if single:
        yield "any one of these makes it fit, cheapest first:"
        yield from (_change(each) for each in single)
    if together:
        yield f"{'or ' if single else ''}these together make it fit{', and train the same' if together.same else ''}:"
        yield _change(together)
    if not single and not together:
        yield "no change of keys that is known makes it fit; it takes more or larger GPUs, or a smaller model"


def _change(each: Change) -> str:
    took = f"; a step {spoken(each.plan.seconds['step'])}" if each.plan.rates else ""
    spare = min(p.spare for p in each.plan.phases)
    return f"  {_keys(each.keys)}\n      {each.cost}; {gb(spare)} to spare{took}"


def advice_line(made: Plan) -> str:
    """What to change, in a line, for an error."""
    single, together = changes(made)
    chosen = together if together and together.same else single[0] if single else together
    if chosen is None:
        return "no change of keys that is known makes it fit"
    return f"{_keys(chosen.keys)} would ({chosen.cost})"


def _keys(keys: dict[str, Any]) -> str:
    return " ".join(f"{key}={to_yaml(value)}" for key, value in keys.items())

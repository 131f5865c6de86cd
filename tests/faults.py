"""Faults planted in a run, and a program that 2 ranks run to go through many of them in one process each.

A fault is written what:place:rank:call, for example kill:update:1:3: at its 3rd call, on rank 1, the place does it. Places: sample (each
token), update (each forward and backward pass), save (each file a rank writes), eval (each source), forward (the sampler's vision tower,
inside of it), logp (each pass without gradients), optimizer (each step), load (each model), reward (each call). What: kill (SIGKILL to this
process), term (SIGTERM), raise, oom (of the device's memory), full (the disk), nan (the loss), slow (half a second, or ACTIAL_TEST_WAIT,
at this and all later calls).
In another program: PYTHONPATH=tests/planted and ACTIAL_TEST_FAULTS="kill:update:1:3 slow:sample:0:1".
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

WAIT = float(os.environ.get("ACTIAL_TEST_WAIT", 0.5))


def plant(faults: str, rank: int) -> contextlib.ExitStack:
    """Put the faults in place, until the stack that is returned closes."""
    import pytest

    from actial_fast import grpo, sft
    from actial_fast.evaluation import evaluate
    from actial_fast.model import policy
    from actial_fast.rollout import decoder
    from actial_fast.train import checkpoint

    places: dict[str, list[tuple[Any, str]]] = {
        "sample": [(decoder, "draw")],
        "update": [(sft.ops, "linear_cross_entropy"), (grpo.ops, "linear_grpo_loss")],
        "save": [(checkpoint, "write")],
        "eval": [(evaluate, "_replies")],
        "forward": [(policy, "encode_images")],
        "logp": [(grpo.ops, "linear_logprob")],
        "optimizer": [(torch.optim.AdamW, "step")],
        "load": [(policy, "fill")],
        "reward": [(sys.modules[short.__module__], "short")],
    }
    stack = contextlib.ExitStack()
    patch = stack.enter_context(pytest.MonkeyPatch.context())
    for fault in faults.split():
        what, place, who, call = fault.split(":")
        if int(who) != rank:
            continue
        for module, name in places[place]:
            plain = getattr(module, name)
            made = faulty(plain, what, int(call))
            if place == "forward":
                made = lambda *args, bad=made, good=plain: (good if torch.is_grad_enabled() else bad)(*args)  # noqa: E731
            patch.setattr(module, name, made, raising=False)
    return stack


def faulty(run: Callable[..., Any], what: str, at: int) -> Callable[..., Any]:
    """`run` with a fault at its call number `at`."""
    calls = itertools.count(1)

    def called(*args: Any, **kwargs: Any) -> Any:
        call = next(calls)
        if what == "slow" and call >= at:
            time.sleep(WAIT)
        if call != at or what == "slow":
            return run(*args, **kwargs)
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        if what == "raise":
            raise RuntimeError("a fault planted by a test")
        if what == "oom":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if what == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))
        result = run(*args, **kwargs)
        if what == "nan":
            return (
                result._replace(loss=result.loss * torch.nan, stats=result.stats * torch.nan)
                if hasattr(result, "stats")
                else result * torch.nan
            )
        return result

    return called


def short(response: str, row: Any) -> float:
    """More for shorter replies: a reward that random weights earn by chance and can learn."""
    return 1.0 / (1 + len(response) / 8)


# ---- many cases in one process a rank


def main(argv: list[str]) -> None:
    """CASES.json OUT: run every case {"name", "kind", "recipe", "overrides", "faults"} on all ranks; one JSON line a case into OUT.rank."""
    from actial_fast import grpo, sft
    from actial_fast.settings.config import load_recipe
    from actial_fast.train.dist import world

    cases = json.loads(Path(argv[0]).read_text())
    with world(minutes=3) as where, open(f"{argv[1]}.{where.rank}", "w") as out:

        @contextlib.contextmanager
        def same(minutes: float = 0) -> Iterator[Any]:
            yield where

        sft.world = grpo.world = same  # type: ignore[assignment]  # one group for all cases
        for case in cases:
            recipe = load_recipe(case["recipe"], case["overrides"])
            began = time.monotonic()
            with plant(case["faults"], where.rank):
                outcome = run(grpo.train if recipe.kind == "grpo" else sft.train, recipe)
            found = {"name": case["name"], "seconds": time.monotonic() - began, **outcome}
            out.write(json.dumps(found) + "\n")
            out.flush()
            where.barrier()


def run(train: Callable[[Any], Path], recipe: Any) -> dict[str, Any]:
    """What became of a run: "finished", "stopped" or the error's class, and what it said."""
    try:
        final = train(recipe)
    except SystemExit as stopped:
        return {"outcome": "stopped", "said": str(stopped.code)}
    except Exception as error:
        return {"outcome": type(error).__name__, "said": str(error), "trace": traceback.format_exc()}
    tensors = load_file(final / "model.safetensors")
    return {"outcome": "finished", "said": "", "finite": all(bool(t.isfinite().all()) for t in tensors.values())}


def leave(status: int = 0) -> None:
    """End this rank as `actial` does: threads of libraries that meet the end of the interpreter can abort one that has finished."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
    leave()

"""Launch configurations of the head's products, timed on the GPU at hand beside cuBLAS: what `kernels/head.py`'s table is chosen from.

    python -m bench.kernels.tune [--rows 2048] [--width 3584] [--vocab 152064] [--dtype bfloat16] [--kernel logits]

Every candidate is timed in the same rounds, best of the rounds; one that does not fit the chip is listed with the reason. Without a GPU the
candidates are only compiled, for --arch, and their resources printed.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import torch

from actial_fast.kernels import common, head, head_grad
from bench.harness.timing import CUDA, DEVICE, seconds_of
from bench.kernels.compile_only import CHIPS, compile_only
from bench.kernels.resources import read, table

TILES = [
    head.Tile(m, n, k, parts, warps, stages, tma=True)
    for m, n, k, parts, warps, stages in (
        (128, 256, 64, 2, 8, 3),
        (128, 256, 64, 2, 8, 4),
        (128, 256, 128, 2, 8, 2),
        (256, 128, 64, 1, 8, 3),
        (256, 128, 64, 2, 8, 4),
        (128, 128, 64, 1, 4, 4),
        (128, 128, 64, 1, 8, 4),
        (128, 128, 128, 1, 8, 3),
        (64, 256, 64, 2, 4, 4),
    )
]
Call = Callable[[], object]


def calls(rows: int, width: int, vocab: int, dtype: torch.dtype, device: str) -> dict[str, tuple[Call, Call | None]]:
    """Kernel -> (our launcher, the same product by cuBLAS), on random inputs."""
    meta = device == "meta"
    draw = lambda *size: torch.empty(size, dtype=dtype, device=device) if meta else torch.randn(size, device=device).to(dtype)  # noqa: E731
    argument = head.make_head(
        draw(rows, width), draw(vocab, width) * width**-0.5, torch.zeros(rows, dtype=torch.int64, device=device), None, 1.0, None
    )
    scaled = torch.empty((rows, vocab), dtype=dtype, device=device)
    dhidden, dweight = torch.zeros_like(argument.hidden), torch.zeros((vocab, width), device=device)
    ones = torch.ones(rows, device=device)

    def gradient(out: head_grad.Gradients) -> Call:
        def call() -> None:
            parts, _, entropy = head.forward(argument, scaled)
            head_grad.backward(argument, parts, entropy, ones, None, out, True)

        return call

    mixed = {} if dtype == torch.float32 else {"out_dtype": torch.float32}
    return {
        "logits": (lambda: head.forward(argument, None), lambda: torch.mm(argument.hidden, argument.weight.T, out=scaled)),
        "logits-store": (lambda: head.forward(argument, scaled), lambda: torch.mm(argument.hidden, argument.weight.T, out=scaled)),
        "dhidden": (gradient(head_grad.Gradients(dhidden, None, None, True)), lambda: torch.mm(scaled, argument.weight, out=dhidden)),
        "dweight": (
            gradient(head_grad.Gradients(None, dweight, None, True)),
            lambda: torch.addmm(dweight, scaled.T, argument.hidden, out=dweight, **mixed),
        ),
    }


def main() -> None:
    """Time, or compile, every candidate of every kernel asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels.tune", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=2048, help="rows of a chunk (default: 2048)")
    parser.add_argument("--width", type=int, default=3584, help="hidden size (default: 3584)")
    parser.add_argument("--vocab", type=int, default=152064, help="vocabulary (default: 152064)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--kernel", nargs="+", choices=("logits", "logits-store", "dhidden", "dweight"), help="default: all")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, the best counts (default: 5)")
    parser.add_argument("--arch", type=int, choices=CHIPS, default=90, help="without a GPU: what to compile for (default: 90)")
    args = parser.parse_args()
    todo = calls(args.rows, args.width, args.vocab, getattr(torch, args.dtype), DEVICE if CUDA else "meta")
    todo = {name: call for name, call in todo.items() if args.kernel is None or name in args.kernel}
    major, shipped = common.capability()[0], dict(head.HALF_TILES)
    if not CUDA:
        major = args.arch // 10
    major = max(known for known in shipped if known <= major)
    work = 2 * args.rows * args.width * args.vocab
    for name, (ours, cublas) in todo.items():
        best: dict[str, float] = {}
        for round_, tile in itertools.product(range(args.rounds if CUDA else 1), [None, *TILES]):
            label = "cuBLAS" if tile is None else f"{tile}{' (shipped)' if tile == shipped[major] else ''}"
            if tile is not None:
                head.HALF_TILES[major] = tile
            try:
                if CUDA:
                    call = cublas if tile is None else ours
                    if round_ == 0:
                        call()  # compiles
                    best[label] = min(best.get(label, float("inf")), seconds_of(call))
                elif tile is not None:
                    with compile_only(args.arch) as launches:
                        ours()
                    matrix = [one for one in launches if one.function.__name__.removesuffix("_kernel") == name.split("-")[0]]
                    print(f"\n{name} {label}\n{table(read([(name, args.dtype, one) for one in matrix], args.arch))}")
            except Exception as error:  # a candidate that does not fit is a result
                print(f"{name} {label}: {type(error).__name__}: {str(error).splitlines()[0]}")
            finally:
                head.HALF_TILES.update(shipped)
        for label, seconds in sorted(best.items(), key=lambda item: item[1]):
            print(f"{name:<13} {1e3 * seconds:8.3f} ms {work / seconds / 1e12:7.1f} TFLOP/s  {label}")
    if CUDA and {"dhidden", "dweight"} & set(todo):
        print("dhidden and dweight include the forward that feeds them and the row kernels: subtract logits-store")


if __name__ == "__main__":
    main()

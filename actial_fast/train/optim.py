"""The optimizer of both loops: AdamW in float32 arithmetic, whatever its moments and the weights are held in, and its learning rate.

With float32 weights and moments it is PyTorch's. Else `LeanAdamW`, which goes over this rank's rows piece by piece: brings a piece's
moments to float32 (from 8 bits, or from the host), makes PyTorch's fused step on it, and puts moments and weights back. Weights of bfloat16
follow a float32 master where there is one, and are rounded stochastically where there is none. Both skip a step on the device, by the
protocol of torch.amp.GradScaler (guard.py).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from actial_fast.model.policy import Policy
from actial_fast.model.weights import local, rows_of
from actial_fast.ops.rounding import round_stochastic_
from actial_fast.settings.running import OptimConfig
from actial_fast.train import quantised
from actial_fast.train.offload import pinned

PIECE = 1 << 23  # elements worked on at a time: two pieces of moments on the device where they live on the host, 64 MiB each in float32
VECTOR = 64  # elements that PyTorch's step on a CPU computes alike wherever they stand; of fewer, the last bits may differ
MOMENTS = ("exp_avg", "exp_avg_sq")
LARGEST = "_absmax"  # of a moment in 8 bits, each block's largest magnitude


def build_optimizer(policy: Policy, config: OptimConfig, seed: int = 0) -> torch.optim.Optimizer:
    """AdamW over the trained parameters; decay on matrices only. seed: of stochastic rounding.

    ValueError where states of this kind cannot be had.
    """
    trained = policy.trained()
    groups = [
        {"params": [p for p in trained.values() if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    groups = [group for group in groups if group["params"]]
    if config.kind == "adamw" and config.offload != "always" and all(p.dtype == torch.float32 for p in trained.values()):
        return torch.optim.AdamW(groups, fused=True, **settings)
    if problem := quantised.problem(config.kind, policy.device):
        raise ValueError(problem)
    return LeanAdamW(groups, config, {p: key_of(name, seed) for name, p in trained.items()})


def set_learning_rate(optimizer: torch.optim.Optimizer, config: OptimConfig, step: int, total: int) -> float:
    """Set and return the learning rate of `step` (1-based) of `total`: a function of the step alone, so resuming needs no state."""
    rate = config.lr * min(1.0, step / config.warmup_steps) if config.warmup_steps else config.lr
    if config.schedule != "constant" and step > config.warmup_steps:
        done = (step - config.warmup_steps - 1) / max(1, total - config.warmup_steps)  # 0 at the first step after it, below 1 at the last
        left = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        rate = config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * left)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def parameters_of(policy: Policy) -> list[nn.Parameter]:
    """The trained parameters, in a fixed order."""
    return list(policy.trained().values())


def key_of(name: str, seed: int) -> int:
    """64 bits that tell a parameter's random numbers from those of other parameters and seeds."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest(), "little")


def empty_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Room for a state of a parameter as the optimizer holds it, this rank's rows of it; shape: the whole state's, of as many rows as the
    parameter, or of a scalar."""
    if isinstance(optimizer, LeanAdamW):
        return optimizer.room(parameter, shape, dtype)
    if tuple(parameter.shape) == shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(shape, dtype=dtype, device=parameter.device)


@dataclass(frozen=True)
class Piece:
    """Rows first:last of this rank's rows of a parameter. first_element: the place of the first of them in the whole parameter."""

    parameter: nn.Parameter
    group: dict[str, Any]
    rows: slice
    first_element: int


class LeanAdamW(torch.optim.Optimizer):
    """AdamW on plain or sharded (FSDP2) parameters with little memory on the device.

    state[parameter]: step, a float32 scalar; exp_avg and exp_avg_sq, this rank's rows, float32 or, with their largest magnitudes by block
    in NAME_absmax (rows, blocks), uint8; master, this rank's rows in float32. With offload: always all but the step lie on the host,
    pinned, and pass through two buffers on the device while other pieces are computed; the first two come before the gradients are known,
    so the last backward pass hides them. They are whole once the device has been waited for after a step.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig, keys: dict[nn.Parameter, int]):
        """keys: see key_of."""
        super().__init__(groups, {"lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": 0.0})
        self._config, self._keys = config, keys
        self._passage: Passage | None = None
        self._on_host = config.offload == "always"
        # so that a piece of any shape equals the same rows of the whole; with PyTorch's own dtypes it is PyTorch's step that is equalled
        self._exact = config.kind != "adamw" or any(p.dtype != torch.float32 for p in keys)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # there is no loss to compute anew
        """One step along the gradients; none where the scalar `found_inf`, set by whoever calls, is 1. The host waits for nothing."""
        bad: Tensor | None = getattr(self, "found_inf", None)
        with_gradient = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not with_gradient:
            return
        for parameter, _ in with_gradient:
            if not self.state[parameter]:
                self._begin(parameter)
        steps = [self.state[p]["step"] for p, _ in with_gradient]
        torch._foreach_add_(steps, 1)
        pieces = [piece for p, group in with_gradient for piece in _cut(p, group)]
        for piece, states in self._states(pieces):
            self._update(piece, states, bad)
        if bad is not None:
            torch._foreach_sub_(steps, [bad] * len(steps))

    def room(self, parameter: nn.Parameter, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """As `empty_state`."""
        if not shape:
            return torch.empty((), dtype=dtype, device=parameter.device)
        rows = len(local(parameter)), *shape[1:]
        if self._on_host:
            return pinned(rows, dtype) if parameter.device.type == "cuda" else torch.empty(rows, dtype=dtype)
        if self._config.kind == "paged_adamw8bit" and dtype == torch.uint8 and math.prod(rows) >= quantised.PAGED:
            return quantised.paged(rows, parameter.device)
        return torch.empty(rows, dtype=dtype, device=parameter.device)

    def _begin(self, parameter: nn.Parameter) -> None:
        """The states of a parameter that has its first gradient."""
        shape, state = tuple(parameter.shape), self.state[parameter]
        state["step"] = torch.zeros((), device=parameter.device)
        eight = self._config.kind != "adamw" and quantised.fits(parameter.shape)
        for name in MOMENTS:
            state[name] = self.room(parameter, shape, torch.uint8 if eight else torch.float32).zero_()
            if eight:
                blocks = quantised.blocks_of(math.prod(shape[1:]))
                state[name + LARGEST] = self.room(parameter, (shape[0], blocks), torch.float32).zero_()
        if self._config.master and parameter.dtype != torch.float32:
            state["master"] = self.room(parameter, shape, torch.float32).copy_(local(parameter))

    def _states(self, pieces: list[Piece]) -> Iterator[tuple[Piece, dict[str, Tensor]]]:
        """Each piece with its rows of the states, on the device; what is written to them is kept."""
        if not pieces:  # of these parameters this rank has no row
            return
        rows = [{name: value[piece.rows] for name, value in self.state[piece.parameter].items() if value.ndim} for piece in pieces]
        if self._on_host:
            if self._passage is None or not self._passage.holds(rows):
                self._passage = Passage(pieces[0].parameter.device, rows)
            yield from zip(pieces, self._passage.through(rows), strict=True)
        else:
            for piece, states in zip(pieces, rows, strict=True):
                if piece.rows.start == 0:
                    for value in self.state[piece.parameter].values():
                        quantised.prefetch(value)
                yield piece, states

    def _update(self, piece: Piece, states: dict[str, Tensor], bad: Tensor | None) -> None:
        weight = local(piece.parameter)[piece.rows].view(-1)
        gradient = local(piece.parameter.grad)[piece.rows].reshape(-1).float()  # type: ignore[arg-type]  # those without are left out
        master = states.get("master")
        value = weight.float() if master is None else master.view(-1)  # itself where it is float32
        eight = MOMENTS[0] + LARGEST in states
        moments = [_loaded(states, name) if eight else states[name].view(-1) for name in MOMENTS]
        step = self.state[piece.parameter]["step"]
        self._fused([value, gradient, *(m.view(-1) for m in moments)], step, piece.group, bad)
        if eight:
            for name, moment in zip(MOMENTS, moments, strict=True):
                values = states[name].view(moment.shape)
                quantised.store(moment, values, states[name + LARGEST], signed=name == MOMENTS[0], unless=bad)
        if master is not None:
            weight.copy_(value)
        elif weight.dtype != torch.float32:
            round_stochastic_(weight, value, key=self._keys[piece.parameter], step=step, first=piece.first_element)

    def _fused(self, tensors: list[Tensor], step: Tensor, group: dict[str, Any], bad: Tensor | None) -> None:
        """PyTorch's fused step on weight, gradient and moments, (n,) float32 each."""
        n = len(tensors[0]) // VECTOR * VECTOR if self._exact else len(tensors[0])
        parts = [[x[:n] for x in tensors]]
        if rest := len(tensors[0]) - n:
            parts.append([torch.nn.functional.pad(x[n:], (0, VECTOR - rest)) for x in tensors])
        for part in parts if n else parts[1:]:
            weight, gradient, *moments = part
            torch._fused_adamw_(
                [weight],
                [gradient],
                [moments[0]],
                [moments[1]],
                [],
                [step],
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
                grad_scale=None,
                found_inf=bad,
            )
        if rest:
            for x, padded in zip(tensors, parts[1], strict=True):
                x[n:] = padded[:rest]


class Passage:
    """Two buffers on the device through which pieces of what lies on the host pass, one filled and emptied while the other is worked on.

    On CUDA copies run on two streams of their own, one for each direction; on a CPU they are made where they are asked for.
    """

    def __init__(self, device: torch.device, pieces: list[dict[str, Tensor]]):
        self._size = max(map(_bytes, pieces))
        self._buffers = [torch.empty(self._size, dtype=torch.uint8, device=device) for _ in range(2)]
        self._device = device
        if device.type == "cuda":
            self._fetching, self._storing = torch.cuda.Stream(device), torch.cuda.Stream(device)
            self._storing.wait_stream(torch.cuda.current_stream(device))  # which may still use what the buffers' memory was before

    def holds(self, pieces: list[dict[str, Tensor]]) -> bool:
        """Whether the buffers are large enough."""
        return max(map(_bytes, pieces)) <= self._size

    def through(self, pieces: list[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """Copies of the pieces on the device, one after the other; what they hold when the next is asked for goes back to the host."""
        stored: list[Any] = [None, None]
        if self._device.type == "cuda":
            self._fetching.wait_stream(self._storing)  # the step before has put everything back, and no piece of it is worked on
        ahead = self._fetch(0, pieces[0], None)
        for number, piece in enumerate(pieces):
            here, arrived = ahead
            if number + 1 < len(pieces):
                side = (number + 1) % 2
                ahead = self._fetch(side, pieces[number + 1], stored[side])
            self._wait(arrived)
            yield here
            stored[number % 2] = self._store(piece, here)
        for event in stored:  # whoever waits for the device then finds the host's memory whole
            self._wait(event)

    def _fetch(self, side: int, piece: dict[str, Tensor], emptied: Any) -> tuple[dict[str, Tensor], Any]:
        here, at = {}, 0
        for name, value in piece.items():
            here[name] = self._buffers[side][at : at + value.nbytes].view(value.dtype).view(value.shape)
            at += _aligned(value.nbytes)
        if self._device.type != "cuda":
            for name, value in piece.items():
                here[name].copy_(value)
            return here, None
        with torch.cuda.stream(self._fetching):
            if emptied is not None:
                self._fetching.wait_event(emptied)
            for name, value in piece.items():
                here[name].copy_(value, non_blocking=True)
            return here, self._fetching.record_event()

    def _store(self, piece: dict[str, Tensor], here: dict[str, Tensor]) -> Any:
        if self._device.type != "cuda":
            for name, value in piece.items():
                value.copy_(here[name])
            return None
        self._storing.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._storing):
            for name, value in piece.items():
                value.copy_(here[name], non_blocking=True)
            return self._storing.record_event()

    def _wait(self, event: Any) -> None:
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)


def _cut(parameter: nn.Parameter, group: dict[str, Any]) -> Iterable[Piece]:
    """This rank's rows in pieces of about PIECE elements, each but the last a multiple of VECTOR."""
    first, (rows, columns) = rows_of(parameter)[0], _matrix(local(parameter)).shape
    each = max(1, PIECE // max(1, columns) // VECTOR) * VECTOR
    for at in range(0, rows if columns else 0, each):
        yield Piece(parameter, group, slice(at, min(at + each, rows)), (first + at) * columns)


def _matrix(x: Tensor) -> Tensor:
    """As (rows, columns)."""
    return x.view(len(x), -1) if len(x) else x.view(0, 1)


def _loaded(states: dict[str, Tensor], name: str) -> Tensor:
    """A moment in 8 bits as (rows, columns) in float32."""
    return quantised.load(_matrix(states[name]), states[name + LARGEST], signed=name == MOMENTS[0])


def _bytes(piece: dict[str, Tensor]) -> int:
    return sum(_aligned(value.nbytes) for value in piece.values())


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 256) * 256

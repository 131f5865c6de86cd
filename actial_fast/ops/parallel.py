"""The head spread over the ranks of a process group: each has some rows of the vocabulary, and all have the whole loss.

T rows, P ranks, V vocabulary. Every rank multiplies all T rows with its part of the head, so that products, logits and the head's gradient
are divided by P. What a row's softmax needs of the other ranks is four numbers: the peak (one all-reduce), then the sum of exponentials,
its moment and the target's logit (another), for each chunk of rows. The gradient of the hidden states is the sum over ranks: one
all-reduce of (T, H), or a reduce-scatter where the rows are spread as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# by the names that PyTorch 2.13 gave them, where it has these
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


@dataclass(frozen=True)
class VocabParallel:
    """How a head (V, H) is spread over a process group: in the order of its ranks, in parts of any size. Made by `of`.

    group: its ranks, all of which call every op alike. start: the vocabulary's id of this rank's first row; rows: how many it has; vocab:
    V; largest: the rows of the rank with the most, from which all ranks cut the same chunks. sharded_rows: the hidden states are spread
    too, rank r of P holding rows [r T / P, (r + 1) T / P) of the T that targets and all other arguments have ("sequence parallel").
    """

    group: ProcessGroup
    start: int
    rows: int
    vocab: int
    largest: int
    sharded_rows: bool = False

    @classmethod
    def of(cls, weight: Tensor, group: ProcessGroup | None = None, *, sharded_rows: bool = False) -> VocabParallel:
        """Of this rank's part of the head, weight (V_rank, H), over a group (None: the default one). Every rank of it calls, once, since
        it waits for the others. ValueError where no group is there."""
        if not dist.is_initialized():
            raise ValueError("vocab_parallel: no process group; call torch.distributed.init_process_group first")
        group = group or dist.group.WORLD
        assert group is not None
        counts = [torch.zeros(1, dtype=torch.int64, device=weight.device) for _ in range(group.size())]
        dist.all_gather(counts, torch.tensor([len(weight)], device=weight.device), group=group)
        rows = [int(count) for count in counts]
        return cls(group, sum(rows[: group.rank()]), len(weight), sum(rows), max(rows), sharded_rows)

    def enter(self, hidden: Tensor) -> Tensor:
        """The hidden states (T, H) of all rows, whose gradient is the sum of what the ranks find."""
        return (_GatheredRows if self.sharded_rows else _SameRows).apply(hidden, self.group)

    def local(self, targets: Tensor) -> Tensor:
        """Targets as rows of this rank's part; -1 for those of other ranks."""
        return torch.where((targets >= self.start) & (targets < self.start + self.rows), targets - self.start, -1)

    def max(self, x: Tensor) -> Tensor:
        """The largest of all ranks, elementwise, in place."""
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x

    def sum(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The sums over all ranks of tensors of one dtype, in one message."""
        message = torch.cat([x.flatten() for x in tensors])
        dist.all_reduce(message, group=self.group)
        parts = message.split([x.numel() for x in tensors])
        return tuple(part.view(x.shape) for part, x in zip(parts, tensors, strict=True))

    def merge(
        self, peak: Tensor, log_total: Tensor, entropy: Tensor, chosen: Tensor, here: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The whole rows' peak, log of their sum of exp(z - peak), log-probs and entropies (T,), from those of this rank's part.

        chosen (T,) is the target's logit where `here` says that this rank has it; a target that no rank has gets NaN. With share s of the
        whole row's sum, the entropy is that of the parts and of their shares: sum over ranks of s * (entropy - log s).
        """
        top = self.max(peak.clone())
        shift = torch.where(peak == -torch.inf, -torch.inf, peak - top)
        log_share = shift + log_total
        share = log_share.exp()
        moment = torch.where(share > 0, share * (entropy - log_share), 0)
        total, moment, chosen, found = self.sum(share, moment, torch.where(here, chosen - top, 0), here.to(share.dtype))
        log_total = total.log()
        logp = torch.where(found > 0, (chosen - log_total).clamp(max=0), torch.nan)
        return top, log_total, logp, (log_total + moment / total).clamp(min=0)

    def merge_kl(self, kl: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
        """The whole rows' KL(p || q) (T,) and statistics (T, 4), peak and log of the sum for p and for q, from those of this rank's part.

        With shares s and t of the whole rows' sums for p and q: KL = sum over ranks of s * (kl + log(s / t)).
        """
        tops = self.max(stats[:, ::2].clone())
        log_shares = torch.where(stats[:, ::2] == -torch.inf, -torch.inf, stats[:, ::2] - tops) + stats[:, 1::2]
        log_totals = torch.stack(self.sum(*log_shares.exp().unbind(1)), 1).log()
        log_s, log_t = (log_shares - log_totals).unbind(1)
        share = log_s.exp()
        (kl,) = self.sum(torch.where(share > 0, share * (kl + (log_s - log_t)), 0))
        return kl.clamp(min=0), torch.stack((tops, log_totals), 2).flatten(1)


class _SameRows(torch.autograd.Function):
    """All ranks have the same rows."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.to(_exact(grad), copy=True)
        dist.all_reduce(total, group=ctx.group)
        return total.to(grad.dtype), None


class _GatheredRows(torch.autograd.Function):
    """Each rank has T / P of the rows."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        out = hidden.new_empty(group.size() * len(hidden), *hidden.shape[1:])
        _all_gather(out, hidden.contiguous(), group=group)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        mine = grad.new_empty(len(grad) // ctx.group.size(), *grad.shape[1:], dtype=_exact(grad))
        _reduce_scatter(mine, grad.to(mine.dtype).contiguous(), group=ctx.group)
        return mine.to(grad.dtype), None


def _exact(x: Tensor) -> torch.dtype:
    """What sums over ranks are computed in: halves would be rounded once a rank."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32

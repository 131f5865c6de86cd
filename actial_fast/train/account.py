"""What a step's passes did, for the clock: tokens and the FLOPs that their groups need, from what the host knows of them."""

from __future__ import annotations

from collections.abc import Sequence as Many

from actial_fast.model.families.known import known
from actial_fast.model.flops import Least, Work, images_once, work_of
from actial_fast.model.policy import Policy
from actial_fast.packing.batch import Sequence
from actial_fast.train.phases import Phases
from actial_fast.train.rounds import Pass


class Account:
    """Tells `phases` what this rank's passes did. Best called once the device has the step's work: what it takes is hidden then.

    FLOPs are 0, and there is no MFU, for a model whose formulas are not known.
    """

    def __init__(self, phases: Phases):
        self._phases = phases
        self._least: dict[Policy, Least] = {}

    def passes(self, wanted: Many[Pass]) -> None:
        """The passes of one step with gradients and for log-probs, in the order in which they run. Of tokens a prompt has its own for
        every reply."""
        works = [work_of((g.prefix, [p.sequences[i] for i in g.members]) for g in p.groups) for p in wanted]
        seen = works if wanted[-1].policy.trains_tower else images_once(works)
        for each, work in zip(wanted, seen, strict=True):
            flops = self._flops(each.policy, work, backward=each.trained, adapters=each.adapters)
            self._phases.add(each.phase, tokens=work.tokens, flops=flops)

    def sampled(self, policy: Policy, replies: Many[Sequence], n: int) -> None:
        """Sampling of these, of which each n share a prompt. Tokens are those of replies, which are trained, and count for their scores as
        well."""
        groups = (replies[start : start + n] for start in range(0, len(replies), n))
        work = work_of((int(group[0].trained.argmax()), group) for group in groups)
        self._phases.add("sample", tokens=work.predicted, flops=self._flops(policy, work, backward=False))
        self._phases.add("score", tokens=work.predicted)

    def _flops(self, policy: Policy, work: Work, *, backward: bool, adapters: bool = True) -> int:
        if not known(policy.base):
            return 0
        return self._least.setdefault(policy, Least(policy.base))(work, backward=backward, adapters=adapters)

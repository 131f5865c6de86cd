"""What the packed batches of some samples take: above the minimum, where a tree shares more than one common beginning a group."""

from collections.abc import Sequence as Many

from actial_fast.grpo import Sample
from actial_fast.model.flops import Work, work_of
from actial_fast.packing.batch import share


def packed_work(samples: Many[Sample], image_token: int) -> Work:
    """Of one pass over the samples."""
    sequences = [s.sequence for s in samples]
    return work_of((group.prefix, [sequences[i] for i in group.members]) for group in share(sequences, image_token))

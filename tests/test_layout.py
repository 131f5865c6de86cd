"""The packed layout: the extension against its twin, every sample as it would be alone, and rows that cannot be laid out."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actial_fast import native
from actial_fast.layout import Layout, Part, mrope_positions
from actial_fast.packing import Sequence, collate
from actial_fast.planning import Capacity
from tests.plans import SETTINGS, outcome, plan_of, same, without_extension

IMAGE, MERGE = 7, 2


@st.composite
def token_groups(draw):
    """Parts of whole groups, numbered in order: prefixes with images between texts, any suffixes, some sharing images."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    grids, parts, sample = {}, [], 0
    for g in range(draw(st.integers(1, 8))):
        keys = [int(k) for k in rng.integers(0, 6, rng.integers(0, 4))]
        for key in keys:
            grids.setdefault(key, (1, MERGE * int(rng.integers(1, 4)), MERGE * int(rng.integers(1, 4))))
        pieces = [rng.integers(10, 99, rng.integers(1, 4))]
        for key in keys:
            pieces += [np.full(math.prod(grids[key]) // MERGE**2, IMAGE), rng.integers(10, 99, rng.integers(0, 4))]
        ids = np.concatenate(pieces)
        suffixes = tuple((rng.integers(10, 99, n), rng.random(n) < 0.7) for n in rng.integers(1, 9, draw(st.integers(0, 4))))
        trained = rng.random(len(ids)) < draw(st.sampled_from([0.0, 0.4]))
        parts.append(Part(f"row {g}", ids, trained, None, suffixes, tuple(keys), tuple(grids[key] for key in keys), sample))
        sample += max(len(suffixes), 1)
    return parts


def positions_of(part: Part) -> np.ndarray:
    """M-RoPE positions by walking over the tokens, one at a time."""
    out, position, at = [], 0, 0
    grids = iter(part.grids)
    while at < len(part.ids):
        if part.ids[at] != IMAGE:
            out.append((position,) * 3)
            position, at = position + 1, at + 1
            continue
        frames, rows, cols = next(grids)
        rows, cols = rows // MERGE, cols // MERGE
        out += [(position + t, position + y, position + x) for t in range(frames) for y in range(rows) for x in range(cols)]
        position, at = position + max(rows, cols), at + frames * rows * cols
    return np.array(out).T


def lay(parts) -> Layout:
    return native.layout(parts, image_token=IMAGE, merge=MERGE)


def alone(part: Part) -> list[tuple[int, Sequence]]:
    """(number, sequence) of every sample of a part."""
    prefix = Sequence(part.ids, part.trained, positions_of(part))
    if not part.suffixes:
        return [(part.sample, prefix)]
    whole = [(prefix.extended(ids), trained) for ids, trained in part.suffixes]
    return [(part.sample + j, replace(s, trained=np.concatenate([part.trained, t]))) for j, (s, t) in enumerate(whole)]


def unpack(layout: Layout) -> dict[int, np.ndarray]:
    """The rows of each sample, in order: those of its prefix and of its suffix."""
    p, s, starts = layout.prefix_rows, layout.suffix_rows, layout.cu[:-1]
    groups = len(layout.cross_q) - 1
    rows = []
    for i, start in enumerate(starts):
        segment = np.arange(start, layout.cu[i + 1])
        if start < p:
            assert layout.cross_k[i] == start and layout.cross_k[i + 1] == layout.cu[i + 1]
        elif start < p + s:
            g = np.searchsorted(layout.cross_q, start - p, side="right") - 1
            assert layout.cu[i + 1] - p <= layout.cross_q[g + 1]
            rows.append(np.concatenate([np.arange(layout.cross_k[g], layout.cross_k[g + 1]), segment]))
        else:
            rows.append(segment)
    assert layout.cross_k[-1] == p and layout.cross_q[-1] == s and layout.cu[-1] == len(layout.input_ids) and layout.cu[groups] == p
    return dict(zip(layout.samples.tolist(), rows, strict=True))


@SETTINGS
@given(token_groups(), st.booleans())
def test_the_extension_lays_out_as_its_twin(parts, computed):
    if not computed:
        parts = [replace(part, positions=positions_of(part) + 3) for part in parts]
    same(lay(parts), without_extension(lambda: lay(parts)))


@SETTINGS
@given(token_groups(), st.integers(1, 3), st.integers(0, 40))
def test_every_sample_comes_back_as_it_would_be_alone(parts, ranks, slack):
    groups = [(len(p.ids), [len(ids) for ids, _ in p.suffixes], sum(map(math.prod, p.grids))) for p in parts]
    tokens = max(prefix + max(suffixes, default=0) for prefix, suffixes, _ in groups) + slack
    plan = plan_of(groups, capacity=Capacity(tokens, max(1, max(patches for *_, patches in groups)) + slack), ranks=ranks)
    wanted, found = {number: sequence for part in parts for number, sequence in alone(part)}, Counter()
    for pieces in (plan.micro_batch(r, i) for r in range(ranks) for i in range(plan.per_rank)):
        cut = [replace(parts[g], suffixes=parts[g].suffixes[a:b], sample=parts[g].sample + a) for g, a, b in pieces]
        layout = lay(cut)
        assert (layout.position_ids >= 0).all() and len(layout.input_ids) <= tokens
        features = {int(slot): int(row) for slot, row in zip(layout.image_slots, layout.image_rows, strict=True)}
        assert sorted(features) == np.flatnonzero(layout.input_ids == IMAGE).tolist()
        origin = [(key, t) for key in layout.images for t in range(tokens_of(parts, key))]
        owner_of_part = {number: part for part in cut for number, _ in alone(part)}
        for index, (number, rows) in enumerate(unpack(layout).items()):
            found[number] += 1
            sequence = wanted[number]
            np.testing.assert_array_equal(layout.input_ids[rows], sequence.ids)
            np.testing.assert_array_equal(layout.position_ids[:, rows], sequence.positions)
            expected, of = collate([sequence], pad=0), slice(*layout.cu_loss[index : index + 2])
            np.testing.assert_array_equal(layout.loss_rows[of], rows[expected.loss_rows.numpy()])
            np.testing.assert_array_equal(layout.targets[of], expected.targets.numpy())
            assert (layout.owner[of] == number).all()
            seen = [origin[features[int(row)]] for row in rows if layout.input_ids[row] == IMAGE]
            assert seen == [(key, t) for key in owner_of_part[number].images for t in range(tokens_of(parts, key))]
    assert found == Counter(dict.fromkeys(wanted, 1))


def tokens_of(parts, key) -> int:
    grid = next(grid for part in parts for k, grid in zip(part.images, part.grids, strict=True) if k == key)
    return math.prod(grid) // MERGE**2


def test_an_empty_micro_batch_has_no_rows():
    layout = lay([])
    same(layout, without_extension(lambda: lay([])))
    assert layout.position_ids.shape == (3, 0) and layout.cu.tolist() == layout.cu_loss.tolist() == [0]


def test_positions_continue_after_the_longer_side():
    positions = mrope_positions(9, [1], [(1, 2, 3)])
    np.testing.assert_array_equal(positions, [[0, 1, 1, 1, 1, 1, 1, 4, 5], [0, 1, 1, 1, 2, 2, 2, 4, 5], [0, 1, 2, 3, 1, 2, 3, 4, 5]])


def part_with(ids, suffixes=(), images=("a",), grids=((1, 4, 4),), **how) -> Part:
    ids = np.array(ids)
    return Part("train.jsonl:3", ids, np.zeros(len(ids), bool), None, suffixes, images, grids, **how)


def suffix(*ids: int) -> tuple[np.ndarray, np.ndarray]:
    return np.array(ids, np.int64), np.ones(len(ids), bool)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (part_with([1, 7, 7, 7, 2]), "3 image placeholder tokens, but its 1 images need 4; a row is never cut"),
        (part_with([1, 7, 7, 7, 7, 7]), "5 image placeholder tokens, but its 1 images need 4"),
        (
            part_with([1, 2], images=(), grids=(), suffixes=(suffix(5, 7),), sample=8),
            "sample 8 has an image placeholder token in its suffix",
        ),
        (part_with([1, 7, 7, 3, 7, 7]), "image 0 needs 4 adjacent placeholder tokens and has 2"),
        (part_with([7] * 7 + [1, 7], images=("a", "b"), grids=((1, 4, 4),) * 2), "image 1 needs 4 adjacent placeholder tokens and has 3"),
        (part_with([], images=(), grids=()), "no tokens"),
        (part_with([1, 2], images=(), grids=(), suffixes=(suffix(5), suffix()), sample=8), "sample 9 has an empty suffix"),
        (part_with([7] * 4, grids=((1, 4, 3),)), "a grid of 1 x 4 x 3 patches does not divide into squares of 2"),
        (part_with([7] * 4, images=()), "0 images, but 1 grids"),
        (
            part_with([7] * 4 + [1, 7, 7], images=("a", "a"), grids=((1, 4, 4), (1, 2, 4))),
            r"an image has a grid of \(1, 1, 2\) .* and \(1, 2, 2\) elsewhere",
        ),
    ],
)
def test_images_and_tokens_that_disagree_name_the_row(part, message):
    good = replace(part_with([1, 7, 7, 7, 7]), name="good", images=("other",))
    with pytest.raises(ValueError, match=f"^train.jsonl:3: {message}") as ours:
        lay([good, part])
    assert str(ours.value) == without_extension(lambda: outcome(lambda: lay([good, part])))


@pytest.mark.parametrize(
    "change", [{"trained": np.ones(4, bool)}, {"positions": np.zeros((3, 4), int)}, {"positions": np.zeros(15, int)}], ids=str
)
def test_arrays_of_another_length_are_refused(change):
    part = replace(part_with([1, 7, 7, 7, 7]), **change)
    message = f"{next(iter(change))}: expected the shape that goes with the number of ids"
    assert outcome(lambda: lay([part])) == without_extension(lambda: outcome(lambda: lay([part]))) == message

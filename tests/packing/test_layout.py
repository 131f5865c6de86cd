"""The packed layout: the extension against its twin, every sample as it would be alone, and rows that cannot be laid out."""

import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actial_fast.packing import native
from actial_fast.packing.batch import Sequence, collate
from actial_fast.packing.layout import Layout, Part, mrope_positions
from actial_fast.packing.planning import Capacity
from tests.packing.plans import SETTINGS, outcome, plan_of, same, without_extension

IMAGE, MERGE = 7, 2


@st.composite
def token_groups(draw):
    """Parts of whole groups, numbered in order: prefixes with images between texts, first or last, any suffixes, some sharing images."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    grids, parts, sample = {}, [], 0
    for g in range(draw(st.integers(1, 8))):
        keys = [int(k) for k in rng.integers(0, 6, rng.integers(0, 4))]
        for key in keys:
            grids.setdefault(key, (1, MERGE * int(rng.integers(1, 4)), MERGE * int(rng.integers(1, 4))))
        pieces = [rng.integers(10, 99, rng.integers(not keys, 4))]
        for key in keys:
            pieces += [np.full(math.prod(grids[key]) // MERGE**2, IMAGE), rng.integers(10, 99, rng.integers(0, 4))]
        ids = np.concatenate(pieces)
        longest = draw(st.sampled_from([1, 2, 8]))
        suffixes = tuple((rng.integers(10, 99, n), rng.random(n) < 0.7) for n in rng.integers(1, longest + 1, draw(st.integers(0, 4))))
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


def unpack(layout: Layout, parts) -> dict[int, np.ndarray]:
    """The rows of each sample, in order: those of its prefix and of its suffix. Walks the segments, each of which must be there."""
    crossed = [part for part in parts if any(len(ids) > 1 for ids, _ in part.suffixes)]
    others = [part for part in parts if not any(len(ids) > 1 for ids, _ in part.suffixes)]
    segments = iter([np.arange(a, b) for a, b in pairwise(layout.cu.tolist())])
    prefixes, rows = [next(segments) for _ in crossed], {}
    for part, prefix in zip(crossed, prefixes, strict=True):
        assert len(prefix) == len(part.ids)
        for j, (ids, _) in enumerate(part.suffixes):
            own = next(segments) if len(ids) > 1 else prefix[:0]
            assert len(own) == len(ids) - 1
            rows[part.sample + j] = np.concatenate([prefix, own])
    for part in others:
        prefix = next(segments)
        whole = part.suffixes or len(part.ids) == 1 or part.ids[-1] == IMAGE
        assert len(prefix) == len(part.ids) - (not whole)
        rows |= {part.sample + j: prefix for j in range(max(len(part.suffixes), 1))}
    assert next(segments, None) is None and layout.cu[-1] == len(layout.input_ids) and (np.diff(layout.cu) > 0).all()

    own = [sum(len(ids) - 1 for ids, _ in part.suffixes) for part in crossed]
    assert (layout.prefix_rows, layout.suffix_rows) == (sum(map(len, prefixes)), sum(own))
    np.testing.assert_array_equal(layout.cross_k, layout.cu[: len(crossed) + 1])
    np.testing.assert_array_equal(layout.cross_q, np.cumsum([0, *own]))
    assert list(rows) == layout.samples.tolist()
    return rows


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
        assert len(layout.input_ids) <= tokens
        features = {int(slot): int(row) for slot, row in zip(layout.image_slots, layout.image_rows, strict=True)}
        assert layout.image_slots.tolist() == np.flatnonzero(layout.input_ids == IMAGE).tolist()
        origin = [(key, t) for key in layout.images for t in range(tokens_of(parts, key))]
        owner_of_part = {number: part for part in cut for number, _ in alone(part)}
        for index, (number, rows) in enumerate(unpack(layout, cut).items()):
            found[number] += 1
            sequence = wanted[number]
            np.testing.assert_array_equal(layout.input_ids[rows], sequence.ids[: len(rows)])
            np.testing.assert_array_equal(layout.position_ids[:, rows], sequence.positions[:, : len(rows)])
            expected, of = collate([sequence], pad=0, store=None), slice(*layout.cu_loss[index : index + 2])
            np.testing.assert_array_equal(layout.loss_rows[of], rows[expected.loss_rows.numpy()])
            np.testing.assert_array_equal(layout.targets[of], expected.targets.numpy())
            assert (layout.owner[of] == number).all()
            seen = [origin[features[int(row)]] for row in rows if layout.input_ids[row] == IMAGE]
            assert seen == [(key, t) for key in owner_of_part[number].images for t in range(tokens_of(parts, key))]
    assert found == Counter(dict.fromkeys(wanted, 1))


@SETTINGS
@given(token_groups())
def test_every_token_comes_back_from_rows_and_targets(parts):
    parts = [replace(p, trained=p.trained | True, suffixes=tuple((ids, t | True) for ids, t in p.suffixes)) for p in parts]
    layout, wanted = lay(parts), {number: sequence for part in parts for number, sequence in alone(part)}
    for number, (begin, end) in zip(layout.samples.tolist(), pairwise(layout.cu_loss), strict=True):
        rows, ids = layout.loss_rows[begin:end], wanted.pop(number).ids
        np.testing.assert_array_equal(layout.targets[begin:end], ids[1:])
        np.testing.assert_array_equal(layout.input_ids[rows], ids[:-1])
    assert not wanted


def test_tokens_that_predict_nothing_have_no_row():
    """Every shape in one micro-batch, row by row."""

    def text(first: int, length: int) -> np.ndarray:
        return np.arange(first, first + length)

    def group(name, ids, lengths, sample, **images) -> Part:
        suffixes = tuple((text(10 * (sample + j), n), np.ones(n, bool)) for j, n in enumerate(lengths))
        return Part(name, np.array(ids), np.ones(len(ids), bool), None, suffixes, sample=sample, **images)

    image = {"images": ("a",), "grids": ((1, 2, 4),)}
    parts = [
        group("plain", [501, 502, 503], [], 1),
        group("all of one token", [511, 512], [1, 1], 2),
        group("some of one token", [521, 522], [3, 1, 2], 4),
        group("one token", [531], [], 7),
        group("image last", [541, IMAGE, IMAGE], [], 8, **image),
        group("image last in a prefix", [551, IMAGE, IMAGE], [2], 9, **image),
        group("image before the last", [IMAGE, IMAGE, 561], [], 10, **image),
    ]
    made = lay(parts)
    assert made.input_ids.tolist() == [521, 522, 551, 7, 7, 40, 41, 60, 90, 501, 502, 511, 512, 531, 541, 7, 7, 7, 7]
    assert made.cu.tolist() == [0, 2, 5, 7, 8, 9, 11, 13, 14, 17, 19]
    assert (made.prefix_rows, made.suffix_rows, made.cross_k.tolist(), made.cross_q.tolist()) == (5, 4, [0, 2, 5], [0, 3, 4])
    width = [0, 1, 0, 1, 2, 2, 3, 2, 3, 0, 1, 0, 1, 0, 0, 1, 2, 0, 1]
    assert made.position_ids[2].tolist() == width
    assert (made.image_slots.tolist(), made.image_rows.tolist()) == ([3, 4, 15, 16, 17, 18], [0, 1] * 3)
    assert made.samples.tolist() == [4, 5, 6, 9, 1, 2, 3, 7, 8, 10]
    assert made.cu_loss.tolist() == [0, 4, 6, 9, 13, 15, 17, 19, 19, 21, 23]
    assert made.loss_rows.tolist() == [0, 1, 5, 6, 0, 1, 0, 1, 7, 2, 3, 4, 8, 9, 10, 11, 12, 11, 12, 14, 15, 17, 18]
    assert made.targets.tolist() == [522, 40, 41, 42, 522, 50, 522, 60, 61, 7, 7, 90, 91, 502, 503, 512, 20, 512, 30, 7, 7, 7, 561]
    assert made.owner.tolist() == np.repeat(made.samples, np.diff(made.cu_loss)).tolist()
    same(made, without_extension(lambda: lay(parts)))


@pytest.mark.parametrize("lengths", [(1,), (1, 1, 1)], ids=str)
def test_without_suffix_rows_there_is_no_cross_attention(lengths):
    made = lay([Part("row", np.array([1, 2, 3]), np.zeros(3, bool), None, tuple(suffix(*[4] * n) for n in lengths))])
    assert (made.prefix_rows, made.suffix_rows, made.cross_q.tolist(), made.cross_k.tolist()) == (0, 0, [0], [0])
    assert (made.cu.tolist(), made.loss_rows.tolist(), made.targets.tolist()) == ([0, 3], [2] * len(lengths), [4] * len(lengths))


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

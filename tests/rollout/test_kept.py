"""Replies that outlive their run: what was drawn is read back to the last bit, and drawn no second time."""

import numpy as np
import pytest
import torch

from actial_fast.data.sources.stream import Stream
from actial_fast.model.policy import load_policy
from actial_fast.model.processor import Processor
from actial_fast.rollout.decoder import Decoder
from actial_fast.rollout.kept import Kept
from actial_fast.rollout.protocol import Reply
from tests.loops import generate, sampled


def replies(seed: int, n: int = 3) -> list[Reply]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 6, n)
    return [Reply(rng.integers(0, 99, k), rng.normal(size=k).astype(np.float32), bool(rng.integers(2))) for k in lengths]


def same(a: list[Reply], b: list[Reply]) -> bool:
    return all(
        np.array_equal(x.ids, y.ids) and np.array_equal(x.logprobs, y.logprobs) and x.finished == y.finished
        for x, y in zip(a, b, strict=True)
    )


def test_what_was_kept_is_read_back(tmp_path):
    kept = Kept(tmp_path, "d1").at(7)
    groups = {position: replies(position) for position in (12, 5, 8)}
    kept.add({12: groups[12], 5: groups[5]})
    kept.add({8: groups[8]})
    found = Kept(tmp_path, "d1").at(7).load([5, 8, 12, 99], 3)
    assert found.keys() == {5, 8, 12} and all(same(found[p], groups[p]) for p in found)
    assert Kept(tmp_path, "d1").at(7).load([8], 3).keys() == {8} and not Kept(tmp_path, "d1").at(7).load([8], 4), (
        "another number of replies"
    )
    kept.forget()
    assert not kept.load([5], 3)


@pytest.mark.parametrize(("digest", "step"), [("d2", 7), ("d1", 8)])
def test_replies_of_other_weights_go(digest, step, tmp_path):
    Kept(tmp_path, "d1").at(7).add({5: replies(5)})
    Kept(tmp_path, "d1").forget([7])
    other = Kept(tmp_path, digest).at(step)
    assert not other.load([5], 3) and Kept(tmp_path, "d1").at(7).load([5], 3)
    other.forget([step])
    assert not Kept(tmp_path, "d1").at(7).load([5], 3), "they are not there for the next either"


def test_a_torn_file_is_drawn_again(tmp_path):
    kept = Kept(tmp_path, "d1").at(7)
    kept.add({5: replies(5)})
    (file,) = kept.folder.iterdir()
    file.write_bytes(file.read_bytes()[:50])
    kept.add({8: replies(8)})
    assert kept.load([5, 8], 3).keys() == {8}


def test_a_disk_that_takes_nothing_is_named(tmp_path):
    (tmp_path / "replies").write_text("no folder")
    kept = Kept(tmp_path, "d1").at(7)
    with pytest.raises(ValueError, match=r"cannot keep replies .*free space"):
        kept.add({5: replies(5)})


@pytest.fixture
def setup(lab, grpo_recipe):
    processor = Processor.load(str(lab.model))
    policy = load_policy(grpo_recipe.model, torch.device("cpu"), 0, packed=True)
    examples = Stream(grpo_recipe.data.sources, seed=0, workers=0, encode=processor.encode_prompt).next_batch(5)
    return policy, processor, examples


def draw(setup, **more):
    policy, processor, examples = setup
    keys = [(0, e.position) for e in examples]
    return generate(policy, processor, [e.encoded for e in examples], 3, keys=keys, max_new_tokens=60, **more)


def test_only_the_rest_is_drawn_and_it_is_what_it_would_have_been(setup, monkeypatch):
    groups: dict[int, list[Reply]] = {}
    whole = draw(setup, drawn=groups.update)
    assert sorted(groups) == list(range(5)) and all(groups[i] is whole[i] for i in range(5))
    read = []
    plain = Decoder.read
    monkeypatch.setattr(Decoder, "read", lambda self, sequences, *a: read.extend(map(len, sequences)) or plain(self, sequences, *a))
    again = draw(setup, have={i: groups[i] for i in (0, 3)})
    assert len(read) == 3, "a prompt whose replies are there was read again"
    for a, b in zip(again, whole, strict=True):
        assert [r.ids.tolist() for r in a] == [r.ids.tolist() for r in b]
        for one, other in zip(a, b, strict=True):  # another number of rows rounds otherwise
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
    assert again[0] is groups[0] and again[3] is groups[3]


def test_nothing_is_drawn_once_a_stop_is_asked(setup):
    groups: dict[int, list[Reply]] = {}
    setup[1].__dict__["stop_tokens"] = tuple(range(0, 300, 10))  # so that replies have many lengths
    lengths = [max(len(r.ids) for r in group) for group in draw(setup)]
    assert max(lengths) > min(lengths), "every prompt ends together: nothing would be left"
    asked = iter([False] * min(lengths) + [True] * 99)
    found = draw(setup, drawn=groups.update, asked=lambda: next(asked))
    assert 0 < len(groups) < 5 and [bool(group) for group in found] == [i in groups for i in range(5)]


def test_a_step_takes_what_an_interrupted_one_has_drawn(setup, grpo_recipe, tmp_path, monkeypatch):
    policy, processor, examples = setup
    kept = Kept(tmp_path, "d")
    first = sampled(policy, processor, examples, grpo_recipe, kept)
    monkeypatch.setattr(Decoder, "step", lambda *a: pytest.fail("drawn again"))
    second = sampled(policy, processor, examples, grpo_recipe, Kept(tmp_path, "d"))
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a.sequence.ids, b.sequence.ids) and np.array_equal(a.sampled, b.sampled)
        assert (a.text, a.advantage, a.reward, a.finished) == (b.text, b.advantage, b.reward, b.finished)

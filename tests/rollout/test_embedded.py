"""The embedded sampler against the trainer's own forward pass and against transformers' generate."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from actial_fast.model.attention import is_packed
from actial_fast.model.policy import load_policy
from actial_fast.model.processor import Processor
from actial_fast.model.trunk import Trunk
from actial_fast.ops.reference import linear_logprob
from actial_fast.packing import native
from actial_fast.packing.batch import collate
from actial_fast.rollout import embedded, graphs
from actial_fast.rollout.decoder import Decoder, draw
from actial_fast.rollout.graphs import Graphs
from actial_fast.rollout.schedule import Schedule
from actial_fast.settings.model import LoRAConfig, ModelConfig
from tests.loops import generate

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def setup(lab):
    policy = load_policy(ModelConfig(path=str(lab.model)), CPU, seed=0, packed=True)
    return policy, Processor.load(str(lab.model), max_pixels=28 * 28 * 16)


@pytest.fixture
def prompts(setup, example):
    rows = [
        example("<image><image>How did it move?", sizes=[(28, 28), (56, 28)], seed=1),
        example("short", seed=2),
        example("<image>A question that is spelt in bytes, and so is long?", sizes=[(84, 56)], seed=3),
    ]
    return [setup[1].encode_prompt(row) for row in rows]


KEYS = [(0, 1), (0, 2), (0, 3)]


def trainer_logprobs(policy, processor, prompt, reply):
    batch = collate([prompt.extended(reply.ids)], processor.pad, processor.store)
    with torch.no_grad():
        return policy(
            {**batch.model_inputs(), "use_cache": False},
            lambda out, head: linear_logprob(out.last_hidden_state.flatten(0, 1)[batch.loss_rows], head, batch.targets)[0],
        ).numpy()


def test_logprobs_are_the_trainers(setup, prompts):
    """Left-padded prefill, expanded cache, compaction and decoding give what one plain forward pass gives."""
    policy, processor = setup
    for prompt, group in zip(prompts, generate(policy, processor, prompts, 6, keys=KEYS, max_new_tokens=24), strict=True):
        for reply in group:
            np.testing.assert_allclose(reply.logprobs, trainer_logprobs(policy, processor, prompt, reply), atol=2e-5)


@pytest.mark.parametrize("how", ["all", "base under adapters"])
def test_weights_of_16_bits_draw_on_a_cpu_what_the_trainer_sees(lab, prompts, setup, how):
    adapters = {"frozen_dtype": "bfloat16", "lora": LoRAConfig(rank=4)}
    settings = ModelConfig(path=str(lab.model), **({"dtype": "bfloat16"} if how == "all" else adapters))
    policy, processor = load_policy(settings, CPU, seed=0, packed=True), setup[1]
    assert policy.hidden_dtype == torch.bfloat16
    for prompt, group in zip(prompts, generate(policy, processor, prompts, 2, keys=KEYS, max_new_tokens=8), strict=True):
        for reply in group:
            np.testing.assert_allclose(reply.logprobs, trainer_logprobs(policy, processor, prompt, reply), atol=0.1)


def test_greedy_equals_transformers_generate(setup, prompts):
    policy, processor = setup
    for prompt, (reply,) in zip(prompts, generate(policy, processor, prompts, 1, temperature=0, max_new_tokens=16), strict=True):
        batch = collate([prompt], processor.pad, processor.store)
        images = {name: batch.model_inputs()[name] for name in ("pixel_values", "image_grid_thw")} if prompt.images else {}
        theirs = policy.base.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            mm_token_type_ids=(batch.input_ids == processor.image_token).int(),
            **images,
            do_sample=False,
            max_new_tokens=16,
            suppress_tokens=list(processor.never_sampled(policy.base.lm_head.weight.shape[0])),
            eos_token_id=list(processor.stop_tokens),
        )
        assert theirs[0, len(prompt) :].tolist() == reply.ids.tolist()


def test_replies_do_not_depend_on_the_batch(setup, prompts):
    policy, processor = setup
    together = generate(policy, processor, prompts, 3, keys=KEYS, max_new_tokens=12)
    apart = [generate(policy, processor, [p], 3, keys=[k], max_new_tokens=12)[0] for p, k in zip(prompts, KEYS, strict=True)]
    assert [[r.ids.tolist() for r in g] for g in together] == [[r.ids.tolist() for r in g] for g in apart]


def ids(groups):
    return [[r.ids.tolist() for r in group] for group in groups]


def test_replies_do_not_depend_on_the_budget_nor_on_the_places(setup, prompts, monkeypatch):
    """Replies leave and come back, prompts are read again, and places are few; log-probs differ by rounding alone."""
    policy, processor = setup
    ample = generate(policy, processor, prompts, 6, keys=KEYS, max_new_tokens=40)
    longest = max(map(len, prompts))
    left = []
    grow = Schedule.grow
    monkeypatch.setattr(Schedule, "grow", lambda self: left.append(grow(self)) or left[-1])
    tight = generate(policy, processor, prompts, 6, keys=KEYS, max_new_tokens=40, kv_tokens=16 * (-(-longest // 16) + 6))
    assert sum(map(len, left)) > 0, "the budget was not tight"
    monkeypatch.setattr(embedded, "MOST_ROWS", 4)
    few = generate(policy, processor, prompts, 6, keys=KEYS, max_new_tokens=40)
    for other in (tight, few):
        assert ids(other) == ids(ample)
        for a, b in zip((r for g in other for r in g), (r for g in ample for r in g), strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=2e-5)
            assert a.finished == b.finished


def counted(monkeypatch, name, rows):
    """The rows of each call of the trunk's method are appended to `rows`."""
    plain = getattr(Trunk, name)
    monkeypatch.setattr(Trunk, name, lambda self, embeds, *a: rows.append(len(embeds)) or plain(self, embeds, *a))


def test_a_prompt_is_read_once_and_an_image_seen_once(setup, prompts, monkeypatch):
    """Prompts are packed, not padded, and two that show the same image share it."""
    policy, processor = setup
    rows, images = [], []
    for name in ("read", "step"):
        counted(monkeypatch, name, rows)
    seen = policy.forward
    monkeypatch.setattr(policy, "forward", lambda inputs, *a: images.append(len(inputs.pixels.grids)) or seen(inputs, *a))
    again = [*prompts, prompts[0]]
    generate(policy, processor, again, 3, keys=[*KEYS, (0, 4)], max_new_tokens=1)
    assert rows == [sum(len(p) - 1 for p in again), len(again)]  # the replies to a prompt begin alike
    assert images == [len({key for p in again for key in p.images})]


@pytest.mark.parametrize("places", [embedded.MOST_ROWS, 5])
@pytest.mark.parametrize("extension", [True, False], ids=["extension", "twin"])
def test_replies_that_are_the_same_so_far_are_computed_once(setup, prompts, monkeypatch, extension, places):
    """As many rows as there are different beginnings, with the trainer's log-probs; those that begin later do not join."""
    policy, processor = setup
    monkeypatch.setattr(native, "AVAILABLE", extension)
    monkeypatch.setattr(embedded, "MOST_ROWS", places)
    weight, rows = policy.base.lm_head.weight, []
    counted(monkeypatch, "step", rows)
    before = weight.detach().clone()
    with torch.no_grad():
        weight *= 15  # so that some replies part early, some late and some never
    try:
        groups = generate(policy, processor, prompts, 12, keys=KEYS, max_new_tokens=20)
        for prompt, group in zip(prompts, groups, strict=True):
            for reply in group:
                np.testing.assert_allclose(reply.logprobs, trainer_logprobs(policy, processor, prompt, reply), atol=2e-4)
    finally:
        with torch.no_grad():
            weight.copy_(before)
    tokens = sum(len(reply.ids) for group in groups for reply in group)
    beginnings = sum(len({tuple(r.ids[:k]) for r in group if len(r.ids) > k}) for group in groups for k in range(20))
    assert beginnings < 0.9 * tokens
    if places == 5:
        assert beginnings <= sum(rows) < tokens
    else:
        assert sum(rows) == beginnings


def test_adapters_draw_what_the_trainer_sees(lab, prompts, setup):
    policy = load_policy(ModelConfig(path=str(lab.model), lora=LoRAConfig(rank=4)), CPU, seed=0, packed=True)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    for prompt, group in zip(prompts, generate(policy, setup[1], prompts, 4, keys=KEYS, max_new_tokens=12), strict=True):
        for reply in group:
            np.testing.assert_allclose(reply.logprobs, trainer_logprobs(policy, setup[1], prompt, reply), atol=2e-5)


class Replayed(Graphs):
    """Graphs without a GPU: a replay runs the step anew on the tensors that were recorded."""

    replays = 0

    def _recorded(self, inputs):
        outputs = self._run(*inputs)

        def replay():
            type(self).replays += 1
            for held, new in zip(outputs, self._run(*inputs), strict=True):
                held.copy_(new)

        return SimpleNamespace(replay=replay), inputs, outputs


@pytest.mark.parametrize("extension", [True, False], ids=["extension", "twin"])
def test_replayed_graphs_draw_what_plain_steps_draw(setup, prompts, monkeypatch, extension):
    """Rows are filled up to a graph's number, prompts and blocks to their most; nothing of a step before is left in the next. The C++
    extension and its twin reply alike."""
    policy, processor = setup
    monkeypatch.setitem(processor.__dict__, "stop_tokens", tuple(range(0, 300, 12)))  # so that prompts have fewer and fewer rows
    plain = generate(policy, processor, prompts, 7, keys=KEYS, max_new_tokens=30)
    monkeypatch.setattr(native, "AVAILABLE", extension)
    monkeypatch.setattr(Replayed, "replays", 0)
    made = Decoder.__init__

    def recording(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self._graphs = Replayed(self._step)

    monkeypatch.setattr(graphs, "ASKED", 2)
    monkeypatch.setattr(Decoder, "__init__", recording)
    found = generate(policy, processor, prompts, 7, keys=KEYS, max_new_tokens=30)
    assert Replayed.replays > 5 and ids(found) == ids(plain)
    for a, b in zip((r for g in found for r in g), (r for g in plain for r in g), strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=2e-5)


def test_a_group_that_is_dropped_is_not_drawn_any_further(setup, prompts):
    policy, processor = setup
    whole = generate(policy, processor, prompts, 2, keys=KEYS, max_new_tokens=12)
    looked = []

    def dropped(index):
        looked.append(index)
        return index == 1 and len(looked) > 9

    found = generate(policy, processor, prompts, 2, keys=KEYS, max_new_tokens=12, dropped=dropped)
    assert found[1] == [] and [ids(found)[i] for i in (0, 2)] == [ids(whole)[i] for i in (0, 2)]


def test_a_group_that_is_dropped_while_it_waits_is_never_read(setup, prompts, monkeypatch):
    policy, processor = setup
    whole = generate(policy, processor, prompts, 2, keys=KEYS, max_new_tokens=12)
    read = []
    plain = Decoder.read
    monkeypatch.setattr(Decoder, "read", lambda self, sequences, *a: read.extend(map(len, sequences)) or plain(self, sequences, *a))
    monkeypatch.setattr(embedded, "MOST_ROWS", 2)  # one prompt after the other
    for temperature in (1.0, 0.0):
        read.clear()
        found = generate(
            policy, processor, prompts, 2, keys=KEYS, temperature=temperature, max_new_tokens=12, dropped=lambda index: index == 1
        )
        assert read == [len(prompts[0]) - 1, len(prompts[2]) - 1] and found[1] == [] and all(found[::2])
        if temperature:
            assert [ids(found)[i] for i in (0, 2)] == [ids(whole)[i] for i in (0, 2)]


def test_ids_that_no_tokenizer_knows_are_never_drawn(setup, prompts):
    policy, processor = setup
    weight = policy.base.lm_head.weight
    known = len(processor.tokenizer)
    assert weight.shape[0] > known
    before = weight.detach().clone()
    with torch.no_grad():
        weight[known:] *= 50  # half of them loved
    try:
        replies = generate(policy, processor, prompts, 8, keys=KEYS, max_new_tokens=20)
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert max(r.ids.max() for g in replies for r in g) < known


def test_a_model_that_was_loaded_for_padded_batches_stays_as_it_was(lab, prompts, setup):
    policy = load_policy(ModelConfig(path=str(lab.model)), CPU, seed=0)
    assert not is_packed(policy.base)
    there, here = (generate(p, setup[1], prompts, 2, keys=KEYS, max_new_tokens=6) for p in (policy, setup[0]))
    assert ids(there) == ids(here) and not is_packed(policy.base)


def test_keys_decide_the_replies(setup, prompts):
    policy, processor = setup
    one, same, other = (
        [r.ids.tolist() for r in generate(policy, processor, prompts[:1], 4, keys=[k], max_new_tokens=12)[0]] for k in ((1,), (1,), (2,))
    )
    assert one == same != other
    assert len({tuple(ids) for ids in one}) > 1, "the replies of a group are all the same"


def test_vision_tokens_are_never_sampled(setup):
    """Even where the model wants nothing else."""
    _, processor = setup
    banned = torch.tensor(processor.banned_tokens)
    logits = torch.full((64, len(processor.tokenizer)), -20.0)
    logits[:, banned] = 20.0
    for uniform in (None, torch.linspace(0, 1 - 1e-12, 64, dtype=torch.float64)):
        token, _ = draw(logits, uniform, 1.0, banned)
        assert not torch.isin(token, banned).any()


def test_sampling_follows_the_distribution():
    torch.manual_seed(0)
    logits = torch.randn(1, 12)
    uniform = torch.rand(40_000, dtype=torch.float64)
    token, logp = draw(logits.expand(len(uniform), -1), uniform, 0.7, torch.tensor([3]))
    expected = (logits[0] / 0.7).softmax(0)
    expected[3] = 0
    expected /= expected.sum()
    observed = token.bincount(minlength=12) / len(uniform)
    assert (observed - expected).abs().max() < 0.01
    # the log-prob kept is the trainer's: over the whole vocabulary
    assert torch.allclose(logp, (logits[0] / 0.7).log_softmax(0)[token], atol=1e-6)


def test_a_reply_ends_with_its_stop_token_or_at_the_limit(setup, prompts):
    policy, processor = setup
    with torch.no_grad():  # a head that likes to stop
        weight = policy.base.lm_head.weight
        before = weight.clone()
        weight *= 0.01
    try:
        replies = [r for g in generate(policy, processor, prompts, 32, keys=KEYS, max_new_tokens=60) for r in g]
    finally:
        with torch.no_grad():
            weight.copy_(before)
    stopped = [r for r in replies if r.finished]
    assert stopped and len(stopped) < len(replies)
    for reply in replies:
        ends = np.isin(reply.ids, processor.stop_tokens)
        assert ends[:-1].sum() == 0 and ends[-1] == reply.finished
        assert len(reply.ids) == len(reply.logprobs) and (reply.finished or len(reply.ids) == 60)


def test_the_mode_of_the_policy_is_kept(setup, prompts):
    policy, processor = setup
    policy.train()
    generate(policy, processor, prompts[:1], 1, temperature=0, max_new_tokens=2)
    assert policy.training


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_replies_on_a_gpu_from_graphs_and_without(lab, example, monkeypatch):
    """Log-probs are the trainer's within bf16's rounding, and those of recorded steps the same as of plain ones."""
    device = torch.device("cuda", 0)
    policy = load_policy(ModelConfig(path=str(lab.model)), device, seed=0, packed=True)
    processor = Processor.load(str(lab.model), max_pixels=28 * 28 * 16)
    prompts = [processor.encode_prompt(example("<image>Which way did it move?", sizes=[(56, 28)], seed=k)) for k in range(5)]
    keys = [(0, k) for k in range(5)]
    found = {}
    for asked in (10**9, 2):
        monkeypatch.setattr(graphs, "ASKED", asked)
        found[asked] = generate(policy, processor, prompts, 8, keys=keys, max_new_tokens=40)
    assert ids(found[2]) == ids(found[10**9])
    for prompt, group in zip(prompts, found[2], strict=True):
        for reply in group:
            whole = collate([prompt.extended(reply.ids)], processor.pad, processor.store).to(device)
            with torch.no_grad():
                own = policy(whole, lambda hidden, head, b=whole: linear_logprob(hidden, head, b.targets)[0])
            np.testing.assert_allclose(reply.logprobs, own.float().cpu().numpy()[-len(reply.ids) :], atol=0.1)

"""Replies in turns: what is drawn, trained and scored is what one conversation at a time gives, in both loops and every engine of ids."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from actial_fast import grpo, sft
from actial_fast.data.sources.row import Row, Turn
from actial_fast.data.sources.source import SourceConfig
from actial_fast.data.sources.stream import Example
from actial_fast.data.sources.task import Observation, Task, Transcript, replies_of
from actial_fast.evaluation.evaluate import evaluate
from actial_fast.model.policy import load_policy
from actial_fast.model.processor import Processor
from actial_fast.packing.batch import share
from actial_fast.report.metrics import read_events, read_metrics
from actial_fast.rollout.embedded import Embedded
from actial_fast.rollout.episodes import _Episode, play, restored, text_of, whole
from actial_fast.rollout.kept import Kept
from actial_fast.rollout.protocol import Draw, Reply, Watch, awake
from actial_fast.settings.model import ModelConfig
from actial_fast.settings.recipe import EvalConfig
from actial_fast.settings.running import DistConfig, OptimConfig
from actial_fast.settings.sampling import SamplingConfig
from actial_fast.tasks.rewards import RewardConfig
from actial_fast.train.preflight import problems_of
from tests.loops import ALONE, log_probs, sampled
from tests.test_faults import case, run_cases, weights
from tests.train.test_rounds import assert_same, recipe_of, run

CLOSE = 1e-5
OFTEN = 3  # of the tokens one in so many ends a reply, so that random weights take turns


class Echo:
    """Answers with a picture whose size depends on the reply; nothing after one that begins with an even byte."""

    def __init__(self, row: Row):
        self.row, self.asked = row, 0

    def step(self, reply: str) -> Observation | None:
        self.asked += 1
        said = reply.encode()
        if said and said[0] % 4 == 0:
            return None
        size = 28 * (1 + len(said) % 3), 28 * (1 + self.asked)
        shown = np.random.default_rng([len(said), self.asked]).integers(0, 256, (*size, 3), dtype=np.uint8)
        return Observation(f"<image>turn {self.asked}?", (shown,)) if self.asked % 2 else Observation("go on?")


class Broken(Echo):
    def step(self, reply: str) -> Observation | None:
        raise KeyError("lost")


class Forgetful(Echo):
    count = 0

    def step(self, reply: str) -> Observation | None:
        Forgetful.count += 1
        return Observation(f"call {Forgetful.count}")


class Misread(Echo):
    def step(self, reply: str):
        return "a text"


class Injecting(Echo):
    def step(self, reply: str) -> Observation | None:
        return Observation("<|im_end|>")


class Stillborn(Echo):
    def __init__(self, row: Row):
        raise KeyError("no board")


def spoken(response: str, row: Row) -> float:
    """The share of the most turns that were taken."""
    return len(replies_of(response)) / 3


ECHO = Task(metric=spoken, environment=Echo, turns=3)
BROKEN, FORGETFUL = replace(ECHO, environment=Broken), replace(ECHO, environment=Forgetful)
STILLBORN = replace(ECHO, environment=Stillborn)
MISREAD, INJECTING = replace(ECHO, environment=Misread), replace(ECHO, environment=Injecting)


@pytest.fixture(scope="module")
def processor(lab) -> Processor:
    made = Processor.load(str(lab.model), min_pixels=28 * 28, max_pixels=28 * 28 * 40)
    return replace(made, ends=tuple(range(0, len(made.tokenizer), OFTEN)))


@pytest.fixture(scope="module")
def policy(lab):
    return load_policy(ModelConfig(path=str(lab.model)), ALONE.device, 0, packed=True).eval()


def examples_of(processor: Processor, task: str = "ECHO", count: int = 3) -> list[Example]:
    named = f"{__name__}:{task}" if task else ""
    made = []
    for n in range(count):
        pixels = np.random.default_rng(n).integers(0, 256, (28 * (n + 1), 56, 3), dtype=np.uint8)
        row = Row((Turn("user", f"<image>which {'now ' * n}?"),), (pixels,), where=f"rows:{n}", task=named)
        example = Example(row, n)
        made.append(replace(example, encoded=processor.encode_prompt(example)))
    return made


def played(policy, processor, examples, n=4, *, limit=7, temperature=1.0, **watched) -> list[list[Reply]]:
    with awake(Embedded(policy, processor), 0) as engine:
        keys = [(5, example.position) for example in examples]
        return play(engine, processor, examples, Draw(n, temperature, limit), keys, Watch(**watched))


@pytest.fixture(scope="module")
def groups(policy, processor):
    made = played(policy, processor, examples_of(processor))
    taken = [len(reply.turns) for group in made for reply in group]
    assert {1, 2, 3} == set(taken) and sum(bool(reply.images) for group in made for reply in group) > 2, taken
    return made


def sequences_of(processor, examples, groups):
    return [whole(e.encoded, reply, processor) for e, group in zip(examples, groups, strict=True) for reply in group]


def test_what_is_between_turns_is_what_training_reads(processor):
    """A conversation played with an environment and the same as a row for SFT: equal tokens, positions, pictures, and what is trained."""
    pictures = [np.random.default_rng(k).integers(0, 256, (28, 28 * (k + 1), 3), dtype=np.uint8) for k in range(2)]
    turns = (Turn("user", "<image>which?"), Turn("assistant", "A"), Turn("user", "<image>and now?"), Turn("assistant", "done"))
    row = processor.encode(Example(Row(turns, tuple(pictures), where="row"), 0))
    prompt = processor.encode_prompt(Example(Row(turns[:1], tuple(pictures[:1]), where="row"), 0))
    heard, keys = processor.heard("<image>and now?", (pictures[1],), "row")
    own = [np.array([*processor._tokens(text), processor.eos]) for text in ("A", "done")]
    ids = np.concatenate([own[0], heard, own[1]])
    mask = np.concatenate([np.ones(len(own[0]), bool), np.zeros(len(heard), bool), np.ones(len(own[1]), bool)])
    made = whole(prompt, Reply(ids, np.zeros(len(ids), np.float32), True, own=mask, images=keys), processor)
    assert made.images == row.images and made.grids == row.grids
    for name in ("ids", "trained", "positions"):
        assert np.array_equal(getattr(made, name), getattr(row, name)), name


def test_samplers_and_passes_agree_with_one_conversation_at_a_time(policy, processor, groups, lab):
    examples = examples_of(processor)
    sequences = sequences_of(processor, examples, groups)
    replies = [reply for group in groups for reply in group]
    packed = log_probs(policy, processor, sequences, recipe_of(lab))
    plain = load_policy(ModelConfig(path=str(lab.model)), ALONE.device, 0).eval()
    for sequence, reply, ours in zip(sequences, replies, packed, strict=True):
        assert sequence.trained.sum() == reply.drawn == len(ours) == reply.own.sum()
        (alone,) = log_probs(plain, processor, [sequence], recipe_of(lab, packing="plain", micro_batch=1))
        np.testing.assert_allclose(ours, alone, atol=CLOSE)
        np.testing.assert_allclose(reply.logprobs[reply.own], alone, atol=CLOSE)
        assert not reply.logprobs[~reply.own].any()


def test_positions_are_transformers_own(processor, groups, policy):
    example = examples_of(processor)[0]
    for reply in groups[0]:
        made = whole(example.encoded, reply, processor)
        kinds = torch.from_numpy((made.ids == processor.image_token).astype(np.int64))[None]
        theirs, _ = policy.base.model.get_rope_index(torch.from_numpy(made.ids)[None], kinds, image_grid_thw=torch.tensor(made.grids))
        assert np.array_equal(theirs[:, 0].numpy(), made.positions)


def samples_of(processor, groups, seed=0) -> list[grpo.Sample]:
    rng, examples, out = np.random.default_rng(seed), examples_of(processor), []
    for example, group in zip(examples, groups, strict=True):
        for reply in group:
            old = torch.from_numpy(reply.logprobs[reply.own] + rng.normal(0, 0.3, reply.drawn).astype(np.float32))
            made = whole(example.encoded, reply, processor)
            out.append(grpo.Sample(made, "", old.numpy(), np.zeros(1, np.float32), 0.0, float(rng.normal()), 1, True, old, old + 0.1))
    return out


def test_gradients_of_packed_episodes(processor, groups, lab):
    """Losses, statistics, gradients and log-probs, packed with shared beginnings and pictures, against one sample at a time."""
    samples = samples_of(processor, groups)
    prompts = {group.prefix for group in share([s.sequence for s in samples], processor.image_token) if len(group.members) > 1}
    assert prompts, "no two episodes share anything: nothing is tried"
    assert_same(run(lab, processor, samples, True), run(lab, processor, samples, False))


def test_what_an_environment_says_is_never_trained(policy, processor, groups, lab):
    """Other words between two turns, where no later turn sees them, change no gradient; as trained words they would."""
    samples = [s for s in samples_of(processor, groups) if (~s.sequence.trained[int(s.sequence.trained.argmax()) :]).any()]
    for sample in samples:
        begin = int(sample.sequence.trained.argmax())
        assert not sample.sequence.trained[:begin].any() and len(sample) == sample.sequence.trained.sum() < len(sample.sequence.ids) - begin


def test_a_group_does_not_depend_on_what_is_drawn_beside_it(policy, processor, groups):
    for k, example in enumerate(examples_of(processor)):
        (alone,) = played(policy, processor, [example])
        assert [r.ids.tolist() for r in alone] == [r.ids.tolist() for r in groups[k]]
        assert [r.images for r in alone] == [r.images for r in groups[k]]


def test_rows_of_several_tasks_in_one_draw(policy, processor, groups):
    mixed = examples_of(processor)
    other = Example(replace(mixed[1].row, task=""), 1)
    mixed[1] = replace(other, encoded=processor.encode_prompt(other))
    told: dict[int, list[Reply]] = {}
    made = played(policy, processor, mixed, drawn=told.update)
    assert [r.own is None for r in made[1]] == [True] * 4 and told.keys() == {0, 1, 2}
    for k in (0, 2):
        assert [r.ids.tolist() for r in made[k]] == [r.ids.tolist() for r in groups[k]] == [r.ids.tolist() for r in told[k]]
    assert isinstance(text_of(processor, made[0][0]), Transcript) and not isinstance(text_of(processor, made[1][0]), Transcript)


def test_an_end_that_is_asked_and_groups_that_are_dropped(policy, processor, groups):
    examples = examples_of(processor)
    made = played(policy, processor, examples, dropped=lambda i: i == 1)
    assert not made[1] and [r.ids.tolist() for r in made[0]] == [r.ids.tolist() for r in groups[0]]
    looks = iter(range(99))
    made = played(policy, processor, examples, asked=lambda: next(looks) > 8)
    assert not all(made) and all(len(group) in (0, 4) for group in made)
    have = {0: groups[0]}
    made = played(policy, processor, examples, have=have)
    assert made[0] is groups[0] and [r.ids.tolist() for r in made[2]] == [r.ids.tolist() for r in groups[2]]


def test_kept_episodes_are_played_again(policy, processor, groups, tmp_path):
    kept = Kept(tmp_path, "digest", 3)
    kept.add(dict(enumerate(groups)))
    for example, group in zip(examples_of(processor), groups, strict=True):
        again = restored(processor, example, kept.load([example.position], 4)[example.position])
        for a, b in zip(again, group, strict=True):
            assert a.images == b.images and a.finished == b.finished and a.ids.tolist() == b.ids.tolist()
            assert np.array_equal(a.own, b.own) and np.array_equal(a.logprobs, b.logprobs)
            assert replies_of(text_of(processor, a)) == replies_of(text_of(processor, b))


def test_an_environment_that_forgets_is_told(policy, processor):
    example = examples_of(processor, "FORGETFUL", 1)[0]
    (group,) = played(policy, processor, [example])
    with pytest.raises(ValueError, match=r"rows:0: the environment of task .*FORGETFUL answers kept replies otherwise"):
        restored(processor, example, group)


@pytest.mark.parametrize(
    "task, problem", [("BROKEN", "KeyError: 'lost'"), ("MISREAD", "it gave a str, and not an Observation"), ("INJECTING", "special token")]
)
def test_what_an_environment_does_wrong_names_the_row(policy, processor, task, problem):
    with pytest.raises(ValueError, match=f"rows:0: the environment of task .*{task} failed on turn 1: .*{problem}"):
        played(policy, processor, examples_of(processor, task, 1))


def test_an_environment_that_cannot_begin_is_told_before_the_run(grpo_recipe, rows, tmp_path):
    recipe = recipe_in_turns(grpo_recipe, rows, tmp_path, "run")
    recipe = replace(recipe, data=replace(recipe.data, sources=(SourceConfig(rows, task=f"{__name__}:STILLBORN"),)))
    found = problems_of(recipe, Processor.encode_prompt, lambda *_: (), tmp_path, ALONE)
    assert sum("cannot begin: KeyError: 'no board'" in problem for problem in found) == 4 and len(found) == 4, found


def test_conversations_end_where_they_would_be_too_long(policy, processor, groups):
    examples = examples_of(processor)
    longest = max(len(e.encoded) for e in examples) + 12
    tight = replace(processor, max_prompt=longest)
    made = played(policy, tight, examples)
    cut = [reply for group in made for reply in group if not reply.finished and len(reply.turns[-1]) < 7]
    assert cut and all(reply.own[-1] for reply in cut), "what did not fit is not there"
    for example, group in zip(examples, made, strict=True):
        for reply in group:
            assert len(example.encoded) + len(reply.ids) - len(reply.turns[-1]) <= longest
        again = restored(tight, example, [replace(reply, images=()) for reply in group])
        assert [r.images for r in again] == [r.images for r in group]


def test_the_end_of_the_text_ends_the_conversation(processor):
    """<|endoftext|> is the end of everything: behind it nothing is asked, and as padding it would be no input."""
    example = examples_of(processor, count=1)[0]
    for end, over in ((processor.eos, False), (processor.text_end, True)):
        episode = _Episode(processor, example, 7)
        episode.turn(Reply(np.array([1, end]), np.zeros(2, np.float32), True))
        assert episode.over is over and episode.finished and len(episode.reply.turns) == 1


def test_a_server_cannot_go_on():
    from actial_fast.rollout.server import Rows

    example = Example(Row((Turn("user", "which?"),), task=f"{__name__}:ECHO"), 0)
    with pytest.raises(ValueError, match="played in turns, which needs token ids"):
        play(None, Rows(), [example], Draw(), [])


# ---- the loops


@pytest.fixture
def rows(tmp_path, lab) -> str:
    """Rows of one picture each, of the lab's."""
    pictures = sorted(lab.captures.rglob("*.jpg"))[:8] or sorted(lab.captures.rglob("*.png"))[:8]
    path = tmp_path / "rows.jsonl"
    records = [{"messages": [{"role": "user", "content": "<image>which?"}], "images": [str(p)], "truth": "A"} for p in pictures]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def often(lab, tmp_path) -> ModelConfig:
    """The lab's model, of which one token in so many ends a reply by its generation config."""
    folder = shutil.copytree(lab.model, tmp_path / "often")
    config = json.loads((folder / "generation_config.json").read_text())
    ends = list(range(0, len(Processor.load(str(folder)).tokenizer), OFTEN))
    (folder / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": ends}))
    return ModelConfig(path=str(folder))


def recipe_in_turns(recipe, rows, tmp_path, name, **changes):
    source = SourceConfig(rows, task=f"{__name__}:ECHO")
    return replace(
        recipe,
        run=str(tmp_path / name),
        data=replace(recipe.data, sources=(source,), workers=0, max_prompt_tokens=200),
        sampling=SamplingConfig(n=4, max_new_tokens=6),
        rewards=(RewardConfig("task"),),
        optim=OptimConfig(lr=1e-3, eps=1e-4, warmup_steps=0),  # an epsilon that keeps rounding of tiny gradients small
        eval=EvalConfig((source,), every=2, limit=3, max_new_tokens=6),
        pack_tokens=256,
        steps=2,
        **changes,
    )


def test_a_run_in_turns_is_the_same_packed_and_plain(grpo_recipe, rows, tmp_path, often):
    whole_run = recipe_in_turns(grpo_recipe, rows, tmp_path, "packed", model=often)
    grpo.train(whole_run)
    packed = read_metrics(tmp_path / "packed")
    events = read_events(tmp_path / "packed")
    assert 1 / 3 < packed[-1]["reward"] <= 1 and len({m["response_length"] for m in packed}) > 1
    tables = [event["result"]["overall"] for event in events if event["kind"] == "eval"]
    assert tables and all(1 / 3 <= table["score"] <= 1 for table in tables)
    grpo.train(recipe_in_turns(grpo_recipe, rows, tmp_path, "plain", model=often, packing="plain", micro_batch=3))
    for a, b in zip(packed, read_metrics(tmp_path / "plain"), strict=True):
        for name in ("loss", "reward", "kl", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=2e-5), name


@pytest.mark.slow
def test_one_rank_equals_two(grpo_recipe, rows, tmp_path, often):
    """The same replies in turns on two ranks, whose pictures travel with them, with whole weights and sharded; the same update."""
    recipes = {
        name: recipe_in_turns(grpo_recipe, rows, tmp_path, name, model=often, dist=DistConfig(fsdp=name == "sharded"), log_rollouts=0)
        for name in ("whole", "sharded")
    }
    found = run_cases(tmp_path, [case(tmp_path, name, recipe, "grpo") for name, recipe in recipes.items()])
    assert {each["outcome"] for each in found.values()} == {"finished"}, found
    end = load_file(grpo.train(replace(recipes["whole"], run=str(tmp_path / "one"))) / "model.safetensors")
    for name in recipes:
        for one, two in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / name), strict=True):
            assert (one["reward"], one["response_length"]) == (two["reward"], two["response_length"])
        for key, value in weights(tmp_path / name, "grpo").items():
            assert torch.allclose(value, end[key], rtol=0, atol=2e-6), (name, key, (value - end[key]).abs().max())


def test_a_killed_step_goes_on_with_its_episodes(policy, processor, grpo_recipe, rows, tmp_path, monkeypatch):
    recipe, kept = recipe_in_turns(grpo_recipe, rows, tmp_path, "run"), Kept(tmp_path, "digest", 1)
    first = sampled(policy, processor, examples_of(processor, count=2), replace(recipe, prompts=2), kept)
    monkeypatch.setattr("actial_fast.rollout.embedded.Batching", None)  # nothing is drawn again
    again = sampled(policy, processor, examples_of(processor, count=2), replace(recipe, prompts=2), kept)
    assert len(first) == len(again) == 8 and len({s.reward for s in first}) > 1
    for a, b in zip(first, again, strict=True):
        assert (a.reward, a.advantage, a.text, a.sequence.images) == (b.reward, b.advantage, b.text, b.sequence.images)
        assert all(np.array_equal(getattr(a.sequence, name), getattr(b.sequence, name)) for name in ("ids", "trained", "positions"))
        assert np.array_equal(a.sampled, b.sampled) and len(a) == a.sequence.trained.sum()


def test_sft_on_conversations_with_pictures_in_between(sft_recipe, rows, tmp_path, lab):
    pictures = [json.loads(line)["images"][0] for line in open(rows)]
    path = tmp_path / "turns.jsonl"
    messages = [
        {"role": "user", "content": "<image>which?"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "<image>and now?"},
        {"role": "assistant", "content": "done"},
    ]
    pairs = list(zip(pictures, pictures[1:] + pictures[:1], strict=True))
    path.write_text("".join(json.dumps({"messages": messages, "images": list(pair), "truth": "done"}) + "\n" for pair in pairs))
    made = {}
    for packing in ("packed", "plain"):
        data = replace(sft_recipe.data, sources=(SourceConfig(str(path)),))
        recipe = replace(sft_recipe, run=str(tmp_path / packing), packing=packing, steps=2, data=data)
        sft.train(recipe)
        made[packing] = read_metrics(tmp_path / packing)
    for a, b in zip(made["packed"], made["plain"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    assert made["packed"][0]["answer_tokens"] == made["plain"][0]["answer_tokens"]


def test_an_evaluation_in_turns(policy, processor, rows):
    config = EvalConfig((SourceConfig(rows, task=f"{__name__}:ECHO"),), limit=4, max_new_tokens=6)
    (table,) = evaluate(Embedded(policy, processor), processor, config, ALONE).values()
    assert table["overall"]["n"] == 4 and 1 / 3 <= table["overall"]["score"] <= 1
    assert table["overall"]["mean_response_length"] <= 18

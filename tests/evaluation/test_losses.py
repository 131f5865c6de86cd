"""The loss of held-out rows: transformers' own, however rows are packed, and where it is written down."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from actial_fast import grpo, sft
from actial_fast.data.sources.row import Row, Turn
from actial_fast.data.sources.source import SourceConfig
from actial_fast.data.sources.stream import Pass
from actial_fast.evaluation import losses as module
from actial_fast.evaluation.losses import losses
from actial_fast.model.policy import load_policy
from actial_fast.model.processor import Processor
from actial_fast.packing.packed_ops import collect, patchify
from actial_fast.report.metrics import read_events, read_metrics
from actial_fast.report.page import write_report
from actial_fast.rollout.embedded import Embedded
from actial_fast.settings.config import config_from
from actial_fast.settings.model import LoRAConfig
from actial_fast.settings.recipe import EvalConfig, SFTRecipe
from actial_fast.settings.running import SaveConfig
from actial_fast.train.preflight import Unready
from tests.loops import ALONE


def texts(folder: Path, answers: list[str], name: str = "own") -> SourceConfig:
    """Rows of text alone, that have nothing to compare a reply with."""
    path = folder / f"{name}.jsonl"
    rows = [Row((Turn("user", f"Say {i}"), Turn("assistant", text)), id=str(i)) for i, text in enumerate(answers)]
    path.write_text("".join(json.dumps(row.to_json(folder)) + "\n" for row in rows))
    return SourceConfig(str(path), format="jsonl")


def alone(model: Path, processor: Processor, source: SourceConfig, limit: int = 0) -> tuple[float, int]:
    """transformers' loss, one row at a time: the mean over all answer tokens, and how many there are."""
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(model)
    total, tokens = 0.0, 0
    for s in (processor.encode(example) for example in Pass(source, limit=limit)):
        ids, n = torch.from_numpy(s.ids)[None], int(s.trained.sum())
        seen = {"pixel_values": patchify(collect(processor.store, s.images)), "image_grid_thw": torch.tensor(s.grids)} if s.images else {}
        with torch.no_grad():
            labels = torch.where(torch.from_numpy(s.trained)[None], ids, -100)
            out = theirs(input_ids=ids, labels=labels, mm_token_type_ids=(ids == processor.image_token).int(), **seen)
        total, tokens = total + float(out.loss) * n, tokens + n
    return total / tokens, tokens


@pytest.mark.parametrize("packing", ["packed", "plain"])
def test_the_loss_is_that_of_one_row_at_a_time(packing, sft_recipe, lab, tmp_path, monkeypatch):
    """Over rows with images and without, in several passes and micro-batches; the model is left as it was."""
    monkeypatch.setattr(module, "CHUNK", 4)
    processor = Processor.load(str(lab.model))
    sources = {"seen": SourceConfig(str(lab.questions / "test.jsonl")), "told": texts(tmp_path, ["A", "B A B", "A" * 30, "BA"] * 3)}
    recipe = replace(sft_recipe, packing=packing, pack_tokens=300, micro_batch=3, eval=EvalConfig(limit=11))
    policy = load_policy(recipe.model, ALONE.device, 0, packed=packing == "packed")
    found, failures = losses(policy, processor, recipe, sources.items(), ALONE)
    assert not failures and policy.training and all(p.grad is None for p in policy.parameters())
    for name, source in sources.items():
        expected, tokens = alone(lab.model, processor, source, limit=11)
        assert found[name].mean == pytest.approx(expected, abs=1e-5) and (found[name].tokens, found[name].rows) == (tokens, 11)
        assert found[name].perplexity == pytest.approx(torch.tensor(expected).exp().item(), rel=1e-4)


def test_nothing_is_dropped_out_while_it_is_measured(sft_recipe, lab, tmp_path):
    recipe = replace(sft_recipe, model=replace(sft_recipe.model, lora=LoRAConfig(rank=2, dropout=0.5)))
    policy, processor = load_policy(recipe.model, ALONE.device, 0, packed=True), Processor.load(str(lab.model))
    with torch.no_grad():
        for name, p in policy.trained().items():
            if "lora_B" in name:
                p.fill_(0.1)
    one, two = (losses(policy, processor, recipe, [("own", texts(tmp_path, ["A", "B A B"]))], ALONE)[0]["own"] for _ in range(2))
    assert one == two


def test_a_token_of_a_long_answer_counts_as_much_as_one_of_a_short_answer(sft_recipe, lab, tmp_path):
    policy, processor = load_policy(sft_recipe.model, ALONE.device, 0, packed=True), Processor.load(str(lab.model))
    parts = {name: texts(tmp_path, answers, name) for name, answers in (("a", ["A"]), ("b", ["B" * 40]), ("both", ["A", "B" * 40]))}
    found, _ = losses(policy, processor, replace(sft_recipe, loss_weighting="row"), parts.items(), ALONE)
    a, b, both = (found[name] for name in parts)
    # the second row of `both` asks another question than the only one of `b`, so that each is measured where it stands
    assert both.tokens == a.tokens + b.tokens and abs(both.mean - b.mean) < abs(both.mean - a.mean)


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_a_run_measures_before_while_and_behind_it_without_a_reply(kind, sft_recipe, grpo_recipe, tmp_path, monkeypatch, capsys):
    def drawn(*_, **__):
        raise AssertionError("a reply is drawn")

    recipe, loop = (sft_recipe, sft) if kind == "sft" else (grpo_recipe, grpo)
    if kind == "sft":
        monkeypatch.setattr(Embedded, "generate", drawn)
    held = EvalConfig(loss_sources=(texts(tmp_path, ["B A B", "A"]),), every=2, before=True)
    recipe = replace(recipe, eval=held, steps=3, save=SaveConfig(every=1, keep=3))
    loop.train(recipe)
    name = f"{tmp_path.name}/own"
    found = [m for m in read_metrics(Path(recipe.run)) if f"eval/{name}/loss" in m]
    assert [m["step"] for m in found] == [0, 2, 3] and all(m[f"eval/{name}/rows"] == 2 for m in found)
    losses = [m[f"eval/{name}/loss"] for m in found]
    assert losses[0] != losses[1] != losses[2] and (kind == "grpo" or losses[2] < losses[0])
    said = capsys.readouterr().out
    assert f"{kind} step 2: {name} loss {losses[1]:.4f}, perplexity {found[1][f'eval/{name}/perplexity']:,.4g} (" in said
    assert {"eval"} <= {key.partition("/")[2] for e in read_events(Path(recipe.run)) if e["kind"] == "phases" for key in e["phases"]}
    assert scalars(Path(recipe.run) / "tensorboard" / kind, f"{kind}/eval/{name}/loss") == pytest.approx(losses, rel=1e-5)
    page = write_report(Path(recipe.run)).read_text()
    assert "Loss of held-out rows" in page and f"{losses[2]:.4f}" in page and "No evaluation yet" not in page
    # a run that goes on from its last checkpoint does not measure again what it has
    (Path(recipe.run) / kind / "final").rename(tmp_path / "final")
    loop.train(recipe)
    assert [m for m in read_metrics(Path(recipe.run)) if f"eval/{name}/loss" in m] == found


def scalars(folder: Path, tag: str) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [each.value for each in events.Scalars(tag)]


def test_rows_that_cannot_be_measured_are_told(sft_recipe, lab, tmp_path, capsys):
    """Before the run where it can be known; else the run goes on, unless eval.fatal."""
    asked = SourceConfig(str(lab.root / "asked.jsonl"))
    Path(asked.path).write_text(json.dumps(Row((Turn("user", "Say"),), truth="A", id="0").to_json(lab.root)) + "\n")
    for source, problem in ((asked, "no assistant turn to train on"), (SourceConfig("nope.jsonl"), "does not exist")):
        with pytest.raises(Unready, match=f"eval.loss_sources: .*{problem}"):
            sft.train(replace(sft_recipe, eval=EvalConfig(loss_sources=(source,))))
    good, late = texts(tmp_path, ["A"]), texts(tmp_path, ["A"] * 5 + ["<|im_end|>"], "late")
    recipe = replace(sft_recipe, steps=1, eval=EvalConfig(loss_sources=(late, good)))
    sft.train(recipe)
    (failed,) = [e for e in read_events(Path(recipe.run)) if e["kind"] == "eval_failed"]
    assert failed["eval_failed"]["name"].endswith("/late") and "late.jsonl:6: the text contains" in failed["eval_failed"]["cause"]
    assert f"{tmp_path.name}/late was NOT evaluated: " in capsys.readouterr().out
    assert f"eval/{tmp_path.name}/own/loss" in read_metrics(Path(recipe.run))[-1]
    with pytest.raises(ValueError, match=r"eval.fatal: .*late.jsonl:6"):
        sft.train(replace(recipe, run=str(tmp_path / "fatal"), eval=replace(recipe.eval, fatal=True)))
    skipping = replace(recipe, run=str(tmp_path / "skip"), data=replace(recipe.data, on_bad_row="skip"))
    sft.train(skipping)
    assert read_metrics(Path(skipping.run))[-1][f"eval/{tmp_path.name}/late/rows"] == 5


def test_one_file_is_held_out_in_part(sft_recipe, tmp_path, caplog):
    """What `skip` leaves out of the training rows is what `limit` measures: nothing is said of rows in both."""
    source = texts(tmp_path, [f"{'AB'[i % 2]} {'B' * i}" for i in range(9)])
    data = replace(sft_recipe.data, sources=(replace(source, skip=4),))
    sft.train(replace(sft_recipe, data=data, steps=1, eval=EvalConfig(loss_sources=(replace(source, limit=4),))))
    assert not caplog.messages and read_metrics(Path(sft_recipe.run))[-1][f"eval/{tmp_path.name}/own/rows"] == 4
    sft.train(
        replace(
            sft_recipe, run=str(tmp_path / "both"), data=replace(data, sources=(source,)), steps=1, eval=EvalConfig(loss_sources=(source,))
        )
    )
    assert [m.partition(":")[0] for m in caplog.messages] == ["eval.loss_sources"] and "9 of 9 rows" in caplog.text


def test_too_little_memory_costs_the_measurement_alone(sft_recipe, lab, tmp_path, monkeypatch):
    policy, processor = load_policy(sft_recipe.model, ALONE.device, 0, packed=True), Processor.load(str(lab.model))

    def short(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory (a test)")

    monkeypatch.setattr("actial_fast.ops.linear_logprob", short)
    found, failures = losses(policy, processor, sft_recipe, [("own", texts(tmp_path, ["A"]))], ALONE)
    assert not found and "own.jsonl:1 with 13 tokens" in failures["own"] and "OutOfMemoryError" in failures["own"] and policy.training


def test_keys_of_replies_do_nothing_where_none_is_drawn():
    from actial_fast.settings.idle import idle

    recipe = config_from(SFTRecipe, ["eval.loss_sources=[{path: a.jsonl}]", "eval.every=5", "eval.max_new_tokens=9"])
    assert list(idle(recipe)) == ["eval.max_new_tokens = 9 has no effect: eval.sources is empty"]

"""Checkpoints: what is saved comes back on any number of ranks, behind training's back, whole or not at all, and opens elsewhere."""

import errno
import json
import os
import shutil
import sys
import threading
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from actial_fast.model import tensors
from actial_fast.model.policy import load_policy
from actial_fast.model.processor import Processor
from actial_fast.model.tensors import Stored
from actial_fast.model.tiny import TinyConfig, create
from actial_fast.train import checkpoint, export
from actial_fast.train.dist import World
from actial_fast.train.optim import build_optimizer
from tests.loops import ALONE
from tests.ranks import on_ranks
from tests.train.saved import KINDS, SHARDED, along, config, everything, optim, trained


@pytest.fixture(scope="module")
def processor(tiny):
    return Processor.load(str(tiny))


@pytest.fixture
def run(tiny, processor, tmp_path):
    """A trained policy, its optimizer, and save(step, **options) into tmp_path with a saver that keeps two."""

    class Run:
        policy, optimizer = trained(config(tiny), ALONE)
        saver = checkpoint.Saver(tmp_path, ALONE, 2)

        def save(self, step, final=False):
            self.saver.save(step, self.policy, processor, self.optimizer, {"position": step})
            if final:
                self.saver.finish(step)

    return Run()


def restored(tiny, folder, step, kind="full", where=ALONE):
    policy = load_policy(config(tiny, kind), where.device, seed=1)
    optimizer = build_optimizer(policy, optim(kind))
    state = checkpoint.restore(folder, step, policy, optimizer, where)
    found = everything(policy, optimizer)
    along(policy, optimizer)
    return found, state, everything(policy, optimizer)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


# ---- what is saved comes back


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 3])
def test_replicated_ranks_write_a_part_each_and_any_number_reads_them(ranks, kind, tiny, processor, tmp_path):
    policy, optimizer = trained(config(tiny, kind), ALONE, optim(kind))
    savers = [checkpoint.Saver(tmp_path, World(rank, ranks, ALONE.device), 2) for rank in range(ranks)]
    generators = []
    for saver in savers:  # rank 0 first: it makes the folder, and publishes when it sees the others' files
        torch.manual_seed(saver.where.rank)
        generators.append(torch.get_rng_state())
        saver.save(5, policy, processor, optimizer, {"position": 40})
    for saver in savers:
        saver.wait()
    source = checkpoint.path_of(tmp_path, 5)
    sizes = [path.stat().st_size for path in sorted(source.glob("rank-*"))]
    assert len(sizes) == ranks and max(sizes) < 1.5 * sum(sizes) / ranks
    before = everything(policy, optimizer)
    assert any(name.startswith("exp_avg_sq/") for name in before)
    for reader in (0, 2):
        torch.manual_seed(99)
        torch.rand(1)
        fresh = torch.get_rng_state()
        after, state, on = restored(tiny, tmp_path, 5, kind, World(reader, 3, ALONE.device))
        assert same(before, after) and state == {"position": 40}
        assert torch.equal(torch.get_rng_state(), generators[reader] if reader < ranks else fresh)
    along(policy, optimizer)
    assert same(on, everything(policy, optimizer)), "the next step is that of a run which was not stopped"


@pytest.mark.ranks
def test_sharded_ranks_write_their_shards_and_one_rank_reads_them(tiny, tmp_path):
    found = on_ranks("tests.train.saved", "sharded", tmp_path, tiny)
    for kind in SHARDED:
        assert found[kind] == [True, True, {"position": 7}, True], "read by as many ranks as wrote, and stepped on"
        here, _, on = restored(tiny, tmp_path / kind, 1, kind)
        policy, optimizer = trained(config(tiny, kind), ALONE, optim(kind))
        there = everything(policy, optimizer)
        assert same(here, there), "sharded, the same weights were loaded, adapters were drawn alike, and all came back"
        along(policy, optimizer)
        assert same(on, everything(policy, optimizer))
        theirs = load_file(tmp_path / f"{kind}-0.safetensors")
        if optim(kind).kind == "adamw8bit":
            assert same(on, theirs), "2 ranks are 1 rank, bit for bit"
        else:  # PyTorch's step on a CPU has other last bits where fewer elements than a vector's are left
            assert all(torch.allclose(value, theirs[name], rtol=1e-6, atol=0) for name, value in on.items())
        files = sorted((checkpoint.path_of(tmp_path / kind, 1)).glob("rank-*"))
        assert len(files) == 2 and files[1].stat().st_size > 0.4 * files[0].stat().st_size
        assert Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / kind / "final" / "model")
    assert "step-000002: the checkpoint was not written: somewhere: No space left on device; older ones are untouched" in found["failed"]
    assert "step 2: not finite: exp_avg" not in found["not finite"] and "step 2: not finite: weight/" in found["not finite"]
    assert checkpoint.steps(tmp_path / "full") == [1] and not list((tmp_path / "full").glob(".tmp-*"))


def test_pytorchs_reader_of_distributed_checkpoints_reads_ours(tiny, processor, tmp_path):
    policy, optimizer = trained(config(tiny), ALONE)
    for saver in (savers := [checkpoint.Saver(tmp_path, World(rank, 2, ALONE.device), 1) for rank in range(2)]):
        saver.save(1, policy, processor, optimizer, {})
    savers[0].wait()
    wanted = {n: t for n, t in everything(policy, optimizer).items() if n.split("/")[1] in policy.trained()}
    got = {name: torch.zeros_like(value) for name, value in wanted.items()}
    dcp.load(got, storage_reader=dcp.HuggingFaceStorageReader(str(checkpoint.path_of(tmp_path, 1))), no_dist=True)
    assert same(got, wanted) and any(value.abs().sum() for value in got.values())


def test_a_checkpoint_of_another_model_is_refused(run, tiny, tmp_path):
    run.save(1)
    run.saver.wait()
    with pytest.raises(ValueError, match=r"step-000001: has no model.base_model.*lora_A.default.weight of shape \(4, 32\)"):
        restored(tiny, tmp_path, 1, "adapters")


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_rank_file_is_an_error(lost, tiny, processor, tmp_path):
    policy, optimizer = trained(config(tiny), ALONE)
    for saver in (savers := [checkpoint.Saver(tmp_path, World(rank, 2, ALONE.device), 1) for rank in range(2)]):
        saver.save(1, policy, processor, optimizer, {})
    savers[0].wait()
    (checkpoint.path_of(tmp_path, 1) / f"rank-0000{lost}-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="a file of the folder was lost"):
        restored(tiny, tmp_path, 1)
    with pytest.raises(ValueError, match="a file of the folder was lost"):
        export.export_to(checkpoint.path_of(tmp_path, 1), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".tmp-*"))


# ---- behind training's back


def test_training_goes_on_while_a_save_is_written_and_the_saved_values_are_the_steps(run, tiny, tmp_path, monkeypatch):
    release, entered = threading.Event(), threading.Event()

    def slow(*args, **kwargs):
        entered.set()
        assert release.wait(60)
        tensors.write(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "write", slow)
    before = everything(run.policy, run.optimizer)
    run.save(1)
    assert entered.wait(60)
    with torch.no_grad():  # the next step
        for parameter in run.policy.trained().values():
            parameter += 1
            for value in run.optimizer.state.get(parameter, {}).values():
                value += 1
    run.saver.poll()
    assert checkpoint.steps(tmp_path) == [] and checkpoint.final(tmp_path) is None
    release.set()
    run.saver.wait()
    assert checkpoint.steps(tmp_path) == [1]
    assert same(restored(tiny, tmp_path, 1)[0], before)


def test_a_second_save_waits_for_the_first_and_the_newest_are_kept(run, tmp_path):
    for step in (1, 2, 3):
        run.save(step)
        assert step == 1 or checkpoint.steps(tmp_path)[-1] >= step - 1
    run.saver.wait()
    assert checkpoint.steps(tmp_path) == [2, 3] and sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000003"]


def test_leaving_finishes_what_is_under_way_also_after_an_error(run, tmp_path):
    with run.saver:
        run.save(1)
    assert checkpoint.steps(tmp_path) == [1]
    with pytest.raises(RuntimeError, match="evaluation"), run.saver:
        run.save(2)
        raise RuntimeError("evaluation")
    assert checkpoint.steps(tmp_path) == [1, 2]


def test_an_error_does_not_wait_for_ever_for_another_rank(tiny, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "PATIENCE", 0.2)
    policy, optimizer = trained(config(tiny), ALONE)
    saver = checkpoint.Saver(tmp_path, World(0, 2, ALONE.device), 1)
    with pytest.raises(RuntimeError, match="rank 1 is gone"), saver:
        saver.save(1, policy, processor, optimizer, {})
        raise RuntimeError("rank 1 is gone")
    assert checkpoint.steps(tmp_path) == []


# ---- whole or not at all


def test_at_every_moment_there_are_whole_checkpoints_only(run, tiny, tmp_path):
    """Looks at the folder before each of the file system's calls, as whoever comes after a kill -9 at that moment would."""
    looking, moments, newest = threading.local(), [], [0]

    def look(event, _):
        if event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir") or not watching or getattr(looking, "now", False):
            return
        looking.now = True
        try:
            found = checkpoint.steps(tmp_path)
            assert len(found) == len(list(tmp_path.glob("step-*"))), "a folder of that name is whole from the start"
            for step in found:
                source = checkpoint.path_of(tmp_path, step)
                about = json.loads((source / "state.json").read_text())
                assert about["step"] == step and len(list(source.glob("rank-*.safetensors"))) == 1
                assert len(Stored(source.glob("rank-*.safetensors")).names) > 100 and (source / "model/config.json").exists()
            assert max(found, default=0) >= newest[0], "the newest was dropped before there was a newer one"
            newest[0] = max(found, default=0)
            if model := checkpoint.final(tmp_path):
                assert Stored([model / "model.safetensors"]).names and (model / "tokenizer.json").exists()
            moments.append((event, tuple(found), model is not None))
        except BaseException as error:
            problems.append(error)
        finally:
            looking.now = False

    watching, problems = True, []
    sys.addaudithook(look)
    try:
        run.saver.keep = 1
        for step in (1, 2):
            run.save(step)
        run.save(3, final=True)
    finally:
        watching = False
    assert not problems, problems[0]
    assert {found for _, found, _ in moments} >= {(), (1,), (1, 2), (2,), (2, 3)} and len(moments) > 50
    assert checkpoint.steps(tmp_path) == [3] and checkpoint.final(tmp_path)


def test_a_full_disk_is_told_and_nothing_is_lost(run, tiny, tmp_path, monkeypatch):
    run.save(1)
    run.saver.wait()
    whole, left = tensors._write, [200_000]

    def full(write, data):
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        whole(write, data)

    with monkeypatch.context() as patch:
        patch.setattr(tensors, "_write", full)
        run.save(2)
        with pytest.raises(
            checkpoint.NotSaved, match=r"step-000002: the checkpoint was not written: .*rank-00000.*: No space left on device"
        ):
            run.saver.wait()
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    run.saver.wait()  # told once
    run.save(3)
    run.saver.wait()
    assert checkpoint.steps(tmp_path) == [1, 3] and restored(tiny, tmp_path, 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["weight", "exp_avg_sq"])
def test_what_is_not_finite_is_never_written(what, value, run, tmp_path):
    run.saver.keep = 1
    run.save(1)
    run.saver.wait()
    name, parameter = next(iter(run.policy.trained().items()))
    tensor = parameter.detach() if what == "weight" else run.optimizer.state[parameter][what]
    tensor.view(-1)[-1] = value
    with pytest.raises(checkpoint.NonFinite, match=f"step 2: not finite: {what}/{name}; no checkpoint of it was written"):
        run.save(2, final=True)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


def test_large_weights_are_finite(run):
    next(iter(run.policy.trained().values())).detach().fill_(3e38)  # their sum is not
    run.save(1)
    run.saver.wait()


# ---- the final folder


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_final_model_is_the_policy(ranks, run, tiny, tmp_path, monkeypatch):
    run.save(4)
    run.saver.wait()
    if ranks == 2:  # files of a few weights each, every rank half of them
        monkeypatch.setattr(export, "FILE_BYTES", 50_000)
    for rank in range(ranks):
        export.export(checkpoint.path_of(tmp_path, 4), tmp_path / "m", tmp_path / "a", rank=rank, ranks=ranks)
    assert (len(list((tmp_path / "m").glob("*.safetensors"))) > 2) == (ranks == 2) and not (tmp_path / "a").exists()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "m", dtype="auto")
    assert same(dict(model.named_parameters()), {n.removeprefix("model."): p for n, p in run.policy.named_parameters()})
    reference = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny)
    assert model.config.to_diff_dict() | {"_name_or_path": ""} == reference.config.to_diff_dict() | {"_name_or_path": ""}
    assert model.generation_config == reference.generation_config
    reference.save_pretrained(tmp_path / "theirs")
    theirs, ours = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "m"))
    assert theirs == ours and (
        ranks == 2 or load_file(tmp_path / "m/model.safetensors").keys() == load_file(tmp_path / "theirs/model.safetensors").keys()
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "m").chat_template


def test_adapters_are_kept_for_peft_and_merged_in_float32(tiny, processor, tmp_path):
    """A base in 16 bits and changes far below its last bit, which merging in 16 bits would lose."""
    settings = replace(config(tiny, "adapters"), frozen_dtype="bfloat16")
    policy, optimizer = trained(settings, ALONE)
    with torch.no_grad():
        for name, parameter in policy.trained().items():
            if "lora_B" in name:
                parameter.mul_(1e-4)
    with checkpoint.Saver(tmp_path, ALONE, 1) as saver:
        saver.save(1, policy, processor, optimizer, {})
        saver.finish(1)
    merged = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint.final(tmp_path), dtype="auto")
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny, dtype=torch.bfloat16).float()
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "final" / "adapter")
    assert adapted.peft_config["default"].base_model_name_or_path == str(tiny)
    theirs = {n.replace(".default.", "."): p for n, p in adapted.named_parameters() if ".lora_" in n}
    ours = {n.replace(".default.", ".").removeprefix("model."): p for n, p in policy.trained().items()}
    assert same({n: p.detach() for n, p in theirs.items()}, {n: p.detach() for n, p in ours.items()})
    start = {
        n: p.clone() for n, p in Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny, dtype=torch.bfloat16).float().named_parameters()
    }
    whole = dict(adapted.merge_and_unload().named_parameters())
    moved = 0
    for name, parameter in merged.named_parameters():
        assert torch.allclose(parameter, whole[name], rtol=0, atol=1e-9), name
        change = parameter - start[name]
        if change.any():
            moved += 1
            expected = whole[name] - start[name]
            assert (change - expected).norm() < 1e-2 * expected.norm(), name
    assert moved == 2 * 7 - 1, "every adapted matrix but the one without a gradient"
    layout = {p.name for p in (tmp_path / "final" / "adapter").iterdir()}
    adapted = peft.PeftModel.from_pretrained(Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny), tmp_path / "final" / "adapter")
    adapted.save_pretrained(tmp_path / "theirs")
    assert layout == {p.name for p in (tmp_path / "theirs").iterdir()} - {"README.md"}
    assert json.loads((tmp_path / "theirs/adapter_config.json").read_text()) == json.loads(
        (tmp_path / "final/adapter/adapter_config.json").read_text()
    )
    assert (
        load_file(tmp_path / "theirs/adapter_model.safetensors").keys()
        == load_file(tmp_path / "final/adapter/adapter_model.safetensors").keys()
    )


def test_a_final_folder_that_cannot_be_written_is_told(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "write", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device", "x")))
    with pytest.raises(checkpoint.NotSaved, match=r"final: not written: x: No space left on device; the same command tries it again"):
        run.save(1, final=True)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


def test_a_tied_head_stays_tied(tiny, tmp_path):
    """Sharded, trained and exported, with the embedding's weight as the head's."""
    model = tmp_path / "tied"
    shutil.copytree(tiny, model)
    about = json.loads((model / "config.json").read_text())
    about["tie_word_embeddings"] = about["text_config"]["tie_word_embeddings"] = True
    (model / "config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"says that lm_head.weight is the embedding, but the files have another one"):
        load_policy(config(model), ALONE.device, 0)
    stored = load_file(model / "model.safetensors")
    save_file({name: value for name, value in stored.items() if name != "lm_head.weight"}, model / "model.safetensors", {"format": "pt"})
    reference = Qwen2_5_VLForConditionalGeneration.from_pretrained(model)
    assert reference.lm_head.weight is reference.model.language_model.embed_tokens.weight
    policy = load_policy(config(model), ALONE.device, 0)
    assert policy.base.lm_head.weight is policy.base.model.language_model.embed_tokens.weight
    names, total = on_ranks("tests.train.saved", "tied", tmp_path / "run", model)
    assert names == len(policy.trained()) == len(list(reference.parameters()))
    ids = torch.arange(12)[None] % 7 + 5
    assert total == pytest.approx(float(reference(input_ids=ids).logits.abs().sum()), rel=1e-5)
    final: Path = tmp_path / "run" / "final" / "model"
    assert "lm_head.weight" not in load_file(final / "model.safetensors")
    assert not torch.equal(Qwen2_5_VLForConditionalGeneration.from_pretrained(final).lm_head.weight, reference.lm_head.weight)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
def test_no_rank_holds_more_than_its_shard_and_a_tensor(tiny, tmp_path):
    """Resident memory of two ranks, on a model of more than 100 million parameters.

    Prints the figures: pytest -m slow -s tests/train/test_checkpoint.py
    """
    shape = TinyConfig(hidden=1536, heads=16, layers=5, vision_hidden=64, vision_depth=0, image_size=28)
    create(tmp_path / "model", ["a question?", "an answer"], shape, seed=0)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")  # as on the hub; it is trained in float32
    del model
    for rank, found in enumerate(on_ranks("tests.train.saved", "memory", tmp_path / "run", tmp_path / "model", tiny)):
        print(f"rank {rank}: " + ", ".join(f"{name} {value / 1e6:.1f}" for name, value in found.items()) + " (millions, bytes)")
        assert found["parameters"] > 100e6 and found["state"] == pytest.approx(3 * found["shard"], rel=0.1)
        assert found["load"] <= found["shard"] + found["largest"]
        assert found["save"] <= 1.2 * found["state"]
        assert found["final"] <= 4 * found["largest"]
        assert found["restore"] <= found["state"] - found["shard"] + found["largest"]


@pytest.mark.parametrize("kind", ["master", "adapters, master, 8 bits"])
def test_masters_are_what_is_exported(kind, tiny, processor, tmp_path):
    """In float32, and not their rounded copies, which is what is trained with."""
    policy, optimizer = trained(config(tiny, kind), ALONE, optim(kind))
    with checkpoint.Saver(tmp_path, ALONE, 1) as saver:
        saver.save(1, policy, processor, optimizer, {})
        saver.finish(1)
    masters = {name: optimizer.state[p]["master"] for name, p in policy.trained().items() if p in optimizer.state}
    assert masters and any((master != policy.trained()[name]).any() for name, master in masters.items())
    if kind == "master":
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint.final(tmp_path), dtype="auto")
        got = {f"model.{name}": p for name, p in model.named_parameters()}
        assert {p.dtype for p in got.values()} == {torch.float32}
    else:
        stored = load_file(tmp_path / "final/adapter/adapter_model.safetensors")
        got = {name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."): v for name, v in stored.items()}
        got = {f"model.{name}": value for name, value in got.items()}
    assert all(torch.equal(got[name], master) for name, master in masters.items())
    export.export_to(checkpoint.path_of(tmp_path, 1), tmp_path / "low", dtype="bfloat16")
    low = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "low", dtype="auto")
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}

"""`actial export`: folders that transformers and PEFT open, from any checkpoint of a run, in one process."""

import json

import peft
import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from actial_fast.cli.main import main
from actial_fast.model.processor import Processor
from actial_fast.train import checkpoint
from actial_fast.train.dist import World
from tests.loops import ALONE
from tests.train.saved import config, trained


@pytest.fixture(scope="module")
def stages(tiny, tmp_path_factory):
    """kind -> the folder of a stage with checkpoints of steps 1 and 2, written by two ranks; between them the weights change."""
    folders = {}
    for kind in ("full", "adapters"):
        folders[kind] = folder = tmp_path_factory.mktemp("run") / kind
        policy, optimizer = trained(config(tiny, kind), ALONE)
        savers = [checkpoint.Saver(folder, World(rank, 2, ALONE.device), 2) for rank in range(2)]
        for step in (1, 2):
            for saver in savers:
                saver.save(step, policy, Processor.load(str(tiny)), optimizer, {})
            for saver in savers:
                saver.wait()
            with torch.no_grad():
                for parameter in policy.trained().values():
                    parameter += 0.01
    return folders


def weights(folder, dtype="auto"):
    return dict(Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype).named_parameters())


def test_the_newest_or_a_given_step(stages, tmp_path, capsys):
    assert main(["export", str(stages["full"]), "-o", str(tmp_path / "newest")]) == 0
    assert f"{tmp_path / 'newest'}: {stages['full'] / 'step-000002'} in float32" in capsys.readouterr().out
    (tmp_path / "first").mkdir()  # an empty folder will do
    assert main(["export", str(stages["full"] / "step-000001"), "-o", str(tmp_path / "first")]) == 0
    newest, first = weights(tmp_path / "newest"), weights(tmp_path / "first")
    for name, value in first.items():
        assert value.dtype == torch.float32 and torch.allclose(newest[name], value + 0.01, rtol=0, atol=1e-6), name
    assert Processor.load(str(tmp_path / "first")) and {p.name for p in tmp_path.iterdir()} == {"newest", "first"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_another_dtype(dtype, stages, tmp_path):
    assert main(["export", str(stages["full"]), "-o", str(tmp_path / "low"), "--dtype", dtype]) == 0
    assert main(["export", str(stages["full"]), "-o", str(tmp_path / "full")]) == 0
    low, full = weights(tmp_path / "low"), weights(tmp_path / "full")
    assert all(torch.equal(low[name], value.to(getattr(torch, dtype))) for name, value in full.items())
    about = json.loads((tmp_path / "low" / "config.json").read_text())
    assert about["dtype"] == dtype and about["text_config"].get("dtype", dtype) == dtype


def test_adapters_and_what_rounding_costs(stages, tiny, tmp_path, capsys):
    assert main(["export", str(stages["adapters"]), "-o", str(tmp_path / "exact")]) == 0
    told = capsys.readouterr().out
    assert "its adapters, for PEFT" in told and "rounding" not in told
    assert main(["export", str(stages["adapters"]), "-o", str(tmp_path / "low"), "--dtype", "bfloat16"]) == 0
    told = capsys.readouterr().out
    base, exact, low = weights(tiny, torch.bfloat16), weights(tmp_path / "exact"), weights(tmp_path / "low")
    changed = [name for name in base if not torch.equal(base[name].float(), exact[name])]
    assert len(changed) == 2 * 7 and {v.dtype for v in exact.values()} == {torch.float32}
    lost = sum((low[name].float() - exact[name]).square().sum() for name in changed).sqrt()
    change = sum((exact[name] - base[name].float()).square().sum() for name in changed).sqrt()
    assert f"changed the merged weights by {lost / change:.2g} of what the adapters changed" in told and lost / change > 1e-4
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny, dtype=torch.bfloat16).float()
    merged = peft.PeftModel.from_pretrained(model, tmp_path / "low" / "adapter").merge_and_unload()
    assert all(torch.allclose(value, exact[name], atol=1e-6) for name, value in merged.named_parameters())


def test_adapters_beside_the_checkpoints_own_weights(stages, tiny, tmp_path):
    """They were trained beside a base in 16 bits; the checkpoint has it in 32."""
    for base in ("trained", "original"):
        assert main(["export", str(stages["adapters"]), "-o", str(tmp_path / base), "--base", base]) == 0
    exact, rounded, found = weights(tiny), weights(tiny, torch.bfloat16), {b: weights(tmp_path / b) for b in ("trained", "original")}
    for name, value in exact.items():
        off, expected = found["original"][name] - found["trained"][name], value - rounded[name].float()
        assert torch.allclose(off, expected, atol=1e-6), name
    assert not torch.equal(found["original"]["lm_head.weight"], found["trained"]["lm_head.weight"])


def test_mistakes(stages, tmp_path, capsys):
    for args, message in (
        ([tmp_path, "-o", tmp_path / "x"], f"{tmp_path}: no checkpoint (step-000100, say) and no folder of a stage that has one"),
        ([stages["full"], "-o", stages["full"]], f"--out {stages['full']}: there is something already; name a folder that is new or empty"),
    ):
        assert main(["export", *map(str, args)]) == 2
        assert capsys.readouterr().err == f"actial: {message}\n"
    assert checkpoint.steps(stages["full"]) == [1, 2]


def test_a_base_that_is_gone_is_named(stages, tmp_path, capsys):
    about = stages["adapters"] / "step-000001" / "state.json"
    state = json.loads(about.read_text())
    state["model"]["base"] = "/nowhere/base"
    about.write_text(json.dumps(state))
    assert main(["export", str(about.parent), "-o", str(tmp_path / "x")]) == 2
    assert "what was not trained is read from /nowhere/base again, and that fails" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

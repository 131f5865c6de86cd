"""Our policy losses and our head beside the functions of the installed verl 0.9: values, gradients, metrics.

verl's package imports Ray, which its functions do not use: where Ray is missing, an empty module lets them be imported. No cluster runs.
B responses of at most L tokens, H hidden, V vocabulary.
"""

import importlib
import inspect
import subprocess
import sys
import types
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from actial_fast import integrations
from actial_fast.integrations import verl as ours
from actial_fast.ops import reference
from tests.head_cases import difference

ROOT = Path(__file__).parents[2]
LENGTHS = (6, 1, 9, 0, 4, 7)  # the fourth has no token that counts
L, H, V = 9, 6, 23


def import_verl(name: str) -> types.ModuleType:
    """A module of verl, with an empty Ray for the time of the import where there is none."""
    stand_in = types.ModuleType("ray")
    stand_in.ObjectRef = None
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("ray") is None:
            patch.setitem(sys.modules, "ray", stand_in)
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def core() -> types.ModuleType:
    """verl's losses, as a worker imports them whose environment names our module."""
    if importlib.util.find_spec("verl") is None:
        pytest.skip("verl is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VERL_USE_EXTERNAL_MODULES", ours.__name__)
        patch.delitem(sys.modules, ours.__name__)  # a worker has not imported it yet
        patch.setattr(integrations, "verl", ours)  # and the import's own module does not stay
        return import_verl("verl.trainer.ppo.core_algos")


def config_of(**changes):
    from verl.workers.config import ActorConfig, PolicyLossConfig

    values = {"clip_ratio": 0.2, "clip_ratio_low": 0.1, "clip_ratio_high": 0.15, "clip_ratio_c": 1.4, "tau_neg": 1.3}
    values |= {"policy_loss": PolicyLossConfig(dro_beta=0.3)} | changes
    return ActorConfig(strategy="fsdp", rollout_n=2, use_dynamic_bsz=True, **values)


def make(seed=0, dtype=torch.float32) -> SimpleNamespace:
    """Old log-probs near the policy's, so that the clips are crossed; advantages that differ by token; weights with zeros among them."""
    g = torch.Generator().manual_seed(seed)
    shape = (len(LENGTHS), L)

    def normal(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64)

    logp = -0.05 - 2 * torch.rand(shape, generator=g, dtype=torch.float64)
    weights = (0.4 * normal(*shape)).exp()
    weights[0, 1] = 0
    advantages = normal(*shape)
    advantages[2, 3] = 0
    old = (logp + 0.2 * normal(*shape) + 0.15 * normal(shape[0], 1)).clamp(max=-0.01)
    mask = torch.arange(L) < torch.tensor(LENGTHS)[:, None]
    mask[0, 2] = False
    return SimpleNamespace(logp=logp.to(dtype), old=old.to(dtype), advantages=advantages.to(dtype), weights=weights.to(dtype), mask=mask)


def run(loss_of, c, config, mode="token-mean", weighted=True, mask=None) -> tuple[torch.Tensor, torch.Tensor, dict]:
    logp = c.logp.clone().requires_grad_()
    loss, metrics = loss_of(
        old_log_prob=c.old,
        log_prob=logp,
        advantages=c.advantages,
        response_mask=c.mask if mask is None else mask,
        loss_agg_mode=mode,
        config=config,
        rollout_is_weights=c.weights if weighted else None,
    )
    (1.7 * loss).backward()
    return loss.detach(), logp.grad, metrics


def assert_same(got, want, what) -> None:
    assert got[0].shape == () and got[0].item() == pytest.approx(want[0].item(), rel=1e-5, abs=1e-6), what
    assert difference(got[1], want[1]) < 1e-5, what
    assert got[2].keys() == want[2].keys(), what
    assert got[2] == pytest.approx(want[2], rel=1e-5, abs=1e-6), what
    assert all(type(x) is float for x in got[2].values())


# ---- the policy losses


BATCH = (
    {},
    {"dp_size": 4, "batch_num_tokens": 131, "global_batch_size": 24, "loss_scale_factor": None},
    {"dp_size": 2, "batch_num_tokens": torch.tensor(57), "global_batch_size": torch.tensor(11), "loss_scale_factor": 40},
)


@pytest.mark.parametrize("mode", ours.MODES)
def test_value_gradient_and_metrics_are_those_of_verl(mode, core):
    """All aggregations, with a local and two global batches, with and without rollout weights."""
    theirs, mine = core.get_policy_loss_fn(mode), ours.policy_loss(mode)
    clipped = 0.0
    for seed, (aggregation, batch, weighted) in enumerate(product(ours.AGGREGATIONS, BATCH, (False, True))):
        config, case = config_of(), make(seed)
        config.global_batch_info.update(batch)
        got, want = (run(f, case, config, aggregation, weighted) for f in (mine, theirs))
        assert_same(got, want, (aggregation, batch, weighted))
        assert got[1][~case.mask].abs().max() == 0 < got[1].abs().max()
        clipped += want[2].get("actor/pg_clipfrac", 0.0) + want[2].get("actor/pg_clipfrac_lower", 0.0)
    assert clipped > 0.1 or mode in ("sapo", "gpg", "dro"), "nothing is clipped, so this comparison says little"


@pytest.mark.parametrize("mode", ours.MODES)
@pytest.mark.parametrize(
    "values",
    [
        {"clip_ratio_low": None, "clip_ratio_high": None},
        {"clip_ratio_low": 1.0, "clip_ratio_high": 0.4, "clip_ratio_c": 5.0},
        {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4, "tau_pos": 0.7},
    ],
    ids=["clip_ratio alone", "one-sided", "as in GSPO"],
)
def test_the_fields_of_the_config_are_read_as_verl_reads_them(mode, values, core):
    for seed in range(4):
        config, case = config_of(**values), make(seed)
        got, want = (run(f, case, config) for f in (ours.policy_loss(mode), core.get_policy_loss_fn(mode)))
        assert_same(got, want, values)


@pytest.mark.parametrize("mode", ours.MODES)
@pytest.mark.parametrize("kind", [torch.int64, torch.float32])
def test_masks_may_be_numbers_and_what_they_hide_anything(mode, kind, core):
    case, config = make(), config_of()
    want = run(core.get_policy_loss_fn(mode), case, config)
    case.advantages[~case.mask] = float("nan")
    case.old[~case.mask] = float("inf")
    case.weights[~case.mask] = 0
    got = run(ours.policy_loss(mode), case, config, mask=case.mask.to(kind))
    assert got[1][~case.mask].abs().max() == 0
    assert_same(got, want, kind)


@pytest.mark.parametrize("mode", ours.MODES)
def test_far_from_the_old_policy(mode, core):
    """Ratios from 1e-9 to the bounds that verl puts on log-ratios."""
    case = make()
    case.old = case.logp - torch.linspace(-19, 9.5, L)
    config = config_of(clip_ratio_c=3.0)
    got, want = (run(f, case, config) for f in (ours.policy_loss(mode), core.get_policy_loss_fn(mode)))
    assert_same(got, want, mode)


def test_beyond_its_bound_a_sequence_ratio_has_no_gradient(core):
    case, config = make(), config_of()
    case.old = case.logp - 11.0
    got, want = (run(f, case, config) for f in (ours.policy_loss("gspo"), core.get_policy_loss_fn("gspo")))
    assert got[0].item() == pytest.approx(want[0].item(), rel=1e-5)
    assert want[1].abs().max() == got[1].abs().max() == 0


def test_a_micro_batch_without_tokens_gives_zero():
    case, config = (
        make(),
        SimpleNamespace(clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=None, global_batch_info={}, get=lambda *_: 3.0),
    )
    for aggregation in ours.AGGREGATIONS:
        loss, grad, metrics = run(ours.policy_loss("vanilla"), case, config, aggregation, mask=torch.zeros_like(case.mask))
        assert loss == 0 and grad.abs().max() == 0 and set(metrics.values()) == {0.0}


def test_aggregation_weights_are_those_of_agg_loss(core):
    case = make()
    for aggregation, batch in product(ours.AGGREGATIONS, BATCH):
        want = core.agg_loss(case.old, case.mask, aggregation, **batch)
        got = (ours.aggregation_weights(case.mask, aggregation, **batch) * case.old).sum()
        assert got.item() == pytest.approx(want.item(), rel=1e-5)


def test_verl_has_them_where_its_variable_names_our_module(core):
    """The fixture imports verl that way, and this test comes before the one that registers them by hand."""
    assert [core.get_policy_loss_fn(f"actial_{mode}").__name__ for mode in ours.MODES] == [f"policy_loss_{mode}" for mode in ours.MODES]
    assert core.get_policy_loss_fn("actial_gspo").__globals__ is not vars(ours), "registered by hand, so this says nothing"


def test_losses_are_registered_beside_those_of_verl(core):
    before = dict(core.POLICY_LOSS_REGISTRY)
    names = ours.register()
    assert names == tuple(f"actial_{mode}" for mode in ours.MODES)
    assert all(core.get_policy_loss_fn(mode) is function for mode, function in before.items() if not mode.startswith("actial_"))
    config, case = config_of(), make()
    for mode in ours.MODES:
        assert_same(run(core.get_policy_loss_fn(f"actial_{mode}"), case, config), run(core.get_policy_loss_fn(mode), case, config), mode)
    others = set(before) - set(ours.MODES) - set(names)
    assert others == {"clip_cov", "kl_cov", "geo_mean", "bypass_mode"}, "verl has losses that are neither ours nor known to be none of ours"
    for mode in others:
        with pytest.raises(ValueError, match=f"'{mode}' has no GRPOSpec that equals it; supported are vanilla, dppo_tv, dppo_kl, gspo"):
            ours.policy_loss(mode)
        with pytest.raises(ValueError, match=f"Unsupported loss mode: actial_{mode}"):
            core.get_policy_loss_fn(f"actial_{mode}")


def test_in_the_loss_of_verls_workers(core):
    """verl's `ppo_loss`, from nested log-probs, with entropy and KL beside the policy loss: ours chosen by its name in the config."""
    losses = import_verl("verl.workers.utils.losses")
    from tensordict import TensorDict
    from verl.utils import tensordict_utils
    from verl.workers.config import PolicyLossConfig

    ours.register()
    g = torch.Generator().manual_seed(1)
    prompts, responses = (3, 2, 4), (5, 7, 1)

    def nested(lengths, make=lambda n: -torch.rand(n, generator=g)):
        return torch.nested.as_nested_tensor([make(n) for n in lengths], layout=torch.jagged)

    rows = {name: nested(responses) for name in ("old_log_probs", "ref_log_prob", "advantages", "rollout_is_weights")}
    ids = {"prompts": nested(prompts), "responses": nested(responses), "response_mask": nested(responses, torch.ones)}
    flat = [-torch.rand(p + r, generator=g) for p, r in zip(prompts, responses, strict=True)]
    outcomes = []
    for name in ("vanilla", "actial_vanilla"):
        data = TensorDict({**rows, **ids}, batch_size=[3])
        tensordict_utils.assign_non_tensor(data, dp_size=2, batch_num_tokens=30, global_batch_size=6, max_response_len=7)
        config = config_of(use_kl_loss=True, entropy_coeff=0.01, policy_loss=PolicyLossConfig(loss_mode=name))
        leaves = [x.clone().requires_grad_() for x in flat]
        output = {"log_probs": leaves, "entropy": [0.1 * x for x in leaves]}
        output = {name: torch.nested.as_nested_tensor(x, layout=torch.jagged) for name, x in output.items()}
        loss, metrics = losses.ppo_loss(config, output, data)
        loss.backward()
        logged = {key: x.aggregate() if hasattr(x, "aggregate") else x for key, x in metrics.items()}
        outcomes.append((loss.detach(), torch.cat([x.grad for x in leaves]), logged))
    want, got = outcomes
    assert got[0].item() == pytest.approx(want[0].item(), rel=1e-5) and difference(got[1], want[1]) < 1e-5
    assert got[2] == pytest.approx(want[2], rel=1e-5, abs=1e-7) and {"actor/pg_loss", "actor/pg_clipfrac_lower"} < got[2].keys()


def test_without_verl_the_module_loads_and_says_what_is_missing():
    code = (
        "import sys; sys.modules['verl'] = None\n"
        "from actial_fast.integrations import verl as ours\n"
        "assert 'transformers' not in sys.modules and callable(ours.policy_loss('gspo'))\n"
        "for f in (ours.register, ours.patch_verl):\n"
        "    try: f()\n"
        "    except ImportError as error: print(error)\n"
        "ours.unpatch_verl()"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    lines = out.stdout.splitlines()
    assert len(lines) == 2 and all("needs verl 0.9" in line and "pip install verl==0.9.1" in line for line in lines), out.stderr


def test_rejections(core):
    case, loss = make(), ours.policy_loss("vanilla")
    with pytest.raises(ValueError, match="config: needed"):
        run(loss, case, None)
    with pytest.raises(ValueError, match=r"loss_agg_mode: 'mean' is not supported; supported are token-mean, token-sum"):
        run(loss, case, config_of(), "mean")
    with pytest.raises(ValueError, match="dual_clip: must be > 1"):
        run(loss, case, config_of(clip_ratio_c=1.0))
    from verl.workers.config import PolicyLossConfig

    with pytest.raises(ValueError, match=r"dro_beta: must be > 0 for dro, got None"):
        run(ours.policy_loss("dro"), case, config_of(policy_loss=PolicyLossConfig()))
    for aggregation, name in (("token-mean", "batch_num_tokens"), ("seq-mean-token-sum", "global_batch_size")):
        config = config_of()
        config.global_batch_info["dp_size"] = 2
        with pytest.raises(ValueError, match=f"{name}: needed for {aggregation} with dp_size = 2"):
            run(loss, case, config, aggregation)
    case.weights = case.weights[:, 1:]
    with pytest.raises(ValueError, match=r"rollout_is_weights: expected \(6, 9\) like log_prob, got \(6, 8\)"):
        run(loss, case, config_of())


# ---- the head


def head(dtype=torch.float32, shape=(3, 7), seed=0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(*size, generator=g).to(dtype).requires_grad_() for size in ((*shape, H), (V, H)))
    return hidden, weight, torch.randint(0, V, shape, generator=g)


def gradients(logp, entropy, hidden, weight):
    g = torch.Generator().manual_seed(2)
    loss = (logp * torch.randn(logp.shape, generator=g)).sum() + (entropy * torch.randn(entropy.shape, generator=g)).sum()
    return torch.autograd.grad(loss, (hidden, weight))


@pytest.mark.parametrize("labels", [torch.int64, torch.int32])
@pytest.mark.parametrize("shape", [(3, 7), (1, 21), (21,)], ids=["padded", "packed", "rows"])
def test_log_probs_and_entropies_are_those_of_verls_torch_backend(shape, labels, core):
    """FusedLinearForPPO is verl's other head, and its only one on a CPU; the triton one returns the same numbers, flat."""
    theirs = import_verl("verl.utils.experimental.torch_functional").FusedLinearForPPO(chunk_size=5)
    hidden, weight, ids = head(shape=shape)
    logp, entropy = ours.linear_cross_entropy(hidden, weight, ids.to(labels), 0.7, "none")
    want_logp, want_entropy = (x.flatten() for x in theirs(hidden, weight, ids, 0.7))
    assert logp.shape == entropy.shape == (21,) and logp.dtype == entropy.dtype == torch.float32
    assert difference(logp.detach(), want_logp.detach()) < 1e-5 and difference(entropy.detach(), want_entropy.detach()) < 1e-5
    got, want = gradients(logp, entropy, hidden, weight), gradients(want_logp, want_entropy, hidden, weight)
    assert all(difference(a, b) < 1e-5 and a.shape == b.shape for a, b in zip(got, want, strict=True))


def test_reductions():
    hidden, weight, ids = head()
    logp, entropy = ours.linear_cross_entropy(hidden, weight, ids)
    for reduction, want in (("sum", logp.sum()), ("mean", logp.mean()), ("MEAN", logp.mean())):
        got, same = ours.linear_cross_entropy(hidden, weight, ids, 1.0, reduction)
        assert got.shape == () and torch.equal(got, want) and torch.equal(same, entropy)
    want, _ = reference.linear_logprob(hidden.flatten(0, 1).double(), weight.double(), ids.flatten())
    assert difference(logp.detach(), want.detach()) < 1e-6


def test_labels_of_minus_100_are_none():
    hidden, weight, ids = head()
    gone = torch.rand(ids.shape, generator=torch.Generator().manual_seed(4)) < 0.4
    left = ~gone.flatten()
    few, few_entropy = ours.linear_cross_entropy(hidden.flatten(0, 1)[left], weight, ids.flatten()[left], 0.7)
    logp, entropy = ours.linear_cross_entropy(hidden, weight, ids.masked_fill(gone, -100), 0.7)
    assert (
        torch.equal(logp[left], few)
        and torch.equal(entropy[left], few_entropy)
        and (logp[~left] == 0).all()
        and (entropy[~left] == 0).all()
    )
    mean, _ = ours.linear_cross_entropy(hidden, weight, ids.masked_fill(gone, -100), 0.7, "mean")
    assert mean.item() == pytest.approx(few.mean().item(), rel=1e-6)
    want, got = (torch.autograd.grad(x, [hidden, weight]) for x in (few.mean(), mean))
    assert all(difference(a, b) < 1e-6 for a, b in zip(got, want, strict=True)) and (got[0].flatten(0, 1)[~left] == 0).all()


def test_the_signature_is_that_of_verls_function_and_the_patch_takes_its_place(core):
    module = import_verl("verl.utils.kernel.linear_cross_entropy")
    want = [(p.name, p.default) for p in list(inspect.signature(module.LinearCrossEntropy.forward).parameters.values())[1:]]
    assert [(p.name, p.default) for p in inspect.signature(ours.linear_cross_entropy).parameters.values()] == want
    real = module.linear_cross_entropy
    ours.patch_verl()
    ours.patch_verl()
    assert module.linear_cross_entropy is ours.linear_cross_entropy
    ours.unpatch_verl()
    assert module.linear_cross_entropy == real
    ours.unpatch_verl()


def test_a_model_of_verl_with_fused_kernels_runs_on_our_head(core):
    """verl's forward of a dense model with the triton backend, which on a CPU runs with the patch only, beside its torch backend."""
    models = import_verl("verl.models.transformers.dense_common")
    hidden, weight, ids = head(shape=(1, 21))
    model = SimpleNamespace(lm_head=SimpleNamespace(weight=weight), model=None)
    with pytest.MonkeyPatch.context() as patch:
        outputs = type("Outputs", (tuple,), {"past_key_values": None, "hidden_states": None, "attentions": None})((hidden,))
        patch.setattr(models, "forward_base_model", lambda *args, **kwargs: outputs)
        want = models.forward_with_torch_backend(model, input_ids=ids, return_dict=True, temperature=0.8)
        ours.patch_verl()
        try:
            got = models.forward_with_triton_backend(model, input_ids=ids, return_dict=True, temperature=0.8)
        finally:
            ours.unpatch_verl()
    assert difference(got.log_probs.detach(), want.log_probs.detach().flatten()) < 1e-5
    assert difference(got.entropy.detach(), want.entropy.detach().flatten()) < 1e-5


def test_in_bf16_a_policy_that_has_not_moved_clips_nothing(core):
    """Old, reference and policy log-probs of verl's engines come through the one function that is patched: scored without gradients or
    with, in other batches, they are the same."""
    config = config_of(clip_ratio=3e-4, clip_ratio_low=3e-4, clip_ratio_high=3e-4)
    hidden, weight, ids = head(torch.bfloat16, shape=(len(LENGTHS), L))
    with torch.no_grad():
        old = torch.cat([ours.linear_cross_entropy(hidden[i : i + 2], weight, ids[i : i + 2], 0.7)[0] for i in (0, 2, 4)]).view(ids.shape)
    logp = ours.linear_cross_entropy(hidden, weight, ids, 0.7)[0].view(ids.shape)
    assert (old - logp).abs().max() < 1e-5
    c = make()
    for mode in ("vanilla", "gspo"):
        _, metrics = ours.policy_loss(mode)(old, logp, c.advantages, c.mask, "token-mean", config)
        assert metrics["actor/pg_clipfrac"] == 0 and abs(metrics["actor/ppo_kl"]) < 1e-5, metrics


def test_heads_that_are_not_supported(monkeypatch):
    hidden, weight, ids = head()
    with pytest.raises(ValueError, match="reduction: 'max' is not supported; supported are none, sum, mean"):
        ours.linear_cross_entropy(hidden, weight, ids, 1.0, "max")
    with pytest.raises(ValueError, match=r"labels: expected \(3, 7\) to fit hidden, got \(7, 3\)"):
        ours.linear_cross_entropy(hidden, weight, ids.T)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: group)
    with pytest.raises(ValueError, match="a vocabulary split over ranks is not supported"):
        ours.linear_cross_entropy(hidden, weight, ids, 1.0, "none", 2)
    assert ours.linear_cross_entropy(hidden, weight, ids, 1.0, "none", 1)[0].shape == (21,)


@pytest.mark.gpu
def test_beside_verls_kernels_on_cuda(core):
    theirs = import_verl("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*size, generator=g).cuda().bfloat16().requires_grad_() for size in ((1, 300, 256), (1537, 256)))
    ids = torch.randint(0, 1537, (1, 300), generator=g).cuda()
    exact, exact_entropy = reference.linear_logprob(hidden[0].double(), weight.double(), ids[0], temperature=0.7)
    for side, function in (("ours", ours.linear_cross_entropy), ("theirs", theirs)):
        logp, entropy = function(hidden, weight, ids, 0.7, "none")
        assert logp.shape == entropy.shape == (300,) and logp.dtype == torch.float32, side
        assert difference(logp.double(), exact) < 1e-2 and difference(entropy.double(), exact_entropy) < 1e-2, side

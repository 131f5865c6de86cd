"""Calls with something wrong or unusual in them, on both paths: the CPU's and the Triton kernels' (interpreted here, on CPU tensors).

The same must come of a call wherever it runs: values, which entries of values and gradients are finite, or the error and its message.
Each runs with values that the host may read, as on a CPU, and, where the checks at the door are what sees the fault, with values that it
may not read, as on CUDA.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from actial_fast import ops
from actial_fast.ops import checks, library
from actial_fast.ops.spec import AdvantageSpec, GRPOSpec

T, H, V = 12, 16, 300  # V: three parts of 128 columns, or five of 64
NAN, INF = math.nan, math.inf
INPLACE = "modified by an inplace operation"
ENTROPY = GRPOSpec(beta=0, entropy_coef=0.1)
pytestmark = pytest.mark.usefixtures("poisoned")
Calls = dict[str, Callable[[SimpleNamespace], list[Tensor]]]


def make(dtype=torch.float32) -> SimpleNamespace:
    g = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=g)  # noqa: E731
    c = SimpleNamespace(hidden=draw(T, H), weight=draw(V, H) / 4, bias=0.3 * draw(V), ref_hidden=draw(T, H), ref_weight=draw(V, H) / 4)
    c = SimpleNamespace(**{name: x.to(dtype).requires_grad_() for name, x in vars(c).items()})
    c.logits = (c.hidden @ c.weight.T).detach().clone().requires_grad_()
    c.targets = torch.randint(0, 60, (T,), generator=g)
    logp = ops.linear_logprob(c.hidden.detach(), c.weight.detach(), c.targets)[0]
    c.old_logp, c.ref_logp, c.sampler_logp = (logp + 0.3 * draw(T) for _ in range(3))
    c.advantages, c.token_weight = draw(T), torch.rand(T, generator=g) / T
    c.token_weight[[3, 8]] = 0
    c.temperature, c.cu_seqlens = 0.5 + torch.rand(T, generator=g), torch.tensor([0, 5, 5, T])
    c.rewards, c.groups = torch.randn(T, generator=g), torch.arange(T) // 4
    return c


LEAVES = ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "logits")


def with_gradients(c, *outputs: Tensor | None) -> list[Tensor]:
    """The outputs, and the gradients of the sum of all that have one."""
    found = [x for x in outputs if x is not None]
    total = sum((x.sum() for x in found if x.requires_grad), start=torch.zeros(()))
    grads = torch.autograd.grad(total, [getattr(c, name) for name in LEAVES], allow_unused=True, materialize_grads=True)
    return [*(x.detach() for x in found), *grads]


def grpo(c, spec: GRPOSpec, logits: bool = False, **more) -> ops.GRPOLoss:
    given = dict(targets=c.targets, advantages=c.advantages, old_logp=c.old_logp, ref_logp=c.ref_logp if spec.beta else None)
    given |= dict(token_weight=c.token_weight, cu_seqlens=c.cu_seqlens) | more
    if logits:
        return ops.grpo_loss_from_logits(c.logits, spec=spec, **given)
    return ops.linear_grpo_loss(c.hidden, c.weight, spec=spec, **given)


def cross_entropy(c, **more) -> Tensor:
    return ops.linear_cross_entropy(c.hidden, c.weight, c.targets, c.token_weight, **more)


def logprob(c, **more) -> tuple[Tensor, Tensor | None]:
    return ops.linear_logprob(c.hidden, c.weight, c.targets, **more)


def several(c, **more) -> tuple[Tensor, Tensor | None]:
    """Of three targets a row, the middle one of which is the row's own and the last another row's."""
    return ops.linear_logprob(c.hidden, c.weight, torch.stack((c.targets.flip(0) % 7, c.targets, c.targets.roll(1)), 1), **more)


def few(c, **more) -> tuple[Tensor, Tensor | None]:
    """Of three rows, since a search in the interpreter takes its time, over what a sampler keeps."""
    return ops.linear_logprob(c.hidden[2:5], c.weight, c.targets[2:5], **more)


def kl(c, **more) -> Tensor:
    return ops.linear_kl(c.hidden, c.weight, c.ref_hidden, c.ref_weight, **more)


EVERY: dict[str, Callable[[SimpleNamespace], Tensor]] = {  # one differentiable result of each op
    "linear_logprob": lambda c: logprob(c, bias=c.bias, temperature=c.temperature)[0].sum(),
    "linear_logprob, several": lambda c: several(c, bias=c.bias, temperature=c.temperature)[0].sum(),
    "linear_cross_entropy": lambda c: cross_entropy(c, bias=c.bias),
    "linear_grpo_loss": lambda c: grpo(c, GRPOSpec(beta=0.1), temperature=c.temperature).loss,
    "linear_kl": lambda c: kl(c, temperature=c.temperature).sum(),
    "logprob_from_logits": lambda c: ops.logprob_from_logits(c.logits, c.targets, temperature=c.temperature)[0].sum(),
    "grpo_loss_from_logits": lambda c: grpo(c, GRPOSpec(beta=0.1), True, temperature=c.temperature).loss,
    "grpo_loss_from_logits, sequences": lambda c: grpo(c, GRPOSpec.named("gspo"), True, temperature=c.temperature).loss,
    "token_kl": lambda c: ops.token_kl(c.hidden[:, 0], c.ref_hidden[:, 0]).sum(),
}


# ---- changes to a case; then what is called


def put(**values: tuple[int, float]) -> Callable[[SimpleNamespace], None]:
    """Writes a value into a row of arguments."""

    def change(c: SimpleNamespace) -> None:
        with torch.no_grad():
            for name, (row, value) in values.items():
                getattr(c, name)[row] = value

    return change


def banned(c: SimpleNamespace) -> None:
    """No probability for two whole parts of the vocabulary."""
    with torch.no_grad():
        c.bias[128:256] = -INF


LOSSES = {
    "dapo": lambda c: with_gradients(c, *grpo(c, GRPOSpec.named("dapo"))),
    "k1": lambda c: with_gradients(c, *grpo(c, GRPOSpec(beta=0.1, kl="k1"))),
    "k2": lambda c: with_gradients(c, *grpo(c, GRPOSpec(beta=0.1, kl="k2"))),
    "k3, two-sided": lambda c: with_gradients(c, *grpo(c, GRPOSpec(beta=0.1, clip_delta=1.5, dual_clip=2.0))),
    "entropy": lambda c: with_gradients(c, *grpo(c, ENTROPY, entropy_weight=c.token_weight)),
    "cispo": lambda c: with_gradients(c, *grpo(c, GRPOSpec.named("cispo"))),
    "sapo": lambda c: with_gradients(c, *grpo(c, GRPOSpec.named("sapo"))),
    "gspo": lambda c: with_gradients(c, *grpo(c, GRPOSpec.named("gspo", beta=0.1))),
    "vespo": lambda c: with_gradients(c, *grpo(c, GRPOSpec.named("vespo"), sampler_logp=c.sampler_logp)),
    "importance": lambda c: with_gradients(c, *grpo(c, GRPOSpec(importance="sequence_mask"), sampler_logp=c.sampler_logp)),
    "logits": lambda c: with_gradients(c, *grpo(c, GRPOSpec(beta=0.1), True)),
    "logits, gspo": lambda c: with_gradients(c, *grpo(c, GRPOSpec.named("gspo"), True)),
    "cross-entropy": lambda c: with_gradients(c, cross_entropy(c, bias=c.bias)),
}
LOGPROB: Calls = {
    "log-prob": lambda c: with_gradients(c, *logprob(c, softcap=4.0)),
    "several": lambda c: with_gradients(c, *several(c, softcap=4.0)),
    "kept": lambda c: with_gradients(c, *few(c, top_p=0.9)),
    "log-prob from logits": lambda c: with_gradients(c, *ops.logprob_from_logits(c.logits, c.targets)),
}
MASKED: Calls = {
    "dapo, dense": lambda c: with_gradients(c, *grpo(c, GRPOSpec.named("dapo"), skip_zero_rows=False)),
    "kl, compact": lambda c: with_gradients(c, *grpo(c, GRPOSpec(beta=0.1), skip_zero_rows=True)),
    "entropy_weight": lambda c: with_gradients(c, *grpo(c, ENTROPY, entropy_weight=c.advantages)),
    "log-prob": lambda c: with_gradients(c, *(torch.where(c.token_weight != 0, x, 0) for x in logprob(c, softcap=4.0))),
    "several": lambda c: with_gradients(c, *(torch.where(c.token_weight != 0, x.T, 0) for x in several(c, softcap=4.0))),
    "kept": lambda c: with_gradients(c, *(torch.where(c.token_weight[2:5] != 0, x, 0) for x in few(c, top_p=0.9))),
    "log-prob from logits": lambda c: with_gradients(
        c, *(torch.where(c.token_weight != 0, x, 0) for x in ops.logprob_from_logits(c.logits, c.targets))
    ),
    "exact kl": lambda c: with_gradients(c, torch.where(c.token_weight != 0, kl(c), 0)),
}


def some(*names: str) -> Calls:
    return {name: LOSSES[name] for name in names}


FAULTY_TARGET = some("k1", "gspo", "logits", "logits, gspo", "cross-entropy")
FAULTY_ADVANTAGE = some("dapo", "cispo", "sapo", "vespo", "logits, gspo")
CASES: dict[str, tuple[Callable[[SimpleNamespace], None], Calls]] = {
    "a part of the vocabulary without probability": (
        banned,
        {
            "entropy": lambda c: with_gradients(c, *logprob(c, bias=c.bias, temperature=c.temperature)),
            "loss": lambda c: with_gradients(c, *grpo(c, ENTROPY, bias=c.bias)),
            "several": lambda c: with_gradients(c, *several(c, bias=c.bias, temperature=c.temperature)),
            "kept": lambda c: with_gradients(c, *few(c, top_k=250, bias=c.bias)),
        },
    ),
    "a masked row of NaN": (
        put(hidden=(3, NAN), old_logp=(3, NAN), ref_logp=(3, NAN), advantages=(3, NAN), sampler_logp=(8, INF), logits=(3, NAN)),
        LOSSES | MASKED,
    ),
    "a row of NaN": (put(hidden=(2, NAN), logits=(2, NAN)), some("dapo", "gspo", "logits", "logits, gspo") | LOGPROB),
    "old_logp NaN": (put(old_logp=(2, NAN)), some("dapo", "k3, two-sided", "cispo", "sapo", "gspo", "vespo", "logits")),
    "old_logp -inf": (put(old_logp=(2, -INF)), some("dapo", "gspo", "vespo")),
    "old_logp inf": (put(old_logp=(2, INF)), some("dapo", "gspo", "vespo")),
    "ref_logp NaN": (put(ref_logp=(2, NAN)), some("k1", "k2", "k3, two-sided", "gspo", "logits")),
    "sampler_logp NaN": (put(sampler_logp=(2, NAN)), some("vespo", "importance")),
    "advantages NaN": (put(advantages=(2, NAN)), FAULTY_ADVANTAGE),
    "advantages infinite": (put(advantages=(2, INF)), FAULTY_ADVANTAGE),
    "token_weight NaN": (put(token_weight=(2, NAN)), some("k1", "gspo", "cross-entropy")),
    "a masked target of -7": (put(targets=(3, -7)), FAULTY_TARGET),
    "a target of -7": (put(targets=(2, -7)), FAULTY_TARGET | LOGPROB),
    "no label, masked": (put(targets=(3, -100)), FAULTY_TARGET),
    "no label in a row of NaN, masked by it": (
        put(targets=(2, -100), hidden=(2, NAN), logits=(2, NAN), old_logp=(2, NAN), ref_logp=(2, NAN), advantages=(2, INF)),
        LOSSES | {name: call for name, call in LOGPROB.items() if name != "several"},
    ),
    "no label among several, masked by it": (put(targets=(2, -100)), {"several": LOGPROB["several"]}),
    "a target of 2**32 + 5": (put(targets=(2, 2**32 + 5)), FAULTY_TARGET | LOGPROB),
    "a masked target of 2**32 + 5": (put(targets=(3, 2**32 + 5)), some("k1", "logits")),
}
KINDS = {
    "sum": AdvantageSpec(),
    "undivided": AdvantageSpec(scale="none"),
    "batch": AdvantageSpec(scale="batch_std"),
    "each": AdvantageSpec(combine="normalize_then_sum"),
}
for value in (INF, -INF):
    CASES[f"a reward of {value}"] = (
        put(rewards=(5, value)),
        {kind: lambda c, spec=spec: [ops.group_advantages(c.rewards, c.groups, spec)] for kind, spec in KINDS.items()},
    )
FLAT = [(case, call) for case, (_, calls) in CASES.items() for call in calls]


def outcome(call: Callable[[], list[Tensor]]) -> tuple[list[Tensor], str]:
    try:
        return call(), ""
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        return [], told[: told.find(INPLACE) + len(INPLACE)] if INPLACE in told else told  # which tensor, and how often, is the path's


def on_both(monkeypatch, call: Callable[[SimpleNamespace], list[Tensor]], dtype=torch.float32, change=None) -> tuple[list[Tensor], str]:
    """The kernels' outcome, the same as the CPU path's."""
    results = []
    for kernels in (False, True):
        with monkeypatch.context() as patch:
            case = make(dtype)
            if change is not None:
                change(case)
            patch.setattr(library, "on_gpu", lambda x, kernels=kernels: kernels)
            results.append(outcome(lambda case=case: call(case)))
    (cpu, said), (ours, told) = results
    assert told == said
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for i, (a, b) in enumerate(zip(ours, cpu, strict=True)):
        assert torch.equal(a.isfinite(), b.isfinite()), f"output {i}: other entries are finite"
        finite = b.isfinite()
        torch.testing.assert_close(a[finite], b[finite], **tolerance, msg=lambda text, i=i: f"output {i}: {text}")
    return ours, told


@pytest.mark.parametrize(("case", "call"), FLAT, ids=[f"{case}-{call}" for case, call in FLAT])
def test_the_same_comes_of_a_call_on_both_paths(case, call, monkeypatch):
    change, calls = CASES[case]
    got, told = on_both(monkeypatch, calls[call], change=change)
    assert told.startswith("ValueError: targets: expected ids in") or not case.startswith("a target of"), "the host could read it"
    if told or case in ("a reward of inf", "a reward of -inf"):
        monkeypatch.setattr(checks, "_readable", lambda x: False)
        got, _ = on_both(monkeypatch, calls[call], change=change)
    masked = "masked" in case or case in ("a part of the vocabulary without probability", "sampler_logp NaN")
    if masked or told:
        values = got[0] if "reward" in case else torch.cat([x.flatten() for x in got[-len(LEAVES) :]])
        assert bool(values.isfinite().all()) == masked, "a fault in rows that count shows in the gradient, and one in masked rows does not"


@pytest.mark.parametrize("call", ["k1", "cross-entropy", "entropy", "dapo", "log-prob"])
def test_a_fault_in_half_precision(call, monkeypatch):
    """Other tiles, parts and products."""
    change, calls = CASES["a masked row of NaN"]
    got, told = on_both(monkeypatch, calls[call], torch.bfloat16, change)
    assert not told and all(x.isfinite().all() for x in got[-len(LEAVES) :])
    got, told = on_both(monkeypatch, lambda c: with_gradients(c, *logprob(c, bias=c.bias)), torch.bfloat16, banned)
    assert not told and all(x.isfinite().all() for x in got[1:])


# ---- settings

SETTINGS: Calls = {
    "softcap inf": lambda c: with_gradients(c, cross_entropy(c, softcap=INF)),
    "softcap NaN": lambda c: with_gradients(c, *logprob(c, softcap=NAN)),
    "workspace_mb inf": lambda c: with_gradients(c, *grpo(c, ENTROPY, workspace_mb=INF)),
    "workspace_mb NaN": lambda c: with_gradients(c, kl(c, workspace_mb=NAN)),
    "temperature 1e-45": lambda c: with_gradients(c, *logprob(c, temperature=1e-45)),
    "temperature inf": lambda c: with_gradients(c, *logprob(c, temperature=INF)),
    "temperature 0": lambda c: with_gradients(c, *logprob(c, temperature=0)),
    "temperature NaN": lambda c: with_gradients(c, *ops.logprob_from_logits(c.logits, c.targets, temperature=NAN)),
    "temperature of a row 1e-45": lambda c: with_gradients(c, kl(c, temperature=torch.full((T,), 1e-45))),
}
HOT = {
    f"{kind} {temperature}": lambda c, call=call, temperature=temperature: with_gradients(c, *call(c, temperature))
    for temperature in (1.1e-30, 9e29)
    for kind, call in {
        "head": lambda c, temperature: logprob(c, temperature=temperature),
        "softcap": lambda c, temperature: logprob(c, temperature=temperature, softcap=4.0),
        "rows": lambda c, temperature: logprob(c, temperature=torch.full((T,), temperature), softcap=4.0),
        "logits": lambda c, temperature: ops.logprob_from_logits(c.logits, c.targets, temperature=temperature),
        "exact": lambda c, temperature: [kl(c, temperature=temperature)],
    }.items()
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_that_means_nothing_is_named(setting, monkeypatch):
    _, told = on_both(monkeypatch, SETTINGS[setting])
    name, value = setting.split()[0], setting.split()[-1]
    range_of = name == "temperature" and value in ("1e-45", "inf")
    assert told.startswith(f"ValueError: {name}: must be {'in [1e-30, 1e+30]' if range_of else '> 0'}"), told


@pytest.mark.parametrize("call", HOT)
def test_temperatures_at_the_ends_give_numbers(call, monkeypatch):
    got, told = on_both(monkeypatch, HOT[call])
    assert not told and all(x.isfinite().all() for x in got)


# ---- autograd

CHANGED = {
    "linear_logprob": ("hidden", "weight", "bias", "temperature"),  # targets: a copy, without -100
    "linear_kl": ("hidden", "weight", "ref_hidden", "ref_weight", "temperature"),
    "logprob_from_logits": ("logits", "temperature"),
}


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, names in CHANGED.items() for name in names])
def test_an_input_changed_before_the_backward_is_an_error(op, name, monkeypatch):
    def call(c):
        out = EVERY[op](c)
        with torch.no_grad():
            getattr(c, name).add_(1)
        return with_gradients(c, out)

    _, told = on_both(monkeypatch, call)
    assert INPLACE in told


@pytest.mark.parametrize("op", ["linear_logprob", "linear_logprob, several", "logprob_from_logits"])
def test_targets_may_change_before_the_backward(op, monkeypatch):
    def call(c, change):
        out = EVERY[op](c)
        c.targets.add_(change)
        return with_gradients(c, out)

    (want, _), (got, told) = (on_both(monkeypatch, lambda c, change=change: call(c, change)) for change in (0, 1))
    assert not told and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("op", ["linear_cross_entropy", "linear_grpo_loss"])
def test_a_loss_has_its_gradients_before_an_input_changes(op, monkeypatch):
    def call(c, change):
        out = EVERY[op](c)
        with torch.no_grad():
            for name in ("hidden", "weight", "bias", "temperature", "token_weight")[: 5 * change]:
                getattr(c, name).add_(1)
        return with_gradients(c, out)

    (want, _), (got, _) = (on_both(monkeypatch, lambda c, change=change: call(c, change)) for change in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("op", EVERY)
def test_any_number_of_backward_passes(op, monkeypatch):
    def call(c):
        out = EVERY[op](c)
        leaves = [x for x in (getattr(c, name) for name in LEAVES)]
        passes = [torch.autograd.grad(k * out, leaves, retain_graph=True, allow_unused=True, materialize_grads=True) for k in (1, 3, 1)]
        (2 * out).backward()
        last = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
        for first, again, third, two in zip(*passes, last, strict=True):
            torch.testing.assert_close([again, third, two], [3 * first, first, 2 * first])
        assert any(x.any() for x in last)
        return last

    assert not on_both(monkeypatch, call)[1]


@pytest.mark.parametrize("losses", [cross_entropy, lambda c, **more: grpo(c, GRPOSpec(), **more).loss], ids=["cross-entropy", "grpo"])
def test_a_buffer_is_added_to_once(losses, monkeypatch):
    def call(c):
        loss = losses(c, weight_grad=torch.zeros(V, H))
        loss.backward(retain_graph=True)
        loss.backward()
        return []

    assert on_both(monkeypatch, call)[1].startswith("RuntimeError: weight_grad: the head's gradient was added to it once")


@pytest.mark.parametrize("op", [lambda c: ops.logprob_from_logits(c.logits, c.targets, inplace_backward=True)[0].sum(),
                                lambda c: grpo(c, GRPOSpec(beta=0.1), True, inplace=True).loss], ids=["log-prob", "loss"])  # fmt: skip
def test_a_gradient_in_place_of_the_logits_is_had_once(op, monkeypatch):
    def call(c):
        leaf, c.logits = c.logits, c.logits + 0
        loss = 2 * op(c)
        loss.backward(retain_graph=True)
        assert leaf.grad.any()
        loss.backward()
        return []

    assert INPLACE in on_both(monkeypatch, call)[1]


@pytest.mark.parametrize("op", EVERY)
def test_hooks_see_what_is_saved(op, monkeypatch):
    """As activation offloading needs them: what is handed back is another tensor, and nothing else is kept."""

    def call(c):
        packed = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x.clone(), lambda x: x):
            out = EVERY[op](c)
        assert packed
        return with_gradients(c, out)

    got, told = on_both(monkeypatch, call)
    want, _ = on_both(monkeypatch, lambda c: with_gradients(c, EVERY[op](c)))
    assert not told and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("op", EVERY)
def test_a_second_derivative_is_refused(op, monkeypatch):
    """Silently, it would be that of a constant."""

    def call(c):
        first = torch.autograd.grad(EVERY[op](c), [getattr(c, name) for name in LEAVES], create_graph=True, allow_unused=True)
        plain = torch.autograd.grad(EVERY[op](c), [getattr(c, name) for name in LEAVES], allow_unused=True)
        for a, b in zip(first, plain, strict=True):
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b))
        sum(x.square().sum() for x in first if x is not None).backward()
        return []

    assert "are differentiable once" in on_both(monkeypatch, call)[1]


@pytest.mark.parametrize("op", ["linear_logprob", "linear_grpo_loss", "linear_kl", "logprob_from_logits"])
def test_checkpoints_recompute(op, monkeypatch):
    def call(c):
        return with_gradients(c, checkpoint(lambda: EVERY[op](c), use_reentrant=False))

    got, told = on_both(monkeypatch, call)
    want, _ = on_both(monkeypatch, lambda c: with_gradients(c, EVERY[op](c)))
    assert not told and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_rewards_in_16_bits_are_taken_for_what_they_hold(monkeypatch):
    rewards, groups = torch.tensor([0.1, 0.2, 0.3, 1.0, 0.0, 1.0]).bfloat16(), torch.tensor([0, 0, 0, 1, 1, 1])
    for spec in KINDS.values():
        (got,), told = on_both(monkeypatch, lambda c, spec=spec: [ops.group_advantages(rewards, groups, spec)])
        assert not told and got.dtype == torch.float32
        torch.testing.assert_close(got.double(), ops.group_advantages(rewards.double(), groups, spec), rtol=1e-5, atol=1e-6)

"""Targets of -100, transformers' and PyTorch's "no label here": each op gives what it gives for the other rows alone.

On the CPU's path, on the kernels (interpreted here) and compiled, forward and backward. T rows, H hidden, V vocabulary, K targets a row.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from actial_fast import ops
from actial_fast.ops import library, reference
from actial_fast.ops.spec import GRPOSpec

T, H, V, K = 11, 8, 150, 3
GONE = [0, 4, 5, 10]  # rows without a label: at both ends, and a sequence's last and the next one's first
LENGTHS = (5, 3, 3)
LEAVES = ("hidden", "weight", "bias")
ROWS = ("targets", "several", "advantages", "old", "ref", "sampler", "token_weight", "entropy_weight", "temperature", "policy_mask")


def case(seed: int = 0) -> tuple[SimpleNamespace, SimpleNamespace]:
    """All rows, of which some have no label and hold what no arithmetic survives; and the others alone."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=g)  # noqa: E731
    c = SimpleNamespace(hidden=draw(T, H), weight=draw(V, H) / 2, bias=0.3 * draw(V), targets=torch.randint(0, V, (T,), generator=g))
    c.several = torch.randint(0, V, (T, K), generator=g)
    logp, _ = reference.linear_logprob(c.hidden, c.weight, c.targets)
    c.old, c.ref, c.sampler = (logp + 0.3 * draw(T) for _ in range(3))
    c.advantages, c.token_weight, c.entropy_weight = draw(T), 0.1 + torch.rand(T, generator=g), 0.1 + torch.rand(T, generator=g)
    c.temperature, c.policy_mask = 0.5 + torch.rand(T, generator=g), torch.rand(T, generator=g) > 0.3
    c.cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0)
    left = torch.ones(T, dtype=torch.bool)
    left[GONE] = False
    few = SimpleNamespace(**{name: x[left] if name in ("hidden", *ROWS) else x.clone() for name, x in vars(c).items()})
    few.cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), left.long().cumsum(0)])[c.cu_seqlens]
    c.targets[GONE], c.several[GONE] = -100, -100
    for name in ("hidden", "advantages", "old", "ref", "sampler"):
        getattr(c, name)[GONE] = torch.nan
    c.left, few.left = left, left[left]
    for x in (c, few):
        for name in LEAVES:
            getattr(x, name).requires_grad_()
    return c, few


SPECS = {
    "dapo": (GRPOSpec.named("dapo"), ()),
    "gspo": (GRPOSpec.named("gspo", beta=0.1), ()),
    "entropy": (GRPOSpec(beta=0.1, entropy_coef=0.1, top_entropy=0.6), ()),
    "everything": (GRPOSpec(beta=0.1, entropy_coef=0.1, importance="sequence_mask"), ("token_weight", "entropy_weight", "policy_mask")),
}


def grpo(c, name: str, logits: bool = False) -> ops.GRPOLoss:
    spec, more = SPECS[name]
    given = {"targets": c.targets, "advantages": c.advantages, "old_logp": c.old, "ref_logp": c.ref, "spec": spec}
    given |= {x: getattr(c, x) for x in more} | ({"sampler_logp": c.sampler} if more else {}) | {"cu_seqlens": c.cu_seqlens}
    return ops.grpo_loss_from_logits(c.hidden @ c.weight.T, **given) if logits else ops.linear_grpo_loss(c.hidden, c.weight, **given)


CALLS = {
    "log-prob": lambda c: ops.linear_logprob(c.hidden, c.weight, c.targets, bias=c.bias, temperature=c.temperature),
    "several": lambda c: ops.linear_logprob(c.hidden, c.weight, c.several, bias=c.bias),
    "without entropy": lambda c: ops.linear_logprob(c.hidden, c.weight, c.targets, return_entropy=False),
    "what a sampler keeps": lambda c: ops.linear_logprob(c.hidden, c.weight, c.targets, top_p=0.9),
    "cross-entropy": lambda c: [ops.linear_cross_entropy(c.hidden, c.weight, c.targets, c.token_weight, softcap=5.0)],
    "log-prob from logits": lambda c: ops.logprob_from_logits(c.hidden @ c.weight.T, c.targets),
    **{name: lambda c, name=name: grpo(c, name) for name in SPECS},
    "gspo from logits": lambda c: grpo(c, "gspo", logits=True),
}


def outcome(call, c) -> tuple[list[Tensor], list[Tensor]]:
    """What the op gives, rows that are left alone, and the gradients of a sum in which every output has another weight."""
    out = [x for x in call(c) if x is not None]
    rows = [x.ndim > 0 and len(x) == len(c.left) for x in out]
    assert all((x[~c.left] == 0).all() for x, by_row in zip(out, rows, strict=True) if by_row)
    total = sum((2.0 + i) * x.sum() for i, x in enumerate(out) if x.requires_grad)
    hidden, *head = torch.autograd.grad(total, [getattr(c, x) for x in LEAVES], allow_unused=True, materialize_grads=True)
    assert (hidden[~c.left] == 0).all()
    return [x[c.left] if by_row else x for x, by_row in zip(out, rows, strict=True)], [hidden[c.left], *head]


def on_paths() -> list[tuple[str, str]]:
    """Compiled, which takes its time: one log-prob and one loss; in the interpreter not what a sampler keeps, a long search."""
    chosen = {"compiled": ("several", "everything"), "kernels": [name for name in CALLS if not name.startswith("what")], "eager": CALLS}
    return [(name, path) for path, names in chosen.items() for name in names]


@pytest.mark.parametrize(("name", "path"), on_paths())
def test_rows_without_a_label_count_as_if_they_were_not_there(name, path, monkeypatch):
    c, few = case()
    call = CALLS[name]
    if "logits" in name:  # a NaN there reaches the head through the caller's own product
        with torch.no_grad():
            c.hidden[GONE] = 1.0
    want, want_gradients = outcome(call, few)
    if path == "kernels":
        monkeypatch.setattr(library, "on_gpu", lambda x: True)
    if path == "compiled":
        torch.compiler.reset()
        compiled = torch.compile(lambda c: list(call(c)), fullgraph=True, dynamic=True, backend="aot_eager")
        got, gradients = outcome(compiled, c)
    else:
        got, gradients = outcome(call, c)
    for a, b in zip([*got, *gradients], [*want, *want_gradients], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
    assert sum(x.abs().sum() for x in gradients) > 0.1


@pytest.mark.parametrize("path", ["eager", "kernels"])
def test_some_of_a_rows_targets_without_a_label(path, monkeypatch):
    """The others' log-probs, the entropy and their gradients stay."""
    _, c = case()
    gone = torch.zeros(c.several.shape, dtype=torch.bool)
    gone[1, 0], gone[2, 1:] = True, True
    want, entropy = ops.linear_logprob(c.hidden, c.weight, c.several)
    want = want.masked_fill(gone, 0)
    expected = torch.autograd.grad(want.sum() + 2 * entropy.sum(), [c.hidden, c.weight])
    if path == "kernels":
        monkeypatch.setattr(library, "on_gpu", lambda x: True)
    got, found = ops.linear_logprob(c.hidden, c.weight, c.several.masked_fill(gone, -100))
    torch.testing.assert_close((got, found), (want, entropy))
    torch.testing.assert_close(torch.autograd.grad(got.sum() + 2 * found.sum(), [c.hidden, c.weight]), expected)


def test_the_readable_form_says_the_same():
    c, _ = case()
    with torch.no_grad():
        c.hidden[GONE] = 1.0
    rows = c.hidden, c.weight, c.targets
    torch.testing.assert_close(ops.linear_logprob(*rows), reference.linear_logprob(*rows))
    torch.testing.assert_close(ops.linear_logprob(c.hidden, c.weight, c.several), reference.linear_logprob(c.hidden, c.weight, c.several))
    torch.testing.assert_close(ops.linear_cross_entropy(*rows, c.token_weight), reference.linear_cross_entropy(*rows, c.token_weight))
    wanted = reference.linear_grpo_loss(*rows, c.advantages, c.old, c.ref, GRPOSpec(beta=0.1), token_weight=c.token_weight)
    got = ops.linear_grpo_loss(*rows, c.advantages, c.old, c.ref, GRPOSpec(beta=0.1), token_weight=c.token_weight)
    torch.testing.assert_close((got.loss, got.stats), wanted)


def test_the_mean_is_that_of_cross_entropy_with_ignore_index():
    c, _ = case()
    with torch.no_grad():
        c.hidden[GONE] = 1.0
    weight = torch.full((T,), 1.0 / (T - len(GONE)))
    want = torch.nn.functional.cross_entropy(c.hidden @ c.weight.T, c.targets)
    torch.testing.assert_close(ops.linear_cross_entropy(c.hidden, c.weight, c.targets, weight), want)


@pytest.mark.parametrize("name", CALLS)
def test_no_label_at_all(name):
    c, _ = case()
    c.targets[:], c.several[:] = -100, -100
    c.left[:] = False
    with torch.no_grad():
        c.hidden[GONE] = 1.0
    values, gradients = outcome(CALLS[name], c)
    assert all((x == 0).all() for x in [*values, *gradients])

"""The workspace of an op whose caller does not say: a share of the card, the same in every call."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from actial_fast import ops
from actial_fast.kernels import chunks
from actial_fast.kernels.head import make_head
from actial_fast.ops import chunked, chunked_kl, workspace
from actial_fast.ops.parallel import VocabParallel

GIB = 2**30


@pytest.fixture
def card(monkeypatch):
    """A function that puts another card into the machine: card(bytes of memory)."""

    def put(memory: int) -> SimpleNamespace:
        asked = []
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: asked.append(index) or SimpleNamespace(total_memory=memory))
        return SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1), asked=asked)

    return put


@pytest.mark.parametrize(
    ("memory", "want"),
    [
        (16 * GIB, 700.0),
        (22 * GIB, 700.0),
        (24 * GIB, 0.03 * 24 * 1024),
        (80 * GIB, 0.03 * 80 * 1024),
        (141 * GIB, 2800.0),
        (288 * GIB, 2800.0),
    ],
)
def test_a_share_of_the_cards_memory_between_two_ends(card, memory, want):
    hidden = card(memory)
    assert workspace.workspace(None, hidden) == pytest.approx(want)
    assert hidden.asked == [1], "of the card that the rows are on, not of the current one"


def test_the_caller_has_the_last_word(card):
    hidden = card(80 * GIB)
    for said in (0.5, 700, 9000.0, 0, -1):  # what is wrong is refused where arguments are checked
        assert workspace.workspace(said, hidden) == said
    assert not hidden.asked


def test_on_a_cpu_and_with_a_vocabulary_of_several_ranks(card):
    assert workspace.workspace(None, torch.empty(3, 4)) == 700
    parallel = mock.create_autospec(VocabParallel, instance=True)
    assert workspace.workspace(None, card(80 * GIB), parallel) == 700, "ranks with other cards are to cut the same chunks"


def test_free_memory_is_not_asked_for(card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", mock.Mock(side_effect=AssertionError("differs from call to call")))
    hidden = card(80 * GIB)
    assert len({workspace.workspace(None, hidden) for _ in range(3)}) == 1


@pytest.mark.parametrize("memory", [80 * GIB, 141 * GIB])
def test_adding_to_the_heads_gradient_stays_below_a_twentieth(memory):
    """At 700 TFLOP/s and an H100's and an H200's bandwidth; 8 V H bytes a chunk over 6 C V H operations."""
    head = make_head(
        *(torch.empty(n, 3584, dtype=torch.bfloat16, device="meta") for n in (100_000, 152064)), torch.empty(100_000), None, 1.0, None
    )
    rows = chunks.cut(head, True, workspace.share_of(memory >> 20))[0][1]
    bandwidth = 3.35e12 if memory == 80 * GIB else 4.8e12
    assert (8 / bandwidth) / (6 * rows / 700e12) < 0.05
    assert (8 / bandwidth) / (6 * chunks.cut(head, True, 700)[0][1] / 700e12) > 0.05, "what it was before"


def test_a_compiler_takes_it_as_a_constant(card):
    card(80 * GIB)
    seen = []

    @torch.compile(backend=lambda graph, inputs: seen.append(len(graph.graph.nodes)) or graph.forward, fullgraph=True)
    def scaled(x):
        return x * workspace._total_mb(0)

    assert torch.equal(scaled(torch.ones(2)), torch.full((2,), 80.0 * 1024)) and len(seen) == 1


def test_every_op_hands_on_what_it_has_resolved(monkeypatch):
    """None reaches no path that computes; the value of the card does."""
    hidden, weight, targets, rows = torch.randn(4, 8), torch.randn(16, 8), torch.arange(4), torch.full((4,), 0.25)
    from actial_fast.ops import api

    monkeypatch.setattr(api, "workspace", lambda said, x, parallel=None: 123.0 if said is None else said)
    given = []

    def recorded(module, name):
        function = getattr(module, name)

        def run(*arguments, **options):
            given.append(options["workspace_mb"])
            return function(*arguments, **options)

        run.__name__ = name
        monkeypatch.setattr(module, name, run)

    for name in ("linear_logprob", "linear_grpo_loss", "linear_cross_entropy"):
        recorded(chunked, name)
    recorded(chunked_kl, "linear_kl")
    spec = ops.GRPOSpec(beta=0.0)
    for more in ({}, {"workspace_mb": 5}):
        ops.linear_logprob(hidden, weight, targets, **more)
        ops.linear_grpo_loss(hidden, weight, targets, rows, None, None, spec, **more)
        ops.linear_cross_entropy(hidden, weight, targets, rows, **more)
        ops.linear_kl(hidden, weight, hidden, weight, **more)
    assert given == [123.0] * 4 + [5] * 4

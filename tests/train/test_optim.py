"""AdamW in what little memory there is: the numbers of a plain one, wherever moments and weights are held."""

import contextlib
import mmap
from collections import OrderedDict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from actial_fast import sft
from actial_fast.settings.recipe import GRPORecipe, RolloutConfig, SFTRecipe
from actial_fast.settings.running import OptimConfig
from actial_fast.train import offload, optim, quantised
from actial_fast.train.guard import Guard
from actial_fast.train.preflight import Unready
from tests.no_sync import HostSync, fake_cuda, put

PLAIN = OptimConfig(lr=1e-3, weight_decay=0.1)
EIGHT = replace(PLAIN, kind="adamw8bit")
HELD = {  # kind of moments, dtype of weights
    "float32": (PLAIN, torch.float32),
    "8 bits": (EIGHT, torch.float32),
    "bfloat16": (PLAIN, torch.bfloat16),
    "bfloat16, 8 bits": (EIGHT, torch.bfloat16),
    "master": (replace(PLAIN, master=True), torch.bfloat16),
    "master, 8 bits": (replace(EIGHT, master=True), torch.bfloat16),
}
# rows of whole blocks, of broken ones, shorter than a block, too short for 8 bits, vectors, a convolution's
SHAPES = [(300, 512), (77, 333), (129, 40), (1000, 8), (37,), (5000,), (160, 3, 2, 14, 14)]
held = pytest.mark.parametrize("how", HELD)


class Weights(nn.Module):
    """As much of a policy as an optimizer asks for."""

    device = torch.device("cpu")

    def __init__(self, dtype: torch.dtype, shapes=SHAPES, scale: float = 0.02):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        for number, shape in enumerate(shapes):
            self.register_parameter(f"p{number}", nn.Parameter((scale * torch.randn(shape, generator=g)).to(dtype)))

    def trained(self) -> dict[str, nn.Parameter]:
        return OrderedDict(self.named_parameters())


def gradients(policy: Weights, step: int) -> None:
    g = torch.Generator().manual_seed(100 + step)
    for parameter in policy.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=g).to(parameter.device, parameter.dtype)


def trained(config: OptimConfig, dtype: torch.dtype, steps=range(4), **shape):
    policy = Weights(dtype, **shape)
    optimizer = optim.build_optimizer(policy, config, seed=3)
    for step in steps:
        gradients(policy, step)
        optimizer.step()
    return policy, optimizer


def everything(policy: Weights, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    out = {name: p.detach().clone() for name, p in policy.named_parameters()}
    return out | {f"{key}/{name}": v.clone() for name, p in policy.named_parameters() for key, v in optimizer.state[p].items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def test_float32_weights_and_moments_are_pytorchs():
    optimizer = optim.build_optimizer(Weights(torch.float32), PLAIN)
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


@held
def test_on_the_host_the_numbers_are_the_same(how, monkeypatch):
    """Also cut into small pieces, so that both buffers are used again and again."""
    config, dtype = HELD[how]
    there = everything(*trained(config, dtype))
    for piece in (optim.PIECE, 1 << 13):
        monkeypatch.setattr(optim, "PIECE", piece)
        policy, optimizer = trained(replace(config, offload="always"), dtype)
        assert type(optimizer) is optim.LeanAdamW and same(everything(policy, optimizer), there)
    assert optimizer._passage._size < 1 << 20


@held
@pytest.mark.parametrize("moves", ["none", "always"])
def test_a_step_that_is_not_finite_leaves_no_trace(how, moves):
    config, dtype = HELD[how]
    (clean, first), (dirty, second) = (trained(replace(config, offload=moves), dtype, steps=range(1)) for _ in range(2))
    guard = Guard(second, limit=5)
    before = everything(dirty, second)
    for bad in (float("nan"), float("inf")):
        gradients(dirty, 7)
        dirty.p1.grad[3, 5] = bad
        assert not guard.step(torch.tensor(1.0), torch.tensor(bad)) and dirty.p1.grad is None
        assert same(everything(dirty, second), before)
    for step in (1, 2):
        gradients(dirty, step)
        guard.step(torch.tensor(1.0), torch.tensor(1.0))
        gradients(clean, step)
        first.step()
    assert guard.skipped() == [0, 1] and same(everything(dirty, second), everything(clean, first))


def test_moments_in_8_bits_are_those_of_bitsandbytes():
    """Where rows are whole blocks: all but codes that stand between two, since the last bits of float32 differ."""
    import bitsandbytes

    policy, optimizer = trained(EIGHT, torch.float32, shapes=[(300, 512), (37,)])
    other = Weights(torch.float32, shapes=[(300, 512), (37,)])
    groups = [{"params": [other.p0], "weight_decay": 0.1}, {"params": [other.p1], "weight_decay": 0.0}]
    theirs = bitsandbytes.optim.AdamW8bit(groups, lr=PLAIN.lr, betas=PLAIN.betas, eps=PLAIN.eps)
    for step in range(4):
        gradients(other, step)
        theirs.step()
    assert torch.allclose(policy.p1, other.p1, rtol=0, atol=1e-8)
    ours, own = optimizer.state[policy.p0], theirs.state[other.p0]
    for name, theirs_name in (("exp_avg", "1"), ("exp_avg_sq", "2")):
        assert ours[name].dtype == torch.uint8 and (ours[name] != own[f"state{theirs_name}"]).double().mean() < 1e-3
        assert torch.allclose(ours[f"{name}_absmax"].view(-1), own[f"absmax{theirs_name}"], rtol=1e-4)
    moved = (other.p0 - Weights(torch.float32, shapes=[(300, 512), (37,)]).p0).abs().mean()
    assert (policy.p0 - other.p0).abs().mean() < 1e-4 * moved


@held
def test_rows_are_stepped_alike_however_they_are_cut(how):
    """What two ranks hold of a matrix, one a part that is no multiple of anything, equals the whole's rows."""
    config, dtype = HELD[how]
    if how == "float32":
        config = replace(config, offload="always")
    for shape in ((300, 512), (77, 333), (129, 40)):
        values, g = 0.02 * torch.randn(shape), torch.randn(shape)
        rows = []
        for first, last in ((0, shape[0]), (0, 53), (53, shape[0])):
            parameter = nn.Parameter(values[first:last].to(dtype))
            optimizer = optim.LeanAdamW([{"params": [parameter]}], config, {parameter: 5})
            optimizer._exact = True
            (piece,) = optim._cut(parameter, optimizer.param_groups[0])
            piece = replace(piece, first_element=first * shape[1])
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(quantised, "fits", lambda _: True)  # as of the whole
                patch.setattr(optim, "_cut", lambda *_, piece=piece: [piece])
                for step in range(3):
                    parameter.grad = (g[first:last] + step).to(dtype)
                    optimizer.step()
            rows.append([parameter.detach(), *(v for v in optimizer.state[parameter].values() if v.ndim)])
        for whole, *parts in zip(*rows, strict=True):
            assert torch.equal(whole, torch.cat(parts))


# ---- small steps


def test_small_steps_are_made_in_the_mean_in_every_storage():
    """20 steps at lr 1e-6, of weights around 0.02.

    In float32, or in a float32 master, more than 90% of the weights move. In bfloat16 a step is about 1/60 of the distance to the next
    value, so that most cannot have moved; but their mean displacement along the way of float32 is float32's.
    """
    config, shape = replace(PLAIN, lr=1e-6, weight_decay=0.0), {"shapes": [(512, 512)]}
    start = Weights(torch.bfloat16, **shape).p0.detach().float()

    def run(config: OptimConfig, dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        policy = Weights(dtype, **shape)
        with torch.no_grad():
            policy.p0.copy_(start)
        optimizer, g = optim.build_optimizer(policy, config, seed=1), torch.Generator().manual_seed(2)
        direction = torch.randn(512, 512, generator=g)
        for _ in range(20):
            policy.p0.grad = (direction + 0.3 * torch.randn(512, 512, generator=g)).to(dtype)
            optimizer.step()
        return policy.p0.detach().float() - start, optimizer.state[policy.p0]

    wanted, _ = run(config, torch.float32)
    assert (wanted != 0).double().mean() > 0.9
    for kind in ("adamw", "adamw8bit"):
        eight, _ = run(replace(config, kind=kind), torch.float32)
        assert (eight != 0).double().mean() > 0.9
        _, state = run(replace(config, kind=kind, master=True), torch.bfloat16)
        assert (state["master"] != start).double().mean() > 0.9
        moved, _ = run(replace(config, kind=kind), torch.bfloat16)
        along, per_weight = (moved * wanted.sign()).mean().item(), wanted.abs().mean().item()
        error = moved.std().item() / 512
        assert 0.01 < (moved != 0).double().mean() < 0.5
        assert abs(along - per_weight) < 4 * error and per_weight > 20 * error, (along, per_weight, error)


def test_a_master_leads_and_the_weight_is_it_rounded():
    policy, optimizer = trained(replace(PLAIN, master=True), torch.bfloat16)
    plain, _ = trained(PLAIN, torch.bfloat16)
    for parameter in policy.parameters():
        master = optimizer.state[parameter]["master"]
        assert master.dtype == torch.float32 and torch.equal(parameter, master.bfloat16())
    assert not torch.equal(policy.p0, plain.p0), "without one it is rounded at random"


def test_rounding_depends_on_seed_step_parameter_and_place():
    policy = Weights(torch.bfloat16)
    keys = {optim.key_of(name, seed) for name in policy.trained() for seed in (0, 1)}
    assert len(keys) == 2 * len(SHAPES)
    runs = [everything(*_run_with_seed(seed)) for seed in (0, 0, 1)]
    assert same(runs[0], runs[1]) and not torch.equal(runs[0]["p0"], runs[2]["p0"])


def _run_with_seed(seed: int):
    policy = Weights(torch.bfloat16)
    optimizer = optim.build_optimizer(policy, PLAIN, seed)
    gradients(policy, 0)
    optimizer.step()
    return policy, optimizer


# ---- what the host does not wait for, and what it cannot have


class Streams:
    """CUDA's streams and events where there is no CUDA: their order is all they have."""

    def __init__(self, *_):
        self.calls = []

    wait_stream = wait_event = lambda self, other: self.calls.append(other)

    def record_event(self):
        return SimpleNamespace()


class Locks:
    """What of CUDA's runtime locks pages; refused: an error for each."""

    def __init__(self, locked: dict[int, int], refused: bool = False):
        self.locked, self.refused = locked, refused

    def cudaHostRegister(self, address: int, nbytes: int, _: int) -> int:
        self.locked[address] = nbytes
        return 2 * self.refused

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0


def test_locked_memory_is_no_more_than_its_size_and_is_unlocked(monkeypatch):
    locked: dict[int, int] = {}
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Locks(locked))
    held = offload.pinned((3, 5), torch.float32)
    rows = held[1:]
    assert held.shape == (3, 5) and held.dtype == torch.float32 and not held.any() and held.is_contiguous()
    assert locked == {held.data_ptr(): 60} and held.data_ptr() % mmap.PAGESIZE == 0, "no page of it is another's"
    held.fill_(2.0)
    del held
    assert len(locked) == 1 and rows.eq(2).all()
    del rows
    assert not locked and offload.pinned((0, 5), torch.uint8).shape == (0, 5)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Locks({}, refused=True))
    with pytest.raises(OSError, match=r"0.0 GB of the host's memory could not be locked \(CUDA error 2\); set optim.offload to none"):
        offload.pinned((3,), torch.float32)


@pytest.mark.parametrize("how", [*HELD, "float32 on the host", "bfloat16, 8 bits on the host"])
def test_a_step_never_waits(how, monkeypatch):
    name, _, on_host = how.partition(" on the host")
    config, dtype = HELD[name]
    if how != name or on_host:
        config = replace(config, offload="always")
    quantised._code.cache_clear()
    monkeypatch.setattr(torch.cuda, "Stream", Streams)
    main = Streams()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Locks({}))
    with fake_cuda() as device:
        policy = put(Weights(dtype), device)
        policy.device = device
        optimizer = optim.build_optimizer(policy, config)
        guard = Guard(optimizer, 5)
        for _ in range(2):
            for parameter in policy.parameters():
                parameter.grad = torch.zeros_like(parameter)
            guard.step(torch.ones((), device=device), torch.ones((), device=device))
        with pytest.raises(HostSync):
            guard.skipped()
    quantised._code.cache_clear()
    states = [v for state in optimizer.state.values() for v in state.values()]
    assert states and all(v.device.type == ("cpu" if config.offload == "always" and v.ndim else "cuda") for v in states)
    assert bool(main.calls) == (config.offload == "always")


def test_paged_states_are_asked_for_before_they_are_used(monkeypatch):
    """Large ones, each once a step; the managed memory itself needs a GPU."""
    import bitsandbytes

    asked = []

    def paged(shape, device):
        out = torch.zeros(shape, dtype=torch.uint8, device=device)
        out.is_paged = True
        return out

    monkeypatch.setattr(quantised, "paged", paged)
    monkeypatch.setattr(bitsandbytes.functional, "prefetch_tensor", asked.append)
    monkeypatch.setattr(optim, "PIECE", 1 << 14)
    quantised._code.cache_clear()
    with fake_cuda() as device:
        policy = put(Weights(torch.float32), device)
        policy.device = device
        optimizer = optim.build_optimizer(policy, replace(PLAIN, kind="paged_adamw8bit"))
        for parameter in policy.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for step in (1, 2):
            optimizer.step()
            large = [p for p in policy.parameters() if p.ndim > 1 and p.numel() >= quantised.PAGED]
            assert len(large) == 2 and len(asked) == step * 2 * len(large)
    quantised._code.cache_clear()
    assert asked[0] is optimizer.state[large[0]]["exp_avg"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("how", [*HELD, "paged"])
def test_on_a_gpu_the_steps_are_those_of_a_cpu(how):
    """Up to the last bits of float32 and, in 8 bits, codes that stand between two; on the host bit for bit what it is on the device."""
    config, dtype = (replace(EIGHT, kind="paged_adamw8bit"), torch.float32) if how == "paged" else HELD[how]
    ends = []
    for device, moves in (("cpu", "none"), ("cuda", "none"), ("cuda", "always")):
        if how == "paged" and (device, moves) != ("cuda", "none"):
            config_here = replace(config, kind="adamw8bit", offload=moves)
        else:
            config_here = replace(config, offload=moves)
        policy = Weights(dtype).to(device)
        policy.device = torch.device(device)
        optimizer = optim.build_optimizer(policy, config_here, seed=3)
        for step in range(4):
            gradients(policy, step)
            optimizer.step()
        torch.cuda.synchronize()
        ends.append({name: p.detach().cpu() for name, p in policy.named_parameters()})
    far = [(ends[0][name].float() - ends[1][name].float()).abs().mean() for name in ends[0]]
    assert max(far) < (1e-5 if dtype == torch.float32 else 1e-4) and same(ends[1], ends[2])


@pytest.mark.parametrize("kind", ["adamw8bit", "paged_adamw8bit"])
def test_what_cannot_be_had_is_told(kind, monkeypatch):
    config = replace(PLAIN, kind=kind)
    if kind == "paged_adamw8bit":
        with pytest.raises(
            ValueError, match=r"optim.kind: paged_adamw8bit needs CUDA's paged memory, and this is cpu; set it to adamw8bit"
        ):
            optim.build_optimizer(Weights(torch.float32), config)
    monkeypatch.setattr(quantised.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"optim.kind: {kind} needs bitsandbytes, which is not installed"):
        optim.build_optimizer(Weights(torch.float32), config)
    assert optim.build_optimizer(Weights(torch.float32), PLAIN)


def test_what_cannot_be_had_is_told_before_the_run(sft_recipe):
    recipe = replace(sft_recipe, optim=replace(sft_recipe.optim, kind="paged_adamw8bit"))
    with pytest.raises(Unready, match=r"optim.kind: paged_adamw8bit needs CUDA's paged memory") as found:
        sft.train(recipe)
    assert len(found.value.problems) == 1


def test_keys_that_would_have_no_effect_are_refused():
    with pytest.raises(ValueError, match=r"optim.master: float32 weights need no copy in float32"):
        SFTRecipe(optim=OptimConfig(master=True))
    with pytest.raises(ValueError, match=r"offload: the driver moves the states of paged_adamw8bit itself; sampling"):
        OptimConfig(kind="paged_adamw8bit", offload="sampling")
    with pytest.raises(ValueError, match=r"optim.offload: with rollout.ahead, vLLM draws beside the update"):
        GRPORecipe(optim=OptimConfig(offload="sampling"), rollout=RolloutConfig(engine="vllm", ahead=1))
    GRPORecipe(optim=OptimConfig(offload="sampling"), rollout=RolloutConfig(ahead=1))


@held
def test_bytes_are_what_is_said(how):
    """Of a matrix with rows of whole blocks, as docs/running.md has them."""
    config, dtype = HELD[how]
    policy, optimizer = trained(config, dtype, shapes=[(300, 512)], steps=range(1))
    weight, states = (4 if dtype == torch.float32 else 2), (2 + 8 / 256 if config.kind == "adamw8bit" else 8) + 4 * config.master
    assert weight == policy.p0.element_size()
    assert sum(v.nbytes for v in optimizer.state[policy.p0].values() if v.ndim) == states * policy.p0.numel()

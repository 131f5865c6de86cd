"""The 4-bit base: what transformers makes of the same weights, the right products with their gradients, and nothing whole in 16 bits."""

import logging
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from transformers import BitsAndBytesConfig, Qwen2_5_VLForConditionalGeneration

from actial_fast.model import nf4
from actial_fast.model.flops import Least, Work
from actial_fast.model.nf4 import NF4Linear, as_held, quantized
from actial_fast.model.policy import load_policy, load_reference
from actial_fast.model.tensors import Stored
from actial_fast.rollout.handover import checkpoint_weights
from actial_fast.settings.model import LoRAConfig, ModelConfig

pytest.importorskip("bitsandbytes")
CPU = torch.device("cpu")
CODE = torch.tensor(  # NF4's sixteen values (QLoRA, appendix E)
    [
        *(-1.0, -0.6961928, -0.5250730, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0),
        *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0),
    ]
)


def config_of(model, **changes):
    return replace(ModelConfig(path=str(model), lora=LoRAConfig(rank=4), quantize="nf4"), **changes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("twice", [True, False])
def test_the_codes_are_those_of_transformers(tiny, twice, dtype):
    policy = load_policy(config_of(tiny, quantize_twice=twice, frozen_dtype=dtype), CPU, 0)
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tiny,
        dtype=getattr(torch, dtype),
        device_map={"": "cpu"},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=twice,
            llm_int8_skip_modules=["model.visual", "lm_head"],
        ),
    )
    found = quantized(policy)
    assert found.keys() == {name for name, p in theirs.named_parameters() if type(p).__name__ == "Params4bit"} and len(found) == 2 * 7
    assert all(nf4.LAYER.search(name) for name in found), "what the preflight counts as held"
    assert sum(bool(nf4.LAYER.search(name)) for name in found.keys() | dict(theirs.named_parameters())) == len(found)
    for name, layer in found.items():
        weight, held = theirs.get_parameter(name), layer.held
        assert torch.equal(held["codes"], weight.data) and torch.equal(held["absmax"], weight.quant_state.absmax), name
        if twice:
            assert torch.equal(held["absmax2"], weight.quant_state.state2.absmax)
            assert torch.equal(held["offset"], weight.quant_state.offset)
    plain = {n: p for n, p in policy.base.named_parameters() if ".lora_" not in n}
    for name, parameter in theirs.named_parameters():
        if name not in found:
            ours = plain.get(name, plain.get(name.replace(".bias", ".base_layer.bias")))
            assert torch.equal(ours, parameter) and not ours.requires_grad, name


@pytest.mark.parametrize("twice", [True, False])
@pytest.mark.parametrize("shape", [(64, 64), (7, 5), (32, 96), (53, 13), (33, 10), (1, 3), (5, 128)])
def test_a_product_and_its_gradient(shape, twice):
    """Against the codes read by hand, also where rows end within a block, and blocks within a byte."""
    make = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(shape[1], shape[0])
    weight, x = torch.randn(shape, generator=make), torch.randn(3, 2, shape[1], generator=make, requires_grad=True)
    layer = NF4Linear(linear, twice=twice, dtype=torch.float32)
    layer.hold(weight)
    codes = layer.held["codes"].flatten()
    codes = torch.stack([codes >> 4, codes & 15], 1).flatten()[: weight.numel()]
    blocks = F.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    scales = blocks.abs().amax(1).repeat_interleave(64)[: weight.numel()]
    expected = (CODE[codes.long()] * scales).view(shape)
    torch.testing.assert_close(layer.weight, expected, rtol=0.01 if twice else 1e-5, atol=0.02 if twice else 1e-6)
    assert (layer.weight - weight).abs().max() < 0.2 * weight.abs().max()
    assert torch.equal(as_held(weight, twice=twice), layer.weight)
    y = layer(x)
    assert torch.allclose(y, F.linear(x, layer.weight, linear.bias), atol=1e-6)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.allclose(gradient, 2 * y.detach() @ layer.weight, atol=1e-4) and gradient.abs().sum() > 0
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), y), "in eval mode and without gradients the same, bit for bit"


def test_a_weight_of_zeros():
    assert not as_held(torch.zeros(4, 96), twice=False).any()


def test_layers_are_quantised_one_by_one(tiny, monkeypatch):
    """No moment has two of them whole, and what stays is about half a byte a weight."""
    whole = []
    plain = Stored.into

    def into(self, out, name, start=0):
        if name.endswith("_proj.weight"):
            whole.append(out.numel())
            assert not any(layer._codes is None for layer in seen), "the one before was quantised before the next was read"
        return plain(self, out, name, start)

    seen = []
    hold = NF4Linear.hold
    monkeypatch.setattr(Stored, "into", into)
    monkeypatch.setattr(NF4Linear, "hold", lambda self, weight: (hold(self, weight), seen.append(self)) and None)
    layers = quantized(load_policy(config_of(tiny), CPU, 0))
    assert len(whole) == len(seen) == len(layers) == 14
    held = sum(t.nbytes for layer in layers.values() for t in layer.held.values())
    assert held < nf4.BYTES * 1.02 * sum(whole)


def test_the_reference_is_the_base_with_adapters_off(tiny):
    policy = load_policy(config_of(tiny), CPU, 0).eval()
    ids = {"input_ids": torch.arange(12)[None] + 5}

    def hidden():
        with torch.no_grad():
            return policy(ids, lambda out, _: out.last_hidden_state)

    start = hidden()
    with torch.no_grad():
        for name, p in policy.trained().items():
            if "lora_B" in name:
                p.normal_(std=0.1)
    assert not torch.allclose(hidden(), start, atol=1e-2)
    with policy.adapter_off():
        assert torch.equal(hidden(), start)
    original = load_policy(ModelConfig(path=str(tiny)), CPU, 0).eval()
    with torch.no_grad():
        far = original(ids, lambda out, _: out.last_hidden_state) - start
    assert 1e-3 < far.norm() / start.norm() < 1, "near the original, and not it"
    assert not quantized(load_reference(config_of(tiny), CPU))


def test_another_engine_gets_the_weights_that_the_trainer_computes_with(tiny):
    policy = load_policy(config_of(tiny), CPU, 0)
    sent = dict(checkpoint_weights(policy))
    plain = dict(checkpoint_weights(load_policy(ModelConfig(path=str(tiny)), CPU, 0)))
    assert sent.keys() == plain.keys()
    for name, value in sent.items():
        expected = as_held(plain[name], twice=True) if "layers." in name and name.endswith("_proj.weight") else plain[name]
        assert torch.equal(value, expected) and value.dtype == torch.float32, name


def test_flops_are_those_of_the_weights_and_not_of_their_bytes(tiny):
    work = Work(rows=40, pairs=300, predicted=9, tokens=40, images={"a": (1, 4, 4)})
    least = [Least(load_policy(config_of(tiny, quantize=q), CPU, 0).base)(work, backward=True) for q in ("none", "nf4")]
    assert least[0] == least[1] > 0


def test_a_missing_package_is_told(tiny, monkeypatch):
    monkeypatch.setattr(nf4.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"model.quantize: nf4 needs bitsandbytes, which is not installed; pip install"):
        load_policy(config_of(tiny), CPU, 0)


def test_nothing_is_said_of_kernels_that_nobody_needs():
    """PEFT imports bitsandbytes, which warns of a package that is not installed; its other warnings are heard."""
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)
    assert logging.getLogger("bitsandbytes.nn.modules").isEnabledFor(logging.WARNING)

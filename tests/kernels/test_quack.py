"""The head by quack's products: on a CPU with a stand-in for quack that keeps its contract, on a GPU with quack itself."""

import ast
import importlib.util
import inspect
import itertools
from pathlib import Path

import pytest
import torch

from actial_fast import ops
from actial_fast.kernels import chunks, common, head, linear_grpo, linear_logprob, quack_head
from actial_fast.ops import checks, library, reference
from actial_fast.ops.spec import GRPOSpec
from tests import quack_standin
from tests.kernels.test_linear import DEVICE, assert_close, gradients, ids, logprob_losses, losses, make, options

INSTALLED = importlib.util.find_spec("quack") is not None
SIZES = [(33, 33, 256), pytest.param((1, 64, 128), marks=pytest.mark.slow), pytest.param((131, 192, 128), marks=pytest.mark.slow)]
SPECS = {
    "clip": GRPOSpec(beta=0.0),
    "clip-k3": GRPOSpec(beta=0.1),
    "cispo-k2-entropy": GRPOSpec.named("cispo", clip_high=0.1, beta=0.1, kl="k2", entropy_coef=0.1),
    "gspo": GRPOSpec.named("gspo", clip_low=0.05, clip_high=0.05),
    "sapo-k1": GRPOSpec.named("sapo", beta=0.2, kl="k1", kl_bias_correction=True),
}
GEMMS = {"strips": ["softmax_part", "row_scaled", "plain"], "softmax": ["softmax_part"]}  # quack's products in a loss and its gradients


@pytest.fixture(
    params=[
        pytest.param("stand-in", marks=pytest.mark.skipif(DEVICE == "cuda", reason="the stand-in is for CPUs")),
        pytest.param("quack", marks=[pytest.mark.gpu, pytest.mark.skipif(not INSTALLED, reason="quack is not installed")]),
    ]
)
def quack(request):
    """The names of the products that quack has made; None where it is the real one, which does not tell."""
    if request.param == "quack":
        if common.capability()[0] not in (9, 10):
            pytest.skip("quack's products are for sm_90 and sm_100")
        yield None
    else:
        with quack_standin.installed() as calls:
            yield calls


def compared(ours, plain, case, frozen=False, floor=2e-3):
    results = [gradients(f, case, d, frozen) for f, d in ((ours, None), (plain, None), (plain, torch.float64))]
    for i in range(2):
        assert_close(*(r[i] for r in results), floor=floor)
    return results[0]


@pytest.mark.parametrize("rows", [False, True], ids=["one-temperature", "row-temperatures"])
@pytest.mark.parametrize("size", SIZES, ids=ids)
def test_logprob_and_entropy_and_their_gradients(quack, size, rows):
    case = make(*size, torch.bfloat16, rows=rows)
    case.workspace_mb = 700
    coefficients = torch.randn(size[0], device=DEVICE), torch.randn(size[0], device=DEVICE)
    compared(*logprob_losses(case, coefficients, head="quack"), case)
    if quack is not None:
        assert quack == ["softmax_part"] * 2  # forward, and once more in the backward


@pytest.mark.parametrize("size", SIZES, ids=ids)
def test_logprob_alone_takes_strips(quack, size):
    case = make(*size, torch.bfloat16)
    g = torch.randn(size[0], generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def ours(h, w, _):
        scaling = options(case) | {"workspace_mb": 700, "head": "quack"}
        logp, _ = linear_logprob.linear_logprob(h, w, case.targets, **scaling)
        return (g * logp).sum(), logp

    def plain(h, w, _):
        logp, _ = reference.linear_logprob(h, w, case.targets, **options(case, h.dtype))
        return (g.to(logp.dtype) * logp).sum(), logp

    compared(ours, plain, case)
    if quack is not None:
        assert quack == ["softmax_part", *GEMMS["strips"]]


def every(*quick):
    """All combinations of a loss, a head and what becomes of rows without a gradient; those that are not quick are slow tests."""
    found = []
    for name, frozen, skip in itertools.product(SPECS, ("trainable", "frozen"), ("compact", "dense")):
        marks = () if (name, frozen, skip) in quick else pytest.mark.slow
        found.append(pytest.param(name, frozen == "frozen", skip == "compact", id=f"{name}-{frozen}-{skip}", marks=marks))
    return found


QUICK = ("clip", "trainable", "compact"), ("clip-k3", "trainable", "dense"), ("cispo-k2-entropy", "frozen", "dense")


@pytest.mark.parametrize(("name", "frozen", "skip"), every(*QUICK))
def test_grpo_loss_and_its_gradients(quack, name, frozen, skip):
    case, spec = make(40, 64, 384, torch.bfloat16), SPECS[name]
    compared(*losses(case, spec, skip=skip, head="quack"), case, frozen)
    if quack is not None:
        strips = not skip and not spec.entropy_coef
        assert quack == GEMMS["strips" if strips else "softmax"][: 2 if frozen and strips else None]


@pytest.mark.parametrize("size", SIZES, ids=ids)
def test_cross_entropy(quack, size):
    case = make(*size, torch.bfloat16)
    case.token_weight[::3] = 0

    def ours(h, w, _):
        call = linear_grpo.linear_cross_entropy
        return (call(h, w, case.targets, case.token_weight, bias=None, softcap=None, weight_grad=None, workspace_mb=700, head="quack"),)

    def plain(h, w, _):
        logp, _ = reference.linear_logprob(h, w, case.targets)
        return (-(case.token_weight.to(logp.dtype) * logp).sum(),)

    compared(ours, plain, case)


@pytest.mark.slow
@pytest.mark.parametrize("skip", [True, False], ids=["compact", "dense"])
def test_chunks_add_up(quack, skip):
    """Rows that fill no whole tile, sequences that begin anywhere, and a buffer that holds something."""
    case = make(300, 64, 384, torch.bfloat16, rows=True)
    unit = chunks.row_bytes(head.make_head(case.hidden, case.weight, case.targets, None, 1.0, None), True) / 2**20
    for spec in (SPECS["clip-k3"], SPECS["gspo"]):
        one = gradients(losses(case, spec, skip=skip, head="quack")[0], case)
        many = gradients(losses(case, spec, skip=skip, head="quack", workspace_mb=130 * unit)[0], case)
        for a, b in zip((*one[0], *one[1]), (*many[0], *many[1]), strict=True):
            assert torch.allclose(a, b, rtol=2e-2, atol=1e-6), "bf16 gradients differ in their last bit at most"
    buffer = torch.full((384, 64), 3.0, device=DEVICE)
    h, w = case.hidden.detach().requires_grad_(), case.weight.detach().requires_grad_()
    ours, _ = losses(case, SPECS["clip-k3"], skip=skip, head="quack", weight_grad=buffer, workspace_mb=130 * unit)
    ours(h, w, None)[0].backward()
    want = gradients(losses(case, SPECS["clip-k3"], skip=skip, head="quack")[0], case)[1][1]
    assert torch.allclose(buffer - 3, want.float(), rtol=2e-2, atol=2e-5)


def test_a_chunk_of_less_than_a_tile_is_refused(quack):
    case = make(200, 64, 384, torch.bfloat16)
    unit = chunks.row_bytes(head.make_head(case.hidden, case.weight, case.targets, None, 1.0, None), True) / 2**20
    ours, _ = losses(case, SPECS["clip-k3"], skip=False, head="quack", workspace_mb=100.5 * unit)
    if common.capability()[0] == 9:
        with pytest.raises(ValueError, match=r"^workspace_mb: .* holds 100 rows; quack takes 128, \d+\.\d\d MiB$"):
            ours(case.hidden.requires_grad_(), case.weight, None)


@pytest.mark.parametrize("skip", [pytest.param(True, marks=pytest.mark.slow), False], ids=["compact", "dense"])
def test_masked_rows_may_hold_anything(quack, skip):
    """NaN, infinite, a target that is no token: their gradient is 0, and the others' is what it is without them."""
    clean, case = (make(40, 64, 256, torch.bfloat16) for _ in range(2))
    clean.token_weight[::2] = case.token_weight[::2] = 0
    case.hidden[::4], case.hidden[2::4] = torch.nan, torch.inf
    case.targets[::2] = torch.tensor([-100, 256, 2**32 + 5, -1, 2**40], device=DEVICE).repeat(4)
    got, want = (gradients(losses(c, SPECS["clip-k3"], skip=skip, head="quack")[0], c) for c in (case, clean))
    assert got[0][0] == want[0][0] and torch.equal(got[1][0], want[1][0]) and torch.equal(got[1][1], want[1][1])
    assert not got[1][0][::2].any() and got[0][2][::2].isnan().all() and not got[0][2][1::2].isnan().any()


def test_what_counts_and_is_nan_shows(quack):
    for change in ("hidden", "target"):
        case = make(5, 64, 128, torch.bfloat16)
        if change == "hidden":
            case.hidden[3] = torch.nan
        else:
            case.targets[3] = 128
        (loss, _, logp, _), (dhidden, dweight) = gradients(losses(case, SPECS["clip-k3"], skip=False, head="quack")[0], case)
        assert loss.isnan() and logp[3].isnan() and not logp[:3].isnan().any()
        assert dhidden[3].isnan().all() and not dhidden[:3].isnan().any() and dweight.isnan().any()


@pytest.mark.parametrize("scale", [30.0, 300.0, pytest.param(3000.0, marks=pytest.mark.slow)])
def test_peaked_distributions(quack, scale):
    """Targets up to thousands of bits below the row's peak, in parts of their own: nothing overflows."""
    case = make(40, 64, 512, torch.bfloat16, scale=scale)
    case.temperature = 1.0
    case.token_weight = torch.full((40,), 1 / 40, device=DEVICE)
    g = torch.randn(40, device=DEVICE)

    def ours(h, w, _):
        logp, _ = linear_logprob.linear_logprob(h, w, case.targets, **options(case) | {"workspace_mb": 700, "head": "quack"})
        return (g * logp).sum(), logp

    def plain(h, w, _):
        logp, _ = reference.linear_logprob(h, w, case.targets)
        return (g.to(logp.dtype) * logp).sum(), logp

    compared(ours, plain, case)


@pytest.mark.skipif(DEVICE == "cuda", reason="the stand-in is for CPUs")
def test_sm_100_has_no_strips():
    with quack_standin.installed(major=10) as calls, pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "capability", lambda: (10, 0))
        case = make(20, 64, 128, torch.bfloat16)
        compared(*losses(case, SPECS["clip-k3"], skip=False, head="quack"), case)
        assert calls == ["softmax_part"]


@pytest.mark.skipif(DEVICE == "cuda", reason="counts what the stand-in is asked for")
def test_without_gradients_nothing_of_the_logits_size_is_held(monkeypatch):
    case, sizes = make(20, 64, 128, torch.bfloat16), []
    with quack_standin.installed():
        from actial_fast.kernels import quack_gemms

        made = quack_gemms.logits
        monkeypatch.setattr(quack_gemms, "logits", lambda *a, scaled, **k: sizes.append(scaled) or made(*a, scaled=scaled, **k))
        losses(case, SPECS["clip"], head="quack")[0](case.hidden, case.weight, None)
    assert sizes == [None]


# ---- the door


@pytest.fixture
def on_hopper(monkeypatch):
    """CPU tensors go to the kernels, in the interpreter, as on a chip of that kind; quack is installed."""
    monkeypatch.setattr(library, "on_gpu", lambda x: True)
    monkeypatch.setattr(checks, "capability", lambda x: (9, 0))
    monkeypatch.setattr(checks, "_quack_version", lambda: "0.6.5")
    with quack_standin.installed() as calls:
        yield calls


@pytest.mark.skipif(DEVICE == "cuda", reason="the stand-in is for CPUs")
def test_ops_take_it_by_name(on_hopper):
    case = make(5, 32, 128, torch.bfloat16)
    rows = {"token_weight": case.token_weight, "temperature": case.temperature}
    given = (case.hidden.requires_grad_(), case.weight.requires_grad_(), case.targets)
    for name in ("quack", "triton"):
        on_hopper.clear()
        outputs = [
            ops.linear_grpo_loss(*given, case.advantages, case.old_logp, case.ref_logp, SPECS["clip-k3"], **rows, head=name).loss,
            ops.linear_grpo_loss(*given, case.advantages, case.old_logp, None, GRPOSpec(beta=0.0, top_entropy=0.5), **rows, head=name).loss,
            ops.linear_cross_entropy(*given, case.token_weight, head=name),
            ops.linear_logprob(*given, temperature=case.temperature, head=name)[0].sum(),
        ]
        grads = [torch.autograd.grad(x, given[:2]) for x in outputs]
        if name == "quack":
            assert on_hopper.count("softmax_part") == 6 and on_hopper.count("plain") == 3
            found = outputs, grads
    assert not on_hopper
    for a, b in zip(found[0], outputs, strict=True):
        assert torch.allclose(a, b, rtol=1e-3)
    for some, others in zip(found[1], grads, strict=True):
        for a, b in zip(some, others, strict=True):
            assert (a - b).abs().max() <= 2e-2 * b.abs().max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": "cute"}, r"^head: expected 'triton' or 'quack', got 'cute'$"),
        ({"bias": torch.zeros(128, dtype=torch.bfloat16)}, r"^bias: not with head='quack'; head='triton' has it$"),
        ({"softcap": 3.0}, r"^softcap: not with head='quack'"),
        ({"dtype": torch.float16}, r"^hidden: head='quack' takes bfloat16, got torch\.float16"),
        ({"dtype": torch.float32}, r"^hidden: head='quack' takes bfloat16, got torch\.float32"),
        ({"V": 130}, r"^weight: head='quack' takes a vocabulary in whole parts of 128, got 130 rows; pad it, or take head='triton'$"),
        ({"chip": (8, 0)}, r"^head: 'quack' has kernels for sm_90 and sm_100, hidden is on cpu"),
        ({"chip": (12, 0)}, r"^head: 'quack' has kernels for sm_90 and sm_100"),
        ({"version": None}, r"^head: 'quack' is not installed; pip install 'actial-fast\[quack\]'$"),
        ({"version": "0.6.4"}, r"^head: 'quack' takes quack-kernels 0\.6\.5 or a later 0\.6, found 0\.6\.4"),
        ({"version": "0.7.0"}, r"found 0\.7\.0"),
        ({"version": "0.6.5rc1"}, r"found 0\.6\.5rc1"),
    ],
)
@pytest.mark.parametrize("op", ["linear_logprob", "linear_grpo_loss", "linear_cross_entropy"])
def test_what_it_cannot_do_is_refused_by_name(on_hopper, monkeypatch, op, change, message):
    change = dict(change)
    case = make(20, 64, change.pop("V", 128), change.pop("dtype", torch.bfloat16))
    if "chip" in change:
        chip = change.pop("chip")
        monkeypatch.setattr(checks, "capability", lambda x: chip)
    if "version" in change:
        version = change.pop("version")
        monkeypatch.setattr(checks, "_quack_version", lambda: version)
    options = {"head": "quack"} | {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    given = (case.hidden, case.weight, case.targets)
    calls = {
        "linear_logprob": lambda: ops.linear_logprob(*given, **options),
        "linear_grpo_loss": lambda: ops.linear_grpo_loss(*given, case.advantages, None, None, SPECS["clip"], **options),
        "linear_cross_entropy": lambda: ops.linear_cross_entropy(*given, case.token_weight, **options),
    }
    with pytest.raises(ValueError, match=message):
        calls[op]()


@pytest.mark.skipif(DEVICE == "cuda", reason="of a CPU")
def test_a_cpu_is_not_its_chip(monkeypatch):
    monkeypatch.setattr(checks, "_quack_version", lambda: "0.6.5")
    case = make(20, 64, 128, torch.bfloat16)
    with pytest.raises(ValueError, match=r"^head: 'quack' has kernels for sm_90 and sm_100, hidden is on cpu; head='triton' has it$"):
        ops.linear_logprob(case.hidden, case.weight, case.targets, head="quack")


def test_not_under_the_compiler(on_hopper, monkeypatch):
    case = make(20, 64, 128, torch.bfloat16)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(ValueError, match=r"^head: not 'quack' under torch\.compile"):
        ops.linear_logprob(case.hidden, case.weight, case.targets, head="quack")


def test_one_target_a_row_and_the_whole_distribution(on_hopper):
    case = make(5, 64, 128, torch.bfloat16)
    for more in ({"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}):
        with pytest.raises(ValueError, match=r"^top_k, top_p, min_p: not with head='quack'; head='triton' has it$"):
            ops.linear_logprob(case.hidden, case.weight, case.targets, head="quack", **more)
    with pytest.raises(ValueError, match=r"^targets: head='quack' takes \(T,\), got \(5, 1\); head='triton' has it$"):
        ops.linear_logprob(case.hidden, case.weight, case.targets[:, None], head="quack")


def test_no_rows(on_hopper):
    case = make(1, 64, 128, torch.bfloat16)
    hidden = case.hidden[:0].detach().requires_grad_()
    loss = ops.linear_cross_entropy(hidden, case.weight, case.targets[:0], case.token_weight[:0], head="quack")
    loss.backward()
    assert loss == 0 and hidden.grad.shape == (0, 64)


# ---- the contract


@pytest.mark.skipif(not INSTALLED, reason="quack is not installed")
def test_the_stand_in_has_quacks_signatures():
    """Read from the source, since importing quack takes CuTe and half a minute."""
    (folder,) = importlib.util.find_spec("quack").submodule_search_locations
    inside = {"EpiMod": ["__init__", "gemm"], "ColVecSelect": ["__init__"], "MaxLog2": ["__init__", "out"], "ColVecReduce": ["__init__"]}
    for place, members in quack_standin.PLACES.items():
        path = Path(folder, *place.split(".")[1:])
        found = {}
        for file in [path.with_suffix(".py")] if path.with_suffix(".py").exists() else sorted(path.glob("*.py")):
            found |= {
                node.name: node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, (ast.FunctionDef, ast.ClassDef))
            }
        if place.endswith("scaled_exp"):  # what it inherits
            bases = ast.parse(Path(folder, "epilogue", "ops.py").read_text())
            found |= {node.name: node for node in ast.walk(bases) if isinstance(node, ast.ClassDef) and node.name not in found}
        for member in members:
            if inspect.isfunction(member):
                assert _named(found[member.__name__]) == list(inspect.signature(member).parameters), member.__name__
            for name in inside.get(member.__name__, []):
                theirs = _method(found, member.__name__, name)
                assert _named(theirs) == list(inspect.signature(getattr(member, name)).parameters), f"{member.__name__}.{name}"


def _named(node: ast.FunctionDef) -> list[str]:
    return [one.arg for one in (*node.args.args, *node.args.kwonlyargs)]


def _method(found: dict, owner: str, name: str) -> ast.FunctionDef:
    """A method, of the class or of the first of its bases that has one."""
    here = [node for node in found[owner].body if isinstance(node, ast.FunctionDef) and node.name == name]
    return here[0] if here else _method(found, found[owner].bases[0].id, name)


def test_rounded_bits_are_taken_apart_exactly():
    """k ln 2 in two parts: the first exact for every k that float32 logits of a head have, the sum as near as float32 comes."""
    k = torch.arange(-(2**14), 2**14, 37, dtype=torch.float64)
    high, low = quack_head.LN2_HIGH.value, quack_head.LN2_LOW.value
    assert torch.equal((k.float() * high).double(), k * high)
    assert abs(high + low - torch.log(torch.tensor(2.0, dtype=torch.float64)).item()) < 1e-11

"""The head's three products by quack (`pip install quack-kernels`): its CuTe GEMMs for sm_90 and sm_100, with what we need of a softmax.

T rows, H hidden size, V vocabulary, P = V / PART parts. quack composes an epilogue from ops of its own: `MaxLog2` is the peak of a row's
tile of columns in bits, rounded to a whole number k, which makes exp(z) = e * 2^k with e <= sqrt(2) and 2^k exact in any float;
`ColVecReduce` adds up over the tile, `ColVecSelect` stores the column that the row's index names. quack.epilogue.scaled_exp has the same
exponential, but no sum of e * log2 e, which entropies take, and no temperature: hence an epilogue of ours.

On sm_90 an operand may be multiplied on its way to the tensor cores (`a_transform`, one 16-bit value for each row and 64 columns): with the
target's entry put right, dz = factor * 2^(k - k_row) * e, and the gradient of the logits is never written.

Importing this module takes quack, 0.6.5 or a later 0.6; what was read is 0.6.5.
"""

from __future__ import annotations

from quack.epilogue.frontend import gemm_epilogue
from quack.epilogue.math import pexp2
from quack.epilogue.ops import ColVecLoad, ColVecReduce, ColVecSelect
from quack.epilogue.scaled_exp import MaxLog2
from quack.operand_transform import a_transform, transform_a_operand
from torch import Tensor

PART = 128  # columns: two tiles of 128 x 128 in turns take 168 registers on sm_90 and spill nothing, with 192 columns they would
LOG2E = 1.4426950408889634
_peak, _target = MaxLog2("peak"), ColVecLoad("target")


def _logits(acc, inverse):
    return {"peak": acc * inverse}


@gemm_epilogue(
    ops={"peak": _peak, "inverse": ColVecLoad("inverse")},
    prepass=_logits,
    prepass_outs=("peak",),
    reduces={"total": ColVecReduce("total"), "moment": ColVecReduce("moment", scaled=True)},
    outs={"chosen": ColVecSelect("chosen", idx_op=_target)},
    extra_ops=(_peak.out("bits"), _target),
)
def softmax_part(acc, inverse, peak):
    power = acc * inverse * LOG2E - peak
    e = pexp2(power)
    return {"D": e, "total": e, "moment": (e, power), "chosen": acc}


@gemm_epilogue(ops={"factor": ColVecLoad("factor")})
def row_scaled(acc, factor):
    return {"D": acc * factor}


@gemm_epilogue()
def plain(acc):
    return {"D": acc}


@a_transform(vec_size=8, args={"shift": "colvec_ktile"})
def shifted_rows(x, shift):
    return x * shift


@a_transform(vec_size=8, args={"shift": "kvec_m64"})
def shifted_columns(x, shift):
    return x * shift


def logits(
    hidden: Tensor,  # (T, H)
    weight: Tensor,  # (V, H)
    inverse: Tensor,  # (T,) float32
    target: Tensor,  # (T,) int64, -1 = in no column
    *,
    scaled: Tensor | None,  # (T, V): e
    bits: Tensor,  # (T, P) float32: k
    total: Tensor,  # (T, P) float32: sum e
    moment: Tensor,  # (T, P) float32: sum e * log2 e
    chosen: Tensor,  # (T,) float32: the product at the target, kept where there is none
    major: int,
) -> None:
    """x = hidden @ weight.T and the softmax of x * inverse in parts; scaled None: nothing of size (T, V) is written."""
    vectors = {"peak": PART, "inverse": inverse, "target": target, "bits": bits, "total": total, "moment": moment, "chosen": chosen}
    rows = 128 if major == 9 else 256  # sm_100: of two multiprocessors that share a product
    tile = {"tile_M": rows, "tile_N": PART, "cluster_M": 2, "cluster_N": 1, "pingpong": major == 9}
    softmax_part.gemm(hidden, weight, scaled, epi_args=vectors, **tile)


def dhidden(scaled: Tensor, shift: Tensor, factor: Tensor, weight: Tensor, out: Tensor) -> None:
    """out (T, H) = factor (T,) * ((scaled * shift) @ weight). T a multiple of 128; shift (V / 64, T) of scaled's dtype."""
    operand = transform_a_operand(shifted_rows, scaled, {"shift": shift}, 128, 64)
    tile = {"tile_M": 128, "tile_N": _columns(weight), "tile_K": 64, "cluster_M": 2, "cluster_N": 1}
    row_scaled.gemm(operand, weight.mT, out, epi_args={"factor": factor}, transform_a=shifted_rows, **tile)


def dweight(scaled: Tensor, shift: Tensor, hidden: Tensor, out: Tensor, add: bool) -> None:
    """out (V, H) float32 (+)= (scaled * shift).T @ hidden, with T and shift as above. What is added is added in L2, in one order."""
    operand = transform_a_operand(shifted_columns, scaled.t(), {"shift": shift}, 128, 64)
    tile = {"tile_M": 128, "tile_N": _columns(hidden), "tile_K": 64, "cluster_M": 1, "cluster_N": 2}
    plain.gemm(operand, hidden.mT, out, epi_args={}, transform_a=shifted_columns, add_to_output=add, **tile)


def _columns(x: Tensor) -> int:
    """A tile's columns: what quack's own cross-entropy takes."""
    return 192 if x.shape[1] % 192 == 0 else 256

"""uint8 images to normalised patches in Qwen2-VL's merge order, any number of images of any sizes in one launch.

I images of H x W pixels, p patch, m merge, F frames (one image, repeated); M = sum of H W / (p m)^2 merged tokens, P = M m^2 patches.
A token is m p lines of m p pixels, and m^2 adjacent rows of the output (P, 3 F p^2); tokens run over (H / (p m), W / (p m)), its rows over
(m, m), a row over (channel, frame, y, x). Values are v * scale + shift of the channel, in fp32.

Bytes a pixel: 3 read and 3 F times the output's element written. A program makes one token. Its lines (84 bytes each for p = 14) start
anywhere, so it loads the 16-byte pieces that cover them, and picks from these, in shared memory, the bytes of an output that is one
contiguous run: loads and stores are of 16 bytes whatever p is.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

KIND = {"patchify_kernel": "memory"}
WARPS = 4
SEARCH = tl.constexpr(128)  # images looked at together to find a token's own


@triton.jit(do_not_specialize=["I"])
def patchify_kernel(
    pixels,  # (N,) uint8, N a multiple of 16
    table,  # (3, I) int64: first token, first byte (a multiple of 16), tokens in a row of the image
    out,  # (P, 3 * FRAMES * PATCH**2)
    N,
    I,  # noqa: E741
    scale,  # of each channel
    shift,
    PATCH: tl.constexpr,
    MERGE: tl.constexpr,
    FRAMES: tl.constexpr,
    WINDOW: tl.constexpr,  # bytes that cover a line of a token wherever it starts
    SOURCE: tl.constexpr,
    PATCHES: tl.constexpr,
    RUN: tl.constexpr,  # at least FRAMES * PATCH**2, what a patch has of a channel: contiguous in the output
):
    token = tl.program_id(0).to(tl.int64)
    before = 0  # images that begin at or before this token
    for i in range(0, I, SEARCH):
        image = i + tl.arange(0, SEARCH)
        before += tl.sum((tl.load(table + image, image < I, token + 1) <= token).to(tl.int32), 0)
    own = table + before - 1
    place, columns = token - tl.load(own), tl.load(own + 2 * I)
    line_bytes = columns * (3 * PATCH * MERGE)
    corner = tl.load(own + I) + (place // columns) * (PATCH * MERGE) * line_bytes + (place % columns) * (3 * PATCH * MERGE)

    at = tl.arange(0, SOURCE)
    start = corner + (at // WINDOW) * line_bytes
    address = (start // 16) * 16 + at % WINDOW
    source = tl.load(pixels + address, (at < PATCH * MERGE * WINDOW) & (address < N), 0)

    # where an output's byte is does not depend on the channel, but for an offset: one index serves three gathers
    column = tl.arange(0, PATCHES * RUN)
    patch, element = column // RUN, column % RUN
    inside = (patch < MERGE * MERGE) & (element < FRAMES * PATCH * PATCH)
    point = element % (PATCH * PATCH)
    y = (patch // MERGE) * PATCH + point // PATCH
    x = (patch % MERGE) * PATCH + point % PATCH
    turn, line_turn = (corner % 16).to(tl.int32), (line_bytes % 16).to(tl.int32)
    picked = tl.where(inside, y * WINDOW + (turn + y * line_turn) % 16 + 3 * x, 0)
    to = out + token * (3 * FRAMES * PATCH * PATCH * MERGE * MERGE) + patch * (3 * FRAMES * PATCH * PATCH) + element
    for channel in tl.static_range(3):
        value = tl.gather(source, picked + channel, 0).to(tl.float32) * scale[channel] + shift[channel]
        tl.store(to + channel * (FRAMES * PATCH * PATCH), value.to(out.dtype.element_ty), inside)


def patchify(
    pixels: Tensor,
    table: Tensor,
    tokens: int,
    *,
    patch: int,
    merge: int,
    frames: int,
    scale: tuple[float, float, float],
    shift: tuple[float, float, float],
    dtype: torch.dtype,
) -> Tensor:
    """Patches (tokens * merge**2, 3 * frames * patch**2) of dtype fp32, fp16 or bf16.

    pixels (N,) uint8, N a multiple of 16: images (H, W, 3), each from a multiple of 16 bytes on, H and W multiples of patch * merge; table
    (3, I) int64, per image its first merged token, first byte, and merged tokens per row; tokens: merged tokens of all images.
    """
    assert len(pixels) % 16 == 0 and table.is_contiguous() and table.shape[0] == 3
    side = patch * merge
    window = triton.cdiv(3 * side + 16 - math.gcd(3 * side, 16), 16) * 16
    out = torch.empty(tokens * merge**2, 3 * frames * patch**2, dtype=dtype, device=pixels.device)
    if tokens:
        patchify_kernel[(tokens,)](
            pixels,
            table,
            out,
            N=len(pixels),
            I=table.shape[1],
            scale=scale,
            shift=shift,
            PATCH=patch,
            MERGE=merge,
            FRAMES=frames,
            WINDOW=window,
            SOURCE=triton.next_power_of_2(side * window),
            PATCHES=triton.next_power_of_2(merge**2),
            RUN=triton.next_power_of_2(frames * patch**2),
            num_warps=WARPS,
        )
    return out

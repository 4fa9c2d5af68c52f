"""Functions of float32 numbers by the fewest instructions of a GPU.

What Triton makes of a division and of exp scales numbers that are nearly zero or nearly infinite, by three or four
instructions each; no kernel of this library needs that, for what it computes next is rounded or squashed. (tl.exp2 does
not.) NVIDIA's own instructions are written out, other GPUs get Triton's functions.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import is_cuda
from triton.runtime.jit import constexpr_function


@constexpr_function
def _for_nvidia() -> bool:
    return not triton.knobs.runtime.interpret and is_cuda()


@constexpr_function
def _interpreted() -> bool:
    return triton.knobs.runtime.interpret


@triton.jit
def opaque(x):
    """A number as it is, of which the compiler knows nothing: what is computed from it is computed anew instead of
    being kept in registers since the last time."""
    if _for_nvidia():
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], x.dtype, is_pure=True, pack=1)
    return x


_ROUNDED = tl.constexpr("""{
    .reg .b32 pair;
    cvt.rn.bf16x2.f32 pair, $3, $2;
    shl.b32 $0, pair, 16;
    and.b32 $1, pair, 0xffff0000;
}""")


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """float32 as it is once it was stored in DTYPE. Two numbers are one conversion on NVIDIA's GPUs; of a conversion
    and its inverse the compiler makes one for each, on a unit of a quarter of the rate."""
    if _for_nvidia() and tl.bfloat16 == DTYPE:
        x = tl.inline_asm_elementwise(_ROUNDED, "=r,=r,f,f", [x], tl.float32, is_pure=True, pack=2)
    else:
        x = x.to(DTYPE).to(tl.float32)
    return x


@triton.jit
def reciprocal(x):
    """1 / x to one unit in the last place; zero above 2^126."""
    if _for_nvidia():
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        y = 1.0 / x
    return y


@triton.jit
def coarse_tanh(x):
    """tanh(x) to 2^-11 of its value: one instruction on NVIDIA's GPUs. The interpreter rounds to as few digits."""
    if _for_nvidia():
        y = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        y = 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0
        if _interpreted():
            word = y.to(tl.int32, bitcast=True)
            y = tl.where(y == y, ((word + 0x1000) & -0x2000).to(tl.float32, bitcast=True), y)
    return y


_ADD_TWO = {
    bits: tl.constexpr(f"{{ .reg .b32 one; mov.b32 one, {one}; fma.rn.{bits}x2 $0, $1, one, $2; }}")
    for bits, one in (("bf16", "0x3F803F80"), ("f16", "0x3C003C00"))
}
_ADD_TWO_BF16, _ADD_TWO_F16 = _ADD_TWO["bf16"], _ADD_TWO["f16"]


@triton.jit
def add_rounded(x, y):
    """x + y, rounded once, in their dtype; of a tile in 16 bits two at a time, without a way through float32."""
    if _for_nvidia() and x.dtype != tl.float32:
        code: tl.constexpr = _ADD_TWO_BF16 if x.dtype == tl.bfloat16 else _ADD_TWO_F16
        y = tl.inline_asm_elementwise(code, "=r,r,r", [x, y], x.dtype, is_pure=True, pack=2)
    else:
        y = (x.to(tl.float32) + y.to(tl.float32)).to(x.dtype)
    return y


@triton.jit
def _silu(z, DTYPE: tl.constexpr):
    if tl.bfloat16 == DTYPE:
        half = 0.5 * z
        t = coarse_tanh(half)
        y, s = half + half * t, 0.5 + 0.5 * t
    else:
        s = reciprocal(1.0 + tl.exp2(z * -1.4426950408889634))
        y = z * s
    return y, s


@triton.jit
def silu(z, DTYPE: tl.constexpr):
    """z * s for the sigmoid s of z, before it is rounded to DTYPE: bfloat16 hides the error of `coarse_tanh`, by which
    s is 1/2 + tanh(z / 2) / 2."""
    y, _ = _silu(z, DTYPE=DTYPE)
    return y


@triton.jit
def silu_of_half(half, DTYPE: tl.constexpr):
    """silu(2 half): whoever computes z by a multiply-add can have its half at no cost."""
    if tl.bfloat16 == DTYPE:
        y = half + half * coarse_tanh(half)
    else:
        y = silu(2.0 * half, DTYPE=DTYPE)
    return y


_SIGMOID = tl.constexpr("""{
    .reg .f32 s, t;
    mul.f32 s, $2, 0fBFB8AA3B;
    ex2.approx.ftz.f32 s, s;
    add.f32 s, s, 0f3F800000;
    rcp.approx.ftz.f32 s, s;
    mul.f32 $0, $2, s;
""")
_COARSE_SIGMOID = tl.constexpr("""{
    .reg .f32 s, t;
    mul.f32 s, $2, 0f3F000000;
    tanh.approx.f32 t, s;
    fma.rn.f32 $0, s, t, s;
    fma.rn.f32 s, t, 0f3F000000, 0f3F000000;
""")
_COARSE_SIGMOID_OF_HALF = tl.constexpr("""{
    .reg .f32 s, t;
    tanh.approx.f32 t, $2;
    fma.rn.f32 $0, $2, t, $2;
    fma.rn.f32 s, t, 0f3F000000, 0f3F000000;
""")
_GRADIENT = tl.constexpr("""
    sub.f32 t, 0f3F800000, s;
    fma.rn.f32 t, $0, t, s;
    mul.f32 $1, $3, t;
}""")


@triton.jit
def silu_and_gradient(dy, z, DTYPE: tl.constexpr):
    """silu(z), and the gradient of z for the gradient dy of that.

    One piece of code with both results, because Triton would compute the function twice where its uses want it in
    different layouts."""
    if _for_nvidia():
        code: tl.constexpr = _COARSE_SIGMOID if tl.bfloat16 == DTYPE else _SIGMOID
        y, dz = tl.inline_asm_elementwise(
            code + _GRADIENT, "=&f,=f,f,f", [z, dy], (tl.float32, tl.float32), is_pure=True, pack=1
        )
    else:
        y, s = _silu(z, DTYPE=DTYPE)
        dz = dy * (s + y * (1.0 - s))
    return y, dz


@triton.jit
def silu_of_half_and_gradient(dy, half, DTYPE: tl.constexpr):
    """`silu_and_gradient` of z = 2 half; the gradient is that of z."""
    if tl.bfloat16 == DTYPE and _for_nvidia():
        code: tl.constexpr = _COARSE_SIGMOID_OF_HALF + _GRADIENT
        y, dz = tl.inline_asm_elementwise(
            code, "=&f,=f,f,f", [half, dy], (tl.float32, tl.float32), is_pure=True, pack=1
        )
    else:
        y, dz = silu_and_gradient(dy, 2.0 * half, DTYPE=DTYPE)
    return y, dz

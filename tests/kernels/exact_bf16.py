"""Triton's interpreter made exact in bf16, which it keeps as raw 16-bit integers.

Unpatched (3.6, 3.7 and 3.9), tl.dot multiplies those integers, casts from fp32 truncate instead of rounding, and other
arithmetic is wrong without a word. Patched, products and casts are what the GPU computes; other arithmetic on bf16 is
refused, for our kernels compute in fp32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def widened(x: Any) -> Any:
    """A bf16 handle as fp32; any other as it is."""
    if x.dtype.scalar != tl.bfloat16:
        return x
    return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def rounded(values: Any) -> Any:
    """fp32 values as raw bf16, to nearest, ties to even, as the GPU does."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)


def install() -> None:
    """Patch the interpreter of this process, once."""
    builder: Any = interpreter.InterpreterBuilder
    if getattr(builder, "exact_bf16", False):
        return
    builder.exact_bf16 = True
    dot, cast = builder.create_dot, builder.cast_impl

    def multiply(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    def cast_exactly(self: Any, source: Any, to: Any) -> Any:
        if source.dtype.scalar == tl.bfloat16 and to.scalar != tl.bfloat16:
            wide = widened(source)
            return wide if to.scalar == tl.float32 else cast(self, wide, to)
        if to.scalar == tl.bfloat16 and source.dtype.scalar != tl.bfloat16:
            return interpreter.TensorHandle(rounded(source.data.astype(np.float32)), tl.bfloat16)
        return cast(self, source, to)

    builder.create_dot, builder.cast_impl = multiply, cast_exactly
    builder.binary_op, builder.unary_op = _refusing(builder.binary_op), _refusing(builder.unary_op)
    reduce: Any = interpreter.ReduceOps
    reduce.sum, reduce.min_max = _refusing(reduce.sum), _refusing(reduce.min_max)


def _refusing(operation: Any) -> Any:
    def refuse(self: Any, first: Any, *rest: Any, **more: Any) -> Any:
        for x in (*(first if isinstance(first, tuple) else (first,)), *rest):
            if hasattr(x, "dtype") and getattr(x.dtype, "scalar", None) == tl.bfloat16:
                raise TypeError("arithmetic in bf16: convert to fp32 first")
        return operation(self, first, *rest, **more)

    return refuse

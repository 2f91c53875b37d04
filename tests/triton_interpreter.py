"""Makes Triton's interpreter compute as a device does, or stop where it cannot.

The interpreter keeps both formats as unsigned integers. Left as it is, its matrix
product multiplies the bits of bfloat16 as if they were numbers, and so do sums and
comparisons; it cuts float32 to bfloat16 instead of rounding; and it reads an e4m3 NaN
as 480, rounds ties away from zero and loses the carry into the exponent.

What the patches prove: that a kernel puts the right elements together, and rounds in the
places where a device does. What they do not: how matrix units add (here it is float32,
from left to right or in BLAS's order), and that a device's conversions and the compiler's
are right. Arithmetic on either format outside of a matrix product raises TypeError, since
the kernels are meant to do it in float32, where devices agree.

What a masked load brings where it does not load is undefined unless the load says so. The
interpreter brings zeros, a device whatever was there; here it is NaN, or 123.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype

TORCH = {
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
}
AS_INTEGERS = (tl.bfloat16, tl.float8e4nv)
ARITHMETIC = [
    f"create_{name}"
    for names in (
        ("fadd", "fsub", "fmul", "fdiv", "fneg", "fma", "clampf", "exp", "exp2", "log", "log2"),
        ("minimumf", "maximumf", "minnumf", "maxnumf", "sqrt", "fabs"),
        ("fcmpOLT", "fcmpOGT", "fcmpOLE", "fcmpOGE", "fcmpOEQ", "fcmpONE", "fcmpUNE"),
    )
    for name in names
]


@contextmanager
def faithful() -> Iterator[None]:
    """While this is open. Without effect on kernels that are compiled."""
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        for name in ("cast_impl", "create_fp_to_fp"):
            patch.setattr(InterpreterBuilder, name, _converting(getattr(InterpreterBuilder, name)))
        patch.setattr(InterpreterBuilder, "create_dot", _widening(InterpreterBuilder.create_dot))
        load = InterpreterBuilder.create_masked_load
        patch.setattr(InterpreterBuilder, "create_masked_load", _poisoning(load))
        for name in ARITHMETIC:
            # Not every release has all of them.
            if hasattr(InterpreterBuilder, name):
                original = getattr(InterpreterBuilder, name)
                patch.setattr(InterpreterBuilder, name, _refusing(name, original))
        yield


def _convert(handle: TensorHandle, target: tl.dtype) -> TensorHandle:
    """Rounds to nearest, ties to even. What e4m3 cannot hold becomes NaN, although some
    devices and some versions of torch saturate: a kernel that cares must say so."""
    source = torch.from_numpy(np.array(handle.data)).view(TORCH[handle.dtype.scalar])
    if target == tl.float8e4nv:
        source = source.float()
        source = source.masked_fill(source.abs() > 464, float("nan"))
    converted = source.to(TORCH[target])
    if target in AS_INTEGERS:
        converted = converted.view(torch.uint16 if target == tl.bfloat16 else torch.uint8)
    return TensorHandle(converted.numpy(), target)


def _poisoning(original: Callable[..., Any]) -> Callable[..., Any]:
    def masked_load(builder: Any, places: TensorHandle, mask: Any, other: Any, *rest: Any) -> Any:
        if other is None:
            element = places.get_element_ty()
            poison = {tl.bfloat16: 0x7FC0, tl.float8e4nv: 0x7F}.get(element)
            numpy_type = _get_np_dtype(element)
            if poison is None:
                poison = np.nan if element.is_floating() else 0x7B if element.is_int() else 0
            filled = np.full(places.data.shape, poison, dtype=numpy_type)
            other = TensorHandle(filled, element)
        return original(builder, places, mask, other, *rest)

    return masked_load


def _converting(original: Callable[..., Any]) -> Callable[..., Any]:
    def convert(builder: Any, source: TensorHandle, target: Any, *rest: Any) -> Any:
        pair = (source.dtype.scalar, target.scalar)
        if all(each in TORCH for each in pair) and any(each in AS_INTEGERS for each in pair):
            return _convert(source, target.scalar)
        return original(builder, source, target, *rest)

    return convert


def _widening(original: Callable[..., Any]) -> Callable[..., Any]:
    def dot(builder: Any, left: TensorHandle, right: TensorHandle, *rest: Any) -> Any:
        assert left.dtype == right.dtype, "devices take operands of one dtype"
        if left.dtype.scalar in AS_INTEGERS:
            left, right = _convert(left, tl.float32), _convert(right, tl.float32)
        return original(builder, left, right, *rest)

    return dot


def _refusing(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def operation(builder: Any, *operands: Any) -> Any:
        for operand in operands:
            if isinstance(operand, TensorHandle) and operand.dtype.scalar in AS_INTEGERS:
                raise TypeError(f"{name} on {operand.dtype}")
        return original(builder, *operands)

    return operation

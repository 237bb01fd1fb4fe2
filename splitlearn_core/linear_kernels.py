"""torch's fast linear kernels for a CPU, by quantization: how a weight is packed and multiplied.

This is the one place where private operators of torch are called.  Each is tried at its first use
in a process, against a plain linear: where one is missing, fails or is wrong, that is an error.
Nothing falls back on anything else.

Sizes: oneDNN pads outputs to 64 and inputs to 16 (int8: 64); FBGEMM pads inputs to 512 and outputs
to 32, on processors with AVX-512.  Narrower ones pad less.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from threading import Lock
from typing import Any, Protocol

import torch
from torch import nn

from splitlearn_core.dtypes import dtype_name
from splitlearn_core.errors import QuantizationError
from splitlearn_core.messages import in_one_line
from splitlearn_core.quantization import COMPUTE_DTYPES, FP16, INT8, PREPACKED, dtype_refusal

TOLERANCES = {
    (PREPACKED, torch.float32): 1e-5,
    (PREPACKED, torch.bfloat16): 2e-2,
    (FP16, torch.float32): 1e-3,
    (INT8, torch.float32): 2e-2,
    (INT8, torch.bfloat16): 2e-2,
}
"""Largest relative error of the self-test, by quantization and dtype of activations."""

_LARGEST_FP16 = 65504.0
_ONEDNN_BLOCK = (64, 16)
_FP16_BLOCK = (32, 512)
_INT8_BLOCK = (64, 64)
_INT8_BYTES_PER_OUTPUT = 8  # a scale, the sum of the weights
_LARGEST_INT8 = 127
_MOST_INT8_INPUTS = (2**31 - 1) // (_LARGEST_INT8 * 255)
_SMALLEST_SCALE = 1e-30
_BLOCK_VALUES = 1 << 17
"""Values that are rounded at a time: what comes between stays in a processor core's own cache."""

_TEST_SIZES = (5, 70, 100)


class Kernel(Protocol):
    """What packs a weight, and computes with it."""

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        """Return the packed form of a weight [out, in].

        Raises:
            QuantizationError: Its values can't be kept in that form.
        """

    def run(self, inputs: torch.Tensor, packed: Any, bias: torch.Tensor | None) -> torch.Tensor:
        """Return [..., out] of [..., in]."""

    def nbytes(self, rows: int, columns: int, itemsize: int) -> int:
        """Return the bytes that a packed weight [rows, columns] takes; rather too many."""

    def scratch(self, rows: int, columns: int) -> int:
        """Return the bytes that are needed besides while it is packed."""


class Prepacked:
    """oneDNN's: the weight in blocks, of the same dtype."""

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        """Reorder the weight."""
        del bias
        return torch.ops.mkldnn._reorder_linear_weight(weight)  # noqa: SLF001

    def run(self, inputs: torch.Tensor, packed: Any, bias: torch.Tensor | None) -> torch.Tensor:
        """Multiply and add."""
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(  # noqa: SLF001
            inputs, packed, bias, "none", [], ""
        )
        return result

    def nbytes(self, rows: int, columns: int, itemsize: int) -> int:
        """Return the bytes of whole blocks."""
        return _padded(rows, columns, _ONEDNN_BLOCK) * itemsize

    def scratch(self, rows: int, columns: int) -> int:
        """Return 0."""
        del rows, columns
        return 0


class Fp16:
    """FBGEMM's: the weight as float16, widened while it is read."""

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        """Narrow the weight; torch itself would cut what is too large off."""
        low, high = _range(weight)
        if not -_LARGEST_FP16 <= low <= high <= _LARGEST_FP16:
            raise QuantizationError(
                f"has values from {low:g} to {high:g}, float16 holds up to {_LARGEST_FP16:,.0f}:"
                f" use {PREPACKED}, or leave quantization out"
            )
        return torch.ops.quantized.linear_prepack_fp16(weight, bias)

    def run(self, inputs: torch.Tensor, packed: Any, bias: torch.Tensor | None) -> torch.Tensor:
        """Multiply and add."""
        del bias
        result: torch.Tensor = torch.ops.quantized.linear_dynamic_fp16.default(inputs, packed)
        return result

    def nbytes(self, rows: int, columns: int, itemsize: int) -> int:
        """Return the bytes of whole blocks."""
        del itemsize
        return _padded(rows, columns, _FP16_BLOCK) * torch.float16.itemsize

    def scratch(self, rows: int, columns: int) -> int:
        """Return 0."""
        del rows, columns
        return 0


class Int8:
    """oneDNN's: the weight as int8, symmetric, with a scale for each output.

    Inputs are rounded to 8 bits by a scale for each position, and sums of products are whole
    numbers: what a position gets does not depend on which others are in the call.  (But for the
    last bit of float32, where a sum passes 2^24: oneDNN rounds those at different places.)

    oneDNN takes unsigned inputs, less a zero point, with a scale for all; scales of positions are
    multiplied afterwards.  (It takes signed ones too, but has fast kernels for them with AMX
    alone, and for few positions not even there; and results in bfloat16 with AVX-512 alone.)

    Attributes:
        reduce_range: Whether inputs must get by with 7 bits: without VNNI, sums of two products
            are kept in 16.  Found out by the self-test.
    """

    def __init__(self) -> None:
        self.reduce_range = False
        self._no_zero_point = torch.zeros(1, dtype=torch.long, device="cpu")

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        """Round the weight."""
        del bias
        low, high = _range(weight)
        if not -torch.inf < low <= high < torch.inf:
            raise QuantizationError(f"has values from {low:g} to {high:g}: int8 has no such")
        if weight.shape[1] > _MOST_INT8_INPUTS:
            raise QuantizationError(
                f"has {weight.shape[1]:,} inputs: int8 sums up to {_MOST_INT8_INPUTS:,} in 32 bits"
            )
        rounded, scales = _rounded_weight(weight)
        return torch.ops.onednn.qlinear_prepack(rounded, None), scales

    def run(self, inputs: torch.Tensor, packed: Any, bias: torch.Tensor | None) -> torch.Tensor:
        """Round the inputs, multiply and add."""
        weight, scales = packed
        rows = inputs.reshape(-1, inputs.shape[-1])
        zero_point = 64 if self.reduce_range else 128
        rounded, row_scales = _rounded_rows(rows, zero_point)
        result: torch.Tensor = torch.ops.onednn.qlinear_pointwise.default(
            rounded, 1.0, zero_point, weight, scales, self._no_zero_point, None,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        result.mul_(row_scales)
        if bias is not None:
            result.add_(bias)
        return result.to(inputs.dtype).view(*inputs.shape[:-1], result.shape[-1])

    def nbytes(self, rows: int, columns: int, itemsize: int) -> int:
        """Return the bytes of whole blocks, and of what belongs to each output."""
        del itemsize
        return _padded(rows, columns, _INT8_BLOCK) + rows * _INT8_BYTES_PER_OUTPUT

    def scratch(self, rows: int, columns: int) -> int:
        """Return the bytes of the rounded weight before it is packed, and of a block of it."""
        return rows * columns + 3 * torch.float32.itemsize * min(rows * columns, _BLOCK_VALUES)


_INT8 = Int8()
KERNELS: dict[str, Kernel] = {PREPACKED: Prepacked(), FP16: Fp16(), INT8: _INT8}

_tested: set[tuple[str, torch.dtype]] = set()
_testing = Lock()


def packed_nbytes(quantization: str, rows: int, columns: int, dtype: torch.dtype) -> int:
    """Return the bytes that a weight [rows, columns] of `dtype` takes once it is packed."""
    return KERNELS[quantization].nbytes(rows, columns, dtype.itemsize)


def check_kernel(quantization: str, dtype: torch.dtype) -> None:
    """See that this machine packs and computes rightly; once in a process.

    Raises:
        QuantizationError: (a `ValueError`) It does not, or the dtype is another.
    """
    if (quantization, dtype) in _tested:
        return
    if refusal := dtype_refusal(quantization, dtype_name(dtype)):
        raise QuantizationError(refusal)
    with _testing:
        if (quantization, dtype) not in _tested:
            _test(quantization, dtype)
            _tested.add((quantization, dtype))


def _test(quantization: str, dtype: torch.dtype) -> None:
    """Compare a kernel with a plain linear, on a small random case.

    The first tensor that torch quantizes in a process makes it warn that this will be removed one
    day; that is what this module is for, so it is not passed on.
    """
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            if quantization == INT8:
                # tried with a copy: layers of another dtype may be running
                _INT8.reduce_range = _INT8.reduce_range or _saturates(copy.copy(_INT8))
            error = _relative_error(KERNELS[quantization], dtype)
    except (RuntimeError, AttributeError, TypeError, NotImplementedError) as failure:
        raise _unusable(quantization, f"fails: {in_one_line(failure)}") from failure
    if not error <= TOLERANCES[quantization, dtype]:
        raise _unusable(
            quantization,
            f"is wrong: relative error {error:.2g} in {dtype_name(dtype)}, at most"
            f" {TOLERANCES[quantization, dtype]:g} was expected",
        )


def _unusable(quantization: str, what: str) -> QuantizationError:
    return QuantizationError(
        f"quantization {quantization} can't be used here: its kernel in torch {torch.__version__}"
        f" on this processor {what}; leave quantization out, or use another of"
        f" {', '.join(name for name in COMPUTE_DTYPES if name != quantization)}"
    )


def _relative_error(kernel: Kernel, dtype: torch.dtype) -> float:
    """Return how far a kernel is from a plain linear in float64, on seeded random numbers."""
    numbers = torch.Generator().manual_seed(0)
    batch, columns, rows = _TEST_SIZES
    inputs, weight, bias = (
        torch.randn(shape, generator=numbers, device="cpu").to(dtype)
        for shape in ((batch, columns), (rows, columns), (rows,))
    )
    wanted = nn.functional.linear(inputs.double(), weight.double(), bias.double())
    found = kernel.run(inputs, kernel.pack(weight, bias), bias).double()
    return float((found - wanted).norm() / wanted.norm())


def _saturates(kernel: Int8) -> bool:
    """Whether full 8 bits overflow: where all inputs and all weights are the largest there are."""
    kernel.reduce_range = False
    size = _ONEDNN_BLOCK[0]
    ones = torch.ones(size, size, dtype=torch.float32, device="cpu")
    found = kernel.run(ones, kernel.pack(ones, None), None)
    return bool((found - size).abs().max() > size * TOLERANCES[INT8, torch.float32])


def _rounded_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight [out, in] as int8, by a scale for each output, and the scales [out].

    Goes by blocks of rows, so that it takes no float32 copy of the whole.
    """
    rounded = torch.empty_like(weight, dtype=torch.int8, memory_format=torch.contiguous_format)
    scales = torch.empty(len(weight), 1, dtype=torch.float32, device=weight.device)
    for rows in _blocks(weight):
        values = weight[rows].float()
        torch.div(_largest(values), _LARGEST_INT8, out=scales[rows])
        rounded[rows] = (values / scales[rows]).round_()
    return rounded, scales.view(-1)


def _rounded_rows(rows: torch.Tensor, zero_point: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows [n, in] as uint8, by a scale for each row, and the scales, float32 [n, 1].

    Goes by blocks of rows as well: many at once take three times as long.
    """
    if rows.numel() <= _BLOCK_VALUES:
        return _rounded_block(rows, zero_point)
    rounded = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
    scales = torch.empty(len(rows), 1, dtype=torch.float32, device=rows.device)
    for block in _blocks(rows):
        rounded[block], scales[block] = _rounded_block(rows[block], zero_point)
    return rounded, scales


def _rounded_block(rows: torch.Tensor, zero_point: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows that are few, likewise."""
    values = rows.float()
    scales = values.abs().amax(-1, keepdim=True) / (zero_point - 1)
    # by way of int8: casts to uint8 take five times as long
    signed = (values / scales).round_().to(torch.int8)
    return signed.view(torch.uint8).add_(zero_point), scales


def _blocks(matrix: torch.Tensor) -> Iterator[slice]:
    """Yield the rows of a matrix [n, in], a block at a time."""
    height = max(1, _BLOCK_VALUES // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), height):
        yield slice(start, start + height)


def _largest(rows: torch.Tensor) -> torch.Tensor:
    """Return the largest magnitude of each row, [n, 1]; a little where there is none."""
    return rows.abs().amax(-1, keepdim=True).clamp_min_(_SMALLEST_SCALE)


def _range(weight: torch.Tensor) -> tuple[float, float]:
    """Return the least and the largest value; NaN where there is one."""
    low, high = torch.aminmax(weight)
    return float(low), float(high)


def _padded(rows: int, columns: int, block: tuple[int, int]) -> int:
    """Return the number of values in whole blocks."""
    high, wide = block
    return -(-rows // high) * high * (-(-columns // wide) * wide)

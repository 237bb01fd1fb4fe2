"""Linear layers whose weight is kept only in the form that a fast kernel of torch's wants.

This is the one place where private operators of torch are called.  Each is tried at its first use
in a process, against a plain linear: where one is missing, fails or is wrong, that is an error.
Nothing falls back on anything else.

Sizes: oneDNN pads outputs to 64 and inputs to 16; FBGEMM pads inputs to 512 and outputs to 32
(fp16) or 48 (int8), on processors with AVX-512.  Narrower ones pad less.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any, NoReturn, Protocol

import torch
from torch import nn

from splitlearn_core.dtypes import dtype_name
from splitlearn_core.errors import PackedWeightsError, QuantizationError
from splitlearn_core.messages import in_one_line
from splitlearn_core.quantization import COMPUTE_DTYPES, FP16, INT8, PREPACKED, dtype_refusal

TOLERANCES = {
    (PREPACKED, torch.float32): 1e-5,
    (PREPACKED, torch.bfloat16): 2e-2,
    (FP16, torch.float32): 1e-3,
    (INT8, torch.float32): 4e-2,
}
"""Largest relative error of the self-test, by quantization and dtype of activations."""

_LARGEST_FP16 = 65504.0
_ONEDNN_BLOCK = (64, 16)
_FP16_BLOCK = (32, 512)
_INT8_BLOCK = (48, 512)
_INT8_BYTES_PER_OUTPUT = 12  # a scale, a zero point, the sum of the weights
_LARGEST_INT8 = 127
_SMALLEST_SCALE = 1e-30
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
    """FBGEMM's: the weight as int8, symmetric, with a scale for each output.

    Attributes:
        reduce_range: Whether activations must get by with 7 bits: without VNNI, sums of two
            products are kept in 16.  Found out by the self-test.
    """

    def __init__(self) -> None:
        self.reduce_range = False

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        """Round the weight."""
        low, high = _range(weight)
        if not -torch.inf < low <= high < torch.inf:
            raise QuantizationError(f"has values from {low:g} to {high:g}: int8 has no such")
        largest = torch.maximum(weight.amax(1), weight.amin(1).neg())
        scales = (largest / _LARGEST_INT8).clamp_min(_SMALLEST_SCALE).double()
        zeros = torch.zeros(len(scales), dtype=torch.long)
        rounded = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        return torch.ops.quantized.linear_prepack(rounded, bias)

    def run(self, inputs: torch.Tensor, packed: Any, bias: torch.Tensor | None) -> torch.Tensor:
        """Round the inputs by one scale, multiply and add."""
        del bias
        result: torch.Tensor = torch.ops.quantized.linear_dynamic.default(
            inputs, packed, self.reduce_range
        )
        return result

    def nbytes(self, rows: int, columns: int, itemsize: int) -> int:
        """Return the bytes of whole blocks, and of what belongs to each output."""
        del itemsize
        return _padded(rows, columns, _INT8_BLOCK) + rows * _INT8_BYTES_PER_OUTPUT

    def scratch(self, rows: int, columns: int) -> int:
        """Return the bytes of the rounded weight before it is packed."""
        return rows * columns


_INT8 = Int8()
KERNELS: dict[str, Kernel] = {PREPACKED: Prepacked(), FP16: Fp16(), INT8: _INT8}

_tested: set[tuple[str, torch.dtype]] = set()
_testing = Lock()


class PackedLinear(nn.Module):
    """Stands where a linear layer was: holds its packed weight and its bias, for inference alone.

    Args:
        weight: [out, in]; not kept.
        bias: [out], or `None`.
        quantization: How to pack.

    Attributes:
        quantization: How it is packed.
        in_features: As in `nn.Linear`.
        out_features: As in `nn.Linear`.
        dtype: Of activations.
        bias: As it was, and no longer to be trained.
        nbytes: What the packed weight takes; the bias is a parameter, and counted as such.

    Raises:
        QuantizationError: (a `ValueError`) The weight can't be packed so.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, quantization: str) -> None:
        super().__init__()
        check_kernel(quantization, weight.dtype)
        self.quantization = quantization
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        kernel = KERNELS[quantization]
        with torch.no_grad():
            self._packed = kernel.pack(weight.detach(), self.bias)
        self._run: Callable[..., torch.Tensor] = kernel.run
        self.nbytes = packed_nbytes(quantization, self.out_features, self.in_features, weight.dtype)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return [..., out] of [..., in], both of `dtype`.

        A backward through it raises `PackedWeightsError`.
        """
        if inputs.requires_grad and torch.is_grad_enabled():
            result: torch.Tensor = _OneWay.apply(inputs, self)  # type: ignore[no-untyped-call]
            return result
        return self._run(inputs, self._packed, self.bias)

    def __getattr__(self, name: str) -> Any:
        """Say why there is no `weight`."""
        if name == "weight":
            raise AttributeError(
                f"this linear layer has no weight of its own: {self._why()}; load the part without"
                " quantization, and please report which architecture looks into it"
            )
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        """Show sizes and packing in `repr`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features},"
            f" bias={self.bias is not None}, quantization={self.quantization}"
        )

    def _save_to_state_dict(self, *_: Any, **__: Any) -> NoReturn:
        raise PackedWeightsError(
            f"{self._why()}, and can't be read back: for a state dict, or to save, load the part"
            " without quantization"
        )

    def _load_from_state_dict(self, *_: Any, **__: Any) -> NoReturn:
        raise PackedWeightsError(f"{self._why()}: other weights can't be put in their place")

    def check_move(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Refuse what would cast or move the weight.

        Raises:
            PackedWeightsError: It would.
        """
        moved = fn(torch.empty(0, dtype=self.dtype))
        if moved.dtype != self.dtype or moved.device.type != "cpu":
            raise PackedWeightsError(
                f"{self._why()}: they can't become {dtype_name(moved.dtype)} on {moved.device};"
                " load the part anew"
            )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        self.check_move(fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _why(self) -> str:
        return f"the weights are packed (quantization {self.quantization})"


@contextmanager
def weights_shown(model: nn.Module) -> Iterator[None]:
    """Give packed layers of `model` a weight on the meta device for as long as the block runs.

    It is marked as initialised: for an architecture's `_init_weights`, some of which set the
    weights of one module when they come to another.
    """
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    try:
        for layer in packed:
            shown = torch.empty(layer.out_features, layer.in_features, device="meta")
            shown._is_hf_initialized = True  # type: ignore[attr-defined]  # noqa: SLF001
            vars(layer)["weight"] = shown
        yield
    finally:
        for layer in packed:
            vars(layer).pop("weight", None)


class _OneWay(torch.autograd.Function):
    """A forward that gradients can't come back through."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, layer: PackedLinear) -> torch.Tensor:
        """Compute as without gradients."""
        ctx.why = layer._why()  # noqa: SLF001
        return layer._run(inputs, layer._packed, layer.bias)  # noqa: SLF001

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> NoReturn:
        """Refuse.

        Raises:
            PackedWeightsError: Always.
        """
        raise PackedWeightsError(f"{ctx.why}: no gradient passes; to train, load without")


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
                _INT8.reduce_range = _saturates(_INT8)
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
        torch.randn(shape, generator=numbers).to(dtype)
        for shape in ((batch, columns), (rows, columns), (rows,))
    )
    wanted = nn.functional.linear(inputs.double(), weight.double(), bias.double())
    found = kernel.run(inputs, kernel.pack(weight, bias), bias).double()
    return float((found - wanted).norm() / wanted.norm())


def _saturates(kernel: Int8) -> bool:
    """Whether full 8 bits overflow: where all inputs and all weights are the largest there are."""
    kernel.reduce_range = False
    size = _ONEDNN_BLOCK[0]
    ones = torch.ones(size, size)
    found = kernel.run(ones, kernel.pack(ones, None), None)
    return bool((found - size).abs().max() > size * TOLERANCES[INT8, torch.float32])


def _range(weight: torch.Tensor) -> tuple[float, float]:
    """Return the least and the largest value; NaN where there is one."""
    low, high = torch.aminmax(weight)
    return float(low), float(high)


def _padded(rows: int, columns: int, block: tuple[int, int]) -> int:
    """Return the number of values in whole blocks."""
    high, wide = block
    return -(-rows // high) * high * (-(-columns // wide) * wide)

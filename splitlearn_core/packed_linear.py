"""Linear layers whose weight is kept only in the form that a fast kernel wants."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import nn

from splitlearn_core.dtypes import dtype_name
from splitlearn_core.errors import PackedWeightsError
from splitlearn_core.linear_kernels import KERNELS, check_kernel, packed_nbytes

_SHARED = ("_packed", "_run")
"""What copies of a layer have in common."""


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

        Raises:
            PackedWeightsError: (a `RuntimeError`) They are of another dtype.
        """
        if inputs.dtype is not self.dtype:
            raise PackedWeightsError(
                f"{self._why()} and compute in {dtype_name(self.dtype)}, not in"
                f" {dtype_name(inputs.dtype)}"
            )
        if inputs.requires_grad and torch.is_grad_enabled():
            result: torch.Tensor = _OneWay.apply(inputs, self)  # type: ignore[no-untyped-call]
            return result
        return self._run(inputs, self._packed, self.bias)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLinear:
        """Return one with a bias of its own; the packed weight, which never changes, is shared."""
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        for name, value in vars(self).items():
            vars(other)[name] = value if name in _SHARED else copy.deepcopy(value, memo)
        return other

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
        """Compute as without gradients; a copy, as nobody may change a view that came of this."""
        ctx.why = layer._why()  # noqa: SLF001
        return layer._run(inputs, layer._packed, layer.bias).clone()  # noqa: SLF001

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> NoReturn:
        """Refuse.

        Raises:
            PackedWeightsError: Always.
        """
        raise PackedWeightsError(f"{ctx.why}: no gradient passes; to train, load without")

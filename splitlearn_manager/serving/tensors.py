"""Torch tensors to and from the bytes of a frame."""

from __future__ import annotations

import sys

import torch

from splitlearn_manager.serving.wire import DType, TensorName, WireTensor

__all__ = ["check_byte_order", "tensor_from_wire", "tensor_to_wire"]


def tensor_to_wire(name: TensorName, tensor: torch.Tensor) -> WireTensor:
    """Return a view of the tensor's bytes; they are copied only to make them contiguous on the CPU.

    Raises:
        ValueError: the wire does not carry its dtype.
    """
    check_byte_order()
    dtype = DType.from_torch_name(str(tensor.dtype))
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return WireTensor(name, dtype, tuple(tensor.shape), flat.numpy().data)


def tensor_from_wire(wire: WireTensor) -> torch.Tensor:
    """Return the tensor of those bytes, on the CPU.

    It shares a writable buffer that is aligned for its dtype, and has a copy of any other: torch
    has no tensors that can't be written.
    """
    check_byte_order()
    buffer = bytearray(wire.data) if wire.data.readonly else wire.data
    flat = torch.frombuffer(buffer, dtype=getattr(torch, wire.dtype.torch_name))
    if flat.data_ptr() % wire.dtype.itemsize:
        flat = flat.clone()
    return flat.reshape(wire.shape)


def check_byte_order() -> None:
    """Refuse a machine whose tensors are not as they travel."""
    if sys.byteorder != "little":
        raise RuntimeError("tensors travel in little-endian order, and this machine is big-endian")

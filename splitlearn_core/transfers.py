"""How tensors get to the device of a part."""

from __future__ import annotations

import torch


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a device; itself, if it is there.

    From the CPU to CUDA it goes by way of page-locked memory, which the device reads by itself: the
    thread does not wait, and what it launches next runs after the copy.  torch keeps that memory
    for the next tensor, and does not give it out again before it was read.

    One that needs gradients goes the plain way, which autograd knows.
    """
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.requires_grad:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)

"""Which device each component goes to.

`device_map="auto"` follows this table (number of accelerators -> devices):

    0   everything on the CPU
    1   Bottom on the CPU, Trunk and Top on cuda:0
    2   Bottom on the CPU, Trunk on cuda:0, Top on cuda:1
    3+  Bottom on cuda:0, Trunk on cuda:1, Top on cuda:2
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from splitlearn_core.plan import BOTTOM, TOP, TRUNK, SplitPlan

DeviceMap = str | Mapping[str, "str | torch.device"] | None

_AUTO: tuple[dict[str, str], ...] = (
    {BOTTOM: "cpu", TRUNK: "cpu", TOP: "cpu"},
    {BOTTOM: "cpu", TRUNK: "cuda:0", TOP: "cuda:0"},
    {BOTTOM: "cpu", TRUNK: "cuda:0", TOP: "cuda:1"},
    {BOTTOM: "cuda:0", TRUNK: "cuda:1", TOP: "cuda:2"},
)


def auto_device_map(num_accelerators: int) -> dict[str, str]:
    """Return the row of the table above for a machine with so many accelerators."""
    return dict(_AUTO[min(num_accelerators, len(_AUTO) - 1)])


def check_device(device: str | torch.device | int) -> torch.device:
    """Return a device that exists on this machine.

    Raises:
        ValueError: It is no device, or the machine has none of that kind or number; names those
            that it has.
    """
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"unknown device {device!r}: this machine has {', '.join(devices_here())}"
        ) from error
    there = devices_here()
    if resolved.type != "cpu" and f"{resolved.type}:{resolved.index or 0}" not in there:
        raise ValueError(f"device {resolved} is not there: this machine has {', '.join(there)}")
    return resolved


def devices_here() -> list[str]:
    """Return the names of this machine's devices, such as `cpu` and `cuda:0`."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return ["cpu"]
    numbers = range(torch.accelerator.device_count())
    return ["cpu", *(f"{accelerator.type}:{number}" for number in numbers)]


def resolve_devices(
    plan: SplitPlan, device: str | torch.device | None, device_map: DeviceMap
) -> dict[str, torch.device]:
    """Return a device for each component of `plan`.

    Args:
        plan: The parts that need one.
        device: Device of everything that `device_map` does not name; `None` is the CPU.
        device_map: `None`, `"auto"` (the table above), or component name -> device.  `trunk`
            stands for every Trunk part that is not named itself.

    Raises:
        ValueError: An unknown or absent device, or a name that is no component of the plan.
    """
    named = _as_mapping(device_map)
    known = {*plan.names, *(spec.kind for spec in plan.components)}
    unknown = sorted(set(named) - known)
    if unknown:
        raise ValueError(f"device_map names {unknown}; the components are {sorted(known)}")
    default = check_device("cpu" if device is None else device)
    return {
        spec.name: check_device(named.get(spec.name, named.get(spec.kind, default)))
        for spec in plan.components
    }


def _as_mapping(device_map: DeviceMap) -> Mapping[str, str | torch.device]:
    """Return the explicit form of a device map."""
    if device_map is None:
        return {}
    if isinstance(device_map, str):
        if device_map != "auto":
            raise ValueError(f"device_map must be 'auto' or a mapping, found {device_map!r}")
        return auto_device_map(torch.cuda.device_count())
    return device_map

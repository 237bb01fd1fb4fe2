"""The states of the random number generators that training draws from.

Python's, NumPy's global one, torch's for the CPU and for each accelerator that is in use.  To read
them draws nothing: a run that is saved goes on as one that is not.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from splitlearn_core.errors import CheckpointError

_ACCELERATORS = ("cuda", "xpu", "mps")


def capture() -> dict[str, Any]:
    """Return the states of this process's generators."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002 - the one that others draw from
        "torch": torch.get_rng_state(),
        "accelerators": {name: states for name in _ACCELERATORS if (states := _states(name))},
    }


def restore(states: dict[str, Any], where: str) -> tuple[str, ...]:
    """Put the generators of this process in these states.

    Args:
        states: What `capture` returned.
        where: Their file, for errors.

    Returns:
        What could not be restored, in words: states of accelerators that are not here.

    Raises:
        CheckpointError: (a `ValueError`) They are no such states.
    """
    try:
        random.setstate(states["python"])
        np.random.set_state(states["numpy"])  # noqa: NPY002
        torch.set_rng_state(states["torch"])
        notes = [_restore_device(name, s) for name, s in states["accelerators"].items()]
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{where} holds no states of random generators: {error}") from error
    return tuple(note for note in notes if note)


def _states(name: str) -> list[torch.Tensor]:
    """Return the states of the devices of one kind; none where it is not in use."""
    module = getattr(torch, name, None)
    if name == "mps":
        return [torch.mps.get_rng_state()] if torch.backends.mps.is_available() else []
    if module is None or not module.is_available() or not module.is_initialized():
        return []
    return list(module.get_rng_state_all())


def _restore_device(name: str, states: list[torch.Tensor]) -> str:
    """Restore the states of the devices of one kind; say what could not be."""
    module: Any = getattr(torch, name, None)
    if name == "mps" and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states[0])
        return ""
    count = module.device_count() if module is not None and name != "mps" else 0
    for index, state in enumerate(states[:count]):
        module.set_rng_state(state, index)
    if count >= len(states):
        return ""
    return (
        f"random states of {len(states)} devices of {name} were saved, and {count} are here:"
        " what is drawn there is not what it would have been"
    )

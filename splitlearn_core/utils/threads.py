"""How many threads torch computes with: a setting of the whole process.

Nothing in this library sets it on its own: a load that changed it would change the speed, and at
batch 1 the last bits, of forwards that run beside it.  A program sets it once, at its start.
"""

from __future__ import annotations

import torch


def configure_pytorch_threads(
    single_threaded: bool = True, num_threads: int | None = None
) -> int | None:
    """Set how many threads torch's operators use in this process.

    Args:
        single_threaded: Use one thread, whatever `num_threads` says not.
        num_threads: Use so many; takes precedence over `single_threaded`.

    Returns:
        The number set, or `None` where nothing was asked for and nothing was changed.

    Raises:
        ValueError: `num_threads` is not positive.
    """
    wanted = num_threads if num_threads is not None else (1 if single_threaded else None)
    if wanted is None:
        return None
    if wanted < 1:
        raise ValueError(f"num_threads must be at least 1, found {wanted}")
    torch.set_num_threads(wanted)
    return wanted

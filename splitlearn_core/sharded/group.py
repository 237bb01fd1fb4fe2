"""Joining the ranks of one run, and leaving them again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from splitlearn_core import machine

_DEFAULT_TIMEOUT = 600.0


@contextmanager
def joined_group(
    init_method: str = "env://",
    *,
    rank: int | None = None,
    world_size: int | None = None,
    backend: str | None = None,
    timeout: float = _DEFAULT_TIMEOUT,
    map_large_blocks: bool = False,
) -> Iterator[int]:
    """Join the process group for the block, and leave it afterwards, however the block ends.

    `torchrun` says through the environment where the ranks meet.  They meet at a TCP port, which
    torch opens on every interface and without authentication: on one machine
    `file:///path/of/a/new/file` opens none beyond loopback, between machines the network must be
    private.

    Args:
        init_method: Where ranks meet, see `torch.distributed.init_process_group`.
        rank: This process's; `None` reads `RANK`.
        world_size: How many there are; `None` reads `WORLD_SIZE`.
        backend: `gloo` or `nccl`; `None`: gloo for the CPU, nccl for GPUs that are there.
        timeout: Seconds that an operation among ranks may take.
        map_large_blocks: Have glibc give blocks of 1 MiB and more back to the system when they are
            freed, in the whole process: gathered parameters then don't seem to stay.

    Yields:
        This process's rank.
    """
    if map_large_blocks:
        machine.map_large_blocks()
    mine = int(os.environ["RANK"]) if rank is None else rank
    size = int(os.environ["WORLD_SIZE"]) if world_size is None else world_size
    has_gpus = torch.cuda.is_available()
    if has_gpus and backend != "gloo":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", mine % torch.cuda.device_count())))
    dist.init_process_group(
        backend or ("cpu:gloo,cuda:nccl" if has_gpus else "gloo"),
        init_method=init_method,
        rank=mine,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )
    try:
        yield mine
    finally:
        dist.destroy_process_group()

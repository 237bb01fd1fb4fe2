"""A process that loads and unloads one part again and again, and says after each what it holds.

python leak_child.py CHECKPOINT CYCLES [no-trim] [no-threshold]
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from pathlib import Path

import psutil
import torch

from splitlearn_manager import AsyncModelManager, ModelConfig, ResourceManager
from splitlearn_manager.core import async_model_manager, disposal

DTYPE = "float32"
SPLIT_POINTS = (1, 3)


async def main(checkpoint: str, cycles: int) -> None:
    """Print one line of JSON for each cycle, with bytes, descriptors and threads."""
    config = ModelConfig(
        "part",
        checkpoint,
        dtype=DTYPE,
        warmup=True,
        config={"component": "trunk", "split_points": SPLIT_POINTS},
    )
    process = psutil.Process()
    async with AsyncModelManager(ResourceManager(memory_limit=1 << 30), max_workers=1) as manager:
        for _ in range(cycles):
            await manager.load_model(config)
            loaded = process.memory_info().rss
            hidden = torch.ones(1, 4, manager.models["part"].model.hidden_size)
            answer = await manager.infer("part", hidden)
            assert answer.shape == hidden.shape
            back = await manager.unload_model("part")
            figures = {
                "back": back,
                "loaded": loaded,
                "resident": process.memory_info().rss,
                "descriptors": process.num_fds(),
                "threads": _threads(),
                "mapped": _is_mapped(),
            }
            print(json.dumps(figures), flush=True)  # noqa: T201 - to who started it


def _threads() -> int:
    """Return how many there are, once a model's own, which has done its last, has ended."""
    for thread in threading.enumerate():
        if thread.name.startswith("splitlearn-model"):
            thread.join()
    return threading.active_count()


def _is_mapped() -> bool:
    """Whether a weights file is."""
    return ".safetensors\n" in Path("/proc/self/maps").read_text(encoding="utf-8")


if __name__ == "__main__":
    if "no-trim" in sys.argv[3:]:
        disposal.return_freed_memory = lambda: False
    if "no-threshold" in sys.argv[3:]:
        async_model_manager.keep_freed_blocks = lambda: False
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))

"""How a forward on a GPU becomes a CUDA graph: the one place where graphs are recorded.

See https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

_WARM_UPS = 3
"""Forwards before one is recorded: libraries begin with things that can't be."""

_recording = Lock()
"""One graph is recorded at a time in a process: to begin waits for all that the GPU does, which
would spoil another."""


class GraphRecorder:
    """Makes graphs of the steps of one part: on one stream, and with one pool of memory.

    They can share it: they run one after the other, and what one gives is copied before the next.

    Args:
        device: The part's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's own
            self._pool = torch.cuda.graph_pool_handle()

    def record(self, forward: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Return what runs a forward as a CUDA graph.

        Forwards of other models may go on meanwhile, in other threads.
        """
        graph = torch.cuda.CUDAGraph()
        with _recording, torch.cuda.device(self._device):
            before = torch.cuda.current_stream()
            self._stream.wait_stream(before)
            try:
                # This one puts the thread's stream back, which `graph` does not if it fails.
                with torch.cuda.stream(self._stream):
                    for _ in range(_WARM_UPS):
                        forward()
                    with torch.cuda.graph(
                        graph,
                        pool=self._pool,
                        stream=self._stream,
                        capture_error_mode="thread_local",
                    ):
                        output = forward()
            finally:
                before.wait_stream(self._stream)

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        return replay

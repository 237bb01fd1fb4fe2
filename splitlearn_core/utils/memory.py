"""How much memory this process takes, over time.

Resident memory (RAM) counts the mapped pages of weight files as well as anonymous memory; the
former are the page cache's, and go when others need the room.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import psutil

GIB = 1024**3


@dataclass(frozen=True)
class MemorySnapshot:
    """Memory in use at one moment.

    Attributes:
        label: What the caller was doing.
        ram_bytes: Resident memory of this process, mapped pages included.
        gpu_bytes: Memory that torch holds on all CUDA devices.
    """

    label: str
    ram_bytes: int
    gpu_bytes: int


class MemoryTracker:
    """Notes the memory in use at chosen moments, and tells how it changed.

    Args:
        verbose: Whether `report` prints; `summary` always does.
    """

    def __init__(self, verbose: bool = True) -> None:
        self.verbose = verbose
        self.snapshots: list[MemorySnapshot] = []
        self._process = psutil.Process()

    def snapshot(self, label: str) -> MemorySnapshot:
        """Note the memory in use now."""
        snapshot = MemorySnapshot(label, self._process.memory_info().rss, _gpu_bytes())
        self.snapshots.append(snapshot)
        return snapshot

    def report(self) -> None:
        """Print the newest snapshot and what changed since the one before."""
        if not self.verbose or not self.snapshots:
            return
        now = self.snapshots[-1]
        before = self.snapshots[-2] if len(self.snapshots) > 1 else now
        self.say(f"Memory: {now.label}")
        self.say(_change("RAM", now.ram_bytes, before.ram_bytes))
        self.say(_change("GPU", now.gpu_bytes, before.gpu_bytes))

    def summary(self) -> None:
        """Print the peaks and every snapshot."""
        peak_ram = max((s.ram_bytes for s in self.snapshots), default=0)
        peak_gpu = max((s.gpu_bytes for s in self.snapshots), default=0)
        lines = [
            "=== Memory Usage Summary ===",
            f"Peak RAM: {peak_ram / GIB:.2f} GB",
            f"Peak GPU: {peak_gpu / GIB:.2f} GB",
            "",
            "Timeline:",
            *(
                f"  {s.label:<24}RAM: {s.ram_bytes / GIB:6.2f} GB  GPU: {s.gpu_bytes / GIB:6.2f} GB"
                for s in self.snapshots
            ),
        ]
        sys.stdout.write("\n".join(lines) + "\n")

    def get_current_usage(self) -> dict[str, float]:
        """Return the memory in use now, in GiB: `ram_gb`, `gpu_gb`."""
        return {
            "ram_gb": self._process.memory_info().rss / GIB,
            "gpu_gb": _gpu_bytes() / GIB,
        }

    def clear(self) -> None:
        """Forget all snapshots."""
        self.snapshots.clear()

    def say(self, line: str) -> None:
        """Print a line, where `verbose` asks for it."""
        if self.verbose:
            sys.stdout.write(line + "\n")


def _change(kind: str, now: int, before: int) -> str:
    return f"  {kind}: {now / GIB:.2f} GB ({(now - before) / GIB:+.2f} GB)"


def _gpu_bytes() -> int:
    """Return what torch holds on CUDA devices, without importing or waking anything for it."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return sum(torch.cuda.memory_allocated(i) for i in range(torch.cuda.device_count()))

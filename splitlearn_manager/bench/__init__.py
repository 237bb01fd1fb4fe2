"""Benchmarks: figures that the documents promise, measured where the reader stands.

Each measured way runs in a fresh process, beside what it is compared with.  Checkpoints have random
weights and are made here; no network is needed.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """One benchmark, as the command line knows it before anything heavy is imported.

    Attributes:
        module: Whose `run` measures.
        rows: What can be measured alone, in the order in which it is.
    """

    module: str
    rows: tuple[str, ...]


BENCHMARKS = {
    "load": Benchmark(
        "splitlearn_manager.bench.load",
        ("stored", "cast", "all-parts", "cold", "names", "peers", "hub"),
    ),
    "manager": Benchmark("splitlearn_manager.bench.manager", ("lock", "lag", "infer", "list")),
    "serve": Benchmark(
        "splitlearn_manager.bench.serve",
        ("streams", "packed", "threads", "many", "peers", "prompt", "echo", "idle", "cache"),
    ),
    "generate": Benchmark(
        "splitlearn_manager.bench.generate", ("parts", "loopback", "delayed", "lookup", "gateway")
    ),
    "checkpoint": Benchmark("splitlearn_manager.bench.checkpoint", ("save", "background", "load")),
    "quantization": Benchmark("splitlearn_manager.bench.quantization", ("trunk", "demo")),
    "sharded": Benchmark("splitlearn_manager.bench.sharded", ("fsdp2", "peers")),
}

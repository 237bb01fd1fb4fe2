"""Measure what a part costs on the wire: bytes, and time against the rate that the wire has.

    python scripts/measure_hub.py [--megabytes 1200] [--rate 100] [--latency 0.02] [--json]

A hub on loopback, in a process of its own, serves a checkpoint of random bytes in the layout of a
28-layer model, as one file and as shards.  Its Trunk [8, 24) is fetched into an empty cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from splitlearn_core.headers import INDEX_FILE, SINGLE_FILE, read_header  # noqa: E402
from splitlearn_core.loading.hub import HubFiles  # noqa: E402
from splitlearn_core.loading.hub_source import open_hub_source  # noqa: E402

LAYERS = 28
TRUNK = range(8, 24)
SHARDS = 4
REPO = "measured/model"
HIDDEN, INNER, KEYS = 1536, 8960, 256

SERVE = """
import json, sys
from pathlib import Path
from loopback_hub import LoopbackHub

folder, latency, rate = sys.argv[1:]
hub = LoopbackHub({"measured/model": Path(folder)}, latency=float(latency), rate=float(rate))
for path in hub.repos["measured/model"].iterdir():
    hub.etag(path)
with hub.run():
    print(hub.address, flush=True)
    sys.stdin.readline()
    asked = [a for a in hub.asked if a.file.endswith(".safetensors")]
    print(json.dumps({"sent": hub.weights_sent, "requests": len(asked)}), flush=True)
"""


def shapes(scale: float) -> dict[str, tuple[int, ...]]:
    """Return the tensors of the model, its widths scaled."""
    inner, vocabulary = int(INNER * scale), int(151_936 * scale)
    layer = {
        "input_layernorm.weight": (HIDDEN,),
        "mlp.down_proj.weight": (HIDDEN, inner),
        "mlp.gate_proj.weight": (inner, HIDDEN),
        "mlp.up_proj.weight": (inner, HIDDEN),
        "post_attention_layernorm.weight": (HIDDEN,),
        "self_attn.k_proj.bias": (KEYS,),
        "self_attn.k_proj.weight": (KEYS, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.q_proj.bias": (HIDDEN,),
        "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.v_proj.bias": (KEYS,),
        "self_attn.v_proj.weight": (KEYS, HIDDEN),
    }
    named = {f"model.layers.{n}.{k}": shape for n in range(LAYERS) for k, shape in layer.items()}
    return {
        "model.embed_tokens.weight": (vocabulary, HIDDEN),
        **named,
        "model.norm.weight": (HIDDEN,),
    }


def write_file(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """Write a safetensors file of random bytes, in the order of the names."""
    entries: dict[str, Any] = {}
    position = 0
    for name, shape in sorted(tensors.items()):
        count = 2
        for size in shape:
            count *= size
        entries[name] = {
            "dtype": "BF16",
            "shape": list(shape),
            "data_offsets": [position, position + count],
        }
        position += count
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    noise = os.urandom(1 << 20)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for start in range(0, position, len(noise)):
            file.write(noise[: position - start])


def write_checkpoint(folder: Path, megabytes: float, shards: int) -> None:
    """Write a checkpoint of about that size, as one file or as shards in the order of layers."""
    whole = shapes(1.0)
    full = 2 * sum(a * (b[0] if (b := rest) else 1) for a, *rest in whole.values())
    tensors = shapes(max(0.01, megabytes * 1e6 / full))
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    if shards == 1:
        write_file(folder / SINGLE_FILE, tensors)
        return
    weight_map: dict[str, str] = {}
    for name in tensors:
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        number = layer * shards // LAYERS + 1
        weight_map[name] = f"model-{number:05}-of-{shards:05}.safetensors"
    for file in set(weight_map.values()):
        write_file(folder / file, {n: tensors[n] for n, home in weight_map.items() if home == file})
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


def measure(folder: Path, cache: Path, latency: float, rate: float) -> dict[str, float]:
    """Fetch the Trunk of a checkpoint into an empty cache; return bytes, requests and rates."""
    command = [sys.executable, "-c", SERVE, str(folder), str(latency), str(rate)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "support")}
    server = subprocess.Popen(
        command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with server:
        assert server.stdin is not None and server.stdout is not None  # noqa: PT018, S101
        address = server.stdout.readline().strip()
        start = time.perf_counter()
        source = open_hub_source(HubFiles(REPO, cache, endpoint=address))
        names = [n for n in source.names() if ".layers." in n and int(n.split(".")[2]) in TRUNK]
        source.prepare(names)
        seconds = time.perf_counter() - start
        server.stdin.write("\n")
        server.stdin.flush()
        counts = json.loads(server.stdout.readline())
    wanted = sum(source.info(name).nbytes for name in names)
    files = {Path(source.where(name)).name for name in names}
    headers = sum(min(info.start for info in read_header(folder / f).values()) for f in files)
    return {
        "part_bytes": wanted,
        "header_bytes": headers,
        "fetched_bytes": counts["sent"],
        "requests": counts["requests"],
        "seconds": round(seconds, 3),
        "bytes_ratio": round((counts["sent"] - headers) / wanted, 5),
        "rate_ratio": round(wanted / seconds / rate, 3),
    }


def main() -> None:
    """Measure both layouts, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=1200)
    parser.add_argument("--rate", type=float, default=100, help="MB/s, over all connections")
    parser.add_argument("--latency", type=float, default=0.02, help="seconds for each request")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    figures: dict[str, dict[str, float]] = {}
    for layout, shards in (("single", 1), ("sharded", SHARDS)):
        with tempfile.TemporaryDirectory() as temporary:
            folder, cache = Path(temporary) / "model", Path(temporary) / "cache"
            write_checkpoint(folder, arguments.megabytes, shards)
            figures[layout] = measure(folder, cache, arguments.latency, arguments.rate * 1e6)
    if arguments.json:
        print(json.dumps(figures, indent=1))
    else:
        for layout, row in figures.items():
            print(layout, *(f"{key}={value}" for key, value in row.items()), sep="  ")


if __name__ == "__main__":
    main()

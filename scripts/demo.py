"""Start a Trunk daemon on the built-in model, and generate through it from this process."""

from __future__ import annotations

import argparse
import json
import logging
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TRUNK_CONFIG = ROOT / "configs" / "demo-trunk.yaml"
CLIENT_CONFIG = ROOT / "configs" / "demo-client.yaml"
DAEMON = [sys.executable, "-m", "splitlearn_manager", "serve", "--config", str(TRUNK_CONFIG)]
START_SECONDS = 120
STOP_SECONDS = 30


@contextmanager
def trunk_daemon() -> Iterator[str]:
    """Run the daemon on a free port for as long as the block lasts; yields its address."""
    process = subprocess.Popen(
        [*DAEMON, "--port", "0", "--log-level", "warning"], stdout=subprocess.PIPE, text=True
    )
    try:
        yield _wait_until_ready(process)
        process.send_signal(signal.SIGTERM)
        if code := process.wait(STOP_SECONDS):
            raise SystemExit(f"demo: the daemon ended with exit code {code}")
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def _wait_until_ready(process: subprocess.Popen[str]) -> str:
    """Read the daemon's announcements until it has loaded its model; return its address."""
    signal.signal(signal.SIGALRM, _too_slow)
    signal.alarm(START_SECONDS)
    address = None
    for line in process.stdout or ():
        if found := re.search(r"listening on (\S+)", line):
            address = found.group(1)
        if address is not None and "ready" in line:
            signal.alarm(0)
            return address
    raise SystemExit("demo: the daemon ended before it was ready; see its messages above")


def _too_slow(*_: object) -> None:
    raise SystemExit(f"demo: the daemon was not ready after {START_SECONDS} s")


def trunk_row(address: str) -> list[str]:
    """Ask the daemon what it holds."""
    with urllib.request.urlopen(f"{address}/v2/models/trunk", timeout=10) as reply:
        held: dict[str, Any] = json.load(reply)["properties"]
    numbers = (int(held[k]) for k in ("start_layer", "end_layer", "num_parameters", "nbytes"))
    return row("daemon", held["component"], *numbers)


def row(side: str, component: str, start: int, end: int, parameters: int, nbytes: int) -> list[str]:
    """Return one line of the table."""
    return [side, component, f"{start}-{end - 1}", f"{parameters:,}", f"{nbytes:,}"]


def print_table(rows: list[list[str]]) -> None:
    """Print what each side held: words to the left, numbers to the right."""
    table = [["process", "part", "layers", "parameters", "bytes"], *rows]
    widths = [max(len(cells[column]) for cells in table) for column in range(len(table[0]))]
    for cells in table:
        words = [cell.ljust(width) for cell, width in zip(cells[:2], widths[:2], strict=True)]
        numbers = [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:], strict=True)]
        print("  ".join([*words, *numbers]))


def main() -> None:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", default="The function returns", help="the text to go on from")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="most tokens to make")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    began = time.monotonic()
    with trunk_daemon() as address:
        same = generate(address, arguments.prompt, arguments.max_new_tokens)
    print(f"done in {time.monotonic() - began:.1f} s; the daemon has stopped")
    sys.exit(0 if same else 1)


def generate(address: str, prompt: str, max_new_tokens: int) -> bool:
    """Generate through the daemon, print everything, and compare with the unsplit model."""
    from transformers.utils.logging import disable_progress_bar  # noqa: PLC0415

    from splitlearn_core.quickstart import load_full_model  # noqa: PLC0415 - the daemon starts first
    from splitlearn_core.utils.threads import configure_pytorch_threads  # noqa: PLC0415
    from splitlearn_manager.client.pipeline import load_pipeline  # noqa: PLC0415
    from splitlearn_manager.config.daemon_config import DaemonConfig  # noqa: PLC0415
    from splitlearn_manager.config.model_config import ModelConfig  # noqa: PLC0415
    from splitlearn_manager.generate import GenerateOptions, run_generation  # noqa: PLC0415

    configure_pytorch_threads(single_threaded=True)
    disable_progress_bar()
    configured = DaemonConfig.from_yaml(CLIENT_CONFIG).models[0]
    options = {**configured.config, "trunk": address}
    config = ModelConfig.from_dict(configured.to_dict() | {"config": options})
    pipeline = load_pipeline(config)
    try:
        split = run_generation(pipeline, config, prompt, GenerateOptions(max_new_tokens), echo=True)
        bottom, top = pipeline.model.bottom, pipeline.model.top
        print()
        print_table(
            [
                row("client", p.component, p.start_layer, p.end_layer, p.num_parameters(), p.nbytes)
                for p in (bottom, top)
            ]
            + [trunk_row(address)]
        )
    finally:
        pipeline.close()
    print(f"\n{split.new_tokens} tokens, {split.tokens_per_second:.1f} tokens/s")
    print(f"sent {split.bytes_sent:,} bytes, received {split.bytes_received:,}")

    model, tokenizer = load_full_model(config.model_path, dtype=config.dtype)
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, **GenerateOptions(max_new_tokens).arguments())
    same = tokenizer.decode(ids[0], skip_special_tokens=True) == split.text
    print(f"same text as the unsplit model: {'yes' if same else 'no'}")
    return same


if __name__ == "__main__":
    main()

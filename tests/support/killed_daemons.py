"""Daemons that are killed at what they are at; the next start must end as the configuration says.

A daemon loads a Trunk from a hub into a cache, serves it, and is killed with SIGKILL: in the middle
of the load, while it unloads, or while it computes.  Started again, it must be ready, give what the
same Trunk gives here, and leave on disk what a daemon leaves that nobody killed.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from loopback_hub import LoopbackHub
from transformers import AutoConfig, AutoModelForCausalLM

from splitlearn_core.quickstart import load_split_model
from splitlearn_manager.client import RemoteTrunk
from splitlearn_manager.client.address import Address
from splitlearn_manager.client.management import ManagementClient

STAGES = ("load", "unload", "inference")
REPO = "someone/model"
CUTS = [2, 4]
_HIDDEN = 64
_SECONDS = 60.0
_CONFIG = f"""\
server: {{port: 0, management: true}}
models:
  - model_id: trunk
    model_path: {REPO}
    warmup: true
    config: {{component: trunk, split_points: {CUTS}}}
"""


def kill_and_restart(folder: Path, seed: int, count: int) -> Iterator[tuple[str, str]]:
    """Yield each of `count` trials, and what is wrong with it: nothing, as a rule."""
    rng = random.Random(seed)  # noqa: S311 - no secret
    trunk = _write_model(folder / "model")
    with LoopbackHub({REPO: folder / "model"}).run() as hub, ExitStack() as stack:
        place = Place(folder, hub, trunk, stack)
        place.start()
        if wrong := place.what_is_wrong():
            yield "a start that nobody killed", wrong
            return
        place.clean = place.left()
        for number in range(count):
            stage = STAGES[number % len(STAGES)]
            how = getattr(place, f"kill_in_{stage}")(rng)
            place.start()
            yield f"killed in {stage}, {how}", place.what_is_wrong()


class Place:
    """Where one daemon runs after the other.

    Attributes:
        clean: The files that a start leaves which nobody killed.
    """

    def __init__(self, folder: Path, hub: LoopbackHub, trunk: Any, stack: ExitStack) -> None:
        self._folder, self._hub, self._trunk = folder, hub, trunk
        self._number = 0
        self._process: subprocess.Popen[str] | None = None
        self._url = ""
        self.clean: set[tuple[str, int]] = set()
        (folder / "daemon.yaml").write_text(_CONFIG)
        stack.callback(self.end)

    # --- Starting and ending ---------------------------------------------------------------

    def start(self, *, ready: bool = True) -> None:
        """Start a daemon, and wait until it listens, or is ready."""
        root = self._root()
        for name in ("cwd", "tmp", "home"):
            (root / name).mkdir(parents=True, exist_ok=True)
        with (self._folder / "log").open("a") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "splitlearn_manager", "serve"),
                    *("--config", str(self._folder / "daemon.yaml")),
                ],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=root / "cwd",
                env=self._environment(root),
            )
        self._url = self._line().removeprefix("splitlearn: listening on ")
        if ready:
            line = self._line()
            assert line == "splitlearn: ready (1 model)", line

    def end(self) -> None:
        """End the daemon, if one runs."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _root(self) -> Path:
        """Return the folder of everything that the daemon may write."""
        return self._folder / f"disk-{self._number}"

    def _environment(self, root: Path) -> dict[str, str]:
        paths = os.environ.get("PYTHONPATH", "")
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(_PROJECT), paths))),
            "OMP_NUM_THREADS": "1",
            "HF_ENDPOINT": self._hub.address,
            "HF_HOME": str(root / "hf"),
            "SPLITLEARN_CACHE_DIR": str(root / "cache"),
            "TMPDIR": str(root / "tmp"),
            "HOME": str(root / "home"),
        }

    def _line(self) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline().rstrip("\n")
        assert line, (self._folder / "log").read_text()[-2000:]
        return line

    def _kill(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.communicate()
        self._process = None

    # --- Killing ---------------------------------------------------------------------------

    def kill_in_load(self, rng: random.Random) -> str:
        """Kill a daemon whose load has got so many bytes from the hub, into a new cache."""
        self.end()
        self._number += 1
        nbytes = rng.randrange(1, sum(p.nbytes for p in self._trunk.parameters()))
        hub = self._hub
        hub.hold_after = hub.weights_sent + nbytes
        hub.held.clear()
        hub.released.clear()
        self.start(ready=False)
        assert hub.held.wait(_SECONDS), "the load did not get that far"
        self._kill()
        hub.hold_after = None
        hub.released.set()
        return f"after {nbytes} bytes"

    def kill_in_unload(self, rng: random.Random) -> str:
        """Kill a daemon that drains a session, or one that unloads with none."""
        used, seconds = rng.random() < 0.5, rng.uniform(0, 0.005)
        client = ManagementClient(Address.parse(self._url))
        with RemoteTrunk(self._url, "trunk") as remote:
            cache = remote.new_cache()
            if used:
                remote(_input(), past_key_values=cache)
            client.begin("trunk", "unload")
            time.sleep(seconds)
            self._kill()
        return f"{'with' if used else 'without'} a session, after {1000 * seconds:.1f} ms"

    def kill_in_inference(self, rng: random.Random) -> str:
        """Kill a daemon while a client asks for one step after the other."""
        steps, told = rng.randrange(1, 50), []
        enough = threading.Event()

        def use() -> None:
            with RemoteTrunk(self._url, "trunk", retry=None) as remote:
                try:
                    for number in range(1_000_000):
                        if number == steps:
                            enough.set()
                        remote(_input())
                except ConnectionError as error:
                    told.append(error)

        client = threading.Thread(target=use)
        client.start()
        assert enough.wait(_SECONDS)
        self._kill()
        client.join(_SECONDS)
        return f"after {steps} steps" if told else f"after {steps} steps, and the client hangs"

    # --- Looking ---------------------------------------------------------------------------

    def what_is_wrong(self) -> str:
        """Say what is wrong with a daemon that was started again; nothing, as a rule."""
        states = ManagementClient(Address.parse(self._url)).models()
        if [(m["model_id"], m["status"]) for m in states] != [("trunk", "ready")]:
            return f"the models are {states}"
        with RemoteTrunk(self._url, "trunk") as remote, torch.no_grad():
            if not torch.equal(remote(_input()), self._trunk(_input())):
                return "the Trunk does not give what it should"
        if self.clean and (odd := self.left() ^ self.clean):
            return f"on disk, other files than after a start that nobody killed: {sorted(odd)}"
        return ""

    def left(self) -> set[tuple[str, int]]:
        """Return the files that there are, with their sizes."""
        root = self._root()
        return {
            (str(path.relative_to(root)), path.stat().st_size)
            for path in root.rglob("*")
            if path.is_file()
        }


_PROJECT = Path(__file__).resolve().parents[2]


def _write_model(folder: Path) -> Any:
    """Write a random Llama, and return its Trunk."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=97,
        hidden_size=_HIDDEN,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return load_split_model("auto", CUTS, str(folder), parts=["trunk"], low_memory=True)[1]


def _input() -> torch.Tensor:
    """Return a hidden state, `[1, 3, hidden]`."""
    return torch.linspace(-1, 1, 3 * _HIDDEN).reshape(1, 3, _HIDDEN)

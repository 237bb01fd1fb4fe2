"""Run a long campaign: seeded trials, each of which is right or says what is wrong.

A campaign is a module in `soaks/` with `run(seed, count)`, or `run(seed, minutes)`, and an entry in
the table below.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))

_REPORT_SECONDS = 15


@dataclass(frozen=True)
class Campaign:
    """An entry of the table.

    Attributes:
        module: In `soaks/`.  Its `run(seed, count)` yields, for each trial, what was tried and what
            is wrong with what came of it: nothing, as a rule.
        count: How many trials at full length; minutes, where it goes by these.
        summary: What is tried.
        function: Its name, where it is not `run`.
        timed: Whether it is given minutes.
    """

    module: str
    count: int
    summary: str
    function: str = "run"
    timed: bool = False

    def run(self, seed: int, length: float | None) -> Iterator[tuple[str, str]]:
        """Yield each trial, and what is wrong."""
        module = importlib.import_module(f"soaks.{self.module}")
        yield from getattr(module, self.function)(seed, length or self.count)


CAMPAIGNS = {
    "checkpoint": Campaign(
        "checkpoint_saves",
        1000,
        "saves of training checkpoints: killed, on full disks, damaged afterwards",
    ),
    "checkpoints": Campaign(
        "checkpoints", 2500, "damaged checkpoints, loaded in every way under limits"
    ),
    "training": Campaign(
        "training", 12, "training on real text, killed and gone on with at 1 and 2 ranks"
    ),
    "architectures": Campaign(
        "architectures", 140, "every certified type, cut at random into 3, 4, 5 and 6 parts"
    ),
    "sharded": Campaign(
        "sharded", 200, "every certified type over two ranks, with FSDP2 and FSDP1"
    ),
    "downloads": Campaign(
        "downloads", 300, "a part is fetched by processes that are killed, then by one that is not"
    ),
    "kills": Campaign(
        "kills", 300, "a daemon is killed in load, unload and inference, and started again"
    ),
    "failover": Campaign(
        "failover", 100, "generations whose server is killed, drained, reloaded or cut off"
    ),
    "stress": Campaign(
        "stress", 1024, "32 tasks load and unload one model, requests meanwhile; 1,000 reloads"
    ),
    "leaks": Campaign("leaks", 1000, "a part of 100 MB is loaded and unloaded in one process"),
    "frames": Campaign(
        "frames", 20_000, "wrong frames sent to a daemon; a session of somebody else goes on"
    ),
    "lifecycle": Campaign(
        "lifecycle", 12_000, "random operations on a manager, which is looked at after each"
    ),
    "sessions": Campaign(
        "sessions", 10, "16 clients run, stall, roll back, vanish and come back", timed=True
    ),
    "sessions-recurrent": Campaign(
        "sessions", 10, "the same with a recurrent model", "run_recurrent", timed=True
    ),
    "sessions-hybrid": Campaign(
        "sessions", 10, "the same with a hybrid model", "run_hybrid", timed=True
    ),
}


def main() -> int:
    """Run the campaign that is named; 1 where something was wrong."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("name", nargs="?", choices=CAMPAIGNS)
    parser.add_argument("--list", action="store_true", help="say what there is")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, help="trials; as many as the table says if left out")
    parser.add_argument("--minutes", type=float, help="likewise, for what goes by time")
    arguments = parser.parse_args()
    if arguments.list:
        print(*(f"{name:20} {c.summary}" for name, c in CAMPAIGNS.items()), sep="\n")
        return 0
    if arguments.name is None:
        parser.error(f"name one of {', '.join(CAMPAIGNS)}")
    campaign = CAMPAIGNS[arguments.name]
    wrong = "--count" if campaign.timed else "--minutes"
    if getattr(arguments, wrong.strip("-")) is not None:
        parser.error(f"{arguments.name} has no {wrong}")
    print(f"{arguments.name}: {campaign.summary}; seed {arguments.seed}")
    length = arguments.minutes if campaign.timed else arguments.count
    return _soak(arguments.name, arguments.seed, length)


def _soak(name: str, seed: int, length: float | None) -> int:
    """Run a campaign; report now and then, and whatever is wrong at once."""
    begin = reported = time.monotonic()
    tried = failed = 0
    for what, wrong in CAMPAIGNS[name].run(seed, length):
        tried += 1
        if wrong:
            failed += 1
            print(f"WRONG {what}: {wrong}", flush=True)
        if time.monotonic() - reported > _REPORT_SECONDS:
            reported = time.monotonic()
            print(f"{tried} tried, {failed} wrong; last: {what}", flush=True)
    seconds = time.monotonic() - begin
    print(f"{name}: {tried} tried, {failed} wrong; seed {seed}; {seconds:.0f} s")
    return 1 if failed or not tried else 0


if __name__ == "__main__":
    sys.exit(main())

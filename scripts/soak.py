"""Run a long campaign: seeded trials, each of which is right or says what is wrong.

A campaign is a module in `soaks/` with `run(seed, count)`, and an entry in the table below.
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
        count: How many trials at full length.
        summary: What is tried.
    """

    module: str
    count: int
    summary: str

    def run(self, seed: int, count: int | None) -> Iterator[tuple[str, str]]:
        """Yield each trial, and what is wrong."""
        yield from importlib.import_module(f"soaks.{self.module}").run(seed, count or self.count)


CAMPAIGNS = {
    "checkpoints": Campaign(
        "checkpoints", 2500, "damaged checkpoints, loaded in every way under limits"
    ),
    "architectures": Campaign(
        "architectures", 140, "every certified type, cut at random into 3, 4, 5 and 6 parts"
    ),
    "downloads": Campaign(
        "downloads", 300, "a part is fetched by processes that are killed, then by one that is not"
    ),
    "kills": Campaign(
        "kills", 300, "a daemon is killed in load, unload and inference, and started again"
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
}


def main() -> int:
    """Run the campaign that is named; 1 where something was wrong."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("name", nargs="?", choices=CAMPAIGNS)
    parser.add_argument("--list", action="store_true", help="say what there is")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, help="trials; as many as the table says if left out")
    arguments = parser.parse_args()
    if arguments.list:
        print(*(f"{name:15} {c.summary}" for name, c in CAMPAIGNS.items()), sep="\n")
        return 0
    if arguments.name is None:
        parser.error(f"name one of {', '.join(CAMPAIGNS)}")
    print(f"{arguments.name}: {CAMPAIGNS[arguments.name].summary}; seed {arguments.seed}")
    return _soak(arguments.name, arguments.seed, arguments.count)


def _soak(name: str, seed: int, count: int | None) -> int:
    """Run a campaign; report now and then, and whatever is wrong at once."""
    begin = reported = time.monotonic()
    tried = failed = 0
    for what, wrong in CAMPAIGNS[name].run(seed, count):
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

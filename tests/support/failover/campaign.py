"""Generations whose server is taken away at a random token: the tokens must be the unsplit model's.

Each trial draws how it generates (greedy, sampling, beams, prompt lookup, a padded batch), what
happens, and at which step; what happens is done from another thread, so that it falls before a
step, into its middle, or behind it.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from cut_wire import Wire

from failover.places import Places
from splitlearn_core import SplitCausalLM
from splitlearn_core.quickstart import load_full_model, load_split_model
from splitlearn_manager.client import RemoteTrunk, RetryPolicy
from splitlearn_manager.client.address import Address
from splitlearn_manager.client.management import ManagementClient

SPLIT_POINTS = (2, 6)
NEW_TOKENS = 24
PROMPTS = (
    "The function returns",
    "Return the list of all the names, and the list of all the names that",
    "A class that",
)
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "a batch": {"padded": True},
}
EVENTS = ("kill", "kill", "kill", "kill, next address", "drain", "drain, next address", "unload")
CUTS = ("cut",)
RETRY = RetryPolicy(attempts=200, base=0.05, maximum=0.5, total=60.0)


@dataclass
class Report:
    """What happened.

    Attributes:
        events: What was done, and how often.
        ways: How it was generated, and how often.
        healed: Sessions that went on.
        untouched: Trials whose event came to nothing: a cut that a session is resumed after, or
            what came after the last step.
        positions: Positions that were computed again.
        seconds: How long trials took, the event included.
    """

    events: Counter[str] = field(default_factory=Counter)
    ways: Counter[str] = field(default_factory=Counter)
    healed: int = 0
    untouched: int = 0
    positions: int = 0
    seconds: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        """Say it in a line."""
        longest = max(self.seconds, default=0.0)
        return (
            f"{dict(self.events)}; {dict(self.ways)}; {self.healed} sessions went on,"
            f" {self.positions} positions were replayed; in {self.untouched} trials none had to;"
            f" the longest trial took {longest:.1f} s"
        )


class Campaign:
    """Trials with the built-in model.

    Args:
        folder: Where the daemons' log goes.
        seed: Of all that is drawn.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.report = Report()
        self._rng = random.Random(seed)  # noqa: S311 - no secret
        self._folder = folder
        self._known: dict[str, torch.Tensor] = {}
        model = "builtin:demo"
        self._whole, self._tokenizer = load_full_model(model, dtype="float32")
        self._tokenizer.padding_side = "left"
        ends = load_split_model(
            "auto", list(SPLIT_POINTS), model, dtype="float32", parts=["bottom", "top"]
        )
        self._bottom, _, self._top = ends

    def run(self, count: int) -> Iterator[tuple[str, str]]:
        """Yield each trial, and what is wrong with it: nothing, as a rule."""
        with Places(2, self._folder / "daemons.log") as places:
            yield from self.run_at(places, count)

    def run_at(self, places: Places, count: int) -> Iterator[tuple[str, str]]:
        """Do the same with two daemons that run."""
        for number in range(count):
            # one after the other, so that a few trials have some of each
            event = (EVENTS + CUTS)[number % len(EVENTS + CUTS)]
            way = self._rng.choice(list(WAYS))
            step = self._rng.randrange(1, 5 if way == "prompt lookup" else NEW_TOKENS - 2)
            what = f"{event} at step {step}, {way}"
            begin = time.monotonic()
            yield what, self._trial(places, event, way, step)
            self.report.seconds.append(time.monotonic() - begin)
            self.report.events[event] += 1
            self.report.ways[way] += 1

    def _trial(self, places: Places, event: str, way: str, step: int) -> str:
        """Generate once; return what is wrong."""
        want = self._wanted(way)
        delay = self._rng.uniform(0, 0.006)
        with closing(Wire(places.urls[0])) as wire:
            urls = {
                "cut": [wire.url],
                "kill, next address": places.urls,
                "drain, next address": places.urls,
                "unload": places.urls,
            }.get(event, places.urls[:1])
            happening = Happening(lambda: _happen(places, wire, event), step, delay)
            try:
                with Watched(urls, happening) as trunk:
                    model = SplitCausalLM(self._bottom, trunk, self._top)
                    found = self._generate(model, way)
            except Exception as error:  # noqa: BLE001 - it is what is wrong
                return f"{type(error).__name__}: {error}"
            finally:
                happening.end()
                places.start(0)
        self.report.healed += trunk.healed
        self.report.positions += trunk.replayed_positions
        self.report.untouched += not trunk.healed
        if not torch.equal(found, want):
            return f"other tokens: {found.tolist()}, not {want.tolist()}"
        return ""

    def _wanted(self, way: str) -> torch.Tensor:
        """Return what the unsplit model gives; the seed is the same each time."""
        if way not in self._known:
            self._known[way] = self._generate(self._whole, way)
        return self._known[way]

    def _generate(self, model: Any, way: str) -> torch.Tensor:
        """Return the tokens."""
        how = dict(WAYS[way])
        prompts = list(PROMPTS) if how.pop("padded", False) else [PROMPTS[way == "prompt lookup"]]
        inputs = self._tokenizer(prompts, return_tensors="pt", padding=len(prompts) > 1)
        inputs.pop("token_type_ids", None)
        torch.manual_seed(3)
        with torch.inference_mode():
            tokens: torch.Tensor = model.generate(
                **inputs,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                pad_token_id=0,
                **how,
            )
        return tokens


class Happening:
    """Does something once, beside the step with a certain number."""

    def __init__(self, what: Callable[[], None], step: int, delay: float) -> None:
        self._what, self._step, self._delay = what, step, delay
        self._count = 0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def count(self) -> None:
        """Take note of a step."""
        self._count += 1
        if self._count == self._step:
            self._thread = threading.Thread(target=self._do, name="happening")
            self._thread.start()

    def _do(self) -> None:
        try:
            time.sleep(self._delay)
            self._what()
        except BaseException as error:  # noqa: BLE001 - raised by `end`
            self._error = error

    def end(self) -> None:
        """Wait until it is done."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error


class Watched(RemoteTrunk):
    """Counts its steps."""

    def __init__(self, urls: list[str], happening: Happening) -> None:
        super().__init__(urls, "trunk", retry=RETRY)
        self._happening = happening

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run a step."""
        self._happening.count()
        return super().__call__(*args, **kwargs)


def _happen(places: Places, wire: Wire, event: str) -> None:
    """Take the server away, and bring it back where it is not another's turn."""
    match event:
        case "kill":
            places.kill(0)
            places.start(0)
        case "kill, next address":
            places.kill(0)
        case "drain":
            places.drain(0)
            places.start(0)
        case "drain, next address":
            places.drain(0)
        case "unload":
            client = ManagementClient(Address.parse(places.urls[0]))
            client.finish("trunk", "unload", drain_timeout=0)
            client.finish("trunk", "load")
        case "cut":
            wire.cut()

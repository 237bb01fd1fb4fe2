"""The process that generates while generating is measured.

python -m splitlearn_manager.bench.generate_child TASK '{"name": value, …}'

Every way of a round generates one after the other in this process, with one thread, so that what
the machine does meanwhile meets them all.  The figures come on standard output, as one line of
JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch
from transformers.generation.streamers import BaseStreamer

from splitlearn_core import SplitCausalLM
from splitlearn_core.factory import load_component
from splitlearn_core.quickstart import load_full_model, load_tokenizer
from splitlearn_core.utils.threads import configure_pytorch_threads
from splitlearn_manager.bench.delaying_proxy import DelayingProxy
from splitlearn_manager.breakdown import Stopwatch
from splitlearn_manager.client import RemoteTrunk

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Figures = dict[str, Any]

WARM_UP_TOKENS = 4


class _Clock(BaseStreamer):
    """Notes when tokens come: first the prompt, then those that are made."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Note the time."""
        del value
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing."""


def ways(
    model: str,
    points: list[int],
    dtype: str,
    prompt: int,
    new: int,
    rounds: int,
    url: str,
    round_trip: float,
) -> Figures:
    """Generate with the unsplit model, with parts here, and with the Trunk behind addresses.

    Returns:
        For each way its rounds' seconds in all, to the first token and of CPU; the bytes of a token
        over loopback; whether all ways gave the same tokens; and where the time of a token went.
    """
    unsplit, _ = load_full_model(model, dtype=dtype)
    bottom, trunk, top = (
        load_component(model, name, points, dtype=dtype) for name in ("bottom", "trunk", "top")
    )
    host, port = urlsplit(url).hostname or "", urlsplit(url).port or 0
    with ExitStack() as stack:
        near = stack.enter_context(DelayingProxy(host, port, 0))
        far = stack.enter_context(DelayingProxy(host, port, round_trip))
        # the address itself is what is timed; the counting proxy is used for bytes alone
        remotes = {
            name: stack.enter_context(RemoteTrunk(address, "trunk"))
            for name, address in (("loopback", url), ("counted", near.url), ("delayed", far.url))
        }
        models: dict[str, Any] = {
            "unsplit": unsplit,
            "parts": SplitCausalLM(bottom, trunk, top),
            **{name: SplitCausalLM(bottom, remote, top) for name, remote in remotes.items()},
        }
        ids = torch.randint(
            3,
            unsplit.config.vocab_size,
            (1, prompt),
            generator=torch.Generator().manual_seed(0),
        )
        counted = models.pop("counted")
        for warmed in (*models.values(), counted):
            _generate(warmed, ids, WARM_UP_TOKENS)
        token_bytes = _bytes_of_a_token(counted, near, ids, new)
        rounds_of: dict[str, list[list[float]]] = {name: [] for name in models}
        tokens: dict[str, list[int]] = {}
        for number in range(rounds):
            for name in _turned(list(models), number):
                times, tokens[name] = _generate(models[name], ids, new)
                rounds_of[name].append(times)
        asked = stack.enter_context(RemoteTrunk(url, "trunk", timings=True))
        told = SplitCausalLM(bottom, asked, top)
        with Stopwatch(told) as watch:
            _generate(told, ids, new)
    return {
        "rounds": rounds_of,
        "bytes": token_bytes,
        "same": all(found == tokens["unsplit"] for found in tokens.values()),
        "breakdown": watch.breakdown().to_dict(),
    }


def _turned(names: list[str], number: int) -> list[str]:
    """Return the names beginning with another one each time, so that no way is always first."""
    start = number % len(names)
    return names[start:] + names[:start]


def _generate(
    model: Any, ids: torch.Tensor, new: int, **cache: Any
) -> tuple[list[float], list[int]]:
    """Generate greedily; return the seconds in all, to the first token and of CPU, and the tokens.

    Those of CPU are this process' alone.
    """
    clock = _Clock()
    start, computing = time.perf_counter(), time.process_time()
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        streamer=clock,
        **cache,
    )
    computed = time.process_time() - computing
    times = [time.perf_counter() - start, clock.times[1] - start, computed]
    return times, made[0].tolist()


def _bytes_of_a_token(model: Any, proxy: DelayingProxy, ids: torch.Tensor, new: int) -> float:
    """Return what each token after the first moves over the socket, in both directions."""
    passed = []
    for tokens in (1, new):  # both send the prompt, open a session and close it
        before = proxy.bytes_passed
        cache = model.new_cache()
        _generate(model, ids, tokens, past_key_values=cache)
        cache.close()  # else it would be closed at some time during the other
        passed.append(proxy.bytes_passed - before)
    return (passed[1] - passed[0]) / (new - 1)


def lookup(
    model: str,
    points: list[int],
    dtype: str,
    text: str,
    new: int,
    candidates: int,
    url: str,
    round_trip: float,
) -> Figures:
    """Generate over a long round trip, with prompt lookup and without."""
    tokenizer = load_tokenizer(model)
    bottom, top = (load_component(model, name, points, dtype=dtype) for name in ("bottom", "top"))
    ids = tokenizer(text, return_tensors="pt").input_ids
    host, port = urlsplit(url).hostname or "", urlsplit(url).port or 0
    figures: Figures = {}
    made: list[Any] = []
    with (
        DelayingProxy(host, port, round_trip) as proxy,
        RemoteTrunk(proxy.url, "trunk") as trunk,
    ):
        split: Any = SplitCausalLM(bottom, trunk, top)
        split.generate(ids, max_new_tokens=WARM_UP_TOKENS, do_sample=False)
        settings: dict[str, dict[str, Any]] = {
            "plain": {},
            "lookup": {"prompt_lookup_num_tokens": candidates},
        }
        for name, options in settings.items():
            with Stopwatch(split) as watch:
                start = time.perf_counter()
                lengths: Any = {"max_new_tokens": new, "min_new_tokens": new}
                made.append(split.generate(ids, do_sample=False, **lengths, **options))
                seconds = time.perf_counter() - start
            tokens = made[-1].shape[1] - ids.shape[1]
            figures[name] = {
                "seconds": seconds,
                "tokens": tokens,
                "round_trips": watch.round_trips,
            }
    return {**figures, "same": torch.equal(*made)}


TASKS: Mapping[str, Callable[..., Figures]] = {"ways": ways, "lookup": lookup}


def main() -> None:
    """Do the task, and answer on standard output."""
    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    configure_pytorch_threads(single_threaded=True)
    figures = TASKS[sys.argv[1]](**json.loads(sys.argv[2]))
    os.write(answers, json.dumps(figures).encode() + b"\n")


if __name__ == "__main__":
    main()

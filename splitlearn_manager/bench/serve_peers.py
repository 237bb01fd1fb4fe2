"""The whole model, generated from in one process: what transformers has for it, and what we have.

python -m splitlearn_manager.bench.serve_peers TASK '{"name": value, …}'

Each task answers prompts of random tokens, greedily and of one length, and writes the tokens a
second, prompts included.  `chain` has Bottom and Top, and its Trunk behind a daemon.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from splitlearn_core import SplitCausalLM
from splitlearn_core.quickstart import load_split_model
from splitlearn_core.utils.threads import configure_pytorch_threads
from splitlearn_manager.client import RemoteTrunk

_NO_TOKEN = -1
"""As end of text: every answer has its full length."""

_PAGE = 256
"""Positions of a block of the peer's cache, as it has them by default."""


def generate(model: str, batch: int, prompt: int, new: int) -> float:
    """Return the rate of transformers' `generate`, with one static batch."""
    whole = AutoModelForCausalLM.from_pretrained(Path(model), dtype="bfloat16")
    return _static(whole, batch, prompt, new)


def continuous(model: str, batch: int, prompt: int, new: int) -> float:
    """Return the rate of transformers' continuous batching, with as many requests at once."""
    whole = AutoModelForCausalLM.from_pretrained(Path(model), dtype="bfloat16")
    ids = _prompts(batch, prompt, whole.config.vocab_size).tolist()
    pages = batch * (1 + (prompt + new) // _PAGE)
    room = ContinuousBatchingConfig(  # left alone, it takes most of the machine's memory
        page_size=_PAGE, num_blocks=2 * pages, max_batch_tokens=batch * prompt
    )
    whole.generate_batch(ids[:1], _config(2), room)
    start = time.perf_counter()
    answers = whole.generate_batch(ids, _config(new), room)
    seconds = time.perf_counter() - start
    return sum(len(answer.generated_tokens) for answer in answers.values()) / seconds


def chain(model: str, batch: int, prompt: int, new: int, points: list[int], url: str) -> float:
    """Return the rate of `generate` through a chain, with one session of so many rows."""
    bottom, _, top = load_split_model(
        "auto", points, model, dtype="bfloat16", parts=["bottom", "top"]
    )
    if bottom is None or top is None:
        raise TypeError("both ends were asked for")
    with RemoteTrunk(url, "trunk") as trunk:
        return _static(SplitCausalLM(bottom, trunk, top), batch, prompt, new)


def _static(model: Any, batch: int, prompt: int, new: int) -> float:
    """Return the rate of `generate`, after a first short one."""
    ids = _prompts(batch, prompt, model.config.vocab_size)
    model.generate(ids, generation_config=_config(2))
    start = time.perf_counter()
    answer: torch.Tensor = model.generate(ids, generation_config=_config(new))
    return (answer.numel() - ids.numel()) / (time.perf_counter() - start)


def _prompts(batch: int, length: int, vocabulary: int) -> torch.Tensor:
    """Return token ids [batch, length], the same ones each time."""
    numbers = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (batch, length), generator=numbers)


def _config(new: int) -> GenerationConfig:
    """Return what all of them are asked for."""
    return GenerationConfig(
        max_new_tokens=new, do_sample=False, eos_token_id=_NO_TOKEN, pad_token_id=0
    )


TASKS: dict[str, Callable[..., float]] = {
    "generate": generate,
    "continuous": continuous,
    "chain": chain,
}


def main() -> None:
    """Do the task, and answer on standard output."""
    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    configure_pytorch_threads(single_threaded=True)
    rate = TASKS[sys.argv[1]](**json.loads(sys.argv[2]))
    os.write(answers, json.dumps({"rate": rate}).encode() + b"\n")


if __name__ == "__main__":
    main()

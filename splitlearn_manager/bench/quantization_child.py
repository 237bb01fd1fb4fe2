"""The process in which packed weights are measured: one task, named on its command line.

python -m splitlearn_manager.bench.quantization_child TASK '{"name": value, …}'

Every way is loaded into this one process, with one thread, and takes its turn in each round, so
that the machine's moods meet them all.
"""

from __future__ import annotations

import ast
import itertools
import json
import math
import os
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from splitlearn_core.factory import load_component
from splitlearn_core.quickstart import load_tokenizer
from splitlearn_core.split_model import SplitModel

Figures = dict[str, dict[str, float]]

HELD_OUT = ("getopt.py", "secrets.py", "html/__init__.py", "unittest/result.py", "enum.py")
"""Files of Python's whose text the built-in model was not trained on, see its note."""

_DEMO = "builtin:demo"
_SHORTEST_TEXT = 40
_PROMPT = 8
_WARM_UP_STEPS = 3
_BEFORE = 32


class Way(NamedTuple):
    """One way to hold a part's weights.

    Attributes:
        dtype: Of what is computed with.
        quantization: How linear layers are packed, if they are.
    """

    dtype: str
    quantization: str | None = None

    @property
    def name(self) -> str:
        """`int8`, or with the dtype where there are two: `prepacked bfloat16`."""
        return self.dtype if self.quantization is None else f"{self.quantization} {self.dtype}"


WAYS = (
    Way("float32"),
    Way("float32", "prepacked"),
    Way("float32", "fp16"),
    Way("float32", "int8"),
    Way("bfloat16"),
    Way("bfloat16", "prepacked"),
    Way("bfloat16", "int8"),
)


# --- How long a Trunk takes --------------------------------------------------------------------


@torch.inference_mode()
def trunk(model: str, points: list[int], positions: int, rounds: int, steps: int) -> Figures:
    """Time a prompt and single tokens.

    Args:
        model: The folder.
        points: Of the Trunk.
        positions: Of the prompt that is timed; single tokens come after a shorter one.
        rounds: How often each way has its turn.
        steps: Tokens in a turn.

    Returns:
        For each way: `nbytes`, the relative `error` of its hidden states after the prompt (against
        float32), and for each case (`prompt`, `1`, `8`) the median seconds, and the median over the
        rounds of how many times faster it was than the plain way of its dtype.
    """
    parts = {way: _part(model, "trunk", points, way) for way in WAYS}
    numbers = torch.Generator().manual_seed(0)
    hidden = torch.randn(8, positions, parts[WAYS[0]].hidden_size, generator=numbers)
    outputs = {way: part(hidden[:1].to(part.dtype)).float() for way, part in parts.items()}
    wanted = outputs[WAYS[0]]
    seconds: dict[str, list[dict[Way, float]]] = {"prompt": [], "1": [], "8": []}
    streams = {
        batch: {way: _Stream(part, hidden[:batch, :_BEFORE]) for way, part in parts.items()}
        for batch in (1, 8)
    }
    for _ in range(rounds):
        seconds["prompt"].append({way: _time_prompt(p, hidden[:1]) for way, p in parts.items()})
        for batch, ways in streams.items():
            seconds[str(batch)].append({way: s.seconds(steps) for way, s in ways.items()})
    return {
        way.name: {
            "nbytes": part.nbytes,
            "error": _relative_error(outputs[way], wanted),
            **{f"{case} seconds": median(t[way] for t in s) for case, s in seconds.items()},
            **{f"{case} faster": _times_faster(s, way) for case, s in seconds.items()},
        }
        for way, part in parts.items()
    }


def _times_faster(rounds: list[dict[Way, float]], way: Way) -> float:
    return median(times[Way(way.dtype)] / times[way] for times in rounds)


def _time_prompt(part: SplitModel, hidden: torch.Tensor) -> float:
    """Return the seconds of one forward of a whole prompt."""
    given = hidden.to(part.dtype)
    start = time.perf_counter()
    part(given, past_key_values=part.new_cache())
    return time.perf_counter() - start


class _Stream:
    """Rows that go on, token by token, after a prompt."""

    def __init__(self, part: SplitModel, prompt: torch.Tensor) -> None:
        self._part, self._cache = part, part.new_cache()
        part(prompt.to(part.dtype), past_key_values=self._cache)
        self._token = prompt[:, :1].to(part.dtype)

    def seconds(self, steps: int) -> float:
        """Return the median seconds of a forward of one token of each row."""
        times = []
        for _ in range(steps + _WARM_UP_STEPS):
            start = time.perf_counter()
            self._part(self._token, past_key_values=self._cache)
            times.append(time.perf_counter() - start)
        return median(times[_WARM_UP_STEPS:])


# --- What the built-in model loses -------------------------------------------------------------


@torch.inference_mode()
def demo(texts: int, tokens: int) -> Figures:
    """Compare ways on text that the built-in model was not trained on.

    Args:
        texts: How many of them, at most.
        tokens: To generate after the first few of each.

    Returns:
        For each way: `nbytes`, `error` (relative, of the logits), `same` (the share of positions
        whose best token is plain float32's), `generated` (the share of texts whose greedy
        continuation is the same), `perplexity`, and the number of predicted `tokens`.
    """
    tokenizer = load_tokenizer(_DEMO)
    documents = [
        torch.tensor([tokenizer(text, truncation=True)["input_ids"]])
        for text in itertools.islice(held_out_texts(), texts)
    ]
    plain = _answers(_part(_DEMO, "full", None, WAYS[0]), documents, tokens)
    figures: Figures = {}
    for way in WAYS:
        part = _part(_DEMO, "full", None, way)
        found = plain if way == WAYS[0] else _answers(part, documents, tokens)
        figures[way.name] = {"nbytes": part.nbytes, **_compare(found, plain, documents)}
    return figures


class _Answers(NamedTuple):
    """Logits [positions, vocabulary] of each text, and what follows its beginning."""

    logits: list[torch.Tensor]
    generated: list[list[int]]


def _answers(part: SplitModel, documents: list[torch.Tensor], tokens: int) -> _Answers:
    logits = [part(ids).logits[0].float() for ids in documents]
    return _Answers(logits, [_continue(part, ids[:, :_PROMPT], tokens) for ids in documents])


def _continue(part: SplitModel, ids: torch.Tensor, tokens: int) -> list[int]:
    """Return the greedy continuation, of exactly so many tokens."""
    cache, found = part.new_cache(), []
    for _ in range(tokens):
        ids = part(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        found.append(int(ids))
    return found


def _compare(found: _Answers, plain: _Answers, documents: list[torch.Tensor]) -> dict[str, float]:
    ours, theirs = torch.cat(found.logits), torch.cat(plain.logits)
    pairs = zip(found.generated, plain.generated, strict=True)
    nats = [
        torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum")
        for logits, ids in zip(found.logits, documents, strict=True)
    ]
    predicted = sum(ids.shape[1] - 1 for ids in documents)
    return {
        "error": _relative_error(ours, theirs),
        "same": float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()),
        "generated": sum(a == b for a, b in pairs) / len(documents),
        "perplexity": math.exp(float(sum(nats)) / predicted),
        "tokens": predicted,
    }


def held_out_texts() -> Iterator[str]:
    """Yield the docstrings of the held-out files, of the Python that runs this."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for name in HELD_OUT:
        for node in ast.walk(ast.parse((root / name).read_text(encoding="utf-8"))):
            text = ast.get_docstring(node) if isinstance(node, documented) else None
            if text and len(text) >= _SHORTEST_TEXT:
                yield text


def _part(model: str, component: str, points: list[int] | None, way: Way) -> SplitModel:
    return load_component(
        model, component, points, dtype=way.dtype, mmap=False, quantization=way.quantization
    )


def _relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


TASKS: Mapping[str, Callable[..., Figures]] = {"trunk": trunk, "demo": demo}


def main() -> None:
    """Do the task, and answer on standard output; what libraries print goes to standard error."""
    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    torch.set_num_threads(1)
    figures: dict[str, Any] = TASKS[sys.argv[1]](**json.loads(sys.argv[2]))
    os.write(answers, json.dumps(figures).encode() + b"\n")


if __name__ == "__main__":
    main()

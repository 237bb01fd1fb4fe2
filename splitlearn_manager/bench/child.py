"""The process that is measured: it warms up, says so, and takes one step each time it is told to.

Memory is read from outside, by the process that started it; only the clock runs here.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from splitlearn_core.factory import ModelFactory, estimate_component, load_component
from splitlearn_manager.bench.job import Job, Step, Way

TOKENS = 8
_PAGE_BYTES = 4096


def main() -> None:
    """Do the job that comes as the first line of standard input."""
    answers = _take_standard_output()
    job = Job.from_json(sys.stdin.readline())
    small = _Run(replace(job, model=job.warm_up, split_points=job.warm_up_points))
    for step in job.steps:
        small.take(step)
    del small
    _settle()
    run = _Run(job)
    _tell(answers, {"ready": True})
    for step in job.steps:
        sys.stdin.readline()
        start = time.perf_counter()
        run.take(step)
        _tell(answers, {"seconds": time.perf_counter() - start, "nbytes": run.nbytes})
    sys.stdin.readline()


class _Run:
    """A job, and what it has loaded so far."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._modules: list[Any] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the weights and buffers that are loaded, each tensor once."""
        return sum({id(t): t.nbytes for t in self._tensors()}.values())

    def take(self, step: Step) -> None:
        """Take one step."""
        if step == "load":
            self._modules = _WAYS[self._job.way](self._job)
        elif step == "touch":
            self._touch()
        else:
            self._forward()

    def _tensors(self) -> list[torch.Tensor]:
        return [t for m in self._modules for t in (*m.parameters(), *m.buffers())]

    def _touch(self) -> None:
        """Read a byte from every page of the weights."""
        for tensor in self._tensors():
            tensor.detach().view(-1).view(torch.uint8)[::_PAGE_BYTES].sum()

    def _forward(self) -> None:
        """Run some tokens through all that is loaded, without a cache."""
        first = self._modules[0]
        takes_ids = not hasattr(first, "spec") or first.spec.is_first
        values: Any = torch.zeros(1, TOKENS, dtype=torch.long)
        if not takes_ids:
            values = torch.zeros(1, TOKENS, first.config.hidden_size, dtype=first.dtype)
        with torch.inference_mode():
            for module in self._modules:
                values = module(values, use_cache=False)


def _part(job: Job) -> list[nn.Module]:
    return [
        load_component(
            job.model,
            job.component,
            job.split_points,
            dtype=job.dtype,
            mmap=job.mmap,
            cache_dir=job.cache_dir,
        )
    ]


def _all_parts(job: Job, *, low_memory: bool) -> list[nn.Module]:
    first, second = job.split_points
    parts: Any = ModelFactory.create_split_models(
        "auto", job.model, first, second, low_memory=low_memory, dtype=job.dtype, mmap=job.mmap
    )
    return list(parts)


def _parts(job: Job) -> list[nn.Module]:
    return _all_parts(job, low_memory=True)


def _traditional(job: Job) -> list[nn.Module]:
    return _all_parts(job, low_memory=False)


def _transformers(job: Job) -> list[nn.Module]:
    dtype = job.dtype or "auto"
    return [AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype, local_files_only=True)]


def _accelerate(job: Job) -> list[nn.Module]:
    """Load as accelerate's guide to big models does, all of it on the CPU."""
    accelerate: Any = importlib.import_module("accelerate")
    config = AutoConfig.from_pretrained(job.model, local_files_only=True)
    dtype = getattr(torch, job.dtype) if job.dtype else config.dtype
    with accelerate.init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    loaded: nn.Module = accelerate.load_checkpoint_and_dispatch(
        model, job.model, device_map={"": "cpu"}, dtype=dtype
    )
    return [loaded]


def _plan(job: Job) -> list[nn.Module]:
    estimate_component(job.model, "full")
    return []


_WAYS: dict[Way, Callable[[Job], list[nn.Module]]] = {
    "part": _part,
    "parts": _parts,
    "traditional": _traditional,
    "transformers": _transformers,
    "accelerate": _accelerate,
    "plan": _plan,
}


def _settle() -> None:
    """Give back what the warm-up took, so that nothing measured hides in free memory."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(0)


def _take_standard_output() -> int:
    """Return a descriptor for answers; what libraries print goes to standard error."""
    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return answers


def _tell(answers: int, values: dict[str, Any]) -> None:
    os.write(answers, json.dumps(values).encode() + b"\n")


if __name__ == "__main__":
    main()

"""The ranks that `splitlearn bench sharded` measures, forked from one process, watched by another.

Each warms up, says so, takes the steps that it is told to, and answers with what it found.  What a
rank has in memory before its steps is not counted.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import AutoConfig, AutoModelForCausalLM

from splitlearn_core.factory import load_component
from splitlearn_core.machine import return_freed_memory
from splitlearn_core.sharded import joined_group, load_sharded
from splitlearn_core.skeleton import initialise_buffers

TOKENS = 8


def ours(model: str) -> nn.Module:
    """FSDP2, each rank reading its own slices."""
    return load_sharded(model)


def ours_full_state(model: str) -> nn.Module:
    """FSDP2, rank 0 reading, and sending each rank its share."""
    return load_sharded(model if dist.get_rank() == 0 else None, source="full_state")


def ours_fsdp1(model: str) -> nn.Module:
    """FSDP1, each rank reading its own slices."""
    return load_sharded(model, how="fsdp1")


def seeds_fsdp2(model: str) -> nn.Module:
    """FSDP2, then the state dict of rank 0's from_pretrained, which torch broadcasts."""
    first = dist.get_rank() == 0
    state = _pretrained(model).state_dict() if first else {}
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(model, local_files_only=True)
        shell = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    for layer in shell.model.layers:
        fully_shard(layer)
    fully_shard(shell)
    shell.to_empty(device="cpu")
    shell.tie_weights()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(shell, state, options=options)
    for name, buffer in list(shell.model.rotary_emb.named_buffers(recurse=False)):
        shell.model.rotary_emb.register_buffer(name, buffer.to("meta"), persistent=False)
    initialise_buffers(shell, torch.device("cpu"))
    model_of_all: nn.Module = shell.eval()
    return model_of_all


def seeds_fsdp1(model: str) -> nn.Module:
    """FSDP1 around each rank's from_pretrained."""
    whole = _pretrained(model)
    policy = ModuleWrapPolicy({type(whole.model.layers[0])})
    return FullyShardedDataParallel(
        whole, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    ).eval()


def unsharded(model: str) -> nn.Module:
    """The whole model on every rank, for comparison."""
    return load_component(model, "full").model


WAYS: dict[str, Callable[[str], nn.Module]] = {
    way.__name__: way
    for way in (ours, ours_full_state, ours_fsdp1, seeds_fsdp2, seeds_fsdp1, unsharded)
}


def _pretrained(model: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype="auto", local_files_only=True)


def forward(model: nn.Module) -> str:
    """Run some tokens; return a hash of the logits."""
    ids = torch.arange(TOKENS)[None]
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    return hashlib.sha256(logits.float().numpy().tobytes()).hexdigest()


def main() -> None:
    """Fork the ranks of each job that comes as a line of standard input, and wait for them."""
    pipes = json.loads(sys.argv[1])
    for line in sys.stdin:
        job: dict[str, Any] = json.loads(line)
        processes = [_forked(job, rank, *pipes[rank]) for rank in range(job["ranks"])]
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        if any(codes):
            sys.exit(1)


def _forked(job: dict[str, Any], rank: int, orders: int, answers: int) -> int:
    """Start a rank; return its process id."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        _be_rank(job, rank, orders, answers)
        code = 0
    except BaseException:  # noqa: BLE001 - the process ends here
        traceback.print_exc()
    finally:
        os._exit(code)


def _be_rank(job: dict[str, Any], rank: int, orders: int, answers: int) -> None:
    """Warm up, and take the steps."""
    load = WAYS[job["way"]]
    store = f"file://{Path(job['folder']) / 'store'}"
    with joined_group(store, rank=rank, world_size=job["ranks"], backend="gloo"):
        forward(load(job["warm_up"]))
        gc.collect()
        return_freed_memory()
        dist.barrier()
        _tell(answers, {"pid": os.getpid()})
        os.read(orders, 1)
        begun = time.perf_counter()
        model = load(job["model"])
        _tell(answers, {"seconds": time.perf_counter() - begun})
        os.read(orders, 1)
        _tell(answers, {"logits": forward(model)})
        os.read(orders, 1)


def _tell(answers: int, values: dict[str, Any]) -> None:
    os.write(answers, json.dumps(values).encode() + b"\n")


if __name__ == "__main__":
    main()

"""One rank of several on this machine: saves, counts and loads a sharded model, then says so.

Run as `rank_child.py RANK WORLD_SIZE FOLDER WAY…`; the ranks meet by a file in FOLDER.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from splitlearn_core.checkpoint import count_parameters, load_weights, save_weights


def wrap(model: torch.nn.Module, way: str) -> torch.nn.Module:
    """Return the model as one of the ways has it."""
    if way == "ddp":
        return DistributedDataParallel(model)
    if way == "fsdp2":
        mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({LlamaDecoderLayer}),
        use_orig_params=way == "fsdp1-orig",
        device_id=torch.device("cpu"),
    )


def checked(folder: Path, way: str) -> dict[str, object]:
    """Save a wrapped model, load others' values, save again; return what it said."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model").train()
    model.get_input_embeddings().requires_grad_(way == "fsdp1")  # FSDP1 alone must have all or none
    wrapped = wrap(model, way)
    told: dict[str, object] = count_parameters(wrapped).to_dict()
    saved = save_weights(wrapped, folder / way, "float16")
    told["tensors"] = len(saved.tensors)
    told["training"] = wrapped.training
    told["loaded"] = len(load_weights(wrapped, folder / "other.safetensors").loaded)
    save_weights(wrapped, folder / f"{way}.safetensors")
    try:
        save_weights(wrapped, folder / "full" / "weights.safetensors")
    except OSError as error:
        told["error"] = str(error)
    return told


def main() -> None:
    """Do all of it."""
    rank, world_size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    store = distributed.FileStore(str(folder / "store"), world_size)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    told = {way: checked(folder, way) for way in sys.argv[4:]}
    (folder / f"rank-{rank}.json").write_text(json.dumps(told))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()

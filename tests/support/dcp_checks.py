"""What two ranks check of DCP folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from splitlearn_core.sharded import load_dcp, save_dcp

Settings = dict[str, Any]
IDS = torch.arange(12).view(2, 6) % 97


def tiny(*, tied: bool = True, seed: int = 0) -> PreTrainedModel:
    """Return a model with 131 rows of vocabulary, which two ranks can't share evenly."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=131,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return AutoModelForCausalLM.from_config(config)


def sharded(model: PreTrainedModel) -> PreTrainedModel:
    """Shard a model that is whole, with FSDP2."""
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def trained(model: torch.nn.Module, steps: int = 2) -> torch.optim.AdamW:
    """Train a few steps, all ranks on the same text."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, steps)
    return optimizer


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Train some steps, and return the losses."""
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return weights and moments whole, by name."""
    state = get_optimizer_state_dict(model, optimizer)["state"]
    moments = {f"{n}.{k}": v for n, values in state.items() for k, v in values.items()}
    return {n: _whole(v) for n, v in {**model.state_dict(), **moments}.items()}


def _whole(value: Any) -> Any:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def check_saves_at_two(folder: Path, settings: Settings) -> list[float]:
    """Train, save, write down what was saved, and go on."""
    del settings
    model = sharded(tiny())
    optimizer = trained(model)
    save_dcp(folder / "at-two", model, optimizer)
    state = state_of(model, optimizer)
    if dist.get_rank() == 0:
        torch.save(state, folder / "at-two.pt")
    return train(model, optimizer, 2)


def check_goes_on_at_two(folder: Path, settings: Settings) -> list[float]:
    """Load into a model that was another, and go on."""
    del settings
    model = sharded(tiny(seed=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    load_dcp(folder / "at-two", model, optimizer)
    return train(model, optimizer, 2)


def check_reads_what_one_wrote(folder: Path, settings: Settings) -> dict[str, bool]:
    """Load at two ranks what one process without a group has written."""
    del folder
    model = sharded(tiny(seed=1))
    optimizer = torch.optim.AdamW(model.parameters())
    load_dcp(settings["at_one"], model, optimizer)
    wanted = torch.load(settings["at_one_state"], weights_only=True)
    found = state_of(model, optimizer)
    return {name: torch.equal(found[name], value) for name, value in wanted.items()}


def check_fsdp1_writes_and_fsdp2_reads(folder: Path, settings: Settings) -> list[list[float]]:
    """The two ways of sharding read each other's folders."""
    del settings
    model = FullyShardedDataParallel(tiny(), use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = trained(model)
    save_dcp(folder / "fsdp1", model, optimizer)
    other = sharded(tiny(seed=1))
    others = torch.optim.AdamW(other.parameters())
    load_dcp(folder / "fsdp1", other, others)
    again = FullyShardedDataParallel(
        tiny(seed=2), use_orig_params=True, device_id=torch.device("cpu")
    )
    agains = torch.optim.AdamW(again.parameters())
    load_dcp(folder / "fsdp1", again, agains)
    return [train(model, optimizer, 2), train(other, others, 2), train(again, agains, 2)]


def check_a_full_folder_is_refused(folder: Path, settings: Settings) -> str:
    del settings
    try:
        save_dcp(folder / "at-two", sharded(tiny()))
    except FileExistsError as error:
        return str(error)
    return ""


def check_an_optimizer_of_gathered_parameters_is_refused(folder: Path, settings: Settings) -> str:
    del settings
    model = sharded(tiny())
    with torch.no_grad():
        model(input_ids=IDS)
    optimizer = torch.optim.AdamW(model.parameters())
    try:
        save_dcp(folder / "strangers", model, optimizer)
    except ValueError as error:
        return str(error)
    return ""

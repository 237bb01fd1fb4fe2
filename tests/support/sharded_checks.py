"""What two ranks check of sharded loading: each answers with figures that a test asserts on."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from splitlearn_core import sharded
from splitlearn_core.checkpoint import save_weights
from splitlearn_core.factory import load_component
from splitlearn_core.sharded import (
    full_tensors,
    load_full_state,
    load_sharded,
    report_of,
    save_adapter,
)
from splitlearn_core.split_model import SplitModel

Settings = dict[str, Any]
POINTS = (2, 4)
WAYS = [(how, source) for how in ("fsdp2", "fsdp1") for source in ("slices", "full_state")]
IDS = torch.arange(24).view(2, 12) % 97


def load(path: str, component: str = "full", **options: Any) -> nn.Module:
    """Load, without naming the model where rank 0 alone has it."""
    absent = options.get("source") == "full_state" and dist.get_rank() > 0
    options = {"timeout": 60, **options}
    return load_sharded(None if absent else path, component, POINTS, **options)


def inputs_of(part: SplitModel) -> torch.Tensor:
    """Return what a part takes."""
    if part.spec.is_first:
        return IDS
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 12, part.hidden_size, generator=generator).to(part.hidden_dtype)


def run(part: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Return logits or the hidden state."""
    with torch.no_grad():
        output = part(inputs)
    return getattr(output, "logits", output)


@cache
def plain_part(path: str, component: str, dtype: str | None = None) -> SplitModel:
    """Return the part itself, which nobody changes."""
    return load_component(path, component, POINTS, dtype=dtype)


@cache
def wanted(path: str, component: str, dtype: str | None = None) -> torch.Tensor:
    """Return what the part itself computes."""
    plain = plain_part(path, component, dtype)
    return run(plain, inputs_of(plain))


def alike(path: str, component: str, **options: Any) -> bool:
    """Whether a sharded part computes what the part itself does, to the bit."""
    dtype = options.get("dtype")
    inputs = inputs_of(plain_part(path, component, dtype))
    return torch.equal(
        run(load(path, component, **options), inputs), wanted(path, component, dtype)
    )


def check_every_way(folder: Path, settings: Settings) -> dict[str, Any]:
    """Every part, both ways of sharding, both sources."""
    del folder
    found = {}
    for how, source in WAYS:
        for component in ("full", "bottom", "trunk", "top"):
            path = settings["llama"]
            plain = plain_part(path, component)
            module = load(path, component, how=how, source=source)
            found[f"{how} {source} {component}"] = {
                "equal": torch.equal(run(module, inputs_of(plain)), wanted(path, component)),
                "kind": type(module).__name__,
                "training": module.training,
                "report": report_of(module).to_dict(),
                "nbytes": sum(p.nbytes for p in plain.parameters()),
                "tensors": len(list(plain.parameters())),
            }
    return found


def check_other_models(folder: Path, settings: Settings) -> dict[str, bool]:
    """Tied heads, biases, fused experts, a gate of one row, a part's folder, torch files."""
    del folder
    found = {}
    for name in ("tied", "gpt2", "experts", "one-row", "buffers", "torch-file"):
        for how in ("fsdp2", "fsdp1"):
            found[f"{name} {how}"] = alike(settings[name], "full", how=how)
    for name in ("tied", "experts", "buffers"):
        found[f"{name} full_state"] = alike(settings[name], "full", source="full_state")
    found["tied top"] = alike(settings["tied"], "top")
    found["half"] = alike(settings["llama"], "full", dtype="bfloat16")
    found["half full_state"] = alike(
        settings["llama"], "trunk", dtype="bfloat16", source="full_state"
    )
    found["no layers"] = _alike_without_layers(settings["llama"])
    return found


def _alike_without_layers(path: str) -> bool:
    """A Bottom of all layers, and a Top of none."""
    equal = []
    for component in ("bottom", "top"):
        plain = load_component(path, component, (5, 6), allow_empty=True)
        sharded = load_sharded(path, component, (5, 6), allow_empty=True, timeout=30)
        trunk = load_component(path, "trunk", (5, 6), allow_empty=True)
        inner = load_sharded(path, "trunk", (5, 6), allow_empty=True, timeout=30)
        for one, other in ((plain, sharded), (trunk, inner)):
            equal.append(torch.equal(run(other, inputs_of(one)), run(one, inputs_of(one))))
    return all(equal)


def check_rows(folder: Path, settings: Settings) -> dict[str, Any]:
    """How many rows of 97 each rank has, and of a table with one."""
    del folder
    table = load(settings["llama"]).get_parameter("lm_head.weight")
    gate = load(settings["one-row"]).get_parameter("model.layers.0.mlp.shared_expert_gate.weight")
    assert isinstance(table, DTensor)
    assert isinstance(gate, DTensor)
    return {"table": list(table.to_local().shape), "gate": list(gate.to_local().shape)}


def check_ties(folder: Path, settings: Settings) -> dict[str, Any]:
    """Tied heads stay tied through training; what is stored twice and differs stays apart."""
    del folder
    model = load(settings["tied"])
    losses(model, 2)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    apart = load(settings["untied-values"])
    unsplit = AutoModelForCausalLM.from_pretrained(settings["untied-values"])
    return {
        "tied": embedding.weight is head.weight,
        "counted once": len([n for n, _ in model.named_parameters() if "lm_head" in n]),
        "apart": apart.get_input_embeddings().weight is not apart.get_output_embeddings().weight,
        "apart equal": torch.equal(run(apart, IDS), run(unsplit.eval(), IDS)),
        "stored twice": load(settings["tied-twice"]).get_output_embeddings().weight.numel(),
        "one of two": alike(settings["tied-twice"], "full"),
    }


# --- training ----------------------------------------------------------------------------------


def losses(
    model: nn.Module, steps: int, optimizer: torch.optim.Optimizer | None = None, clip: float = 1.0
) -> list[float]:
    """Train on the same text on every rank."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = IDS.to(next(model.parameters()).device)
    found = []
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def check_training(folder: Path, settings: Settings) -> dict[str, dict[str, list[float]]]:
    """Losses of three steps: one process, both ways, other strategies and meshes."""
    del folder
    path = settings["llama"]
    grid = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    row = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    ways: dict[str, Callable[[], nn.Module]] = {
        "plain": lambda: AutoModelForCausalLM.from_pretrained(path),
        "fsdp2": lambda: load(path),
        "fsdp2 full_state": lambda: load(path, source="full_state"),
        "fsdp2 kept": lambda: load(path, reshard_after_forward=False),
        "fsdp2 replicated": lambda: load(path, mesh=grid),
        "fsdp1": lambda: load(path, how="fsdp1"),
        "fsdp1 grad op": lambda: load(path, how="fsdp1", sharding_strategy="SHARD_GRAD_OP"),
        "fsdp1 no shard": lambda: load(path, how="fsdp1", sharding_strategy="NO_SHARD"),
        "fsdp1 hybrid": lambda: load(path, how="fsdp1", sharding_strategy="HYBRID_SHARD", mesh=row),
    }
    found = {}
    for name, make in ways.items():
        model = make().train()
        found[name] = {
            "same text": losses(model, 3, clip=1e9),
            "each its own": _losses_of_all(model, name != "plain"),
        }
    return found


def _losses_of_all(model: nn.Module, sharded: bool) -> list[float]:
    """Train each rank on a text of its own, or one process on both; without any scaling."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    rank = dist.get_rank()
    mine = IDS[rank : rank + 1] if sharded else IDS
    for _ in range(3):
        model(mine, labels=mine).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return [float(model(text[None], labels=text[None]).loss) for text in IDS]


def check_clipping(folder: Path, settings: Settings) -> dict[str, list[float]]:
    """Losses where gradients are clipped hard."""
    del folder
    plain = AutoModelForCausalLM.from_pretrained(settings["llama"])
    return {
        "plain": losses(plain, 3, clip=0.01),
        "fsdp2": losses(load(settings["llama"]), 3, clip=0.01),
    }


def check_training_of_parts(folder: Path, settings: Settings) -> dict[str, list[float]]:
    """Three sharded parts, one after the other, against the unsplit model; gradients cross."""
    del folder
    found = {}
    for how in ("plain", "fsdp2", "fsdp1"):
        names = ("bottom", "trunk", "top")
        if how == "plain":
            parts = [load_component(settings["llama"], n, POINTS) for n in names]
        else:
            parts = [load(settings["llama"], n, how=how) for n in names]
        optimizers = [torch.optim.AdamW(part.parameters(), lr=1e-2) for part in parts]
        found[how] = [_step(parts, optimizers) for _ in range(3)]
    return found


def _step(parts: list[nn.Module], optimizers: list[torch.optim.AdamW]) -> float:
    values: Any = IDS
    for part in parts[:-1]:
        values = part(values)
    loss = parts[-1](values, labels=IDS).loss
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def check_an_optimizer_after_an_evaluation(folder: Path, settings: Settings) -> dict[str, Any]:
    """The root is sharded again after a forward without gradients: it is trained."""
    del folder
    found = {}
    for how in ("fsdp2", "fsdp1"):
        model = load(settings["llama"], how=how)
        run(model, IDS)
        kinds = {type(p).__name__ for p in model.parameters()}
        found[how] = {"losses": losses(model, 3, clip=1e9), "kinds": sorted(kinds)}
    return found


def check_mixed_precision(folder: Path, settings: Settings) -> dict[str, Any]:
    """Computed in bfloat16, kept and summed in float32."""
    del folder
    half = load_component(settings["llama"], "full", dtype="bfloat16")
    reference = run(half, IDS).float()
    found = {}
    for how in ("fsdp2", "fsdp1"):
        model = load(settings["llama"], how=how, param_dtype="bfloat16", reduce_dtype="float32")
        logits = run(model, IDS)
        found[how] = {
            "kept": sorted({str(p.dtype) for p in model.parameters()}),
            "computed": str(logits.dtype),
            "error": float((logits.float() - reference).abs().max() / reference.abs().max()),
            "losses": losses(model, 2),
            "trunk": str(
                run(
                    load(settings["llama"], "trunk", how=how, param_dtype="bfloat16"),
                    torch.zeros(1, 3, 32),
                ).dtype
            ),
        }
    return found


# --- adapters and saving -----------------------------------------------------------------------


def lora() -> Any:
    """Return peft's config of a small adapter."""
    from peft import LoraConfig  # noqa: PLC0415 - slow

    return LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a sharded parameter whole, on every rank."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def check_lora(folder: Path, settings: Settings) -> dict[str, Any]:
    """Train an adapter on a sharded model, save it, and put it on again and on a part."""
    import peft  # noqa: PLC0415 - slow

    path = settings["llama"]
    model = load(path, adapter=lora())
    plain = AutoModelForCausalLM.from_pretrained(path)
    peft.inject_adapter_in_model(lora(), plain)
    beginning = {n: whole(p) for n, p in model.named_parameters() if "lora_" in n}
    for name, value in beginning.items():
        plain.get_parameter(name).data.copy_(value)
    found: dict[str, Any] = {
        "trained": len([p for p in model.parameters() if p.requires_grad]),
        "begins": {n.rpartition("lora_")[2][0]: bool(v.any()) for n, v in beginning.items()},
        "plain": losses(plain.train(), 3, clip=1e9),
        "fsdp2": losses(model.train(), 3, clip=1e9),
        "fsdp1": losses(load(path, how="fsdp1", adapter=lora()).train(), 3, clip=1e9),
        "half fsdp2": losses(load(path, dtype="bfloat16", adapter=lora()).train(), 2),
        "half fsdp1": losses(load(path, dtype="bfloat16", adapter=lora(), how="fsdp1").train(), 2),
    }
    save_adapter(model, folder / "adapter")
    dist.barrier()
    loaded = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(path), folder / "adapter"
    )
    model.eval()
    wanted = run(model, IDS)
    again = load(path, adapter=folder / "adapter")
    found["peft loads it"] = torch.equal(run(loaded.eval(), IDS), wanted)
    found["loaded again"] = torch.equal(run(again, IDS), wanted)
    found["a part's"] = _chained(path, folder / "adapter", wanted)
    found["none"] = refused(lambda: save_adapter(load(path), folder / "no-adapter"))
    found["nowhere"] = refused(lambda: load(path, adapter=folder))
    found["differs"] = refused(lambda: load(path, adapter=lora(), adapter_seed=dist.get_rank()))
    return found


def _chained(path: str, adapter: Path, wanted: torch.Tensor) -> bool:
    values: Any = IDS
    for name in ("bottom", "trunk", "top"):
        values = run(load(path, name, adapter=adapter), values)
    return torch.equal(values, wanted)


def check_saving(folder: Path, settings: Settings) -> dict[str, bool]:
    """Save what is sharded as one folder, and load that with transformers, or as a part."""
    found = {}
    for how in ("fsdp2", "fsdp1"):
        for name in ("tied", "experts"):
            path = folder / f"saved-{how}-{name}"
            save_weights(load(settings[name], how=how), path)
            dist.barrier()
            loaded = AutoModelForCausalLM.from_pretrained(path)
            unsplit = AutoModelForCausalLM.from_pretrained(settings[name])
            equal = _same_tensors(loaded, unsplit)
            equal = equal and loaded.config.architectures == [type(unsplit).__name__]
            found[f"{how} {name}"] = equal and torch.equal(
                run(loaded.eval(), IDS), run(unsplit.eval(), IDS)
            )
        part = folder / f"saved-{how}-trunk"
        save_weights(load(settings["llama"], "trunk", how=how), part)
        dist.barrier()
        plain = load_component(settings["llama"], "trunk", POINTS)
        found[f"{how} trunk"] = _same_tensors(SplitModel.load(part), plain)
    trained = load(settings["llama"])
    losses(trained, 1)
    run(trained, IDS)
    save_weights(trained, folder / "saved.pth")
    dist.barrier()
    state = torch.load(folder / "saved.pth", weights_only=True)
    wanted = {name: whole(p) for name, p in trained.named_parameters()}
    found["trained, a torch file"] = all(torch.equal(state[n], v) for n, v in wanted.items())
    return found


def _same_tensors(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], t) for n, t in theirs.items())


def check_full_tensors(folder: Path, settings: Settings) -> dict[str, Any]:
    """Rank 0 gets each parameter whole, the other none."""
    del folder
    model = load(settings["tied"])
    found = dict(full_tensors(model))
    plain = dict(load_component(settings["tied"], "full").model.named_parameters())
    got = [name for name, tensor in found.items() if tensor is not None]
    return {
        "names": list(found) == list(plain),
        "got": len(got),
        "equal": all(torch.equal(t, plain[n]) for n, t in found.items() if t is not None),
    }


def check_full_state(folder: Path, settings: Settings) -> dict[str, Any]:
    """A state dict that rank 0 has in memory."""
    del folder
    found: dict[str, Any] = {}
    first = dist.get_rank() == 0
    other = AutoModelForCausalLM.from_pretrained(settings["other-weights"]).eval()
    state = other.state_dict()
    for how in ("fsdp2", "fsdp1"):
        model = load(settings["llama"], how=how)
        load_full_state(model, state if first else None, timeout=30)
        found[how] = torch.equal(run(model, IDS), run(other, IDS))
    tied = AutoModelForCausalLM.from_pretrained(settings["tied"]).eval()
    model = load(settings["tied-twice"])
    load_full_state(model, tied.state_dict() if first else None, timeout=30)
    found["tied"] = torch.equal(run(model, IDS), run(tied, IDS))
    trunk = load(settings["llama"], "trunk")
    part = load_component(settings["other-weights"], "trunk", POINTS)
    load_full_state(trunk, part.model.state_dict() if first else None, timeout=30)
    found["trunk"] = torch.equal(run(trunk, inputs_of(part)), run(part, inputs_of(part)))
    wrong = {
        "missing": {n: t for n, t in state.items() if "norm" not in n},
        "strange": {**state, "extra": torch.zeros(1)},
        "shape": {**state, "model.norm.weight": torch.zeros(3)},
    }
    for case, damaged in wrong.items():
        given = damaged if first else None
        found[case] = refused(lambda given=given: load_full_state(model, given, timeout=30))
    return found


# --- faults ------------------------------------------------------------------------------------


def refused(call: Callable[[], Any]) -> dict[str, Any]:
    """Return the error that a call raises."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 - told to the test
        ranks = list(getattr(error, "ranks", ()))
        return {"kind": type(error).__name__, "text": str(error), "ranks": ranks}
    return {"kind": "", "text": "", "ranks": []}


def check_refusals(folder: Path, settings: Settings) -> dict[str, Any]:
    """What differs at one rank, and what is damaged at one rank alone."""
    del folder
    rank = dist.get_rank()
    path = settings["llama"]
    by_rank: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "dtype": (lambda: load(path), lambda: load(path, dtype="bfloat16")),
        "component": (lambda: load(path, "trunk"), lambda: load(path, "top")),
        "how": (lambda: load(path), lambda: load(path, how="fsdp1")),
        "weights": (lambda: load(path), lambda: load(settings["other-weights"])),
        "shapes": (lambda: load(path), lambda: load(settings["tied"])),
        "truncated": (lambda: load(path), lambda: load(settings["truncated"])),
        "missing": (lambda: load(path), lambda: load(settings["missing"])),
        "nowhere": (lambda: load(path), lambda: load(path + "-nowhere")),
        "rank 0 has none": (
            lambda: load_sharded(None, source="full_state", timeout=30),
            lambda: load_sharded(None, source="full_state", timeout=30),
        ),
        "rank 0 is damaged": (
            lambda: load(settings["truncated"], source="full_state"),
            lambda: load(path, source="full_state"),
        ),
    }
    return {name: refused(calls[rank]) for name, calls in by_rank.items()}


def check_wrong_arguments(folder: Path, settings: Settings) -> dict[str, Any]:
    """Arguments that no rank can use."""
    del folder
    path = settings["llama"]
    grid = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    calls: dict[str, Callable[[], Any]] = {
        "how": lambda: load(path, how="fsdp3"),
        "source": lambda: load(path, source="files"),
        "strategy": lambda: load(path, how="fsdp1", sharding_strategy="ZERO"),
        "mesh": lambda: load(path, how="fsdp1", mesh=grid),
        "one rank": lambda: load(path, how="fsdp1", sharding_strategy="HYBRID_SHARD", mesh=grid),
        "timeout": lambda: load(path, timeout=0),
        "points": lambda: load_sharded(path, "trunk", [2, 99], timeout=30),
        "component": lambda: load(path, "middle"),
        "report": lambda: report_of(nn.Linear(1, 1)),
    }
    return {name: refused(call) for name, call in calls.items()}


def check_progress(folder: Path, settings: Settings) -> list[list[int]]:
    """Bytes that were told of."""
    del folder
    seen: list[list[int]] = []
    load(settings["llama"], progress=lambda done, total: seen.append([done, total]))
    return seen


# --- the documents -----------------------------------------------------------------------------


def check_documented_equivalents(folder: Path, settings: Settings) -> list[str]:
    """Do what each row of the page's table says, one after the other; return the rows."""
    place = {
        "path": settings["llama"],
        "folder": folder / "documented",
        "rank": dist.get_rank(),
        "mesh": init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard")),
        **{name: getattr(sharded, name) for name in sharded.__all__},
    }
    done = []
    for ours in documented_calls():
        exec(ours, place)  # noqa: S102 - the project's own page
        if ours.startswith("model ="):
            place["optimizer"] = torch.optim.SGD(place["model"].parameters())
            inputs = torch.zeros(1, 3, 32) if "trunk" in ours else IDS
            assert run(place["model"], inputs).isfinite().all()
        done.append(ours)
    return done


def documented_calls() -> list[str]:
    """Return our calls, of the table of the page on sharding."""
    page = (Path(__file__).parents[2] / "docs/sharded.md").read_text(encoding="utf-8")
    table = page.partition("## Their call")[2]
    rows = [line.rstrip(" |").rpartition(" | ")[2] for line in table.splitlines() if "| `" in line]
    return [row.strip("`") for row in rows]

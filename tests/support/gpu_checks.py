"""What ranks with a GPU each check of sharded models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sharded_checks import IDS, losses, run

from splitlearn_core.factory import load_component
from splitlearn_core.sharded import load_dcp, load_sharded, report_of, save_dcp


def check_on_gpus(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Load, compute, train, save and load again over NCCL."""
    path = settings["llama"]
    plain = load_component(path, "full", device="cuda").model
    found: dict[str, Any] = {}
    for how in ("fsdp2", "fsdp1"):
        for source in ("slices", "full_state"):
            model = load_sharded(path, how=how, source=source, timeout=60)
            logits = run(model, IDS.cuda())
            found[f"{how} {source}"] = {
                "device": {p.device.type for p in model.parameters()} == {"cuda"},
                "error": float((logits - run(plain, IDS.cuda())).abs().max()),
                "read": [rank.bytes_read for rank in report_of(model).ranks],
            }
    model = load_sharded(path, timeout=60)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found["before"] = losses(model, 2, optimizer, clip=1e9)
    save_dcp(folder / "dcp", model, optimizer)
    other = load_sharded(path, timeout=60)
    again = torch.optim.AdamW(other.parameters(), lr=1.0)
    load_dcp(folder / "dcp", other, again)
    found["went on"] = losses(model, 2, optimizer, clip=1e9)
    found["loaded"] = losses(other, 2, again, clip=1e9)
    found["plain"] = losses(plain, 2, clip=1e9)
    return found

"""The models of the storm: an attention model, a recurrent one, and one that is both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

import splitlearn_core
from splitlearn_core import SplitModel
from splitlearn_core.factory import load_component


@dataclass(frozen=True)
class Family:
    """A model, and what its sessions can do.

    Attributes:
        name: Also the id of its Trunk.
        model_type: The architecture of a small random model; `None` for the built-in one.
        cut: Where it is cut.
        rolls_back: Whether positions can be taken back.
        chunks: Whether a step may have several positions where the session holds some.
        pads: Whether the rows of a session may begin with padding.
    """

    name: str
    model_type: str | None
    cut: tuple[int, int]
    rolls_back: bool = False
    chunks: bool = False
    pads: bool = False

    def place(self, folder: Path) -> str:
        """Return the path of the model, which is made if it has to be."""
        if self.model_type is None:
            return "builtin:demo"
        path = folder / self.name
        if not path.exists():
            torch.manual_seed(0)
            tiny_model(self.model_type).save_pretrained(path)
        return str(path)

    def whole(self, folder: Path) -> PreTrainedModel:
        """Return the unsplit model, as transformers loads it."""
        path = _BUILTIN if self.model_type is None else Path(self.place(folder))
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        return model.eval()

    def end(self, folder: Path, component: str) -> SplitModel:
        """Return a part, in this process."""
        return load_component(self.place(folder), component, self.cut, dtype=torch.float32)


_BUILTIN = Path(splitlearn_core.__file__).parent / "builtin" / "demo"

BUILTIN = Family("built-in", None, (2, 6), rolls_back=True, chunks=True, pads=True)
RECURRENT = Family("recurrent", "mamba2", (1, 5))
HYBRID = Family("hybrid", "bamba", (1, 5))
FAMILIES = (BUILTIN, RECURRENT, HYBRID)

"""What every rank must know of a part to build its shell, without a file: plain values.

Ranks that read a checkpoint make it of headers, and compare; where only rank 0 has the checkpoint,
it sends it to the others.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from splitlearn_core.dtypes import dtype_name
from splitlearn_core.plan import ComponentSpec

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig

    from splitlearn_core.builder import Blueprint


@dataclass(frozen=True)
class TensorOutline:
    """A tensor of the part: its dtype, as `float32`, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return self.numel * dtype.itemsize


@dataclass(frozen=True)
class Outline:
    """A part before it is built.

    Attributes:
        checkpoint: Names where it comes from, in messages.
        model_type: Architecture.
        config: The whole model's, as JSON.
        generation_config: As JSON; `None` where the part has no head.
        spec: What the part owns.
        dtype: The one that its config is to name.
        built_as: The one that the shell is built with.
        tensors: Every parameter and persistent buffer, by name.
        ties: Tensor -> the one that it shares its values with.
        uncertified: Whether an architecture that was not certified is let in.
    """

    checkpoint: str
    model_type: str
    config: str
    generation_config: str | None
    spec: ComponentSpec
    dtype: str
    built_as: str
    tensors: Mapping[str, TensorOutline]
    ties: Mapping[str, str]
    uncertified: bool

    @classmethod
    def of(
        cls,
        blueprint: Blueprint,
        spec: ComponentSpec,
        checkpoint: str,
        settings: GenerationConfig | None,
        built_as: Any,
        *,
        uncertified: bool,
    ) -> Outline:
        """Outline what was drawn."""
        reads, targets = blueprint.reads, blueprint.model.state_dict()
        final = {t: reads.stored[r.stored[0]].final_dtype for t, r in reads.recipes.items()}
        return cls(
            checkpoint=checkpoint,
            model_type=blueprint.model.config.model_type,
            config=_portable(blueprint.model.config),
            generation_config=None if settings is None else settings.to_json_string(),
            spec=spec,
            dtype=dtype_name(reads.dtype),
            built_as=dtype_name(built_as),
            tensors={
                name: TensorOutline(dtype_name(final[name]), tuple(tensor.shape))
                for name, tensor in targets.items()
            },
            ties={t: o for t, o in reads.ties.items() if t in targets and o in targets},
            uncertified=uncertified,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the part; of tied tensors once."""
        return sum(t.nbytes for name, t in self.tensors.items() if name not in self.ties)

    def without_ties(self, names: set[str]) -> Outline:
        """Return the same, with some tensors that keep values of their own."""
        return replace(self, ties={t: o for t, o in self.ties.items() if t not in names})

    def to_dict(self) -> dict[str, Any]:
        """Return what can be sent as JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Outline:
        """Read what `to_dict` returned."""
        tensors = {
            name: TensorOutline(t["dtype"], tuple(t["shape"]))
            for name, t in fields["tensors"].items()
        }
        spec = ComponentSpec(**fields["spec"])
        return cls(**{**fields, "tensors": tensors, "spec": spec})

    def facts(self) -> dict[str, str]:
        """Return what ranks that made an outline each must agree on, in short."""
        tensors = {name: [t.dtype, list(t.shape)] for name, t in self.tensors.items()}
        return {
            "the model's config": digest(self.config),
            "its generation settings": digest(self.generation_config or ""),
            "dtype": self.dtype,
            "names, dtypes and shapes of its tensors": digest(json.dumps(tensors)),
        }


def _portable(config: PreTrainedConfig) -> str:
    """Return a config as JSON, without where it was found."""
    fields = json.loads(config.to_json_string(use_diff=False))
    return json.dumps({key: value for key, value in fields.items() if key != "_name_or_path"})


def digest(text: str | bytes) -> str:
    """Return a short SHA-256."""
    content = text.encode() if isinstance(text, str) else text
    return hashlib.sha256(content).hexdigest()[:16]

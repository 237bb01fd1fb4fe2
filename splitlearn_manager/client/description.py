"""What a server says of a Trunk: facts, and what goes with its hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from splitlearn_manager.client.errors import RemoteError
from splitlearn_manager.serving.tensors import tensor_from_wire, tensor_to_wire
from splitlearn_manager.serving.wire import SIDE_NAMES, DType, Frame, TensorName, WireTensor

if TYPE_CHECKING:
    from splitlearn_core.hidden_state import HiddenState

_ANY = -1
_IDENTITY = (
    "model_type",
    "start_layer",
    "end_layer",
    "num_layers",
    "hidden_size",
    "dtype",
    "hidden_dtype",
    "num_parameters",
    "fingerprint",
)
"""Facts that two servers of the same Trunk agree in, as far as both tell them."""

_NAMED = ("hidden_states", "attention_mask", "position_ids")


@dataclass(frozen=True)
class RemoteValue:
    """A tensor that goes with the hidden states, [batch, new, *sizes].

    Attributes:
        code: What it is called in a frame.
        name: What it is.
        dtype: Its dtype.
        sizes: Its sizes after [batch, new]; -1 for any.
        layerwise: Whether its first size counts layers: a part takes as many as it has itself, and
            later parts take the rest.
    """

    code: TensorName
    name: str
    dtype: DType
    sizes: tuple[int, ...]
    layerwise: bool

    def part_of(self, given: HiddenState) -> torch.Tensor:
        """Return what of the values that came with a hidden state the part needs.

        Raises:
            ValueError: They did not come, or are of another dtype or shape.
        """
        value = given.side.get(self.name)
        if value is None:
            raise ValueError(
                f"the Trunk needs {self.name} besides the hidden states: give it what the part"
                " before returned, as it is"
            )
        if self.layerwise:
            value = value[:, :, : self.sizes[0]]
        if not self._fits(value.dtype, value.shape, *given.shape[:2]):
            raise ValueError(f"{self}, found {value.dtype} {list(value.shape)}")
        return value

    def left_of(self, value: torch.Tensor) -> torch.Tensor | None:
        """Return what of a value is for later parts."""
        if not self.layerwise:
            return value
        return value[:, :, self.sizes[0] :] if value.shape[2] > self.sizes[0] else None

    def to_wire(self, value: torch.Tensor) -> WireTensor:
        """Return the tensor as it travels."""
        return tensor_to_wire(self.code, value)

    def from_wire(self, answer: Frame, batch: int, new: int) -> torch.Tensor:
        """Return the tensor that came back.

        Raises:
            RemoteError: It did not, or it has another dtype or shape than the server says.
        """
        found = answer.tensor(self.code)
        value = None if found is None else tensor_from_wire(found)
        if value is None or not self._fits(value.dtype, value.shape, batch, new):
            raise RemoteError(f"the server's answer lacks {self}", "bad_answer")
        return value

    def _fits(self, dtype: torch.dtype, shape: Sequence[int], batch: int, new: int) -> bool:
        sizes = tuple(shape[2:])
        return (
            str(dtype) == f"torch.{self.dtype.torch_name}"
            and tuple(shape[:2]) == (batch, new)
            and len(sizes) == len(self.sizes)
            and all(size in {_ANY, found} for size, found in zip(self.sizes, sizes, strict=True))
        )

    def __str__(self) -> str:
        sizes = "".join(f", {'any' if size == _ANY else size}" for size in self.sizes)
        return f"{self.name} must be {self.dtype.torch_name} [batch, new{sizes}]"


@dataclass(frozen=True)
class Description:
    """What is known of a Trunk.

    Attributes:
        facts: Name -> fact, as text.
        hidden_shape: Sizes of the hidden states after [batch, new].
        takes: What it needs besides the hidden states.
        gives: What it makes besides them.
    """

    facts: Mapping[str, str]
    hidden_shape: tuple[int, ...]
    takes: tuple[RemoteValue, ...]
    gives: tuple[RemoteValue, ...]

    def fact(self, name: str) -> str:
        """Return a fact.

        Raises:
            RemoteError: The server does not tell it.
        """
        try:
            return self.facts[name]
        except KeyError:
            raise RemoteError(
                f"the server does not say the {name} of its Trunk", "bad_answer"
            ) from None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        dtype: torch.dtype = getattr(torch, self.fact("dtype"))
        return dtype

    @property
    def hidden_dtype(self) -> torch.dtype:
        """Dtype of the hidden states, which is that of the weights as a rule."""
        name = self.facts.get("hidden_dtype")
        dtype: torch.dtype = getattr(torch, name) if name else self.dtype
        return dtype

    @property
    def quantization(self) -> str | None:
        """How its linear layers are packed, if they are."""
        return self.facts.get("quantization")

    def difference(self, other: Description) -> str:
        """Return in what another server's Trunk is not the same; nothing, where it may be."""
        found = [
            f"{name} {other.facts[name]}, not {self.facts[name]}"
            for name in _IDENTITY
            if name in self.facts.keys() & other.facts.keys()
            and self.facts[name] != other.facts[name]
        ]
        if self.quantization != other.quantization:
            found.append(f"quantization {other.quantization}, not {self.quantization}")
        if (self.takes, self.gives) != (other.takes, other.gives):
            found.append("other values go with its hidden states")
        return "; ".join(found)


def describe(answer: Any, model_id: str, url: str) -> Description:
    """Read a server's metadata of a model.

    Raises:
        RemoteError: It is no Trunk, or the answer is not that of a SplitLearn daemon.
    """
    facts = answer.get("properties") if isinstance(answer, dict) else None
    if not isinstance(facts, dict):
        text = f"{url} is no SplitLearn daemon: it tells no properties of its models"
        raise RemoteError(text, "bad_answer")
    component = str(facts.get("component"))
    if component != "trunk" and not component.startswith("trunk-"):
        text = f"{model_id!r} at {url} is {component!r}, and a Trunk is needed"
        raise RemoteError(text, "unsupported_component")
    texts = {str(name): str(fact) for name, fact in facts.items()}
    try:
        return Description(texts, *_tensors(answer, texts))
    except (KeyError, TypeError, ValueError) as error:
        text = f"{url} describes the tensors of {model_id!r} in a way that makes no sense"
        raise RemoteError(text, "bad_answer") from error


def _tensors(
    answer: Mapping[str, Any], facts: Mapping[str, str]
) -> tuple[tuple[int, ...], tuple[RemoteValue, ...], tuple[RemoteValue, ...]]:
    """Return the sizes of the hidden states, and what goes with them: in, and out."""
    inputs, outputs = answer.get("inputs", ()), answer.get("outputs", ())
    layerwise = set(facts.get("layerwise", "").split(","))
    found = [_sizes(entry) for entry in inputs if entry["name"] == "hidden_states"]
    shape = found[0] if found else (int(facts["hidden_size"]),)
    return shape, _values(inputs, layerwise), _values(outputs, layerwise)


def _values(entries: Sequence[Any], layerwise: set[str]) -> tuple[RemoteValue, ...]:
    """Return the tensors that go with the hidden states, with their codes."""
    beside = [entry for entry in entries if entry["name"] not in _NAMED]
    return tuple(
        RemoteValue(
            code, entry["name"], DType[entry["datatype"]], _sizes(entry), entry["name"] in layerwise
        )
        for code, entry in zip(SIDE_NAMES, beside, strict=False)
    )


def _sizes(entry: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the sizes of a tensor after [batch, new]."""
    return tuple(int(size) for size in entry["shape"][2:])

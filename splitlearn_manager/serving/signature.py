"""What a model takes and gives in one inference request, and whether a request fits that."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from splitlearn_manager.serving.infer_errors import BadInferError
from splitlearn_manager.serving.infer_wire import (
    DATATYPES,
    InferRequest,
    InputTensor,
    RequestedOutput,
    check_has_json,
)

if TYPE_CHECKING:
    from splitlearn_core.side_values import CrossingValue, Size

INPUT_IDS, HIDDEN_STATES, LOGITS = "input_ids", "hidden_states", "logits"
ATTENTION_MASK, POSITION_IDS = "attention_mask", "position_ids"

MAX_OUTPUT_BYTES = 1 << 30
"""Most bytes that the outputs of one request may take: a long prompt's logits are soon that."""

_ANY = -1
_MOST_POSITIONS = 1 << 31
_DATATYPES = {
    "float32": "FP32",
    "float16": "FP16",
    "bfloat16": "BF16",
    "float64": "FP64",
    "int64": "INT64",
    "int32": "INT32",
    "uint8": "UINT8",
    "bool": "BOOL",
}


def component_of(model: Any) -> str:
    """Return `bottom`, `trunk`, …, `full`; a model whose parts are in several places has none."""
    return getattr(model, "component", "pipeline")


def datatype_of(dtype: Any) -> str:
    """Return what the protocol calls a torch dtype, given as such or by name.

    Raises:
        KeyError: It has no name for it.
    """
    return _DATATYPES[str(dtype).removeprefix("torch.")]


@dataclass(frozen=True, slots=True)
class Slot:
    """One input or output, [batch, new, *sizes].

    Attributes:
        name: What it is called.
        datatype: As the protocol calls it.
        sizes: Its sizes after batch and new positions.
        optional: Whether a request may leave it out.
        values: What its elements must be among; `None` where the model does not mind, or they are
            positions.
        positions: Whether they are positions of the request.
    """

    name: str
    datatype: str
    sizes: tuple[Size, ...] = ()
    optional: bool = False
    values: range | None = None
    positions: bool = False

    @classmethod
    def beside(cls, value: CrossingValue) -> Self:
        """Return the place of a value that goes with the hidden states."""
        datatype = datatype_of(value.dtype)
        if value.below is not None:
            return cls(value.name, datatype, value.sizes, values=range(value.below))
        # Whole numbers that are no ids say which positions to attend to.
        return cls(value.name, datatype, value.sizes, positions=datatype.startswith("INT"))

    @property
    def shape(self) -> list[int]:
        """The shape as metadata has it: -1 where it varies."""
        rest = (size.most if size.exact and size.most is not None else _ANY for size in self.sizes)
        return [_ANY, _ANY, *rest]

    def fits(self, tensor: InputTensor, batch: int, new: int) -> bool:
        """Whether a tensor is of this datatype and shape."""
        sizes = tensor.shape[2:]
        return (
            tensor.datatype == self.datatype
            and tensor.shape[:2] == (batch, new)
            and len(sizes) == len(self.sizes)
            and all(size.fits(found) for size, found in zip(self.sizes, sizes, strict=True))
        )

    def allowed(self, new: int) -> range | None:
        """Return what its elements must be among, given how many positions the request has."""
        return range(new) if self.positions else self.values

    def expected(self, batch: int | str = "batch", new: int | str = "positions") -> str:
        """Return datatype and shape in words: `FP32 [batch, positions, 64]`."""
        return f"{self.datatype} [{', '.join(map(str, (batch, new, *self.sizes)))}]"

    def most_bytes(self, batch: int, new: int) -> int:
        """Return the bytes that it takes at most; sizes that nobody knows count as one."""
        sizes = [size.most or 1 for size in self.sizes]
        return batch * new * math.prod(sizes) * DATATYPES[self.datatype].itemsize


@dataclass(frozen=True, slots=True)
class Job:
    """A request that fits its model.

    Attributes:
        inputs: Name -> tensor, with its place.
        wanted: The outputs to be sent, in the order in which they were asked for.
        batch: Rows.
    """

    inputs: dict[str, tuple[Slot, InputTensor]]
    wanted: tuple[RequestedOutput, ...]
    batch: int

    @property
    def tokens(self) -> int:
        """Positions, times rows: every model's first input is [batch, positions, …]."""
        _, first = next(iter(self.inputs.values()))
        return math.prod(first.shape[:2])


@dataclass(frozen=True, slots=True)
class Signature:
    """All that a model takes and gives.

    Attributes:
        inputs: The first is what the forward takes as its one positional argument; what goes with
            it follows, and then what may be left out.
        outputs: Likewise.
        max_positions: Positions that the model was made for; `None` where it does not say.
    """

    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]
    max_positions: int | None

    @classmethod
    def of(cls, model: Any) -> Self:
        """Return the signature of a part, a whole model or a pipeline."""
        component = component_of(model)
        in_the_middle = component == "trunk" or component.startswith("trunk-")
        first = _hidden(model) if in_the_middle or component == "top" else _ids(model)
        left = _hidden(model) if in_the_middle or component == "bottom" else _logits(model)
        taken = tuple(map(Slot.beside, getattr(model, "side_inputs", ())))
        given = tuple(map(Slot.beside, getattr(model, "side_outputs", ())))
        limit: int | None = model.max_positions
        return cls((first, *taken, *_companions(limit)), (left, *given), limit)

    def job(self, request: InferRequest, *, most_json_bytes: int) -> Job:
        """Return what a request asks for, if it fits; the values of its tensors are not looked at.

        Args:
            request: What came.
            most_json_bytes: Most bytes that an output may take to be written as JSON.

        Raises:
            BadInferError: Names the tensor, what was expected and what was found.
        """
        inputs = self._inputs(request)
        _, first = inputs[self.inputs[0].name]
        batch, new = first.shape[:2]
        if self.max_positions is not None and new > self.max_positions:
            raise BadInferError(
                f"input {first.name!r} has {new} positions, the model has {self.max_positions}"
            )
        for slot, tensor in inputs.values():
            if not slot.fits(tensor, batch, new):
                raise BadInferError(
                    f"input {slot.name!r} must be {slot.expected(batch, new)}, found {tensor}"
                )
        self._check_sizes(batch, new)
        wanted = self._wanted(request)
        for output in wanted:
            self._check_json(output, batch, new, most_json_bytes)
        return Job(inputs, wanted, batch)

    def _inputs(self, request: InferRequest) -> dict[str, tuple[Slot, InputTensor]]:
        """Return the inputs by name, in the order of the signature."""
        given = {tensor.name: tensor for tensor in request.inputs}
        known = {slot.name for slot in self.inputs}
        for name in given:
            if name not in known:
                raise BadInferError(
                    f"the model has no input {name[:100]!r}; it takes {self._told(self.inputs)}"
                )
        for slot in self.inputs:
            if slot.name not in given and not slot.optional:
                raise BadInferError(f"input {slot.name!r} is missing: {slot.expected()}")
        self._check_first(given[self.inputs[0].name])
        return {slot.name: (slot, given[slot.name]) for slot in self.inputs if slot.name in given}

    def _check_first(self, tensor: InputTensor) -> None:
        """Refuse a first input that has no batch or positions to compare others with."""
        slot = self.inputs[0]
        if not slot.fits(tensor, *(tensor.shape[:2] if len(tensor.shape) > 1 else (0, 0))):
            raise BadInferError(f"input {slot.name!r} must be {slot.expected()}, found {tensor}")

    def _wanted(self, request: InferRequest) -> tuple[RequestedOutput, ...]:
        """Return the outputs that are asked for; none of them means all."""
        known = {slot.name for slot in self.outputs}
        for output in request.outputs:
            if output.name not in known:
                raise BadInferError(
                    f"the model has no output {output.name[:100]!r}; it gives"
                    f" {self._told(self.outputs)}"
                )
        every = tuple(RequestedOutput(slot.name, request.binary) for slot in self.outputs)
        return request.outputs or every

    def _check_sizes(self, batch: int, new: int) -> None:
        """Refuse what would be answered with more than anybody can take."""
        total = sum(slot.most_bytes(batch, new) for slot in self.outputs)
        if total > MAX_OUTPUT_BYTES:
            raise BadInferError(
                f"the outputs for {batch} x {new} positions would take {total} bytes, at most"
                f" {MAX_OUTPUT_BYTES} are sent; send fewer"
            )

    def _check_json(self, output: RequestedOutput, batch: int, new: int, most: int) -> None:
        """Refuse to write as JSON what it has no form for, or is too long for it."""
        if output.binary:
            return
        slot = next(slot for slot in self.outputs if slot.name == output.name)
        check_has_json(slot.name, slot.datatype)
        size = slot.most_bytes(batch, new)
        if size > most:
            raise BadInferError(
                f"output {slot.name!r} takes {size} bytes, at most {most} are written as JSON:"
                " ask for it as binary data"
            )

    @staticmethod
    def _told(slots: tuple[Slot, ...]) -> str:
        return ", ".join(slot.name for slot in slots)


def _ids(model: Any) -> Slot:
    return Slot(INPUT_IDS, "INT64", values=range(_vocabulary(model)))


def _hidden(model: Any) -> Slot:
    return Slot(HIDDEN_STATES, datatype_of(model.hidden_dtype), _sizes(*model.hidden_shape))


def _logits(model: Any) -> Slot:
    return Slot(LOGITS, datatype_of(model.dtype), _sizes(_vocabulary(model)))


def _sizes(*sizes: int) -> tuple[Size, ...]:
    from splitlearn_core.side_values import Size  # noqa: PLC0415 - it needs torch

    return tuple(map(Size, sizes))


def _vocabulary(model: Any) -> int:
    return int(model.config.get_text_config(decoder=True).vocab_size)


def _companions(max_positions: int | None) -> tuple[Slot, Slot]:
    """Return what may go with every request: 0 in the mask is padding."""
    positions = range(_MOST_POSITIONS if max_positions is None else max_positions)
    return (
        Slot(ATTENTION_MASK, "INT64", optional=True, values=range(2)),
        Slot(POSITION_IDS, "INT64", optional=True, values=positions),
    )

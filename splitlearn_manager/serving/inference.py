"""One inference request in the thread of its model: from the bytes of its inputs to its outputs.

Requests have no state: each is one forward over all of its positions, as transformers runs it with
nothing but these arguments.  So the outputs are those of the unsplit model, to the bit where that
is run with as many threads.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from splitlearn_core.hidden_state import HiddenState
from splitlearn_manager.serving.infer_errors import BadInferError
from splitlearn_manager.serving.infer_wire import DATATYPES, OutputTensor
from splitlearn_manager.serving.signature import (
    ATTENTION_MASK,
    HIDDEN_STATES,
    LOGITS,
    POSITION_IDS,
    datatype_of,
)
from splitlearn_manager.serving.tensors import check_byte_order

if TYPE_CHECKING:
    from splitlearn_manager.core.entries import AsyncManagedModel
    from splitlearn_manager.serving.infer_wire import InputTensor
    from splitlearn_manager.serving.signature import Job, Slot

_TORCH_DTYPES = {
    "BOOL": torch.bool,
    "UINT8": torch.uint8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "FP16": torch.float16,
    "BF16": torch.bfloat16,
    "FP32": torch.float32,
    "FP64": torch.float64,
}


@dataclass(frozen=True, slots=True)
class Result:
    """What a request came to.

    Attributes:
        outputs: Those that were asked for, on the CPU.
        began: When its turn came, on the clock of `time.perf_counter_ns`.
        input_ns: Nanoseconds that its tensors took to be made and checked.
        infer_ns: Those of the forward.
        output_ns: Those of its outputs.
    """

    outputs: tuple[OutputTensor, ...]
    began: int
    input_ns: int
    infer_ns: int
    output_ns: int


def run_job(managed: AsyncManagedModel, job: Job) -> Result:
    """Run a request, in the model's thread.

    Raises:
        BadInferError: Ids, positions or a mask have values that the model has not.
        ModelUnloadingError: The model was unloaded.
    """
    began = time.perf_counter_ns()
    tensors = {name: _tensor(slot, given) for name, (slot, given) in job.inputs.items()}
    ready = time.perf_counter_ns()
    found = _forward(managed.model, tensors)
    done = time.perf_counter_ns()
    outputs = tuple(_output(one.name, found[one.name], binary=one.binary) for one in job.wanted)
    end = time.perf_counter_ns()
    return Result(outputs, began, ready - began, done - ready, end - done)


def _forward(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the model's outputs by name, given its inputs in the order of its signature."""
    mask, positions = tensors.pop(ATTENTION_MASK, None), tensors.pop(POSITION_IDS, None)
    (_, first), *beside = tensors.items()
    given = HiddenState(first, dict(beside)).handed_on
    with torch.inference_mode():
        output = model(given, attention_mask=mask, position_ids=positions)
    logits: torch.Tensor | None = getattr(output, LOGITS, None)
    if logits is not None:
        return {LOGITS: logits}
    left = HiddenState.of(output)
    return {**left.side, HIDDEN_STATES: left.tensor}


def _tensor(slot: Slot, given: InputTensor) -> torch.Tensor:
    """Return the tensor of an input.

    It shares the bytes of the request, which can be written and nobody else reads, where they are
    aligned for its dtype.
    """
    check_byte_order()
    dtype = _TORCH_DTYPES[given.datatype]
    if slot.datatype == "BOOL":
        flat = torch.frombuffer(given.data, dtype=torch.uint8).ne(0)  # any other byte is no bool
    else:
        flat = _aligned(given, dtype)
    allowed = slot.allowed(given.shape[1])
    if allowed is not None:
        _check_values(slot.name, flat, allowed)
    return flat.reshape(given.shape)


def _aligned(given: InputTensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the elements; torch's kernels may rely on the alignment of their dtype."""
    octets = torch.frombuffer(given.data, dtype=torch.uint8)
    if octets.data_ptr() % DATATYPES[given.datatype].itemsize:
        octets = octets.clone()
    return octets.view(dtype)


def _check_values(name: str, elements: torch.Tensor, allowed: range) -> None:
    """Refuse whole numbers of which a model may look up each in a table.

    Raises:
        BadInferError: One is not in the table.
    """
    low, high = int(elements.min()), int(elements.max())
    if low not in allowed or high not in allowed:
        raise BadInferError(
            f"input {name!r} must be {allowed.start} to {allowed.stop - 1}, found {low} to {high}"
        )


def _output(name: str, tensor: torch.Tensor, *, binary: bool) -> OutputTensor:
    """Return an output with its bytes, which are copied only to make them contiguous on the CPU."""
    check_byte_order()
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    data = flat.numpy().data
    return OutputTensor(name, datatype_of(tensor.dtype), tuple(tensor.shape), data, binary)

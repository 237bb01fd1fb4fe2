"""Inference requests of the Open Inference Protocol v2: bytes to values, values to bytes.

A body is JSON, or JSON followed by the raw tensors of the binary tensor extension; then the header
`Inference-Header-Content-Length` says where the JSON ends.  Raw tensors are little-endian,
row-major, without padding, in the order in which the JSON names them.

Everything that a request declares is checked against what it brought before anything is allocated
for it.  What a model takes is no matter here: see `splitlearn_manager.serving.signature`.

Source: github.com/kserve/open-inference-protocol, and Triton's extension_binary_data.md.
"""

from __future__ import annotations

import json
import math
import reprlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from splitlearn_manager.serving.infer_errors import BadInferError
from splitlearn_manager.serving.long_json import NUMBERS, read_json, write_numbers

HEADER_LENGTH = "Inference-Header-Content-Length"

MAX_DIMENSIONS = 8
MAX_ID_LENGTH = 1024
_MAX_DIGITS = 18

_INTEGERS, _REALS, _BOOLEANS = frozenset({int}), frozenset({int, float}), frozenset({bool})


@dataclass(frozen=True, slots=True)
class Datatype:
    """An element type of the protocol.

    Attributes:
        itemsize: Bytes per element.
        code: For `struct` and `memoryview`; `None` where JSON has no such numbers.
        json_types: What elements are in JSON.
    """

    itemsize: int
    code: str | None = None
    json_types: frozenset[type] = frozenset()


DATATYPES = {
    "BOOL": Datatype(1, "?", _BOOLEANS),
    "UINT8": Datatype(1, "B", _INTEGERS),
    "UINT16": Datatype(2, "H", _INTEGERS),
    "UINT32": Datatype(4, "I", _INTEGERS),
    "UINT64": Datatype(8, "Q", _INTEGERS),
    "INT8": Datatype(1, "b", _INTEGERS),
    "INT16": Datatype(2, "h", _INTEGERS),
    "INT32": Datatype(4, "i", _INTEGERS),
    "INT64": Datatype(8, "q", _INTEGERS),
    "FP16": Datatype(2),
    "BF16": Datatype(2),
    "FP32": Datatype(4, "f", _REALS),
    "FP64": Datatype(8, "d", _REALS),
}
"""All but BYTES, which no model here takes or gives."""


@dataclass(frozen=True, slots=True)
class InputTensor:
    """A tensor of a request; `data` has exactly as many bytes as shape and datatype say."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: memoryview

    def __str__(self) -> str:
        return f"{self.datatype} {list(self.shape)}"


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    """An output that is asked for, and whether as binary data."""

    name: str
    binary: bool


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A request.

    Attributes:
        id: The client's own, to be repeated; `None` where it has none.
        inputs: In the order in which they came, no two of one name.
        outputs: Those asked for, likewise; none of them means all.
        binary: Whether outputs that say nothing else are wanted as binary data.
    """

    id: str | None
    inputs: tuple[InputTensor, ...]
    outputs: tuple[RequestedOutput, ...]
    binary: bool


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of an answer; `data` are its bytes, to be sent as such or as numbers in JSON."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: memoryview
    binary: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """The body of an answer, in pieces.

    Attributes:
        pieces: Bytes, in their order.
        json_length: How many of them are JSON; `None` if all are.
    """

    pieces: tuple[bytes | memoryview, ...]
    json_length: int | None


# --- Reading -------------------------------------------------------------------------------


def json_length_of(header: str | None, total: int) -> int:
    """Return how many bytes of a body are JSON.

    Args:
        header: The value of `Inference-Header-Content-Length`, where the request has it.
        total: Length of the body, decompressed.

    Raises:
        BadInferError: It is no number from 1 to the body's length.  0 would be a raw request,
            which is for models with one input of which one size varies: none here is.
    """
    if header is None:
        return total
    digits = header.strip()
    if not digits.isascii() or not digits.isdigit() or len(digits) > _MAX_DIGITS:
        raise BadInferError(f"{HEADER_LENGTH} must be a number of bytes, found {_shown(header)}")
    length = int(digits)
    if length > total:
        raise BadInferError(f"{HEADER_LENGTH} is {length}, but the body has {total} bytes")
    if length == 0:
        raise BadInferError(
            f"{HEADER_LENGTH} is 0: raw requests are for models with one input of which one size"
            " varies; here, describe the inputs in JSON"
        )
    return length


def read_request(body: bytearray | memoryview | bytes, json_length: int) -> InferRequest:
    """Return the request that a body is; its binary inputs look into `body`, nothing is copied.

    Raises:
        BadInferError: It is none; the only exception that any input can cause.
    """
    view = memoryview(body)
    document = _document(view[:json_length])
    parameters = _parameters(document, "the request")
    if "sequence_id" in parameters:
        raise BadInferError(
            "sequence_id: requests have no state here; sessions do, which are another protocol"
        )
    inputs = tuple(_inputs(document, view[json_length:]))
    binary = _flag(parameters, "binary_data_output", "the request", default=False)
    outputs = tuple(_outputs(document, binary=binary))
    return InferRequest(_id(document), inputs, outputs, binary)


def _document(text: memoryview) -> dict[str, Any]:
    """Return the JSON object."""
    try:
        value = read_json(text)
    except ValueError as error:
        raise BadInferError(
            f"the body is not JSON ({_reason(error)}); where binary tensors follow the JSON,"
            f" {HEADER_LENGTH} must say how long that is"
        ) from None
    return _object(value, "the body")


def _reason(error: ValueError) -> str:
    """Return what is wrong with a document, without quoting it."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, at character {error.pos}"
    return "it is no UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)[:100]


def _id(document: dict[str, Any]) -> str | None:
    value = document.get("id")
    if value is not None and (not isinstance(value, str) or len(value) > MAX_ID_LENGTH):
        limit = f"of at most {MAX_ID_LENGTH} characters"
        raise BadInferError(f"id must be a text {limit}, found {_shown(value)}")
    return value


def _inputs(document: dict[str, Any], raw: memoryview) -> Iterator[InputTensor]:
    """Yield the inputs, handing out the raw bytes in their order."""
    offset = 0
    for entry, name in _named(document, "inputs", "input"):
        tensor = _input(entry, name, raw[offset:])
        offset += 0 if "data" in entry else tensor.data.nbytes
        yield tensor
    if offset != len(raw):
        raise BadInferError(
            f"{len(raw)} bytes follow the JSON, but the inputs' binary_data_size add up to {offset}"
        )


def _input(entry: dict[str, Any], name: str, raw: memoryview) -> InputTensor:
    """Return one input."""
    where = f"input {name!r}"
    parameters = _parameters(entry, where)
    _refuse_shared_memory(parameters, where)
    datatype, shape = _datatype(entry, where), _shape(entry, where)
    size = parameters.get("binary_data_size")
    if (size is None) is ("data" not in entry):
        raise BadInferError(f"{where} needs data, or the parameter binary_data_size: one of them")
    if size is None:
        data = _numbers(entry["data"], datatype, shape, where)
    else:
        data = _raw(raw, size, datatype, shape, where)
    return InputTensor(name, datatype, shape, data)


def _datatype(entry: dict[str, Any], where: str) -> str:
    value = entry.get("datatype")
    if not isinstance(value, str) or value not in DATATYPES:
        names = ", ".join(DATATYPES)
        raise BadInferError(f"{where}: datatype must be one of {names}, found {_shown(value)}")
    return value


def _shape(entry: dict[str, Any], where: str) -> tuple[int, ...]:
    value = entry.get("shape")
    good = (
        isinstance(value, list)
        and len(value) <= MAX_DIMENSIONS
        and all(type(size) is int and size > 0 for size in value)
    )
    if not good:
        raise BadInferError(
            f"{where}: shape must be a list of at most {MAX_DIMENSIONS} sizes, each 1 or more,"
            f" found {_shown(value)}"
        )
    return tuple(entry["shape"])


def _raw(
    raw: memoryview, size: Any, datatype: str, shape: tuple[int, ...], where: str
) -> memoryview:
    """Return the bytes of a binary input."""
    wanted = math.prod(shape) * DATATYPES[datatype].itemsize
    if type(size) is not int or size != wanted:
        raise BadInferError(
            f"{where}: {datatype} {list(shape)} takes {_count(wanted)} bytes, but binary_data_size"
            f" is {_shown(size)}"
        )
    if size > len(raw):
        raise BadInferError(f"{where}: binary_data_size is {size}, but only {len(raw)} are left")
    return raw[:size]


def _numbers(value: Any, datatype: str, shape: tuple[int, ...], where: str) -> memoryview:
    """Return the bytes of an input whose elements are in JSON, flat or nested."""
    kind = DATATYPES[datatype]
    if kind.code is None:
        raise BadInferError(
            f"{where}: {datatype} has no form in JSON; send it as binary data (binary_data_size)"
        )
    elements = _flat(value, shape, where)
    packed = bytearray()
    for start in range(0, len(elements), NUMBERS):
        packed += _packed(elements[start : start + NUMBERS], datatype, kind, where)
    return memoryview(packed)


def _packed(elements: list[Any], datatype: str, kind: Datatype, where: str) -> bytes:
    wrong = set(map(type, elements)) - kind.json_types
    if wrong:
        names = ", ".join(sorted(one.__name__ for one in wrong))
        raise BadInferError(f"{where}: data must be elements of {datatype}, found {names}")
    try:
        return struct.pack(f"<{len(elements)}{kind.code}", *elements)
    except (struct.error, OverflowError):
        raise BadInferError(f"{where}: a number in data does not fit into {datatype}") from None


def _flat(value: Any, shape: tuple[int, ...], where: str) -> list[Any]:
    """Return the elements in row-major order.

    Raises:
        BadInferError: They are not as many as the shape says, or not nested as it says.
    """
    total = math.prod(shape)
    if type(value) is list and len(value) == total and type(value[0]) is not list:
        return value
    rows: list[Any] = [value]
    for size in shape:
        if any(type(row) is not list or len(row) != size for row in rows):
            raise BadInferError(
                f"{where}: data must have {_count(total)} elements, in one list or nested as"
                f" {list(shape)}"
            )
        rows = rows[0] if len(rows) == 1 else list(chain.from_iterable(rows))
    return rows


def _outputs(document: dict[str, Any], *, binary: bool) -> Iterator[RequestedOutput]:
    """Yield the outputs that are asked for."""
    for entry, name in _named(document, "outputs", "output", required=False):
        where = f"output {name!r}"
        parameters = _parameters(entry, where)
        _refuse_shared_memory(parameters, where)
        if parameters.get("classification"):
            raise BadInferError(f"{where}: classification is not offered here; take the values")
        yield RequestedOutput(name, _flag(parameters, "binary_data", where, default=binary))


def _named(
    document: dict[str, Any], key: str, noun: str, *, required: bool = True
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the objects of a list with their names."""
    entries = document.get(key, None if required else [])
    if not isinstance(entries, list) or (required and not entries):
        raise BadInferError(f"{key} must be a list of {key}, found {_shown(entries)}")
    seen: set[str] = set()
    for number, value in enumerate(entries):
        entry = _object(value, f"{noun} {number}")
        name = entry.get("name")
        if not isinstance(name, str) or not name or len(name) > MAX_ID_LENGTH:
            raise BadInferError(f"{noun} {number}: name must be a text, found {_shown(name)}")
        if name in seen:
            raise BadInferError(f"{noun} {_shown(name)} comes twice")
        seen.add(name)
        yield entry, name


def _parameters(entry: dict[str, Any], where: str) -> dict[str, Any]:
    return _object(entry.get("parameters", {}), f"parameters of {where}")


def _flag(parameters: dict[str, Any], name: str, where: str, *, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise BadInferError(f"{where}: {name} must be true or false, found {_shown(value)}")
    return value


def _refuse_shared_memory(parameters: dict[str, Any], where: str) -> None:
    if "shared_memory_region" in parameters:
        raise BadInferError(f"{where}: shared memory is not offered here; send the data itself")


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadInferError(f"{where} must be a JSON object, found {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    """Return what was found, cut where it is long."""
    return "nothing" if value is None else reprlib.repr(value)


def _count(number: int) -> str:
    """Return a number in words that stay short."""
    return str(number) if number < 10**_MAX_DIGITS else "far too many"


# --- Writing -------------------------------------------------------------------------------


def write_answer(
    model_name: str, model_version: str, request_id: str | None, outputs: Sequence[OutputTensor]
) -> Answer:
    """Return the answer to a request.

    Raises:
        BadInferError: An output has no form in JSON, and is not to be binary.
    """
    head = {"model_name": model_name, "model_version": model_version}
    if request_id is not None:
        head["id"] = request_id
    text: list[bytes] = [_dump(head)[:-1], b',"outputs":[']
    for number, output in enumerate(outputs):
        text += [b"," if number else b"", *_described(output)]
    text.append(b"]}")
    raw = [output.data for output in outputs if output.binary]
    return Answer((*text, *raw), sum(map(len, text)) if raw else None)


def check_has_json(name: str, datatype: str) -> None:
    """Refuse an output that JSON has no form for.

    Raises:
        BadInferError: Says how to ask for it.
    """
    if DATATYPES[datatype].code is None:
        raise BadInferError(
            f"output {name!r} is {datatype}, which has no form in JSON: ask for it as binary data"
            " (its parameter binary_data, or binary_data_output of the request)"
        )


def _described(output: OutputTensor) -> Iterator[bytes]:
    """Yield the JSON object of an output."""
    entry = {"name": output.name, "datatype": output.datatype, "shape": output.shape}
    if output.binary:
        yield _dump(entry | {"parameters": {"binary_data_size": output.data.nbytes}})
        return
    check_has_json(output.name, output.datatype)
    yield _dump(entry)[:-1] + b',"data":['
    code: Any = DATATYPES[output.datatype].code
    yield from write_numbers(output.data.cast(code))
    yield b"]}"


def _dump(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()

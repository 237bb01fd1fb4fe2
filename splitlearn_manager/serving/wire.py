"""Frames of the session protocol: bytes to values and back, with no I/O.

One WebSocket message is one frame.  All numbers are little-endian::

    header      <BBBBIII   version, kind, tensor_count, flags, request, session, position
    descriptor  <BBBB      name, dtype, ndim, 0, followed by ndim dimensions of <I
    data                   the raw row-major bytes of each tensor, in order, with no padding

STEP and RESULT carry tensors.  Every other kind carries one JSON object, and an empty body means
`{}`.  Flags are 0, but for a RESULT with something to say besides: flag 1 announces a JSON object
behind its tensors, which is never empty.  Where a session's OPEN had `"timings": true`, its RESULTs
say how long the step waited for its turn (in pieces: for all its turns), and how long its forward
took (that of all who shared it; of pieces, the sum), in whole microseconds::

    {"queue_us": 1830, "forward_us": 48211}

`request` is the client's own number and comes back in the answer; what the server says on
its own account has request 0.

A frame is judged before anything is allocated for it: the sizes that it declares have to add up to
its own length exactly, so no frame can ask for more memory than it brought along.
"""

from __future__ import annotations

import enum
import json
import math
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "MAX_CONTROL_BYTES",
    "MAX_NDIM",
    "SIDE_NAMES",
    "SUBPROTOCOL",
    "VERSION",
    "CloseReason",
    "DType",
    "Frame",
    "Kind",
    "TensorName",
    "WireError",
    "WireTensor",
    "decode",
    "encode",
]

VERSION = 1
SUBPROTOCOL = "splitlearn.v1"
MAX_NDIM = 8
MAX_CONTROL_BYTES = 64 * 1024
"""Longest JSON body of a control frame; real ones are below a few hundred bytes."""

_HEADER = struct.Struct("<BBBBIII")
_DESCRIPTOR = struct.Struct("<BBBB")
_DIMENSION_BYTES = 4


class Kind(enum.IntEnum):
    """What a frame is for."""

    OPEN = 1
    OPENED = 2
    STEP = 3
    RESULT = 4
    CLOSE = 5
    CLOSED = 6
    ERROR = 7
    ROLL_BACK = 8
    """Forget the positions from `position` on, as if they had not been sent."""
    REORDER = 9
    """Let the rows be those that `rows` names, each as often as it does."""
    FORK = 10
    """Open another session that holds the same."""
    RESUME = 11
    """Take a session over whose connection was lost."""
    DONE = 12
    """What was asked for is done: the answer to ROLL_BACK and REORDER."""


class CloseReason(enum.StrEnum):
    """Why a session ended, as CLOSED says it."""

    CLOSED = "closed"
    """The client asked for it."""
    EXPIRED = "expired"
    """No step came within the idle time."""
    DRAINING = "draining"
    """The server is shutting down."""
    EVICTED = "evicted"
    """The server needed its memory."""
    MODEL_UNLOADED = "model_unloaded"
    """The model is gone, or was replaced."""
    INTERNAL = "internal"
    """A step failed half-way, so that the cache can't be trusted."""


class TensorName(enum.IntEnum):
    """Which argument of a part a tensor is."""

    HIDDEN_STATES = 1
    ATTENTION_MASK = 2
    POSITION_IDS = 3
    SIDE_1 = 16
    """The first value that goes with the hidden state, in the order in which the model's metadata
    names them among its inputs (or outputs); the others follow."""
    SIDE_2 = 17
    SIDE_3 = 18
    SIDE_4 = 19
    SIDE_5 = 20
    SIDE_6 = 21
    SIDE_7 = 22
    SIDE_8 = 23


SIDE_NAMES = tuple(name for name in TensorName if name.name.startswith("SIDE_"))


class DType(enum.IntEnum):
    """Element type of a tensor on the wire; a boolean travels as a `UINT8` of 0 or 1."""

    FP32 = 1
    FP16 = 2
    BF16 = 3
    INT64 = 4
    INT32 = 5
    UINT8 = 6

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return _ITEMSIZE[self]

    @property
    def torch_name(self) -> str:
        """Name of the torch dtype, `"float32"` for FP32."""
        return _TORCH_NAME[self]

    @classmethod
    def from_torch_name(cls, name: str) -> DType:
        """Return the code of a torch dtype given as `"float32"` or `"torch.float32"`.

        Raises:
            ValueError: the wire has no such dtype; the message lists those it has.
        """
        bare = name.removeprefix("torch.")
        if bare == "bool":
            return cls.UINT8
        for code, known in _TORCH_NAME.items():
            if known == bare:
                return code
        known_names = ", ".join(_TORCH_NAME.values())
        raise ValueError(f"dtype {bare} does not travel; the wire has {known_names} and bool")


_ITEMSIZE = {
    DType.FP32: 4,
    DType.FP16: 2,
    DType.BF16: 2,
    DType.INT64: 8,
    DType.INT32: 4,
    DType.UINT8: 1,
}
_TORCH_NAME = {
    DType.FP32: "float32",
    DType.FP16: "float16",
    DType.BF16: "bfloat16",
    DType.INT64: "int64",
    DType.INT32: "int32",
    DType.UINT8: "uint8",
}
_WITH_TENSORS = frozenset({Kind.STEP, Kind.RESULT})
_INFO_BEHIND = 0x01
"""The flag of a RESULT with JSON behind its tensors."""


@dataclass(frozen=True, slots=True)
class WireTensor:
    """One tensor of a frame: its descriptor and a view of its bytes.

    `data` of a decoded tensor looks into the message it came in, and keeps that alive.
    """

    name: TensorName
    dtype: DType
    shape: tuple[int, ...]
    data: memoryview


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame: a STEP or RESULT has `tensors`, every other kind has `info`, a RESULT may."""

    kind: Kind
    request: int = 0
    session: int = 0
    position: int = 0
    tensors: tuple[WireTensor, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)

    def tensor(self, name: TensorName) -> WireTensor | None:
        """Return the tensor of that name, or `None` where the frame has none."""
        for tensor in self.tensors:
            if tensor.name is name:
                return tensor
        return None


class WireError(ValueError):
    """Bytes that are no frame; the sender is at fault, and the message says what was found.

    `request` and `session` are those of the header where it could be read, so that the error can
    be answered.  `header_ok` is false where it could not: then nothing that follows on the
    connection can be trusted either.
    """

    def __init__(
        self, message: str, *, request: int = 0, session: int = 0, header_ok: bool
    ) -> None:
        super().__init__(message)
        self.request = request
        self.session = session
        self.header_ok = header_ok


def encode(frame: Frame) -> bytes:
    """Return the frame's bytes, copying each tensor once.

    Raises:
        ValueError: the frame is one that `decode` would refuse.
    """
    if frame.kind in _WITH_TENSORS:
        return _encode_tensors(frame)
    if frame.tensors:
        raise ValueError(f"a {frame.kind.name} frame carries JSON, not tensors")
    return _encode_header(frame) + _encode_info(frame)


def _encode_info(frame: Frame) -> bytes:
    if not frame.info:
        return b""
    body = json.dumps(dict(frame.info), separators=(",", ":")).encode()
    if len(body) > MAX_CONTROL_BYTES:
        raise ValueError(f"the JSON body is {len(body)} bytes, at most {MAX_CONTROL_BYTES} travel")
    return body


def _encode_header(frame: Frame, flags: int = 0) -> bytes:
    return _HEADER.pack(
        VERSION,
        frame.kind,
        len(frame.tensors),
        flags,
        frame.request,
        frame.session,
        frame.position,
    )


def _encode_tensors(frame: Frame) -> bytes:
    if frame.info and frame.kind is not Kind.RESULT:
        raise ValueError(f"a {frame.kind.name} frame carries tensors, not JSON")
    names = [tensor.name for tensor in frame.tensors]
    if len(set(names)) != len(names):
        raise ValueError(f"a tensor comes twice: {', '.join(name.name for name in names)}")
    header = _encode_header(frame, _INFO_BEHIND if frame.info else 0)
    descriptors = [_encode_descriptor(tensor) for tensor in frame.tensors]
    data = [tensor.data for tensor in frame.tensors]
    return b"".join([header, *descriptors, *data, _encode_info(frame)])


def _encode_descriptor(tensor: WireTensor) -> bytes:
    ndim = len(tensor.shape)
    if ndim > MAX_NDIM:
        raise ValueError(f"{tensor.name.name} has {ndim} dimensions, at most {MAX_NDIM} travel")
    if 0 in tensor.shape:
        raise ValueError(f"{tensor.name.name} has the shape {tensor.shape}: it holds nothing")
    declared = math.prod(tensor.shape) * tensor.dtype.itemsize
    if declared != tensor.data.nbytes:
        raise ValueError(
            f"{tensor.name.name} {tensor.dtype.name} {tensor.shape} takes {declared} bytes, "
            f"but has {tensor.data.nbytes}"
        )
    return _DESCRIPTOR.pack(tensor.name, tensor.dtype, ndim, 0) + struct.pack(
        f"<{ndim}I", *tensor.shape
    )


def decode(message: bytes | bytearray | memoryview) -> Frame:
    """Return the frame that the bytes are; its tensors look into `message`, nothing is copied.

    Raises:
        WireError: they are no frame; the only exception that any input can cause.
    """
    return _Decoder(memoryview(message)).frame()


class _Decoder:
    """Reads one message from front to back; each method takes what is its own, and checks it."""

    def __init__(self, view: memoryview) -> None:
        self.view = view
        self.offset = 0
        self.request = 0
        self.session = 0
        self.header_ok = False

    def fail(self, message: str) -> NoReturn:
        raise WireError(
            message, request=self.request, session=self.session, header_ok=self.header_ok
        ) from None

    def frame(self) -> Frame:
        kind_code, tensor_count, flags, position = self.header()
        try:
            kind = Kind(kind_code)
        except ValueError:
            self.fail(f"unknown frame kind {kind_code}")
        if flags & ~(_INFO_BEHIND if kind is Kind.RESULT else 0):
            self.fail(f"flags are 0x{flags:02x}; {kind.name} of version {VERSION} has no such")
        if kind in _WITH_TENSORS:
            tensors = self.tensors(tensor_count, exactly=not flags)
            info = self.info_behind() if flags else {}
            return Frame(kind, self.request, self.session, position, tensors=tensors, info=info)
        if tensor_count:
            self.fail(f"{kind.name} announces {tensor_count} tensors; it carries JSON")
        return Frame(kind, self.request, self.session, position, info=self.json())

    def header(self) -> tuple[int, int, int, int]:
        if len(self.view) < _HEADER.size:
            self.fail(f"{len(self.view)} bytes are too few for a header of {_HEADER.size}")
        version, kind, count, flags, request, session, position = _HEADER.unpack_from(self.view)
        if version != VERSION:
            self.fail(f"frame version {version}; this side speaks version {VERSION}")
        self.offset = _HEADER.size
        self.request, self.session, self.header_ok = request, session, True
        return kind, count, flags, position

    def info_behind(self) -> dict[str, Any]:
        found = self.json()
        if not found:
            self.fail("a flag announces JSON behind the tensors, and none follows")
        return found

    def json(self) -> dict[str, Any]:
        body = bytes(self.rest(MAX_CONTROL_BYTES))
        if not body:
            return {}
        try:
            value = json.loads(body, parse_constant=self.constant)
        except RecursionError:
            self.fail("the JSON body is nested too deeply")
        except WireError:
            raise
        except ValueError as exc:
            self.fail(f"the body is not JSON: {exc}")
        if not isinstance(value, dict):
            self.fail(f"the body is a JSON {type(value).__name__}; an object is expected")
        return value

    def constant(self, name: str) -> NoReturn:
        self.fail(f"the body is not JSON: {name} is no number")

    def rest(self, limit: int) -> memoryview:
        rest = self.view[self.offset :]
        if len(rest) > limit:
            self.fail(f"the JSON body is {len(rest)} bytes, at most {limit} are read")
        return rest

    def tensors(self, count: int, *, exactly: bool) -> tuple[WireTensor, ...]:
        descriptors = self.descriptors(count)
        sizes = [math.prod(shape) * dtype.itemsize for _, dtype, shape in descriptors]
        self.check_length(sum(sizes), exactly=exactly)
        tensors = []
        for (name, dtype, shape), size in zip(descriptors, sizes, strict=True):
            data = self.view[self.offset : self.offset + size]
            tensors.append(WireTensor(name, dtype, shape, data))
            self.offset += size
        return tuple(tensors)

    def check_length(self, declared: int, *, exactly: bool) -> None:
        found = len(self.view) - self.offset
        if declared > found or (exactly and declared != found):
            self.fail(f"the tensors declare {declared} bytes of data, but {found} follow")

    def descriptors(self, count: int) -> Sequence[tuple[TensorName, DType, tuple[int, ...]]]:
        if count > len(TensorName):
            self.fail(f"{count} tensors in one frame; there are {len(TensorName)} names")
        found: dict[TensorName, tuple[TensorName, DType, tuple[int, ...]]] = {}
        for index in range(count):
            name, dtype, shape = self.descriptor(index)
            if name in found:
                self.fail(f"{name.name} comes twice")
            found[name] = (name, dtype, shape)
        return list(found.values())

    def descriptor(self, index: int) -> tuple[TensorName, DType, tuple[int, ...]]:
        self.need(_DESCRIPTOR.size, f"the descriptor of tensor {index}")
        name_code, dtype_code, ndim, reserved = _DESCRIPTOR.unpack_from(self.view, self.offset)
        self.offset += _DESCRIPTOR.size
        if reserved:
            self.fail(f"the reserved byte of tensor {index} is {reserved}")
        try:
            name, dtype = TensorName(name_code), DType(dtype_code)
        except ValueError:
            self.fail(f"tensor {index} has the name code {name_code} and dtype code {dtype_code}")
        return name, dtype, self.shape(name, ndim)

    def shape(self, name: TensorName, ndim: int) -> tuple[int, ...]:
        if ndim > MAX_NDIM:
            self.fail(f"{name.name} has {ndim} dimensions, at most {MAX_NDIM} are read")
        self.need(ndim * _DIMENSION_BYTES, f"the {ndim} dimensions of {name.name}")
        shape = struct.unpack_from(f"<{ndim}I", self.view, self.offset)
        self.offset += ndim * _DIMENSION_BYTES
        if 0 in shape:
            self.fail(f"{name.name} has the shape {shape}: it holds nothing")
        return shape

    def need(self, size: int, what: str) -> None:
        left = len(self.view) - self.offset
        if left < size:
            self.fail(f"the frame ends within {what}: {size} bytes expected, {left} left")

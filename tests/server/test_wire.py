"""The frame format: byte for byte, there and back, and against anything else."""

from __future__ import annotations

import contextlib
import struct
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitlearn_manager.serving import wire
from splitlearn_manager.serving.tensors import tensor_from_wire, tensor_to_wire
from splitlearn_manager.serving.wire import DType, Frame, Kind, TensorName, WireError, WireTensor

U32 = st.integers(0, 2**32 - 1)
WITH_TENSORS = st.sampled_from([Kind.STEP, Kind.RESULT])
WITH_JSON = st.sampled_from([k for k in Kind if k not in (Kind.STEP, Kind.RESULT)])

TEXT = st.text(st.sampled_from('aé\U0001f600"\\\n\0'), max_size=4)
INFO = st.dictionaries(TEXT, st.none() | st.booleans() | st.integers() | TEXT, max_size=4)


@st.composite
def wire_tensors(draw: st.DrawFn, name: TensorName) -> WireTensor:
    dtype = draw(st.sampled_from(DType))
    shape = tuple(draw(st.lists(st.integers(1, 4), max_size=4)))
    size = dtype.itemsize
    for dimension in shape:
        size *= dimension
    data = draw(st.binary(min_size=size, max_size=size))
    return WireTensor(name, dtype, shape, memoryview(data))


@st.composite
def tensor_frames(draw: st.DrawFn) -> Frame:
    names = draw(st.lists(st.sampled_from(TensorName), unique=True))
    tensors = tuple(draw(wire_tensors(name)) for name in names)
    kind = draw(WITH_TENSORS)
    info = draw(INFO) if kind is Kind.RESULT else {}
    return Frame(kind, draw(U32), draw(U32), draw(U32), tensors, info)


@st.composite
def json_frames(draw: st.DrawFn) -> Frame:
    return Frame(draw(WITH_JSON), draw(U32), draw(U32), draw(U32), info=draw(INFO))


FRAMES = tensor_frames() | json_frames()


@given(FRAMES)
def test_every_frame_comes_back_as_it_was(frame: Frame) -> None:
    assert wire.decode(wire.encode(frame)) == frame


@given(FRAMES, st.data())
def test_a_frame_cut_short_is_a_wire_error(frame: Frame, data: st.DataObject) -> None:
    message = wire.encode(frame)
    cut = data.draw(st.integers(0, len(message) - 1))

    try:
        decoded = wire.decode(message[:cut])
    except WireError:
        return

    # Only JSON may end early and be right by luck: all of the body is gone, or `1.5` became `1`.
    assert decoded.tensors == ()


@given(FRAMES, st.data())
def test_a_frame_with_changed_bytes_is_a_frame_or_a_wire_error(
    frame: Frame, data: st.DataObject
) -> None:
    message = bytearray(wire.encode(frame))
    for index in data.draw(st.lists(st.integers(0, len(message) - 1), min_size=1, max_size=4)):
        message[index] = data.draw(st.integers(0, 255))

    try:
        decoded = wire.decode(message)
    except WireError:
        return

    assert sum(tensor.data.nbytes for tensor in decoded.tensors) <= len(message)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_frame_or_a_wire_error(message: bytes) -> None:
    with contextlib.suppress(WireError):
        wire.decode(message)


def test_a_step_byte_for_byte() -> None:
    hidden = WireTensor(TensorName.HIDDEN_STATES, DType.FP32, (1, 1, 2), memoryview(bytes(8)))
    mask = WireTensor(TensorName.ATTENTION_MASK, DType.UINT8, (1, 1), memoryview(b"\x01"))

    encoded = wire.encode(Frame(Kind.STEP, 7, 0x01020304, 5, tensors=(hidden, mask)))

    assert encoded == bytes.fromhex(
        "01 03 02 00  07000000  04030201  05000000"  # header
        "01 01 03 00  01000000 01000000 02000000"  # hidden_states FP32 [1, 1, 2]
        "02 06 02 00  01000000 01000000"  # attention_mask UINT8 [1, 1]
        "0000000000000000  01"
    )


def test_a_control_frame_byte_for_byte() -> None:
    assert wire.encode(Frame(Kind.CLOSED, 1, 2, 0, info={"reason": "closed"})) == (
        bytes.fromhex("01 06 00 00  01000000  02000000  00000000") + b'{"reason":"closed"}'
    )


def test_a_result_with_something_to_say_byte_for_byte() -> None:
    mask = WireTensor(TensorName.ATTENTION_MASK, DType.UINT8, (1, 1), memoryview(b"\x01"))

    assert wire.encode(Frame(Kind.RESULT, 1, 2, 3, (mask,), {"queue_us": 7})) == (
        bytes.fromhex("01 04 01 01  01000000  02000000  03000000")
        + bytes.fromhex("02 06 02 00  01000000 01000000  01")
        + b'{"queue_us":7}'
    )


def test_an_empty_body_is_an_empty_object() -> None:
    assert wire.decode(bytes.fromhex("01 01 0000 01000000 00000000 00000000")).info == {}


def header(kind: int = 3, count: int = 0, *, version: int = 1, flags: int = 0) -> bytes:
    return struct.pack("<BBBBIII", version, kind, count, flags, 11, 22, 0)


def descriptor(
    *dims: int, name: int = 1, dtype: int = 1, ndim: int | None = None, reserved: int = 0
) -> bytes:
    head = struct.pack("<BBBB", name, dtype, len(dims) if ndim is None else ndim, reserved)
    return head + struct.pack(f"<{len(dims)}I", *dims)


BAD = [
    (header(kind=13), "unknown frame kind 13"),
    (header(flags=4), "flags are 0x04; STEP of version 1 has no such"),
    (header(flags=1), "flags are 0x01; STEP of version 1 has no such"),
    (header(kind=1, flags=1), "flags are 0x01; OPEN of version 1 has no such"),
    (header(kind=4, flags=3), "flags are 0x03; RESULT of version 1 has no such"),
    (header(kind=4, flags=1), "announces JSON behind the tensors, and none follows"),
    (header(kind=4, flags=1) + b"[1]", "the body is a JSON list"),
    (
        header(kind=4, count=1, flags=1) + descriptor(1) + b"{}",
        "declare 4 bytes of data, but 2 foll",
    ),
    (header(kind=1, count=1), "OPEN announces 1 tensors"),
    (header(count=12), "12 tensors in one frame"),
    (header(count=1), "ends within the descriptor of tensor 0"),
    (header(count=1) + descriptor(reserved=1), "reserved byte of tensor 0 is 1"),
    (header(count=1) + descriptor(name=4), "name code 4"),
    (header(count=1) + descriptor(dtype=7), "dtype code 7"),
    (header(count=1) + descriptor(ndim=9), "HIDDEN_STATES has 9 dimensions"),
    (header(count=1) + descriptor(1, ndim=2), "ends within the 2 dimensions"),
    (header(count=1) + descriptor(1, 0, 3), r"shape \(1, 0, 3\): it holds nothing"),
    (header(count=1) + descriptor(*[2**32 - 1] * 8), "but 0 follow"),
    (header(count=1) + descriptor(2) + bytes(7), "declare 8 bytes of data, but 7 follow"),
    (header(count=1) + descriptor(2) + bytes(9), "declare 8 bytes of data, but 9 follow"),
    (header(count=2) + descriptor(1) * 2 + bytes(8), "HIDDEN_STATES comes twice"),
    (header(kind=1) + b"[]", "JSON list; an object is expected"),
    (header(kind=1) + b"{", "not JSON"),
    (header(kind=1) + b"\xff", "not JSON"),
    (header(kind=1) + b'{"a": NaN}', "NaN is no number"),
    (header(kind=1) + b"[" * 60_000, "nested too deeply"),
    (header(kind=1) + b'{"n": ' + b"9" * 5000 + b"}", "not JSON"),
    (header(kind=1) + b" " * 70_000, "70000 bytes, at most 65536"),
]


@pytest.mark.parametrize(("message", "said"), BAD, ids=[said for _, said in BAD])
def test_a_bad_frame_says_what_was_found_and_whom_to_answer(message: bytes, said: str) -> None:
    with pytest.raises(WireError, match=said) as caught:
        wire.decode(message)

    assert (caught.value.request, caught.value.session) == (11, 22)
    assert caught.value.header_ok


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (b"", "0 bytes are too few"),
        (header()[:15], "15 bytes are too few"),
        (header(version=2), "frame version 2"),
    ],
)
def test_without_a_readable_header_nothing_can_be_answered(message: bytes, said: str) -> None:
    with pytest.raises(WireError, match=said) as caught:
        wire.decode(message)

    assert not caught.value.header_ok


def tensor(
    name: TensorName = TensorName.HIDDEN_STATES, shape: tuple[int, ...] = (2,), size: int = 8
) -> WireTensor:
    return WireTensor(name, DType.FP32, shape, memoryview(bytes(size)))


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        (Frame(Kind.OPEN, tensors=(tensor(),)), "carries JSON"),
        (Frame(Kind.STEP, info={"a": 1}), "carries tensors"),
        (Frame(Kind.STEP, tensors=(tensor(), tensor())), "comes twice"),
        (Frame(Kind.STEP, tensors=(tensor(size=7),)), "takes 8 bytes, but has 7"),
        (Frame(Kind.STEP, tensors=(tensor(shape=(0,), size=0),)), "holds nothing"),
        (Frame(Kind.STEP, tensors=(tensor(shape=(1,) * 9, size=4),)), "9 dimensions"),
        (Frame(Kind.ERROR, info={"message": "x" * 70_000}), "at most 65536"),
    ],
)
def test_what_decode_would_refuse_is_not_encoded(frame: Frame, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        wire.encode(frame)


def test_a_decoded_tensor_looks_into_its_message() -> None:
    message = bytearray(wire.encode(Frame(Kind.STEP, tensors=(tensor(),))))
    decoded = wire.decode(message)

    message[-1] = 0x3F

    assert decoded.tensors[0].data[-1] == 0x3F


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("buffer", [bytes, bytearray])
def test_tensors_keep_every_bit_on_the_wire(dtype: torch.dtype, buffer: type) -> None:
    sent = torch.arange(-6, 6).to(dtype).reshape(2, 3, 2)
    frame = Frame(Kind.STEP, tensors=(tensor_to_wire(TensorName.HIDDEN_STATES, sent),))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        received = tensor_from_wire(wire.decode(buffer(wire.encode(frame))).tensors[0])

    assert received.dtype is dtype
    assert torch.equal(received, sent)


def test_bits_that_are_no_number_keep_their_payload() -> None:
    sent = torch.tensor([0x7FC1, 0xFF80 - 0x10000, 0x0001], dtype=torch.int16).view(torch.bfloat16)

    received = tensor_from_wire(tensor_to_wire(TensorName.HIDDEN_STATES, sent))

    assert torch.equal(received.view(torch.int16), sent.view(torch.int16))


def test_a_boolean_mask_travels_as_bytes() -> None:
    sent = torch.tensor([[True, False]])

    made = tensor_to_wire(TensorName.ATTENTION_MASK, sent)

    assert (made.dtype, bytes(made.data)) == (DType.UINT8, b"\x01\x00")


def test_strided_and_learning_tensors_travel_as_their_values() -> None:
    sent = torch.arange(6.0, requires_grad=True).reshape(2, 3).T

    received = tensor_from_wire(tensor_to_wire(TensorName.HIDDEN_STATES, sent))

    assert torch.equal(received, sent)
    assert not received.requires_grad


def test_a_writable_buffer_is_shared_where_it_is_aligned() -> None:
    buffer = bytearray(16)
    received = tensor_from_wire(
        WireTensor(TensorName.POSITION_IDS, DType.INT64, (2,), memoryview(buffer))
    )

    buffer[0] = 5

    assert received.tolist() == [5, 0]


def test_an_unaligned_buffer_is_copied() -> None:
    buffer = memoryview(bytearray(17))[1:]

    received = tensor_from_wire(WireTensor(TensorName.POSITION_IDS, DType.INT64, (2,), buffer))

    assert received.data_ptr() % 8 == 0
    assert received.tolist() == [0, 0]


def test_a_dtype_that_does_not_travel_is_named() -> None:
    with pytest.raises(ValueError, match=r"complex64 does not travel; the wire has float32, float"):
        tensor_to_wire(TensorName.HIDDEN_STATES, torch.zeros(1, dtype=torch.complex64))

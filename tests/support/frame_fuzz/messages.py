"""Frames of the session protocol, good ones and those that are made wrong on purpose."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from splitlearn_manager.serving.tensors import tensor_to_wire
from splitlearn_manager.serving.wire import VERSION, DType, Frame, Kind, TensorName, encode

HIDDEN = 64
MOST_POSITIONS = 128

_EDGES = (0, 1, 2, 3, 7, 16, 127, 128, 129, 255, 256, 4096, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
_BYTES = (0, 1, 2, 7, 8, 9, 12, 13, 16, 23, 24, 127, 128, 255)
_HEADER = struct.Struct("<BBBBIII")

_VALUES = (
    *("null", "true", "false", "0", "1", "-1", "2", "3", "128", "129", "4096", "4097", "1.5"),
    *("-0.0", "1e308", "1e400", "9223372036854775808", "4294967296", '""', '"x"', '"\\ud800"'),
    *('"\\u0000"', "[]", "[0]", "[[0]]", "{}", '{"a":1}', "NaN", "Infinity", "-Infinity"),
)
_BODIES = (
    b"{",
    b"[]",
    b"1",
    b'"x"',
    b"null",
    b"\xff\xfe",
    b"\xef\xbb\xbf{}",
    b"{}{}",
    b'{"a"}',
    b'{"max_length":1,"max_length":-1}',
    b"[" * 30_000,
    b'{"a":' * 10_000,
    b'{"max_length":' + b"9" * 5000 + b"}",
    b'{"rows":' + b"9" * 4000 + b',"max_length":2}',
    b'{"x":"' + b"y" * 70_000 + b'"}',
    b'{"rows":[' + b"0," * 5000 + b"0]}",
    b'{"rows":[' + b"0," * 4000 + b"0]}",
    b'{"\\ud800":1}',
)


@dataclass
class Known:
    """What a client knows of one of its sessions."""

    id: int
    token: str = ""
    length: int = 0
    rows: int = 0


def step(rng: random.Random, known: Known, request: int, **changes: object) -> Frame:
    """Return a good step, of one position as a rule."""
    new = rng.choice((1, 1, 1, 2, 5, 20))
    rows = known.rows or rng.choice((1, 1, 2))
    tensors = [hidden(rng, rows, new)]
    if rng.random() < 0.2:
        mask = torch.ones(rows, new, dtype=torch.uint8)
        mask[0, : rng.randrange(new)] = 0
        tensors.append(tensor_to_wire(TensorName.ATTENTION_MASK, mask))
    if rng.random() < 0.2:
        ids = torch.arange(known.length, known.length + new).repeat(rows, 1)
        tensors.append(tensor_to_wire(TensorName.POSITION_IDS, ids % MOST_POSITIONS))
    frame = Frame(Kind.STEP, request, known.id, known.length, tensors=tuple(tensors))
    return replace(frame, **changes)  # type: ignore[arg-type]


def hidden(rng: random.Random, rows: int, new: int, size: int = HIDDEN) -> object:
    """Return random hidden states."""
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    return tensor_to_wire(
        TensorName.HIDDEN_STATES, torch.randn(rows, new, size, generator=generator)
    )


def good(rng: random.Random, known: Known, request: int) -> Frame:
    """Return something that may be asked of a session."""
    match rng.randrange(8):
        case 0:
            return Frame(Kind.ROLL_BACK, request, known.id, rng.randint(0, known.length))
        case 1:
            rows = [rng.randrange(known.rows or 1) for _ in range(rng.randint(1, 3))]
            return Frame(Kind.REORDER, request, known.id, known.length, info={"rows": rows})
        case 2:
            return Frame(Kind.FORK, request, known.id)
        case 3 if rng.random() < 0.5:
            return Frame(Kind.CLOSE, request, known.id)
        case 4 if known.token:
            return Frame(Kind.RESUME, request, known.id, info={"resume": known.token})
        case _:
            return step(rng, known, request)


def opening(rng: random.Random, request: int) -> Frame:
    """Return what opens a session, in one of the ways in which that can be asked for."""
    wishes: dict[str, object] = {}
    for name, values in {
        "max_length": (1, 20, MOST_POSITIONS),
        "rows": (1, 2, 3),
        "rollback": (True, False),
        "timings": (True, False),
        "resume": (True, True, False),
    }.items():
        if rng.random() < 0.4:
            wishes[name] = rng.choice(values)
    return Frame(Kind.OPEN, request, info=wishes)


# --- Made wrong ------------------------------------------------------------------------------

Damage = Callable[[random.Random, bytes], bytes]


def flip_bits(rng: random.Random, message: bytes) -> bytes:
    """Change some bits, anywhere."""
    data = bytearray(message)
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def flip_front(rng: random.Random, message: bytes) -> bytes:
    """Change some bits of header and descriptors."""
    data = bytearray(message)
    for _ in range(rng.choice((1, 1, 2))):
        data[rng.randrange(min(len(data), 40))] ^= 1 << rng.randrange(8)
    return bytes(data)


def cut(rng: random.Random, message: bytes) -> bytes:
    """Leave out the end."""
    return message[: rng.randrange(len(message))]


def lengthen(rng: random.Random, message: bytes) -> bytes:
    """Put something to the end."""
    return message + rng.randbytes(rng.choice((1, 4, 100, 10_000)))


def drop_middle(rng: random.Random, message: bytes) -> bytes:
    """Leave out some bytes."""
    start = rng.randrange(len(message))
    return message[:start] + message[start + rng.choice((1, 4, 16, 300)) :]


def edge_header(rng: random.Random, message: bytes) -> bytes:
    """Give a field of the header a value from the edge of what it can hold."""
    fields = list(_HEADER.unpack_from(message))
    index = rng.randrange(1, len(fields)) if rng.random() < 0.9 else 0
    small = index < 4
    fields[index] = rng.choice(_BYTES if small else _EDGES)
    return _HEADER.pack(*fields) + message[_HEADER.size :]


def edge_descriptor(rng: random.Random, message: bytes) -> bytes:
    """Give a field of the first descriptor such a value; of a control frame, of the body."""
    data = bytearray(message)
    at = _HEADER.size
    if len(data) < at + 16:
        return message + bytes([rng.choice(_BYTES)])
    if rng.random() < 0.5:
        data[at + rng.randrange(4)] = rng.choice(_BYTES)
    else:
        struct.pack_into("<I", data, at + 4 * rng.randint(1, 3), rng.choice(_EDGES))
    return bytes(data)


def edge_numbers(rng: random.Random, message: bytes) -> bytes:
    """Put strange numbers into the data: NaN, infinities, the greatest there are."""
    data = bytearray(message)
    value = rng.choice((float("nan"), float("inf"), -float("inf"), 3.4e38, -3.4e38, 1e-45))
    if len(data) >= _HEADER.size + 4:
        struct.pack_into("<f", data, len(data) - 4 * rng.randint(1, 4), value)
    return bytes(data)


def nonsense_body(rng: random.Random, message: bytes) -> bytes:
    """Put something into the place of the JSON."""
    kinds = (Kind.OPEN, Kind.CLOSE, Kind.ROLL_BACK, Kind.REORDER, Kind.FORK, Kind.RESUME)
    head = bytearray(message[: _HEADER.size])
    head[1], head[2] = rng.choice(kinds), 0
    return bytes(head) + rng.choice(_BODIES)


def nonsense_value(rng: random.Random, message: bytes) -> bytes:
    """Give a key of the JSON a value that it does not take."""
    key = rng.choice(("max_length", "rows", "rollback", "resume", "timings", "session", ""))
    kinds = {"rows": (Kind.OPEN, Kind.REORDER), "resume": (Kind.OPEN, Kind.RESUME)}
    head = bytearray(message[: _HEADER.size])
    head[1], head[2] = rng.choice(kinds.get(key, (Kind.OPEN,))), 0
    pairs = [f"{json.dumps(key)}:{rng.choice(_VALUES)}"]
    if rng.random() < 0.3:
        pairs.append('"max_length":2')
    return bytes(head) + f"{{{','.join(pairs)}}}".encode()


def nonsense(rng: random.Random, message: bytes) -> bytes:
    """Send noise."""
    del message
    return rng.randbytes(rng.choice((0, 1, 15, 16, 17, 200, 5000)))


def noise_behind_a_header(rng: random.Random, message: bytes) -> bytes:
    """Send a good version and kind, and noise."""
    del message
    return bytes([VERSION, rng.choice(list(Kind))]) + rng.randbytes(rng.choice((14, 30, 500)))


DAMAGE: tuple[Damage, ...] = (
    flip_bits,
    flip_front,
    flip_front,
    cut,
    lengthen,
    drop_middle,
    edge_header,
    edge_header,
    edge_descriptor,
    edge_descriptor,
    edge_numbers,
    nonsense_body,
    nonsense_value,
    nonsense_value,
    nonsense,
    noise_behind_a_header,
)


def odd_step(rng: random.Random, known: Known, request: int) -> bytes:
    """Return a step that is a good frame, and none for its session."""
    frame = step(rng, known, request)
    tensors = list(frame.tensors)
    shape = tensors[0].shape
    match rng.randrange(9):
        case 0:
            tensors = [hidden(rng, *shape[:2], size=rng.choice((1, 63, 65, 128)))]
        case 1:
            tensors = [hidden(rng, shape[0] + 1, shape[1])]
        case 2:
            tensors = tensors[1:]
        case 3:
            tensors[0] = replace(tensors[0], dtype=DType.INT32)
        case 4:
            ids = torch.full(shape[:2], rng.choice((-1, 128, 2**62, -(2**63))))
            tensors = [tensors[0], tensor_to_wire(TensorName.POSITION_IDS, ids)]
        case 5:
            mask = torch.ones(shape[0], shape[1] + 1, dtype=torch.uint8)
            tensors = [tensors[0], tensor_to_wire(TensorName.ATTENTION_MASK, mask)]
        case 6:
            tensors.append(tensor_to_wire(TensorName.SIDE_1, torch.ones(*shape[:2], 3)))
        case 7:
            tensors = [hidden(rng, shape[0], 130)]
        case _:
            return encode(replace(frame, position=rng.choice(_EDGES)))
    return encode(replace(frame, tensors=tuple(tensors)))


def odd_change(rng: random.Random, known: Known, request: int) -> bytes:
    """Return a change that a session can't make."""
    match rng.randrange(4):
        case 0:
            return encode(Frame(Kind.ROLL_BACK, request, known.id, rng.choice(_EDGES)))
        case 1:
            bad = ([], [known.rows], [-1], [0] * 4096, [2**70], [True], "x", None, [0, 9])
            return encode(Frame(Kind.REORDER, request, known.id, 0, info={"rows": rng.choice(bad)}))
        case 2:
            token = rng.choice(("", "x", "\ud800", known.token[:-1], known.token + "0", "0" * 32))
            return encode(Frame(Kind.RESUME, request, known.id, info={"resume": token}))
        case _:
            kind = rng.choice((Kind.OPENED, Kind.RESULT, Kind.CLOSED, Kind.ERROR, Kind.DONE))
            return encode(Frame(kind, request, known.id))

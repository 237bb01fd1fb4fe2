"""JSON in pieces: the same values as the standard library reads and writes, or an error."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import numpy as np
import pytest

from splitlearn_manager.serving import long_json
from splitlearn_manager.serving.long_json import read_json, write_numbers


@pytest.fixture
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every document be long."""
    monkeypatch.setattr(long_json, "SHORT", 0)
    monkeypatch.setattr(long_json, "PIECE", 10)
    monkeypatch.setattr(long_json, "NUMBERS", 7)


DOCUMENTS: list[Any] = [
    {},
    [],
    7,
    "text",
    [[]],
    [1, -2, 3.5, 1e300, True, None] * 9,
    {"data": [[1.25, 2], [3, 4]], "name": 'a ] [ { " b'},
    [{"a": [1, [2, 3], "]"]}, "[", [], [[[4] * 30]]],
    list(range(1000)),
]


@pytest.mark.usefixtures("in_pieces")
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_document_is_read_as_the_library_reads_it(document: Any, indent: int | None) -> None:
    assert read_json(json.dumps(document, indent=indent).encode()) == document


@pytest.mark.usefixtures("in_pieces")
@pytest.mark.parametrize("text", ["[1, NaN, -Infinity, Infinity]", "[" + "1.5, " * 20 + "NaN]"])
def test_what_is_no_number_is_read(text: str) -> None:
    assert repr(read_json(text.encode())) == repr(json.loads(text))


@pytest.mark.usefixtures("in_pieces")
def test_what_the_library_refuses_is_refused() -> None:
    chance = random.Random(3)  # noqa: S311 - it is to be the same each time
    refused = 0
    for _ in range(2000):
        text = json.dumps(chance.choice(DOCUMENTS))
        place = chance.randrange(len(text))
        text = text[:place] + chance.choice(["", ",", "]", "[", "1", "-", " ", "}"]) + text[place:]
        text = text if chance.random() < 0.5 else text[: place + 1] + text[place + 2 :]
        try:
            expected = json.loads(text)
        except ValueError:
            refused += 1
            with pytest.raises(ValueError, match=r"."):
                read_json(text.encode())
        else:
            assert read_json(text.encode()) == expected
    assert refused > 300


@pytest.mark.usefixtures("in_pieces")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 40 + "]" * 40, "nested too deeply"),
        ('{"a":' * 40 + "1" + "}" * 40, "nested too deeply"),
        ("[" + "[],{}," * 60_000 + "1]", "more than 100000 arrays and objects"),
        ("[" + "1," * 30 + "]", "Expecting value"),
        ("[" + "1," * 30, "Expecting ']'"),
    ],
)
def test_what_would_cost_too_much_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_json(text.encode())


@pytest.mark.usefixtures("in_pieces")
def test_every_float32_comes_back_as_it_was() -> None:
    bits = np.random.default_rng(1).integers(0, 1 << 32, 20_000, dtype=np.uint32)
    extremes = [0, 1, 0x7F7FFFFF, 0x00800000, 0x80000000, 0x7F800000, 0xFF800000]
    values = np.concatenate([bits, np.array(extremes, dtype=np.uint32)]).view(np.float32)
    values = values[~np.isnan(values)]

    text = b"".join(write_numbers(memoryview(values)))

    assert np.array(json.loads(b"[" + text + b"]"), dtype=np.float32).tobytes() == values.tobytes()


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (np.array([1, -(2**63)], dtype=np.int64), b"1,-9223372036854775808"),
        (np.array([math.nan, math.inf], dtype=np.float64), b"NaN,Infinity"),
        (np.array([True, False]), b"true,false"),
        (np.array([], dtype=np.float32), b""),
    ],
)
def test_numbers_are_written_as_json_has_them(values: Any, text: bytes) -> None:
    assert b"".join(write_numbers(memoryview(values))) == text

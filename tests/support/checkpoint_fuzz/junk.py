"""Values that stand where others should: in headers, indices, configs."""

from __future__ import annotations

from typing import Any

# For a field of a JSON object.
JUNK: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 1.5, -0.0, 2**31, 2**63, 10**30, 1e308, float("nan"),
    float("inf"), "", "3", "float32", "\ud800", "x" * 100_000, [], [1], [None] * 3, {}, {"a": {}},
    [[[[]]]], {"rope_type": "yarn"}, ["full_attention"] * 3, ["nonsense"] * 3,
)  # fmt: skip

# For the name of a tensor.
NAMES = (
    "",
    "\ud800",
    "a\0b",
    "a\nb",
    "\x1b[2J",
    "model." * 20_000,
    "__metadata__ ",
    "é",
    ".",
    "a..b",
)

# For a whole JSON file, or the header of a safetensors file.
RAW_JSON: tuple[bytes, ...] = (
    b"",
    b"{",
    b"[]",
    b"3",
    b"null",
    b'"x"',
    b"\xef\xbb\xbf{}",
    b"\xff\xfe{}",
    b"{3: {}}",
    b'{"a": NaN}',
    b"{}",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}",
    b'{"a": ' + b"9" * 5_000 + b"}",
    b"{" + b",".join(b'"%d":0' % i for i in range(200_000)) + b',"7":0}',
    b" " * 1_000_000 + b"{}",
)

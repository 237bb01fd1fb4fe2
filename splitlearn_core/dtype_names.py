"""What dtypes of weights are called: pure names, without torch."""

from __future__ import annotations

WEIGHT_DTYPES = ("float32", "float16", "bfloat16", "float64")
"""What weights can be."""

DTYPE_ALIASES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "half": "float16"}
"""What else people write for them."""


def plain_dtype_name(value: object) -> str | None:
    """Return the plain name of a dtype (`torch.bfloat16`, `bf16`, …), or `None` if it is none."""
    name = str(value).removeprefix("torch.")
    name = DTYPE_ALIASES.get(name, name)
    return name if name in WEIGHT_DTYPES else None

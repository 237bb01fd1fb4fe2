"""Names of dtypes: torch's, safetensors', and what a user may write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch

# safetensors' names, https://github.com/huggingface/safetensors#format
BY_STORED_NAME: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}

_ALIASES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "half": "float16"}
WEIGHT_DTYPES = ("float32", "float16", "bfloat16", "float64")


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return the dtype that weights are wanted in; `None` keeps what is stored.

    Args:
        dtype: A floating-point `torch.dtype` or its name (`float32`, `torch.bfloat16`, `bf16`, …).

    Raises:
        ValueError: It is no floating-point dtype; lists those that are accepted.
    """
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    name = _ALIASES.get(name, name)
    if name not in WEIGHT_DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; weights can be {', '.join(WEIGHT_DTYPES)}")
    resolved = getattr(torch, name)
    if not isinstance(resolved, torch.dtype):
        raise TypeError(f"torch.{name} is no dtype")
    return resolved


def main_dtype(sizes: Iterable[tuple[torch.dtype, int]]) -> torch.dtype | None:
    """Return the floating-point dtype that most values have; `None` where there is none.

    A few small tensors (norms, biases of routers) may be float32 among weights of another dtype.

    Args:
        sizes: Dtype and number of values of each tensor.
    """
    counts: Counter[torch.dtype] = Counter()
    for dtype, size in sizes:
        if dtype.is_floating_point:
            counts[dtype] += size
    return counts.most_common(1)[0][0] if counts else None


def dtype_name(dtype: torch.dtype) -> str:
    """Return `float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")

"""The ways in which the weights of linear layers can be kept: names and limits, without torch.

    prepacked   the same dtype, in the order that oneDNN computes in: the same figures but for
                rounding
    fp16        weights as float16, activations float32 (FBGEMM)
    int8        weights as int8 with a scale for each output; activations are rounded to 8 bits
                by a scale for each position (oneDNN), so that they do not depend on what else is
                in a batch

All are for inference on a CPU, and nothing is changed unless one is asked for.
"""

from __future__ import annotations

PREPACKED = "prepacked"
FP16 = "fp16"
INT8 = "int8"

QUANTIZATIONS = (PREPACKED, FP16, INT8)

COMPUTE_DTYPES = {
    PREPACKED: ("float32", "bfloat16"),
    FP16: ("float32",),
    INT8: ("float32", "bfloat16"),
}
"""The dtypes of activations (and of the weights before they are packed) that each works with."""


def check_quantization(name: str | None, device: str = "cpu") -> str | None:
    """Return the name of a quantization; `None` keeps the weights as they are.

    Raises:
        ValueError: There is none of that name, or it is not for that device.
    """
    if name is None:
        return None
    if name not in QUANTIZATIONS:
        raise ValueError(f"unknown quantization {name!r}; there are {', '.join(QUANTIZATIONS)}")
    if not device.startswith("cpu"):
        raise ValueError(
            f"quantization {name} is for the cpu, not for {device}: leave it out there"
        )
    return name


def dtype_refusal(name: str, dtype: str) -> str | None:
    """Return why a quantization can't go with a dtype of activations; `None` where it can."""
    allowed = COMPUTE_DTYPES[name]
    if dtype in allowed:
        return None
    return (
        f"quantization {name} computes in {' or '.join(allowed)}, not in {dtype}: set dtype to"
        f" {allowed[0]}, for every part of the model, or leave quantization out"
    )

"""Inference requests: through Triton's own clients, and made by hand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import tritonclient.http
import tritonclient.http.aio
from serving_fakes import Answer, ask, daemon_in_thread
from tritonclient.http import InferInput

from splitlearn_manager import ModelConfig
from splitlearn_manager.config import DaemonConfig, ManagerLimits, ServerConfig

HEADER_LENGTH = "Inference-Header-Content-Length"

NUMPY = {
    "FP32": np.float32,
    "FP16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "INT64": np.int64,
    "INT32": np.int32,
}


def models(path: Any, dtype: str) -> list[ModelConfig]:
    """Return the three parts and the whole of a checkpoint, each named `bottom-float32`, ...."""
    parts = {"split_points": [2, 4]}
    return [
        ModelConfig(
            f"{name}-{dtype}",
            str(path),
            dtype=dtype,
            config={"component": name, **(parts if name != "full" else {})},
        )
        for name in ("bottom", "trunk", "top", "full")
    ]


@contextmanager
def serving(configs: list[ModelConfig], **server: Any) -> Iterator[str]:
    config = DaemonConfig(
        server=ServerConfig(**{"port": 0, **server}),
        manager=ManagerLimits(max_models=len(configs)),
        models=tuple(configs),
    )
    with daemon_in_thread(config) as daemon:
        yield daemon.url


def tensor(name: str, array: Any, *, binary: bool = True) -> InferInput:
    datatype = next(name for name, dtype in NUMPY.items() if array.dtype == dtype)
    made = InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array, binary_data=binary)
    return made


def call(client: str, url: str, model: str, inputs: list[InferInput], **options: Any) -> Any:
    """Return what Triton's `http` or `http.aio` client gets."""
    address = url.removeprefix("http://")
    if client == "http":
        with tritonclient.http.InferenceServerClient(address) as one:
            return one.infer(model, inputs, **options)

    async def wait() -> Any:
        async with tritonclient.http.aio.InferenceServerClient(address) as one:
            return await one.infer(model, inputs, **options)

    return asyncio.run(wait())


def entry(name: str, array: Any, /, **changes: Any) -> dict[str, Any]:
    """Return an input as JSON has it, with its elements."""
    datatype = next(name for name, dtype in NUMPY.items() if array.dtype == dtype)
    made = {"name": name, "shape": list(array.shape), "datatype": datatype}
    made["data"] = array.reshape(-1).tolist()
    return {key: value for key, value in {**made, **changes}.items() if value is not None}


def binary_entry(name: str, array: Any, /, **changes: Any) -> dict[str, Any]:
    """Return an input whose elements follow the JSON."""
    size = {"parameters": {"binary_data_size": array.nbytes}}
    return entry(name, array, **{"data": None, **size, **changes})


def post(url: str, model: str, document: Any, raw: bytes = b"", **headers: str) -> Answer:
    """Send a request made by hand; `document` is JSON, or bytes that pretend to be."""
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    if raw:
        named.setdefault(HEADER_LENGTH, str(len(text)))
    return ask(url, f"/v2/models/{model}/infer", "POST", text + raw, named)

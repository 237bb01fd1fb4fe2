"""torch's default dtype, changed for one thread alone.

transformers builds a model with the wanted dtype as torch's default: parameters and tables get it
unless their module says otherwise.  torch has one default for the whole process, so that forwards
of other threads would compute in that dtype meanwhile.  Within `own_default_dtype` a thread has one
of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# Functions whose name says which dtype they return.
_EXPLICIT = (torch.Tensor.float, torch.Tensor.double, torch.Tensor.half, torch.Tensor.bfloat16)


@contextmanager
def own_default_dtype() -> Iterator[None]:
    """Let `torch.set_default_dtype` in this thread be for this thread alone.

    It holds for what is computed, too.  `torch.set_default_dtype` and `torch.get_default_dtype`
    are other functions meanwhile, which do for other threads what they always do: one thread at a
    time may be within, so hold `skeleton.building`.
    """
    owner = threading.get_ident()
    get, put = torch.get_default_dtype, torch.set_default_dtype
    mode = _OwnDefault(get)

    def own_get() -> torch.dtype:
        return mode.dtype if threading.get_ident() == owner else get()

    def own_put(dtype: torch.dtype, /) -> None:
        if threading.get_ident() == owner:
            mode.dtype = dtype
        else:
            put(dtype)

    torch.get_default_dtype, torch.set_default_dtype = own_get, own_put
    try:
        with mode:
            yield
    finally:
        torch.get_default_dtype, torch.set_default_dtype = get, put


class _OwnDefault(TorchFunctionMode):
    """Gives this thread's tensors the dtype that its own default asks for.

    Attributes:
        dtype: This thread's default.
    """

    def __init__(self, process_default: Callable[[], torch.dtype]) -> None:
        super().__init__()
        self._process_default = process_default
        self.dtype = process_default()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, torch.Tensor) or result.dtype is not self._process_default():
            return result
        if self.dtype is result.dtype or _has_dtype(func, [*args, *(kwargs or {}).values()]):
            return result
        return result.to(self.dtype)


def _has_dtype(func: Callable[..., Any], values: Sequence[Any]) -> bool:
    """Whether a call says which dtype its result is to have, so that no default is asked."""
    return func in _EXPLICIT or any(map(_says_dtype, values))


def _says_dtype(value: Any) -> bool:
    """Whether an argument decides the dtype of a result: one itself, or values that have one."""
    if isinstance(value, (list, tuple)):
        return any(map(_says_dtype, value))
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() or value.is_complex()
    return isinstance(value, torch.dtype) or hasattr(value, "__array_interface__")

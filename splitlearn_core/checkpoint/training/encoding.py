"""Nested training state as JSON and named tensors, and back: nothing is pickled, nothing dropped.

`state_dict()`s hold more than JSON has.  What JSON lacks becomes an object with one key that begins
with `$`; a dict whose own keys are other than strings, or begin so, is written as pairs:

    (1, 2)                      {"$tuple": [1, 2]}
    {0: x}                      {"$dict": [[0, x]]}
    OrderedDict, Counter        {"$ordered_dict": [[k, v], …]}, {"$counter": [[k, v], …]}
    a module's state dict       {"$module_state": [[[k, v], …], versions]}
    set, frozenset              {"$set": […]}, {"$frozenset": […]}
    bytes                       {"$bytes": "base64"}
    nan, inf, -inf, complex     {"$float": "nan"}, {"$complex": ["1.0", "-0.0"]}
    numpy scalar                {"$numpy": {"dtype": "float32", "hex": "0000803f"}}
    numpy array                 {"$array": {"$tensor": …}}
    torch.dtype                 {"$dtype": "float32"}
    torch.device, torch.Size    {"$device": "cuda:0"}, {"$size": [2, 3]}
    tensor                      {"$tensor": "name in the safetensors file", …}

A reference to a tensor says more where the file can't: `dtype` and `shape` where it lies there as
bytes, `offset` (bytes) and `stride` where it is a view of memory that it shares with others, and
`parameter` or `requires_grad`.  Tensors that are one stay one, and views of one memory stay such.
"""

from __future__ import annotations

import base64
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from splitlearn_core.dtypes import BY_STORED_NAME, dtype_name
from splitlearn_core.errors import CheckpointError, UnsavableStateError
from splitlearn_core.messages import in_one_line, short

_STORED = frozenset(BY_STORED_NAME.values())
_MOST_DEEP = 100
_MOST_BITS = 4096
_LONGEST_NAME = 500
# Where a region that views share begins: at a multiple of every element's size.
_ALIGNMENT = 16
_RESERVED = "__metadata__"


@dataclass(frozen=True)
class Encoded:
    """A value, taken apart.

    Attributes:
        tree: What JSON can hold.
        tensors: What it refers to by name: whole, dense, of a dtype that safetensors has.
    """

    tree: Any
    tensors: Mapping[str, torch.Tensor]


def encode(value: Any, where: str) -> Encoded:
    """Take a value apart; no tensor is copied, those on accelerators neither.

    Args:
        value: Nested dicts, lists, tuples, sets, tensors, arrays and plain values.
        where: What it is, for errors: `optimizer`.

    Raises:
        UnsavableStateError: (a `TypeError`) Something in it can't be written so that it comes back
            as it was; says where it lies and what it is.
    """
    walk = _Encoder(where)
    tree = walk.encode(value, ())
    return Encoded(tree, walk.resolved())


def decode(tree: Any, tensors: Mapping[str, torch.Tensor], where: str) -> Any:
    """Put together what `encode` took apart.

    Args:
        tree: From JSON.
        tensors: By name; handed out as they are, and not copied.
        where: The file that the tree is from, for errors.

    Raises:
        CheckpointError: (a `ValueError`) No `encode` wrote that.
    """
    try:
        return _Decoder(tensors).decode(tree)
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
        raise CheckpointError(
            f"{where} holds what this release can't read: {in_one_line(error)}"
        ) from error


# --- Taking apart ------------------------------------------------------------------------------


@dataclass
class _Reference:
    """A tensor that was met, and the entry of the tree that is to name it."""

    path: tuple[str, ...]
    entry: dict[str, Any]
    tensor: torch.Tensor

    @property
    def span(self) -> tuple[int, int]:
        """First byte of its memory, and one past the last, within its storage."""
        tensor = self.tensor
        start = tensor.storage_offset() * tensor.itemsize
        reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        return int(start), int(start + (reach + 1) * tensor.itemsize)

    @property
    def geometry(self) -> tuple[Any, ...]:
        """What makes two tensors of one storage the same."""
        tensor = self.tensor
        return tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride()


class _Encoder:
    """One walk through a value."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._references: list[_Reference] = []
        self._tensors: dict[str, torch.Tensor] = {}

    def encode(self, value: Any, path: tuple[str, ...]) -> Any:
        """Return the tree of a value."""
        if len(path) > _MOST_DEEP:
            raise self._refused(path[:8], value, "it is nested too deeply, or contains itself")
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if isinstance(value, np.generic | np.ndarray):
            return self._numpy(value, path)
        encode = _ENCODERS.get(type(value))
        if encode is None:
            raise self._refused(path, value, _ADVICE)
        return encode(self, value, path)

    def plain(self, value: Any, path: tuple[str, ...]) -> Any:
        """Return what JSON has itself."""
        if type(value) is int and value.bit_length() > _MOST_BITS:
            raise self._refused(path, value, f"a number of more than {_MOST_BITS} bits")
        return value

    def sequence(self, value: Any, path: tuple[str, ...]) -> list[Any]:
        """Return a list of trees."""
        return [self.encode(item, (*path, str(index))) for index, item in enumerate(value)]

    def pairs(self, value: Mapping[Any, Any], path: tuple[str, ...]) -> list[list[Any]]:
        """Return a list of key and value."""
        return [
            [self.encode(key, (*path, "(key)")), self.encode(item, (*path, _shown(key)))]
            for key, item in value.items()
        ]

    def mapping(self, value: dict[Any, Any], path: tuple[str, ...]) -> dict[str, Any]:
        """Return an object where the keys allow it."""
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: self.encode(item, (*path, key)) for key, item in value.items()}
        return {"$dict": self.pairs(value, path)}

    def _tensor(self, tensor: torch.Tensor, path: tuple[str, ...]) -> dict[str, Any]:
        """Note a tensor; its entry is filled in when all are known."""
        self._check(tensor, path)
        entry: dict[str, Any] = {}
        if isinstance(tensor, nn.Parameter):
            entry["parameter"] = True
        if tensor.requires_grad:
            entry["requires_grad"] = True
        plain = tensor.detach().resolve_conj().resolve_neg()
        self._references.append(_Reference(path, entry, plain))
        return entry

    def _check(self, tensor: torch.Tensor, path: tuple[str, ...]) -> None:
        if type(tensor) not in {torch.Tensor, nn.Parameter, nn.Buffer}:
            why = "a tensor of a kind of its own; sharded ones are saved with their model"
            raise self._refused(path, tensor, why)
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise self._refused(path, tensor, "no dense tensor; save tensor.to_dense()")
        if tensor.is_meta:
            raise self._refused(path, tensor, "a tensor on meta, which has no values")

    def _numpy(self, value: Any, path: tuple[str, ...]) -> dict[str, Any]:
        kind = value.dtype
        if not (kind.isbuiltin == 1 and kind.kind in "biufc" and kind.char not in "gG"):
            raise self._refused(path, value, f"NumPy's {kind}, which is no plain number")
        if isinstance(value, np.generic):
            return {"$numpy": {"dtype": kind.name, "hex": value.tobytes().hex()}}
        if type(value) is not np.ndarray:
            raise self._refused(path, value, "an array of a kind of its own")
        writable = np.require(value, requirements=["C", "W", "A"])
        return {"$array": self._tensor(torch.from_numpy(writable), path)}

    def _refused(self, path: tuple[str, ...], value: Any, why: str) -> UnsavableStateError:
        name = "".join(f"[{_key(part)}]" for part in path)
        kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        return UnsavableStateError(f"{self._where}{name} ({kind}) can't be saved: {why}")

    # --- Which tensors are one, and what they are called

    def resolved(self) -> dict[str, torch.Tensor]:
        """Fill in the entries of all tensors that were met, and return what they name."""
        for cluster in _clusters(self._references):
            if len({reference.geometry for reference in cluster}) == 1:
                self._store_one(cluster)
            else:
                self._store_region(cluster)
        return self._tensors

    def _store_one(self, cluster: list[_Reference]) -> None:
        """Store a tensor that one or several entries name."""
        first = cluster[0].tensor
        name = self._name(cluster[0].path)
        entry: dict[str, Any] = {"$tensor": name}
        if first.dtype in _STORED:
            self._tensors[name] = first
        else:
            entry |= {"dtype": dtype_name(first.dtype), "shape": list(first.shape)}
            self._tensors[name] = first.contiguous().reshape(-1).view(torch.uint8)
        for reference in cluster:
            reference.entry |= entry

    def _store_region(self, cluster: list[_Reference]) -> None:
        """Store memory that different views share, as bytes."""
        start = min(r.span[0] for r in cluster) // _ALIGNMENT * _ALIGNMENT
        end = max(r.span[1] for r in cluster)
        first = cluster[0].tensor
        name = self._name(cluster[0].path)
        region = torch.empty(0, dtype=torch.uint8, device=first.device)
        self._tensors[name] = region.set_(first.untyped_storage(), start, (end - start,), (1,))
        for reference in cluster:
            tensor = reference.tensor
            reference.entry |= {
                "$tensor": name,
                "dtype": dtype_name(tensor.dtype),
                "shape": list(tensor.shape),
                "stride": list(tensor.stride()),
                "offset": reference.span[0] - start,
            }

    def _name(self, path: tuple[str, ...]) -> str:
        """Return a name for a file: the path, where it makes one that is not taken."""
        name = ".".join(path)
        usable = name.isascii() and name.isprintable() and 0 < len(name) <= _LONGEST_NAME
        if usable and name not in self._tensors and name != _RESERVED:
            return name
        numbers = (f"tensor-{n}" for n in range(len(self._tensors), 2 * len(self._references) + 2))
        return next(name for name in numbers if name not in self._tensors)


_ADVICE = (
    "give its values as dicts, lists, numbers, strings or tensors, or give it a state_dict() and"
    " load_state_dict() that do"
)


def _clusters(references: list[_Reference]) -> Iterator[list[_Reference]]:
    """Yield the tensors that are one, or share bytes, together; each in the order it was met."""
    storages: dict[Any, list[tuple[int, _Reference]]] = {}
    for number, reference in enumerate(references):
        tensor = reference.tensor
        memory = tensor.untyped_storage().data_ptr() if tensor.numel() else 0
        key = (tensor.device, memory) if memory else number
        storages.setdefault(key, []).append((number, reference))
    for met in storages.values():
        yield from _overlapping(met)


def _overlapping(met: list[tuple[int, _Reference]]) -> Iterator[list[_Reference]]:
    """Cut the tensors of one storage into such as share bytes."""
    if len(met) == 1:
        yield [met[0][1]]
        return
    cluster: list[tuple[int, _Reference]] = []
    reach = 0
    for number, reference in sorted(met, key=lambda item: (item[1].span, item[0])):
        start, end = reference.span
        if cluster and start >= reach:
            yield [r for _, r in sorted(cluster, key=lambda item: item[0])]
            cluster, reach = [], 0
        cluster.append((number, reference))
        reach = max(reach, end)
    yield [r for _, r in sorted(cluster, key=lambda item: item[0])]


def _float(_: _Encoder, value: float, __: tuple[str, ...]) -> Any:
    return value if math.isfinite(value) else {"$float": repr(value)}


def _ordered(encoder: _Encoder, value: OrderedDict[Any, Any], path: tuple[str, ...]) -> Any:
    """Keep the versions that `Module.state_dict` hangs on its dict."""
    pairs = encoder.pairs(value, path)
    if not hasattr(value, "_metadata"):
        return {"$ordered_dict": pairs}
    versions = encoder.encode(value._metadata, (*path, "_metadata"))  # noqa: SLF001
    return {"$module_state": [pairs, versions]}


def _key(part: str) -> str:
    return part if part.lstrip("-").isdigit() else repr(part)


def _shown(key: Any) -> str:
    return key if isinstance(key, str) else short(key)


_ENCODERS: Mapping[type, Callable[[_Encoder, Any, tuple[str, ...]], Any]] = {
    **dict.fromkeys((type(None), bool, int, str), _Encoder.plain),
    float: _float,
    complex: lambda _, v, __: {"$complex": [repr(v.real), repr(v.imag)]},
    bytes: lambda _, v, __: {"$bytes": base64.b64encode(v).decode()},
    list: _Encoder.sequence,
    tuple: lambda e, v, p: {"$tuple": e.sequence(v, p)},
    set: lambda e, v, p: {"$set": e.sequence(v, p)},
    frozenset: lambda e, v, p: {"$frozenset": e.sequence(v, p)},
    dict: _Encoder.mapping,
    OrderedDict: _ordered,
    Counter: lambda e, v, p: {"$counter": e.pairs(v, p)},
    torch.dtype: lambda _, v, __: {"$dtype": dtype_name(v)},
    torch.device: lambda _, v, __: {"$device": str(v)},
    torch.Size: lambda _, v, __: {"$size": list(v)},
}


# --- Putting together --------------------------------------------------------------------------


@dataclass
class _Decoder:
    """One walk through a tree."""

    tensors: Mapping[str, torch.Tensor]
    _made: dict[str, torch.Tensor] = field(default_factory=dict)

    def decode(self, tree: Any) -> Any:
        """Return the value of a tree."""
        if isinstance(tree, list):
            return [self.decode(item) for item in tree]
        if not isinstance(tree, dict):
            return tree
        if "$tensor" in tree:
            return self.tensor(tree)
        tags = [key for key in tree if key.startswith("$")]
        if not tags:
            return {key: self.decode(item) for key, item in tree.items()}
        if len(tree) != 1 or tags[0] not in _DECODERS:
            raise ValueError(f"unknown {short(tags[0])}")
        return _DECODERS[tags[0]](self, tree[tags[0]])

    def pairs(self, pairs: list[Any]) -> list[tuple[Any, Any]]:
        """Return keys and values."""
        return [(self.decode(key), self.decode(item)) for key, item in pairs]

    def tensor(self, entry: dict[str, Any]) -> torch.Tensor:
        """Return a tensor: the same one for equal references."""
        key = repr(sorted(entry.items()))
        if key not in self._made:
            self._made[key] = self._make(entry)
        return self._made[key]

    def _make(self, entry: dict[str, Any]) -> torch.Tensor:
        tensor = self.tensors[entry["$tensor"]]
        if "dtype" in entry:
            tensor = _viewed(tensor, entry)
        wants_grad = bool(entry.get("requires_grad"))
        if entry.get("parameter"):
            return nn.Parameter(tensor, requires_grad=wants_grad)
        return tensor.detach().requires_grad_() if wants_grad else tensor


def _viewed(stored: torch.Tensor, entry: dict[str, Any]) -> torch.Tensor:
    """Return a tensor that lies in the file as bytes."""
    dtype = _dtype(entry["dtype"])
    if "stride" not in entry:
        return stored.view(dtype).reshape(entry["shape"])
    offset = stored.storage_offset() + entry["offset"]
    if offset % dtype.itemsize:
        raise ValueError(f"{entry['$tensor']} can't be {entry['dtype']} at byte {offset}")
    view = torch.empty(0, dtype=dtype)
    place = offset // dtype.itemsize
    return view.set_(stored.untyped_storage(), place, entry["shape"], entry["stride"])


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise TypeError(f"torch.{name} is no dtype")
    return found


def _module_state(decoder: _Decoder, value: list[Any]) -> Any:
    state = OrderedDict(decoder.pairs(value[0]))
    state._metadata = decoder.decode(value[1])  # type: ignore[attr-defined]  # noqa: SLF001
    return state


def _numpy_scalar(_: _Decoder, value: dict[str, str]) -> Any:
    return np.frombuffer(bytes.fromhex(value["hex"]), np.dtype(value["dtype"]))[0]


_DECODERS: Mapping[str, Callable[[_Decoder, Any], Any]] = {
    "$float": lambda _, v: float(v),
    "$complex": lambda _, v: complex(float(v[0]), float(v[1])),
    "$bytes": lambda _, v: base64.b64decode(v, validate=True),
    "$tuple": lambda d, v: tuple(d.decode(v)),
    "$set": lambda d, v: set(d.decode(v)),
    "$frozenset": lambda d, v: frozenset(d.decode(v)),
    "$dict": lambda d, v: dict(d.pairs(v)),
    "$ordered_dict": lambda d, v: OrderedDict(d.pairs(v)),
    "$module_state": _module_state,
    "$counter": lambda d, v: Counter(dict(d.pairs(v))),
    "$numpy": _numpy_scalar,
    "$array": lambda d, v: d.tensor(v).numpy(),
    "$dtype": lambda _, v: _dtype(v),
    "$device": lambda _, v: torch.device(v),
    "$size": lambda _, v: torch.Size(v),
}

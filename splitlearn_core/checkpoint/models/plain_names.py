"""Names of tensors without what wrappers put into them: DDP, FSDP1, `torch.compile`.  No torch."""

from __future__ import annotations

from collections.abc import Container, Iterable

_WITHIN = frozenset({"_orig_mod", "_fsdp_wrapped_module"})
_PARALLEL = "module."


def plain_name(name: str) -> str:
    """Return a tensor's name without what `torch.compile` and FSDP put into it, anywhere."""
    return ".".join(field for field in name.split(".") if field not in _WITHIN)


def plain_names(names: Iterable[str], known: Container[str] = ()) -> dict[str, str]:
    """Return the names in a file, and each without what wrappers put in.

    `module.` is taken away where every name begins with it, as DDP's do, and none is `known` as it
    is: a model may have a `module` of its own.
    """
    plain = {name: plain_name(name) for name in names}
    while plain and all(n.startswith(_PARALLEL) and n not in known for n in plain.values()):
        plain = {own: name.removeprefix(_PARALLEL) for own, name in plain.items()}
    return plain

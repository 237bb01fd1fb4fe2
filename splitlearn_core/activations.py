"""What a forward takes beside the weights: a bound, from the shapes of a part on the meta device.

A layer of `[out, in]` takes `in` elements of each position and makes `out`, and everything between
two such layers (norms, activations, attention) is as wide as one of them.  Without gradients a
decoder layer's tensors are gone when the next one runs, so that the widest layer counts, and beside
it what lies outside the layers, the head above all, and what every layer keeps: keys and values, or
states.  Elements count as float32, in which norms and products are taken whatever the dtype.

Layers that scan with decays (Mamba 2, gated delta rules) do so in chunks of a fixed length, however
few positions there are: transformers' own code then has matrices [chunk, chunk] for each decay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from splitlearn_core.families import Family

FIRST_FORWARD = 16 * 2**20
"""Bytes that the first forward of a process takes whatever the part: kernels, and their plans."""

_FLOAT32 = 4

_COPIES = 4
"""Tensors of a width that are there at once: input, output, and what a product or norm needs."""

_MOST_EXPERTS = 32
"""Experts of one layer that a position goes through, at most, in any published model."""

_SCAN_COPIES = 6
"""Matrices of a chunk, and inputs of a scan, that are there at once."""

_CHUNK = 64
"""Positions of a chunk, where the config does not say."""

_CHUNK_KEYS = ("chunk_size", "mamba_chunk_size")
_STATE_KEYS = ("ssm_state_size", "mamba_d_state", "state_size", "linear_key_head_dim")
_STATE = 128
"""Size of a state, where the config does not say."""


def forward_nbytes(model: PreTrainedModel, family: Family, positions: int) -> int:
    """Return the most bytes that a forward of one row takes, beside the weights.

    Args:
        model: The part, with or without weights.
        family: How it is built.
        positions: How many are new.
    """
    config = model.config.get_text_config(decoder=True)
    layers = list(model.get_submodule(family.layers).children())
    widths = [_width(layer) for layer in layers]
    outside = (_width(model) - sum(widths)) * positions
    busiest = max((_working(layer, config, positions) for layer in layers), default=0)
    kept = sum(widths) * positions + sum(_states(layer, config) for layer in layers)
    return FIRST_FORWARD + (_COPIES * outside + busiest + kept) * _FLOAT32


def _working(layer: nn.Module, config: Any, positions: int) -> int:
    """Return the elements that a decoder layer works with."""
    scans = [module for module in layer.modules() if _decays(module)]
    if not scans:
        return _COPIES * _width(layer) * positions
    chunk, state = _size(config, _CHUNK_KEYS, _CHUNK), _size(config, _STATE_KEYS, _STATE)
    length = -(-positions // chunk) * chunk
    scanned = sum(_decays(scan) * chunk + _heads(scan) * state for scan in scans)
    return _COPIES * _width(layer) * length + _SCAN_COPIES * scanned * length


def _states(layer: nn.Module, config: Any) -> int:
    """Return the elements of the states that a decoder layer keeps."""
    state = _size(config, _STATE_KEYS, _STATE)
    return sum(_width(module) * state for module in layer.modules() if _decays(module))


def _decays(module: nn.Module) -> int:
    """Return how many decays a module scans with: transformers calls their bias `dt_bias`."""
    return _elements(module, "dt_bias")


def _heads(module: nn.Module) -> int:
    """Return how many heads it has: each has one `A_log`, and sometimes many decays."""
    return _elements(module, "A_log")


def _elements(module: nn.Module, name: str) -> int:
    weight = getattr(module, name, None)
    return weight.numel() if isinstance(weight, nn.Parameter) else 0


def _size(config: Any, names: tuple[str, ...], default: int) -> int:
    """Return the first of some sizes that a config has."""
    sizes = (getattr(config, name, None) for name in names)
    return next((size for size in sizes if isinstance(size, int)), default)


def _width(module: nn.Module) -> int:
    """Return the elements that go in and out of all layers of a module, for each position."""
    return sum(map(_own_width, module.modules()))


def _own_width(module: nn.Module) -> int:
    """Return those of a module itself; a table of embeddings is looked up, not multiplied."""
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    weights = module.parameters(recurse=False)
    return sum(
        min(weight.shape[:-2].numel(), _MOST_EXPERTS) * sum(weight.shape[-2:]) for weight in weights
    )

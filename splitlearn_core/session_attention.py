"""Attention for caches that grow while others use the same part: transformers' sdpa, less copying.

Two things are copied with each forward that need not be:

- A piece of a prompt, or several tokens at once, behind positions that are in the cache already has
  a mask, and with a mask transformers repeats keys and values for every query head of a group.  The
  kernel for CPUs does without, and gives the same bits.
- Sequences of different lengths in one forward are a padded batch, for which all keys and values
  of all of them are copied side by side, each as wide as the longest.  Here each sequence attends
  to its own where they lie, and only what is left of a layer is computed together.  That holds for
  a batch with a row or more for each (`RaggedStates`), and for sequences that are packed into one
  row (`PackedStates`).

It is an attention function of its own, registered under `NAME` as transformers has it, that parts
are told to use; nothing changes for others.
"""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

if TYPE_CHECKING:
    from collections.abc import Sequence

NAME = "splitlearn_sessions"

_REPLACED = "sdpa"


def attend_in_place(part: torch.nn.Module) -> bool:
    """Let a part use this attention, if it uses transformers' sdpa on a CPU and can be told so.

    Returns:
        Whether it does, now or from before.  An architecture that computes attention by itself, or
        looks at the name of its attention, is left alone.
    """
    model = getattr(part, "model", None)
    if not isinstance(model, PreTrainedModel) or getattr(part, "device", None) != _CPU:
        return False
    if attends_in_place(part):
        return True
    if not _follows_the_interface(model):
        return False
    for config in _configs(model):
        config._attn_implementation_internal = NAME  # noqa: SLF001 - as transformers itself does
    return True


def attends_in_place(part: Any) -> bool:
    """Whether a part was told to use this attention."""
    config = getattr(getattr(part, "model", None), "config", None)
    return getattr(config, "_attn_implementation", None) == NAME


_CPU = torch.device("cpu")


def _configs(model: PreTrainedModel) -> list[Any]:
    """Return the configs that the model's modules look into, each once."""
    found = [getattr(module, "config", None) for module in model.modules()]
    return list({id(config): config for config in found if config is not None}.values())


def _follows_the_interface(model: PreTrainedModel) -> bool:
    """Whether nothing but the interface decides what all of a model's layers compute."""
    if any(config._attn_implementation != _REPLACED for config in _configs(model)):  # noqa: SLF001
        return False
    if not model._can_set_attn_implementation():  # noqa: SLF001 - what set_attn_implementation asks
        return False
    return f'"{_REPLACED}"' not in inspect.getsource(sys.modules[type(model).__module__])


class RaggedStates(torch.Tensor):
    """Keys or values of several sequences, each where it lies.

    It stands for a tensor [all rows, heads, width, size] in which each sequence is at the right
    end, with zeros before it; whatever but the attention above looks into it gets that tensor.

    Attributes:
        pieces: Those of each sequence, [rows, heads, length, size].
        slices: Which rows of the batch are whose.
    """

    pieces: Sequence[torch.Tensor]
    slices: Sequence[slice]

    def __new__(cls, pieces: Sequence[torch.Tensor], slices: Sequence[slice]) -> Self:
        """Make one."""
        _, heads, _, size = pieces[0].shape
        width = max(piece.shape[-2] for piece in pieces)
        shape = (slices[-1].stop, heads, width, size)
        made: Self = torch.Tensor._make_wrapper_subclass(  # noqa: SLF001 - torch's door to this
            cls, shape, dtype=pieces[0].dtype, device=pieces[0].device
        )
        made.pieces, made.slices = pieces, slices
        return made

    def padded(self) -> torch.Tensor:
        """Return the tensor that it stands for.

        What is left of a sequence is zero, not anything: a weight of zero times infinity is no
        number.
        """
        tensor = self.pieces[0].new_zeros(self.shape)
        for piece, rows in zip(self.pieces, self.slices, strict=True):
            tensor[rows, :, self.shape[-2] - piece.shape[-2] :] = piece
        return tensor

    def __repr__(self) -> str:  # type: ignore[override]  # torch's has an argument
        """Say what it is, without looking into it."""
        return f"RaggedStates({list(self.shape)}, of {len(self.pieces)} sequences)"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's is none of a class, it says
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Give an operation the padded tensor."""
        del types
        plain = torch.utils._pytree.tree_map_only(cls, cls.padded, (args, kwargs or {}))  # noqa: SLF001
        return func(*plain[0], **plain[1])


class Segment(NamedTuple):
    """Where a sequence is in a row that several share.

    Attributes:
        rows: Of its own batch; they stand one behind the other.
        new: Positions of each.
        start: Where the first one is.
    """

    rows: int
    new: int
    start: int

    @property
    def positions(self) -> int:
        """Positions of all rows."""
        return self.rows * self.new

    @property
    def stop(self) -> int:
        """Where the next sequence begins."""
        return self.start + self.positions

    def unflat(self, states: torch.Tensor) -> torch.Tensor:
        """Return its [1, heads, rows x new, size] as [rows, heads, new, size]."""
        if self.rows == 1:
            return states
        _, heads, _, size = states.shape
        return states.view(heads, self.rows, self.new, size).transpose(0, 1)


class PackedStates(torch.Tensor):
    """Keys or values of several sequences that share a row, each where it lies.

    It stands for no tensor: nothing but the attention above can do anything with it.

    Attributes:
        pieces: Those of each sequence, [rows, heads, length, size].
        segments: Where in the row of queries each is.
        window: Positions that one sees, itself included; `None` for all before it.
        masks: Masks of the forward, by sizes: all layers use them.
    """

    pieces: Sequence[torch.Tensor]
    segments: Sequence[Segment]
    window: int | None
    masks: dict[tuple[int, ...], torch.Tensor]

    def __new__(
        cls,
        pieces: Sequence[torch.Tensor],
        segments: Sequence[Segment],
        window: int | None,
        masks: dict[tuple[int, ...], torch.Tensor],
    ) -> Self:
        """Make one."""
        _, heads, _, size = pieces[0].shape
        shape = (1, heads, segments[-1].stop, size)
        made: Self = torch.Tensor._make_wrapper_subclass(  # noqa: SLF001 - torch's door to this
            cls, shape, dtype=pieces[0].dtype, device=pieces[0].device
        )
        made.pieces, made.segments, made.window, made.masks = pieces, segments, window, masks
        return made

    def mask(self, new: int, length: int) -> torch.Tensor | None:
        """Return what the last `new` of `length` positions see, if not all: bool [new, length]."""
        window = length if self.window is None else self.window
        if new == 1 and length <= window:
            return None
        sizes = (new, length, window)
        if sizes not in self.masks:
            seen = torch.ones(new, length, dtype=torch.bool).tril(length - new)
            self.masks[sizes] = seen.triu(length - new - window + 1)
        return self.masks[sizes]

    def __repr__(self) -> str:  # type: ignore[override]  # torch's has an argument
        """Say what it is, without looking into it."""
        return f"PackedStates(of {len(self.pieces)} sequences)"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's is none of a class, it says
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Refuse."""
        del types, args, kwargs
        raise TypeError(f"keys and values of several sequences in a row are no operand of {func}")


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers' `sdpa_attention_forward` does, whose arguments and result these are.

    Args:
        module: The layer's.
        query: [rows, heads, new, size].
        key: [rows, key-value heads, length, size].
        value: Likewise.
        attention_mask: Boolean [rows, 1, new, length], or `None`.
        **kwargs: As there.

    Returns:
        [rows, new, heads, size], and nothing.
    """
    plain = not (kwargs.get("position_bias") is not None or kwargs.get("softcap") is not None)
    if isinstance(key, PackedStates) and isinstance(value, PackedStates):
        if not plain:
            raise TypeError("sequences in one row can have no position_bias and no softcap")
        return _attend_packed(query, key, value, kwargs.get("scaling")), None
    if isinstance(key, RaggedStates) and isinstance(value, RaggedStates):
        if plain and _masks_alike(query, key, attention_mask):
            return _attend_each(query, key, value, attention_mask, kwargs.get("scaling")), None
        key, value = key.padded(), value.padded()
    if plain and attention_mask is not None and _is_grouped(query, key, value):
        output = scaled_dot_product_attention(
            query, key, value, attention_mask, scale=kwargs.get("scaling"), enable_gqa=True
        )
        return output.transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _is_grouped(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether keys and values would be repeated, and the kernel can do without."""
    return (
        query.shape[2] > 1
        and query.shape[1] > key.shape[1]
        and query.shape[-1] == key.shape[-1] == value.shape[-1]
        and not torch.is_grad_enabled()
    )


def _masks_alike(query: torch.Tensor, key: RaggedStates, mask: torch.Tensor | None) -> bool:
    """Whether the mask, if there is one, is over the same width, for all heads alike."""
    if mask is None:
        return query.shape[2] == 1
    return mask.dtype is torch.bool and mask.shape == (
        key.shape[0],
        1,
        query.shape[2],
        key.shape[2],
    )


def _attend_each(
    query: torch.Tensor,
    keys: RaggedStates,
    values: RaggedStates,
    mask: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    """Let each sequence attend to its own."""
    rows, heads, new, _ = query.shape
    own = _own_masks(mask, keys)
    output = query.new_empty(rows, new, heads, values.shape[-1])
    for key, value, which, seen in zip(keys.pieces, values.pieces, keys.slices, own, strict=True):
        if new == 1:  # the heads of a group are its positions: see transformers' pack_gqa
            packed = query[which].reshape(key.shape[0], key.shape[1], -1, query.shape[-1])
            found = scaled_dot_product_attention(packed, key, value, seen, scale=scale)
            output[which] = found.reshape(output[which].shape)
        else:
            found = scaled_dot_product_attention(
                query[which], key, value, seen, scale=scale, enable_gqa=True
            )
            output[which] = found.transpose(1, 2)
    return output


def _attend_packed(
    query: torch.Tensor, keys: PackedStates, values: PackedStates, scale: float | None
) -> torch.Tensor:
    """Let each sequence attend to its own; returns [1, all new, heads, size]."""
    asked_by = torch.split(query, [segment.positions for segment in keys.segments], dim=2)
    own = zip(asked_by, keys.pieces, values.pieces, keys.segments, strict=True)
    return torch.cat(
        [
            _attend_one(segment.unflat(asked), key, value, segment.new, keys, scale).flatten(0, 1)
            for asked, key, value, segment in own
        ]
    )[None]


def _attend_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    new: int,
    keys: PackedStates,
    scale: float | None,
) -> torch.Tensor:
    """Let one sequence attend; returns [rows, new, heads, size]."""
    rows, heads = query.shape[:2]
    groups, length = key.shape[1:3]
    mask = keys.mask(new, length)
    if new == 1:  # the heads of a group are its positions: see transformers' pack_gqa
        packed = query.reshape(rows, groups, heads // groups, -1)
        found = scaled_dot_product_attention(packed, key, value, mask, scale=scale)
        return found.reshape(rows, 1, heads, -1)
    whole = new == length and (keys.window is None or length <= keys.window)
    found = scaled_dot_product_attention(
        query,
        key,
        value,
        None if whole else mask,
        is_causal=whole,
        scale=scale,
        enable_gqa=heads != groups,
    )
    return found.transpose(1, 2)


def _own_masks(mask: torch.Tensor | None, keys: RaggedStates) -> list[torch.Tensor | None]:
    """Return each sequence's part of the mask; `None` where it sees all that it has.

    A mask has them itself, once they were looked for: every layer of its kind is given the same.
    """
    if mask is None:
        return [None] * len(keys.pieces)
    found: list[torch.Tensor | None] | None = getattr(mask, "_splitlearn_own", None)
    if found is None:
        found = []
        for piece, rows in zip(keys.pieces, keys.slices, strict=True):
            own = mask[rows, :, :, mask.shape[-1] - piece.shape[-2] :]
            found.append(None if bool(own.all()) else own)
        mask._splitlearn_own = found  # type: ignore[attr-defined]  # noqa: SLF001
    return found


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)

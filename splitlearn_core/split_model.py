"""A part of a model: its forward contract, its cache, its size, saving and loading."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache

from splitlearn_core.cache import PartCache
from splitlearn_core.dtypes import dtype_name, main_dtype
from splitlearn_core.errors import CacheMismatchError, PackedWeightsError, StepGraphError
from splitlearn_core.families.family import SHARED
from splitlearn_core.handover import Handover, check_ids
from splitlearn_core.hidden_state import HiddenState
from splitlearn_core.kv_cache import kv_bytes_per_token
from splitlearn_core.module_states import KEPT, ModuleStates
from splitlearn_core.packed_linear import PackedLinear
from splitlearn_core.passage import HiddenStateLeaves
from splitlearn_core.side_values import hidden_dtype, hidden_sizes, made_values, received_values
from splitlearn_core.transfers import on_device

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedConfig, PreTrainedModel

    from splitlearn_core.families import Family
    from splitlearn_core.loading.packing import PackingPlan
    from splitlearn_core.passage import Passage
    from splitlearn_core.plan import ComponentSpec
    from splitlearn_core.side_values import CrossingValue
    from splitlearn_core.step_graphs import StepGraphs


class SplitModel(nn.Module):
    """Bottom, a Trunk, Top, or (`full`) the whole of a decoder-only language model.

    What a part returns is exactly what the next one takes as its one positional argument:

        hidden = bottom(input_ids)      # int64 [batch, new]     -> [batch, new, hidden]
        hidden = trunk(hidden)          # [batch, new, hidden]   -> [batch, new, hidden]
        output = top(hidden)            # [batch, new, hidden]   -> CausalLMOutputWithPast

    The hidden state is a tensor, or, where layers need other values that depend on the tokens, a
    `HiddenState` that holds the tensor and them; `side_inputs` and `side_outputs` say which.

    Parts come back in evaluation mode.  Forwards of one part may run in several threads at once,
    each with a cache of its own.

    Attributes:
        model: Hugging Face's own module, with what this part does not own taken out.
        spec: Which layers and ends are here.
        packing: Which linear layers are packed, where some are: then the part is for inference
            alone, and can't be trained, saved or cast.
        step_graphs: What runs decode steps as CUDA graphs, where `graph_steps` was called.
    """

    def __init__(
        self, model: PreTrainedModel, spec: ComponentSpec, family: Family, passage: Passage
    ) -> None:
        super().__init__()
        self.model = model
        self.spec = spec
        self._family = family
        self._passage = passage
        self._needs_dtype = bool(family.side or family.hidden_dtype)
        self.packing: PackingPlan | None = None
        self.step_graphs: StepGraphs | None = None
        whole = spec.is_first and spec.is_last
        self._states = ModuleStates(model, KEPT.get(model.config.model_type, ()), whole=whole)
        self.eval()

    def note_packing(self, packing: PackingPlan) -> None:
        """Note that layers are packed, so that no weight here asks for gradients any more."""
        self.packing = packing
        self.requires_grad_(False)

    def graph_steps(self, sequences: int, positions: int) -> None:
        """Run steps of one token as CUDA graphs from now on, where a daemon serves this Trunk.

        Memory for so many caches is taken now.  Those of `new_cache()` lie in it from then on, for
        as long as they fit (`splitlearn_core.step_graphs`).

        Args:
            sequences: Most that step so at once.
            positions: Most that one of them may have.

        Raises:
            StepGraphError: (a `ValueError`) The part's steps can't be graphs.
        """
        from splitlearn_core.step_graphs import StepGraphs  # noqa: PLC0415 - it imports this module

        self.step_graphs = StepGraphs(self, sequences, positions)

    @property
    def quantization(self) -> str | None:
        """How linear layers are packed: `prepacked`, `fp16`, `int8`; `None` where none are."""
        return None if self.packing is None else self.packing.quantization

    @property
    def component(self) -> str:
        """`bottom`, `trunk` (or `trunk-0`, …), `top` or `full`."""
        return self.spec.name

    @property
    def start_layer(self) -> int:
        """First layer of the part."""
        return self.spec.start_layer

    @property
    def end_layer(self) -> int:
        """One past the last layer of the part."""
        return self.spec.end_layer

    @property
    def config(self) -> PreTrainedConfig:
        """The whole model's Hugging Face config."""
        config: PreTrainedConfig = self.model.config
        return config

    @property
    def num_layers(self) -> int:
        """Decoder layers of the whole model."""
        return int(self._decoder_config.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        """Width of the hidden state that goes from part to part."""
        return int(self._decoder_config.hidden_size)

    @property
    def hidden_shape(self) -> tuple[int, ...]:
        """Sizes of the hidden state after [batch, new]: `(hidden,)`, in a few types more."""
        return hidden_sizes(self._family, self.config)

    @property
    def hidden_dtype(self) -> torch.dtype:
        """Dtype of the hidden state that goes from part to part: mostly that of the weights."""
        return hidden_dtype(self._family, self.config, self.dtype)

    @property
    def side_inputs(self) -> tuple[CrossingValue, ...]:
        """What the part needs besides the hidden state."""
        return received_values(self._family, self.config, self.spec, self.dtype)

    @property
    def side_outputs(self) -> tuple[CrossingValue, ...]:
        """What the part makes besides the hidden state that later ones need."""
        return made_values(self._family, self.config, self.spec, self.dtype)

    @property
    def drops_positions(self) -> bool:
        """Whether the architecture drops positions whose logits nobody wants, before the last part.

        Where layers share keys and values, transformers does so at the first of them.  To compute
        as it does, every part must be given `logits_to_keep`.
        """
        return any(side.kind == SHARED for side in self._family.side)

    @cached_property
    def kv_bytes_per_position(self) -> int | None:
        """Bytes of its cache for each position of each row; `None` if it grows otherwise."""
        return kv_bytes_per_token(self.model, self._family, self.spec, self.hidden_dtype.itemsize)

    @property
    def rolls_back(self) -> bool:
        """Whether its cache can forget its last positions: layers that keep states can not."""
        return bool(self.new_cache().is_croppable)

    @property
    def max_positions(self) -> int | None:
        """Positions that the model was made for; `None` where its config does not say."""
        limit: int | None = getattr(self._decoder_config, "max_position_embeddings", None)
        return limit

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights (of most of them, where they differ)."""
        packed = ((p.dtype, p.in_features * p.out_features) for p in self._packed())
        found = main_dtype([*((p.dtype, p.numel()) for p in self.parameters()), *packed])
        return found or torch.get_default_dtype()

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, packed ones too, and buffers; a tensor used twice counts once."""
        tensors = [*self.parameters(), *self.buffers()]
        plain = sum({id(t): t.nbytes for t in tensors}.values())
        return plain + sum(p.nbytes for p in self._packed())

    def num_parameters(self) -> int:
        """Return the number of weights; a tied one counts once."""
        packed = sum(p.in_features * p.out_features for p in self._packed())
        return sum(p.numel() for p in self.parameters()) + packed

    def resident_bytes(self) -> int:
        """Return the bytes of the distinct pieces of memory that hold the weights.

        Pages mapped from a file count fully, whether they have been touched or not; and what caches
        lie in whose steps are graphs.
        """
        tensors = [*self.parameters(), *self.buffers()]
        packed = sum(p.nbytes for p in self._packed())
        slots = 0 if self.step_graphs is None else self.step_graphs.nbytes
        return sum({t.data_ptr(): t.nbytes for t in tensors}.values()) + packed + slots

    def new_cache(self) -> Cache:
        """Return an empty KV cache for this part; give it as `past_key_values`."""
        if self.spec.is_first and self.spec.is_last:
            return DynamicCache(config=self.config)
        if self.step_graphs is not None:
            return self.step_graphs.new_cache()
        return PartCache(self.config, self.spec)

    def forward(
        self,
        inputs: torch.Tensor | HiddenState,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run this part.

        Args:
            inputs: `input_ids` int64 [batch, new] for Bottom and the whole model, else
                `hidden_states` [batch, new, hidden] in the part's dtype, or the `HiddenState` that
                the part before returned; moved to the part's device.
            attention_mask: int64 [batch, past + new], 0 for padding; the same for every part.
            position_ids: int64 [batch, new]; counted from the cache's length when left out.
            past_key_values: From this part's `new_cache()`; filled in place.
            use_cache: `True` without `past_key_values` is for the whole model alone, which returns
                the cache that it makes: other parts return none.  `None` is what the config says,
                as in transformers (a few architectures compute in another order then).
            **kwargs: For the last part: what the architecture's own forward takes, such as
                `labels` and `logits_to_keep`.  The latter also for parts that `drops_positions`.

        Returns:
            The hidden state [batch, new, hidden], alone or in a `HiddenState`; or transformers'
            `CausalLMOutputWithPast` from Top and the whole model.

        Raises:
            ValueError: The input is none that the part takes (names, shapes), lacks a value that
                must go with the hidden state, or there is a second one.
            CacheMismatchError: (a `ValueError`) The cache is another part's, or `use_cache=True`
                without one.
        """
        self._check_inputs(inputs, kwargs)
        self._check_cache(past_key_values, use_cache)
        if not (self.spec.is_last or self._owns_sharing_layers):
            kwargs.pop("logits_to_keep", None)
        device = self.device  # found anew each time, which takes a while
        arguments = {
            "attention_mask": _brought(self._mask_taken(attention_mask, inputs), device),
            "position_ids": _brought(position_ids, device),
            self._family.cache_argument: past_key_values,
            **kwargs,
        }
        if use_cache is not None or past_key_values is not None:
            arguments["use_cache"] = past_key_values is not None or use_cache
        output = self._run(_brought(inputs, device), arguments)
        if isinstance(past_key_values, PartCache):
            past_key_values.advance_ghosts(_new_of(inputs))
        return output

    def _mask_taken(
        self, mask: torch.Tensor | None, inputs: torch.Tensor | HiddenState
    ) -> torch.Tensor | None:
        """Return the mask as the architecture takes it.

        Where no layer attends, it is multiplied with the new positions, and has their columns only.
        """
        if mask is None or not self._family.masks_new_only:
            return mask
        return mask[..., -_new_of(inputs) :]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write this part as a folder: config, safetensors, and a manifest with their hashes.

        Each file appears whole or not at all; the manifest comes last.

        Raises:
            PackedWeightsError: (a `RuntimeError`) Its weights are packed.
        """
        if self.packing is not None:
            raise PackedWeightsError(
                f"{self.component} can't be saved: its weights are packed (quantization"
                f" {self.quantization}); load it without quantization, and save that"
            )
        from splitlearn_core.part_folder import save_part  # noqa: PLC0415 - it imports this module

        save_part(self, path)

    @staticmethod
    def load(
        path: str | os.PathLike[str],
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | str | None = None,
        verify_hashes: bool = False,
        allow_uncertified: bool = False,
    ) -> SplitModel:
        """Load a part that `save` wrote.

        Args:
            path: The folder.  A name such as `…/trunk.pt` means the folder `…/trunk` beside it:
                no pickle is written or read.
            device: Where the weights go.
            dtype: Cast to this; `None` keeps what is stored.
            verify_hashes: First read every file through, and compare it with the manifest.
            allow_uncertified: Let in an architecture that was not certified.
        """
        from splitlearn_core.part_folder import load_part  # noqa: PLC0415 - it imports this module

        return load_part(
            path,
            device=device,
            dtype=dtype,
            verify_hashes=verify_hashes,
            allow_uncertified=allow_uncertified,
        )

    def extra_repr(self) -> str:
        """Name the part in `repr`."""
        packed = "" if self.quantization is None else f", {self.quantization}"
        return (
            f"{self.component}: layers [{self.start_layer}, {self.end_layer}), "
            f"{self.num_parameters():,} parameters, {dtype_name(self.dtype)}{packed}"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Move or cast all or, where weights are packed that can't be, nothing.

        Raises:
            StepGraphError: (a `ValueError`) Graphs were recorded, which read the weights where they
                are.
        """
        if self.step_graphs is not None:
            raise StepGraphError(
                f"{self.component} has CUDA graphs, which read its weights where they are: move or"
                " cast it before graph_steps"
            )
        for layer in self._packed():
            layer.check_move(fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _packed(self) -> Iterator[PackedLinear]:
        """Yield the packed layers, whose weights are no parameters."""
        if self.packing is None:
            return iter(())
        return (module for module in self.modules() if isinstance(module, PackedLinear))

    @property
    def _decoder_config(self) -> PreTrainedConfig:
        """The config of the decoder: where a model is made of several, one of them."""
        return self.config.get_text_config(decoder=True)

    @property
    def _owns_sharing_layers(self) -> bool:
        """Whether some of the part's layers have no keys and values of their own."""
        if not self.drops_positions:
            return False
        modes: Any = getattr(self._decoder_config, "kv_sharing_modes", ())
        return "reuse" in modes[self.start_layer : self.end_layer]

    def _check_cache(self, cache: Cache | None, use_cache: bool | None) -> None:
        """Refuse a cache that would be filled wrongly, or a wish that can't be met."""
        whole = self.spec.is_first and self.spec.is_last
        if cache is None:
            if use_cache and not whole:
                raise CacheMismatchError(
                    "use_cache=True needs past_key_values=part.new_cache(): a part fills the"
                    " cache that it is given, and returns none"
                )
        elif isinstance(cache, PartCache):
            if cache.spec != self.spec:
                raise CacheMismatchError(
                    f"this cache belongs to {cache.spec}, not to {self.spec}; use new_cache()"
                )
        elif not whole:
            raise CacheMismatchError(
                f"{self.component} needs the cache of its own new_cache(), found"
                f" {type(cache).__name__}"
            )

    def _run(self, inputs: torch.Tensor | HiddenState, arguments: dict[str, Any]) -> Any:
        """Run Hugging Face's forward from where this part begins to where it ends."""
        cache = arguments[self._family.cache_argument]
        dtype = self.dtype if self._needs_dtype else torch.float32
        if self.spec.is_first:
            arguments["input_ids"] = inputs
            self._passage.begin(None, inputs.shape[1], dtype, cache)
        else:
            given = HiddenState.of(inputs)
            dtype = dtype if self._needs_dtype else given.dtype
            arguments.update(self._placeholder(given, dtype))
            self._passage.begin(given, given.new, dtype, cache)
        try:
            with self._states.of(cache):
                return self.model(**arguments)
        except HiddenStateLeaves as leaving:
            return leaving.hidden_states
        finally:
            self._passage.end()

    def _check_inputs(self, inputs: Any, others: dict[str, Any]) -> None:
        """Refuse what can't be taken in, and what would be left out unseen."""
        for name in ("input_ids", "inputs_embeds"):
            if others.get(name) is not None:
                raise ValueError(
                    f"{self.component} takes its one input by position; {name} can't be given"
                )
        if self.spec.is_first:
            check_ids(self.component, inputs)
        else:
            self._takes.check(inputs)

    @cached_property
    def _takes(self) -> Handover:
        """What the part takes, if it is not the first."""
        return Handover(self.component, self.hidden_shape, self.side_inputs)

    def _placeholder(self, given: HiddenState, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return an input for the code before our layers to work on: zeros.

        Code that looks up token ids more than once is given ids, for stubs to look up.
        """
        batch, new = given.shape[0], given.new
        if self._family.side:
            return {"input_ids": torch.zeros(batch, new, dtype=torch.long, device=given.device)}
        width = self._passage.embedding_width
        return {"inputs_embeds": torch.zeros(batch, new, width, dtype=dtype, device=given.device)}


def _new_of(inputs: torch.Tensor | HiddenState) -> int:
    """Return how many positions are given."""
    return inputs.new if isinstance(inputs, HiddenState) else inputs.shape[1]


def _brought(value: Any, device: torch.device) -> Any:
    """Return a tensor, or a `HiddenState`, on a device; of none none."""
    if isinstance(value, torch.Tensor):
        return on_device(value, device)
    return None if value is None else value.to(device)

"""A chain of parts that is a Hugging Face causal language model."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NoReturn, Self

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from splitlearn_core.cache import ChainCache

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from splitlearn_core.split_model import SplitModel

Observer = Callable[[Any, float], None]
"""Is told of each call of a part: the part, and the seconds that it took."""


class SplitCausalLM(PreTrainedModel, GenerationMixin):
    """Bottom, Trunk and Top as one model, with transformers' `forward` and `generate`.

    The object is also an instance of the architecture's own class (`LlamaForCausalLM`, …), so that
    whatever transformers knows of that class (how to prepare the inputs of a step, above all)
    holds for the chain as well.

    Args:
        bottom: A local Bottom.
        trunk: What stands in the middle: one part or several, in the order of the layers.  A part
            may be elsewhere: it need only be callable as a Trunk is, have `new_cache()`, and say
            its `start_layer` and `end_layer`.
        top: A local Top.

    Attributes:
        observer: Called after each call of a part with the part and its seconds; `None` (the
            default) for nobody.

    Raises:
        ValueError: The parts don't follow one another, or are of different models.
    """

    main_input_name = "input_ids"

    def __new__(cls, bottom: SplitModel, trunk: Any, top: SplitModel) -> Self:
        """Make an object that is of the architecture's own class, too."""
        del bottom, trunk
        joined: type[Self] = _joined(cls, type(top.model))
        return object.__new__(joined)

    def __init__(self, bottom: SplitModel, trunk: Any, top: SplitModel) -> None:
        # The architecture's own __init__ would build all the layers.
        PreTrainedModel.__init__(self, copy.deepcopy(top.config))
        trunks = list(trunk) if isinstance(trunk, Sequence) else [trunk]
        _check_chain(bottom, trunks, top)
        self.bottom = bottom
        self.trunks = nn.ModuleList(t for t in trunks if isinstance(t, nn.Module))
        self.top = top
        self._middle = tuple(trunks)
        self.observer: Observer | None = None
        self.generation_config = _generation_config(top)
        self.eval()  # type: ignore[no-untyped-call]  # transformers' override has no annotations

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a chain of copies; a part that is elsewhere is the same one in both."""
        memo.update({id(part): part for part in self._middle if not isinstance(part, nn.Module)})
        twin: Self = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    @property
    def parts(self) -> tuple[Any, ...]:
        """Every part, in the order of the layers."""
        return (self.bottom, *self._middle, self.top)

    @property
    def device(self) -> torch.device:
        """Device of Bottom: where `input_ids` are expected."""
        return self.bottom.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of Bottom's weights."""
        return self.bottom.dtype

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embeddings, which are Bottom's."""
        embeddings: nn.Module = self.bottom.model.get_input_embeddings()
        return embeddings

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the head, which is Top's."""
        head: nn.Module | None = self.top.model.get_output_embeddings()
        return head

    def tie_weights(self, *_: Any, **__: Any) -> None:
        """Do nothing: what is tied within a part was tied when it was loaded.

        Where embeddings and head share their values, Bottom and Top have them once each.
        """

    def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse: a chain has no files of its own, and its parts may be elsewhere.

        Raises:
            NotImplementedError: Always; `part.save(folder)` saves a part.
        """
        raise NotImplementedError(
            "a chain of parts can't be saved as one model; save its parts: part.save(folder)"
        )

    def close(self) -> None:
        """Let go of parts that are elsewhere: their sessions end, and using them again raises."""
        for part in self._middle:
            close = getattr(part, "close", None)
            if close is not None:
                close()

    def __enter__(self) -> Self:
        """Return the model itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of parts that are elsewhere."""
        self.close()

    @classmethod
    def can_generate(cls) -> bool:
        """Say that this model has `generate`."""
        return True

    def new_cache(self) -> ChainCache:
        """Return an empty cache: one for each part."""
        return ChainCache(part.new_cache() for part in self.parts)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run every part in turn.

        Args:
            input_ids: int64 [batch, new].
            attention_mask: int64 [batch, past + new], 0 for padding.
            position_ids: int64 [batch, new].
            past_key_values: From `new_cache()`, or from an earlier output; filled in place.
            labels: int64 [batch, new]; Top then computes the loss.
            use_cache: Make a cache and return it, where none is given.
            logits_to_keep: Compute the logits of so many last positions only (0: all).
            return_dict: `False` returns a tuple.
            **kwargs: For Top's forward; `token_type_ids` for Bottom's as well.

        Returns:
            `CausalLMOutputWithPast`, logits [batch, new or kept, vocabulary].

        Raises:
            CacheMismatchError: (a `ValueError`) A step with this cache failed before, half-way
                through the parts.
            ValueError: No `input_ids`, a cache that is not of this chain, or a wish for what the
                parts don't hand out.
        """
        if input_ids is None:
            raise ValueError("input_ids are needed: the embeddings are Bottom's")
        _check_wishes(kwargs)
        other_name = kwargs.pop("cache_params", None)  # what Mamba's generation calls it
        given = past_key_values if past_key_values is not None else other_name
        cache = self._cache(given, use_cache=use_cache)
        shared: dict[str, Any] = {"attention_mask": attention_mask, "position_ids": position_ids}
        if use_cache is False:
            shared["use_cache"] = False  # some masks and kernels differ with it, as in transformers
        last = {"labels": labels, "logits_to_keep": logits_to_keep, **kwargs}
        with nullcontext() if cache is None else cache.step():
            output = self._run(input_ids, cache, shared, last)
        whole = CausalLMOutputWithPast(
            loss=output.loss, logits=output.logits, past_key_values=cache
        )
        return whole.to_tuple() if return_dict is False else whole

    def _run(
        self,
        input_ids: torch.Tensor,
        cache: ChainCache | None,
        shared: dict[str, Any],
        last: dict[str, Any],
    ) -> Any:
        """Run every part in turn: each with what is `shared`, Top with what is for the `last`.

        Positions that nobody wants are dropped early where the architecture does so, unless a part
        is elsewhere: it computes all of them.
        """
        slots = (None,) * len(self.parts) if cache is None else cache.parts
        if all(getattr(part, "drops_positions", False) for part in self.parts):
            shared = shared | {"logits_to_keep": last["logits_to_keep"]}
            last = {name: value for name, value in last.items() if name not in shared}
        types = {name: last[name] for name in ("token_type_ids",) if name in last}
        call = _called if self.observer is None else self._observed
        hidden = call(self.bottom, input_ids, past_key_values=slots[0], **shared, **types)
        for part, slot in zip(self._middle, slots[1:-1], strict=True):
            hidden = call(part, hidden, past_key_values=slot, **shared)
        return call(self.top, hidden, past_key_values=slots[-1], **shared, **last)

    def _observed(self, part: Any, given: Any, **arguments: Any) -> Any:
        """Call a part, and tell the observer how long it took."""
        start = time.perf_counter()
        result = part(given, **arguments)
        device = getattr(part, "device", None)
        if isinstance(device, torch.device) and device.type == "cuda":
            torch.cuda.synchronize(device)  # else it would count to whoever waits for it
        if self.observer is not None:
            self.observer(part, time.perf_counter() - start)
        return result

    def prepare_inputs_for_generation(
        self, *args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Return what a step is called with, the mask included.

        Mamba's own leaves the mask out after the first step.  A part that is elsewhere was told of
        it, and would take a step without one for a change.
        """
        own: Any = super()
        inputs: dict[str, Any] = own.prepare_inputs_for_generation(
            *args, attention_mask=attention_mask, **kwargs
        )
        if "attention_mask" in inputs and inputs["attention_mask"] is None:
            inputs["attention_mask"] = attention_mask
        return inputs

    def _prepare_cache_for_generation(  # type: ignore[override]  # theirs says bool, returns None
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kw: Any,
    ) -> None:
        """Give `generate` a cache for each part in the place of one for all layers."""
        name = "cache_params" if "mamba" in type(self).__name__.lower() else "past_key_values"
        if model_kwargs.get(name) is None and generation_config.use_cache is not False:
            if generation_config.cache_implementation not in {None, "dynamic"}:
                raise ValueError(
                    f"cache_implementation={generation_config.cache_implementation!r} can't be"
                    " split over parts; leave it out"
                )
            model_kwargs[name] = self.new_cache()
            if generation_config.is_assistant:  # it will have to take back what is not accepted
                model_kwargs[name].activate_past_recording()
            return
        own: Any = super()
        own._prepare_cache_for_generation(  # noqa: SLF001 - HF's own, overridden here
            generation_config, model_kwargs, *args, **kw
        )

    def _cache(self, given: Cache | None, *, use_cache: bool | None) -> ChainCache | None:
        """Return the cache to fill, or `None`."""
        if given is None:
            return self.new_cache() if use_cache else None
        if not isinstance(given, ChainCache) or len(given.parts) != len(self.parts):
            raise ValueError(
                f"past_key_values must come from this model's new_cache() or output, found"
                f" {type(given).__name__}"
            )
        return given

    def _init_weights(self, module: nn.Module) -> None:
        """Leave the parts' weights as they are: they are loaded already."""


def _called(part: Any, given: Any, **arguments: Any) -> Any:
    """Call a part."""
    return part(given, **arguments)


_JOINED: dict[tuple[type[Any], type[Any]], type[Any]] = {}


def _joined(chain: type[Any], own: type[Any]) -> Any:
    """Return a class that is both, the chain first; the same one each time.

    It bears the own class' module, so that transformers does not take it for foreign code.
    """
    if (chain, own) not in _JOINED:
        namespace = {"__module__": own.__module__}
        _JOINED[chain, own] = type(f"Split{own.__name__}", (chain, own), namespace)
    return _JOINED[chain, own]


def _check_wishes(arguments: dict[str, Any]) -> None:
    """Refuse what only a model that is in one piece can do, rather than leave it out unseen."""
    if arguments.get("inputs_embeds") is not None:
        raise ValueError("inputs_embeds can't be given: the embeddings are Bottom's")
    for name in ("output_hidden_states", "output_attentions"):
        if arguments.get(name):
            raise ValueError(f"{name} can't be had: the parts don't hand theirs on; leave it out")


def _check_chain(bottom: SplitModel, trunks: Sequence[Any], top: SplitModel) -> None:
    """Check that each part begins where the one before it ends."""
    chain = (bottom, *trunks, top)
    if any(part is None for part in chain):
        raise ValueError("a part of the chain is None: was it left out of `parts`?")
    spans = [f"{part.component} [{part.start_layer}, {part.end_layer})" for part in chain]
    follow = all(a.end_layer == b.start_layer for a, b in pairwise(chain))
    num_layers = top.config.get_text_config(decoder=True).num_hidden_layers
    whole = bottom.start_layer == 0 and top.end_layer == num_layers
    if not (follow and whole):
        raise ValueError(
            f"the parts don't make a whole model of {num_layers} layers: {', '.join(spans)}"
        )
    for part in chain:
        config = getattr(part, "config", None)  # a part that lives elsewhere need not have one
        if config is not None and config.model_type != bottom.config.model_type:
            raise ValueError(
                f"Bottom is of a {bottom.config.model_type}, {part.component} of a"
                f" {config.model_type}"
            )


def _generation_config(top: SplitModel) -> GenerationConfig:
    """Return the model's own generation settings."""
    own = getattr(top.model, "generation_config", None)
    return copy.deepcopy(own) if own is not None else GenerationConfig.from_model_config(top.config)

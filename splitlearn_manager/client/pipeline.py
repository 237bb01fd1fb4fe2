"""A model whose Bottom and Top are here and whose Trunk is elsewhere, loaded as one model."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from splitlearn_core import SplitCausalLM
from splitlearn_core.dtypes import as_dtype
from splitlearn_core.factory import estimate_component, find_model, load_component
from splitlearn_core.plan import BOTTOM, TOP
from splitlearn_core.quickstart import load_tokenizer
from splitlearn_manager.client.trunks import agreed_dtype, plan_around, reach_all
from splitlearn_manager.config.secrets import read_token
from splitlearn_manager.core.model_loader import warm_up_positions

if TYPE_CHECKING:
    from collections.abc import Callable

    from splitlearn_core import SplitModel
    from splitlearn_core.estimate import MemoryEstimate
    from splitlearn_manager.client.remote import RemoteTrunk
    from splitlearn_manager.config.model_config import ModelConfig

    Progress = Callable[[int, int], None]


class Pipeline:
    """Bottom and Top of a model, the remote Trunks between them, and the tokenizer.

    Attributes:
        model: The chain, with transformers' `generate`.
        tokenizer: The model's own, or `None` where its folder has none.
        trunks: The remote parts, in the order of their layers.
    """

    component = "pipeline"

    def __init__(self, model: SplitCausalLM, tokenizer: Any, trunks: list[RemoteTrunk]) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.trunks = trunks

    @property
    def start_layer(self) -> int:
        """First layer of the model."""
        return self.model.bottom.start_layer

    @property
    def end_layer(self) -> int:
        """One past the last layer of the model."""
        return self.model.top.end_layer

    @property
    def config(self) -> Any:
        """The whole model's Hugging Face config."""
        return self.model.config

    @property
    def num_layers(self) -> int:
        """Decoder layers of the whole model."""
        return self.model.top.num_layers

    @property
    def hidden_size(self) -> int:
        """Width of the hidden state."""
        return self.model.top.hidden_size

    @property
    def max_positions(self) -> int | None:
        """Positions that the model was made for."""
        return self.model.top.max_positions

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that are here."""
        return self.model.bottom.nbytes + self.model.top.nbytes

    def num_parameters(self) -> int:
        """Return the number of weights that are here."""
        return self.model.bottom.num_parameters() + self.model.top.num_parameters()

    @property
    def dtype(self) -> Any:
        """Dtype of the weights that are here."""
        return self.model.dtype

    @property
    def device(self) -> Any:
        """Device of Bottom."""
        return self.model.device

    def resident_bytes(self) -> int:
        """Return what the weights that are here take."""
        return self.model.bottom.resident_bytes() + self.model.top.resident_bytes()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the chain's forward."""
        return self.model(*args, **kwargs)

    def close(self) -> None:
        """End the sessions and connections to the Trunks."""
        for trunk in self.trunks:
            trunk.close()


def load_pipeline(
    config: ModelConfig, progress: Progress | None = None, *, timings: bool = False
) -> Pipeline:
    """Load Bottom and Top, and reach the Trunks.

    Args:
        config: What is where.
        progress: Called with (bytes done, bytes in all), for Bottom, then for Top.
        timings: Let the servers say of each step how long it waited there, and ran.

    Raises:
        RemoteUnavailable: (a `ConnectionError`) None of a Trunk's addresses answers.
        ValueError: A Trunk has other layers or another dtype than the ends that are here.
    """
    options = config.pipeline
    token = read_token(options.token_file, options.token_env)
    found = find_model(
        config.model_path,
        cache_dir=options.cache_dir,
        revision=options.revision,
        allow_uncertified=options.allow_uncertified,
        minimind=options.minimind,
    )
    with ExitStack() as undo:
        trunks = reach_all(
            options.links,
            token,
            options.ca_file,
            timings=timings,
            retry=options.retry,
            history_limit=options.history_limit,
        )
        for trunk in trunks:
            undo.callback(trunk.close)
        plan_around(found, trunks, options.split_points, allow_empty=options.allow_empty)
        agreed_dtype(trunks, as_dtype(config.dtype))
        bottom, top = (_load_end(config, name, progress) for name in (BOTTOM, TOP))
        agreed_dtype(trunks, bottom.dtype)
        model = SplitCausalLM(bottom, trunks, top)
        tokenizer = load_tokenizer(
            config.model_path,
            cache_dir=options.cache_dir,
            revision=options.revision,
            allow_uncertified=options.allow_uncertified,
            minimind=options.minimind,
        )
        undo.pop_all()
    return Pipeline(model, tokenizer, trunks)


def estimate_pipeline(config: ModelConfig) -> MemoryEstimate:
    """Return what the parts that are here will need."""
    options = config.pipeline
    bottom, top = (
        estimate_component(
            config.model_path,
            name,
            options.split_points,
            device=config.device,
            dtype=config.dtype,
            cache_dir=options.cache_dir,
            revision=options.revision,
            allow_empty=options.allow_empty,
            mmap=options.mmap,
            allow_uncertified=options.allow_uncertified,
            minimind=options.minimind,
            adapter=options.adapter,
            quantization=options.quantization,
            warm_up_positions=warm_up_positions(config),
        )
        for name in (BOTTOM, TOP)
    )
    return bottom + top


def _load_end(config: ModelConfig, name: str, progress: Progress | None) -> SplitModel:
    """Load Bottom or Top."""
    options = config.pipeline
    return load_component(
        config.model_path,
        name,
        options.split_points,
        device=config.device,
        dtype=config.dtype,
        cache_dir=options.cache_dir,
        revision=options.revision,
        allow_empty=options.allow_empty,
        mmap=options.mmap,
        progress=progress,
        allow_uncertified=options.allow_uncertified,
        minimind=options.minimind,
        adapter=options.adapter,
        quantization=options.quantization,
    )

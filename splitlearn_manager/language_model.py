"""What text is made with, in this process: a model that is whole or split, and its tokenizer."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from splitlearn_core.dtypes import dtype_name
from splitlearn_core.quickstart import load_full_model, load_tokenizer
from splitlearn_core.utils.threads import configure_pytorch_threads
from splitlearn_manager.client.pipeline import Pipeline, load_pipeline
from splitlearn_manager.client.remote import RemoteTrunk
from splitlearn_manager.commands.tables import layers, table
from splitlearn_manager.config.model_config import PIPELINE
from splitlearn_manager.config.units import format_bytes
from splitlearn_manager.core.model_loader import ModelLoader, named_type
from splitlearn_manager.core.resources import ResourceManager
from splitlearn_manager.load_bar import showing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from splitlearn_core import SplitCausalLM
    from splitlearn_core.loading.stages import Progress
    from splitlearn_manager.config.daemon_config import DaemonConfig
    from splitlearn_manager.config.model_config import ModelConfig


@dataclass(frozen=True)
class PartPlace:
    """Where a part runs, and what it holds there.

    Attributes:
        component: `bottom`, `trunk`, …, or `full`.
        start_layer: First layer.
        end_layer: One past the last.
        where: This machine's name, or the server's address.
        here: Whether it is this machine.
        dtype: What it computes in.
        nbytes: Bytes of its weights.
    """

    component: str
    start_layer: int
    end_layer: int
    where: str
    here: bool
    dtype: str
    nbytes: int

    @classmethod
    def of(cls, part: Any) -> Self:
        """Return the place of a part."""
        here = not isinstance(part, RemoteTrunk)
        return cls(
            part.component,
            part.start_layer,
            part.end_layer,
            f"here, {socket.gethostname()} ({part.device})" if here else part.url,
            here,
            dtype_name(part.dtype),
            part.nbytes,
        )


def describe_places(places: Sequence[PartPlace]) -> str:
    """Return where each part runs, for people."""
    rows = [
        (
            place.component,
            layers(place.start_layer, place.end_layer),
            place.where,
            place.dtype,
            format_bytes(place.nbytes),
        )
        for place in places
    ]
    return table([("part", "layers", "where", "dtype", "holds"), *rows], left=4)


class LanguageModel:
    """A model that text can be made with.

    Attributes:
        generator: What has transformers' `generate`: a chain of parts, or the whole model.
        tokenizer: The model's own.
        name: The model, as the user named it.
    """

    def __init__(self, loaded: Any, config: ModelConfig) -> None:
        """Take a loaded model.

        Args:
            loaded: A `Pipeline`, or a part that is the whole model.
            config: What it was loaded by.

        Raises:
            ValueError: It is only a part of a model, or has no tokenizer.
        """
        self._loaded = loaded
        self._assistants: dict[str, tuple[Any, Any]] = {}
        self.name = config.model_path
        self.tokenizer = _tokenizer(loaded, config)
        self.generator: Any = loaded.model

    @property
    def chain(self) -> SplitCausalLM | None:
        """The chain of parts, or `None` where the model is whole."""
        return self._loaded.model if isinstance(self._loaded, Pipeline) else None

    @property
    def trunks(self) -> list[RemoteTrunk]:
        """The parts that are elsewhere."""
        return self._loaded.trunks if isinstance(self._loaded, Pipeline) else []

    @property
    def places(self) -> tuple[PartPlace, ...]:
        """Where each part runs."""
        parts = (self._loaded,) if self.chain is None else self.chain.parts
        return tuple(map(PartPlace.of, parts))

    @property
    def max_positions(self) -> int | None:
        """Positions that the model was made for; `None` where its config does not say."""
        limit: int | None = self._loaded.max_positions
        return limit

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes sent to the Trunks and received from them so far."""
        return (
            sum(trunk.bytes_sent for trunk in self.trunks),
            sum(trunk.bytes_received for trunk in self.trunks),
        )

    def assistant(self, model_name_or_path: str) -> tuple[Any, Any]:
        """Return a small whole model that guesses tokens, and its tokenizer; it is loaded once.

        Raises:
            ValueError: It has no tokenizer.
            ModelSourceError, CheckpointError, FetchError, UnsupportedModelError: As
                `load_component`.
        """
        if model_name_or_path not in self._assistants:
            model, tokenizer = load_full_model(model_name_or_path, dtype=self.generator.dtype)
            if tokenizer is None:
                raise ValueError(f"the assistant {model_name_or_path} has no tokenizer")
            self._assistants[model_name_or_path] = model, tokenizer
        return self._assistants[model_name_or_path]

    def close(self) -> None:
        """End the sessions and connections to the Trunks."""
        for trunk in self.trunks:
            trunk.close()

    def __enter__(self) -> Self:
        """Return the model itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


def open_language_model(
    settings: DaemonConfig,
    config: ModelConfig,
    *,
    timings: bool = False,
    progress: bool | Progress | None = None,
) -> LanguageModel:
    """Load a model into this process, to make text with.

    Args:
        settings: For the limits of memory, and the number of threads.
        config: A pipeline, or a whole model.
        timings: Let servers say of each step how long it waited there, and ran.
        progress: As in `load_bar.showing`.

    Raises:
        InsufficientResourcesError: (a `RuntimeError`) It does not fit; has the figures.
        ValueError: The model can't make text by itself, or has no tokenizer.
        RuntimeError, OSError: Loading failed, or a Trunk can't be reached.
    """
    configure_pytorch_threads(num_threads=settings.server.threads)
    limits = settings.manager
    resources = ResourceManager(limits.max_memory_percent, memory_limit=limits.memory_limit)
    need = ModelLoader.estimate(config).peak_bytes
    resources.reserve(config.model_id, need, config.device)
    with showing(f"loading {config.model_path}", progress) as report:
        if config.model_type == PIPELINE:
            loaded: Any = load_pipeline(config, report, timings=timings)
        else:
            loaded = ModelLoader.load_from_config(config, report)  # type: ignore[arg-type]
    try:
        return LanguageModel(loaded, config)
    except BaseException:
        if isinstance(loaded, Pipeline):
            loaded.close()
        raise


def _tokenizer(loaded: Any, config: ModelConfig) -> Any:
    """Return the model's tokenizer, or say why there will be no text."""
    if isinstance(loaded, Pipeline):
        tokenizer = loaded.tokenizer
    elif getattr(loaded, "component", None) == "full":
        part = config.part
        tokenizer = load_tokenizer(
            config.model_path,
            cache_dir=part.cache_dir,
            revision=part.revision,
            allow_uncertified=part.allow_uncertified,
            model_type=named_type(config),
            minimind=part.minimind,
        )
    else:
        raise ValueError(
            f"{config.model_id} is only a part of a model ({getattr(loaded, 'component', '?')});"
            " generating needs a pipeline or a whole model"
        )
    if tokenizer is None:
        raise ValueError(f"{config.model_path} has no tokenizer, so text can't be generated")
    return tokenizer

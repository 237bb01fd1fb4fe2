"""From a `ModelConfig` to a model: the one door between the manager and `splitlearn_core`.

Everything here blocks and belongs into a worker thread.  Thread counts are set once for the
process, when the manager is made, and never by a load: that would change the forwards of models
that are in use.
"""

from __future__ import annotations

import logging
import traceback
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar

from splitlearn_core.errors import SplitLearnError
from splitlearn_core.machine import return_freed_memory
from splitlearn_core.plan import TOP, TRUNK
from splitlearn_manager.config.model_config import AUTO, HUGGINGFACE, PIPELINE, PYTORCH
from splitlearn_manager.core.failures import without_frames
from splitlearn_manager.core.states import LoadPhase
from splitlearn_manager.errors import ModelFailedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from splitlearn_core.estimate import MemoryEstimate
    from splitlearn_manager.config.model_config import ModelConfig
    from splitlearn_manager.core.progress import LoadProgress

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

WARM_UP_POSITIONS = 8
"""Positions of the forward that warms a part up; fewer where the model has fewer."""


class Loader(Protocol):
    """What the manager asks of whatever loads its models.  Both calls block."""

    def estimate(self, config: ModelConfig) -> MemoryEstimate:
        """Return what the load will need, without reading a weight."""

    def load_from_config(self, config: ModelConfig, progress: LoadProgress | None = None) -> Any:
        """Return the model; report to `progress`, and let what it raises end the load."""


class ModelLoader:
    """Loads what a `ModelConfig` describes; needs no instance.

    `pytorch`, `huggingface`, `auto` and the architectures all are parts (or the whole) of one
    checkpoint, in the format that its files have; `pipeline` is Bottom and Top from here, and a
    Trunk from elsewhere.
    """

    @staticmethod
    def estimate(config: ModelConfig) -> MemoryEstimate:
        """Return the memory that loading takes at its worst, and afterwards, from headers alone.

        A warm-up that is asked for counts as well, by an upper bound
        (`splitlearn_core.activations`).

        Raises:
            CheckpointError: (a `ValueError`) The checkpoint is damaged or incomplete.
            FileNotFoundError: There is no such model.
            ValueError: Split points, dtype or device don't fit the model or the machine.
        """
        if config.model_type == PIPELINE:
            from splitlearn_manager.client.pipeline import estimate_pipeline  # noqa: PLC0415

            return estimate_pipeline(config)
        from splitlearn_core.factory import estimate_component  # noqa: PLC0415 - imports torch

        graphs = config.part.cuda_graphs
        return estimate_component(
            **_arguments(config),
            warm_up_positions=warm_up_positions(config),
            cached_positions=0 if graphs is None else graphs.cached_positions,
        )

    @staticmethod
    def load_from_config(config: ModelConfig, progress: LoadProgress | None = None) -> Any:
        """Load a model, and run its first forward if the configuration asks for that.

        Raises:
            Exception: What `estimate` raises, what the first forward raises, and what `progress`
                raises to end the load.
        """
        model = _load(config, progress)
        if config.model_type != PIPELINE and (graphs := config.part.cuda_graphs) is not None:
            model.graph_steps(graphs.sequences, graphs.positions)
        if config.warmup:
            if progress is not None:
                progress.enter(LoadPhase.WARMING_UP)
            warm_up(model)
        level = logging.INFO if config.options.verbose else logging.DEBUG
        logger.log(level, "model %s was loaded from %s", config.model_id, config.model_path)
        return model


def _load(config: ModelConfig, progress: LoadProgress | None) -> Any:
    """Return the part, or the pipeline, that a configuration describes."""
    if config.model_type == PIPELINE:
        from splitlearn_manager.client.pipeline import load_pipeline  # noqa: PLC0415

        return load_pipeline(config, progress)
    from splitlearn_core.factory import load_component  # noqa: PLC0415 - imports torch

    return load_component(**_arguments(config), progress=progress)


def _arguments(config: ModelConfig) -> dict[str, Any]:
    """Return the arguments of `load_component` and `estimate_component`."""
    part = config.part
    return {
        "model_name_or_path": config.model_path,
        "component": part.component,
        "split_points": part.split_points,
        "model_type": named_type(config),
        "device": config.device,
        "dtype": config.dtype,
        "cache_dir": part.cache_dir,
        "revision": part.revision,
        "allow_empty": part.allow_empty,
        "mmap": part.mmap,
        "allow_uncertified": part.allow_uncertified,
        "quantization": part.quantization,
        "minimind": part.minimind,
        "adapter": part.adapter,
    }


def named_type(config: ModelConfig) -> str:
    """Return the architecture that a configuration names, for `find_model`; `auto` if none."""
    ways = {AUTO, HUGGINGFACE, PYTORCH, PIPELINE}
    return AUTO if config.model_type in ways else config.model_type


def warm_up_positions(config: ModelConfig) -> int:
    """Return how many positions a load's own forward has, at most; 0 where there is none."""
    return WARM_UP_POSITIONS if config.warmup else 0


def warm_up(model: Any) -> None:
    """Run one forward with an input that fits the part; what it raises is the caller's.

    A Trunk or Top gets a hidden state, `[1, 8, hidden]` zeros of its own dtype, with zeros for what
    must go with it; whatever else it is gets token ids, `[1, 8]` zeros (int64).
    """
    import torch  # noqa: PLC0415 - the model has imported it

    with torch.no_grad():
        model(_example(model))


def _example(model: Any) -> Any:
    """Return the input that warms a part up."""
    import torch  # noqa: PLC0415 - the model has imported it

    from splitlearn_core.hidden_state import HiddenState  # noqa: PLC0415 - imports torch

    shape = (1, min(WARM_UP_POSITIONS, model.max_positions or WARM_UP_POSITIONS))
    if not model.component.startswith((TRUNK, TOP)):
        return torch.zeros(shape, dtype=torch.long, device=model.device)
    side = {
        value.name: torch.zeros(
            (*shape, *(size.most or 1 if size.exact else 1 for size in value.sizes)),
            dtype=getattr(torch, value.dtype),
            device=model.device,
        )
        for value in model.side_inputs
    }
    hidden = torch.zeros(
        (*shape, *model.hidden_shape), dtype=model.hidden_dtype, device=model.device
    )
    return HiddenState(hidden, side).handed_on


class LoadedModel:
    """What a load brings back, to be taken once.

    Futures and tasks keep the result of a load for as long as anybody keeps them.  What they keep
    is this, not the model: who has taken that is the only one who has it.

    Attributes:
        resident_bytes: What its weights were measured to take; `None` if it can't be asked.
    """

    def __init__(self, model: Any, resident_bytes: int | None) -> None:
        self.resident_bytes = resident_bytes
        self._model = model

    def take(self) -> Any:
        """Return the model, the first time; `None` from then on."""
        model, self._model = self._model, None
        return model


def run_load(loader: Loader, config: ModelConfig, progress: LoadProgress) -> LoadedModel:
    """Run a whole load in a worker thread.

    Raises:
        Exception: What `contained` lets through.  What was read by then is given back.
    """
    try:
        return contained(config, _load_and_measure, loader, config, progress)
    except Exception:
        return_freed_memory()
        raise


def _load_and_measure(loader: Loader, config: ModelConfig, progress: LoadProgress) -> LoadedModel:
    """Load a model, and ask it what it takes."""
    progress.enter(LoadPhase.READING)
    model = loader.load_from_config(config, progress)
    measure = getattr(model, "resident_bytes", None)
    return LoadedModel(model, None if measure is None else int(measure()))


def contained(config: ModelConfig, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a loader, and let its error pass without its frames, which would keep tensors alive.

    No context manager: one that is made of a generator puts the frames back.

    Raises:
        ModelFailedError: The loader raised what is no `Exception`: a load that exits must not end
            the program that waits for it.
        Exception: Anything else that it raised.
    """
    failure: Exception
    try:
        return fn(*args, **kwargs)
    except StopIteration as error:  # an asyncio future takes none: nobody would ever hear of it
        failure = ModelFailedError(f"the loader ended with {error!r}")
        failure.__cause__ = error
    except Exception as error:  # noqa: BLE001 - it is raised below
        _log_failure(config, error)
        failure = error
    except BaseException as error:  # noqa: BLE001 - see above
        failure = ModelFailedError(f"the loader ended with {error!r}")
        failure.__cause__ = error
    without_frames(failure)
    try:
        raise failure
    finally:
        del failure  # this frame is in its traceback: a cycle


def _log_failure(config: ModelConfig, error: Exception) -> None:
    """Log an error's frames as text, before they go; at DEBUG if the error explains itself."""
    level = logging.DEBUG if isinstance(error, SplitLearnError) else logging.ERROR
    text = "".join(traceback.format_exception(error))
    logger.log(level, "loading model %s failed\n%s", config.model_id, text)

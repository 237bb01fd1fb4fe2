"""Every error that this library raises on purpose.

    SplitLearnError
    ├── CheckpointError (ValueError)             the weights are damaged, incomplete or don't fit
    ├── UnsupportedModelError (KeyError)         no known family for this architecture
    ├── ModelSourceError (FileNotFoundError)     there is no model at that path or name
    ├── FetchError (ConnectionError)             the hub did not answer as it should, for too long
    │   └── HubUnreachableError                  … nor did it before: also a ModelSourceError
    ├── StorageError (OSError)                   what is fetched can't be kept: disk full, no right
    ├── DoesNotFitError (ValueError)             a part needs more memory than its machine has
    ├── QuantizationError (ValueError)           weights can't be packed as asked for
    ├── PackedWeightsError (RuntimeError)        packed weights can't be trained, saved or moved
    ├── CacheMismatchError (ValueError)          a cache that belongs to another part
    ├── UnsavableStateError (TypeError)          training state that no checkpoint can hold
    ├── NoCheckpointError (FileNotFoundError)    there is no training checkpoint in that folder
    ├── WorldSizeError (ValueError)              training can't go on so at that number of ranks
    ├── RankLostError (RuntimeError)             another rank ended, hangs, or failed
    └── RanksDifferError (ValueError)            ranks were given, or see, different things

Bad split points and dtypes are plain `ValueError`s: the caller's argument is at fault.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from splitlearn_core.report import PlanReport


class SplitLearnError(Exception):
    """Base of this library's errors; catch it to catch them all."""


class CheckpointError(SplitLearnError, ValueError):
    """A checkpoint is damaged, incomplete, or of another shape than its config says.

    The message names the file and the tensors.  Fetch the checkpoint again, or ask whoever made it.
    """


class UnsupportedModelError(SplitLearnError, KeyError):
    """The architecture is not one that this library can split; the message lists those it can."""

    def __str__(self) -> str:
        """Return the sentence itself: `KeyError` would show its repr."""
        return str(self.args[0]) if self.args else ""


class ModelSourceError(SplitLearnError, FileNotFoundError):
    """No model lies at the given folder, file or hub name; the message says what was looked for."""


class FetchError(SplitLearnError, ConnectionError):
    """The network or the hub failed, and went on failing when asked again.

    What was fetched so far is kept: the next start goes on from there.
    """


class HubUnreachableError(ModelSourceError, FetchError):
    """No folder has that name, and the hub, which may have the model, can't be reached."""


class StorageError(SplitLearnError, OSError):
    """Fetched files can't be written: make room, or name another `cache_dir`.

    `errno` says what the system said.  Nothing half done is left.
    """

    def __init__(self, message: str, errno: int | None = None) -> None:
        """Keep the system's error number beside the message."""
        super().__init__(message)
        self.errno = errno


class DoesNotFitError(SplitLearnError, ValueError):
    """A part can't be loaded where it is planned to go: cut elsewhere, or take a larger machine.

    Attributes:
        report: The figures of the whole plan, a `splitlearn_core.report.PlanReport`.
    """

    def __init__(self, message: str, report: PlanReport) -> None:
        """Keep the figures beside the message."""
        super().__init__(message)
        self.report = report


class QuantizationError(SplitLearnError, ValueError):
    """Weights can't be packed as `quantization` asks: their dtype, a value, or this machine."""


class StepGraphError(SplitLearnError, ValueError):
    """Steps of a part can't be CUDA graphs; the message says why.  Leave `cuda_graphs` out."""


class PackedWeightsError(SplitLearnError, RuntimeError):
    """Packed weights are for inference alone: load the part without `quantization` for the rest."""


class CacheMismatchError(SplitLearnError, ValueError):
    """A cache was given that another part (or nobody) made; use `part.new_cache()`."""


class UnsavableStateError(SplitLearnError, TypeError):
    """Something in the training state can't be written so that it comes back as it was.

    The message says where in the state it lies, and what it is.  Nothing was written.
    """


class NoCheckpointError(SplitLearnError, FileNotFoundError):
    """No complete training checkpoint lies there; the message says what was looked for."""


class WorldSizeError(SplitLearnError, ValueError):
    """Training can't go on at this number of ranks: no policy was named, or the one can't hold."""


class RankLostError(SplitLearnError, RuntimeError):
    """Another rank ended, hangs or failed; the message names it and says what is as it was.

    Attributes:
        ranks: Those that are at fault, where that is known.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        """Keep the ranks beside the message."""
        super().__init__(message)
        self.ranks = ranks


class RanksDifferError(SplitLearnError, ValueError):
    """The ranks of a sharded run were given different arguments, or see different checkpoints.

    Attributes:
        ranks: Those that differ from most; of two ranks, the one that is not rank 0.
    """

    def __init__(self, message: str, ranks: tuple[int, ...]) -> None:
        """Keep the ranks beside the message."""
        super().__init__(message)
        self.ranks = ranks

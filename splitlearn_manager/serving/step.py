"""One step of a session, as values: what it has to fit, and whether it does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

from splitlearn_manager.serving.errors import (
    BadPositionError,
    BadStepError,
    TooLongError,
    UnsupportedComponentError,
)
from splitlearn_manager.serving.wire import DType, Frame, TensorName, WireTensor

if TYPE_CHECKING:
    import torch


class Part(Protocol):
    """What a session asks of a Trunk."""

    component: str
    dtype: torch.dtype
    hidden_size: int
    max_positions: int | None

    def new_cache(self) -> Any:
        """Return an empty cache, which a forward fills in place."""
        ...

    def __call__(
        self,
        inputs: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        past_key_values: Any,
        use_cache: bool,
    ) -> torch.Tensor:
        """Return hidden states [batch, new, hidden] for hidden states of the same shape."""
        ...


@dataclass(frozen=True, slots=True)
class Contract:
    """What every step of a session has to fit.

    Attributes:
        hidden_size: Last dimension of the hidden states.
        dtype: Their dtype.
        max_positions: Positions that the model was made for; `None` where it does not say.
    """

    hidden_size: int
    dtype: DType
    max_positions: int | None

    @classmethod
    def of(cls, part: Part) -> Self:
        """Return what a part's sessions have to fit.

        Raises:
            UnsupportedComponentError: It is no Trunk, or its dtype does not travel.
        """
        component = getattr(part, "component", type(part).__name__)
        if component != "trunk" and not component.startswith("trunk-"):
            raise UnsupportedComponentError(
                f"sessions are for a Trunk, which takes and gives hidden states; this is"
                f" {component!r}"
            )
        try:
            dtype = DType.from_torch_name(str(part.dtype))
        except ValueError as exc:
            raise UnsupportedComponentError(str(exc)) from None
        return cls(part.hidden_size, dtype, part.max_positions)


@dataclass(slots=True)
class State:
    """What a session has taken in so far.

    Attributes:
        contract: What its steps have to fit.
        cache: The part's cache: `length` positions of `batch` rows.
        max_length: Most positions that it may hold; `None` for as many as there is memory.
        length: Positions in the cache.
        batch: Rows, fixed by the first step.
        mask: uint8 [batch, length] on the CPU, 0 for padding; `None` while no step had a mask.
    """

    contract: Contract
    cache: Any
    max_length: int | None
    length: int = 0
    batch: int | None = None
    mask: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """The tensors of a step that fits its session."""

    request: int
    session: int
    hidden: WireTensor
    mask: WireTensor | None
    positions: WireTensor | None

    @property
    def batch(self) -> int:
        """Rows."""
        return self.hidden.shape[0]

    @property
    def new(self) -> int:
        """Positions in each row."""
        return self.hidden.shape[1]


def check_step(state: State, frame: Frame) -> Step:
    """Return the step that a STEP frame asks for; nothing has run, and nothing was changed.

    Raises:
        BadPositionError: It does not begin where the cache ends.
        BadStepError: A tensor is missing, or not of the shape or dtype that the session takes.
        TooLongError: It would go beyond the session's positions.
    """
    hidden = frame.tensor(TensorName.HIDDEN_STATES)
    if hidden is None:
        raise BadStepError("the step has no hidden_states")
    _check_hidden(state, hidden)
    if frame.position != state.length:
        raise BadPositionError(
            f"the step begins at position {frame.position}, but the session holds {state.length}"
        )
    end = state.length + hidden.shape[1]
    if state.max_length is not None and end > state.max_length:
        raise TooLongError(f"the step ends at position {end}, the session has {state.max_length}")
    mask = frame.tensor(TensorName.ATTENTION_MASK)
    positions = frame.tensor(TensorName.POSITION_IDS)
    _check_companion(mask, "attention_mask", DType.UINT8, hidden)
    _check_companion(positions, "position_ids", DType.INT64, hidden)
    return Step(frame.request, frame.session, hidden, mask, positions)


def _check_hidden(state: State, hidden: WireTensor) -> None:
    contract = state.contract
    batch = "batch" if state.batch is None else state.batch
    fits = (
        hidden.dtype is contract.dtype
        and len(hidden.shape) == 3  # noqa: PLR2004 - [batch, new, hidden]
        and hidden.shape[2] == contract.hidden_size
        and batch in {"batch", hidden.shape[0]}
    )
    if not fits:
        raise BadStepError(
            f"hidden_states must be {contract.dtype.name} [{batch}, new, {contract.hidden_size}],"
            f" found {shown(hidden)}"
        )


def _check_companion(
    tensor: WireTensor | None, name: str, dtype: DType, hidden: WireTensor
) -> None:
    """Check a tensor that has one value for each new position."""
    shape = hidden.shape[:2]
    if tensor is not None and (tensor.dtype is not dtype or tensor.shape != shape):
        raise BadStepError(f"{name} must be {dtype.name} {list(shape)}, found {shown(tensor)}")


def shown(tensor: WireTensor) -> str:
    """Return a tensor in words: `FP32 [1, 3, 64]`."""
    return f"{tensor.dtype.name} {list(tensor.shape)}"

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
from splitlearn_manager.serving.wire import SIDE_NAMES, DType, Frame, TensorName, WireTensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from splitlearn_core.hidden_state import HiddenState
    from splitlearn_core.side_values import CrossingValue, Size


class Part(Protocol):
    """What a session asks of a Trunk."""

    component: str
    hidden_shape: tuple[int, ...]
    hidden_dtype: torch.dtype
    side_inputs: tuple[CrossingValue, ...]
    side_outputs: tuple[CrossingValue, ...]
    max_positions: int | None

    def new_cache(self) -> Any:
        """Return an empty cache, which a forward fills in place."""
        ...

    def __call__(
        self,
        inputs: torch.Tensor | HiddenState,
        *,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        past_key_values: Any,
        use_cache: bool,
    ) -> torch.Tensor | HiddenState:
        """Return hidden states [batch, new, *hidden_shape] for hidden states of the same shape."""
        ...


@dataclass(frozen=True, slots=True)
class SideTensor:
    """A tensor that goes with the hidden states of every step.

    Attributes:
        code: What it is called in a frame.
        name: What it is.
        dtype: Its dtype.
        sizes: Its sizes after [batch, new].
        below: What each of its whole numbers must be below; `None` where the model does not mind.
    """

    code: TensorName
    name: str
    dtype: DType
    sizes: tuple[Size, ...]
    below: int | None

    @classmethod
    def all_of(cls, values: tuple[CrossingValue, ...]) -> tuple[Self, ...]:
        """Return the tensors of what crosses, with codes in that order.

        Raises:
            UnsupportedComponentError: There are more than the wire has names for.
            ValueError: One has a dtype that does not travel.
        """
        if len(values) > len(SIDE_NAMES):
            raise UnsupportedComponentError(
                f"{len(values)} values go with the hidden state, {len(SIDE_NAMES)} travel"
            )
        return tuple(
            cls(code, value.name, DType.from_torch_name(value.dtype), value.sizes, value.below)
            for code, value in zip(SIDE_NAMES, values, strict=False)
        )

    def fits(self, tensor: WireTensor, hidden: WireTensor) -> bool:
        """Whether a tensor is of this dtype and shape, for these hidden states."""
        return (
            tensor.dtype is self.dtype
            and tensor.shape[:2] == hidden.shape[:2]
            and len(tensor.shape) == 2 + len(self.sizes)
            and all(map(_fits, self.sizes, tensor.shape[2:]))
        )

    def __str__(self) -> str:
        sizes = "".join(f", {size}" for size in self.sizes)
        return f"{self.name} must be {self.dtype.name} [batch, new{sizes}]"


@dataclass(frozen=True, slots=True)
class Contract:
    """What every step of a session has to fit.

    Attributes:
        hidden_shape: Sizes of the hidden states after [batch, new].
        dtype: Their dtype.
        max_positions: Positions that the model was made for; `None` where it does not say.
        kv_bytes: Bytes of the cache for each position of each row; `None` where that is not known
            before.
        takes: What must come with the hidden states.
        gives: What goes back with them.
    """

    hidden_shape: tuple[int, ...]
    dtype: DType
    max_positions: int | None
    kv_bytes: int | None = None
    takes: tuple[SideTensor, ...] = ()
    gives: tuple[SideTensor, ...] = ()

    @property
    def hidden_size(self) -> int:
        """Last dimension of the hidden states."""
        return self.hidden_shape[-1]

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
            return cls(
                part.hidden_shape,
                DType.from_torch_name(str(part.hidden_dtype)),
                part.max_positions,
                getattr(part, "kv_bytes_per_position", None),
                SideTensor.all_of(part.side_inputs),
                SideTensor.all_of(part.side_outputs),
            )
        except ValueError as exc:
            raise UnsupportedComponentError(str(exc)) from None


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
        records: Whether the last step can be taken back, whatever the layers are.
        timings: Whether each answer says how long its step waited, and its forward took.
        reserved: Bytes of memory that its cache may take.
        positions: Positions of all rows that were claimed for it.
    """

    contract: Contract
    cache: Any
    max_length: int | None
    records: bool = False
    timings: bool = False
    reserved: int = 0
    positions: int = 0
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
    side: tuple[WireTensor, ...] = ()

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
    side = tuple(_check_side(state.contract, frame, hidden))
    return Step(frame.request, frame.session, hidden, mask, positions, side)


def _check_hidden(state: State, hidden: WireTensor) -> None:
    contract = state.contract
    batch = "batch" if state.batch is None else state.batch
    fits = (
        hidden.dtype is contract.dtype
        and len(hidden.shape) == 2 + len(contract.hidden_shape)
        and hidden.shape[2:] == contract.hidden_shape
        and batch in {"batch", hidden.shape[0]}
    )
    if not fits:
        sizes = ", ".join(map(str, contract.hidden_shape))
        raise BadStepError(
            f"hidden_states must be {contract.dtype.name} [{batch}, new, {sizes}],"
            f" found {shown(hidden)}"
        )


def _check_side(contract: Contract, frame: Frame, hidden: WireTensor) -> Iterator[WireTensor]:
    """Yield the tensors that must come with the hidden states, in their order."""
    known = {wanted.code for wanted in contract.takes}
    for tensor in frame.tensors:
        if tensor.name in SIDE_NAMES and tensor.name not in known:
            raise BadStepError(f"{tensor.name.name} is no input of this model")
    for wanted in contract.takes:
        found = frame.tensor(wanted.code)
        if found is None:
            raise BadStepError(f"the step has no {wanted.name}, which this model needs")
        if not wanted.fits(found, hidden):
            raise BadStepError(f"{wanted}, found {shown(found)}")
        yield found


def _check_companion(
    tensor: WireTensor | None, name: str, dtype: DType, hidden: WireTensor
) -> None:
    """Check a tensor that has one value for each new position."""
    shape = hidden.shape[:2]
    if tensor is not None and (tensor.dtype is not dtype or tensor.shape != shape):
        raise BadStepError(f"{name} must be {dtype.name} {list(shape)}, found {shown(tensor)}")


def _fits(size: Size, found: int) -> bool:
    return size.fits(found)


def shown(tensor: WireTensor) -> str:
    """Return a tensor in words: `FP32 [1, 3, 64]`."""
    return f"{tensor.dtype.name} {list(tensor.shape)}"

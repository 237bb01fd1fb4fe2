"""What stands here for a KV cache on a server, and the steps that fill it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from splitlearn_core.hidden_state import HiddenState
from splitlearn_manager.client.errors import RemoteError
from splitlearn_manager.client.lasting import Want
from splitlearn_manager.client.replay import mark_of
from splitlearn_manager.serving.tensors import tensor_from_wire, tensor_to_wire
from splitlearn_manager.serving.wire import Frame, Kind, TensorName

if TYPE_CHECKING:
    from splitlearn_manager.client.connection import Request
    from splitlearn_manager.client.remote import RemoteTrunk
    from splitlearn_manager.serving.wire import WireTensor


@dataclass(frozen=True, eq=False)
class RemoteStep:
    """One step of a cache, as `RemoteTrunk.step_together` takes it.

    Attributes:
        cache: From the part's `new_cache()`.
        hidden: [rows, new, hidden], as for a call of the part.
        attention_mask: int64 [rows, past + new], 0 for padding.
        position_ids: int64 [rows, new].
    """

    cache: RemoteCache
    hidden: torch.Tensor | HiddenState
    attention_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None


@dataclass(eq=False)
class CacheStep:
    """A step that fits its cache, on its way.

    Attributes:
        cache: What it fills.
        want: What is asked for it.
        mask: The cache's mask after it.
    """

    cache: RemoteCache
    want: Want
    mask: torch.Tensor | None


class RemoteCache:
    """What stands here for a KV cache on the server: its length, and the mask that was sent.

    The session begins with the first step, and ends with `close`, or when this object is collected.

    Attributes:
        trunk: The part whose cache it is.
    """

    def __init__(self, trunk: RemoteTrunk, traceparent: str | None = None) -> None:
        self.trunk = trunk
        self._lasting = trunk._new_session(traceparent)  # noqa: SLF001 - two halves of one thing
        self._length = 0
        self._batch: int | None = None
        self._mask: torch.Tensor | None = None  # bool [batch, length]; None while it is all ones

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many positions are in the cache."""
        del layer_idx
        return self._length

    def prepare(
        self,
        given: HiddenState,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> CacheStep:
        """Return a step that can be sent.

        Raises:
            ValueError: It does not fit the cache.
        """
        batch, new = given.shape[:2]
        if self._batch not in {None, batch}:
            raise ValueError(f"the cache has {self._batch} rows, found {batch}")
        mask = self._whole_mask(attention_mask, batch, new)
        tensors = [tensor_to_wire(TensorName.HIDDEN_STATES, given.tensor)]
        tensors += [v.to_wire(given.side[v.name]) for v in self.trunk.side_inputs]
        if mask is not None:
            columns = mask[:, self._length :]
            tensors.append(tensor_to_wire(TensorName.ATTENTION_MASK, columns))
        if position_ids is not None:
            tensors.append(self._positions(position_ids, batch, new))
        frame = Frame(Kind.STEP, position=self._length, tensors=tuple(tensors))
        return CacheStep(self, Want(self._lasting, frame, Kind.RESULT), mask)

    def take_in(self, step: CacheStep) -> HiddenState:
        """Return what came of a step, and count its positions; raises what went wrong with it."""
        sent = step.want.frame.tensors[0]
        batch, new = sent.shape[:2]
        request = step.want.result()
        answer = request.result()
        result = tensor_from_wire(_result_of(answer, sent))
        side = {v.name: v.from_wire(answer, batch, new) for v in self.trunk.side_outputs}
        history = self._lasting.history
        if history.limit:
            history.add_step(request.message, self._length, new, mark_of(result))
        self._length, self._batch, self._mask = self._length + new, batch, step.mask
        return HiddenState(result, side)

    # --- What generation does with a cache, besides steps ----------------------------------

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can put it back as it was."""
        return self.trunk.rolls_back

    def activate_past_recording(self) -> None:
        """Let sliding windows keep what `crop` needs to take the last step back.

        Raises:
            RuntimeError: The session has begun: it was to be asked for before the first step.
        """
        if self._lasting.session is not None and not self._lasting.rollback:
            raise RuntimeError("activate_past_recording comes before a cache's first step")
        self._lasting.rollback = self.is_croppable

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` positions (0 or less).

        Raises:
            RemoteError: (code `roll_back`) The server no longer has what came before them.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number, found {tokens_to_remove}")
        if tokens_to_remove and self._lasting.session is not None:
            length = max(0, self._length + tokens_to_remove)
            self._ask(Frame(Kind.ROLL_BACK, position=length), Kind.DONE)
            self._lasting.history.roll_back(length)
            self._length = length
            self._mask = None if self._mask is None else self._mask[:, :length]

    def copy(self) -> RemoteCache:
        """Return another cache that holds the same, in a session of its own.

        Raises:
            RemoteSessionClosed: (a `ConnectionError`) The session is gone.
            RemoteUnavailable: (a `ConnectionError`) The server has no room for another.
        """
        other = RemoteCache(self.trunk)
        other.__dict__.update(self.__dict__)
        session = None
        if self._lasting.session is not None:
            session = self._ask(Frame(Kind.FORK), Kind.OPENED).session_opened()
        other._lasting = self._lasting.fork(session)
        return other

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let the rows be those that are named, each as often as it is."""
        rows = beam_idx.tolist()
        if self._lasting.session is not None and rows != list(range(self._batch or 0)):
            self._ask(Frame(Kind.REORDER, info={"rows": rows}), Kind.DONE)
            self._lasting.history.add_rows(tuple(rows))
            self._batch = len(rows)
            self._mask = None if self._mask is None else self._mask[beam_idx.cpu()]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        if self._batch is not None:
            self.reorder_cache(torch.arange(self._batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows."""
        if self._batch is not None:
            self.reorder_cache(torch.arange(self._batch)[indices.cpu()])

    def _ask(self, frame: Frame, expected: Kind) -> Request:
        """Ask something of the session, which has begun."""
        want = Want(self._lasting, frame, expected)
        self.trunk._ask([want])  # noqa: SLF001 - as above
        return want.result()

    def _whole_mask(self, given: torch.Tensor | None, batch: int, new: int) -> torch.Tensor | None:
        """Return the mask of all positions, or `None` while it is all ones.

        Raises:
            ValueError: It is not [batch, past + new], or other than before.
        """
        shape = (batch, self._length + new)
        if given is None and self._mask is None:
            return None
        if given is None:
            mask = torch.ones(shape, dtype=torch.bool)
        elif tuple(given.shape) != shape:
            raise ValueError(
                f"attention_mask must be [batch, past + new], here {list(shape)}, found"
                f" {list(given.shape)}"
            )
        else:
            mask = given.detach().cpu().ne(0)
        if self._mask is None and bool(mask.all()):
            return None
        before = mask[:, : self._length]
        if not (before.all() if self._mask is None else torch.equal(before, self._mask)):
            raise ValueError(
                "attention_mask changes positions that are in the cache; what was sent to a"
                " server can't change, so begin again with a new cache"
            )
        return mask

    @staticmethod
    def _positions(given: torch.Tensor, batch: int, new: int) -> WireTensor:
        """Return the position ids to send.

        Also those that count on from the cache's length: where none come, a few models count each
        step from 0, as transformers lets them.
        """
        if given.shape not in {(batch, new), (1, new)}:
            raise ValueError(
                f"position_ids must be [batch, new], here {[batch, new]}, found {list(given.shape)}"
            )
        ids = given.detach().cpu().to(torch.int64).expand(batch, new)
        return tensor_to_wire(TensorName.POSITION_IDS, ids)

    def reset(self) -> None:
        """Forget all positions; the next step begins a new session."""
        self.close()
        rollback, self._lasting = self._lasting.rollback, self.trunk._new_session()  # noqa: SLF001
        self._lasting.rollback = rollback
        self._length, self._batch, self._mask = 0, None, None

    def close(self) -> None:
        """End the session.  A further step raises `RemoteSessionClosed`."""
        if self._lasting.session is not None:
            self.trunk._close_session(self._lasting.session)  # noqa: SLF001 - as above
            self._lasting.history.clear()

    def __repr__(self) -> str:
        """Say how long it is, and where."""
        return f"RemoteCache({self._length} positions at {self.trunk.url})"


def _result_of(answer: Frame, sent: WireTensor) -> WireTensor:
    """Return the hidden states of a RESULT, which have the form of those that were sent."""
    result = answer.tensor(TensorName.HIDDEN_STATES)
    if result is None or (result.dtype, result.shape) != (sent.dtype, sent.shape):
        raise RemoteError("the server's answer has not the form of the step", "bad_answer")
    return result

"""A Trunk that lives on a server, and stands where a local one would."""

from __future__ import annotations

import os
import threading
import weakref
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch

from splitlearn_core.errors import CacheMismatchError
from splitlearn_core.hidden_state import HiddenState
from splitlearn_manager.client.address import Address, model_path
from splitlearn_manager.client.connection import (
    CONNECT_TIMEOUT,
    Attendant,
    RemoteSession,
    SessionConnection,
)
from splitlearn_manager.client.description import Description, RemoteValue, describe
from splitlearn_manager.client.errors import RemoteError, RemoteSessionClosed, RemoteUnavailable
from splitlearn_manager.serving.tensors import tensor_from_wire, tensor_to_wire
from splitlearn_manager.serving.wire import Frame, Kind, TensorName

if TYPE_CHECKING:
    from collections.abc import Iterator

    from splitlearn_manager.serving.wire import WireTensor

__all__ = ["RemoteCache", "RemoteError", "RemoteSessionClosed", "RemoteTrunk", "RemoteUnavailable"]

TIMEOUT = 120.0
"""Seconds to wait for a step: a long prompt on a slow machine takes its time."""


class RemoteTrunk:
    """A Trunk on a daemon.

        with RemoteTrunk("http://host:8000", "trunk") as trunk:
            model = SplitCausalLM(bottom, trunk, top)
            model.generate(...)

    What goes over the network is hidden states, masks, and what must go with the hidden states of a
    few architectures (`side_inputs`, `side_outputs`); KV caches stay on the server.  Gradients
    don't cross it: a forward through it works, a backward raises.

    Making one does not connect; the first use does.  It may be used from several threads, which
    then take turns: for steps beside each other, make one for each thread.

    Args:
        url: The daemon's address; `http` or `https`.
        model_id: The Trunk's id there.
        token: Bearer token, if the daemon asks for one.
        timeout: Seconds to wait for a step.
        ca_file: PEM file with the certificates that an `https` daemon's must rest on, instead of
            those that the system trusts.

    Raises:
        ValueError: `url` is no address, the token is no word, or `ca_file` holds no certificates.
    """

    def __init__(
        self,
        url: str,
        model_id: str,
        token: str | None = None,
        timeout: float = TIMEOUT,
        *,
        ca_file: str | os.PathLike[str] | None = None,
    ) -> None:
        self._address = Address.parse(url, token, None if ca_file is None else os.fspath(ca_file))
        self.model_id = model_id
        self._connection = SessionConnection(self._address, model_id, timeout)
        self._lock = threading.Lock()
        self._described: Description | None = None
        self._attendant: Attendant | None = None
        self._closed = False

    # --- What it is ------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """The daemon's address."""
        return str(self._address)

    @property
    def component(self) -> str:
        """Which part it is: `trunk`, or `trunk-0`, `trunk-1`, … where there are several."""
        return self._fact("component")

    @property
    def model_type(self) -> str:
        """Architecture of the whole model."""
        return self._fact("model_type")

    @property
    def start_layer(self) -> int:
        """First layer of the part."""
        return int(self._fact("start_layer"))

    @property
    def end_layer(self) -> int:
        """One past the last layer of the part."""
        return int(self._fact("end_layer"))

    @property
    def num_layers(self) -> int:
        """Layers of the whole model."""
        return int(self._fact("num_layers"))

    @property
    def hidden_size(self) -> int:
        """Size of a hidden state."""
        return int(self._fact("hidden_size"))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, and of the hidden states that it takes and gives."""
        dtype: torch.dtype = getattr(torch, self._fact("dtype"))
        return dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, on the server."""
        return int(self._fact("nbytes"))

    def num_parameters(self) -> int:
        """Return the number of weights, on the server."""
        return int(self._fact("num_parameters"))

    @property
    def bytes_sent(self) -> int:
        """Bytes of frames that went out so far."""
        return self._connection.bytes_sent

    @property
    def bytes_received(self) -> int:
        """Bytes of frames that came in so far."""
        return self._connection.bytes_received

    @property
    def hidden_shape(self) -> tuple[int, ...]:
        """Sizes of the hidden states after [batch, new]."""
        return self._description.hidden_shape

    @property
    def hidden_dtype(self) -> torch.dtype:
        """Dtype of the hidden states that it takes and gives."""
        name = self._description.facts.get("hidden_dtype")
        dtype: torch.dtype = getattr(torch, name) if name else self.dtype
        return dtype

    @property
    def side_inputs(self) -> tuple[RemoteValue, ...]:
        """What the part needs besides the hidden states."""
        return self._description.takes

    @property
    def side_outputs(self) -> tuple[RemoteValue, ...]:
        """What the part makes besides the hidden states."""
        return self._description.gives

    @property
    def rolls_back(self) -> bool:
        """Whether its cache can forget its last positions."""
        return self._description.facts.get("rolls_back") == "True"

    @property
    def _description(self) -> Description:
        """What the server says about the part; it is asked once.

        Raises:
            RemoteError: There is no such model (lists those there are), or it is no Trunk.
            RemoteUnavailable: The server can't be reached, or the model is not ready.
        """
        with self._lock:
            if self._described is None:
                answer = self._address.get_json(model_path(self.model_id), CONNECT_TIMEOUT)
                self._described = describe(answer, self.model_id, self.url)
            return self._described

    def _fact(self, name: str) -> str:
        """Return a fact about the part."""
        try:
            return self._description.facts[name]
        except KeyError:
            text = f"{self.url} does not say the {name} of {self.model_id!r}"
            raise RemoteError(text, "bad_answer") from None

    # --- What it does ----------------------------------------------------------------------

    def new_cache(self) -> RemoteCache:
        """Return an empty cache: a session on the server, from its first step on."""
        return RemoteCache(self)

    def __call__(
        self,
        hidden_states: torch.Tensor | HiddenState,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: RemoteCache | None = None,
        use_cache: bool | None = None,
    ) -> torch.Tensor | HiddenState:
        """Run the part.

        Args:
            hidden_states: [batch, new, hidden] in the part's dtype, on any device; or the
                `HiddenState` that the part before returned.
            attention_mask: int64 [batch, past + new], 0 for padding.  What was sent with earlier
                steps can't change.
            position_ids: int64 [batch, new]; when left out, the model counts by itself, most of
                them from the cache's length.
            past_key_values: From this part's `new_cache()`; filled in place.  Without one, the
                step has a session of its own.
            use_cache: As for a local part: a cache that is given is filled, and none is returned.

        Returns:
            The hidden states [batch, new, hidden], with dtype and device of those that came; in a
            `HiddenState` where something must go with them.

        Raises:
            CacheMismatchError: (a `ValueError`) The cache is another part's, or `use_cache=True`
                without one.
            RemoteError: The server refused the step, or failed at it.
            RemoteSessionClosed: (a `ConnectionError`) The cache on the server is gone.
            RemoteUnavailable: (a `ConnectionError`) The server can't be reached, or not now.
            ValueError: Shapes or dtypes don't fit, the mask changes what was sent, or sequences are
                packed.
        """
        self._check_cache(past_key_values, use_cache)
        if use_cache is False and past_key_values is None and attention_mask is None:
            _check_not_packed(position_ids)
        run = partial(
            self._run, cache=past_key_values, mask=attention_mask, position_ids=position_ids
        )
        given = HiddenState.of(hidden_states)
        if not torch.is_grad_enabled() or not _wants_gradient(given):
            return run(given).handed_on
        left = run(given.detach())
        return replace(left, tensor=_cut(left.tensor, given)).handed_on

    def _check_cache(self, cache: RemoteCache | None, use_cache: bool | None) -> None:
        """Refuse a cache that this part can't fill, or a wish that it can't meet."""
        if cache is None:
            if use_cache:
                raise CacheMismatchError("use_cache=True needs past_key_values=trunk.new_cache()")
        elif not isinstance(cache, RemoteCache) or cache.trunk is not self:
            raise CacheMismatchError(
                f"the cache is not of this RemoteTrunk's new_cache(), found {type(cache).__name__}"
            )

    def _run(
        self,
        given: HiddenState,
        *,
        cache: RemoteCache | None,
        mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> HiddenState:
        """Run one step, in the cache's session or in one of its own."""
        self._check_hidden(given)
        sent = {value.name: value.part_of(given) for value in self.side_inputs}
        with ExitStack() as stack:
            if cache is None:
                cache = stack.enter_context(closing(self.new_cache()))
            left = cache.step(HiddenState(given.tensor, sent), mask, position_ids)
        passed = {name: rest for name, rest in self._passed_on(given) if rest is not None}
        return replace(left.to(given.device), side=passed | dict(left.to(given.device).side))

    def _passed_on(self, given: HiddenState) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Yield what came with the hidden states and is for later parts."""
        taken = {value.name: value for value in self.side_inputs}
        for name, value in given.side.items():
            yield name, taken[name].left_of(value) if name in taken else value

    def _check_hidden(self, given: HiddenState) -> None:
        """Refuse what is not the hidden state of this model, before it travels."""
        shape = list(given.shape)
        if given.new != shape[1] or 0 in shape or tuple(shape[2:]) != self.hidden_shape:
            sizes = ", ".join(map(str, self.hidden_shape))
            raise ValueError(f"hidden_states must be [batch, new, {sizes}], found {shape}")
        if given.dtype is not self.hidden_dtype:
            raise ValueError(
                f"hidden_states are {given.dtype}, and {self.model_id!r} at {self.url}"
                f" computes in {self.hidden_dtype}: load Bottom and Top in the same dtype"
            )

    # --- Its sessions ----------------------------------------------------------------------

    def _open_session(self, *, rollback: bool) -> RemoteSession:
        """Open a session, which is closed when nobody refers to it any more."""
        with self._lock:
            self._refuse_if_closed()
            if self._attendant is None:
                self._attendant = Attendant(self._connection)
                weakref.finalize(self, self._attendant.dismiss).atexit = False
            attendant = self._attendant
        session = self._connection.open_session(rollback=rollback)
        if self._closed:  # meanwhile, and perhaps before the session's connection was made
            self._connection.close()
        self._refuse_if_closed()
        weakref.finalize(session, attendant.abandon, session.id).atexit = False
        return session

    def _fork_session(self, session: RemoteSession) -> RemoteSession:
        """Open a session that holds what another holds; closed as that one is."""
        with self._lock:
            self._refuse_if_closed()
            attendant = self._attendant
        fork = self._connection.fork_session(session)
        if attendant is not None:  # there is one since the first session
            weakref.finalize(fork, attendant.abandon, fork.id).atexit = False
        return fork

    def _refuse_if_closed(self) -> None:
        """Raise if the part was closed."""
        if self._closed:
            raise RuntimeError(f"this RemoteTrunk ({self.url}) was closed")

    def _close_session(self, session: RemoteSession) -> None:
        """Close a session, if it has not ended."""
        if session.ended is None:
            self._connection.close_session(session.id)
            session.ended = "closed"

    def close(self) -> None:
        """Close the connection, and with it every session; using the part again raises."""
        with self._lock:
            self._closed = True
            attendant, self._attendant = self._attendant, None
        if attendant is not None:
            attendant.end()

    def __enter__(self) -> Self:
        """Return the part itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def __repr__(self) -> str:
        """Name the model and where it is."""
        return f"RemoteTrunk({self.url!r}, {self.model_id!r})"


class RemoteCache:
    """What stands here for a KV cache on the server: its length, and the mask that was sent.

    The session begins with the first step, and ends with `close`, or when this object is collected.

    Attributes:
        trunk: The part whose cache it is.
    """

    def __init__(self, trunk: RemoteTrunk) -> None:
        self.trunk = trunk
        self._session: RemoteSession | None = None
        self._length = 0
        self._batch: int | None = None
        self._mask: torch.Tensor | None = None  # bool [batch, length]; None while it is all ones
        self._rollback = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many positions are in the cache."""
        del layer_idx
        return self._length

    def step(
        self,
        given: HiddenState,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> HiddenState:
        """Run a step, and count its positions; `RemoteTrunk.__call__` tells the rest."""
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
        answer = self._send(tuple(tensors))
        result = tensor_from_wire(_result_of(answer, tensors[0]))
        side = {v.name: v.from_wire(answer, batch, new) for v in self.trunk.side_outputs}
        self._length, self._batch, self._mask = self._length + new, batch, mask
        return HiddenState(result, side)

    def _send(self, tensors: tuple[WireTensor, ...]) -> Frame:
        """Run a step in the session, beginning it if there is none yet."""
        if self._session is None:
            open_session = self.trunk._open_session  # noqa: SLF001 - two halves of one thing
            self._session = open_session(rollback=self._rollback)
        frame = Frame(Kind.STEP, position=self._length, tensors=tensors)
        return self.trunk._connection.step(self._session, frame)  # noqa: SLF001

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
        if self._session is not None and not self._rollback:
            raise RuntimeError("activate_past_recording comes before a cache's first step")
        self._rollback = self.is_croppable

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` positions (0 or less).

        Raises:
            RemoteError: (code `roll_back`) The server no longer has what came before them.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number, found {tokens_to_remove}")
        if tokens_to_remove and self._session is not None:
            length = max(0, self._length + tokens_to_remove)
            self._change(Frame(Kind.ROLL_BACK, position=length))
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
        if self._session is not None:
            other._session = self.trunk._fork_session(self._session)  # noqa: SLF001 - as above
        return other

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let the rows be those that are named, each as often as it is."""
        if self._session is not None:
            rows = beam_idx.tolist()
            self._change(Frame(Kind.REORDER, info={"rows": rows}))
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

    def _change(self, frame: Frame) -> None:
        """Change the session."""
        if self._session is not None:
            self.trunk._connection.change(self._session, frame)  # noqa: SLF001

    def _whole_mask(self, given: torch.Tensor | None, batch: int, new: int) -> torch.Tensor | None:
        """Return the mask of all positions, or `None` while it is all ones.

        Raises:
            ValueError: It is not [batch, past + new], or other than before.
        """
        shape = (batch, self._length + new)
        if given is None:
            mask = torch.ones(shape, dtype=torch.bool)
        elif tuple(given.shape) != shape:
            raise ValueError(
                f"attention_mask must be [batch, past + new], here {list(shape)}, found"
                f" {list(given.shape)}"
            )
        else:
            mask = given.detach().cpu().ne(0)
        before = mask[:, : self._length]
        if not (before.all() if self._mask is None else torch.equal(before, self._mask)):
            raise ValueError(
                "attention_mask changes positions that are in the cache; what was sent to a"
                " server can't change, so begin again with a new cache"
            )
        return None if self._mask is None and bool(mask.all()) else mask

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
        self._session, self._length, self._batch, self._mask = None, 0, None, None

    def close(self) -> None:
        """End the session.  A further step raises `RemoteSessionClosed`."""
        if self._session is not None:
            self.trunk._close_session(self._session)  # noqa: SLF001

    def __repr__(self) -> str:
        """Say how long it is, and where."""
        return f"RemoteCache({self._length} positions at {self.trunk.url})"


class _OneWay(torch.autograd.Function):
    """Stands for a forward that left the graph, and says so when somebody goes back through it."""

    @staticmethod
    def forward(ctx: Any, result: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        """Let the result depend on what was given."""
        del ctx, given
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Refuse."""
        del ctx, gradients
        raise RuntimeError(
            "gradients do not cross a RemoteTrunk: train what comes after it, or load the Trunk"
            " in this process"
        )


def _wants_gradient(given: HiddenState) -> bool:
    """Whether a gradient would have to go back through what was given."""
    return any(tensor.requires_grad for tensor in (given.tensor, *given.side.values()))


def _cut(result: torch.Tensor, given: HiddenState) -> torch.Tensor:
    """Return the result, from which there is no way back to what was given."""
    cut: torch.Tensor = _OneWay.apply(result, given.tensor, *given.side.values())  # type: ignore[no-untyped-call]
    return cut


def _check_not_packed(position_ids: torch.Tensor | None) -> None:
    """Refuse several sequences in one row, which transformers tells apart where no cache is kept.

    A server always keeps one, and would let them see each other.
    """
    if position_ids is not None and bool((position_ids.diff(dim=-1) != 1).any()):
        raise ValueError(
            "position_ids begin again within a row: a RemoteTrunk does not keep packed sequences"
            " apart; give each a row of its own, with an attention_mask"
        )


def _result_of(answer: Frame, sent: WireTensor) -> WireTensor:
    """Return the hidden states of a RESULT, which have the form of those that were sent."""
    result = answer.tensor(TensorName.HIDDEN_STATES)
    if result is None or (result.dtype, result.shape) != (sent.dtype, sent.shape):
        raise RemoteError("the server's answer has not the form of the step", "bad_answer")
    return result

"""A Trunk that lives on a server, and stands where a local one would."""

from __future__ import annotations

import os
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import torch

from splitlearn_core.errors import CacheMismatchError
from splitlearn_core.hidden_state import HiddenState
from splitlearn_manager.client.address import Address
from splitlearn_manager.client.errors import RemoteError, RemoteSessionClosed, RemoteUnavailable
from splitlearn_manager.client.healing import Healer
from splitlearn_manager.client.lasting import LastingSession
from splitlearn_manager.client.remote_cache import CacheStep, RemoteCache, RemoteStep
from splitlearn_manager.client.replicas import Replicas
from splitlearn_manager.client.timings import Timings
from splitlearn_manager.config.retry import HISTORY_LIMIT, RetryPolicy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from splitlearn_manager.client.connection import RemoteSession, SessionConnection
    from splitlearn_manager.client.description import Description, RemoteValue
    from splitlearn_manager.client.healing import Healed
    from splitlearn_manager.client.lasting import Want

__all__ = [
    "RemoteCache",
    "RemoteError",
    "RemoteSessionClosed",
    "RemoteStep",
    "RemoteTrunk",
    "RemoteUnavailable",
]

TIMEOUT = 120.0
"""Seconds to wait for a step: a long prompt on a slow machine takes its time."""

RETRY = RetryPolicy()


class RemoteTrunk:
    """A Trunk on a daemon.

        with RemoteTrunk("http://host:8000", "trunk") as trunk:
            model = SplitCausalLM(bottom, trunk, top)
            model.generate(...)

    What goes over the network is hidden states, masks, and what must go with the hidden states of a
    few architectures (`side_inputs`, `side_outputs`); KV caches stay on the server.  Gradients
    don't cross it: a forward through it works, a backward raises.

    When a session is lost (the server died or drains, the model was swapped, the session expired or
    was evicted, the connection is gone for good), another one is opened there or at the next
    address, what was sent is sent again, and the step goes on, as if nothing had happened.  It is
    logged as a warning, and counted (`healed`, `replayed_positions`).

    Making one does not connect; the first use does.  It may be used from several threads, which
    then take turns: for steps beside each other there is `step_together`.

    Args:
        url: The daemon's address, `http` or `https`; or those of several that serve the same Trunk,
            in the order in which they are tried.
        model_id: The Trunk's id there.
        token: Bearer token, if the daemon asks for one.
        timeout: Seconds to wait for a step.
        ca_file: PEM file with the certificates that an `https` daemon's must rest on, instead of
            those that the system trusts.
        timings: Ask the server to say of each step how long it waited there, and its forward took;
            see `timings`.
        retry: How often, and how long, it is tried to go on; `None` raises at once.
        history_limit: Bytes of steps that are kept for each session, to be sent again.  A session
            that was sent more can't go on elsewhere.
        on_heal: Called when sessions went on, in the thread that uses them.

    Raises:
        ValueError: `url` is no address, the token is no word, or `ca_file` holds no certificates.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        model_id: str,
        token: str | None = None,
        timeout: float = TIMEOUT,
        *,
        ca_file: str | os.PathLike[str] | None = None,
        timings: bool = False,
        retry: RetryPolicy | None = RETRY,
        history_limit: int = HISTORY_LIMIT,
        on_heal: Callable[[Healed], object] | None = None,
    ) -> None:
        urls = [url] if isinstance(url, str) else list(url)
        if not urls:
            raise ValueError("give at least one address")
        certificates = None if ca_file is None else os.fspath(ca_file)
        addresses = [Address.parse(one, token, certificates) for one in urls]
        self.model_id = model_id
        self._replicas = Replicas(addresses, model_id, timeout, timings=timings)
        self._healer = Healer(self._replicas, model_id, retry, on_heal)
        self._history_limit = 0 if retry is None else history_limit
        self._timings = Timings()

    # --- What it is ------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """The daemon's address; of several, the one in use."""
        return str(self._replicas.current.address)

    @property
    def urls(self) -> tuple[str, ...]:
        """The addresses of all that serve the Trunk."""
        return tuple(str(replica.address) for replica in self._replicas.all)

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
        return self._description.dtype

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
        return sum(replica.connection.bytes_sent for replica in self._replicas.all)

    @property
    def bytes_received(self) -> int:
        """Bytes of frames that came in so far."""
        return sum(replica.connection.bytes_received for replica in self._replicas.all)

    @property
    def timings(self) -> Timings:
        """What steps took so far, and where."""
        return self._timings

    @property
    def healed(self) -> int:
        """Sessions that went on elsewhere, or again, each time counted."""
        return self._healer.healed

    @property
    def replayed_positions(self) -> int:
        """Positions that were computed again for that."""
        return self._healer.replayed_positions

    @property
    def hidden_shape(self) -> tuple[int, ...]:
        """Sizes of the hidden states after [batch, new]."""
        return self._description.hidden_shape

    @property
    def hidden_dtype(self) -> torch.dtype:
        """Dtype of the hidden states that it takes and gives."""
        return self._description.hidden_dtype

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
        return self._replicas.description

    def _fact(self, name: str) -> str:
        """Return a fact about the part."""
        return self._description.fact(name)

    @property
    def _connection(self) -> SessionConnection:
        """The connection in use."""
        return self._replicas.current.connection

    # --- What it does ----------------------------------------------------------------------

    def new_cache(self, *, traceparent: str | None = None) -> RemoteCache:
        """Return an empty cache: a session on the server, from its first step on.

        Args:
            traceparent: The span (W3C Trace Context) that the session belongs to; `None` takes the
                one that its first step runs in.
        """
        return RemoteCache(self, traceparent)

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
            RemoteSessionClosed: (a `ConnectionError`) The cache on the server is gone, and it could
                not be gone on with; says what was tried.
            RemoteUnavailable: (a `ConnectionError`) The server can't be reached, or not now.
            ValueError: Shapes or dtypes don't fit, the mask changes what was sent, or sequences are
                packed.
        """
        self._check_cache(past_key_values, use_cache)
        if use_cache is False and past_key_values is None and attention_mask is None:
            _check_not_packed(position_ids)
        given = HiddenState.of(hidden_states)
        with ExitStack() as stack:
            cache = past_key_values
            if cache is None:
                cache = stack.enter_context(closing(self.new_cache()))
            (left,) = self.step_together([RemoteStep(cache, given, attention_mask, position_ids)])
        if isinstance(left, Exception):
            raise left
        return left

    def step_together(
        self, steps: Sequence[RemoteStep]
    ) -> list[torch.Tensor | HiddenState | Exception]:
        """Run steps of different caches: all are sent, then all answers awaited.

        So the server can run them as one forward.  It takes as long as the slowest of them; other
        threads wait for it.

        Args:
            steps: Each of another cache of this part.

        Returns:
            For each step, in their order, what a call of the part returns, or what it raises: each
            fails alone, and those that did not fail are in their caches.
        """
        results: list[torch.Tensor | HiddenState | Exception | None] = [None] * len(steps)
        given: dict[int, HiddenState] = {}
        sent: dict[int, CacheStep] = {}
        for index, step in enumerate(steps):
            try:
                given[index] = HiddenState.of(step.hidden)
                self._check_alone(step, steps[:index])
                sent[index] = self._prepare(step, given[index].detach())
            except Exception as error:  # noqa: BLE001 - it is returned
                results[index] = error
        self._ask([one.want for one in sent.values()])
        for index, one in sent.items():
            try:
                results[index] = self._finish(one, given[index])
            except Exception as error:  # noqa: BLE001 - likewise
                results[index] = error
        return results  # type: ignore[return-value]  # each has one by now

    def _check_alone(self, step: RemoteStep, before: Sequence[RemoteStep]) -> None:
        """Refuse a second step of a cache: it would have to wait for the first."""
        self._check_cache(step.cache, use_cache=None)
        if any(step.cache is other.cache for other in before):
            raise ValueError(
                "two of the steps are of the same cache; give them one after the other"
            )

    def _prepare(self, step: RemoteStep, given: HiddenState) -> CacheStep:
        """Return a step as it is sent; raises what is wrong with it."""
        self._check_hidden(given)
        sent = {value.name: value.part_of(given) for value in self.side_inputs}
        whole = HiddenState(given.tensor, sent)
        return step.cache.prepare(whole, step.attention_mask, step.position_ids)

    def _finish(self, step: CacheStep, given: HiddenState) -> torch.Tensor | HiddenState:
        """Return what came of a step, on the device and in the graph of what was given."""
        left = step.cache.take_in(step).to(given.device)
        request = step.want.result()
        self._timings = self._timings.plus(request.seconds, request.result().info)
        if given.side:
            rest = {n: value for n, value in self._passed_on(given.detach()) if value is not None}
            left = replace(left, side=rest | dict(left.side))
        if torch.is_grad_enabled() and _wants_gradient(given):
            left = replace(left, tensor=_cut(left.tensor, given))
        return left.handed_on

    def _check_cache(self, cache: RemoteCache | None, use_cache: bool | None) -> None:
        """Refuse a cache that this part can't fill, or a wish that it can't meet."""
        if cache is None:
            if use_cache:
                raise CacheMismatchError("use_cache=True needs past_key_values=trunk.new_cache()")
        elif not isinstance(cache, RemoteCache) or cache.trunk is not self:
            raise CacheMismatchError(
                f"the cache is not of this RemoteTrunk's new_cache(), found {type(cache).__name__}"
            )

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

    def _new_session(self, traceparent: str | None = None) -> LastingSession:
        """Return a session that is opened by its first step."""
        return LastingSession(self._history_limit, traceparent)

    def _ask(self, wants: Sequence[Want]) -> None:
        """Ask something of sessions."""
        self._healer.ask(wants)

    def _close_session(self, session: RemoteSession) -> None:
        """Close a session, if it has not ended."""
        self._replicas.of(session).close_session(session)

    def close(self) -> None:
        """Close the connections, and with them every session; using the part again raises."""
        self._replicas.close()

    def __enter__(self) -> Self:
        """Return the part itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def __repr__(self) -> str:
        """Name the model and where it is."""
        where = self.urls[0] if len(self.urls) == 1 else list(self.urls)
        return f"RemoteTrunk({where!r}, {self.model_id!r})"


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

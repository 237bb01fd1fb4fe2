"""A model whose Bottom and Top are here and whose Trunk is elsewhere, in one call."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from splitlearn_core import SplitCausalLM
from splitlearn_core.devices import check_device
from splitlearn_core.dtypes import as_dtype
from splitlearn_core.factory import find_model, load_component
from splitlearn_core.plan import BOTTOM, TOP, TRUNK, check_split_points
from splitlearn_core.quantization import check_quantization
from splitlearn_manager.client.remote import RETRY
from splitlearn_manager.client.trunks import agreed_dtype, plan_around, reach_all
from splitlearn_manager.config.options import TrunkLink
from splitlearn_manager.config.retry import HISTORY_LIMIT
from splitlearn_manager.config.section import build
from splitlearn_manager.load_bar import showing

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import torch

    from splitlearn_core.loading.stages import Progress
    from splitlearn_manager.config.retry import RetryPolicy


def connect(
    model: str | os.PathLike[str],
    split_points: Iterable[int] | None = None,
    trunk: str | Sequence[str] | None = None,
    *,
    chain: Sequence[Mapping[str, Any] | TrunkLink] | None = None,
    trunk_model_id: str | None = None,
    token: str | None = None,
    ca_file: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    hub_token: str | bool | None = None,
    quantization: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
    minimind: Mapping[str, Any] | None = None,
    mmap: bool = True,
    allow_empty: bool = False,
    allow_uncertified: bool = False,
    progress: bool | Progress | None = None,
    timings: bool = False,
    retry: RetryPolicy | None = RETRY,
    history_limit: int = HISTORY_LIMIT,
) -> SplitCausalLM:
    """Return a model with Bottom and Top here, and its Trunk on a server.

        with connect("Qwen/Qwen2-7B", [8, 24], trunk="http://host:8000") as model:
            model.generate(...)

    Only the layers of Bottom and Top are read, from a hub only their byte ranges.  The Trunks are
    asked first: whether they are of this model, have the layers between the cuts, and what they
    compute in.

    Args:
        model: Folder, `builtin:NAME`, hub name, or weights file.
        split_points: Layer numbers of the cuts; `None` takes those that the Trunks' layers make.
        trunk: Address of the only Trunk, or several addresses that serve this same Trunk: the first
            that answers is used, and when it is lost, generation goes on at another.
        chain: Several Trunks in a row, instead of `trunk`, in the order of their layers:
            `{"trunk": address or addresses, "trunk_model_id": id}` for each.
        trunk_model_id: The Trunk's id on its server; `trunk` when left out.
        token: Bearer token for the servers.
        ca_file: PEM file with the certificates that `https` servers' must rest on.
        device: Where Bottom and Top go.
        dtype: What all parts compute in; `None` takes what the Trunks compute in.
        cache_dir: Where files from the hub are kept.
        revision: Branch, tag or commit on the hub.
        hub_token: For the hub; `None` uses `HF_TOKEN` or the login.
        quantization: Of Bottom and Top, as in `load_component`.
        adapter: A LoRA adapter that is added into Bottom and Top, as in `load_component`; the
            Trunk's is given where it is served.
        minimind: Of a MiniMind file, what it does not tell, as in `load_component`.
        mmap: Let weights stay views of their file, where nothing must change.
        allow_empty: Let Bottom or Top have no layers.
        allow_uncertified: Let in an architecture that was not certified.
        progress: A bar on standard error: `True`, `False`, or, by default, where that is a
            terminal.  Or what is called with (bytes done, bytes in all), for Bottom, then for Top.
        timings: Let the servers say of each step how long it waited there, and ran; see
            `RemoteTrunk.timings`.
        retry: How often, and how long, it is tried to go on when a Trunk is lost; `None` raises at
            once.
        history_limit: Bytes that are kept for each session in order to go on elsewhere.

    Returns:
        The model; `close()`, or the end of the `with` block, ends its sessions and connections.

    Raises:
        RemoteUnavailable: (a `ConnectionError`) None of a Trunk's addresses answers.
        ValueError: A Trunk is of another model, has other layers or computes in another dtype; or
            an argument is wrong.
        ModelSourceError, CheckpointError, FetchError, UnsupportedModelError: As `load_component`.
    """
    links = links_of(trunk, trunk_model_id, chain)
    points = None if split_points is None else check_split_points(split_points)
    wanted, placed = as_dtype(dtype), check_device(device)
    check_quantization(quantization, placed.type)
    found = find_model(
        model,
        cache_dir=cache_dir,
        revision=revision,
        token=hub_token,
        allow_uncertified=allow_uncertified,
        minimind=minimind,
    )
    with ExitStack() as undo:
        trunks = reach_all(
            links,
            token,
            None if ca_file is None else os.fspath(ca_file),
            timings=timings,
            retry=retry,
            history_limit=history_limit,
        )
        for reached in trunks:
            undo.callback(reached.close)
        plan = plan_around(found, trunks, points, allow_empty=allow_empty)
        shared: dict[str, Any] = {
            "device": placed,
            "dtype": agreed_dtype(trunks, wanted),
            "cache_dir": cache_dir,
            "revision": revision,
            "token": hub_token,
            "quantization": quantization,
            "adapter": adapter,
            "minimind": minimind,
            "mmap": mmap,
            "allow_empty": True,  # the plan was checked
            "allow_uncertified": allow_uncertified,
        }
        cuts = [spec.start_layer for spec in plan.components[1:]]
        ends = []
        for name in (BOTTOM, TOP):
            with showing(name, progress) as report:
                ends.append(load_component(model, name, cuts, progress=report, **shared))
        joined = SplitCausalLM(ends[0], trunks, ends[1])
        undo.pop_all()
    return joined


def links_of(
    trunk: str | Sequence[str] | None,
    trunk_model_id: str | None,
    chain: Sequence[Mapping[str, Any] | TrunkLink] | None,
) -> tuple[TrunkLink, ...]:
    """Return the Trunks, in the order of their layers, however they were written.

    Raises:
        ConfigError: (a `ValueError`) Neither or both of `trunk` and `chain` are given, or one of
            them is wrong.
    """
    if (trunk is None) == (chain is None):
        raise ValueError(
            "give either trunk (an address, or several that serve the same Trunk) or chain (a list"
            " with a trunk and a trunk_model_id for each Trunk)"
        )
    if chain is None:
        return (build(TrunkLink, {"trunk": trunk, "trunk_model_id": trunk_model_id or TRUNK}),)
    if trunk_model_id is not None:
        raise ValueError("trunk_model_id belongs into each item of chain, beside its trunk")
    if not chain or isinstance(chain, str):
        raise ValueError("chain must be a list with a trunk and a trunk_model_id for each Trunk")
    for number, item in enumerate(chain):
        if isinstance(item, str):
            raise ValueError(  # noqa: TRY004 - as all else that is wrong here
                f"chain[{number}] must have a trunk and a trunk_model_id, found {item!r}; several"
                " addresses of one and the same Trunk are given as trunk"
            )
    return tuple(item if isinstance(item, TrunkLink) else build(TrunkLink, item) for item in chain)

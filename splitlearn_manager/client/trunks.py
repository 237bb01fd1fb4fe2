"""The Trunks that a model needs: reached, and held against the model that they are to complete."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from splitlearn_core.dtypes import dtype_name
from splitlearn_core.plan import SplitPlan
from splitlearn_manager.client.errors import RemoteError, RemoteUnavailable
from splitlearn_manager.client.remote import RETRY, RemoteTrunk
from splitlearn_manager.config.retry import HISTORY_LIMIT

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch

    from splitlearn_core.factory import OpenModel
    from splitlearn_manager.config.options import TrunkLink
    from splitlearn_manager.config.retry import RetryPolicy

logger = logging.getLogger(__name__)


def reach_all(
    links: Iterable[TrunkLink],
    token: str | None,
    ca_file: str | None,
    *,
    timings: bool = False,
    retry: RetryPolicy | None = RETRY,
    history_limit: int = HISTORY_LIMIT,
) -> list[RemoteTrunk]:
    """Return the Trunks, in the order of their layers, each at the first address that has it.

    Args:
        links: Where they are.
        token: Bearer token for the servers.
        ca_file: PEM file with the certificates that `https` servers' must rest on.
        timings: Let the servers say how long each step waited there, and ran.
        retry: How often, and how long, it is tried to go on when one is lost later.
        history_limit: Bytes that are kept for each session in order to.

    Raises:
        RemoteUnavailable: (a `ConnectionError`) None of a Trunk's addresses answers; says why, of
            each.
    """
    with ExitStack() as undo:
        trunks = []
        for link in links:
            trunk = RemoteTrunk(
                link.trunk,
                link.trunk_model_id,
                token,
                ca_file=ca_file,
                timings=timings,
                retry=retry,
                history_limit=history_limit,
            )
            undo.callback(trunk.close)
            _reach(trunk)
            trunks.append(trunk)
        undo.pop_all()
    return trunks


def _reach(trunk: RemoteTrunk) -> None:
    """Ask a Trunk what it is."""
    try:
        layers = trunk.start_layer, trunk.end_layer
    except RemoteError as error:
        raise RemoteUnavailable(str(error)) from error
    logger.info("%s at %s has the layers [%d, %d)", trunk.model_id, trunk.url, *layers)


def plan_around(
    model: OpenModel,
    trunks: Sequence[RemoteTrunk],
    split_points: Sequence[int] | None,
    *,
    allow_empty: bool = False,
) -> SplitPlan:
    """Return how a model is cut, having checked that the Trunks are what lies between the cuts.

    Args:
        model: Whose Bottom and Top are to be here.
        trunks: In the order of their layers.
        split_points: The cuts; `None` takes those that the Trunks' layers make.
        allow_empty: Let Bottom or Top have no layers.

    Raises:
        ValueError: A Trunk is of another model, or has other layers.
    """
    for trunk in trunks:
        _check_model(model, trunk)
    if split_points is None:
        check_row(trunks)
        points = (trunks[0].start_layer, *(trunk.end_layer for trunk in trunks))
        return SplitPlan.from_split_points(model.num_layers, points, allow_empty=True)
    plan = SplitPlan.from_split_points(model.num_layers, split_points, allow_empty=allow_empty)
    if len(plan.trunks) != len(trunks):
        raise ValueError(
            f"{len(split_points)} split points make {len(plan.trunks)} Trunk(s), found"
            f" {len(trunks)}; several in a row are given as chain=[{{'trunk': address,"
            " 'trunk_model_id': id}, …]"
        )
    for spec, trunk in zip(plan.trunks, trunks, strict=True):
        if (spec.start_layer, spec.end_layer) != (trunk.start_layer, trunk.end_layer):
            raise ValueError(
                f"{named(trunk)} has the layers [{trunk.start_layer}, {trunk.end_layer}), and"
                f" split_points {list(split_points)} leave it [{spec.start_layer},"
                f" {spec.end_layer}): cut where the Trunk does"
            )
    return plan


def agreed_dtype(
    trunks: Sequence[RemoteTrunk], wanted: torch.dtype | None, *, here: str = "Bottom and Top here"
) -> torch.dtype:
    """Return the dtype that all parts compute in: that of the Trunks.

    Raises:
        ValueError: They differ, or another one is wanted.
    """
    first = trunks[0]
    for trunk in trunks[1:]:
        if trunk.dtype != first.dtype:
            raise ValueError(
                f"{named(trunk)} computes in {dtype_name(trunk.dtype)}, {named(first)} in"
                f" {dtype_name(first.dtype)}: serve both in the same dtype"
            )
    if wanted is not None and wanted != first.dtype:
        raise ValueError(
            f"{named(first)} computes in {dtype_name(first.dtype)}, {here} in"
            f" {dtype_name(wanted)}: give both the same dtype"
        )
    return first.dtype


def named(trunk: RemoteTrunk) -> str:
    """Name a Trunk in a message."""
    return f"{trunk.model_id} at {trunk.url}"


def _check_model(model: OpenModel, trunk: RemoteTrunk) -> None:
    """Refuse a Trunk that is of another model, as far as that can be seen."""
    decoder: Any = model.config.get_text_config(decoder=True)
    here = (model.config.model_type, model.num_layers, int(decoder.hidden_size))
    there = (trunk.model_type, trunk.num_layers, trunk.hidden_size)
    if here != there:
        raise ValueError(
            f"{named(trunk)} is of a {_described(*there)}, and {model.description} is a"
            f" {_described(*here)}"
        )


def _described(model_type: str, layers: int, hidden_size: int) -> str:
    return f"{model_type} of {layers} layers with hidden size {hidden_size}"


def check_row(trunks: Sequence[RemoteTrunk]) -> None:
    """Refuse Trunks of which one does not begin where the one before it ends.

    Raises:
        ValueError: Names them.
    """
    for before, after in pairwise(trunks):
        if before.end_layer != after.start_layer:
            raise ValueError(
                f"{named(after)} begins with layer {after.start_layer}, and {named(before)} ends"
                f" before layer {before.end_layer}: give them in the order of their layers, all of"
                " them"
            )

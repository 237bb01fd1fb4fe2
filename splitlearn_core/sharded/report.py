"""What a sharded load took, rank by rank."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_ATTRIBUTE = "_splitlearn_shard_report"


@dataclass(frozen=True)
class RankReport:
    """One rank's share.

    Attributes:
        rank: Which.
        bytes_read: From files, by this rank; what is only sent to it does not count.
        bytes_held: Of the parameters and buffers that it holds.
        seconds: From the first exchange among the ranks to the last.
    """

    rank: int
    bytes_read: int
    bytes_held: int
    seconds: float


@dataclass(frozen=True)
class ShardReport:
    """A sharded load.

    Attributes:
        component: `full`, `bottom`, …
        how: `fsdp2` or `fsdp1`.
        source: `slices` or `full_state`.
        bytes_total: Of the part's parameters and persistent buffers, whole.
        ranks: Each rank's, in order.
    """

    component: str
    how: str
    source: str
    bytes_total: int
    ranks: tuple[RankReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def note_report(model: nn.Module, report: ShardReport) -> None:
    """Keep a report with the model that it is of."""
    setattr(model, _ATTRIBUTE, report)


def report_of(model: nn.Module) -> ShardReport:
    """Return what loading this model took, on every rank.

    Raises:
        ValueError: It was not made by `load_sharded`.
    """
    report = model.__dict__.get(_ATTRIBUTE)
    if not isinstance(report, ShardReport):
        raise ValueError(  # noqa: TRY004 - the wrong model, not the wrong type
            f"this {type(model).__name__} was not made by load_sharded"
        )
    return report

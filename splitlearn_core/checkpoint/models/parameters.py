"""How many parameters a model has, and how many of them are trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from splitlearn_core.checkpoint.models.wrappers import parameters_of
from splitlearn_core.packed_linear import PackedLinear

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters (values, not tensors).

    Attributes:
        total: All; of tied ones each value once.
        trainable: Those that ask for gradients.
    """

    total: int
    trainable: int

    @property
    def frozen(self) -> int:
        """Those that are left as they are."""
        return self.total - self.trainable

    def to_dict(self) -> dict[str, int]:
        """Return the counts by name."""
        return {**asdict(self), "frozen": self.frozen}

    def __str__(self) -> str:
        share = 100 * self.trainable / self.total if self.total else 0.0
        return f"{self.total:,} parameters, {self.trainable:,} trainable ({share:.2f} %)"


def count_parameters(model: nn.Module) -> ParameterCounts:
    """Count the parameters of a part, of a whole model, or of what wraps one.

    Of a model that FSDP shards over ranks the whole is counted, not this rank's share; packed
    weights (`quantization`) count as what they stand for.

    Args:
        model: Any module: a `SplitModel`, transformers' model, peft's, DDP's, FSDP's, a compiled
            one.
    """
    counted = list(parameters_of(model))
    packed = [
        m.in_features * m.out_features for m in model.modules() if isinstance(m, PackedLinear)
    ]
    return ParameterCounts(
        total=sum(number for number, _ in counted) + sum(packed),
        trainable=sum(number for number, trained in counted if trained),
    )

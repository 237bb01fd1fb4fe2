"""The one builder of parts: a config, what to own, and a source of tensors make a `SplitModel`."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from splitlearn_core.dtypes import dtype_name
from splitlearn_core.families import family_of
from splitlearn_core.huge_pages import collapse
from splitlearn_core.loading.materialize import Placement, materialize, plan_reads
from splitlearn_core.loading.names import map_names
from splitlearn_core.loading.packing import plan_packing
from splitlearn_core.loading.precision import Dtypes
from splitlearn_core.loading.stages import LoadStage, NeverBack, enter_stage
from splitlearn_core.machine import return_freed_memory
from splitlearn_core.pruning import prune
from splitlearn_core.skeleton import build_skeleton, check_tables, computed_tables
from splitlearn_core.split_model import SplitModel

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from splitlearn_core.families import Family
    from splitlearn_core.loading.materialize import PartReads
    from splitlearn_core.loading.names import NameMap
    from splitlearn_core.loading.sources import TensorSource
    from splitlearn_core.loading.stages import Progress
    from splitlearn_core.passage import Passage
    from splitlearn_core.plan import ComponentSpec


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Blueprint:
    """A part before its weights: the pruned module on meta, and what it will read.

    Attributes:
        model: Pruned, on the meta device.
        family: How the architecture is built.
        passage: Where its forwards find what they are given.
        reads: What it needs from the checkpoint.
    """

    model: PreTrainedModel
    family: Family
    passage: Passage
    reads: PartReads

    @property
    def tables_nbytes(self) -> int:
        """Bytes of the buffers that no checkpoint stores."""
        return sum(table.nbytes for table in computed_tables(self.model))

    @property
    def making_nbytes(self) -> int:
        """Bytes that computing them takes besides: two more of the largest, in float32 if half."""
        tables = computed_tables(self.model)
        sizes = (max(t.itemsize, 4 * t.is_floating_point()) * t.numel() for t in tables)
        return 2 * max(sizes, default=0)


def draw(
    config: PreTrainedConfig,
    spec: ComponentSpec,
    source: TensorSource,
    checkpoint: str,
    family: Family | None = None,
    dtype: torch.dtype | None = None,
) -> Blueprint:
    """Work out what a part needs, from names and headers alone.

    Args:
        config: The whole model's; left as it is.
        spec: What the part owns.
        source: Where the tensors are.
        checkpoint: Names the source in errors.
        family: How the architecture is built; looked up by the config's type when left out.
        dtype: What weights are cast to; `None` keeps what is stored.

    Raises:
        CheckpointError: The source lacks a tensor, has one of the wrong shape or kind, or a
            stranger; or the config makes no model.
    """
    return next(draw_each(config, (spec,), source, checkpoint, family, dtype))


def draw_each(
    config: PreTrainedConfig,
    specs: Iterable[ComponentSpec],
    source: TensorSource,
    checkpoint: str,
    family: Family | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[Blueprint]:
    """Work out what each of some parts needs, when its turn comes; otherwise as `draw`.

    The checkpoint's names are looked through once, which is most of the work where they are many.
    """
    drawer = _Drawer(config, source, checkpoint, family or family_of(config.model_type), dtype)
    return map(drawer.draw, specs)


class _Drawer:
    """Draws parts of one model."""

    def __init__(
        self,
        config: PreTrainedConfig,
        source: TensorSource,
        checkpoint: str,
        family: Family,
        dtype: torch.dtype | None,
    ) -> None:
        self._config = config
        self._source = source
        self._checkpoint = checkpoint
        self._family = family
        self._dtypes = Dtypes.guess(dtype, getattr(config, "dtype", None))
        self._names: NameMap | None = None

    def draw(self, spec: ComponentSpec) -> Blueprint:
        """Draw one: a second time where its tensors turn out to want another dtype."""
        blueprint = self._draw(spec)
        dtypes = self._dtypes.rebuilt_as(blueprint.reads.dtype)
        if dtypes == self._dtypes:
            return blueprint
        self._dtypes = dtypes
        return self._draw(spec)

    def _draw(self, spec: ComponentSpec) -> Blueprint:
        config = copy.deepcopy(self._config)
        model = build_skeleton(config, self._checkpoint, self._dtypes.built_as)
        if self._names is None:
            self._names = map_names(model, self._source.names(), self._checkpoint)
        passage = prune(model, self._family, spec)
        check_tables(model, self._checkpoint)
        reads = plan_reads(model, self._names, self._source, self._checkpoint, self._dtypes)
        return Blueprint(model, self._family, passage, reads)


def build_part(
    config: PreTrainedConfig,
    spec: ComponentSpec,
    source: TensorSource,
    placement: Placement,
    *,
    checkpoint: str,
    progress: Progress | None = None,
    family: Family | None = None,
) -> SplitModel:
    """Build one part, in evaluation mode.

    Peak memory: the part plus two tensors, where tensors must be cast, moved or copied; otherwise
    only what the mapped pages take that are touched.  With a quantization: the packed part plus two
    tensors, as they are stored and as they are computed with.

    Args:
        config: The whole model's Hugging Face config.
        spec: Which layers and ends the part owns.
        source: Where the tensors are; stays open.
        placement: Device, dtype, quantization, and whether weights may stay mapped.
        checkpoint: Names the source in errors.
        progress: See `materialize`; called too while tensors are fetched.
        family: How the architecture is built; looked up by the config's type when left out.

    Raises:
        CheckpointError: (a `ValueError`) The source lacks a tensor, has one of the wrong shape,
            or one that nothing has a place for; names them all.
        QuantizationError: (a `ValueError`) Weights can't be packed as `placement` asks.
    """
    blueprint = draw(config, spec, source, checkpoint, family, placement.dtype)
    model = blueprint.model
    packing = plan_packing(model, blueprint.family, spec, blueprint.reads, placement)
    report = NeverBack(progress) if progress is not None else None
    source.prepare(blueprint.reads.stored, report)
    enter_stage(report, LoadStage.READING)
    materialize(model, blueprint.reads, source, placement, report, packing)
    part = SplitModel(model, spec, blueprint.family, blueprint.passage)
    model.config.dtype = dtype_name(blueprint.reads.dtype)
    if packing is not None:
        part.note_packing(packing)
        return_freed_memory()
        logger.info("%s of %s, %s", spec.name, checkpoint, packing)
    if packing is not None or any(recipe.converter for recipe in blueprint.reads.recipes.values()):
        collapse()  # what kernels have packed, and converters made, is where they had it
    return part

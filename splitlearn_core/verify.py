"""Compare the parts of a model with the unsplit model, on seeded random input.

    logits            one forward of whole sequences
    hidden states     what leaves each part in that forward: the first that differs names the part
    cached decode     a prefill, then steps that go on from each part's cache
    padded batch      the same with rows padded on the left, and their mask
    greedy generate   transformers' own `generate`
    gradients         of a parameter of every part, by the loss of the logits

In float32 on a CPU parts give what the unsplit model gives to the bit, so `tolerance` is 0.
Both run in this process, one after the other, so at the same number of threads.

Where the unsplit model does not fit into memory, one layer of it is there at a time (see
`splitlearn_core.streamed`), and one part; generating, which reads the model once for each token, is
left out then.
"""

from __future__ import annotations

import copy
import gc
import logging
import math
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from splitlearn_core.builder import build_part, draw
from splitlearn_core.causal_lm import SplitCausalLM
from splitlearn_core.devices import check_device
from splitlearn_core.dtypes import as_dtype, dtype_name
from splitlearn_core.estimate import estimate_part
from splitlearn_core.factory import AUTO, find_model
from splitlearn_core.loading.files import stored_config
from splitlearn_core.loading.materialize import Placement
from splitlearn_core.loading.opening import open_source
from splitlearn_core.loading.whole import load_whole_model
from splitlearn_core.machine import cuda_memory, host_memory
from splitlearn_core.part_folder import load_part
from splitlearn_core.part_manifest import saved_parts
from splitlearn_core.plan import FULL, SplitPlan
from splitlearn_core.shape import shape_of
from splitlearn_core.skeleton import build_skeleton
from splitlearn_core.streamed import StreamedModel
from splitlearn_core.subjects import Chain, PartByPart, Unsplit, parameters_to_differentiate
from splitlearn_core.trial import CHECKS, Trial

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from splitlearn_core.factory import OpenModel
    from splitlearn_core.loading.sources import TensorSource
    from splitlearn_core.plan import ComponentSpec
    from splitlearn_core.split_model import SplitModel
    from splitlearn_core.trial import Answers

logger = logging.getLogger(__name__)

EQUAL = "equal"
CLOSE = "within tolerance"
DIFFERENT = "different"
SKIPPED = "skipped"

WHOLE = "whole"
LAYERWISE = "layerwise"

_WHY_SKIPPED = "layer by layer it would read the model once for each token"


@dataclass(frozen=True)
class Check:
    """What one comparison found.

    Attributes:
        name: One of those in this module's first lines.
        status: `equal` (to the bit), `within tolerance`, `different` or `skipped`.
        compared: How many values were compared.
        max_abs_difference: The largest; `None` where there is none to give.
        largest: The largest absolute value of the unsplit model's, to measure that by.
        detail: Where they differ, or why nothing was compared.
    """

    name: str
    status: str
    compared: int = 0
    max_abs_difference: float | None = None
    largest: float | None = None
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether this is no reason to distrust the parts."""
        return self.status != DIFFERENT


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found, and under which conditions.

    Attributes:
        model: Folder or hub name.
        model_type: Architecture.
        components: The parts that were compared.
        split_points: Where they are cut.
        dtype: Of the weights.
        device: Where both ran.
        mode: `whole`, or `layerwise`: one layer of the unsplit model in memory at a time.
        reason: Why that mode.
        tolerance: Largest difference that passes.
        seed: Of the inputs.
        batch: Their rows.
        length: Their length.
        threads: Of torch's operators.
        seconds: It took in all.
        checks: What was compared.
    """

    model: str
    model_type: str
    components: tuple[str, ...]
    split_points: tuple[int, ...]
    dtype: str
    device: str
    mode: str
    reason: str
    tolerance: float
    seed: int
    batch: int
    length: int
    threads: int
    seconds: float
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether no check found a difference beyond the tolerance."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return all figures, for JSON."""
        return {"passed": self.passed, **asdict(self)}


def verify(
    model_name_or_path: str | os.PathLike[str],
    split_points: Iterable[int] | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    model_type: str = AUTO,
    device: str | torch.device = "cpu",
    parts: str | os.PathLike[str] | None = None,
    batch: int = 2,
    length: int = 8,
    new_tokens: int = 8,
    seed: int = 0,
    tolerance: float = 0.0,
    layerwise: bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    allow_empty: bool = False,
    token: str | bool | None = None,
    allow_uncertified: bool = False,
    minimind: Mapping[str, Any] | None = None,
) -> VerifyReport:
    """Compare parts with the unsplit model.

    Args:
        model_name_or_path: Folder, `builtin:NAME`, hub name, or weights file.
        split_points: Layer numbers of the cuts; not needed where `parts` is given.
        dtype: Cast both to this; `None` keeps what is stored.
        model_type: Architecture; `auto` takes the config's.
        device: Where both run.
        parts: Folder with saved parts (`splitlearn split`), to be compared in the place of parts
            that are loaded from the checkpoint.
        batch: Rows of the input, at least 2.
        length: Their length, at least 6.
        new_tokens: How many to generate.
        seed: Makes the input repeatable.
        tolerance: Largest absolute difference that passes.
        layerwise: Hold one layer of the unsplit model at a time; `None` does so where the whole
            does not fit into the memory that is available.
        cache_dir: Where files from the hub are kept.
        revision: Branch, tag or commit on the hub.
        allow_empty: Let Bottom or Top have no layers.
        token: For the hub; `None` uses `HF_TOKEN` or the login.
        allow_uncertified: Let in an architecture that was not certified.
        minimind: As in `load_component`.

    Returns:
        The figures; that parts are different is no error here.

    Raises:
        ModelSourceError, CheckpointError, UnsupportedModelError, ValueError: As `load_component`.
    """
    start = time.monotonic()
    placement = Placement(check_device(device), as_dtype(dtype))
    model = find_model(
        model_name_or_path,
        model_type=model_type,
        cache_dir=cache_dir,
        revision=revision,
        token=token,
        allow_uncertified=allow_uncertified,
        minimind=minimind,
    )
    plan, saved = _plan(model, split_points, parts, allow_empty=allow_empty)
    trial = Trial.make(
        _vocabulary(model), batch=batch, length=length, new_tokens=new_tokens, seed=seed
    )
    if layerwise is None:
        layerwise, reason = _choose(model, placement)
    else:
        reason = "asked for"
    comparison = _Comparison(model, plan, saved, placement)
    with torch.inference_mode(mode=False), torch.enable_grad():
        checks = comparison.run(trial, tolerance, layerwise=layerwise)
    return VerifyReport(
        model=model.description,
        model_type=model.config.model_type,
        components=plan.names,
        split_points=tuple(spec.end_layer for spec in plan.components[:-1]),
        dtype=dtype_name(comparison.dtype),
        device=str(placement.device),
        mode=LAYERWISE if layerwise else WHOLE,
        reason=reason,
        tolerance=tolerance,
        seed=seed,
        batch=batch,
        length=length,
        threads=torch.get_num_threads(),
        seconds=time.monotonic() - start,
        checks=tuple(checks),
    )


class _Comparison:
    """The unsplit model and its parts, each loaded when its turn comes and let go after it."""

    def __init__(
        self,
        model: OpenModel,
        plan: SplitPlan,
        saved: Mapping[str, Path],
        placement: Placement,
    ) -> None:
        self._model = model
        self._plan = plan
        self._saved = saved
        self._placement = placement
        self._family = model.family
        skeleton = build_skeleton(copy.deepcopy(model.config))
        self._parameters = parameters_to_differentiate(skeleton, self._family, plan)
        self.dtype = placement.dtype or torch.float32

    def run(self, trial: Trial, tolerance: float, *, layerwise: bool) -> list[Check]:
        """Ask the unsplit model, then the parts, and compare."""
        logger.info("asking the unsplit model of %s", self._model.description)
        expected = self._ask_streamed(trial) if layerwise else self._ask_unsplit(trial)
        gc.collect()  # transformers' models hold themselves in cycles
        logger.info("asking the parts: %s", ", ".join(self._plan.names))
        produced = self._ask_one_by_one(trial) if layerwise else self._ask_chain(trial)
        return compare(expected, produced, tolerance)

    def _ask_unsplit(self, trial: Trial) -> Answers:
        model = self._model
        unsplit = load_whole_model(model.files, model.config, self._placement.dtype, self._family)
        unsplit.to(self._placement.device)  # type: ignore[arg-type]  # wrapped by transformers
        self.dtype = unsplit.dtype
        subject = Unsplit(unsplit, self._family, self._plan, self._parameters)
        return subject.ask(trial, generate=True)

    def _ask_streamed(self, trial: Trial) -> Answers:
        with closing(open_source(self._model.files)) as source:
            streamed = StreamedModel(
                self._model.config,
                self._model.num_layers,
                source,
                self._placement,
                checkpoint=self._model.description,
                family=self._family,
                kept=self._parameters.values(),
            )
            subject = Unsplit(
                streamed.model,
                self._family,
                self._plan,
                self._parameters,
                streamed.differentiable,
            )
            self.dtype = streamed.dtype
            return subject.ask(trial, generate=False)

    def _ask_chain(self, trial: Trial) -> Answers:
        with closing(open_source(self._model.files)) as source:
            bottom, *trunks, top = [self._load(spec, source) for spec in self._plan.components]
        return Chain(SplitCausalLM(bottom, trunks, top), self._parameters).ask(trial)

    def _ask_one_by_one(self, trial: Trial) -> Answers:
        with closing(open_source(self._model.files)) as source:
            load = partial(self._load, source=source)
            return PartByPart(load, self._plan, self._parameters).ask(trial)

    def _load(self, spec: ComponentSpec, source: TensorSource) -> SplitModel:
        """Load a part, from where it was saved if it was."""
        if spec.name in self._saved:
            return load_part(
                self._saved[spec.name],
                device=self._placement.device,
                dtype=self._placement.dtype,
                allow_uncertified=self._model.allow_uncertified,
            )
        checkpoint = self._model.description
        return build_part(
            self._model.config,
            spec,
            source,
            self._placement,
            checkpoint=checkpoint,
            family=self._family,
        )


def compare(expected: Answers, produced: Answers, tolerance: float) -> list[Check]:
    """Compare what the unsplit model and its parts made of a trial, check by check."""
    return [_check(name, expected, produced, tolerance) for name in CHECKS]


def _check(name: str, expected: Answers, produced: Answers, tolerance: float) -> Check:
    """Compare one check, or say why not."""
    if name in expected.failures:
        detail = f"the unsplit model itself can't do this ({expected.failures[name]})"
        return Check(name, SKIPPED, detail=detail)
    if name in produced.failures:
        detail = f"the parts can't do what the unsplit model does ({produced.failures[name]})"
        return Check(name, DIFFERENT, detail=detail)
    if name not in expected.results:
        return Check(name, SKIPPED, detail=_WHY_SKIPPED)
    return _compare(name, expected.results[name], produced.results[name], tolerance)


def _compare(
    name: str,
    expected: Mapping[str, torch.Tensor],
    produced: Mapping[str, torch.Tensor],
    tolerance: float,
) -> Check:
    """Compare the tensors of one check."""
    if not expected:
        return Check(name, SKIPPED, detail="nothing to compare: every weight is tied")
    count = sum(tensor.numel() for tensor in expected.values())
    largest = max(_largest(tensor) for tensor in expected.values())
    if any(tensor.isnan().any() for tensor in expected.values()):
        detail = "the unsplit model's own values are not numbers (NaN)"
        return Check(name, DIFFERENT, count, None, None, detail)
    unequal = [key for key in expected if not _same(expected[key], produced.get(key))]
    if not unequal:
        return Check(name, EQUAL, count, 0.0, largest)
    differences = [_difference(expected[key], produced.get(key)) for key in unequal]
    known = [difference for difference in differences if difference is not None]
    most = max(known) if len(known) == len(unequal) else None
    close = most is not None and most <= tolerance
    detail = f"first at {unequal[0]}; {len(unequal)} of {len(expected)} tensors differ"
    return Check(name, CLOSE if close else DIFFERENT, count, most, largest, detail)


def _same(expected: torch.Tensor, produced: torch.Tensor | None) -> bool:
    """Whether two tensors are equal to the bit, shape and dtype included."""
    return (
        produced is not None
        and produced.dtype == expected.dtype
        and torch.equal(produced, expected)
    )


def _difference(expected: torch.Tensor, produced: torch.Tensor | None) -> float | None:
    """Return the largest absolute difference; `None` where shapes or numbers don't admit one."""
    if produced is None or produced.shape != expected.shape or not expected.is_floating_point():
        return None
    difference = (produced.double() - expected.double()).abs().max().item()
    return None if math.isnan(difference) else difference


def _largest(tensor: torch.Tensor) -> float:
    """Return the largest absolute value."""
    return tensor.double().abs().max().item() if tensor.numel() else 0.0


def _plan(
    model: OpenModel,
    split_points: Iterable[int] | None,
    parts: str | os.PathLike[str] | None,
    *,
    allow_empty: bool,
) -> tuple[SplitPlan, dict[str, Path]]:
    """Return where the model is cut, and the folders of saved parts by name."""
    if parts is None:
        if split_points is None:
            raise ValueError("verifying needs split_points, as in [8, 24], or saved parts")
        return SplitPlan.from_split_points(
            model.num_layers, split_points, allow_empty=allow_empty
        ), {}
    found = saved_parts(parts)
    plan = SplitPlan(model.num_layers, tuple(found))
    points = [spec.end_layer for spec in plan.components[:-1]]
    if split_points is not None and list(split_points) != points:
        raise ValueError(f"the parts in {parts} are cut at {points}, not at {list(split_points)}")
    SplitPlan.from_split_points(model.num_layers, points, allow_empty=True)
    return plan, {spec.name: folder for spec, folder in found.items()}


def _vocabulary(model: OpenModel) -> int:
    """Return the number of token ids."""
    return shape_of(*stored_config(model.files), lambda _: model.family).vocab_size


def _choose(model: OpenModel, placement: Placement) -> tuple[bool, str]:
    """Decide whether the unsplit model fits, and say why."""
    whole = SplitPlan.whole(model.num_layers).component(FULL)
    with closing(open_source(model.files)) as source:
        blueprint = draw(
            model.config, whole, source, model.description, model.family, placement.dtype
        )
    needed = estimate_part(blueprint, placement).peak_bytes
    on_host = placement.device.type != "cuda"
    memory = host_memory() if on_host else cuda_memory(placement.device.index or 0)
    figures = f"the whole model needs {needed:,} bytes, {memory.available:,} are available"
    return needed > memory.available, figures

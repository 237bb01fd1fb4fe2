"""From a model's name to its parts: plan, choose a strategy, build."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from splitlearn_core.builder import build_part, draw
from splitlearn_core.checkpoint.minimind import MINIMIND
from splitlearn_core.devices import check_device, resolve_devices
from splitlearn_core.dtypes import as_dtype
from splitlearn_core.estimate import MemoryEstimate, estimate_part
from splitlearn_core.families import KNOWN_TYPES, Family, family_of
from splitlearn_core.kv_cache import kv_bytes_per_token
from splitlearn_core.loading.files import CheckpointFiles, find_files, local_config
from splitlearn_core.loading.generation import generation_config_for
from splitlearn_core.loading.materialize import Placement
from splitlearn_core.loading.minimind_files import as_minimind
from splitlearn_core.loading.opening import open_source
from splitlearn_core.loading.packing import plan_packing
from splitlearn_core.loading.stages import Progress
from splitlearn_core.loading.whole import open_whole_model
from splitlearn_core.plan import FULL, TRUNK, ComponentSpec, SplitPlan
from splitlearn_core.quantization import check_quantization
from splitlearn_core.skeleton import load_config, make_config
from splitlearn_core.uncertified import any_family
from splitlearn_core.utils.memory import MemoryTracker
from splitlearn_core.utils.storage import StorageManager

if TYPE_CHECKING:
    import os

    import torch
    from transformers import PreTrainedConfig

    from splitlearn_core.devices import DeviceMap
    from splitlearn_core.loading.sources import TensorSource
    from splitlearn_core.split_model import SplitModel

    Parts = tuple[SplitModel | None, SplitModel | list[SplitModel] | None, SplitModel | None]

logger = logging.getLogger(__name__)

AUTO = "auto"


@dataclass(frozen=True)
class OpenModel:
    """A model that was found: its files, config and architecture, nothing of its weights."""

    files: CheckpointFiles
    config: PreTrainedConfig
    family: Family
    allow_uncertified: bool = False

    @property
    def description(self) -> str:
        """The folder or hub name."""
        return self.files.description

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return int(self.config.get_text_config(decoder=True).num_hidden_layers)


def find_model(
    model_name_or_path: str | os.PathLike[str],
    *,
    model_type: str = AUTO,
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    progress_bar: bool = False,
    allow_uncertified: bool = False,
    minimind: Mapping[str, Any] | None = None,
) -> OpenModel:
    """Find a model and read its config; arguments as in `find_files` and `load_component`.

    Raises:
        ModelSourceError: (a `FileNotFoundError`) There is no model of that name.
        UnsupportedModelError: (a `KeyError`) The architecture is not known.
        ValueError: The config is of another `model_type` than was asked for.
    """
    find_family = any_family if allow_uncertified else family_of
    if model_type not in {AUTO, MINIMIND}:
        find_family(model_type)
    files: CheckpointFiles = find_files(
        model_name_or_path,
        cache_dir=cache_dir,
        revision=revision,
        token=token,
        progress_bar=progress_bar,
    )
    if (theirs := as_minimind(files, model_type, minimind)) is not None:
        config = make_config(theirs.model.config, theirs.description, find_family)
        config.name_or_path = theirs.description
        return OpenModel(theirs, config, find_family(config.model_type), allow_uncertified)
    config = load_config(local_config(files), find_family)
    if model_type not in {AUTO, config.model_type}:
        raise ValueError(
            f"{files.description} is a {config.model_type} model, not {model_type}; use that type,"
            f" or '{AUTO}'"
        )
    return OpenModel(files, config, find_family(config.model_type), allow_uncertified)


def load_component(
    model_name_or_path: str | os.PathLike[str],
    component: str,
    split_points: Iterable[int] | None = None,
    *,
    model_type: str = AUTO,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    allow_empty: bool = False,
    mmap: bool = True,
    progress: Progress | None = None,
    token: str | bool | None = None,
    verbose: bool = False,
    allow_uncertified: bool = False,
    quantization: str | None = None,
    minimind: Mapping[str, Any] | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> SplitModel:
    """Load one part, from the open checkpoint, with that part's memory alone.

    Args:
        model_name_or_path: Folder, `builtin:NAME`, hub name, or weights file.
        component: `bottom`, `trunk`, `trunk-0`, …, `top` or `full`.
        split_points: Layer numbers of the cuts; not needed for `full`.
        model_type: Architecture; `auto` takes the config's; `minimind`, see `docs/checkpoints.md`.
        device: Where the weights go.
        dtype: Cast to this; `None` keeps what is stored.
        cache_dir: Where files from the hub are kept.
        revision: Branch, tag or commit on the hub.
        allow_empty: Let Bottom or Top have no layers.
        mmap: Let the weights stay views of the file, where nothing must change.  A file that is
            then overwritten in place changes them; one that is replaced does not.
        progress: Called with (bytes done, bytes in all) between tensors, and while they are
            fetched; what it raises ends the load and leaves nothing behind, but what has come in
            from a hub, for the next time.
        token: For the hub; `None` uses `HF_TOKEN` or the login.
        verbose: Show a bar while something is fetched.
        allow_uncertified: Let in an architecture that was not certified, as its own forward shows
            it to be built.
        quantization: `prepacked`, `fp16` or `int8`: keep the linear layers packed for fast
            inference on a CPU, see `splitlearn_core.quantization`; `None` changes nothing.
        minimind: Of a MiniMind file, what it does not tell: `num_attention_heads`, `rope_theta`,
            `rms_norm_eps`, …; MiniMind's defaults hold otherwise.
        adapter: A LoRA adapter (peft's folder, or MiniMind's file) whose change is added into the
            weights; of a part, its own share of the whole model's adapter.

    Raises:
        ModelSourceError: (a `FileNotFoundError`) There is no such model, or no such adapter.
        CheckpointError: (a `ValueError`) The checkpoint is damaged or incomplete.
        FetchError: (a `ConnectionError`) The hub failed, again and again.
        StorageError: (an `OSError`) What comes from the hub can't be written.
        UnsupportedModelError: (a `KeyError`) The architecture is not known, or is not certified and
            `allow_uncertified` was not given, or is no chain of layers.
        QuantizationError: (a `ValueError`) The weights, their dtype or this machine don't go with
            `quantization`.
        ValueError: Bad split points, dtype, device or quantization.
        KeyError: No component of that name.
    """
    placement = _placement(device, dtype, quantization, mmap=mmap)
    _check_adapter(adapter, quantization)
    model = find_model(
        model_name_or_path,
        model_type=model_type,
        cache_dir=cache_dir,
        revision=revision,
        token=token,
        progress_bar=verbose,
        allow_uncertified=allow_uncertified,
        minimind=minimind,
    )
    spec = component_spec(model, component, split_points, allow_empty=allow_empty)
    settings = generation_config_for(spec, model.files)
    with closing(open_source(model.files)) as source:
        part = build_part(
            model.config,
            spec,
            source,
            placement,
            checkpoint=model.description,
            progress=progress,
            family=model.family,
        )
    if settings is not None:
        part.model.generation_config = settings
    if adapter is not None:
        from splitlearn_core.checkpoint.lora import fold_lora  # noqa: PLC0415 - needs peft

        fold_lora(part, adapter)
    return part


def estimate_component(
    model_name_or_path: str | os.PathLike[str],
    component: str,
    split_points: Iterable[int] | None = None,
    *,
    model_type: str = AUTO,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    allow_empty: bool = False,
    mmap: bool = True,
    token: str | bool | None = None,
    allow_uncertified: bool = False,
    quantization: str | None = None,
    warm_up_positions: int = 0,
    cached_positions: int = 0,
    minimind: Mapping[str, Any] | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> MemoryEstimate:
    """Return what `load_component` with the same arguments will need, from headers alone.

    With `warm_up_positions`, a forward of so many positions after it counts as well; with
    `cached_positions`, memory for caches that hold as many, as `SplitModel.graph_steps` takes it.

    It raises what `load_component` would raise, but for weights that turn out to be unreadable.
    """
    placement = _placement(device, dtype, quantization, mmap=mmap)
    _check_adapter(adapter, quantization)
    model = find_model(
        model_name_or_path,
        model_type=model_type,
        cache_dir=cache_dir,
        revision=revision,
        token=token,
        allow_uncertified=allow_uncertified,
        minimind=minimind,
    )
    spec = component_spec(model, component, split_points, allow_empty=allow_empty)
    with closing(open_source(model.files)) as source:
        blueprint = draw(
            model.config, spec, source, model.description, model.family, placement.dtype
        )
        packing = plan_packing(blueprint.model, blueprint.family, spec, blueprint.reads, placement)
        width = blueprint.model.dtype.itemsize
        kept = kv_bytes_per_token(blueprint.model, blueprint.family, spec, width) or 0
        estimate = estimate_part(
            blueprint, placement, packing, warm_up_positions, cached_positions * kept
        )
    if adapter is None:
        return estimate
    from splitlearn_core.checkpoint.adapters.folder import folding_nbytes  # noqa: PLC0415

    return replace(estimate, peak_bytes=estimate.peak_bytes + folding_nbytes(adapter))


def _check_adapter(adapter: str | os.PathLike[str] | None, quantization: str | None) -> None:
    """Refuse to pack weights that are still to be changed."""
    if adapter is not None and quantization is not None:
        raise ValueError(
            "an adapter can't be added into packed weights: merge it first (merge_lora,"
            " save_weights), and load what was saved with quantization"
        )


def _placement(
    device: str | torch.device,
    dtype: torch.dtype | str | None,
    quantization: str | None,
    *,
    mmap: bool,
) -> Placement:
    """Return what becomes of tensors, its values checked."""
    checked = check_device(device)
    return Placement(checked, as_dtype(dtype), mmap, check_quantization(quantization, checked.type))


def component_spec(
    model: OpenModel, component: str, split_points: Iterable[int] | None, *, allow_empty: bool
) -> ComponentSpec:
    """Return the component of the plan that the split points make."""
    if split_points is None:
        if component != FULL:
            raise ValueError(f"component {component!r} needs split_points, as in [8, 24]")
        return SplitPlan.whole(model.num_layers).component(FULL)
    plan = SplitPlan.from_split_points(model.num_layers, split_points, allow_empty=allow_empty)
    return plan.component(component)


class ModelFactory:
    """Makes parts; the door that the quick-start functions and the manager go through."""

    @staticmethod
    def create_split_models(
        model_type: str,
        model_name_or_path: str | os.PathLike[str],
        split_point_1: int,
        split_point_2: int,
        device: str | torch.device = "cpu",
        device_map: DeviceMap = None,
        low_memory: bool = False,
        verbose: bool = False,
        storage_path: str | os.PathLike[str] | None = None,
        auto_save: bool = False,
        parts: Iterable[str] | None = None,
        dtype: torch.dtype | str | None = None,
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        allow_empty: bool = False,
        mmap: bool = True,
        more_split_points: Sequence[int] = (),
        token: str | bool | None = None,
        allow_uncertified: bool = False,
        quantization: str | None = None,
        minimind: Mapping[str, Any] | None = None,
    ) -> Parts:
        """Cut a model into Bottom, Trunk and Top.

        Args:
            model_type: Architecture (`gpt2`, `llama`, `qwen2`), or `auto`.
            model_name_or_path: Folder, `builtin:NAME`, hub name, or weights file.
            split_point_1: First layer of the Trunk.
            split_point_2: First layer of Top.
            device: Device of every part that `device_map` does not name.
            device_map: `None`, `"auto"`, or part name -> device; see `splitlearn_core.devices`.
            low_memory: Read each part from the open checkpoint (incremental).  Otherwise, where
                all parts are wanted, the whole model is loaded first (traditional).
            verbose: Print a line with the memory in use after each part, and show a bar while
                something is fetched.
            storage_path: Where `auto_save` saves: one folder per part.
            auto_save: Save the parts.
            parts: Names of the parts wanted; the others come back as `None`, and are never built.
            dtype: Cast the weights to this; `None` keeps what is stored.
            cache_dir: Where files from the hub are kept.
            revision: Branch, tag or commit on the hub.
            allow_empty: Let Bottom or Top have no layers.
            mmap: Let weights stay views of their file, where nothing must change.
            more_split_points: Further cuts; each makes one more Trunk.
            token: For the hub; `None` uses `HF_TOKEN` or the login.
            allow_uncertified: Let in an architecture that was not certified.
            quantization: As in `load_component`, for every part; the parts then come from the open
                checkpoint, whatever `low_memory` says.
            minimind: As in `load_component`.

        Returns:
            (bottom, trunk, top) in evaluation mode; with more split points `trunk` is a list.

        Raises:
            KeyError: Unknown architecture, or an unknown name in `parts`.
            ValueError: Bad split points, device or dtype; a damaged checkpoint.
            FileNotFoundError: No such model.
        """
        model = find_model(
            model_name_or_path,
            model_type=model_type,
            cache_dir=cache_dir,
            revision=revision,
            token=token,
            progress_bar=verbose,
            allow_uncertified=allow_uncertified,
            minimind=minimind,
        )
        points = (split_point_1, split_point_2, *more_split_points)
        plan = SplitPlan.from_split_points(model.num_layers, points, allow_empty=allow_empty)
        if auto_save and storage_path is None:
            raise ValueError("auto_save=True needs storage_path, the folder to save the parts in")
        if auto_save and quantization is not None:
            raise ValueError("auto_save=True can't save packed weights: leave quantization out")
        wanted = _wanted(plan, parts)
        devices = resolve_devices(plan, device, device_map)
        resolved = as_dtype(dtype)
        placements = {
            name: _placement(devices[name], resolved, quantization, mmap=mmap)
            for name in plan.names
        }
        by_tensor = low_memory or quantization is not None
        with closing(_choose_source(model, wanted, plan, resolved, low_memory=by_tensor)) as source:
            built = _build_all(model, wanted, source, placements, MemoryTracker(verbose=verbose))
        if auto_save and storage_path is not None:
            _save_all(built, storage_path)
        return _as_triple(plan, built)

    @staticmethod
    def list_available_models() -> list[str]:
        """Return the architectures that can be split."""
        return list(KNOWN_TYPES)


def _wanted(plan: SplitPlan, parts: Iterable[str] | None) -> list[ComponentSpec]:
    """Return the components that are asked for; `trunk` means every Trunk."""
    if parts is None:
        return list(plan.components)
    names = {parts} if isinstance(parts, str) else set(parts)
    known = {*plan.names, TRUNK}
    if unknown := sorted(names - known):
        raise KeyError(f"parts names {unknown}; the components are {', '.join(plan.names)}")
    return [spec for spec in plan.components if {spec.name, spec.kind} & names]


def _choose_source(
    model: OpenModel,
    wanted: list[ComponentSpec],
    plan: SplitPlan,
    dtype: torch.dtype | None,
    *,
    low_memory: bool,
) -> TensorSource:
    """Open the checkpoint (incremental), or load the whole model first (traditional)."""
    if low_memory or len(wanted) < len(plan.components):
        reason = "low_memory or quantization" if low_memory else "only some parts are wanted"
        logger.info("incremental loading of %s: %s", model.description, reason)
        return open_source(model.files)
    logger.info("traditional loading of %s: all parts, low_memory=False", model.description)
    return open_whole_model(model.files, model.config, dtype, model.family)


def _build_all(
    model: OpenModel,
    wanted: list[ComponentSpec],
    source: TensorSource,
    placements: dict[str, Placement],
    tracker: MemoryTracker,
) -> dict[str, SplitModel]:
    """Build the wanted parts one after the other."""
    built: dict[str, SplitModel] = {}
    tracker.snapshot("start")
    for spec in wanted:
        tracker.say(f"Loading component: {_describe(spec)}")
        settings = generation_config_for(spec, model.files)
        built[spec.name] = build_part(
            model.config,
            spec,
            source,
            placements[spec.name],
            checkpoint=model.description,
            family=model.family,
        )
        if settings is not None:
            built[spec.name].model.generation_config = settings
        tracker.snapshot(f"{spec.name} loaded")
        tracker.report()
    return built


def _describe(spec: ComponentSpec) -> str:
    """Return `bottom (layers 0-7 + embedding)`."""
    layers = f"layers {spec.start_layer}-{spec.end_layer - 1}" if spec.num_layers else "no layers"
    ends = (" + embedding" if spec.is_first else "") + (" + head" if spec.is_last else "")
    return f"{spec.name} ({layers}{ends})"


def _save_all(built: dict[str, SplitModel], storage_path: str | os.PathLike[str]) -> None:
    """Save each part in a folder of its own."""
    for name, part in built.items():
        part.save(StorageManager.get_split_model_path(storage_path, name))


def _as_triple(plan: SplitPlan, built: dict[str, SplitModel]) -> Parts:
    """Return (bottom, trunk, top), with a list of Trunks where there are several."""
    trunks = [built[spec.name] for spec in plan.trunks if spec.name in built]
    several = len(plan.trunks) > 1
    trunk = (trunks if several else trunks[0]) if trunks else None
    return built.get("bottom"), trunk, built.get("top")

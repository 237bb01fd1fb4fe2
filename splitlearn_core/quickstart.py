"""The short way: one call for what most people want."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from splitlearn_core.devices import check_device
from splitlearn_core.dtypes import as_dtype
from splitlearn_core.errors import CheckpointError
from splitlearn_core.factory import AUTO, ModelFactory, find_model, load_component
from splitlearn_core.loading.whole import load_whole_model
from splitlearn_core.messages import in_one_line
from splitlearn_core.plan import BOTTOM, TOP, check_split_points, layer_number
from splitlearn_core.regular_files import open_regular

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

    import torch
    from transformers import PreTrainedModel

    from splitlearn_core.devices import DeviceMap
    from splitlearn_core.factory import Parts
    from splitlearn_core.loading.files import CheckpointFiles
    from splitlearn_core.split_model import SplitModel

# What a bare architecture's name means, where no model is named.
DEFAULT_MODELS = {
    "gpt2": "gpt2",
    "llama": "meta-llama/Llama-3.2-1B",
    "qwen2": "Qwen/Qwen2-0.5B",
}


def load_split_model(
    model_type: str,
    split_points: Iterable[int],
    model_name_or_path: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    low_memory: bool = False,
    verbose: bool = False,
    parts: Iterable[str] | None = None,
    dtype: torch.dtype | str | None = None,
    *,
    device_map: DeviceMap = None,
    revision: str | None = None,
    allow_empty: bool = False,
    mmap: bool = True,
    token: str | bool | None = None,
    allow_uncertified: bool = False,
    quantization: str | None = None,
    minimind: Mapping[str, Any] | None = None,
) -> Parts:
    """Cut a model at `split_points`; see `ModelFactory.create_split_models` for the rest.

    Args:
        model_type: Architecture, `minimind`, or `auto`.
        split_points: `[a, b]` makes three parts; each further point makes one more Trunk, and
            `trunk` a list.
        model_name_or_path: The model; the hub's usual one of that architecture when left out.
        cache_dir: Where files from the hub are kept; `$SPLITLEARN_CACHE_DIR`, or the user's cache
            folder, when left out.
        device: Device of every part; the CPU when left out.
        low_memory: Never load the whole model.
        verbose: Print the memory in use after each part, and show a bar while fetching.
        parts: Which parts to load; the others are `None`.
        dtype: Cast the weights to this.
        device_map: Part name -> device, or `auto`.
        revision: Branch, tag or commit on the hub.
        allow_empty: Let Bottom or Top have no layers.
        mmap: Let weights stay views of their file.
        token: For the hub; `HF_TOKEN` or the login when left out.
        allow_uncertified: Let in an architecture that was not certified, as its own forward shows
            it to be built.
        quantization: `prepacked`, `fp16` or `int8`, see `load_component`; `None` changes nothing.
        minimind: Of a MiniMind file, what it does not tell, see `load_component`.
    """
    first, second, *more = check_split_points(split_points)
    return ModelFactory.create_split_models(
        model_type,
        _name(model_type, model_name_or_path),
        first,
        second,
        device="cpu" if device is None else device,
        device_map=device_map,
        low_memory=low_memory,
        verbose=verbose,
        parts=parts,
        dtype=dtype,
        cache_dir=cache_dir,
        revision=revision,
        allow_empty=allow_empty,
        mmap=mmap,
        more_split_points=more,
        token=token,
        allow_uncertified=allow_uncertified,
        quantization=quantization,
        minimind=minimind,
    )


def load_full_model(
    model_name_or_path: str | os.PathLike[str] = "gpt2",
    cache_dir: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    allow_uncertified: bool = False,
    model_type: str = AUTO,
    minimind: Mapping[str, Any] | None = None,
) -> tuple[PreTrainedModel, Any]:
    """Load the unsplit model and its tokenizer, for comparison.

    Returns:
        transformers' model in evaluation mode, and its tokenizer (`None` where the folder has
        none).
    """
    target = check_device("cpu" if device is None else device)
    found = find_model(
        model_name_or_path,
        cache_dir=cache_dir,
        revision=revision,
        token=token,
        allow_uncertified=allow_uncertified,
        model_type=model_type,
        minimind=minimind,
    )
    model = load_whole_model(found.files, found.config, as_dtype(dtype), found.family)
    moved: PreTrainedModel = model.to(target)  # type: ignore[arg-type]
    return moved, _tokenizer(found.files)


def load_tokenizer(
    model_name_or_path: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    allow_uncertified: bool = False,
    model_type: str = AUTO,
    minimind: Mapping[str, Any] | None = None,
) -> Any:
    """Load a model's tokenizer, or return `None` where it has none."""
    found = find_model(
        model_name_or_path,
        cache_dir=cache_dir,
        revision=revision,
        token=token,
        allow_uncertified=allow_uncertified,
        model_type=model_type,
        minimind=minimind,
    )
    return _tokenizer(found.files)


def _tokenizer(files: CheckpointFiles) -> Any:
    from transformers import AutoTokenizer  # noqa: PLC0415 - slow, and not always needed

    wanted = ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "vocab.json")
    found = [name for name in (*wanted, "merges.txt", "tokenizer.model") if files.find(name)]
    if not found:
        return None
    for name in found:
        open_regular(files.fetch(name)).close()  # no git-lfs pointer, above all
    folder = files.fetch(found[0]).parent
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (AttributeError, LookupError, TypeError, ValueError, OSError) as error:
        if "trust_remote_code" in str(error):
            why = "it needs code that comes with the model (auto_map), which is never run"
        else:
            why = in_one_line(error)
        raise CheckpointError(
            f"the tokenizer in {folder} ({', '.join(found)}) can't be read: {why}"
        ) from error


def load_bottom_model(
    model_type: str,
    end_layer: int,
    model_name_or_path: str | os.PathLike[str] | None = None,
    **options: Any,
) -> SplitModel:
    """Load the Bottom that ends before layer `end_layer`; options as in `load_component`."""
    return _load_end(BOTTOM, model_type, end_layer, model_name_or_path, options)


def load_top_model(
    model_type: str,
    start_layer: int,
    model_name_or_path: str | os.PathLike[str] | None = None,
    **options: Any,
) -> SplitModel:
    """Load the Top that begins with layer `start_layer`; options as in `load_component`."""
    return _load_end(TOP, model_type, start_layer, model_name_or_path, options)


def _load_end(
    component: str,
    model_type: str,
    cut: int,
    model_name_or_path: str | os.PathLike[str] | None,
    options: dict[str, Any],
) -> SplitModel:
    """Load one end: where the other cut would be makes no difference to it."""
    name = _name(model_type, model_name_or_path)
    shared = ("cache_dir", "revision", "token", "allow_uncertified", "minimind")
    where = {key: options[key] for key in shared if key in options}
    layers = find_model(name, model_type=model_type, **where).num_layers
    cut = layer_number(cut)
    if not 0 < cut < layers:
        raise ValueError(f"layer {cut} is out of range: the model has {layers} layers")
    points = (cut, layers) if component == BOTTOM else (0, cut)
    return load_component(
        name, component, points, model_type=model_type, allow_empty=True, **options
    )


def _name(
    model_type: str, model_name_or_path: str | os.PathLike[str] | None
) -> str | os.PathLike[str]:
    """Return the model that is meant."""
    if model_name_or_path is not None:
        return model_name_or_path
    if model_type not in DEFAULT_MODELS:
        known = ", ".join(DEFAULT_MODELS)
        raise ValueError(
            f"model_type {model_type!r} names no model by itself ({known} do); give"
            " model_name_or_path"
        )
    return DEFAULT_MODELS[model_type]

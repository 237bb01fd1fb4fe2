"""`ModelConfig`: which model, which part of it, where and how."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import cached_property
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field

from splitlearn_core.checkpoint.minimind import MINIMIND
from splitlearn_core.families import KNOWN_TYPES
from splitlearn_core.plan import FULL, TRUNK
from splitlearn_core.quantization import check_quantization, dtype_refusal
from splitlearn_manager.config.fields import (
    ByteCount,
    Device,
    DType,
    ModelId,
    PathText,
    PlainMapping,
    Seconds,
)
from splitlearn_manager.config.options import PartOptions, PipelineOptions
from splitlearn_manager.config.section import build, found, section
from splitlearn_manager.config.yaml_file import read_file
from splitlearn_manager.errors import ConfigError, Problem

if TYPE_CHECKING:
    import os

AUTO = "auto"
PYTORCH = "pytorch"
HUGGINGFACE = "huggingface"
PIPELINE = "pipeline"
MODEL_TYPES = (AUTO, PYTORCH, HUGGINGFACE, PIPELINE, MINIMIND, *KNOWN_TYPES)
"""What `model_type` may be: four ways to find out, `minimind`, and the architectures by name."""

_NOT_OF_THE_LOAD = ("ttl", "pinned", "preload", "reload")
"""What may change without loading a model again."""

_SUFFIXES = (".pt", ".pth", ".bin")


def _model_type(value: Any) -> Any:
    """Refuse a type that nothing here can load."""
    if value not in MODEL_TYPES:
        raise ValueError(f"unknown model type; known are {', '.join(MODEL_TYPES)}")
    return value


@section
class ModelConfig:
    """One model of a manager; its values are checked when it is made.

    Attributes:
        model_id: The name it is served by: letters, digits, `.`, `_` and `-`.
        model_path: A folder, a hub name, `builtin:demo`, or for `pytorch` a file.  A relative path
            is relative to the working directory of the process, not to the file that names it.
        model_type: `auto` (as the checkpoint says), an architecture (`gpt2`, `llama`, …),
            `huggingface` (the whole model, if no component is named), `pytorch` (a `.pt`, `.pth`
            or `.bin` state dict with its `config.json` beside it), `minimind` (a file or folder of
            MiniMind's), or `pipeline`.
        device: `cpu`, `cuda`, `cuda:0`, … or `mps`.
        dtype: Name of the weights' dtype, or a `torch.dtype`; `None` keeps what is stored.
        warmup: Run one forward before the model counts as ready.
        config: The part, as `PartOptions` has it, or, for a pipeline, as `PipelineOptions` has it.
        kv_cache_memory: Bytes reserved with a Trunk for the KV caches of its sessions, which may
            then take so much and no more: `2GB`, `512MiB` or a number; `None` reserves nothing
            before, and sessions take what is free.
        ttl: Seconds without a use after which it is unloaded; `None` keeps it.
        pinned: Never unload it to make room for others; excludes `ttl`.
        preload: Load it when the daemon starts; otherwise only when somebody asks for it.
        reload: What a daemon does first when it must load it again: `load_first` (no gap, but both
            must fit) or `unload_first`.

    Raises:
        ConfigError: A value is of the wrong type or form, or a key is not known.
    """

    model_id: ModelId
    model_path: PathText
    model_type: Annotated[str, BeforeValidator(_model_type)] = AUTO
    device: Device = "cpu"
    dtype: DType = None
    warmup: bool = False
    config: PlainMapping = Field(default_factory=dict)
    kv_cache_memory: ByteCount | None = None
    ttl: Seconds | None = None
    pinned: bool = False
    preload: bool = True
    reload: Literal["load_first", "unload_first"] = "load_first"

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> Self:
        """Read and validate the configuration of one model.

        Raises:
            ConfigError: Names file, line, key, what was found and what was expected.
        """
        return read_file(path, cls.from_dict)

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Return the validated configuration that a mapping holds.

        Raises:
            ConfigError: It is no mapping, or not a valid configuration.
        """
        config = build(cls, data)
        config.validate()
        return config

    @cached_property
    def options(self) -> PartOptions | PipelineOptions:
        """What `config` says, typed and with its defaults.

        `component` is `trunk` where only split points are given, and `full` where nothing is.

        Raises:
            ConfigError: A key is not known, or a value is wrong.
        """
        kind: type[PartOptions | PipelineOptions] = PartOptions
        if self.model_type == PIPELINE:
            kind = PipelineOptions
        try:
            return build(kind, self._default_component() | self.config)
        except ConfigError as error:
            raise error.within("config") from None

    @property
    def part(self) -> PartOptions:
        """The options of a model that is a part.

        Raises:
            ConfigError: It is a pipeline.
        """
        if not isinstance(self.options, PartOptions):
            raise ConfigError(f"model {self.model_id!r} is a pipeline, not a part")
        return self.options

    @property
    def pipeline(self) -> PipelineOptions:
        """The options of a model that is a pipeline.

        Raises:
            ConfigError: It is a part.
        """
        if not isinstance(self.options, PipelineOptions):
            raise ConfigError(f"model {self.model_id!r} is a part, not a pipeline")
        return self.options

    def validate(self) -> None:
        """Check what the single values do not show: `config`, and what excludes each other.

        Raises:
            ConfigError: Something does not fit; nothing of the model is looked at yet.
        """
        suffix = PurePath(self.model_path).suffix
        if self.model_type == PYTORCH and suffix not in _SUFFIXES:
            message = f"must be a {', '.join(_SUFFIXES)} file for model_type pytorch"
            raise ConfigError(Problem(f"{message}, {found(self.model_path)}", ("model_path",)))
        if self.pinned and self.ttl is not None:
            message = "excludes pinned: a pinned model is never unloaded for want of use"
            raise ConfigError(Problem(f"{message}, {found(self.ttl)}", ("ttl",)))
        if self._is_ambiguous():
            message = "is needed: split_points alone don't say which part of a huggingface model"
            raise ConfigError(Problem(message, ("config", "component")))
        self._check_kv_cache_memory()
        self._check_quantization()
        self._check_cuda_graphs()

    def loads_like(self, other: ModelConfig) -> bool:
        """Whether loading either gives the same: they differ in what is done with it, if at all."""
        kept = {name: getattr(other, name) for name in _NOT_OF_THE_LOAD}
        return replace(self, **kept) == other

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain values, which `from_dict` takes."""
        return asdict(self)

    def _check_kv_cache_memory(self) -> None:
        """Check that what is reserved for sessions is something, and that there can be any."""
        if self.kv_cache_memory is None:
            return
        options, refusal = self.options, None
        if not isinstance(options, PartOptions) or not options.component.startswith(TRUNK):
            refusal = "is for a Trunk: only its sessions have KV caches here"
        elif not self.kv_cache_memory:
            refusal = "must be more than 0 bytes; leave it out to reserve nothing"
        if refusal is not None:
            problem = f"{refusal}, {found(self.kv_cache_memory)}"
            raise ConfigError(Problem(problem, ("kv_cache_memory",)))

    def _check_quantization(self) -> None:
        """Check that device and dtype, where one is given, go with the quantization."""
        quantization = self.options.quantization
        if quantization is None:
            return
        refusal = dtype_refusal(quantization, self.dtype) if self.dtype is not None else None
        if self.options.adapter is not None:
            refusal = "excludes adapter: merge it first, and load what was saved"
        try:
            check_quantization(quantization, self.device)
        except ValueError as error:
            refusal = str(error)
        if refusal is not None:
            raise ConfigError(Problem(refusal, ("config", "quantization")))

    def _check_cuda_graphs(self) -> None:
        """Check that they are for a Trunk, and on a GPU."""
        options, refusal = self.options, None
        if not isinstance(options, PartOptions) or options.cuda_graphs is None:
            return
        if not options.component.startswith(TRUNK):
            refusal = f"is for a Trunk, whose sessions step: not for {options.component}"
        elif not self.device.startswith("cuda"):
            refusal = f"is for a GPU (device: cuda), not for {self.device}"
        if refusal is not None:
            raise ConfigError(Problem(refusal, ("config", "cuda_graphs")))

    def _default_component(self) -> dict[str, Any]:
        """Return the component that is meant where none is named."""
        if self.model_type == PIPELINE:
            return {}
        return {"component": FULL if self.config.get("split_points") is None else TRUNK}

    def _is_ambiguous(self) -> bool:
        """Whether `huggingface`, which means the whole model, comes with cuts and no component."""
        cut = self.config.get("split_points") is not None
        return self.model_type == HUGGINGFACE and cut and "component" not in self.config

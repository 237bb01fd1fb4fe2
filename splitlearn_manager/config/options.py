"""What `ModelConfig.config` may hold, typed: one section for parts, one for pipelines."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator

from splitlearn_core.checkpoint.minimind import check_options
from splitlearn_core.plan import BOTTOM, FULL, TOP, TRUNK
from splitlearn_manager.config.fields import ByteCount, ModelId, PathText, SplitPoints, Text
from splitlearn_manager.config.retry import HISTORY_LIMIT, Retry, RetryPolicy
from splitlearn_manager.config.secrets import check_token_source
from splitlearn_manager.config.section import build, found, section
from splitlearn_manager.errors import ConfigError, Problem

_COMPONENT = re.compile(r"bottom|trunk(-\d{1,4})?|top|full", re.ASCII)
_SCHEMES = ("http", "https")


def check_address(address: Any) -> str:
    """Return the address of a daemon, such as `http://host:8000`.

    Raises:
        ValueError: It is none.
    """
    try:
        parts = urlsplit(address)
        good = parts.scheme in _SCHEMES and parts.hostname and (parts.port is None or parts.port)
        (parts.hostname or "").encode("idna")  # a name that DNS can have
    except (ValueError, AttributeError, TypeError):
        good = False
    if not good:
        raise ValueError("must be an address such as http://host:8000")
    return str(address)


def _addresses(value: Any) -> Any:
    """Return one address, or a list of them, as a tuple."""
    if value is None:
        return None
    addresses = value if isinstance(value, list | tuple) else [value]
    if not addresses:
        raise ValueError("must name at least one address")
    return tuple(map(check_address, addresses))


def _links(value: Any) -> Any:
    """Return the links of a chain, each checked as the section it is."""
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not value:
        raise ValueError("must be a list with a trunk and a trunk_model_id for each Trunk")
    return tuple(_link(number, item) for number, item in enumerate(value))


def _link(number: int, item: Any) -> TrunkLink:
    """Return one link of a chain."""
    try:
        return item if isinstance(item, TrunkLink) else build(TrunkLink, item)
    except ConfigError as error:
        raise error.within(number) from None


Addresses = Annotated[tuple[str, ...], BeforeValidator(_addresses)]


@section
class TrunkLink:
    """One Trunk of a pipeline that lives elsewhere.

    Attributes:
        trunk: Addresses that serve this Trunk, in the order in which they are tried;
            in a file also a single one.
        trunk_model_id: Its id there.
    """

    trunk: Addresses
    trunk_model_id: ModelId = TRUNK


Chain = Annotated[tuple[TrunkLink, ...], BeforeValidator(_links)]


def _minimind(value: Any) -> Any:
    """Check the options of a MiniMind file by themselves; the file is not looked at yet."""
    return check_options(value) if isinstance(value, Mapping) else value


MiniMindOptions = Annotated[dict[str, Any], BeforeValidator(_minimind)]

Quantization = Literal["prepacked", "fp16", "int8"]
"""See `splitlearn_core.quantization`."""


@section
class CudaGraphs:
    """Decode steps of a Trunk on a GPU as CUDA graphs, see `splitlearn_core.step_graphs`.

    Attributes:
        sequences: Sessions that step so, at most; further ones step one kernel after the other.
        positions: Most that one of them may have; a longer one goes on one kernel after the other.
            Memory for the caches of all of them is taken with the load.
    """

    sequences: int = 16
    positions: int = 4096

    def __post_init__(self) -> None:
        """Check what the types don't say."""
        for name, value in (("sequences", self.sequences), ("positions", self.positions)):
            if value < 1:
                raise ConfigError(Problem(f"must be 1 or more, {found(value)}", (name,)))

    @property
    def cached_positions(self) -> int:
        """Positions of all sequences that there is memory for: each has one that is nobody's."""
        return self.sequences * (self.positions + 1)


def _graphs(value: Any) -> Any:
    """Return a section, checked as it is."""
    is_checked = value is None or isinstance(value, CudaGraphs)
    return value if is_checked else build(CudaGraphs, value)


Graphs = Annotated[CudaGraphs | None, BeforeValidator(_graphs)]


@section
class PartOptions:
    """How to load one part of a model.

    Attributes:
        component: `bottom`, `trunk` (`trunk-0`, `trunk-1`, … with more than two split points),
            `top` or `full`.
        split_points: Layer numbers of the cuts; needed by every component but `full`.
        cache_dir: Where files fetched from a hub go.  A relative path is relative to the working
            directory of the process, not to the file that names it.
        low_memory: Taken from older configurations: a single part is always loaded incrementally.
        revision: Branch, tag or commit of a hub name.
        mmap: Map weights that need no change, instead of reading them into private memory.
        allow_empty: Let a Bottom or a Top have no layers of its own.
        allow_uncertified: Let in an architecture that was not certified, as its own forward shows
            it to be built.
        verbose: Log what was loaded at INFO instead of DEBUG.
        quantization: Keep the part's linear layers packed for fast inference on a CPU:
            `prepacked` (the same dtype) or `int8` weights, both with dtype float32 or bfloat16,
            or `fp16` weights, with dtype float32.  Nothing is packed by default.
        cuda_graphs: For a Trunk on a GPU: run steps of one token as CUDA graphs; `sequences` and
            `positions`.
        chat_template: File with the Jinja template that `/v1/chat/completions` writes messages
            with, for a whole model whose tokenizer has none, or another one.  A relative path is
            relative to the working directory of the process.
        minimind: Of a MiniMind file, what it does not tell (`num_attention_heads`, `rope_theta`,
            `rms_norm_eps`, …); says that the file is one, if `model_type` does not.
        adapter: Folder of a LoRA adapter (or MiniMind's file of one), whose change is added into
            the part's weights as they are loaded; not with `quantization`.  A relative path is
            relative to the working directory of the process.
    """

    component: str = FULL
    split_points: SplitPoints | None = None
    cache_dir: PathText | None = None
    low_memory: bool = True
    revision: Text | None = None
    mmap: bool = True
    allow_empty: bool = False
    allow_uncertified: bool = False
    verbose: bool = False
    quantization: Quantization | None = None
    cuda_graphs: Graphs = None
    chat_template: PathText | None = None
    minimind: MiniMindOptions | None = None
    adapter: PathText | None = None

    def __post_init__(self) -> None:
        """Check the component against the cuts."""
        if self.chat_template is not None and self.component != FULL:
            message = f"is for a whole model or a pipeline: a {self.component} answers no chats"
            raise ConfigError(Problem(message, ("chat_template",)))
        names = component_names(self.split_points)
        if self.component in names:
            return
        if not _COMPONENT.fullmatch(self.component):
            message = "must be bottom, trunk, trunk-0, …, top or full"
        elif self.split_points is None:
            message = "needs split_points, as in [8, 24]"
        else:
            message = f"must be one of {', '.join(names)} with these split_points"
        raise ConfigError(Problem(f"{message}, {found(self.component)}", ("component",)))


@section
class PipelineOptions:
    """How to load a model whose Bottom and Top are here and whose Trunk is elsewhere.

    Attributes:
        split_points: Layer numbers of the cuts, the same as where the Trunks are served.
        trunk: Address of the only Trunk, or several addresses that serve it.
        trunk_model_id: Its id there; `trunk` when it is not given.
        chain: Several Trunks in a row, instead of `trunk`.
        token_file: File with the bearer token for the addresses.
        token_env: Environment variable with that token.
        ca_file: PEM file with the certificates that those of `https` addresses must rest on.
        retry: How often, and how long, it is tried to go on when a Trunk is lost: `attempts`,
            `base`, `maximum` and `total`, the last three in seconds.
        history_limit: Bytes that are kept for each session in order to go on elsewhere.
        cache_dir: As for a part.
        low_memory: As for a part.
        revision: As for a part.
        mmap: As for a part.
        allow_empty: As for a part.
        allow_uncertified: As for a part.
        verbose: As for a part.
        quantization: Of Bottom and Top, as for a part.
        chat_template: As for a whole model.
        minimind: As for a part.
        adapter: Of Bottom and Top, as for a part; the Trunk's is given where it is served.
    """

    split_points: SplitPoints
    trunk: Addresses | None = None
    trunk_model_id: ModelId | None = None
    chain: Chain | None = None
    token_file: PathText | None = None
    token_env: Text | None = None
    ca_file: PathText | None = None
    retry: Retry = RetryPolicy()
    history_limit: ByteCount = HISTORY_LIMIT
    cache_dir: PathText | None = None
    low_memory: bool = True
    revision: Text | None = None
    mmap: bool = True
    allow_empty: bool = False
    allow_uncertified: bool = False
    verbose: bool = False
    quantization: Quantization | None = None
    chat_template: PathText | None = None
    minimind: MiniMindOptions | None = None
    adapter: PathText | None = None

    def __post_init__(self) -> None:
        """Check that the Trunks fit the cuts."""
        check_token_source(self.token_file, self.token_env)
        if (self.trunk is None) == (self.chain is None):
            raise ConfigError("needs either trunk (an address) or chain (a list of Trunks)")
        if self.chain is not None and self.trunk_model_id is not None:
            raise ConfigError(
                Problem("belongs into each item of chain, beside its trunk", ("trunk_model_id",))
            )
        expected = len(self.split_points) - 1
        if len(self.links) != expected:
            message = f"{expected + 1} split_points need {expected} Trunk(s), found"
            raise ConfigError(Problem(f"{message} {len(self.links)}", ("split_points",)))

    @property
    def links(self) -> tuple[TrunkLink, ...]:
        """The Trunks, in the order of their layers, however they were written."""
        if self.chain is not None:
            return self.chain
        return (TrunkLink(self.trunk or (), self.trunk_model_id or TRUNK),)


def component_names(split_points: tuple[int, ...] | None) -> tuple[str, ...]:
    """Return what a component can be called, given the cuts."""
    if split_points is None:
        return (FULL,)
    spans = len(split_points) - 1
    trunks = (TRUNK,) if spans == 1 else tuple(f"{TRUNK}-{n}" for n in range(spans))
    return (BOTTOM, *trunks, TOP, FULL)

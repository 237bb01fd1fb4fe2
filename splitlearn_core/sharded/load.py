"""Load a part or a whole model sharded over ranks."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from splitlearn_core.builder import draw
from splitlearn_core.devices import check_device
from splitlearn_core.dtypes import as_dtype, dtype_name
from splitlearn_core.factory import AUTO, component_spec, find_model
from splitlearn_core.loading.generation import generation_config_for
from splitlearn_core.loading.opening import open_source
from splitlearn_core.loading.precision import Dtypes
from splitlearn_core.plan import FULL
from splitlearn_core.sharded.adapters import Adapter, base_name
from splitlearn_core.sharded.layout import (
    STRATEGIES,
    How,
    Sharding,
    Share,
    apply_sharding,
    shares,
)
from splitlearn_core.sharded.meeting import Meeting
from splitlearn_core.sharded.outline import Outline
from splitlearn_core.sharded.reading import PieceReader
from splitlearn_core.sharded.report import RankReport, ShardReport, note_report
from splitlearn_core.sharded.shell import build_shell, zeroed_rows
from splitlearn_core.sharded.transfer import Run, exchange_runs, hand_out, wires

if TYPE_CHECKING:
    import os

    from peft import PeftConfig
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from splitlearn_core.loading.stages import Progress
    from splitlearn_core.sharded.shell import Shell

Source = Literal["slices", "full_state"]

_TIMEOUT = 300.0


def load_sharded(
    model_name_or_path: str | os.PathLike[str] | None = None,
    component: str = FULL,
    split_points: Iterable[int] | None = None,
    *,
    how: How = "fsdp2",
    source: Source = "slices",
    model_type: str = AUTO,
    mesh: DeviceMesh | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    param_dtype: torch.dtype | str | None = None,
    reduce_dtype: torch.dtype | str | None = None,
    reshard_after_forward: bool | int | None = None,
    sharding_strategy: str = "FULL_SHARD",
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    allow_empty: bool = False,
    allow_uncertified: bool = False,
    adapter: PeftConfig | str | os.PathLike[str] | None = None,
    adapter_seed: int = 0,
    timeout: float = _TIMEOUT,
    progress: Progress | None = None,
) -> nn.Module:
    """Load a part, or the whole model, sharded over the ranks of the process group.

    Every rank calls it with the same arguments; `torchrun` starts them, and `joined_group` joins
    them.  No rank ever holds the whole: with `slices` each reads its own share from the files, with
    `full_state` rank 0 reads, and sends each other rank its share; those need no file.

    Peak memory of each rank, beyond its share of parameters, and the buffers that all have: with
    FSDP2 some 10 MB; with FSDP1 one unit (a decoder layer, or what is left beside them: embeddings
    and head), whole; where a converter fuses tensors, such a tensor, whole.

    Args:
        model_name_or_path: Folder, `builtin:NAME`, hub name, or weights file; with `full_state` it
            is rank 0's, and the others' is not looked at.
        component: `full`, `bottom`, `trunk`, `trunk-0`, …, or `top`.
        split_points: Layer numbers of the cuts; not needed for `full`.
        how: `fsdp2` (`fully_shard`) or `fsdp1` (`FullyShardedDataParallel`).
        source: `slices` or `full_state`.
        model_type: Architecture; `auto` takes the config's.
        mesh: The ranks: sharded over all of them when left out; of two dimensions, replicated over
            the first and sharded over the second.
        device: `cpu`, or the kind of GPU; the mesh's when left out, else GPUs where there are any.
        dtype: Cast to this; `None` keeps what is stored.
        param_dtype: What parameters are gathered and computed in (mixed precision); `None`: theirs.
        reduce_dtype: What gradients are summed in; `None`: `param_dtype`.
        reshard_after_forward: FSDP2's: `False` keeps gathered layers until their backward.
        sharding_strategy: FSDP1's: `FULL_SHARD`, `SHARD_GRAD_OP`, `NO_SHARD`, `HYBRID_SHARD`, …
        cache_dir: Where files from the hub are kept.
        revision: Branch, tag or commit on the hub.
        token: For the hub; `None` uses `HF_TOKEN` or the login.
        allow_empty: Let Bottom or Top have no layers.
        allow_uncertified: Let in an architecture that was not certified.
        adapter: A LoRA to train on the frozen model: peft's config of a new one, or the folder of
            one that peft or `save_adapter` has written, on every rank.
        adapter_seed: Of the random numbers that a new adapter begins with.
        timeout: Seconds without a sign of life after which another rank is given up.
        progress: Called with (bytes done, bytes in all) of this rank's share; what it raises ends
            the load, on all ranks.

    Returns:
        In evaluation mode: a `SplitModel`, or for `full` transformers' own `…ForCausalLM`; with
        FSDP1, that within a `FullyShardedDataParallel`.  `report_of` tells what each rank read.

    Raises:
        RankLostError: (a `RuntimeError`) Another rank died, hangs, or failed; names it, and why.
        RanksDifferError: (a `ValueError`) The ranks were given other arguments, or see other files;
            says which rank, and in what.
        ModelSourceError, CheckpointError, UnsupportedModelError, KeyError, ValueError: As
            `load_component`; the other ranks then get a `RankLostError`.
    """
    meeting = Meeting.of_all("loading", timeout)
    with meeting.attended():
        request = _Request(
            model_name_or_path,
            component,
            None if split_points is None else tuple(split_points),
            model_type,
            as_dtype(dtype),
            cache_dir,
            revision,
            token,
            allow_empty,
            allow_uncertified,
            Adapter.of(adapter, adapter_seed),
        )
        sharding = _sharding(
            how,
            mesh,
            device,
            as_dtype(param_dtype),
            as_dtype(reduce_dtype),
            reshard_after_forward,
            sharding_strategy,
        )
        if source not in get_args(Source):
            raise ValueError(f"source must be one of {get_args(Source)}, found {source!r}")
        load = _Load(meeting, request, sharding, source, progress)
        return load.run()


@dataclass(frozen=True)
class _Request:
    """Which part of which model."""

    name: str | os.PathLike[str] | None
    component: str
    split_points: tuple[int, ...] | None
    model_type: str
    dtype: torch.dtype | None
    cache_dir: str | os.PathLike[str] | None
    revision: str | None
    token: str | bool | None
    allow_empty: bool
    allow_uncertified: bool
    adapter: Adapter | None

    def facts(self) -> dict[str, Any]:
        """Return what all ranks must have been given alike, wherever each has its files."""
        return {
            "component": self.component,
            "split_points": None
            if self.split_points is None
            else list(map(int, self.split_points)),
            "dtype": None if self.dtype is None else dtype_name(self.dtype),
            "allow_empty": self.allow_empty,
            "allow_uncertified": self.allow_uncertified,
            **({"adapter": None} if self.adapter is None else self.adapter.facts()),
        }


@dataclass(frozen=True)
class _Opened:
    """A checkpoint that this rank reads: the part's outline, and who reads its tensors."""

    outline: Outline
    reader: PieceReader
    stored: tuple[str, ...]


class _Load:
    """One call of `load_sharded` on one rank."""

    def __init__(
        self,
        meeting: Meeting,
        request: _Request,
        sharding: Sharding,
        source: Source,
        progress: Progress | None,
    ) -> None:
        self._meeting = meeting
        self._request = request
        self._sharding = sharding
        self._source = source
        self._progress = progress
        self._done = 0
        self._total = 0

    def run(self) -> nn.Module:
        """Load, and tell the other ranks that it is done."""
        facts = {**self._request.facts(), **_facts(self._sharding), "source": self._source}
        self._meeting.agree("arguments", facts)
        begun = time.perf_counter()
        module, outline, bytes_read = self._slices() if self._source == "slices" else self._full()
        held = sum(share.values.nbytes for share in shares(module))
        held += sum(buffer.nbytes for buffer in module.buffers())
        figures = [bytes_read, held, time.perf_counter() - begun]
        everybody = self._meeting.exchange("done", figures)
        ranks = tuple(RankReport(rank, *theirs) for rank, theirs in enumerate(everybody))
        report = ShardReport(
            outline.spec.name, self._sharding.how, self._source, outline.nbytes, ranks
        )
        note_report(module, report)
        return module.eval()  # what FSDP1 wraps around it, too

    def _slices(self) -> tuple[nn.Module, Outline, int]:
        """Let each rank read its own share."""
        with self._opened() as opened:
            samples = opened.reader.samples(opened.stored)
            self._meeting.agree("checkpoint", {**opened.outline.facts(), "weights": samples})
            outline = self._settled(opened)
            shell, module = self._shard(outline)
            for name, buffer in shell.buffers().items():
                opened.reader.read(name, 0, buffer.view(-1))
            for name, share in _of_checkpoint(module, outline):
                self._meeting.sign(f"reading {name}")
                opened.reader.read(name, share.start, share.values)
            self._finish(shell, module)
            return module, outline, opened.reader.count.nbytes

    def _full(self) -> tuple[nn.Module, Outline, int]:
        """Let rank 0 read, and hand out."""
        if self._meeting.rank:
            outline = Outline.from_dict(self._meeting.hear("outline"))
            return self._handed_out(outline, None)
        with self._opened() as opened:
            sizes = opened.outline.tensors
            untied = {
                target
                for target, origin in self._unlike(opened)
                if not opened.reader.equal(target, origin, 0, sizes[target].numel)
            }
            outline = opened.outline.without_ties(untied)
            self._meeting.tell("outline", outline.to_dict())
            return self._handed_out(outline, opened.reader)

    def _handed_out(
        self, outline: Outline, reader: PieceReader | None
    ) -> tuple[nn.Module, Outline, int]:
        shell, module = self._shard(outline)
        held = {name: buffer.view(-1) for name, buffer in shell.buffers().items()}
        runs = [Run(n, 0, t.numel(), dtype_name(t.dtype)) for n, t in held.items()]
        for name, share in _of_checkpoint(module, outline):
            held[name] = share.values
            dtype = dtype_name(share.values.dtype)
            runs.append(Run(name, share.start, share.values.numel(), dtype))
        if reader is not None:
            self._total = outline.nbytes
        everybody = exchange_runs(self._meeting, "runs", runs)
        with wires(self._meeting) as wired:
            read = None if reader is None else reader.read
            hand_out(self._meeting, wired, everybody, held, read, self._heard)
        self._finish(shell, module)
        return module, outline, 0 if reader is None else reader.count.nbytes

    @contextmanager
    def _opened(self) -> Iterator[_Opened]:
        """Find and open this rank's checkpoint."""
        request = self._request
        if request.name is None:
            raise ValueError("model_name_or_path is needed: the folder or name of the model")
        model = find_model(
            request.name,
            model_type=request.model_type,
            cache_dir=request.cache_dir,
            revision=request.revision,
            token=request.token,
            allow_uncertified=request.allow_uncertified,
        )
        spec = component_spec(
            model, request.component, request.split_points, allow_empty=request.allow_empty
        )
        settings = generation_config_for(spec, model.files)
        source = open_source(model.files)
        try:
            blueprint = draw(
                model.config, spec, source, model.description, model.family, request.dtype
            )
            reads = blueprint.reads
            built_as = Dtypes.guess(None, None).rebuilt_as(reads.dtype).built_as
            outline = Outline.of(
                blueprint,
                spec,
                model.description,
                settings,
                built_as,
                uncertified=request.allow_uncertified,
            )
            source.prepare(reads.stored, lambda *_: self._meeting.sign("fetching from the hub"))
            reader = PieceReader(blueprint.model, reads, source, self._heard)
            try:
                yield _Opened(outline, reader, tuple(reads.stored))
            finally:
                reader.close()
        finally:
            source.close()

    def _settled(self, opened: _Opened) -> Outline:
        """Return the outline without the ties whose two tensors have different values here.

        Where the checkpoint has both, they are compared, each rank a share of them.
        """
        rank, size = self._meeting.rank, self._meeting.size
        differing = []
        for target, origin in self._unlike(opened):
            numel = opened.outline.tensors[target].numel
            begin, end = numel * rank // size, numel * (rank + 1) // size
            if not opened.reader.equal(target, origin, begin, end):
                differing.append(target)
        everybody = self._meeting.exchange("untied", differing)
        return opened.outline.without_ties({name for names in everybody for name in names})

    @staticmethod
    def _unlike(opened: _Opened) -> list[tuple[str, str]]:
        """Return the tied tensors that are stored each by itself."""
        same = opened.reader.is_same
        return [(t, o) for t, o in opened.outline.ties.items() if not same(t, o)]

    def _shard(self, outline: Outline) -> tuple[Shell, nn.Module]:
        """Build the shell and shard it."""
        self._meeting.sign("building the shell")
        shell = build_shell(outline, self._sharding.device)
        if self._request.adapter is not None:
            self._request.adapter.put_on(shell.model)
        self._meeting.sign("sharding the shell")
        module = apply_sharding(shell, self._sharding)
        self._total = sum(share.values.nbytes for _, share in _of_checkpoint(module, outline))
        return shell, module

    def _finish(self, shell: Shell, module: nn.Module) -> None:
        """Do to the values what the architecture does to any that are loaded."""
        rows = zeroed_rows(shell)
        for name, share in _of_checkpoint(module, shell.outline):
            if name in rows:
                width = share.shape[1]
                first = max(rows[name] * width - share.start, 0)
                last = (rows[name] + 1) * width - share.start
                share.values[first : max(last, 0)] = 0
        if self._progress is not None:
            self._progress(self._total, self._total)

    def _heard(self, nbytes: int) -> None:
        """Hear that bytes were read."""
        self._done += nbytes
        self._meeting.sign(f"reading, {self._done:,} bytes done")
        if self._progress is not None and self._total:
            self._progress(min(self._done, self._total), self._total)


def _of_checkpoint(module: nn.Module, outline: Outline) -> Iterator[tuple[str, Share]]:
    """Yield this rank's shares of what a checkpoint has, by the names there: no adapter's."""
    for share in shares(module):
        name = base_name(share.name)
        if name in outline.tensors:
            yield name, share


def _sharding(
    how: How,
    mesh: DeviceMesh | None,
    device: str | torch.device | None,
    param_dtype: torch.dtype | None,
    reduce_dtype: torch.dtype | None,
    reshard_after_forward: bool | int | None,
    sharding_strategy: str,
) -> Sharding:
    """Check how a part is to be sharded."""
    if how not in get_args(How):
        raise ValueError(f"how must be one of {get_args(How)}, found {how!r}")
    if sharding_strategy not in STRATEGIES:
        raise ValueError(
            f"sharding_strategy must be one of {', '.join(STRATEGIES)}, found {sharding_strategy!r}"
        )
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "there is no process group: start the ranks with torchrun, and load within"
            " `with joined_group():`"
        )
    mesh = mesh or init_device_mesh(_device_type(device), (dist.get_world_size(),))
    if how == "fsdp1" and sharding_strategy.startswith(("HYBRID", "_HYBRID")) != (mesh.ndim > 1):
        raise ValueError(
            f"{sharding_strategy} needs a mesh of {1 if mesh.ndim > 1 else 2} dimensions"
        )
    if how == "fsdp1" and mesh.shape[-1] == 1 and mesh.size() > 1:
        raise ValueError(
            "FSDP1 over a mesh that shards over one rank would not sum gradients at all: use"
            " fsdp2, or shard over more ranks"
        )
    return Sharding(
        how,
        mesh,
        param_dtype,
        reduce_dtype,
        reshard_after_forward,
        sharding_strategy,
    )


def _device_type(device: str | torch.device | None) -> str:
    """Return the kind of device that shares go to."""
    if device is not None:
        return check_device(device).type
    return (
        "cuda" if torch.cuda.is_available() and "nccl" in str(dist.get_backend_config()) else "cpu"
    )


def _facts(sharding: Sharding) -> dict[str, Any]:
    """Return how a part is sharded, as plain values to compare."""
    return {
        "how": sharding.how,
        "mesh": [sharding.mesh.device_type, list(sharding.mesh.shape)],
        "param_dtype": str(sharding.param_dtype),
        "reduce_dtype": str(sharding.reduce_dtype),
        "reshard_after_forward": sharding.reshard_after_forward,
        "sharding_strategy": sharding.sharding_strategy,
    }

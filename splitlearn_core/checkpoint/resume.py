"""Save all that training needs to go on, and go on with exactly the steps that it would have taken.

    with Checkpointer("runs/a", keep_last=3) as checkpointer:
        state = checkpointer.load(model=model, optimizer=optimizer, sampler=sampler)
        …
        checkpointer.save(step=step, model=model, optimizer=optimizer, sampler=sampler)

With torch.distributed every rank makes the same calls, in the same order: rank 0 writes what all
share, and each rank's own (random states, `rank_values`) with it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from splitlearn_core.checkpoint.files import folders
from splitlearn_core.checkpoint.files.background import Background, Here
from splitlearn_core.checkpoint.files.disk import Disk
from splitlearn_core.checkpoint.files.folders import Checkpoint
from splitlearn_core.checkpoint.files.hashed_files import Output
from splitlearn_core.checkpoint.training import archive, shards
from splitlearn_core.checkpoint.training.archive import Content, Writer
from splitlearn_core.checkpoint.training.encoding import Encoded, encode
from splitlearn_core.checkpoint.training.exchange import Exchange, Ranks
from splitlearn_core.checkpoint.training.giving import (
    Loading,
    NotAskedForError,
    Read,
    TrainingState,
)
from splitlearn_core.checkpoint.training.snapshot import Snapshot
from splitlearn_core.checkpoint.training.snapshot import threads as copying_threads
from splitlearn_core.checkpoint.training.stateful import ADAPTER
from splitlearn_core.checkpoint.training.taking import Facts, check_names, content_of, rank_state
from splitlearn_core.checkpoint.training.world import Batches, Policy
from splitlearn_core.errors import CheckpointError, NoCheckpointError, RankLostError
from splitlearn_core.machine import return_freed_memory
from splitlearn_core.messages import in_one_line
from splitlearn_core.user_paths import user_path

_TIMEOUT = 300.0
# Threads that hash; writing takes another.
_HASHING = 2


class Checkpointer:
    """Checkpoints of one training run, in one folder.

    Owns a thread where it saves in the background: close it, or use it as a context manager.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep_last: int | None = None,
        timeout: float = _TIMEOUT,
        disk: Disk | None = None,
    ) -> None:
        """Touch nothing yet.

        Args:
            folder: Made by the first save.  With several ranks, one that all of them see.
            keep_last: How many checkpoints stay when a new one is on the disk; `None`: all.
            timeout: Seconds that ranks wait for each other; for rank 0, while it writes, that it
                may get no further.
            disk: Another file system, for tests.

        Raises:
            ValueError: `keep_last` is less than 1.
        """
        if keep_last is not None and keep_last < 1:
            raise ValueError(f"keep_last must be 1 or more, not {keep_last}; None keeps all")
        self.folder = user_path(folder).absolute()
        self._keep_last = keep_last
        self._timeout = timeout
        self._disk = disk or Disk()
        self._background: Background[Checkpoint] = Background("splitlearn-save")
        self._snapshot = Snapshot()
        self._pending: Exchange | None = None

    # --- Saving

    def save(
        self,
        *,
        step: int,
        epoch: int | None = None,
        model: Any = None,
        adapter: Any = None,
        optimizer: Any = None,
        scheduler: Any = None,
        scaler: Any = None,
        sampler: Any = None,
        consumed_samples: int | None = None,
        batches: Batches | None = None,
        run_id: str | None = None,
        rank_values: Any = None,
        background: bool = False,
        **more: Any,
    ) -> Path | None:
        """Save all that is given; nothing of it is changed, and no random number is drawn.

        Extra memory: of tensors on an accelerator, and of those that are not contiguous, one at a
        time.  In the background: a copy of all tensors, kept for the next save until `close`.

        Args:
            step: Steps of the optimizer that were taken.
            epoch: The sampler's, or 0, where left out.
            model: A module; DDP and `torch.compile` are taken off.  One that FSDP has shared out is
                written by all ranks, with its optimizer, through DCP.
            adapter: A module of which only what is trained (and LoRA) is saved, not what is frozen.
            optimizer: Likewise `scheduler`, `scaler`, …: with `state_dict` and `load_state_dict`.
            scheduler: See above.
            scaler: See above.
            sampler: A `ResumableSampler`, or another that has a state.
            consumed_samples: Of all ranks, since the beginning; the sampler's where left out.
            batches: What a step takes; the sampler's where left out.
            run_id: The tracker's, to go on with the same curve there.
            rank_values: Plain values of this rank.
            background: Return when everything is copied, and write meanwhile.  What goes wrong
                then is raised by the next call of this object.
            **more: Anything else: what has a state, a `torch.Generator`, or a plain value.

        Returns:
            The checkpoint's folder, on every rank; `None` in the background.

        Raises:
            UnsavableStateError: (a `TypeError`) Something can't be saved; says where it lies.
            StorageError: (an `OSError`) The disk is full or fails.
            RankLostError: (a `RuntimeError`) Another rank ended, hangs or failed.
            RuntimeError: The sampler is amid the forwards of one step.
        """
        self.wait()
        given = {"model": model, ADAPTER: adapter, "optimizer": optimizer, "scheduler": scheduler}
        given |= {"scaler": scaler, "sampler": sampler}
        things = {name: thing for name, thing in given.items() if thing is not None} | more
        ranks = Ranks.here()
        exchange = Exchange(ranks, f"the save of step {step}", self._timeout)
        with exchange.failing():
            check_names(things)
            own = archive.pack(encode(rank_state(rank_values), "rank_values"))
            facts = Facts.of(step, epoch, consumed_samples, batches, sampler, ranks)
            content = content_of(things, facts, run_id) if ranks.is_first else None
            sharded = shards.sharded_names(things)
            if sharded and background:
                raise ValueError(
                    "a sharded model is written by all ranks, and can't be saved in the background"
                )
        packed = exchange.gather(own)
        if content is not None:
            content.ranks = packed
        if sharded:
            return self._write_shards(content, exchange, things, ranks)
        if background:
            self._begin(content, exchange)
            return None
        return self._write(content, exchange)

    def wait(self) -> Path | None:
        """Wait for a save in the background; return its folder, `None` where there is none.

        Raises:
            StorageError: (an `OSError`) It failed.
            RankLostError: (a `RuntimeError`) It failed on rank 0, which this one is not.
        """
        exchange, self._pending = self._pending, None
        if exchange is None:
            return None
        with exchange.failing():
            done = self._background.wait()
        return Path(os.fsdecode(exchange.tell(os.fsencode(done.path) if done else b"")))

    def close(self) -> None:
        """Wait for a save in the background, and give its memory back."""
        try:
            self.wait()
        finally:
            self._background.close()
            self._snapshot.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close; what a save in the background says does not hide what the block raised."""
        if error is None:
            self.close()
            return
        try:
            self.close()
        except Exception as second:  # noqa: BLE001 - added to what is raised anyway
            error.add_note(f"a save in the background failed, too: {in_one_line(second)}")

    def _write(self, content: Content | None, exchange: Exchange) -> Path:
        """Write on rank 0, and tell the others; they wait."""
        written = b""
        with exchange.failing():
            if content is not None:
                with ThreadPoolExecutor(_HASHING, "splitlearn-hash") as hashing:
                    written = os.fsencode(self._writer(hashing, exchange).write(content).path)
        return Path(os.fsdecode(exchange.tell(written)))

    def _write_shards(
        self, content: Content | None, begun: Exchange, things: Mapping[str, Any], ranks: Ranks
    ) -> Path:
        """Let every rank write its share, and rank 0 all else."""
        ended = Exchange(ranks, f"{begun.what}, of which each rank writes its share", self._timeout)
        place, written = b"", b""
        with ended.failing(), ExitStack() as on_first:
            with begun.failing():
                if content is not None:
                    pool = ThreadPoolExecutor(_HASHING, "splitlearn-hash")
                    writer = self._writer(on_first.enter_context(pool), ended)
                    unfinished = on_first.enter_context(writer.begun())
                    place = os.fsencode(unfinished.path)
            place = begun.tell(place)
            shards.write(Path(os.fsdecode(place)), things)
            ended.gather(b"")
            if content is not None:
                written = os.fsencode(writer.finish(unfinished, content).path)
        return Path(os.fsdecode(ended.tell(written)))

    def _begin(self, content: Content | None, exchange: Exchange) -> None:
        """Copy all tensors on rank 0, and begin to write."""
        self._pending = exchange
        if content is None:
            return
        with (
            exchange.failing(),
            ThreadPoolExecutor(copying_threads(), "splitlearn-copy") as copying,
        ):
            tensors = {name: part.tensors for name, part in content.parts.items()}
            copies = self._snapshot.take(tensors, copying)
        content.parts = {n: Encoded(p.tree, copies[n]) for n, p in content.parts.items()}
        # writing and hashing in one thread: the others are training's
        self._background.begin(lambda: self._writer(Here(), exchange).write(content))

    def _writer(self, hashing: Executor, exchange: Exchange) -> Writer:
        output = Output(self._disk, hashing, exchange.sign)
        return Writer(self.folder, self._keep_last, output)

    # --- Looking

    def checkpoints(self) -> list[Checkpoint]:
        """Return the checkpoints that are there, the oldest first."""
        return folders.checkpoints_in(self.folder)

    def latest(self) -> Path | None:
        """Return the folder of the newest checkpoint; `None` where there is none yet."""
        found = self.checkpoints()
        return found[-1].path if found else None

    # --- Loading

    def load(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        on_world_change: Policy | None = None,
        fallback: bool = False,
        skip: Iterable[str] = (),
        restore_random_states: bool = True,
        **things: Any,
    ) -> TrainingState:
        """Give everything the state that it had; all of it, or nothing is changed.

        Extra memory: the state once, on the CPU.

        Args:
            path: A checkpoint, or a folder of them; the newest of this folder where left out.
            on_world_change: What stays the same where the number of ranks is another than when it
                was saved: `constant_global_batch` or `constant_batch_per_rank`.
            fallback: Go on from the newest that is whole, where newer ones are damaged; those are
                named in `notes`.
            skip: Names that were saved and are not to be loaded.
            restore_random_states: Whether random generators go on where they were.
            **things: What was saved, by the same names.  Plain values need not be given.

        Raises:
            NoCheckpointError: (a `FileNotFoundError`) There is none.
            CheckpointError: (a `ValueError`) It is damaged, of another release, or does not fit
                what was given; says which file or name, and what to do.
            WorldSizeError: (a `ValueError`) The number of ranks is another, and no policy is named
                or it can't hold.
            RankLostError: (a `RuntimeError`) Another rank ended, hangs or failed.
        """
        self.wait()
        ranks = Ranks.here()
        things = {name: thing for name, thing in things.items() if thing is not None}
        notes: list[str] = []
        for candidate in self._candidates(path, ranks, fallback=fallback):
            read = self._read(candidate, things, skip, ranks, notes if fallback else None)
            if read is not None:
                state = Loading(read, things, ranks, tuple(notes)).give(
                    on_world_change, restore_random_states=restore_random_states
                )
                del read
                return_freed_memory()
                return state
        raise NoCheckpointError(
            f"no checkpoint in {self.folder} is whole: {'; '.join(notes)}.  Copy one from"
            " elsewhere, or begin anew"
        )

    def _candidates(
        self, path: str | os.PathLike[str] | None, ranks: Ranks, *, fallback: bool
    ) -> list[Checkpoint]:
        """Return what may be loaded, the newest first; rank 0 decides for all."""
        exchange = Exchange(ranks, "the choice of a checkpoint", self._timeout)
        found: list[Checkpoint] = []
        with exchange.failing():
            if ranks.is_first:
                found = folders.find(self.folder if path is None else user_path(path).absolute())
                found = folders.with_older(found[-1]) if fallback else found[-1:]
        exchange.gather(b"")
        names = exchange.tell(b"\0".join(os.fsencode(c.path) for c in reversed(found)))
        return [Checkpoint.at(Path(os.fsdecode(name))) for name in names.split(b"\0")]

    def _read(
        self,
        candidate: Checkpoint,
        things: Mapping[str, Any],
        skip: Iterable[str],
        ranks: Ranks,
        notes: list[str] | None,
    ) -> Read | None:
        """Read a checkpoint on every rank; `None`, and a note, where it is damaged on one."""
        exchange = Exchange(ranks, f"reading {candidate.path}", self._timeout)
        failure: CheckpointError | None = None
        read: Read | None = None
        try:
            with archive.opened(candidate.path, copying_threads()) as opened:
                read = Read.of(opened, things, skip, ranks)
        except CheckpointError as error:
            failure = error
        reasons = exchange.gather(in_one_line(failure).encode() if failure else b"")
        bad = [f"rank {n}: {r.decode()}" for n, r in enumerate(reasons) if r]
        verdict = exchange.tell("; ".join(bad).encode()).decode()
        if not verdict:
            return read
        if notes is None or isinstance(failure, NotAskedForError):
            raise failure or RankLostError(f"{candidate.path} can't be read on {verdict}")
        notes.append(f"{candidate.path} is damaged and was passed over ({verdict})")
        return None


def save_checkpoint(
    folder: str | os.PathLike[str], *, keep_last: int | None = None, **state: Any
) -> Path:
    """Save once, see `Checkpointer.save`; return the checkpoint's folder."""
    if state.pop("background", False):
        raise ValueError("a save in the background needs an owner: use a Checkpointer")
    with Checkpointer(folder, keep_last=keep_last) as checkpointer:
        saved = checkpointer.save(**state)
    if saved is None:
        raise AssertionError("only saves in the background return nothing")
    return saved


def load_checkpoint(path: str | os.PathLike[str], **things: Any) -> TrainingState:
    """Load a checkpoint, or the newest in a folder of them; see `Checkpointer.load`."""
    return Checkpointer(path).load(path, **things)

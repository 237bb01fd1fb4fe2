"""Giving everything the state that a checkpoint has of it: all of it, or nothing is changed."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from splitlearn_core.checkpoint.training import archive, random_states, shards, stateful
from splitlearn_core.checkpoint.training.archive import Archive
from splitlearn_core.checkpoint.training.exchange import Ranks
from splitlearn_core.checkpoint.training.sampler import ResumableSampler, batches_of, with_batches
from splitlearn_core.checkpoint.training.taking import RANDOM, SHARDED, VALUES
from splitlearn_core.checkpoint.training.world import Batches, Converted, Progress, convert
from splitlearn_core.errors import CheckpointError
from splitlearn_core.headers import listed
from splitlearn_core.messages import in_one_line

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingState:
    """Where training goes on.

    Attributes:
        path: The checkpoint that was loaded.
        step: Steps taken, at the number of ranks that there is now.
        epoch: As it was saved.
        consumed_samples: Of all ranks, since the beginning; `None` where nobody said.
        world_size: Ranks that there are now.
        saved_world_size: Ranks that saved it.
        batches: What a step takes from here on; `None` where nobody said.
        values: Plain values that were saved, by name.
        rank_values: What each of the ranks that saved it gave as its own.
        run_id: The tracker's.
        versions: Of the libraries that saved it.
        created: When, as ISO 8601.
        notes: What is not as it would have been without the interruption, in words.
    """

    path: Path
    step: int
    epoch: int
    consumed_samples: int | None
    world_size: int
    saved_world_size: int
    batches: Batches | None
    values: Mapping[str, Any]
    rank_values: tuple[Any, ...]
    run_id: str | None
    versions: Mapping[str, str]
    created: str
    notes: tuple[str, ...]


@dataclass
class Read:
    """A checkpoint that was read and is whole."""

    path: Path
    training: Mapping[str, Any]
    states: dict[str, Any]
    ranks: tuple[dict[str, Any], ...]

    @classmethod
    def of(
        cls, opened: Archive, things: Mapping[str, Any], skip: Iterable[str], here: Ranks
    ) -> Read:
        """Read all that is wanted, and check that nothing else was saved or asked for."""
        training = opened.training
        described: Mapping[str, Any] = training["things"]
        skipped = set(skip)
        _check_asked(opened.path, described, things, skipped)
        wanted = [n for n in described if n not in skipped and described[n]["kind"] != SHARDED]
        opened.check(shards.FOLDER, slice(here.rank, None, here.world_size))
        ranks = range(training["world_size"])
        return cls(
            opened.path,
            training,
            {name: opened.part(name) for name in wanted},
            tuple(opened.part(archive.rank_name(rank)) for rank in ranks),
        )


def _check_asked(
    path: Path, saved: Mapping[str, Any], things: Mapping[str, Any], skipped: set[str]
) -> None:
    """Compare the names that were saved with those that are given."""
    if absent := (things.keys() | skipped) - saved.keys():
        raise NotAskedForError(f"{path} does not have {listed(absent)}; it has {listed(saved)}")
    stateful_ones = {name for name, entry in saved.items() if entry["kind"] != "value"}
    if left := stateful_ones - things.keys() - skipped:
        raise NotAskedForError(
            f"{path} has {listed(left)}, too: give what is to have that state, or name it in skip"
        )
    if "optimizer" in things and "model" not in things and saved["optimizer"]["kind"] == SHARDED:
        raise NotAskedForError(
            f"{path}: the optimizer's state is that of shares: give the model, too"
        )
    if plain := things.keys() - stateful_ones:
        raise NotAskedForError(
            f"{listed(plain)} in {path} is a plain value: it comes in the state's values, and is"
            " not given"
        )


class NotAskedForError(CheckpointError):
    """The caller and the checkpoint don't have the same names; no other checkpoint will help."""


@dataclass(frozen=True)
class Loading:
    """Giving what was read to those that are to have it."""

    read: Read
    things: Mapping[str, Any]
    ranks: Ranks
    notes: tuple[str, ...]

    def give(self, policy: str | None, *, restore_random_states: bool) -> TrainingState:
        """Check everything, then give it."""
        converted = self._convert(policy)
        states = self.read.states
        where = str(self.read.path)
        for name, thing in self._whole.items():
            saved = self.read.training["things"][name]["class"]
            stateful.check(name, thing, states[name], saved, where)
        self._give_all(states)
        notes = (*self.notes, *converted.notes, *self._version_notes())
        if restore_random_states:
            notes += self._restore_random_states()
        for note in notes:
            logger.warning("%s: %s", where, note)
        return self._state(converted.progress, notes)

    @property
    def _whole(self) -> dict[str, Any]:
        """The things that were not saved as shares of ranks."""
        saved = self.read.training["things"]
        return {n: t for n, t in self.things.items() if saved[n]["kind"] != SHARDED}

    def _give_all(self, states: Mapping[str, Any]) -> None:
        """Give each its state; where one refuses, the small ones get their old state back."""
        large = {"module", "adapter", "optimizer"}
        whole = self._whole
        kinds = {name: stateful.kind_of(name, thing) for name, thing in whole.items()}
        small = {name: thing for name, thing in whole.items() if kinds[name] not in large}
        with stateful.unchanged_if_raised(small):
            for name in sorted(whole, key=lambda name: kinds[name] in large):
                try:
                    stateful.give(name, whole[name], states[name])
                except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
                    raise CheckpointError(
                        f"{self.read.path}: {name} does not take its state: {in_one_line(error)}"
                    ) from error
            if shared := self.things.keys() - whole.keys():
                shards.read(self.read.path, {name: self.things[name] for name in shared})

    def _convert(self, policy: str | None) -> Converted:
        """Find out how training goes on at the number of ranks that there is."""
        training = self.read.training
        batches = Batches(**training["batches"]) if training["batches"] else None
        progress = Progress(training["step"], training["world_size"], batches)
        samplers = {n: t for n, t in self.things.items() if isinstance(t, ResumableSampler)}
        sizes = {sampler.batches.batch_size for sampler in samplers.values()}
        size = sizes.pop() if len(sizes) == 1 else None
        for name, sampler in samplers.items():
            self._convert_sampler(name, sampler, progress, policy)
        return convert(progress, self.ranks.world_size, policy, size)

    def _convert_sampler(
        self, name: str, sampler: ResumableSampler, progress: Progress, policy: str | None
    ) -> None:
        """Let a sampler's state be of the batches that there are now, at its place in the data."""
        state = self.read.states[name]
        saved = replace(progress, batches=batches_of(state))
        size = sampler.batches.batch_size
        batches = convert(saved, self.ranks.world_size, policy, size).progress.batches
        if batches is not None:
            self.read.states[name] = with_batches(state, batches)

    def _version_notes(self) -> tuple[str, ...]:
        saved, here = self.read.training["versions"], archive.versions()
        differing = [
            f"{name} {saved[name]} (here {here.get(name, 'none')})"
            for name in ("torch", "numpy")
            if name in saved and saved[name] != here.get(name)
        ]
        if not differing:
            return ()
        return (f"saved with {', '.join(differing)}: the last bits may differ",)

    def _restore_random_states(self) -> tuple[str, ...]:
        rank, saved = self.ranks.rank, self.read.ranks
        where = str(self.read.path / archive.rank_name(rank))
        if rank >= len(saved):
            return (
                (
                    f"rank {rank} was not there when this was saved, so its random generators are"
                    " as they are: what is drawn there (dropout) is not what it would have been"
                ),
            )
        notes = random_states.restore(saved[rank][RANDOM], where)
        if self.ranks.world_size != len(saved):
            drawn = f"random states are those of rank {rank} of {len(saved)}: what is drawn"
            notes += (f"{drawn} (dropout) meets other samples than it would have",)
        return notes

    def _state(self, progress: Progress, notes: tuple[str, ...]) -> TrainingState:
        training = self.read.training
        values = {
            name: self.read.states[name]
            for name, entry in training["things"].items()
            if entry["kind"] == "value" and name in self.read.states
        }
        return TrainingState(
            path=self.read.path,
            step=progress.step,
            epoch=training["epoch"],
            consumed_samples=training["consumed_samples"],
            world_size=progress.world_size,
            saved_world_size=training["world_size"],
            batches=progress.batches,
            values=values,
            rank_values=tuple(rank[VALUES] for rank in self.read.ranks),
            run_id=training["run_id"],
            versions=training["versions"],
            created=training["created"],
            notes=notes,
        )

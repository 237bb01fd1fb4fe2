"""A damaged checkpoint as a name, which makes it again: layout, mutation, number."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from checkpoint_fuzz import (
    config_damage,
    file_damage,
    header_damage,
    index_damage,
    manifest_damage,
    tensor_damage,
    torch_damage,
)
from checkpoint_fuzz.files import shown, weights_of
from checkpoint_fuzz.mutations import MUTATIONS, Damage
from checkpoint_fuzz.sound import LAYOUTS
from splitlearn_core.part_manifest import MANIFEST_FILE, FileRecord

# Importing them fills the table.
_SOURCES = (
    config_damage,
    file_damage,
    header_damage,
    index_damage,
    manifest_damage,
    tensor_damage,
    torch_damage,
)
_PAGE = 4096
_LARGEST_SIGNED = 2**30
# Numbers of one seed lie apart from those of the next.
_OF_A_SEED = 10_000


@dataclass(frozen=True)
class Case:
    """One damaged checkpoint."""

    layout: str
    mutation: str
    number: int

    def __str__(self) -> str:
        return f"{self.layout}/{self.mutation}/{self.number}"

    @classmethod
    def parse(cls, text: str) -> Case:
        """Return the case that is called `text`."""
        layout, mutation, number = text.split("/")
        return cls(layout, mutation, int(number))

    def damage(self, folder: Path) -> Damage:
        """Damage the sound checkpoint in `folder`."""
        if self.mutation == "truncate":
            done = _truncate(folder, self.number)
        else:
            rng = random.Random(str(self))  # noqa: S311 - no secret
            done = MUTATIONS[self.mutation][1](rng, folder)
        if self.layout == "part" and not self.mutation.startswith("manifest"):
            signed = self.number % 2 and _sign_again(folder)
            return done if signed else replace(done, said=())
        return done


def campaign_cases(sound: Path, count: int, seed: int) -> list[Case]:
    """Return at least `count` cases: all truncations, then every mutation in turn."""
    chosen = list(_truncations(sound))
    kinds = [(layout, name) for name, (layouts, _) in MUTATIONS.items() for layout in layouts]
    number = seed * _OF_A_SEED
    while len(chosen) < count:
        chosen += [Case(layout, name, number) for layout, name in kinds]
        number += 1
    return chosen


def slice_cases(sound: Path, seed: int) -> list[Case]:
    """Return a few: each mutation once, on one layout or another, and ten truncations."""
    kinds = enumerate(MUTATIONS.items(), start=seed)
    number = seed * _OF_A_SEED
    mutations = [
        Case(layouts[i % len(layouts)], name, number + i % 2) for i, (name, (layouts, _)) in kinds
    ]
    truncations = list(_truncations(sound))
    return [*mutations, *truncations[seed % 10 :: len(truncations) // 10]]


def _truncations(sound: Path) -> Iterator[Case]:
    """Yield every weights file of every layout, cut off at every 4 KB boundary."""
    for layout in LAYOUTS:
        for number, _ in enumerate(_boundaries(sound / layout)):
            yield Case(layout, "truncate", number)


def _boundaries(folder: Path) -> Iterator[tuple[Path, int]]:
    for path in weights_of(folder):
        yield from ((path, size) for size in range(0, path.stat().st_size, _PAGE))


def _truncate(folder: Path, number: int) -> Damage:
    path, size = list(_boundaries(folder))[number]
    os.truncate(path, size)
    return Damage(f"{path.name} cut off at {size}", refused=True, said=(shown(path),))


def _sign_again(folder: Path) -> bool:
    """Let a part's manifest vouch for the damaged files, so that lengths don't give them away.

    Returns whether it could: not where the manifest itself was hit.
    """
    path = folder / MANIFEST_FILE
    if path.is_symlink() or not path.is_file():
        return False
    try:
        manifest = json.loads(path.read_bytes())
        for name in manifest["files"]:
            file = folder / name
            if file.is_file() and file.stat().st_size < _LARGEST_SIGNED:
                manifest["files"][name] = asdict(FileRecord.of(file))
    except (OSError, ValueError, KeyError, TypeError):
        return False
    path.write_text(json.dumps(manifest))
    return True

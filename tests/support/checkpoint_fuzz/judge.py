"""Load a damaged checkpoint in every way, and judge what comes of it.

Each way must either succeed, with the values that the sound checkpoint has, or raise one of this
library's errors, whose message names the file and, where there is one, the tensor; and the ways
must agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from checkpoint_fuzz.cases import Case
from checkpoint_fuzz.mutations import Damage
from checkpoint_fuzz.sound import SPLIT
from splitlearn_core import SplitModel
from splitlearn_core.builder import draw
from splitlearn_core.errors import SplitLearnError
from splitlearn_core.factory import estimate_component, load_component
from splitlearn_core.loading.files import FolderFiles
from splitlearn_core.loading.opening import open_source
from splitlearn_core.quickstart import load_split_model

NAMES = ("bottom", "trunk", "top")
LOADED = "loaded"
LONGEST_MESSAGE = 5_000
_SHOWN = 300

Way = Callable[[Path], Mapping[str, SplitModel]]


@dataclass
class Verdict:
    """What came of one case.

    Attributes:
        case: Its name.
        words: What was damaged.
        outcomes: Way of loading -> `loaded`, or the error's type.
        messages: Way of loading -> the error's message.
        violations: What should not be.
    """

    case: str
    words: str = ""
    outcomes: dict[str, str] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Sound:
    """What a sound checkpoint's part holds.

    Attributes:
        values: The part's tensors by name.
        stored: Tensor -> the stored ones that it is made of.
    """

    values: Mapping[str, torch.Tensor]
    stored: Mapping[str, frozenset[str]]

    def differences(self, part: SplitModel, altered: frozenset[str] | None) -> list[str]:
        """Return the tensors of a part that are not as they were, but for those that may differ."""
        found = part.model.state_dict()
        wrong = sorted(found.keys() ^ self.values.keys())
        for name in found.keys() & self.values.keys():
            value, expected = found[name], self.values[name]
            free = altered is None or bool(altered & self.stored[name])
            if value.shape != expected.shape or not value.is_floating_point():
                wrong.append(f"{name} is {value.dtype}{list(value.shape)}")
            elif not free and not torch.equal(value, expected):
                wrong.append(name)
            value.sum().item()  # touches every page
        return wrong


def sound_parts(layout: str, folder: Path) -> dict[str, Sound]:
    """Return what the parts of a sound checkpoint hold; every way must agree."""
    parts: dict[str, Sound] = {}
    for way in _ways_of(layout).values():
        for name, part in way(folder).items():
            values = {k: v.clone() for k, v in part.model.state_dict().items()}
            sound = parts.setdefault(name, Sound(values, _stored(part, folder)))
            assert not sound.differences(part, frozenset()), f"{layout}: {name} differs"
    return parts


def examine(case: Case, folder: Path, done: Damage, sound: Mapping[str, Sound]) -> Verdict:
    """Load the damaged checkpoint in `folder` in every way, and judge."""
    verdict = Verdict(str(case), done.words)
    for name, way in _ways_of(case.layout).items():
        try:
            parts = way(folder)
            verdict.outcomes[name] = LOADED
            for part_name, part in parts.items():
                if wrong := sound[part_name].differences(part, done.altered):
                    verdict.violations.append(f"{name}: {part_name} differs: {wrong[:5]}")
            del parts
        except Exception as error:  # noqa: BLE001 - which it is, is what is judged
            verdict.outcomes[name] = type(error).__name__
            verdict.messages[name] = str(error)
            verdict.violations += [f"{name}: {wrong}" for wrong in _wrong_with(error, folder)]
    verdict.violations += _disagreements(verdict, case.layout)
    verdict.violations += _unseen(verdict, done, case.layout)
    return verdict


def _ways_of(layout: str) -> dict[str, Way]:
    """Return the ways to load a layout, or to look at it."""
    if layout == "part":
        return {
            "load": lambda folder: {"trunk": SplitModel.load(folder)},
            "verified": lambda folder: {"trunk": SplitModel.load(folder, verify_hashes=True)},
        }
    return {
        **{f"estimate {name}": _estimating(name) for name in NAMES},
        **{f"load {name}": _loading(name) for name in NAMES},
        "incremental": _splitting(low_memory=True),
        "traditional": _splitting(low_memory=False),
    }


def _estimating(name: str) -> Way:
    def way(folder: Path) -> dict[str, SplitModel]:
        estimate_component(folder, name, SPLIT)
        return {}

    return way


def _loading(name: str) -> Way:
    return lambda folder: {name: load_component(folder, name, SPLIT)}


def _splitting(*, low_memory: bool) -> Way:
    def way(folder: Path) -> dict[str, Any]:
        parts = load_split_model("auto", SPLIT, folder, low_memory=low_memory)
        return dict(zip(NAMES, parts, strict=True))

    return way


def _stored(part: SplitModel, folder: Path) -> dict[str, frozenset[str]]:
    """Return which stored tensors each tensor of a part is made of."""
    source = open_source(FolderFiles(folder))
    recipes = draw(part.config, part.spec, source, "").reads.recipes
    return {target: frozenset(recipe.stored) for target, recipe in recipes.items()}


def _wrong_with(error: Exception, folder: Path) -> Iterator[str]:
    """Say what is wrong with an error."""
    text = str(error)
    of_the_caller = isinstance(error, ValueError) and text.startswith("split points")
    if not isinstance(error, SplitLearnError) and not of_the_caller:
        yield f"{type(error).__name__}: {text[:_SHOWN]!r} is none of the library's errors"
    if str(folder) not in text and not of_the_caller:
        yield f"the message does not say where: {text[:_SHOWN]!r}"
    if len(text) > LONGEST_MESSAGE:
        yield f"the message has {len(text)} characters: {text[:_SHOWN]!r}"
    if not text.replace("\n", "").isprintable():
        yield f"the message can't be printed: {text[:_SHOWN]!r}"


def _disagreements(verdict: Verdict, layout: str) -> Iterator[str]:
    """Say where the ways don't agree."""
    works = {name: outcome == LOADED for name, outcome in verdict.outcomes.items()}
    if layout == "part":
        agree = works["load"] or not works["verified"]
    else:
        loads = all(works[f"load {name}"] for name in NAMES)
        agree = loads == works["incremental"] == works["traditional"]
        agree = agree and all(works[f"estimate {n}"] or not works[f"load {n}"] for n in NAMES)
    if not agree:
        message = next(iter(verdict.messages.values()), "")
        yield f"the ways don't agree: {verdict.outcomes} {message[:_SHOWN]}"


def _unseen(verdict: Verdict, done: Damage, layout: str) -> Iterator[str]:
    """Say where damage went unseen that must be seen, or was not named."""
    whole = ("load", "verified") if layout == "part" else ("incremental", "traditional")
    for name in whole:
        message = verdict.messages.get(name)
        if message is None and done.refused:
            yield f"{name}: was not refused"
        if message is not None and not all(said in message for said in done.said):
            yield f"{name}: does not say {done.said}: {message[:_SHOWN]!r}"

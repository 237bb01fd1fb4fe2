"""A seeded slice of the mutation fuzz of checkpoints; all of it is `scripts/soak checkpoints`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from checkpoint_fuzz.campaign import fuzz
from checkpoint_fuzz.cases import Case, slice_cases
from checkpoint_fuzz.judge import LOADED, examine, sound_parts
from checkpoint_fuzz.mutations import MUTATIONS, Damage
from checkpoint_fuzz.sound import make_sound

SEED = 0


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with one sound checkpoint for each layout."""
    folder = tmp_path_factory.mktemp("sound")
    make_sound(folder)
    return folder


def test_each_kind_of_damage_is_refused_or_harmless(sound: Path) -> None:
    """The first case is none: that it ends its process must be noted, and the others tried."""
    cases = [Case("part", "no_such_mutation", 0), *slice_cases(sound, SEED)]

    ended, *verdicts = fuzz(cases, sound)

    assert "ended with 1" in ended.violations[0]
    assert "KeyError: 'no_such_mutation'" in ended.violations[0]
    assert not [(v.case, v.words, v.violations) for v in verdicts if v.violations]
    assert {verdict.case.split("/")[1] for verdict in verdicts} == {"truncate", *MUTATIONS}
    outcomes = [outcome for verdict in verdicts for outcome in verdict.outcomes.values()]
    assert min(outcomes.count("CheckpointError"), outcomes.count(LOADED)) > len(outcomes) // 10


def test_the_judge_sees_what_it_is_to_see(sound: Path, tmp_path: Path) -> None:
    """The control: values that changed, damage that is not refused, a file that is not named."""
    expected = sound_parts("single", sound / "single")
    shutil.copytree(sound / "single", tmp_path / "model")
    case = Case("single", "flip_in_data", 0)
    done = case.damage(tmp_path / "model")
    (name,) = done.altered or ()

    def violations(claim: Damage) -> str:
        return str(examine(case, tmp_path / "model", claim, expected).violations)

    assert violations(done) == "[]"
    assert f"differs: ['{name}']" in violations(Damage("nothing"))
    assert "was not refused" in violations(Damage("all", refused=True, altered=None))
    (tmp_path / "model" / "model.safetensors").unlink()
    assert "does not say ('this',)" in violations(Damage("gone", said=("this",)))

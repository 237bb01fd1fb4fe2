from __future__ import annotations

import copy
import pickle

import pytest

from splitlearn_core.errors import SplitLearnError
from splitlearn_manager import errors
from splitlearn_manager.errors import ConfigError, ManagerError, ModelNotFoundError, Problem

LEAVES = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, ManagerError) and kind is not ManagerError
]


@pytest.mark.parametrize("kind", LEAVES)
def test_every_error_is_one_of_ours_and_a_builtin(kind: type[ManagerError]) -> None:
    builtins = (ValueError, KeyError, RuntimeError, TimeoutError)

    assert issubclass(kind, SplitLearnError)
    assert issubclass(kind, builtins)


@pytest.mark.parametrize("kind", LEAVES)
def test_every_error_says_its_status_and_code(kind: type[ManagerError]) -> None:
    assert 400 <= kind.http_status <= 599
    assert kind.code != ManagerError.code
    assert f"{kind.__name__} (" in (errors.__doc__ or "")
    assert kind.code in (errors.__doc__ or "")


def test_codes_differ() -> None:
    assert len({kind.code for kind in LEAVES}) == len(LEAVES)


@pytest.mark.parametrize("kind", LEAVES)
def test_the_message_reads_as_it_was_written(kind: type[ManagerError]) -> None:
    assert str(kind("no model 'a'")) == "no model 'a'"


def test_an_unknown_model_is_a_key_error_with_a_sentence() -> None:
    with pytest.raises(KeyError) as caught:
        raise ModelNotFoundError("no model 'a'; there is 'b'")

    assert str(caught.value) == "no model 'a'; there is 'b'"


def test_a_problem_shows_what_is_known_of_its_place() -> None:
    path = ("models", 0, "config", "split_points")

    assert str(Problem("is missing")) == "is missing"
    assert str(Problem("is missing", path)) == "models[0].config.split_points: is missing"
    assert str(Problem("is bad", (), "a.yaml")) == "a.yaml: is bad"
    assert str(Problem("is bad", path[:2], "a.yaml", 7)) == "a.yaml:7: models[0]: is bad"


def test_a_config_error_has_a_line_for_each_problem() -> None:
    error = ConfigError(Problem("is missing", ("port",)), "is odd").within("server")

    assert str(error) == "server.port: is missing\nserver: is odd"


@pytest.mark.parametrize("clone", [copy.copy, lambda e: pickle.loads(pickle.dumps(e))])  # noqa: S301
def test_a_config_error_survives_copying(clone: object) -> None:
    error = ConfigError(Problem("is missing", ("port",)))

    assert str(clone(error)) == "port: is missing"  # type: ignore[operator]

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from splitlearn_manager.config.yaml_file import MAX_BYTES, read_yaml
from splitlearn_manager.errors import ConfigError, Problem

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "c.yaml"


def test_plain_values_are_read(file: Path) -> None:
    file.write_text("a: 1\nb: [x, 2.5, true, null]\nc:\n  d: {e: 'f'}\n")

    assert read_yaml(file).data == {
        "a": 1,
        "b": ["x", 2.5, True, None],
        "c": {"d": {"e": "f"}},
    }


def test_the_home_stands_for_itself(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("a: 1\n")
    monkeypatch.setenv("HOME", str(file.parent))
    monkeypatch.setenv("USERPROFILE", str(file.parent))

    assert read_yaml("~/c.yaml").data == {"a": 1}


def test_an_alias_stands_for_its_value(file: Path) -> None:
    file.write_text("a: &points [2, 6]\nb: *points\n")

    assert read_yaml(file).data["b"] == [2, 6]


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("", 1, "must be a mapping (key: value), found nothing"),
        ("- a\n", 1, "must be a mapping (key: value), found a list"),
        ("text", 1, "must be a mapping (key: value), found the single value 'text'"),
        ("a: 1\nb: [1, 2\n", 3, "not YAML: while parsing a flow sequence"),
        ("a: 1\n\tb: 2\n", 2, "not YAML: while scanning"),
        ("a: 1\nb: *nowhere\n", 2, "not YAML: found undefined alias"),
        ("a: 1\n---\nb: 2\n", 2, "not YAML: expected a single document"),
        ("a: 1\nb: 2\na: 3\n", 3, "key 'a' stands here twice"),
        ("a:\n  b: 1\n  b: 1\n", 3, "key 'b' stands here twice"),
        ("a: 1\n2: b\n", 2, "a key must be text, found the single value '2' (quote it?)"),
        ("a: 1\n? [x]\n: b\n", 2, "a key must be text, found a list (quote it?)"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n", 3, "merge keys ('<<') are not read"),
        ("a: 1\nb: &x [*x]\n", 2, "an alias of a value in itself"),
        ("a: !!set {x}\n", 1, "tag 'tag:yaml.org,2002:set' is not allowed"),
        ("a: 1\nb: !!python/name:os.system\n", 2, "not YAML: could not determine a constructor"),
        ("a: !!python/object/apply:os.getcwd []\n", 1, "tag 'tag:yaml.org,2002:python/object"),
        ("a: 2024-02-31\n", 1, "cannot read the value: day is out of range"),
        (f"a: 1\nb: {'9' * 5000}\n", 2, "cannot read the value: Exceeds the limit"),
    ],
)
def test_what_can_not_be_read_is_told_with_its_line(
    file: Path, text: str, line: int, message: str
) -> None:
    file.write_text(text)

    with pytest.raises(ConfigError) as caught:
        read_yaml(file)

    assert str(caught.value).startswith(f"{file}:{line}: {message}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: \xff\xfe\x00", "not YAML: unacceptable character #x00ff"),
        (b"a: \x00", "not YAML: unacceptable character #x0000"),
        (b"a: " + b"[" * 1000, "nested too deeply"),
        (b"#" * (MAX_BYTES + 1), "the file is bigger than 1048576 bytes"),
    ],
)
def test_what_is_no_configuration_at_all_is_refused(
    file: Path, content: bytes, message: str
) -> None:
    file.write_bytes(content)

    with pytest.raises(ConfigError) as caught:
        read_yaml(file)

    assert message in str(caught.value)
    assert str(caught.value).startswith(str(file))


def test_aliases_of_aliases_can_not_blow_up(file: Path) -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    file.write_text("\n".join(lines))

    with pytest.raises(ConfigError, match=r"more than 10000 values \(through aliases\?\)"):
        read_yaml(file)


@pytest.mark.parametrize("name", ["nowhere.yaml", "."])
def test_a_file_that_can_not_be_opened_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the file: (No such|Is a directory)"):
        read_yaml(tmp_path / name)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("a",), 1),
        (("models",), 2),
        (("models", 1), 4),
        (("models", 1, "config", "split_points"), 6),
        (("models", 1, "config", "absent"), 5),
        (("models", 7), 2),
        (("a", "below"), 1),
        ((), 1),
    ],
)
def test_a_problem_is_located_where_its_path_leads(
    file: Path, path: tuple[str | int, ...], line: int
) -> None:
    file.write_text(
        "a: 1\nmodels:\n- b: 2\n- c: 3\n  config:\n    split_points: [\n      2]\n",
    )

    located = read_yaml(file).locate(Problem("is bad", path))

    assert (located.source, located.line) == (str(file), line)

"""YAML for configurations: plain values only, and every value knows its line.

PyYAML's own constructors are used for scalars alone.  Mappings and lists are built here, because
PyYAML drops the first of two equal keys without a word, and forgets where a value stood.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from splitlearn_manager.errors import ConfigError, KeyPath, Problem

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

MAX_BYTES = 1 << 20
MAX_VALUES = 10_000
"""Most values of one document, aliases counted as often as they are used: ten aliases of ten
aliases of … are a small file and an endless configuration."""

_MAP = "tag:yaml.org,2002:map"
_LIST = "tag:yaml.org,2002:seq"
_MERGE = "tag:yaml.org,2002:merge"


@dataclass(frozen=True)
class Document:
    """A file that was read.

    Attributes:
        source: The file's name, as it was given.
        data: What it holds; keys are text at every level.
        root: PyYAML's node of the whole, for the lines.
    """

    source: str
    data: dict[str, Any]
    root: yaml.Node

    def locate(self, problem: Problem) -> Problem:
        """Return a problem with file and line, as far as its path leads into the file."""
        return replace(problem, source=self.source, line=_line(self.root, problem.path))


def read_yaml(path: str | os.PathLike[str]) -> Document:
    """Read a YAML file whose root is a mapping.

    Raises:
        ConfigError: The file is not there or too big, is no YAML, no mapping, has a key twice, a
            key that is no text, a tag, a merge key, or more than `MAX_VALUES` values.  The message
            has the file and, where there is one, the line.
    """
    source = os.fspath(path)
    content = _read_bytes(source)
    try:
        loader = yaml.SafeLoader(content)
        root = _root(loader.get_single_node(), source)
        return Document(source, _Reader(loader, source).mapping(root), root)
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(source, error) from None
    except yaml.YAMLError as error:
        message = f"not YAML: {str(error).partition(chr(10))[0]}"
        raise ConfigError(Problem(message, source=source)) from None
    except RecursionError:
        raise ConfigError(Problem("nested too deeply", source=source)) from None


def read_file(path: str | os.PathLike[str], make: Callable[[dict[str, Any]], T]) -> T:
    """Return what `make` makes of a YAML file.

    Raises:
        ConfigError: From reading, or from `make`, which then has file and line as well.
    """
    document = read_yaml(path)
    try:
        return make(document.data)
    except ConfigError as error:
        raise ConfigError(*map(document.locate, error.problems)) from None


def _read_bytes(source: str) -> bytes:
    """Return a file's content, reading no more than the cap, whatever the file claims to be."""
    try:
        path = Path(os.path.expanduser(source))  # noqa: PTH111 - raises nothing of its own
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        message = f"cannot read the file: {error.strerror or error}"
        raise ConfigError(Problem(message, source=source)) from None
    if len(content) > MAX_BYTES:
        message = f"the file is bigger than {MAX_BYTES} bytes, which no configuration is"
        raise ConfigError(Problem(message, source=source))
    return content


def _syntax_error(source: str, error: yaml.MarkedYAMLError) -> ConfigError:
    """Return PyYAML's complaint with its line."""
    mark = error.problem_mark or error.context_mark
    message = ", ".join(text for text in (error.context, error.problem) if text)
    line = None if mark is None else mark.line + 1
    return ConfigError(Problem(f"not YAML: {message}", (), source, line))


def _root(node: yaml.Node | None, source: str) -> yaml.MappingNode:
    """Return the root of a document, which must be a mapping."""
    if isinstance(node, yaml.MappingNode):
        return node
    message = f"must be a mapping (key: value), found {_kind(node)}"
    raise ConfigError(Problem(message, (), source, 1))


def _kind(node: yaml.Node | None) -> str:
    """Return what a node is, in a reader's words."""
    match node:
        case None:
            return "nothing"
        case yaml.SequenceNode():
            return "a list"
        case yaml.MappingNode():
            return "a mapping"
    return f"the single value {node.value!r}"


class _Reader:
    """Builds plain values from the nodes of one document."""

    def __init__(self, loader: yaml.SafeLoader, source: str) -> None:
        self._loader = loader
        self._source = source
        self._values = 0
        self._open: list[yaml.Node] = []

    def mapping(self, node: yaml.Node) -> dict[str, Any]:
        """Return a mapping whose keys are text and stand there once."""
        items: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node)
            if key in items:
                raise self._error(key_node, f"key {key!r} stands here twice")
            items[key] = self._value(value_node)
        return items

    def _value(self, node: yaml.Node) -> Any:
        """Return the value of any node."""
        self._values += 1
        if self._values > MAX_VALUES:
            raise self._error(node, f"more than {MAX_VALUES} values (through aliases?)")
        if node in self._open:
            raise self._error(node, "an alias of a value in itself")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if node.tag not in (_MAP, _LIST):
            raise self._error(node, f"tag {node.tag!r} is not allowed; use plain values")
        self._open.append(node)
        value = self.mapping(node) if node.tag == _MAP else list(map(self._value, node.value))
        self._open.pop()
        return value

    def _key(self, node: yaml.Node) -> str:
        """Return a key, which must be text."""
        if node.tag == _MERGE:
            raise self._error(node, "merge keys ('<<') are not read; write the keys out")
        key = self._scalar(node) if isinstance(node, yaml.ScalarNode) else None
        if not isinstance(key, str):
            raise self._error(node, f"a key must be text, found {_kind(node)} (quote it?)")
        return key

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        """Return a number, text, boolean, date or null."""
        try:
            return self._loader.construct_object(node)
        except ValueError as error:  # a date without that day, a number of 5,000 digits
            raise self._error(node, f"cannot read the value: {error}") from None

    def _error(self, node: yaml.Node, message: str) -> ConfigError:
        """Return an error at a node."""
        return ConfigError(Problem(message, (), self._source, node.start_mark.line + 1))


def _line(node: yaml.Node, path: KeyPath) -> int:
    """Return the line where a path leads; where it leads out of the file, where it left."""
    line: int = node.start_mark.line + 1
    for key in path:
        step = _child(node, key)
        if step is None:
            return line
        line, node = step
    return line


def _child(node: yaml.Node, key: str | int) -> tuple[int, yaml.Node] | None:
    """Return the line and the node of one item of a mapping or list."""
    if isinstance(key, int):
        items = node.value if isinstance(node, yaml.SequenceNode) else []
        return (items[key].start_mark.line + 1, items[key]) if key < len(items) else None
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            if key_node.value == key:
                return key_node.start_mark.line + 1, value_node
    return None

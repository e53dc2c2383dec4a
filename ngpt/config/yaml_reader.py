"""Reads YAML 1.2 as plain data and keeps the line and column of every value for error messages.

In YAML 1.2 `1e-3` is a number and `on` is a string. Duplicate keys, tags and deep nesting are errors.
"""

import math
import os
import re
import stat
import unicodedata
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from ngpt.config.base import ConfigError, Location, Problem, printable

MAX_FILE_BYTES = 1 << 17  # bytes
MAX_DEPTH = 50
MAX_NODES = 20_000  # after expanding aliases; this many take half a second to read
MAX_INTEGER = 2**63 - 1  # larger ones fail later, when written or divided
CONSTANTS = {"null": {"": None, "~": None, "null": None}, "bool": {"true": True, "false": False}}
TOO_DEEP = f"nested too deeply, at most {MAX_DEPTH} levels are read"
TOO_MANY = f"more than {MAX_NODES} values"
FLOATS = {".inf": math.inf, "+.inf": math.inf, "-.inf": -math.inf, ".nan": math.nan}
# Control characters, surrogates, and direction marks, which can make text look like other text.
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

# White space that looks like the spaces of YAML: a tab is none in an indentation, and the others are parts of a word.
ODD_SPACE = "\xa0\u1680\u2000-\u200a\u202f\u205f\u3000"
ODD_IN_WORD = re.compile(f"[\t{ODD_SPACE}]")
ODD_IN_LINE = re.compile(f"^[ ?:-]*(\t)|[{ODD_SPACE}]")
LINE_END = re.compile("\r\n|[\n\r\x85\u2028\u2029]")

Position = tuple[int, int]  # line and column, counted from 1


@dataclass(frozen=True)
class Document:
    """The data of a YAML file and the position of every node."""

    path: Path
    data: Any
    positions: dict[Location, Position]

    def describe(self, problem: Problem) -> str:
        """`file.yaml:12:5: phases[0].vary.alhpa: unknown setting, ...`"""
        line, column = self.position(problem.location)
        return f"{self.path}:{line}:{column}: {problem.line()}"

    def position(self, location: Location) -> Position:
        """Line and column of a node, or of the nearest node that encloses it."""
        while location and location not in self.positions:
            location = location[:-1]
        return self.positions.get(location, (1, 1))


class YamlError(ConfigError):
    """A file that is not YAML or uses an unsupported feature; the message has path, line and column."""


def read_yaml(path: Path) -> Document:
    """Reads one YAML file. Raises YamlError if it is missing, not a regular file, too large, or not plain YAML."""
    if str(path) == "-" and not path.exists():
        why = "because a run is resumed from its file"
        raise YamlError(f"-: standard input is not read, {why}; give the path of a file")
    try:
        text = _read_bounded(path).decode("utf-8")
    except YamlError:
        raise
    except UnicodeDecodeError as error:
        raise YamlError(f"{path}: byte {error.start} is not UTF-8") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise YamlError(f"{printable(str(path))}: {getattr(error, 'strerror', None) or error}") from None
    return parse_yaml(text, path)


def parse_yaml(text: str, path: Path) -> Document:
    """Parses a YAML document; `path` is only used in messages. Raises YamlError like `read_yaml`."""
    node = _compose(text, path)
    reader = _Reader(path)
    data = None if node is None else reader.convert(node, (), 0)
    return Document(path, data, reader.positions)


def parse_value(text: str) -> Any:
    """Parses a value from the command line as in a YAML file: `1e-3`, `true`, `[1, 2]`."""
    return parse_yaml(text, Path("--set")).data


def parse_assignment(text: str) -> tuple[str, Any]:
    """Splits `optim.lr=1e-3` into name and value. Raises ConfigError if it is not NAME=VALUE with a YAML value."""
    name, equals, value = text.partition("=")
    if not (name.strip() and equals):
        raise ConfigError(f"--set {printable(text)}: expected NAME=VALUE")
    return name.strip(), parse_value(value)


def _read_bounded(path: Path) -> bytes:
    """Reads a regular file; rejects a pipe or a device without blocking on it."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise YamlError(f"{path}: not a regular file")
        raw = file.read(MAX_FILE_BYTES + 1)
    if len(raw) > MAX_FILE_BYTES:
        raise YamlError(f"{path}: too large, at most {MAX_FILE_BYTES} bytes are read")
    return raw


class _BoundedComposer(Composer):
    """Rejects a document while it is read, as soon as it is too deep or too large."""

    nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.nodes += 1
        if self.depth > MAX_DEPTH or self.nodes > MAX_NODES:
            problem = TOO_DEEP if self.depth > MAX_DEPTH else TOO_MANY
            raise ComposerError(None, None, problem, self.parser.peek_event().start_mark)
        return super().compose_node(parent, index)


def _compose(text: str, path: Path) -> Node | None:
    """Parses a document into nodes. Converts every error of ruamel.yaml to a YamlError."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = _BoundedComposer
    yaml.composer.warn_double_anchors = False  # YAML lets a later anchor of the same name hide an earlier one
    try:
        return yaml.compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        if mark and (odd := _find_odd_space(text, mark.line, mark.column)):
            raise YamlError(f"{path}:{odd}") from None
        position = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        problem = str(error.problem or error.context)
        text = problem if problem in (TOO_DEEP, TOO_MANY) else f"not valid YAML: {printable(problem)}"
        raise YamlError(f"{path}{position}: {text}") from None
    except YAMLError as error:
        raise YamlError(f"{path}: not valid YAML: {printable(str(error).splitlines()[0])}") from None
    except (ValueError, OverflowError) as error:  # a code point beyond Unicode, a version of 5000 digits
        raise YamlError(f"{path}: not valid YAML: {error}") from None


def _find_odd_space(text: str, line: int, column: int) -> str | None:
    """Finds white space that is none in YAML at an error, on its line, or on the last line before with content.

    Line and column are counted from 0. Often an error shows on the next line only. Returns the position and what to do.
    """
    lines = [re.split("[\"'#]", each, maxsplit=1)[0] for each in LINE_END.split(text)[: line + 1]]
    if lines[line:] and (match := ODD_IN_WORD.match(lines[line], column)):
        return f"{line + 1}:{column + 1}: {_use_spaces(match[0])}"
    with_content = (number for number in reversed(range(min(line, len(lines)))) if lines[number].strip())
    for number in (*range(line, len(lines)), *islice(with_content, 1)):
        if match := ODD_IN_LINE.search(lines[number]):
            return f"{number + 1}:{match.end()}: {_use_spaces(match[0][-1])}"
    return None


def _use_spaces(char: str) -> str:
    name = "tab" if char == "\t" else unicodedata.name(char, "line end").lower()
    article = "an" if name[0] in "aeiou" else "a"
    return f"{article} {name} (U+{ord(char):04X}): use spaces"


class _Reader:
    """Converts nodes to plain data and records their positions."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.positions: dict[Location, Position] = {}

    def convert(self, node: Node, location: Location, depth: int) -> Any:
        """Converts the node at `location`, `depth` levels deep. Raises YamlError if it is not plain data."""
        if depth > MAX_DEPTH or len(self.positions) > MAX_NODES:  # an alias may be inside its own node
            raise self._error(node, TOO_DEEP if depth > MAX_DEPTH else TOO_MANY)
        # A mapping's value keeps the position of its key, which messages should point to.
        self.positions.setdefault(location, _position(node))
        if isinstance(node, MappingNode) and _kind(node) == "map":
            return self._mapping(node, location, depth)
        if isinstance(node, SequenceNode) and _kind(node) == "seq":
            return [self.convert(item, (*location, i), depth + 1) for i, item in enumerate(node.value)]
        return self._scalar(node)

    def _mapping(self, node: MappingNode, location: Location, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node)
            if key in result:
                raise self._error(key_node, f"duplicate key {printable(repr(key))}")
            self.positions[(*location, key)] = _position(key_node)
            result[key] = self.convert(value_node, (*location, key), depth + 1)
        return result

    def _key(self, node: Node) -> str:
        """The key as written, even if it looks like a number."""
        if not isinstance(node, ScalarNode) or not node.value:
            raise self._error(node, "a key must be a word")
        if _kind(node) == "merge":
            raise self._error(node, "YAML 1.2 has no merge key '<<', write the settings out")
        self._scalar(node)
        if node.style is None and (match := ODD_IN_WORD.search(node.value)):
            raise self._error(node, _use_spaces(match[0]), offset=match.start())
        return node.value

    def _scalar(self, node: Node) -> Any:
        kind, text = _kind(node), str(node.value)
        if match := UNPRINTABLE.search(text):
            raise self._error(node, f"the character U+{ord(match[0]):04X} is not allowed")
        is_plain = isinstance(node, ScalarNode) and node.style is None
        if is_plain and text != text.strip():  # ruamel strips the spaces of YAML around a word
            place = 0 if text[0].isspace() else len(text.rstrip())
            raise self._error(node, _use_spaces(text[place]), offset=place)
        if kind in ("str", "timestamp", "value"):
            return text
        try:
            if kind in CONSTANTS:
                return CONSTANTS[kind][text.lower()]
            if kind == "int":
                return _integer(text)
            if kind == "float":
                return FLOATS[text.lower()] if text.lower() in FLOATS else float(text.replace("_", ""))
        except OverflowError:
            message = f"{printable(text, 40)} is too large, a whole number is at most {MAX_INTEGER}"
            raise self._error(node, message) from None
        except (KeyError, ValueError):
            raise self._error(node, f"{text[:40]!r} is not a value of type {kind!r}") from None
        raise self._error(node, f"the tag {printable(str(node.tag))} is not supported, only plain data")

    def _error(self, node: Node, message: str, *, offset: int = 0) -> YamlError:
        """Returns an error at a node, or `offset` characters after its start."""
        line, column = _position(node)
        return YamlError(f"{self.path}:{line}:{column + offset}: {message}")


def _position(node: Node) -> Position:
    return node.start_mark.line + 1, node.start_mark.column + 1


def _kind(node: Node) -> str:
    return str(node.tag).removeprefix("tag:yaml.org,2002:")


def _integer(text: str) -> int:
    digits = text.replace("_", "")
    if digits.lstrip("+-")[:2] in ("0b", "0o", "0x"):
        value = int(digits, 0)
    else:  # via float, since int() raises ValueError for more than 4300 decimal digits
        value = int(digits) if len(digits) < 100 else int(float(digits))
    if abs(value) > MAX_INTEGER:
        raise OverflowError
    return value

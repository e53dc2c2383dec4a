"""The settings with their types, defaults and meanings, as the config classes declare them.

The meaning of a setting is the docstring below its field. It is read from the source when somebody asks for it, so
that a run does not pay for it.
"""

import ast
import inspect
import json
import textwrap
from collections.abc import Iterable, Iterator
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from ngpt.config.base import Choice, Config

TYPES = {bool: "true or false", int: "whole number", float: "number", str: "text", NoneType: "null"}


class Setting(NamedTuple):
    """A setting: dotted name, type in words, default as in YAML, meaning, and the file that declares it."""

    name: str
    type: str
    default: str  # `required` without one
    meaning: str
    file: str
    is_runtime: bool  # does not change what is computed


def reference(cls: type[Config], prefix: str = "") -> list[Setting]:
    """Returns all settings of a config and its sections, in the order of declaration."""
    found: list[Setting] = []
    bases = [base for base in reversed(cls.__mro__) if issubclass(base, Config) and base is not Config]
    meanings = {name: text for base in bases for name, text in docstrings(base).items()}
    for name, field in cls.model_fields.items():
        section = _section(field)
        if section is not None:
            found += reference(section, f"{prefix}{name}.")
            continue
        extra = field.json_schema_extra
        is_runtime = isinstance(extra, dict) and extra.get("identity") is False
        default = "required" if field.is_required() else _yaml(field.default)
        kind = field.title or type_in_words(field.annotation, field.metadata)
        file = f"{cls.__module__.replace('.', '/')}.py"
        found.append(Setting(prefix + name, kind, default, meanings.get(name, ""), file, is_runtime))
    return found


@cache
def docstrings(cls: type[Config]) -> dict[str, str]:
    """Returns the docstrings below the fields of a class, each on one line. Fields without one are left out."""
    definition = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for field, after in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            texts[ast.unparse(field.target)] = " ".join(str(after.value.value).split())
    return texts


def type_in_words(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """Describes a type with its limits: `number above 0 or null`, `adamw, muon`, `list of number from 0 to 1`."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_in_words(parts[0], [*parts[1:], *metadata])
    details = list(_flat(metadata))
    choices = [part.func for part in details if isinstance(getattr(part, "func", None), Choice)]
    if choices:
        return ", ".join(sorted(choices[0].table))
    if origin in (Union, UnionType):
        return " or ".join(map(type_in_words, parts))
    if origin is tuple:
        number = "" if parts[-1] is Ellipsis else f"{len(parts)} times "
        return f"list of {number}{type_in_words(parts[0])}"
    return TYPES.get(annotation, "text or number") + _range(details)


def _section(field: FieldInfo) -> type[Config] | None:
    """Returns the class of a field that is a section, also of one that may be null."""
    kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
    return next((kind for kind in kinds if issubclass(kind, Config)), None)


def _flat(metadata: Iterable[Any]) -> Iterator[Any]:
    for part in metadata:
        yield from part.metadata if isinstance(part, FieldInfo) else [part]


def _range(details: Iterable[Any]) -> str:
    limits = {name: limit for part in details for name in ("ge", "gt", "le", "lt") if (limit := _limit(part, name))}
    low = f" from {limits['ge']}" if "ge" in limits else f" above {limits['gt']}" if "gt" in limits else ""
    high = f" to {limits['le']}" if "le" in limits else f" to below {limits['lt']}" if "lt" in limits else ""
    return low + high


def _limit(part: Any, name: str) -> str:
    limit = getattr(part, name, None)
    return "" if limit is None else f"{limit:,}"


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)

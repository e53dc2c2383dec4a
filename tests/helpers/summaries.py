"""Reads summaries from JSON, as `summary.json` has them."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def from_json(kind: type[T], data: Mapping[str, Any]) -> T:
    """Reads one of the types of tune/storage/summaries.py from parsed JSON.

    A field that is missing or null takes its default, so summaries of older versions still open. Other fields are
    ignored.
    """
    hints = _hints(kind)
    known = [item.name for item in fields(kind) if data.get(item.name) is not None]  # type: ignore[arg-type]
    return kind(**{name: _value(hints[name], data[name]) for name in known})


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _value(hint: Any, value: Any) -> Any:
    if get_origin(hint) is UnionType:  # X | None
        hint = get_args(hint)[0]
    if is_dataclass(hint):
        return from_json(hint, value)  # type: ignore[arg-type]
    if get_origin(hint) is tuple:
        return tuple(_value(get_args(hint)[0], part) for part in value)
    return value

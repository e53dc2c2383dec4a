"""The config base class, errors with suggestions, overrides by dotted name, and the content hash."""

import difflib
import hashlib
import json
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, TypeVar, dataclass_transform, get_args

import pydantic
from pydantic_core import PydanticCustomError

from ngpt.code.version import command
from ngpt.config.peer_words import our_word
from ngpt.config.visible import visible

Location = tuple[str | int, ...]

MAX_NAME_LENGTH = 200  # characters of a name or value in a message
QUOTES = "put it in quotes, since it must be a text"  # for what YAML reads as a number, or as true or false
MAX_MESSAGE_LENGTH = 2000  # characters
MOST_LISTED = 25  # names of settings in a message
ORIGINS: dict[tuple[str, str], str] = {}  # where an unknown name comes from, by what it names and the name
PLUGINS = "a plug-in is code, so no file of settings can name it; give it on the command line: --plugin FILE.py"


class Problem(NamedTuple):
    """One mistake in a config: its location, and a message that says how to fix it."""

    location: Location
    message: str

    def __str__(self) -> str:
        return f"{dotted_name(self.location)}: {self.message}" if self.location else self.message

    def line(self) -> str:
        """Returns the problem as a single line of limited length."""
        return str(self._replace(message=printable(self.message, MAX_MESSAGE_LENGTH)))


class UserError(Exception):
    """An error that the user can fix. Commands print its message without a traceback and exit with `exit_code`."""

    exit_code = 2


class ConfigError(UserError, ValueError):
    """Reports all mistakes of a config at once; `problems` has one entry for each."""

    def __init__(self, problems: Iterable[Problem] | str) -> None:
        self.problems = [Problem((), problems)] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(map(str, self.problems)))


# Tells the type checker that configs are frozen. A config used as a dict key repeats `frozen=True`.
@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(pydantic.Field,))
class Config(pydantic.BaseModel):
    """Base class of all configs: immutable, strictly typed (`"3"` is not a number), no unknown settings, no NaN."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


ConfigT = TypeVar("ConfigT", bound=Config)


def runtime_setting(default: Any, **constraints: Any) -> Any:
    """Declares where or how verbosely to run. Such a field does not affect results, so `content_hash` ignores it."""
    return pydantic.Field(default, json_schema_extra={"identity": False}, **constraints)


def added_setting(default: Any, *, same_as_default: Collection[Any] = (), **constraints: Any) -> Any:
    """Declares a field newer than some trial ids; `content_hash` ignores it at its default and at `same_as_default`."""
    return pydantic.Field(default, json_schema_extra={"left_out_at": [default, *same_as_default]}, **constraints)


def renamed_setting(default: Any, aliases: Mapping[str, str], **constraints: Any) -> Any:
    """Declares a field with renamed values. `aliases` maps old names to new; files and trial ids keep the old ones."""
    old_names: dict[str, Any] = {new: old for old, new in aliases.items()}
    return pydantic.Field(default, json_schema_extra={"stored_as": old_names}, **constraints)


@dataclass(frozen=True, eq=False)
class Choice:
    """Checks that a value is a name in `table`, or an old name for one in `aliases`, and returns the name."""

    table: Collection[str]
    what: str
    aliases: Mapping[str, str]

    def __call__(self, name: str) -> str:
        name = self.aliases.get(name, name)
        if name not in self.table:
            text = unknown_message(self.what, name, self.table)
            is_told = "choose one of" in text or (self.what, name) in ORIGINS
            allowed = "" if is_told else f" Allowed: {', '.join(sorted(self.table))}"
            raise PydanticCustomError("choice", "{text}", {"text": text + allowed})
        return name


def one_of(table: Collection[str], what: str, *, aliases: Mapping[str, str] | None = None) -> pydantic.AfterValidator:
    """Annotation for a field that names an entry of `table`. `aliases` maps old names to new ones."""

    return pydantic.AfterValidator(Choice(table, what, aliases or {}))


def invalid_setting(message: str, *fields: str) -> PydanticCustomError:
    """Returns an error for a `model_validator`, located at the first of `fields` that is set explicitly."""
    return PydanticCustomError("invalid", "{text}", {"text": message, "fields": fields})


def unknown_message(what: str, name: object, options: Collection[str]) -> str:
    """Returns `unknown corpus 'shakespear', did you mean 'shakespeare'?`, or lists all options if none is similar.

    A setting that other programs call so is answered with ours; a long list of settings with the command to search it.
    """
    if origin := ORIGINS.get((what, str(name))):
        return f"unknown {what} {printable(repr(str(name)))}: {origin}"
    if what == "setting" and str(name).rpartition(".")[2] in ("plugin", "plugins"):
        return PLUGINS
    if what == "setting" and (ours := our_word(str(name)[:MAX_NAME_LENGTH])):
        return f"unknown setting; here it is called {ours}"
    near = difflib.get_close_matches(str(name)[:MAX_NAME_LENGTH], list(options), n=1, cutoff=0.6)
    hint = f", did you mean '{near[0]}'?" if near else f"; choose one of {', '.join(sorted(options))}"
    if what == "setting" and not near and len(options) > MOST_LISTED:
        hint = f"; find it with `{command()} settings WORD`"
    if isinstance(name, bool | int | float) and str(name) in options:
        hint = f"; {QUOTES}"
    return f"unknown {what} {printable(repr(str(name)))}{hint}" if what != "setting" else f"unknown setting{hint}"


def remember_origin(what: str, name: str, text: str) -> None:
    """Lets `unknown_message` say, instead of a suggestion, where a name comes from that an earlier run knew."""
    ORIGINS[what, name] = text


def dotted_name(location: Location) -> str:
    """Formats a location: `("phases", 0, "vary", "alpha")` becomes `phases[0].vary.alpha`."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{printable(part)}" if text else printable(part)
    return text


def printable(text: str, max_length: int = MAX_NAME_LENGTH) -> str:
    """Returns a text in visible form on one line, and shortens a long one."""
    if len(text) > max_length:
        text = f"{text[: max_length // 2]}…{text[-(max_length // 2) :]}"
    return visible(text)


@cache
def settings(cls: type[Config]) -> dict[str, pydantic.fields.FieldInfo]:
    """Returns the fields of a config and its sub-configs by dotted name (`optim.lr`), in declaration order."""
    fields: dict[str, pydantic.fields.FieldInfo] = {}
    for name, field in cls.model_fields.items():
        inner = settings(sections(cls)[name]) if name in sections(cls) else None
        fields |= {name: field} if inner is None else {f"{name}.{leaf}": info for leaf, info in inner.items()}
    return fields


@cache
def sections(cls: type[Config]) -> dict[str, type[Config]]:
    """Returns the classes of the sub-configs by field name, such as `optim`."""
    types = {name: field.annotation for name, field in cls.model_fields.items()}
    return {name: kind for name, kind in types.items() if isinstance(kind, type) and issubclass(kind, Config)}


def resolve(cls: type[Config], name: str) -> str:
    """Returns the dotted name of a setting, given in full or as its last part. ConfigError if unknown or ambiguous."""
    known = settings(cls)
    if name in known:
        return name
    leaves = [full for full in known if full.rpartition(".")[2] == name]
    if len(leaves) == 1:
        return leaves[0]
    raise ConfigError(f"ambiguous setting, write one of {', '.join(leaves)}" if leaves else _unknown_setting(cls, name))


def build(cls: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Builds a config from values by full dotted name. Raises ConfigError with one problem per invalid value."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *sections, leaf = name.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    try:
        return cls.model_validate(tree)
    except pydantic.ValidationError as error:
        raise ConfigError([_explain(cls, item, values) for item in error.errors()]) from None


def override(config: ConfigT, changes: Mapping[str, Any]) -> ConfigT:
    """Returns `config` with `changes` by dotted name or unique last part; ConfigError lists all mistakes in them."""
    problems, full = [], {}
    for name, value in changes.items():
        try:
            full[resolve(type(config), name)] = value
        except ConfigError as error:
            problems += [Problem((name,), problem.message) for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    return build(type(config), flatten(config) | full)


def flatten(config: Config) -> dict[str, Any]:
    """Returns all values by dotted name, as stored in files and trial ids, so a renamed value has its old name."""
    values: dict[str, Any] = {}
    stored_as = _field_extras(type(config), "stored_as")
    for name, value in config:  # in the order of `settings`
        if isinstance(value, Config):
            values |= {f"{name}.{inner}": deeper for inner, deeper in flatten(value).items()}
        else:
            values[name] = stored_as[name].get(value, value) if name in stored_as else value
    return values


def is_identity(cls: type[Config], name: str) -> bool:
    """Whether a setting can affect results, as opposed to where or how verbosely to run."""
    return name not in _field_extras(cls, "identity")


def identity_settings(config: Config) -> dict[str, Any]:
    """Returns the values that can affect results, by dotted name, without an `added_setting` at its default."""
    runtime = _field_extras(type(config), "identity")
    left_out_at = _field_extras(type(config), "left_out_at")
    values = flatten(config).items()
    return {name: v for name, v in values if name not in runtime and v not in left_out_at.get(name, ())}


@cache
def _field_extras(cls: type[Config], key: str) -> dict[str, Any]:
    """Returns what `runtime_setting`, `added_setting` or `renamed_setting` stored under `key`, by dotted name."""
    extras = {name: field.json_schema_extra for name, field in settings(cls).items()}
    return {name: extra[key] for name, extra in extras.items() if isinstance(extra, dict) and key in extra}


def content_hash(config: Config, *, leave_out: Collection[str] = (), extra: Mapping[str, Any] | None = None) -> str:
    """Returns ten hex digits that depend only on the settings that can affect results, and on `extra`."""
    values = {name: value for name, value in identity_settings(config).items() if name not in leave_out}
    text = json.dumps(values | dict(extra or {}), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _explain(cls: type[Config], error: Any, values: Mapping[str, Any]) -> Problem:
    """Converts one pydantic error to a Problem."""
    # Without the names that pydantic adds for the members of a union, such as `constrained-float`.
    location: Location = tuple(part for part in error["loc"] if str(part).replace("_", "").isalnum())
    context = error.get("ctx", {})
    if error["type"] == "extra_forbidden":
        return Problem(location, _unknown_setting(cls, dotted_name(location)))
    if error["type"] in ("choice", "invalid"):
        is_set = [field for field in context.get("fields", ()) if ".".join(map(str, (*location, field))) in values]
        return Problem((*location, *is_set[:1]), context["text"])
    message = error["msg"][0].lower() + error["msg"][1:]
    if error["type"] == "missing":
        return Problem(location, message)
    value, advice = error["input"], ""
    if error["type"] == "string_type" and isinstance(value, bool | int | float):
        advice = f"; {QUOTES}"
    elif error["type"].startswith(("greater_than", "less_than")):
        advice = _allowed_range(cls, location)
    return Problem(location, f"{message}, got {value!r}{advice}")


def _allowed_range(cls: type[Config], location: Location) -> str:
    """Returns `; 1 to 4,096 is possible` for a field with an upper and a lower limit, otherwise an empty text."""
    field = settings(cls).get(".".join(part for part in location if isinstance(part, str)))
    limits = _limits(field) if field else {}
    if "le" not in limits or not limits.keys() & {"ge", "gt"}:
        return ""
    low = f"{limits['ge']:,}" if "ge" in limits else f"above {limits['gt']:,}"
    return f"; {low} to {limits['le']:,} is possible"


def _limits(item: Any) -> dict[str, float]:
    """Returns the limits `ge`, `gt` and `le` in a field or its annotation; of a union, those of its first number."""
    found = {name: limit for name in ("ge", "gt", "le") if (limit := getattr(item, name, None)) is not None}
    if isinstance(item, pydantic.fields.FieldInfo):
        inner = [*item.metadata, item.annotation]
    else:
        inner = [*getattr(item, "__metadata__", ()), *get_args(item)]
    for part in inner:
        found = _limits(part) | found
    return found


def _unknown_setting(cls: type[Config], name: str) -> str:
    """Returns the message for an unknown setting. A suggestion has a dot only if `name` has one."""
    known = settings(cls)
    candidates = known if "." in name else {full.rpartition(".")[2] for full in known}
    near = difflib.get_close_matches(name[:MAX_NAME_LENGTH], list(candidates), n=1)
    note = ""
    if foreign := [char for char in name[:MAX_NAME_LENGTH] if not char.isascii()]:  # a Cyrillic a looks like a Latin a
        note = f" (it contains {unicodedata.name(foreign[0], 'a character')}, U+{ord(foreign[0]):04X})"
    return unknown_message("setting", name, near or known) + note

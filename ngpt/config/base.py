"""What all configs share: the base class, errors with suggestions, overrides by dotted name, the content hash."""

import difflib
import hashlib
import json
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple, TypeVar, dataclass_transform

import pydantic
from pydantic_core import PydanticCustomError

Location = tuple[str | int, ...]

MAX_NAME_LENGTH = 200  # characters of a name or value that a message shows
MAX_MESSAGE_LENGTH = 2000  # characters; the list of all settings is one of 1500


class Problem(NamedTuple):
    """One mistake in a config: its location, and a message with what to do about it."""

    location: Location
    message: str

    def __str__(self) -> str:
        return f"{dotted_name(self.location)}: {self.message}" if self.location else self.message

    def line(self) -> str:
        """The problem as a single line of bounded length, whatever the file contains."""
        return str(self._replace(message=printable(self.message, MAX_MESSAGE_LENGTH)))


class UserError(Exception):
    """An error that the user can mend. Commands print its message without a traceback and exit with `exit_code`."""

    exit_code = 2


class ConfigError(UserError, ValueError):
    """All mistakes of a config at once, one entry of `problems` each."""

    def __init__(self, problems: Iterable[Problem] | str) -> None:
        self.problems = [Problem((), problems)] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(map(str, self.problems)))


# Tells the type checker that configs are frozen. A config used as a dict key repeats `frozen=True`.
@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(pydantic.Field,))
class Config(pydantic.BaseModel):
    """Base of every config: immutable, no unknown settings, no silent conversion (`"3"` is not a number), no NaN."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


ConfigT = TypeVar("ConfigT", bound=Config)


def runtime_setting(default: Any, **constraints: Any) -> Any:
    """A field about where or how verbosely to run. It does not change results, so `content_hash` leaves it out."""
    return pydantic.Field(default, json_schema_extra={"identity": False}, **constraints)


def added_setting(default: Any, *, same_as_default: Collection[Any] = (), **constraints: Any) -> Any:
    """A field newer than existing trial ids, which leave it out at its default or a value `same_as_default`."""
    return pydantic.Field(default, json_schema_extra={"left_out_at": [default, *same_as_default]}, **constraints)


def renamed_setting(default: Any, aliases: Mapping[str, str], **constraints: Any) -> Any:
    """A field one of whose values got a new name; `aliases` maps old to new. Files and trial ids keep the old name."""
    words: dict[str, Any] = {new: old for old, new in aliases.items()}
    return pydantic.Field(default, json_schema_extra={"stored_as": words}, **constraints)


def one_of(table: Collection[str], what: str, *, aliases: Mapping[str, str] | None = None) -> pydantic.AfterValidator:
    """Annotation for a field that names an entry of `table`; reads `aliases` as `renamed_setting` describes them."""

    def check(name: str) -> str:
        name = (aliases or {}).get(name, name)
        if name not in table:
            text = unknown_message(what, name, table)
            allowed = "" if "choose one of" in text else f" Allowed: {', '.join(sorted(table))}"
            raise PydanticCustomError("choice", "{text}", {"text": text + allowed})
        return name

    return pydantic.AfterValidator(check)


def invalid_setting(message: str, *fields: str) -> PydanticCustomError:
    """An error for a `model_validator`. It is located at the first of `fields` that was set explicitly."""
    return PydanticCustomError("invalid", "{text}", {"text": message, "fields": fields})


def unknown_message(what: str, name: object, options: Collection[str]) -> str:
    """`unknown corpus 'shakespear', did you mean 'shakespeare'?`, or the full list if nothing is similar."""
    near = difflib.get_close_matches(str(name)[:MAX_NAME_LENGTH], list(options), n=1, cutoff=0.6)
    hint = f", did you mean '{near[0]}'?" if near else f"; choose one of {', '.join(sorted(options))}"
    return f"unknown {what} {printable(repr(str(name)))}{hint}" if what != "setting" else f"unknown setting{hint}"


def dotted_name(location: Location) -> str:
    """`("phases", 0, "vary", "alpha")` as `phases[0].vary.alpha`."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{printable(part)}" if text else printable(part)
    return text


def printable(text: str, longest: int = MAX_NAME_LENGTH) -> str:
    """User input as one printable line: other characters are escaped, the middle of a long text is cut."""
    if len(text) > longest:
        text = f"{text[: longest // 2]}…{text[-(longest // 2) :]}"
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


@cache
def settings(cls: type[Config]) -> dict[str, pydantic.fields.FieldInfo]:
    """Every setting of a config and its sub-configs by dotted name (`optim.lr`), in reading order."""
    found: dict[str, pydantic.fields.FieldInfo] = {}
    for name, field in cls.model_fields.items():
        inner = settings(sections(cls)[name]) if name in sections(cls) else None
        found |= {name: field} if inner is None else {f"{name}.{leaf}": info for leaf, info in inner.items()}
    return found


@cache
def sections(cls: type[Config]) -> dict[str, type[Config]]:
    """The sub-configs of a config by name, such as `optim`."""
    kinds = {name: field.annotation for name, field in cls.model_fields.items()}
    return {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Config)}


def resolve(cls: type[Config], name: str) -> str:
    """The dotted name of a setting, given as such or as a unique last part; raises ConfigError if there is no such."""
    known = settings(cls)
    if name in known:
        return name
    leaves = [full for full in known if full.rpartition(".")[2] == name]
    if len(leaves) == 1:
        return leaves[0]
    raise ConfigError(f"ambiguous setting, write one of {', '.join(leaves)}" if leaves else _unknown_setting(cls, name))


def build(cls: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """A config from settings by full dotted name; raises ConfigError with one problem per invalid value."""
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
    """`config` with changes by dotted name or unique last part. A ConfigError has all unknown names or bad values."""
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
    """Every setting's value by dotted name, as files and trial ids have it: under the old name if it was renamed."""
    values: dict[str, Any] = {}
    stored_as = _marks(type(config), "stored_as")
    for name, value in config:  # in the order of `settings`
        if isinstance(value, Config):
            values |= {f"{name}.{inner}": deeper for inner, deeper in flatten(value).items()}
        else:
            values[name] = stored_as[name].get(value, value) if name in stored_as else value
    return values


def is_identity(cls: type[Config], name: str) -> bool:
    """Whether a setting changes what is computed, not only where or how verbosely."""
    return name not in _marks(cls, "identity")


def identity_settings(config: Config) -> dict[str, Any]:
    """The settings that decide what a config computes, by dotted name; an `added_setting` only where it matters."""
    runtime, left_out_at = _marks(type(config), "identity"), _marks(type(config), "left_out_at")
    values = flatten(config).items()
    return {name: v for name, v in values if name not in runtime and v not in left_out_at.get(name, ())}


@cache
def _marks(cls: type[Config], mark: str) -> dict[str, Any]:
    """What `runtime_setting`, `added_setting` and `renamed_setting` note at fields, by dotted name."""
    extras = {name: field.json_schema_extra for name, field in settings(cls).items()}
    return {name: extra[mark] for name, extra in extras.items() if isinstance(extra, dict) and mark in extra}


def content_hash(config: Config, *, leave_out: Collection[str] = (), extra: Mapping[str, Any] | None = None) -> str:
    """Ten hex digits that depend only on what a config computes."""
    kept = {name: value for name, value in identity_settings(config).items() if name not in leave_out}
    text = json.dumps(kept | dict(extra or {}), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _explain(cls: type[Config], error: Any, given: Mapping[str, Any]) -> Problem:
    """Rewords one pydantic error."""
    # Without the tags that pydantic adds for the branch of a union, such as `constrained-float`.
    location: Location = tuple(part for part in error["loc"] if str(part).replace("_", "").isalnum())
    context = error.get("ctx", {})
    if error["type"] == "extra_forbidden":
        return Problem(location, _unknown_setting(cls, dotted_name(location)))
    if error["type"] in ("choice", "invalid"):
        set_here = [field for field in context.get("fields", ()) if ".".join(map(str, (*location, field))) in given]
        return Problem((*location, *set_here[:1]), context["text"])
    message = error["msg"][0].lower() + error["msg"][1:]
    return Problem(location, f"{message}, got {error['input']!r}" if error["type"] != "missing" else message)


def _unknown_setting(cls: type[Config], name: str) -> str:
    """Compares dotted names with dotted names and last parts with last parts; the full list is always dotted."""
    known = settings(cls)
    alike = known if "." in name else {full.rpartition(".")[2] for full in known}
    near = difflib.get_close_matches(name[:MAX_NAME_LENGTH], list(alike), n=1)
    strange = [sign for sign in name[:MAX_NAME_LENGTH] if not sign.isascii()]
    # A Cyrillic a looks like a Latin one.
    note = f" (it has {unicodedata.name(strange[0], 'a sign')}, U+{ord(strange[0]):04X}, in it)" if strange else ""
    return unknown_message("setting", name, near or known) + note

"""Reads the claims of a campaign file.

claims:
  - {id: alpha-028, source: "002", says: "alpha 0.28 beats 0.05", relation: less, left: {alpha: 0.28}, right: ...}
  - {id: epoch, says: "18B tokens in 20 minutes", relation: arithmetic, expression: "110e3 * 20 * 60", value: 18e9, ...}
"""

from collections import ChainMap
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from ngpt.config.base import ConfigError, Location, Problem, resolve, unknown_message
from ngpt.config.overrides import named_settings
from ngpt.config.yaml_reader import read_yaml
from ngpt.training.config import TrainConfig, with_absolute_paths
from tune import format as fmt
from tune.claims.arithmetic import evaluate
from tune.claims.relations import DIRECTIONS, RELATIONS
from tune.claims.selectors import NAME_KEYS, same
from tune.spec.metrics import BUILT_IN_GOALS, KNOWN_METRICS, metric_goal
from tune.spec.reading import Reading, check_name, collect, complete
from tune.spec.schema import Claim

COMMON_FIELDS = ("id", "relation", "source", "says")  # fields of every claim
TRIAL_FIELDS = ("metric", "phase")


def load_claims(path: Path, metrics: Iterable[str] = ()) -> tuple[Claim, ...]:
    """Reads the claims of a file for a campaign that ran without them; keys other than `claims:` are ignored.

    Beside the known ones, claims may name `metrics`, which the records have from a plug-in that is not loaded here.

    A claim about an arm that does not exist is no error here; its verdict will be `no data`.

    Raises:
        ConfigError: claims are invalid; the message has one line per problem.
    """
    document = read_yaml(path)
    data = document.data if isinstance(document.data, dict) else {}
    return tuple(complete(read_claims(data.get("claims"), path.parent, metrics), document).values())


def read_claims(data: Any, folder: Path, metrics: Iterable[str] = ()) -> Reading[dict[int, Claim]]:
    """Reads a list of claims; returns the valid ones by their index in the list."""
    known = ChainMap[str, Any](dict.fromkeys(metrics), KNOWN_METRICS)  # pyright: ignore[reportArgumentType]
    if not isinstance(data, list):
        yield Problem(("claims",), f"expected a list of claims, got {data!r}")
        return {}
    claims: dict[int, Claim] = {}
    ids: set[str] = set()
    for i, raw in enumerate(data):
        fields, wrong = collect(_read_claim(raw, ("claims", i), folder, known))
        yield from wrong
        if wrong or fields is None:
            continue
        if fields["id"] in ids:
            yield Problem(("claims", i, "id"), f"two claims have the id {fields['id']!r}")
            continue
        ids.add(fields["id"])
        metric = fields.get("metric", Claim.metric)
        # The plug-in that adds a metric may not be there when the results are read again.
        claims[i] = Claim(**fields, goal=None if metric in BUILT_IN_GOALS else metric_goal(metric))
    return claims


def _read_claim(raw: Any, at: Location, folder: Path, metrics: Collection[str]) -> Reading[dict[str, Any]]:
    if not isinstance(raw, dict):
        yield Problem(at, f"a claim is a mapping with `id:` and `relation:`, got {raw!r}")
        return {}
    if "id" not in raw:
        yield Problem(at, "`id:` is missing: give the claim a name")
    else:
        yield from check_name(raw["id"], (*at, "id"), "claim")
    if "relation" not in raw:
        yield Problem(at, f"`relation:` is missing: choose one of {', '.join(RELATIONS)}")
        return {}
    name = raw["relation"]
    if not isinstance(name, str) or name not in RELATIONS:
        yield Problem((*at, "relation"), unknown_message("relation", name, RELATIONS))
        return {}
    relation = RELATIONS[name]
    allowed = (*COMMON_FIELDS, *relation.needs, *relation.allows, *(TRIAL_FIELDS if relation.uses_trials else ()))
    for key in raw:
        if key in FIELDS and key not in allowed:
            yield Problem((*at, key), f"`{key}:` does not apply to the relation `{name}`")
        elif key not in allowed:
            yield Problem((*at, key), unknown_message("setting", key, allowed))
    for key in (key for key in relation.needs if key not in raw):
        yield Problem(at, f"`{key}:` is missing: the relation `{name}` needs {fmt.listing(relation.needs)}")
    fields = {key: raw[key] for key in ("id", "relation") if key in raw}
    for key in (key for key in raw if key in allowed and key not in fields):
        if key in SELECTORS:
            fields[key] = yield from _read_selector(raw[key], (*at, key), folder)
            continue
        if key == "parts":
            fields[key] = yield from _read_parts(raw[key], (*at, key), folder)
            continue
        try:
            fields[key] = (_choice("metric", metrics) if key == "metric" else READERS[key])(raw[key])
        except ConfigError as error:
            yield Problem((*at, key), str(error))
    if fields.get("left") and same(fields["left"], fields.get("right")):
        yield Problem((*at, "right"), "left and right are the same")
    return fields


def _read_selector(raw: Any, at: Location, folder: Path) -> Reading[dict[str, Any]]:
    """Reads a selector: settings by full name, and the keys `arm` and `phase`."""
    if not isinstance(raw, dict) or not raw:
        yield Problem(at, f"expected the settings of an arm, such as {{alpha: 0.28}}, or {{arm: NAME}}, got {raw!r}")
        return {}
    names = {key: value for key, value in raw.items() if key in NAME_KEYS}
    for key, value in names.items():
        if not isinstance(value, str):
            yield Problem((*at, key), f"expected the name of {'an arm' if key == 'arm' else 'a phase'}, got {value!r}")
    rest = {key: value for key, value in raw.items() if key not in NAME_KEYS}
    found, wrong = named_settings(TrainConfig, rest, at, folder=folder)
    yield from wrong
    if "seed" in found:
        yield Problem(found["seed"][1], "a claim covers all seeds of its arms: leave out `seed:`")
    return names | with_absolute_paths({name: value for name, (value, _) in found.items()})


def _read_parts(raw: Any, at: Location, folder: Path) -> Reading[tuple[dict[str, Any], ...]]:
    """Reads the single changes that an arm joins, as a list of selectors."""
    if not isinstance(raw, list) or len(raw) < 2:
        yield Problem(at, f"expected a list of two or more arms, such as [{{arm: A}}, {{arm: B}}], got {raw!r}")
        return ()
    parts: list[dict[str, Any]] = []
    for i, part in enumerate(raw):
        parts.append((yield from _read_selector(part, (*at, i), folder)))
    return tuple(parts)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ConfigError(f'expected text, got {value!r}; write "{value}" in quotes')
    return value


def _choice(what: str, table: Collection[str]) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if not isinstance(value, str) or value not in table:
            raise ConfigError(unknown_message(what, value, table))
        return value

    return read


def _tolerance(value: Any) -> float:
    number = evaluate(value)
    if number < 0:
        raise ConfigError(f"a tolerance is 0 or more, got {value!r}")
    return number


def _expression(value: Any) -> str:
    evaluate(value)
    return str(value)


READERS: dict[str, Callable[[Any], Any]] = {
    "source": _text,
    "says": _text,
    "phase": _text,
    "setting": lambda value: resolve(TrainConfig, _text(value)),
    "direction": _choice("direction", DIRECTIONS),
    "value": evaluate,
    "tolerance": _tolerance,
    "expression": _expression,
}
SELECTORS = ("left", "right")
FIELDS = ("id", "relation", "metric", *READERS, *SELECTORS, "parts")

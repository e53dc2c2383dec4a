"""Reads `seeds:`: a list, `fresh`, `fresh N`, or `{until: decided, start: 3, most: 30}`."""

import re
from typing import Any

from ngpt.config.base import Location, Problem, unknown_message
from tune.spec.reading import Reading, read_seeds
from tune.spec.schema import FreshSeeds, SeedRule, UntilDecided

MAX_SEEDS = 9999  # largest N of `fresh N`
MAX_ROUNDS_SEEDS = 1000  # largest `most`
UNTIL_KEYS = ("until", "start", "most", "fresh")
UNTIL = ("decided",)


def read_seed_rule(data: Any, at: Location) -> Reading[SeedRule]:
    """Reads any form of `seeds:`; returns an empty tuple after a problem."""
    if isinstance(data, dict):
        return (yield from _until_decided(data, at))
    if not isinstance(data, str):
        return (yield from read_seeds(data, at))
    if data.strip() == "fresh":
        return FreshSeeds()
    match = re.fullmatch(r"fresh +([0-9]{1,9})", data)
    if match and 1 <= int(match[1]) <= MAX_SEEDS:
        return FreshSeeds(int(match[1]))
    allowed = f"`fresh`, `fresh N` with N from 1 to {MAX_SEEDS}, or a list"
    yield Problem(at, f"expected {allowed}, got {data!r}")
    return ()


def _until_decided(data: dict[Any, Any], at: Location) -> Reading[SeedRule]:
    is_valid = True
    for key in data:
        if key not in UNTIL_KEYS:
            yield Problem((*at, key), unknown_message("setting", key, UNTIL_KEYS))
            is_valid = False
    if "until" not in data:
        yield Problem(at, "`until: decided` is missing: write `{until: decided, start: 3, most: 30}`")
        return ()
    if data["until"] not in UNTIL:
        yield Problem((*at, "until"), unknown_message("condition", data["until"], UNTIL))
        is_valid = False
    numbers = {}
    for key, lowest, highest in (("start", 2, MAX_ROUNDS_SEEDS), ("most", 2, MAX_ROUNDS_SEEDS)):
        numbers[key] = number = data.get(key, getattr(UntilDecided, key))
        if type(number) is not int or not lowest <= number <= highest:
            yield Problem((*at, key), f"expected a whole number from {lowest} to {highest}, got {number!r}")
            is_valid = False
    if is_valid and numbers["most"] < numbers["start"]:
        where, text = ("most", "at least `start`") if "most" in data else ("start", "at most `most`")
        other = numbers["start" if where == "most" else "most"]
        yield Problem((*at, where), f"must be {text}, which is {other}, got {numbers[where]}")
        is_valid = False
    fresh = data.get("fresh", False)
    if not isinstance(fresh, bool):
        yield Problem((*at, "fresh"), f"expected true or false, got {fresh!r}")
        is_valid = False
    return UntilDecided(**numbers, fresh=fresh) if is_valid else ()

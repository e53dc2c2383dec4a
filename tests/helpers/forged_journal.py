"""Forges journals: changes names, types, numbers and the order of events, and makes every CRC right again."""

import copy
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

Events = list[dict[str, Any]]

NAMES = ("/abs", "../../x", "..", ".", "", "a/b", "a\0b", "a\nb", "\x1b[31m", "~", "trials", "Derived.json", "x" * 300)
NUMBERS = (
    -1,
    0,
    1,
    2,
    10**6,
    10**12,
    2**63,
    10**30,
    -0.5,
    0.5,
    1e-300,
    1e60,
    1e308,
    -1e308,
    float("nan"),
    float("inf"),
)
OTHERS = (
    None,
    True,
    False,
    [],
    {},
    [None],
    ["baseline"],
    {"a": 1},
    {"": None},
    "baseline",
    "2026-01-01",
    "\ud800",
    "=1+1",
)


def deep(levels: int = 300) -> Any:
    """A list in a list in a list ..."""
    nested: Any = []
    for _ in range(levels):
        nested = [nested]
    return nested


def write_forged(path: Path, events: Sequence[Any]) -> None:
    """Writes events with right CRCs, also such that are not strict JSON."""
    lines = []
    for event in events:
        text = json.dumps(event)[:-1].encode()
        lines.append(text + f', "crc": "{zlib.crc32(text):08x}"}}\n'.encode())
    path.write_bytes(b"".join(lines))


def forged(events: Events, random: Random) -> tuple[Events, list[str]]:
    """A forged copy of the events, and what was done to it."""
    changed, done = copy.deepcopy(events), list[str]()
    for _ in range(random.choice((1, 1, 1, 2, 5))):
        done.append(random.choice((_change_value, _change_value, _change_value, _change_order))(changed, random))
        for number, event in enumerate(changed, 1):
            if "seq" in event and not done[-1].startswith("seq"):
                event["seq"] = number
    return changed, done


def _change_order(events: Events, random: Random) -> str:
    i, j = random.randrange(len(events)), random.randrange(len(events))
    kind = random.choice(("leave out", "repeat", "swap", "cut off"))
    if kind == "leave out" and len(events) > 1:
        del events[i]
    elif kind == "repeat":
        events.insert(j, copy.deepcopy(events[i]))
    elif kind == "swap":
        events[i], events[j] = events[j], events[i]
    elif kind == "cut off":
        del events[i + 1 :]
    return f"{kind} line {i + 1} {j + 1}"


def _change_value(events: Events, random: Random) -> str:
    """Replaces, removes, renames or adds something at a random place, at all depths alike."""
    event = random.choice(events)
    node: Any = event
    names: list[Any] = []
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = random.choice(keys)
        names.append(key)
        child = node[key]
        if not isinstance(child, dict | list) or not child or random.random() < 0.3:
            break
        node = child
    kind = random.choice(("replace", "replace", "replace", "same kind", "remove", "rename", "add", "repeat"))
    if kind == "remove":
        del node[key]
    elif kind == "rename" and isinstance(node, dict):
        node[random.choice((*NAMES, "other"))] = node.pop(key)
    elif kind == "add" and isinstance(node, dict):
        node[random.choice((*NAMES, "other"))] = copy.deepcopy(child)
    elif kind == "repeat" and isinstance(node, list):
        node.append(copy.deepcopy(child))
    elif kind == "same kind":
        pool = NAMES if isinstance(child, str) else NUMBERS if isinstance(child, int | float) else OTHERS
        node[key] = random.choice(pool)
    else:
        node[key] = random.choice((*NAMES, *NUMBERS, *OTHERS, deep(), "y" * 10**5))
    return f"{kind} {event.get('event')} {names}"

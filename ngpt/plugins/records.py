"""What runs record about their plug-ins, and what that tells somebody who opens them without."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ngpt.code.digest import Code, current_code
from ngpt.code.plugins import Plugin, loaded_plugins
from ngpt.config.base import printable, remember_origin
from ngpt.config.visible import visible
from ngpt.plugins.tables import PluginError

SHOWN_DIGITS = 10  # of a digest
log = logging.getLogger(__name__)


def describe(plugins: Iterable[Plugin] | None = None) -> list[dict[str, Any]]:
    """Name, file, digest and additions of plug-ins, by default of all that are loaded, for a record.

    Raises:
        PluginError: a helper that a function imports later cannot be read.
    """
    code = current_code()
    try:
        return _records(code, loaded_plugins() if plugins is None else plugins)
    except SyntaxError as error:
        raise PluginError(f"plug-in {error.filename}:{error.lineno}: SyntaxError: {error.msg}") from None


def _records(code: Code, plugins: Iterable[Plugin]) -> list[dict[str, Any]]:
    return [
        {
            "name": plugin.name,
            "file": str(plugin.file),
            "digest": code.plugin_digest(plugin),
            "adds": [[entry.table.what, entry.key] for entry in plugin.entries],
        }
        for plugin in plugins
    ]


def used_plugins(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The records of the plug-ins that a run with these settings, by dotted name, uses."""
    return describe(current_code().plugins_of(settings)) if loaded_plugins() else []


def plugin_lines() -> list[str]:
    """A line for each loaded plug-in: `plug-in mine.py (digest 3f2a91c0d4): residual rule mine`."""
    return [f"plug-in {_shown(each)}: {_additions(each)}" for each in describe()]


def plugins_in_brief() -> str:
    """The loaded plug-ins as one text: `mine.py (digest 3f2a91c0d4), other.py (digest ...)`; empty without any."""
    return ", ".join(map(_shown, describe()))


def remember_plugins(records: Any, model: object = None) -> None:
    """Lets messages about unknown names say which plug-in a run used.

    `records` are those of `describe`, read from results: whatever else stands there is ignored. With a `model`, logs if
    it was trained with other plug-ins than those that are loaded.
    """
    now = {each["name"]: each["digest"] for each in describe()} if model is not None else {}
    for record in records if isinstance(records, list) else []:
        if not isinstance(record, dict) or not isinstance(record.get("adds"), list):
            continue
        name, digest = (str(record.get(field)) for field in ("name", "digest"))
        if now.get(name, digest) != digest:
            text = "%s was trained with another version of the plug-in %s (digest %s, now %s)"
            log.warning(text, visible(str(model)), visible(name), digest[:SHOWN_DIGITS], now[name][:SHOWN_DIGITS])
        file = str(record.get("file"))
        given = file if Path(file).is_file() and Path(file).name == name else name
        advice = f"pass --plugin {printable(given)}; code that results name is never run by itself"
        for entry in record["adds"]:
            if isinstance(entry, list) and len(entry) == 2:
                what, key = map(str, entry)
                remember_origin(what, key, f"the plug-in {printable(_shown(record))} gave it: {advice}")


def _shown(record: Mapping[str, Any]) -> str:
    return f"{record.get('name')} (digest {str(record.get('digest'))[:SHOWN_DIGITS]})"


def _additions(record: Mapping[str, Any]) -> str:
    return ", ".join(f"{what} {key}" for what, key in record["adds"]) or "adds nothing"

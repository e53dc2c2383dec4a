"""The plug-ins that this process has loaded (ngpt/plugins/load.py), whose code belongs to that of its runs."""

import importlib
import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

SHIPPED = "ngpt_shipped_plugins"  # the package in which plain files reach other hosts (tune/cluster/shipping.py)
NAME = r"[A-Za-z][\w.-]*"  # of an entry


@dataclass(frozen=True)
class Table:
    """A dict of choices by name, in the module that defines its built-in entries."""

    what: str  # one entry, as messages call it
    module: str
    name: str
    arguments: tuple[str, ...]  # of the function of an entry
    wrapped: tuple[str, str] | None = None  # the class of an entry that is no function, and its field with the function
    pattern: str = NAME
    reserved: tuple[str, str] | None = None  # module and name of a collection of names that no entry may have

    def contents(self) -> dict[str, Any]:
        """The table itself; imports its module."""
        return getattr(importlib.import_module(self.module), self.name)

    def __str__(self) -> str:
        return f"{self.name} ({self.module})"


@dataclass(frozen=True)
class Source:
    """Where a plug-in is."""

    name: str  # as messages call it: `mine.py` or `package.module`
    module: str  # the module that it becomes
    file: Path | None = None  # absolute; None: a module of an installed package

    def on_this_host(self) -> "Source":
        """The same plug-in on a host that the file was sent to."""
        found = importlib.util.find_spec(SHIPPED) if self.file else None
        for folder in (found and found.submodule_search_locations) or []:
            if self.file and (sent := Path(folder) / self.module / self.file.name).is_file():
                return replace(self, file=sent)
        return self


@dataclass(frozen=True)
class Entry:
    """What a plug-in has added to a table."""

    table: Table
    key: str

    def __str__(self) -> str:
        return f"{self.table.what} {self.key}"


@dataclass(frozen=True)
class Plugin:
    """A loaded plug-in."""

    source: Source
    file: Path
    entries: tuple[Entry, ...]
    number: int = 0  # which of all that this process has loaded, so that a file that is loaded again is another one

    @property
    def name(self) -> str:
        """As messages call it: `mine.py` or `package.module`."""
        return self.source.name

    @property
    def module(self) -> str:
        """The module that it has become."""
        return self.source.module

    @property
    def top(self) -> str:
        """The first part of the names of its own modules."""
        return self.module.partition(".")[0]

    @property
    def is_file(self) -> bool:
        """Whether it is a plain file, and no module of a package."""
        return self.source.file is not None


_loaded: dict[str, Plugin] = {}  # by module


def loaded_plugins() -> tuple[Plugin, ...]:
    """The plug-ins that this process has loaded, in that order."""
    return tuple(_loaded.values())


def loaded_sources() -> tuple[Source, ...]:
    """Where they are, for another process, which loads them with `load_sources`."""
    return tuple(plugin.source for plugin in _loaded.values())


def loaded_plugin(module: str) -> Plugin | None:
    """The plug-in that has become this module; None if it is not loaded."""
    return _loaded.get(module)


def note_plugin(plugin: Plugin) -> None:
    """Notes that this process has loaded a plug-in."""
    _loaded[plugin.module] = plugin


def forget_noted() -> None:
    """Forgets all plug-ins."""
    _loaded.clear()

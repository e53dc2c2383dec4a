"""Plug-ins: Python files that add entries to the tables of choices, such as `RESIDUAL_RULES`, without an edit of them.

A plug-in is a plain file, which `--plugin mine.py` names, or a module of an installed package, which `--plugin
package.module` or an entry point of the group `ngpt.plugins` names. It is code, so nothing but the command line and
the installed packages says what is loaded: no YAML file, no results folder, not the current directory.

A file becomes the module `ngpt_plugin_NAME`, whose helpers lie beside it: `from .helper import f`.
"""

import contextlib
import difflib
import importlib
import importlib.metadata
import importlib.util
import itertools
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ngpt.code.plugins import (
    Entry,
    Plugin,
    Source,
    Table,
    forget_noted,
    loaded_plugin,
    loaded_plugins,
    note_plugin,
)
from ngpt.config.base import printable
from ngpt.plugins.tables import TABLES, PluginError, check_entry, place_of, watch_functions

GROUP = "ngpt.plugins"  # of entry points
VARIABLE = "NGPT_PLUGINS"  # `none` leaves out the plug-ins of installed packages
PREFIX = "ngpt_plugin_"  # of the modules of plain files


_numbers = itertools.count(1)


def load_plugins(given: Sequence[str], tables: Sequence[Table] = TABLES) -> None:
    """Loads plug-ins that somebody names: Python files, and modules of installed packages.

    Raises:
        PluginError: one cannot be found or imported, adds nothing, replaces something, or adds what does not fit.
    """
    for text in given:
        load(find(text), tables)


def load_sources(sources: Sequence[Source]) -> None:
    """Loads what another process of this run has loaded, on this host; raises the errors of `load_plugins`."""
    for source in sources:
        load(source.on_this_host(), TABLES, may_add_nothing=True)  # here, where only runs are trained


def load_installed(tables: Sequence[Table] = TABLES) -> list[str]:
    """Loads the plug-ins of installed packages; returns a line for each that cannot be loaded.

    Raises:
        PluginError: `NGPT_PLUGINS` has a value that means nothing.
    """
    if (value := os.environ.get(VARIABLE)) is not None:
        if value != "none":
            raise PluginError(f"{VARIABLE} is {printable(repr(value))}: only none is possible, or leave it unset")
        return []
    problems = []
    for package, source in installed():
        try:
            load(source, tables)
        except PluginError as error:
            problems.append(f"the plug-in of the package {package} is left out: {error}")
    return problems


def installed() -> Iterator[tuple[str, Source]]:
    """The plug-ins of installed packages, without importing them, with the names of the packages."""
    seen = set[str]()
    with _without_current_folder():
        for package in importlib.metadata.distributions():
            for entry in package.entry_points:
                if entry.group == GROUP and entry.value not in seen:
                    seen.add(entry.value)
                    yield package.name, Source(entry.value, entry.value)


def find(text: str) -> Source:
    """Finds the plug-in that somebody names, without running it; raises PluginError if there is none."""
    if text.endswith(".py") or os.sep in text:
        path = Path(os.path.expanduser(text))
        if not path.is_file():
            stems = [each.stem for each in path.parent.glob("*.py") if each.is_file()]
            near = difflib.get_close_matches(path.stem, stems, n=1)
            hint = f", did you mean {path.with_name(near[0])}.py?" if near else ""
            problem = "not a regular file" if path.exists() else "no such file"
            problem = "a folder, name a .py file" if path.is_dir() else problem
            raise PluginError(f"plug-in {text}: {problem}{hint}")
        if path.suffix != ".py":
            raise PluginError(f"plug-in {text}: the name of a Python file ends in .py")
        path = path.resolve()
        return Source(path.name, PREFIX + re.sub(r"\W", "_", path.stem), path)
    beside = [path for path in (Path(f"{text}.py"), Path(f"{text.replace('.', os.sep)}.py")) if path.is_file()]
    hint = f"; for the file write {os.curdir}{os.sep}{beside[0]}" if beside else ""
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", text):
        raise PluginError(f"plug-in {printable(text)}: neither a .py file nor the name of a module{hint}")
    return Source(text, text)


def load(source: Source, tables: Sequence[Table], *, may_add_nothing: bool = False) -> Plugin:
    """Imports a plug-in, unless it has been, and notes what it adds; raises PluginError as `load_plugins` does."""
    if (known := loaded_plugin(source.module)) is not None:
        if known.source.file == source.file:
            return known
        text = f"plug-ins {known.file} and {source.file} have the same name, {source.name}"
        raise PluginError(f"{text}: rename one of them")
    before = {table: dict(table.contents()) for table in tables}
    put_back, modules = watch_functions(), set(sys.modules)
    try:
        module = _run(source)
        plugin = _registered(source, module, before)
        if functions := put_back():
            raise PluginError(f"plug-in {source.name} replaces {functions[0]}: it may only add to tables")
        if not plugin.entries and not may_add_nothing:
            names = ", ".join(table.name for table in tables)
            raise PluginError(
                f'plug-in {source.name} adds nothing: it has no line such as TABLE["name"] = function '
                f"for one of {names}"
            )
    except BaseException:
        put_back()
        for table, entries in before.items():
            table.contents().clear()
            table.contents().update(entries)
        for name in {name for name in sys.modules if _belongs(name, source)} - modules:
            del sys.modules[name]
        raise
    note_plugin(plugin)
    return plugin


def forget_plugins() -> None:
    """Takes back what all plug-ins have added, so that a process can load others; for tests and notebooks."""
    for plugin in loaded_plugins():
        for entry in plugin.entries:
            entry.table.contents().pop(entry.key, None)
        for name in [name for name in sys.modules if _belongs(name, plugin.source)]:
            del sys.modules[name]
    forget_noted()


def _belongs(module: str, source: Source) -> bool:
    return module == source.module or module.startswith(f"{source.module}.")


def _run(source: Source) -> ModuleType:
    """Imports the module of a plug-in. What it prints goes to stderr, since stdout is for data."""
    if ":" in source.module:
        raise PluginError(f"plug-in {source.name}: an entry point names a module, without anything after a colon")
    try:
        with contextlib.redirect_stdout(sys.stderr), _no_bytecode():
            if source.file is None:
                with _without_current_folder():
                    return importlib.import_module(source.module)
            # As a package, so that it can import the files beside it.
            beside = [str(source.file.parent)]
            spec = importlib.util.spec_from_file_location(source.module, source.file, submodule_search_locations=beside)
            assert spec is not None and spec.loader is not None, "the name ends in .py"
            module = sys.modules[source.module] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    except Exception as error:  # whatever the code of a plug-in raises
        raise PluginError(f"plug-in {_fault(source, error)}") from error
    except SystemExit as error:
        raise PluginError(f"plug-in {_fault(source, error)} ends the program") from error


@contextlib.contextmanager
def _no_bytecode() -> Iterator[None]:
    """Writes no `.pyc`, which Python would believe after two edits within a second, while the digest reads the file."""
    before = sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def _fault(source: Source, error: BaseException) -> str:
    """Where and why an import failed, on one line."""
    if isinstance(error, SyntaxError):
        name, line = Path(error.filename or source.name).name, f":{error.lineno}" if error.lineno else ""
        return f"{name}{line}: {type(error).__name__}: {printable(error.msg)}"
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_own_file(source, Path(frame.filename))]
    at = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else source.name
    text = f"{at}: {type(error).__name__}: {printable(str(error))}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        if source.file and (source.file.parent / f"{error.name}.py").is_file():
            text += f"; for the file beside it write `from .{error.name} import ...`"
        elif source.file is None and error.name == source.module.partition(".")[0]:
            path = Path(f"{source.module.replace('.', os.sep)}.py")
            text += f"; for the file write {os.curdir}{os.sep}{path}" if path.is_file() else "; is it installed?"
    return text


def _is_own_file(source: Source, path: Path) -> bool:
    if source.file is None:
        return source.module.partition(".")[0] in (*path.parent.parts, path.stem)
    return path == source.file or (path.parent == source.file.parent and path.suffix == ".py")


def _registered(source: Source, module: ModuleType, before: dict[Table, dict[str, Any]]) -> Plugin:
    """What the import has added to the tables; raises PluginError if it has replaced or removed something."""
    entries = []
    for table, old in before.items():
        now = table.contents()
        for key, value in old.items():
            if now.get(key) is not value:
                raise PluginError(_replaced(source, table, key, value, now.get(key)))
        for key in now.keys() - old.keys():
            try:
                check_entry(table, key, now[key])
            except PluginError as error:
                raise PluginError(f"plug-in {source.name}: {error}") from None
            entries.append(Entry(table, key))
    file = Path(module.__file__ or "")
    if file.suffix != ".py":
        raise PluginError(f"plug-in {source.name}: {file or 'a namespace'} is no Python source file")
    return Plugin(source, file, tuple(sorted(entries, key=str)), next(_numbers))


def _replaced(source: Source, table: Table, key: str, old: Any, new: Any) -> str:
    """Says that a plug-in has replaced an entry, with both places."""
    owner = next((each for each in loaded_plugins() if Entry(table, key) in each.entries), None)
    if new is None:
        return f"plug-in {source.name} removes the {table.what} {key} of {place_of(table, old)}"
    both = f"{place_of(table, old)} and {place_of(table, new)}"
    if owner is not None:
        return f"plug-ins {owner.name} and {source.name} add the same {table.what} {key} ({both}): rename one of them"
    return f"plug-in {source.name} replaces the built-in {table.what} {key} ({both}): give it another name"


@contextlib.contextmanager
def _without_current_folder() -> Iterator[None]:
    """Imports nothing from the current directory, which is on the path of `python -m`, unless PYTHONPATH names it."""
    here, wanted = Path.cwd(), [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    is_wanted = any(Path(path).absolute() == here for path in wanted)
    hidden = [path for path in sys.path if not path or (Path(path) == here and not is_wanted)]
    sys.path[:] = [path for path in sys.path if path not in hidden]
    try:
        yield
    finally:
        sys.path[:0] = hidden

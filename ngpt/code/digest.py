"""Digests of the code that can change a run's numbers, to tell whether a result would be computed the same way today.

The code of a run is what its entry points reach: functions, classes, constants and imports, followed by name through
the syntax trees (ngpt/code/syntax.py). Comments, docstrings, formatting and the order and place of definitions
do not count; everything else does, also a renamed helper or another error message. Tables of choices, such as
`RESIDUAL_RULES`, are followed only to the entry that a run's settings name, so an edited rule concerns the runs that
use it, and a new rule none.

Nothing is imported or run, so this takes a fraction of a second and no torch. A module that is used as a value, as in
`getattr(module, name)`, is followed as a whole. C++ sources count as a whole, without comments. Files outside of the
package count as other libraries do: only by the name that is imported.

What a plug-in adds to a table (ngpt/plugins/load.py) counts as an entry of that table does, and its own modules are
followed like those of the package. Its statements that run when it is imported, and do more than define something,
count for every run: each process of a run executes them.
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from ngpt.code.plugins import Plugin, loaded_plugins
from ngpt.code.syntax import (
    ALL,
    EFFECTS,
    NATIVE_SUFFIXES,
    SOURCE,
    Definition,
    Module,
    Reference,
    read_module,
    short_digest,
    strip_cpp,
)

# What a trial runs, as module and name; the last only in a process that trains several runs together.
ENTRIES = (("ngpt.training.loop", "train"), ("ngpt.data.dataset", "open_dataset"))
ENSEMBLE_ENTRIES = (("ngpt.ensemble.train", "train_together"),)
# Files that only store, show, write, download or time, so that no number depends on them.
IGNORED = (
    *(f"ngpt/system/{name}.py" for name in ("atomic_files", "cache", "cli", "heartbeat", "permissions", "timing")),
    *("ngpt/__init__.py", "ngpt/system/start.py"),
    *(f"ngpt/code/{name}.py" for name in ("digest", "plugins", "syntax", "version")),
    *(f"ngpt/plugins/{name}.py" for name in ("load", "records", "tables")),
    *("ngpt/config/secrets.py", "ngpt/config/yaml_reader.py", "ngpt/config/overrides.py"),
    "ngpt/config/peer_words.py",
    *("ngpt/data/text/hub.py", "ngpt/data/text/progress.py", "ngpt/training/tracker.py:Tracker"),
    "ngpt/training/sample.py",  # writes a text once all numbers are known
    *(f"ngpt/trackers/{name}.py" for name in ("base", "config", "open", "run_id", "sender", "server")),
    *(f"ngpt/trackers/{name}_run.py" for name in ("mlflow", "tensorboard", "trackio", "wandb")),
)

Meanings = Mapping[str, Mapping[str, str]]  # by file, by name: the digest of what the name means there
Key = tuple[str, str]  # file and name
Choices = frozenset[tuple[str, str]]  # the settings that are text: last part of the name, and value


@dataclass(frozen=True)
class _Origin:
    """Where the modules below a top-level name are."""

    root: Path  # the folder that their files are named relative to
    main: Path | None = None  # the file of a plug-in that is a plain file; its helpers are below `root`
    owner: str = ""  # what is added to the name of a file, so that helpers of two plug-ins are not confused


class Code:
    """The code that can change numbers: that of the package `folder`, and that of plug-ins.

    Raises:
        OSError: a source file cannot be read.
        SyntaxError: a source file is not Python.
    """

    def __init__(self, folder: Path, plugins: Sequence[Plugin] = ()) -> None:
        self.folder, self.plugins = folder, tuple(plugins)
        self._own = {folder.name: _Origin(folder.parent)} | {plugin.top: _origin(plugin) for plugin in plugins}
        self._files: dict[str, tuple[str, Path]] = {}  # module and path of each file, by its name
        self._modules: dict[str, Module | None] = {}
        self._whole: dict[str, set[Key]] = {}  # by the module of a plug-in
        self._reached: dict[tuple[bool, Choices | None], set[Key]] = {}

    @cached_property
    def meanings(self) -> dict[str, dict[str, str]]:
        """The digest of every name that any run may reach, by file and name, sorted."""
        table: dict[str, dict[str, str]] = {}
        for file, name in sorted(self._reach(together=True, chosen=None)):
            table.setdefault(file, {})[name] = self._meaning(file, name)
        return table

    @cached_property
    def digest(self) -> str:
        """Sixteen hex digits that identify this version of the code; moving a definition does not change them."""
        parts = {
            (
                name,
                digest,
                *sorted(f"{other}={table[other]}" for other in self._used_names(file, name) if other in table),
            )
            for file, table in self.meanings.items()
            for name, digest in table.items()
            if file.endswith(NATIVE_SUFFIXES) or name in self._file(file).definitions
        }
        return hashlib.sha256(repr(sorted(parts)).encode()).hexdigest()[:16]

    def plugin_digest(self, plugin: Plugin) -> str:
        """Sixteen hex digits that identify what a plug-in defines, with its own helpers."""
        parts = [(file, name, self._meaning(file, name)) for file, name in self._plugin_keys(plugin)]
        return hashlib.sha256(repr(sorted(parts)).encode()).hexdigest()[:16]

    def plugin_files(self, plugin: Plugin) -> dict[str, Path]:
        """The files of a plug-in and of its own helpers, by their names in messages."""
        return {file: self._files[file][1] for file in sorted(self._plugin_files(plugin))}

    def files_to_send(self) -> dict[str, dict[str, Path]]:
        """The files of the plug-ins that are plain files, by module and by where they lie beside the plug-in."""
        return {
            plugin.module: {
                path.relative_to(plugin.file.parent).as_posix(): path for path in self.plugin_files(plugin).values()
            }
            for plugin in self.plugins
            if plugin.is_file
        }

    def plugins_of(self, settings: Mapping[str, Any]) -> list[Plugin]:
        """The plug-ins with a definition that a run with these settings, by dotted name, reaches."""
        reached = self._reach(together=False, chosen=_choices(settings))
        used = {file for file, name in reached if name != EFFECTS}
        return [plugin for plugin in self.plugins if used & self._plugin_files(plugin)]

    def changed(self, before: Meanings, settings: Mapping[str, Any], *, together: bool = False) -> dict[str, list[str]]:
        """What a run with these settings would compute by other code than `before`: changed names, by file.

        `settings` are all settings of the run by dotted name; `together` says that it trained in an ensemble.
        """
        return self._changed(before, self._reach(together=together, chosen=_choices(settings)))

    def _changed(self, before: Meanings, reached: Iterable[Key]) -> dict[str, list[str]]:
        anywhere = {(name, digest) for table in before.values() for name, digest in table.items()}
        changed = []
        for file, name in sorted(reached):
            now, old = self._meaning(file, name), before.get(file, {}).get(name)
            if now != old and (old is not None or (name, now) not in anywhere):
                changed.append((file, name))
        # An edited function changes the meaning of its name in every file that imports it; only its own file is named.
        own = [key for key in changed if key[0].endswith(NATIVE_SUFFIXES) or self._defines(*key)]
        listed: dict[str, list[str]] = {}
        for file, name in own or changed:
            listed.setdefault(file, []).append(name)
        return listed

    # ---- what is reached -------------------------------------------------------------------------------------------

    def _reach(self, *, together: bool, chosen: Choices | None) -> set[Key]:
        """Files and names that a run reaches; `chosen` are the values of its settings, None follows every choice."""
        if (together, chosen) not in self._reached:
            if chosen is not None:
                self._reach(together=True, chosen=None)  # reads every module, so that the choices are known
            entries = (*ENTRIES, *ENSEMBLE_ENTRIES) if together else ENTRIES
            self._reached[together, chosen] = {*self._walk(entries, chosen), *self._plugin_effects()}
        return self._reached[together, chosen]

    def _plugin_effects(self) -> Iterator[Key]:
        """What plug-ins do when they are imported, besides definitions."""
        for plugin in self.plugins:
            module = self._module(plugin.module)
            if module is not None and module.definitions[EFFECTS].digest != short_digest(""):
                yield module.file, EFFECTS

    def _plugin_keys(self, plugin: Plugin) -> set[Key]:
        """The files and names of a plug-in and of its own helpers."""
        if plugin.module not in self._whole:
            self._whole[plugin.module] = {*self._walk([(plugin.module, ALL)], None, top=plugin.top)}
        return self._whole[plugin.module]

    def _plugin_files(self, plugin: Plugin) -> set[str]:
        """The names of a plug-in's own files."""
        return {file for file, _ in self._plugin_keys(plugin)}

    def _walk(self, entries: Iterable[Reference], chosen: Choices | None, *, top: str | None = None) -> Iterator[Key]:
        """Files and names that `entries` reach; with `top`, only those in the modules below that name."""
        waiting, seen, folders = list(entries), set[Reference](), set[Path]()
        while waiting:
            reference = waiting.pop()
            if reference in seen or (top is not None and reference[0].partition(".")[0] != top):
                continue
            seen.add(reference)
            module, name = self._module(reference[0]), reference[1]
            if module is None or f"{module.file}:{name}" in IGNORED:
                continue
            waiting += [(reference[0], EFFECTS)]
            if name == EFFECTS:
                waiting += [(other, EFFECTS) for other, _ in module.imported.values()]
                waiting += [(parent, EFFECTS) for parent in _parents(reference[0])]
                if (folder := self._files[module.file][1].parent) not in folders:
                    folders.add(folder)
                    for path in _native_sources(folder):
                        yield self._name(reference[0], path), SOURCE
            yield from ([(module.file, name)] if name in module.definitions or name in module.imported else [])
            waiting += self._next(reference[0], module, name, chosen)

    def _next(self, path: str, module: Module, name: str, chosen: Choices | None) -> Iterator[Reference]:
        """What a name of a module refers to."""
        if name == ALL:
            yield from ((path, other) for other in (*module.definitions, *module.imported))
        if name in module.imported:
            yield module.imported[name]
        if (definition := module.definitions.get(name)) is None:
            return
        yield from definition.imports
        for other in definition.names | definition.also:
            if other in module.definitions or other in module.imported:
                yield path, other
                yield from self._entries(path, other, definition, chosen)

    def _entries(self, path: str, name: str, user: Definition, chosen: Choices | None) -> Iterator[Reference]:
        """The entries of the table `name` that its `user` may look up: all, unless settings decide which."""
        home, table = self._home(path, name)
        module = self._module(home)
        entries = {key: (home, f"{table}[{key}]") for key in (module.tables.get(table, []) if module else [])}
        entries |= self._added_entries(home, table)
        named = self._named_entries(table, chosen or frozenset()) & set(entries)
        if named and name not in user.iterated:
            entries = {key: at for key, at in entries.items() if key in named or (name, key) in user.lookups}
        yield from entries.values()

    def _added_entries(self, home: str, table: str) -> dict[str, Reference]:
        """The entries that plug-ins add to a table, by key; of one that is not added plainly, all of the plug-in."""
        added: dict[str, Reference] = {}
        for plugin in self.plugins:
            keys = [entry.key for entry in plugin.entries if (entry.table.module, entry.table.name) == (home, table)]
            module = self._module(plugin.module) if keys else None
            if module is None:
                continue
            names = [name for name in module.imported if self._home(plugin.module, name) == (home, table)]
            for key in keys:
                found = next((f"{name}[{key}]" for name in names if f"{name}[{key}]" in module.definitions), ALL)
                added[key] = plugin.module, found
        return added

    def _named_entries(self, table: str, chosen: Choices) -> set[str]:
        """The entries of a table that settings name, by the fields that are declared as one of its entries."""
        modules = [module for module in self._modules.values() if module]
        named = set[str]()
        for field_name, aliases in (choice for module in modules for choice in module.choices.get(table, ())):
            renamed = next((module.texts[aliases] for module in modules if aliases in module.texts), {})
            named |= {renamed.get(value, value) for setting, value in chosen if setting == field_name}
        return named

    def _home(self, path: str, name: str) -> Reference:
        """The module that defines what `name` means in a module, and its name there."""
        seen = set[Reference]()
        while (path, name) not in seen:
            seen.add((path, name))
            module = self._module(path)
            if module is None or name not in module.imported:
                break
            path, name = module.imported[name]
        return path, name

    # ---- meanings --------------------------------------------------------------------------------------------------

    def _meaning(self, file: str, name: str) -> str:
        path, source = self._files[file]
        if name == SOURCE:
            return short_digest(strip_cpp(source.read_text(encoding="utf-8")))
        home, defined = self._home(path, name)
        module = self._module(home)
        if module is not None and defined in module.definitions:
            return module.definitions[defined].digest
        return short_digest("module" if module or self._is_own(home) else f"{home} {defined}")

    def _defines(self, file: str, name: str) -> bool:
        return name in self._file(file).definitions

    def _used_names(self, file: str, name: str) -> Collection[str]:
        return () if name == SOURCE else self._file(file).definitions[name].names

    def _file(self, file: str) -> Module:
        module = self._module(self._files[file][0])
        assert module is not None
        return module

    def _module(self, path: str) -> Module | None:
        """Reads a module of the package; None if it is ignored, or of another package."""
        if path not in self._modules:
            file = self._source(path)
            is_plugin = path.partition(".")[0] != self.folder.name
            module = None
            if file is not None:
                module = read_module(self._name(path, file), file.read_text(encoding="utf-8"), is_plugin=is_plugin)
            if module is not None and file is not None:
                is_package = file.name == "__init__.py" or file == self._own[path.partition(".")[0]].main
                package = path if is_package else path.rpartition(".")[0]
                definitions = {
                    name: replace(definition, imports=[self._resolve(used, package) for used in definition.imports])
                    for name, definition in module.definitions.items()
                }
                imported = {name: self._resolve(used, package) for name, used in module.imported.items()}
                module = replace(module, definitions=definitions, imported=imported)
            self._modules[path] = module
        return self._modules[path]

    def _resolve(self, used: Reference, package: str) -> Reference:
        """A name that a module in `package` imports; if it is itself a module of ours, all of that module."""
        if level := len(used[0]) - len(used[0].lstrip(".")):  # a relative import
            parents = package.split(".")
            used = ".".join([*parents[: len(parents) - level + 1], *filter(None, [used[0][level:]])]), used[1]
        path = ".".join(used)
        return (path, ALL) if self._is_own(path) and self._file_of(path) else used

    def _is_own(self, path: str) -> bool:
        return path.partition(".")[0] in self._own

    def _source(self, path: str) -> Path | None:
        """The file of a module of the package or of a plug-in; None if there is none, or it is ignored."""
        found = self._file_of(path)
        return None if found is None or self._name(path, found) in IGNORED else found

    def _file_of(self, path: str) -> Path | None:
        top, *parts = path.split(".")
        origin = self._own.get(top)
        if origin is None:
            return None
        if origin.main is None:
            parts = [top, *parts]
        elif not parts:
            return origin.main
        base = origin.root.joinpath(*parts)
        return next((file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()), None)

    def _name(self, module: str, path: Path) -> str:
        """The name of the file of a module, or of one in its folder, which does not depend on where the code lies."""
        origin = self._own[module.partition(".")[0]]
        name = path.relative_to(origin.root).as_posix() + (origin.owner if path != origin.main else "")
        self._files[name] = module, path
        return name


def current_code() -> Code:
    """The code of this process and of the plug-ins that it has loaded, as their files were at the first call."""
    return _code_with(loaded_plugins())


@cache
def _code_with(plugins: tuple[Plugin, ...]) -> Code:
    return Code(Path(__file__).parents[1], plugins)


def read_code(folder: Path, plugins: Sequence[Plugin] = ()) -> Code | None:
    """The code of a package and of plug-ins as it is now; None if it cannot be read, as in the middle of an edit."""
    code = Code(folder, plugins)
    try:
        return code if code.digest else None
    except (OSError, SyntaxError):
        return None


def _origin(plugin: Plugin) -> _Origin:
    if plugin.is_file:
        return _Origin(plugin.file.parent, plugin.file, f" of {plugin.name}")
    depth = plugin.module.count(".") + (plugin.file.name == "__init__.py")
    return _Origin(plugin.file.parents[depth])


def _choices(settings: Mapping[str, Any]) -> Choices:
    """The values of settings, by dotted name, that are text, with the last part of the names."""
    texts = {name: value for name, value in settings.items() if isinstance(value, str)}
    return frozenset((name.rpartition(".")[2], value) for name, value in texts.items())


def _native_sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in NATIVE_SUFFIXES)


def _parents(path: str) -> Iterator[str]:
    while path := path.rpartition(".")[0]:
        yield path

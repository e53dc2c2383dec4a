"""Digests of the code that can change a run's numbers, to tell whether a result would be computed the same way today.

The code of a run is what its entry points reach: functions, classes, constants and imports, followed by name through
the syntax trees. Comments, docstrings, formatting and the order and place of definitions do not count; everything else
does, also a renamed helper or another error message. Tables of choices, such as `RESIDUAL_RULES`, are followed only to
the entry that a run's settings name, so an edited rule concerns the runs that use it, and a new rule none.

Nothing is imported or run, so this takes a fraction of a second and no torch. A module that is used as a value, as in
`getattr(module, name)`, is followed as a whole. C++ sources count as a whole, without comments. Files outside of the
package count as other libraries do: only by the name that is imported. Plug-ins, once there are any, get in as one more
entry `(module, ALL)` for each file.
"""

import ast
import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import ngpt

# What a trial runs, as module and name; the last only in a process that trains several runs together.
ENTRIES = (("ngpt.training.loop", "train"), ("ngpt.data.dataset", "open_dataset"))
ENSEMBLE_ENTRIES = (("ngpt.ensemble.train", "train_together"),)
# Files that only store, show, download or time, so that no number depends on them.
IGNORED = (
    *(f"ngpt/system/{name}.py" for name in ("atomic_files", "cache", "cli", "code_digest", "heartbeat", "permissions")),
    *("ngpt/system/timing.py", "ngpt/config/secrets.py", "ngpt/config/yaml_reader.py", "ngpt/config/overrides.py"),
    *("ngpt/data/text/hub.py", "ngpt/data/text/progress.py", "ngpt/training/wandb_tracker.py"),
    *(f"ngpt/training/tracker.py:{name}" for name in ("Tracker", "TrackerConfig", "resolve_tracker")),
)
# Decorators that do nothing when a module is imported. Other decorated functions may register themselves somewhere.
QUIET_DECORATORS = {"cache", "contextmanager", "dataclass", "dataclass_transform", "lru_cache", "no_grad", "overload"}
NATIVE_SUFFIXES = (".cpp", ".h")
ALL = "*"  # every name of a module
EFFECTS = "(module)"  # name of the statements that run when a module is imported, apart from definitions
SOURCE = "(source)"  # name of the content of a C++ file
DIGEST_LENGTH = 10  # hex digits of a definition's digest

Meanings = Mapping[str, Mapping[str, str]]  # by file, by name: the digest of what the name means there
Reference = tuple[str, str]  # module and name
Key = tuple[str, str]  # file and name
Choices = frozenset[tuple[str, str]]  # the settings that are text: last part of the name, and value


@dataclass
class Definition:
    """One top-level name of a module: its digest, and what its code refers to."""

    digest: str = ""
    names: set[str] = field(default_factory=set)
    imports: list[Reference] = field(default_factory=list)  # inside functions
    lookups: set[tuple[str, str]] = field(default_factory=set)  # `NAME["key"]`, as name and key
    also: set[str] = field(default_factory=set)  # names whose definitions run something at import
    iterated: set[str] = field(default_factory=set)  # names in `NAME.values()`, `NAME.items()` or `for ... in NAME`


@dataclass
class Module:
    """A source file: its definitions, and the names that it imports from the package."""

    file: str
    definitions: dict[str, Definition] = field(default_factory=dict)
    imported: dict[str, Reference] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)  # keys of each dict with literal text as keys
    texts: dict[str, dict[str, str]] = field(default_factory=dict)  # those of them that have only texts as values
    # Settings declared as `one_of(TABLE, aliases=ALIASES)`, by table: setting and name of the aliases, or "".
    choices: dict[str, set[tuple[str, str]]] = field(default_factory=dict)


class Code:
    """The code that can change numbers, in the package `folder`.

    Raises:
        OSError: a source file cannot be read.
        SyntaxError: a source file is not Python.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._root = folder, folder.parent
        self._modules: dict[str, Module | None] = {}
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

    def changed(self, before: Meanings, settings: Mapping[str, Any], *, together: bool = False) -> dict[str, list[str]]:
        """What a run with these settings would compute by other code than `before`: changed names, by file.

        `settings` are all settings of the run by dotted name; `together` says that it trained in an ensemble.
        """
        texts = {name: value for name, value in settings.items() if isinstance(value, str)}
        chosen = frozenset((name.rpartition(".")[2], value) for name, value in texts.items())
        return self._changed(before, self._reach(together=together, chosen=chosen))

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
            self._reached[together, chosen] = set(self._walk(entries, chosen))
        return self._reached[together, chosen]

    def _walk(self, entries: Iterable[Reference], chosen: Choices | None) -> Iterator[Key]:
        waiting, seen, folders = list(entries), set[Reference](), set[Path]()
        while waiting:
            reference = waiting.pop()
            if reference in seen:
                continue
            seen.add(reference)
            module, name = self._module(reference[0]), reference[1]
            if module is None or f"{module.file}:{name}" in IGNORED:
                continue
            waiting += [(reference[0], EFFECTS)]
            if name == EFFECTS:
                waiting += [(other, EFFECTS) for other, _ in module.imported.values()]
                waiting += [(parent, EFFECTS) for parent in _parents(reference[0])]
                if (folder := (self._root / module.file).parent) not in folders:
                    folders.add(folder)
                    yield from ((self._name(path), SOURCE) for path in _native_sources(folder))
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
        keys = module.tables.get(table, []) if module else []
        named = self._named_entries(table, chosen or frozenset()) & set(keys)
        if named and name not in user.iterated:
            keys = [key for key in keys if key in named or (name, key) in user.lookups]
        yield from ((home, f"{table}[{key}]") for key in keys)

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
        if name == SOURCE:
            return _digest(strip_cpp((self._root / file).read_text(encoding="utf-8")))
        home, defined = self._home(_module_name(file), name)
        module = self._module(home)
        if module is not None and defined in module.definitions:
            return module.definitions[defined].digest
        return _digest("module" if module or self._is_own(home) else f"{home} {defined}")

    def _defines(self, file: str, name: str) -> bool:
        return name in self._file(file).definitions

    def _used_names(self, file: str, name: str) -> Collection[str]:
        return () if name == SOURCE else self._file(file).definitions[name].names

    def _file(self, file: str) -> Module:
        module = self._module(_module_name(file))
        assert module is not None
        return module

    def _module(self, path: str) -> Module | None:
        """Reads a module of the package; None if it is ignored, or of another package."""
        if path not in self._modules:
            file = self._source(path)
            module = None if file is None else read_module(self._name(file), file.read_text(encoding="utf-8"))
            if module is not None and file is not None:
                package = path if file.name == "__init__.py" else path.rpartition(".")[0]
                module.imported = {name: self._resolve(used, package) for name, used in module.imported.items()}
                for definition in module.definitions.values():
                    definition.imports = [self._resolve(used, package) for used in definition.imports]
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
        return path.partition(".")[0] == self.folder.name

    def _source(self, path: str) -> Path | None:
        """The file of a module of the package; None if there is none, or it is ignored."""
        found = self._file_of(path) if self._is_own(path) else None
        return None if found is None or self._name(found) in IGNORED else found

    def _file_of(self, path: str) -> Path | None:
        base = self._root.joinpath(*path.split("."))
        return next((file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()), None)

    def _name(self, path: Path) -> str:
        return path.relative_to(self._root).as_posix()


@cache
def current_code() -> Code:
    """The code of this process, as its files were at the first call."""
    return Code(Path(ngpt.__path__[0]))


def read_code(folder: Path) -> Code | None:
    """The code in a package as its files are now; None if they cannot be read, as in the middle of an edit."""
    code = Code(folder)
    try:
        return code if code.digest else None
    except (OSError, SyntaxError):
        return None


# ---- one file ------------------------------------------------------------------------------------------------------


def read_module(file: str, text: str) -> Module:
    """Reads the definitions, imports, tables and declared choices of a source file."""
    module, whole = Module(file), list[Reference]()  # modules of which every name counts
    statements: dict[str, list[ast.stmt]] = {}
    for statement in ast.parse(text, file).body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            names = imported_names(statement)
            # `import *` does not say what it binds, and `import a.b` binds `a`, as `import a.c` does.
            whole += [used for name, used in module.imported.items() if names.get(name, used) != used]
            if ALL in names:
                whole.append((names.pop(ALL)[0], ALL))
            module.imported |= names
        elif (table := _read_table(statement)) is not None:
            name, entries = table
            module.tables[name] = list(entries)
            texts = {key: value.value for key, value in entries.items() if isinstance(value, ast.Constant)}
            if len(texts) == len(entries) and all(isinstance(text, str) for text in texts.values()):
                module.texts[name] = {key: str(text) for key, text in texts.items()}
            module.definitions |= {f"{name}[{key}]": define([value]) for key, value in entries.items()}
            module.definitions[name] = Definition(_digest("table"))
        elif not _is_text(statement) and not _is_type_checking(statement):
            for name in _bound_names(statement) or [EFFECTS]:
                statements.setdefault(name, []).append(statement)
    module.definitions |= {name: define(parts) for name, parts in statements.items()}
    _read_effects(module, statements)
    module.definitions[EFFECTS].imports += whole
    for node in (node for parts in statements.values() for node in parts if isinstance(node, ast.ClassDef)):
        _read_choices(node, module)
    return module


def define(parts: Iterable[ast.AST]) -> Definition:
    """The definition made by some statements or expressions."""
    found = Definition()
    found.digest = _digest("\n".join([_canonical(part, found) for part in parts]))
    return found


def imported_names(statement: ast.Import | ast.ImportFrom) -> dict[str, Reference]:
    """What an import binds: name to module and name there. A relative import has the dots before its module."""
    if isinstance(statement, ast.ImportFrom):
        path = "." * statement.level + (statement.module or "")
        return {alias.asname or alias.name: (path, alias.name) for alias in statement.names}
    return {alias.asname or alias.name.partition(".")[0]: (alias.name, ALL) for alias in statement.names}


def strip_cpp(text: str) -> str:
    """C++ source without comments, indentation, repeated blanks and empty lines."""
    pattern = r"""//[^\n]*|/\*.*?\*/|("(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')"""
    text = re.sub(pattern, lambda found: found[1] or " ", text, flags=re.DOTALL)
    return "\n".join(line for raw in text.splitlines() if (line := " ".join(raw.split())))


def _canonical(node: Any, found: Definition) -> str:
    """A text of a syntax tree that is the same in every Python version; adds what the tree refers to to `found`."""
    if isinstance(node, list):
        return f"[{','.join([_canonical(item, found) for item in node if not _is_text(item)])}]"
    if isinstance(node, ast.Constant):
        return ascii(node.value)
    if not isinstance(node, ast.AST):
        return ascii(node)
    _note(node, found)
    parts = []
    for name in node._fields:
        value = getattr(node, name, None)
        if value is not None and value != [] and name not in ("ctx", "kind", "type_comment"):
            if name == "values" and isinstance(node, ast.JoinedStr):
                value = _joined(value)
            parts.append(f"{name}={_canonical(value, found)}")
    return f"{type(node).__name__}({','.join(parts)})"


def _note(node: ast.AST, found: Definition) -> None:
    """Adds what a node refers to."""
    match node:
        case ast.Name(id=name):
            found.names.add(name)
        case ast.Import() | ast.ImportFrom():
            found.imports += imported_names(node).values()
        case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=str(key))):
            found.lookups.add((name, key))
        case ast.Attribute(value=ast.Name(id=name), attr="values" | "items"):
            found.iterated.add(name)
        case ast.For(iter=ast.Name(id=name)) | ast.comprehension(iter=ast.Name(id=name)):
            found.iterated.add(name)


def _joined(values: list[ast.expr]) -> list[ast.expr]:
    """The parts of an f-string; Python versions differ in how they split its text."""
    joined: list[ast.expr] = []
    for part in values:
        last = joined[-1] if joined else None
        if isinstance(part, ast.Constant) and isinstance(last, ast.Constant):
            joined[-1] = ast.Constant(f"{last.value}{part.value}")
        else:
            joined.append(part)
    return joined


def _is_text(node: Any) -> bool:
    """Whether a statement is a docstring, or another text that does nothing."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_type_checking(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and ast.unparse(statement.test).endswith("TYPE_CHECKING")


def _bound_names(statement: ast.stmt) -> list[str]:
    """The names that a definition or an assignment to plain names binds."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign | ast.AugAssign):
        targets = [statement.target]
    else:
        return []
    parts = [part for target in targets for part in (target.elts if isinstance(target, ast.Tuple) else [target])]
    names = [part.id for part in parts if isinstance(part, ast.Name)]
    return names if len(names) == len(parts) else []


def _read_table(statement: ast.stmt) -> tuple[str, dict[str, ast.expr]] | None:
    """The name and the entries of a dict literal whose keys are all text; None for other statements."""
    names, value = _bound_names(statement), getattr(statement, "value", None)
    if len(names) != 1 or not isinstance(value, ast.Dict) or isinstance(statement, ast.AugAssign):
        return None
    keys = [key.value if isinstance(key, ast.Constant) else None for key in value.keys]
    entries = {key: entry for key, entry in zip(keys, value.values, strict=True) if isinstance(key, str)}
    return (names[0], entries) if entries and len(entries) == len(keys) else None


def _read_effects(module: Module, statements: Mapping[str, list[ast.stmt]]) -> None:
    """Completes the statements that run at import: names bound under `if`, and definitions that call something."""
    effects = module.definitions.setdefault(EFFECTS, Definition(_digest("")))
    for node in (node for part in statements.get(EFFECTS, []) for node in ast.walk(part)):
        name = node.name if isinstance(node, ast.FunctionDef | ast.ClassDef) else None
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        if isinstance(node, ast.Import | ast.ImportFrom):
            module.imported = imported_names(node) | module.imported
        if name is not None:
            module.definitions.setdefault(name, effects)
    for name, parts in statements.items():
        for part in parts:
            if isinstance(part, ast.FunctionDef | ast.ClassDef):
                called = [node.func if isinstance(node, ast.Call) else node for node in part.decorator_list]
                is_loud = any(ast.unparse(node).rpartition(".")[2] not in QUIET_DECORATORS for node in called)
            else:
                is_loud = any(isinstance(node, ast.Call) for node in ast.walk(part))
            if is_loud and name != EFFECTS:
                effects.also.add(name)


def _read_choices(node: ast.ClassDef, module: Module) -> None:
    """Finds the fields of a config that are declared as `one_of(TABLE, ...)`."""
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            for call in ast.walk(line.annotation):
                match call:
                    case ast.Call(func=ast.Name(id="one_of"), args=[ast.Name(id=table), *_], keywords=keywords):
                        names = [item.value.id for item in keywords if isinstance(item.value, ast.Name)]
                        module.choices.setdefault(table, set()).add((line.target.id, "".join(names)))


def _native_sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in NATIVE_SUFFIXES)


def _parents(path: str) -> Iterator[str]:
    while path := path.rpartition(".")[0]:
        yield path


def _module_name(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_LENGTH]

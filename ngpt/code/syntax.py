"""Reads source files of code that can change a run's numbers: what each name means, and what it refers to.

Only syntax trees are read, nothing is imported or run. Comments, docstrings, formatting and the Python version do not
change the digest of a definition.
"""

import ast
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

# Decorators that do nothing when a module is imported. Other decorated functions may register themselves somewhere.
QUIET_DECORATORS = {"cache", "contextmanager", "dataclass", "dataclass_transform", "lru_cache", "no_grad", "overload"}
NATIVE_SUFFIXES = (".cpp", ".h")
ALL = "*"  # every name of a module
EFFECTS = "(module)"  # name of the statements that run when a module is imported, apart from definitions
SOURCE = "(source)"  # name of the content of a C++ file
DIGEST_LENGTH = 10  # hex digits of a definition's digest

Reference = tuple[str, str]  # module and name


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


@lru_cache(maxsize=1000)
def read_module(file: str, text: str, *, is_plugin: bool = False) -> Module:
    """Reads the definitions, imports, tables and declared choices of a source file; equal files share the result.

    In a plug-in, `TABLE["name"] = value` with a table that it imports defines `TABLE[name]`, as an entry of the table
    itself would. Its statements that only print, or that run in a script, do nothing.
    """
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
            module.definitions[name] = Definition(short_digest("table"))
        elif is_plugin and (entry := _read_registration(statement, module)) is not None:
            module.definitions[entry[0]] = define([entry[1]])
        elif is_plugin and _is_idle(statement):
            pass
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
    found.digest = short_digest("\n".join([_canonical(part, found) for part in parts]))
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


def _read_registration(statement: ast.stmt, module: Module) -> tuple[str, ast.expr] | None:
    """`TABLE[key]` and the value of a statement that adds to an imported table; None for other statements."""
    match statement:
        case ast.Assign([ast.Subscript(value=ast.Name(id=table), slice=ast.Constant(value=str(key)))], value):
            return (f"{table}[{key}]", value) if table in module.imported else None
    return None


def _is_idle(statement: ast.stmt) -> bool:
    """Whether a statement of a plug-in prints, or belongs to `if __name__ == "__main__"`."""
    match statement:
        case ast.Expr(value=ast.Call(func=ast.Name(id="print"))):
            return True
        case ast.If(test=ast.Compare(left=ast.Name(id="__name__"))):
            return True
    return False


def _read_effects(module: Module, statements: Mapping[str, list[ast.stmt]]) -> None:
    """Completes the statements that run at import: names bound under `if`, and definitions that call something."""
    effects = module.definitions.setdefault(EFFECTS, Definition(short_digest("")))
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


def short_digest(text: str) -> str:
    """The first hex digits of the SHA-256 of a text, as definitions are known by."""
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_LENGTH]

"""The documentation inside the running Python as documents: language topics, and docstrings of the standard library."""

import ast
import os
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

DOCSTRINGS_FORMAT = 1  # raise it when the extraction changes
# Tests, two large applications, and installed packages.
SKIPPED = {"test", "tests", "idlelib", "idle_test", "lib2to3", "site-packages", "dist-packages"}
BUILT = ("config-", "_sysconfigdata")  # generated for the platform
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@cache
def python_documents() -> tuple[str, ...]:
    """Returns topics, then modules sorted by path, each ending with an empty line. Repeated texts appear once."""
    from pydoc_data.topics import topics

    documents = [topics[name].strip() + "\n\n" for name in sorted(topics)]
    seen: set[str] = set()
    for path in _library_files(Path(sysconfig.get_path("stdlib"))):
        texts = [text for text in _module_docstrings(path) if text not in seen]
        seen.update(texts)
        documents += ["".join(f"{text}\n\n" for text in dict.fromkeys(texts))] if texts else []
    return tuple(documents)


def _library_files(root: Path) -> list[Path]:
    """The standard library's modules, sorted by name so that the order is the same on every machine."""
    found = []
    for folder, inner, names in os.walk(root):
        # Pruned while walking, since site-packages may hold a hundred thousand files.
        inner[:] = [name for name in inner if name not in SKIPPED and not name.startswith(BUILT)]
        found += [Path(folder, name) for name in names if name.endswith(".py") and not name.startswith(BUILT)]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _module_docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():  # `python -W error` would turn an invalid escape into a SyntaxError
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, UnicodeDecodeError):  # the library ships templates that are not valid Python
        return
    yield from _docstrings(tree)


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Yields the docstrings of a module, class or function and of its members, in source order."""
    if isinstance(node, DOCUMENTED) and (text := (ast.get_docstring(node) or "").strip()):
        yield text
    for child in getattr(node, "body", ()):
        yield from _docstrings(child)

"""Where text comes from: the named corpora, and text files of one's own.

A corpus is a generator of documents and what identifies it without reading them. A new one is a function and an entry
in `CORPORA`.
"""

import ast
import hashlib
import http.client
import os
import platform
import sysconfig
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from ngpt.config import ConfigError

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
PYTHON_DOCS_FORMAT = 1  # raise it when the extraction changes
# Tests, two large applications, and what other people installed.
PYTHON_DOCS_SKIP = {"test", "tests", "idlelib", "idle_test", "lib2to3", "site-packages", "dist-packages"}
BUILT = ("config-", "_sysconfigdata")  # written by the build of a Python, for its platform
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
BLOCK = 1 << 22  # characters of a text file in memory at once
DOWNLOAD_TIMEOUT = 10  # seconds without a byte


@dataclass(frozen=True)
class Corpus:
    """Text to prepare.

    Attributes:
        name: for people and folder names.
        identity: the same exactly if the text is the same; cheap.
        documents: yields the text from its start each time it is called.
        split_by: "document" sends whole documents to either split by their hash, so that both hold the same kind of
            text; "position" keeps the order and takes the end of the text for validation.
    """

    name: str
    identity: str
    documents: Callable[[], Iterator[str]]
    split_by: Literal["document", "position"]


def python_docs(path: Path | None) -> Corpus:
    """The documentation inside the running Python: language topics and standard library docstrings. No network.

    One document is one topic, or one module. About 2 MB of technical English.
    """
    if path is not None:
        raise ConfigError("python-docs is read from Python itself: leave out data.path (--from)")
    return Corpus(
        name="python-docs",
        identity=f"python-docs:{PYTHON_DOCS_FORMAT}:{platform.python_version()}",
        documents=lambda: iter(_python_documents()),
        split_by="document",
    )


def shakespeare(path: Path | None) -> Corpus:
    """Tiny Shakespeare, 1.1 MB, from its home in karpathy/char-rnn or a local copy; split as nanoGPT splits it."""
    if path is not None:
        read_file(path)
    return Corpus(
        name="shakespeare",
        identity=f"sha256:{SHAKESPEARE_SHA256}",
        documents=lambda: iter([_shakespeare_text(path)]),
        split_by="position",
    )


CORPORA: dict[str, Callable[[Path | None], Corpus]] = {
    "python-docs": python_docs,
    "shakespeare": shakespeare,
}


def text_corpus(path: Path) -> Corpus:
    """A UTF-8 text file, or all files in a folder and its folders (not the hidden ones) one after the other.

    Raises:
        ConfigError: the folder has no files.
    """
    files = [path] if path.is_file() else sorted(_visible_files(path))
    if not files:
        raise ConfigError(f"{path} has no files in it")
    return Corpus(
        name=path.resolve().stem,
        identity=_text_identity(path, files),
        documents=lambda: (piece for file in files for piece in _read_text(file)),
        split_by="position",
    )


def read_file(path: Path) -> bytes:
    """The content of a file that the user named.

    Raises:
        ConfigError: there is no such file.
    """
    if not path.is_file():
        raise ConfigError(f"no such file: {path}")
    return path.read_bytes()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content; a file that has not changed is read once per process."""
    state = path.stat()
    return _file_sha256(path.resolve(), state.st_size, state.st_mtime_ns)


@cache
def _file_sha256(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text_identity(path: Path, files: list[Path]) -> str:
    """The bytes of a file, or of a folder the names under it too; where it lies does not matter."""
    if path.is_file():
        return f"sha256:{file_sha256(path)}"
    names = [f"{file.relative_to(path).as_posix()}:{file_sha256(file)}" for file in files]
    return f"sha256:{hashlib.sha256(chr(10).join(names).encode()).hexdigest()}"


def _visible_files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _read_text(path: Path) -> Iterator[str]:
    """A file in large pieces that end with a line, its line ends as they are."""
    with path.open(encoding="utf-8", newline="") as file:
        try:
            while piece := file.read(BLOCK):
                yield piece + file.readline()
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


@cache
def _python_documents() -> tuple[str, ...]:
    """Topics, then modules sorted by path; each ends with an empty line. A text that comes twice is taken once."""
    from pydoc_data.topics import topics

    documents = [topics[name].strip() + "\n\n" for name in sorted(topics)]
    seen: set[str] = set()
    for path in _library_files(Path(sysconfig.get_path("stdlib"))):
        texts = [text for text in _module_docstrings(path) if text not in seen]
        seen.update(texts)
        documents += ["".join(f"{text}\n\n" for text in dict.fromkeys(texts))] if texts else []
    return tuple(documents)


def _library_files(root: Path) -> list[Path]:
    """The standard library's modules in the order of their names, which is the same on every machine."""
    found = []
    for folder, inner, names in os.walk(root):
        # Pruned here and not afterwards: site-packages may hold a hundred thousand files.
        inner[:] = [name for name in inner if name not in PYTHON_DOCS_SKIP and not name.startswith(BUILT)]
        found += [Path(folder, name) for name in names if name.endswith(".py") and not name.startswith(BUILT)]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _module_docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():  # else `python -W error` turns an odd escape into a SyntaxError
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, UnicodeDecodeError):  # the library ships templates that are no Python yet
        return
    yield from _docstrings(tree)


def _docstrings(node: ast.AST) -> Iterator[str]:
    """The docstrings of a module, class or function and of what is defined in it, in reading order."""
    if isinstance(node, DOCUMENTED) and (text := (ast.get_docstring(node) or "").strip()):
        yield text
    for child in getattr(node, "body", ()):
        yield from _docstrings(child)


@cache
def _shakespeare_text(path: Path | None) -> str:
    data = _download(SHAKESPEARE_URL) if path is None else read_file(path)
    if hashlib.sha256(data).hexdigest() != SHAKESPEARE_SHA256:
        raise ConfigError(
            f"{path or SHAKESPEARE_URL} is not tiny Shakespeare: its SHA-256 is not {SHAKESPEARE_SHA256[:12]}...; "
            "a text of your own is a corpus by its path"
        )
    return data.decode()


def _download(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT) as response:
            return response.read()
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        raise ConfigError(f"cannot download {url} ({error}); pass a local copy with data.path (--from PATH)") from error

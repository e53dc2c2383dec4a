"""A disk in memory: the result of operations, and the states that a power loss may leave.

The model is that of POSIX as in ALICE (Pillai et al., OSDI 2014, section 3): the content of a file is safe once the
file is synced, a name once its folder is. Any part of the rest may have reached the disk: names in any order, content
cut off, or content of full length with zeros where a block is missing.
"""

import hashlib
import itertools
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tests.chaos.operations import Operation

Tree = dict[str, bytes | None]  # path to content; a folder has None
Names = dict[str, int]
Change = tuple[tuple[str, int | None], ...]  # names that one operation sets or removes, atomically


@dataclass
class Node:
    """A file or folder: as processes see it, and the part that is safe."""

    is_folder: bool
    content: bytes = b""
    safe_content: bytes = b""
    names: Names = field(default_factory=dict)
    safe_names: Names = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)  # since the folder was synced


class Disk:
    """Starts as an empty folder, which is safe."""

    def __init__(self) -> None:
        self.nodes = {0: Node(is_folder=True)}
        self._numbers = itertools.count(1)

    def apply(self, operation: Operation) -> None:
        """Applies an operation as the operating system would."""
        path, node = PurePosixPath(operation.path), self._find(operation.path)
        match operation.kind:
            case "mkdir" | "open" if node is None:
                number = next(self._numbers)
                self.nodes[number] = Node(is_folder=operation.kind == "mkdir")
                self._change(str(path.parent), ((path.name, number),))
            case "open":
                assert node is not None
                node.content = b""
            case "write":
                assert node is not None, operation.path
                start = node.content[: operation.offset].ljust(operation.offset, b"\0")
                node.content = start + operation.data + node.content[operation.offset + len(operation.data) :]
            case "truncate":
                assert node is not None
                node.content = node.content[: operation.offset].ljust(operation.offset, b"\0")
            case "fsync":
                assert node is not None, operation.path
                node.safe_content, node.safe_names, node.changes = node.content, dict(node.names), []
            case "rename":
                to = PurePosixPath(operation.to)
                assert to.parent == path.parent, "a rename between folders is two changes; there is none"
                number = self.nodes[self._number(str(path.parent))].names[path.name]
                self._change(str(path.parent), ((path.name, None), (to.name, number)))
            case "unlink" | "rmdir":
                self._change(str(path.parent), ((path.name, None),))

    def _number(self, path: str) -> int:
        number = 0
        for part in PurePosixPath(path).parts:
            number = self.nodes[number].names[part]
        return number

    def _find(self, path: str) -> Node | None:
        try:
            return self.nodes[self._number(path)]
        except KeyError:
            return None

    def _change(self, folder: str, change: Change) -> None:
        node = self.nodes[self._number(folder)]
        _set(node.names, change)
        node.changes.append(change)

    # ---- after a power loss ----------------------------------------------------------------------------------------

    def tree(self, names: Callable[[Node], Names], content: Callable[[Node], bytes]) -> Tree:
        """The whole tree, if folders have these names and files this content."""
        found: Tree = {}

        def visit(number: int, path: str) -> None:
            for name, child in names(self.nodes[number]).items():
                node = self.nodes[child]
                found[f"{path}{name}"] = None if node.is_folder else content(node)
                if node.is_folder:
                    visit(child, f"{path}{name}/")

        visit(0, "")
        return found

    def crash_states(self, draw: random.Random, mixed: int) -> Iterator[tuple[str, Tree]]:
        """Names and trees that a power loss may leave now: the corner cases and `mixed` random ones."""
        yield "lost", self.tree(lambda node: node.safe_names, lambda node: node.safe_content)
        yield "kept", self.tree(lambda node: node.names, lambda node: node.content)
        for name, content in CONTENTS.items():
            yield name, self.tree(lambda node: node.names, content)
        for i in range(mixed):
            yield f"mixed{i}", self.tree(lambda node: _some(node, draw), lambda node: _any(node, draw))


def _set(names: Names, change: Change) -> None:
    for name, number in change:
        if number is None:
            names.pop(name, None)
        else:
            names[name] = number


def _some(node: Node, draw: random.Random) -> Names:
    """The safe names, with some of the later changes."""
    names = dict(node.safe_names)
    for change in node.changes:
        if draw.random() < 0.5:
            _set(names, change)
    return names


def _any(node: Node, draw: random.Random) -> bytes:
    return draw.choice([lambda node: node.safe_content, lambda node: node.content, *CONTENTS.values()])(node)


def _cut(node: Node) -> bytes:
    same = _same(node)
    return node.content[: same + (len(node.content) - same) // 2]


def _zeroed(node: Node) -> bytes:
    same = _same(node)
    return node.content[:same] + bytes(len(node.content) - same)


def _hole(node: Node) -> bytes:
    """The first half of the new content is zero, the second is there."""
    same, cut = _same(node), len(_cut(node))
    return node.content[:same] + bytes(cut - same) + node.content[cut:]


def _same(node: Node) -> int:
    """Number of safe bytes: those before an append, or none of a rewritten file."""
    return len(node.safe_content) if node.content.startswith(node.safe_content) else 0


# Possible contents of a file that was not synced but has its name.
CONTENTS: dict[str, Callable[[Node], bytes]] = {
    "empty": lambda node: node.safe_content,
    "cut": _cut,
    "zeroed": _zeroed,
    "hole": _hole,
}


def write_tree(tree: Tree, root: Path) -> None:
    """Writes a tree to the real disk."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    for path, content in tree.items():
        if content is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(content)


def read_tree(root: Path) -> Tree:
    """Reads a tree from the real disk."""
    return {
        str(path.relative_to(root)): None if path.is_dir() else path.read_bytes() for path in sorted(root.rglob("*"))
    }


def digest(tree: Tree) -> str:
    """Equal for equal trees."""
    total = hashlib.sha256()
    for path, content in sorted(tree.items()):
        total.update(f"{path}\0{None if content is None else hashlib.sha1(content).hexdigest()}\n".encode())
    return total.hexdigest()


def played(operations: Iterable[Operation]) -> Disk:
    """The disk after these operations."""
    disk = Disk()
    for operation in operations:
        disk.apply(operation)
    return disk

"""A results directory of a few small files, for tests of what an object store receives and returns."""

from pathlib import Path

from tune.storage.journal import Journal

METRICS, CHECKPOINT = "trials/a-s1/metrics.jsonl", "trials/a-s1/checkpoints/step_0000010/state.pt"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def add_event(root: Path, error: str = "none") -> None:
    """A line in the journal, as a campaign writes it."""
    root.mkdir(exist_ok=True)
    journal = Journal(root / "journal.jsonl")
    journal.append("crash", elapsed=0.0, error=error)
    journal.close()


def visible_files(folder: Path) -> dict[str, str]:
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_text() for name, path in sorted(found.items()) if "/." not in f"/{name}"}

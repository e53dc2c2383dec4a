"""The docstrings of python-docs and their order."""

from pathlib import Path

import pytest

from ngpt.data.text import python_docs as docstrings


def test_python_docs_leaves_out_tests_builds_and_installed_packages(tmp_path: Path) -> None:
    wanted = ["a.py", "pkg/__init__.py", "pkg/b.py"]
    unwanted = [
        "test/t.py",
        "pkg/tests/t.py",
        "idlelib/t.py",
        "lib2to3/t.py",
        "site-packages/t.py",
        "_sysconfigdata__linux.py",
        "config-3.11-x86_64-linux-gnu/t.py",
        "notes.txt",
    ]
    for name in [*reversed(wanted), *unwanted]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    found = docstrings._library_files(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in found] == wanted


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (
            '"""M."""\nclass A:\n  "C."\n  def f(self):\n    "F."\nif 1:\n  async def g():\n    "G."\n',
            ["M.", "C.", "F.", "G."],
        ),
        ("x = 1\n", []),
        ("def broken(:\n", []),
        (b'"""\xff"""', []),
        (r'"""odd \d escape"""', [r"odd \d escape"]),
    ],
)
def test_docstrings_are_in_reading_order_and_invalid_python_has_none(
    tmp_path: Path, source: str | bytes, found: list[str]
) -> None:
    (tmp_path / "m.py").write_bytes(source.encode() if isinstance(source, str) else source)
    assert list(docstrings._module_docstrings(tmp_path / "m.py")) == found

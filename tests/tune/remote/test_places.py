"""Where the command line finds results; addresses are tested with a server in tests/tune/remote/test_results.py."""

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tune.remote.places import entry, local_results, location, open_results, recordable, report_path
from tune.remote.uri import Uri


def test_results_in_a_folder_stay_where_they_are(tmp_path: Path) -> None:
    out = location(str(tmp_path))
    assert entry(out, "tiny") == tmp_path / "tiny"
    with open_results(out, "tiny", stop=None, whole=False) as (root, extra):
        assert (root, extra) == (tmp_path / "tiny", {"stop": None})
    with contextlib.ExitStack() as stack:
        assert local_results(tmp_path, stack=stack, verb="verify") == tmp_path


def test_the_report_is_named_as_short_as_it_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert report_path(tmp_path / "results/tiny") == Path("results/tiny/report.html")
    assert report_path(Path("results/tiny")) == Path("results/tiny/report.html")
    assert str(report_path(Uri("s3://bucket/tiny"))) == "s3://bucket/tiny/report.html"


def test_arguments_are_recorded_without_credentials() -> None:
    assert recordable("--out=s3://key:secret@bucket/runs") == "--out=s3://bucket/runs"
    assert recordable("optim.lr=1e-3") == "optim.lr=1e-3"


def test_a_folder_needs_no_pyarrow() -> None:
    code = "import sys; from tune.remote.places import location; location('x'); print('pyarrow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"

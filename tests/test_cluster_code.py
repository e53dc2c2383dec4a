"""The code and the data of a campaign reach the hosts of a Ray cluster (tests/helpers/hosts.py)."""

import importlib.metadata
import json
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.helpers.hosts import NEEDS_HOSTS, PORT, ROOT, Network
from tests.helpers.plugin_files import RULE, write
from tests.helpers.tiny_campaign import records, write_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), NEEDS_HOSTS]
RUN = [sys.executable, ROOT / "run_campaign.py"]


def other_python(folder: Path, **versions: str) -> Path:
    """A Python with the packages of this one, without the project, and with other `versions` of some packages."""
    venv.create(folder, with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    packages = site / "packages"
    packages.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        name = path.name.partition("-")[0]
        if path.name.endswith(".dist-info") and name in versions:
            about = packages / f"{name}-{versions[name]}.dist-info"
            about.mkdir()
            (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {versions[name]}\n")
        elif path.suffix != ".pth" and "editable" not in path.name:
            (packages / path.name).symlink_to(path)
    (site / "packages.pth").write_text(f"{packages}\n")
    return folder / "bin/python"


def test_a_host_without_the_project_trains_and_one_with_other_versions_is_refused(tmp_path: Path, corpus: Path) -> None:
    bare_python, old_python = other_python(tmp_path / "bare"), other_python(tmp_path / "old", numpy="1.0.1")
    file, results = write_file(tmp_path, corpus), tmp_path / "results"
    with Network() as network:
        head, bare, old = (network.host(name) for name in ("one", "two", "three"))
        for host in (bare, old):
            host.environment["PYTHONPATH"] = ""
        assert "No module named 'ngpt'" in bare.run([bare_python, "-c", "import torch, ngpt"], cwd=tmp_path).stderr
        run = [*RUN, file, "--address", f"{head.address}:{PORT}"]
        head.start_ray(cpus=1)
        bare.start_ray(head=head, cpus=1, python=bare_python)
        done = head.run([*run, "--out", results])
        old.start_ray(head=head, cpus=1, python=old_python)
        refused = head.run([*run, "--out", tmp_path / "other"])
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for path in results.glob("tiny/*/trials.jsonl") for line in path.read_text().splitlines()]
    provenances = [json.loads(line)["provenance"] for line in lines]
    assert {each["host"] for each in provenances} == {"one", "two"}
    assert len({each["code_sha256"] for each in provenances}) == 1
    assert refused.returncode == 2, refused.stderr
    here = importlib.metadata.version("numpy")
    assert f"node three ({old.address}) has numpy 1.0.1, and this host {here}" in refused.stderr.splitlines()[-1]


def test_each_host_prepares_the_corpus_in_a_cache_of_its_own(tmp_path: Path, corpus: Path) -> None:
    """A host that joins without the corpus is not used, and named."""
    file, results, hidden = write_file(tmp_path, corpus), tmp_path / "results", corpus.parent
    with Network() as network:
        head, two = network.host("one"), network.host("two")
        three = network.host("three", private=[hidden])
        for host in (head, two, three):
            host.environment["NGPT_CACHE"] = ""  # as if it was not set
        head.start_ray()
        two.start_ray(head=head)
        run = [*RUN, file, "--address", f"{head.address}:{PORT}"]
        done = head.run([*run, "--out", results])
        three.start_ray(head=head)
        refused = head.run([*run, "--out", tmp_path / "other"])
        manifests = [list(host.home.glob(".cache/ngpt/*/manifest.json")) for host in (head, two, three)]
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for path in results.glob("tiny/*/trials.jsonl") for line in path.read_text().splitlines()]
    assert {json.loads(line)["provenance"]["host"] for line in lines} == {"one", "two"}
    assert list(map(len, manifests)) == [1, 1, 0]
    assert refused.returncode == 2, refused.stderr
    last = refused.stderr.splitlines()[-1]
    assert f"node three ({three.address}) cannot prepare the corpus {corpus}: " in last and "same path" in last


@pytest.mark.long
def test_a_plugin_reaches_a_host_that_does_not_have_it(tmp_path: Path, corpus: Path) -> None:
    """The file and its helper are sent; a module of a package is not, and a host without it is refused."""
    library, package = tmp_path / "library", tmp_path / "package"
    write(library, "SHARE = 0.9\n", "helper.py")
    plugin = write(library, "from .helper import SHARE\n" + RULE.replace("0.9", "SHARE"))
    write(package, RULE.replace('"mine"', '"other"'), "other_rules.py")
    rules = "\n  - name: rule\n    vary: {residual: [mine, slerp]}\n"
    file, results = write_file(tmp_path, corpus, phases=rules), tmp_path / "results"
    with Network() as network:
        head, two = network.host("one"), network.host("two", private=[library, package])
        head.environment["PYTHONPATH"] += f":{package}"
        head.start_ray(cpus=1)
        two.start_ray(head=head, cpus=1)
        run = [*RUN, file, "--address", f"{head.address}:{PORT}", "--plugin", plugin]
        done = head.run([*run, "--out", results])
        refused = head.run([*run, "--plugin", "other_rules", "--out", tmp_path / "other"])
    assert done.returncode == 0, done.stdout + done.stderr
    rows = records(results / "tiny")
    assert {row["status"] for row in rows} == {"finished"}
    assert len({row["provenance"]["code_sha256"] for row in rows}) == 1
    assert {row["provenance"]["host"] for row in rows} == {"one", "two"}
    marks = {row["config"]["model.residual"]: row["provenance"].get("plugins") for row in rows}
    assert marks["mine"][0]["name"] == "mine.py" and marks["slerp"] is None
    assert refused.returncode == 2, refused.stderr
    assert f"node two ({two.address}) cannot import the code (PluginError: plug-in" in refused.stderr.splitlines()[-1]
    assert "No module named 'other_rules'" in refused.stderr.splitlines()[-1]


def test_a_host_without_a_compiler_is_refused_if_the_campaign_compiles(tmp_path: Path, corpus: Path) -> None:
    file = write_file(tmp_path, corpus)
    file.write_text(file.read_text().replace("device: cpu", "device: cpu\n  compile: true"))
    with Network() as network:
        head, bare = network.host("one"), network.host("two")
        bare.environment["CXX"] = "no-such-compiler"
        head.start_ray()
        bare.start_ray(head=head)
        refused = head.run([*RUN, file, "--address", f"{head.address}:{PORT}", "--out", tmp_path / "results"])
    assert refused.returncode == 2, refused.stderr
    (line,) = [line for line in refused.stderr.splitlines() if "node two" in line]
    assert f"node two ({bare.address}) cannot train: compile: true needs a C++ compiler: install g++" in line
    assert "node one" not in line and "Traceback" not in refused.stderr
    assert '"trial_started"' not in (tmp_path / "results/tiny/journal.jsonl").read_text()

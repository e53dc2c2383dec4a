"""What the project says about itself: pyproject.toml, CITATION.cff, the licence and the workflow of CI agree."""

import os
import re
import tomllib

import pytest
from ruamel.yaml import YAML

from tests.helpers import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
YAML_FILES = YAML(typ="safe")
# The keys of a reference and of the file in the Citation File Format 1.2.0, https://doi.org/10.5281/zenodo.5171937
REQUIRED = {"cff-version", "message", "title", "authors"}
REFERENCE_TYPES = {"article", "conference-paper", "software"}


def test_the_citation_has_what_the_format_requires_and_the_version_and_licence_of_the_project() -> None:
    citation = YAML_FILES.load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation.keys() >= REQUIRED and citation["cff-version"] == "1.2.0"
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    assert all({"title", "type", "authors"} <= reference.keys() for reference in citation["references"])
    assert {reference["type"] for reference in citation["references"]} <= REFERENCE_TYPES


def test_the_classifiers_exist() -> None:
    known = pytest.importorskip("trove_classifiers").classifiers
    assert [entry for entry in PROJECT["classifiers"] if entry not in known] == []
    assert len(set(PROJECT["classifiers"])) == len(PROJECT["classifiers"])


def test_the_licence_is_a_file_of_that_licence() -> None:
    (name,) = PROJECT["license-files"]
    assert (ROOT / name).read_text(encoding="utf-8").startswith(f"{PROJECT['license']} License\n")


def test_ci_runs_the_script_on_every_python_of_the_metadata() -> None:
    job = YAML_FILES.load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]["ci"]
    supported = [entry.rpartition(" ")[2] for entry in PROJECT["classifiers"] if ":: Python :: 3." in entry]
    assert job["strategy"]["matrix"]["python"] == supported == ["3.11", "3.12", "3.13"]
    assert job["steps"][-1]["run"] == ".ci/run" and os.access(ROOT / ".ci/run", os.X_OK)


def test_every_extra_that_a_message_or_document_names_exists() -> None:
    files = [path for name in ("ngpt", "tune", "docs", "experiments") for path in (ROOT / name).rglob("*.*")]
    texts = [path.read_text(encoding="utf-8") for path in files if path.suffix in (".py", ".md", ".yaml")]
    lists = re.findall(r"pip install (?:-e )?'(?:ngpt-campaign|\.)\[([\w,]+)\]'", "".join(texts))
    named = {extra for text in lists for extra in text.split(",")}
    assert len(named) >= 3 and named <= PROJECT["optional-dependencies"].keys()

"""Plug-ins as users write them: the templates of docs/plugins.md, and a campaign from the command line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from torch import nn

from ngpt.code.plugins import loaded_plugins
from ngpt.data.loader import EvalSet
from ngpt.training.evaluation import METRICS
from tests.helpers import ROOT
from tests.helpers.plugin_files import RULE, no_plugins, write
from tests.helpers.tiny_campaign import FILE, records, train_all, write_file
from tune.results.verify import verify
from tune.spec.plugins import TABLES, use_campaign_plugins
from tune.storage.journal import read_journal

__all__ = ["no_plugins"]
PAGE = (ROOT / "docs/plugins.md").read_text(encoding="utf-8")
RULES = "\n  - name: rule\n    vary: {residual: [lerp, mine]}\n"


def templates() -> dict[str, tuple[str, str]]:
    """The code of each section, and the YAML that uses it."""
    found = {}
    for section in PAGE.split("\n## ")[1:]:
        code, use = (re.findall(rf"```{kind}\n(.*?)```", section, re.DOTALL) for kind in ("python", "yaml"))
        if code:
            found[section.partition("\n")[0]] = code[0], "".join(use)
    return found


def campaign_of_templates(folder: Path, corpus: Path) -> tuple[Path, list[str]]:
    """A campaign with a phase for each template, and the files of the plug-ins."""
    yaml, files, phases, base, claims = YAML(typ="safe"), [], [], {}, []
    for number, (code, use) in enumerate(templates().values()):
        files.append(write(folder, code, f"template_{number}.py"))
        lines: dict[str, Any] = yaml.load(use) or {}
        base |= lines.pop("base", {})
        claims += lines.pop("claims", [])
        seeds = [1, 2] if number == 0 else [1]  # two for the claim
        phases += [{"name": f"phase{number}", "seeds": seeds, **lines}] if lines else []
    text = FILE.replace("phases:PHASES", "").replace("CORPUS", str(corpus)).replace("SEEDS", "[1, 2]")
    for word, value in {"RATE": "1e-2", "CHECKPOINT": "{}", "LOG": "1", "EVERY": "2", "STEPS": "2"}.items():
        text = text.replace(word, value)
    data = yaml.load(text)
    data["base"]["data"] |= base
    path = folder / "templates.yaml"
    with path.open("w") as file:
        yaml.dump(data | {"phases": phases, "claims": claims}, file)
    return path, files


def test_the_templates_of_the_page_work_as_they_stand(tmp_path: Path, corpus: Path) -> None:
    path, files = campaign_of_templates(tmp_path, corpus)
    use_campaign_plugins(files)
    added = {entry.table.what: entry.key for plugin in loaded_plugins() for entry in plugin.entries}
    assert {*added} == {table.what for table in TABLES} - {"width rule"}
    summary = train_all(path, tmp_path / "results")
    assert summary.status == "finished"
    rows = records(tmp_path / "results")
    assert {row["status"] for row in rows} == {"finished"} and len(rows) == 13
    assert {row["config"]["data.corpus"] for row in rows} == {"squares"}
    settings = {"residual rule": "model.residual", "norm mode": "model.norm_mode", "optimizer": "optim.name"}
    for what, setting in (settings | {"schedule": "schedule.name"}).items():
        assert added[what] in {row["config"][setting] for row in rows}
    assert {0 <= row["metrics"]["accuracy"] < 1 for row in rows} == {True}
    (claim,) = summary.claims
    assert (claim.relation, claim.verdict) == ("no_worse", "reproduced")
    assert [arm["overrides"] for arm in arms(tmp_path / "results", "phase6")] == [
        {"model.alpha": 0.1},
        {"model.alpha": 0.4},
    ]


def arms(root: Path, phase: str) -> list[dict[str, Any]]:
    found = json.loads((root / phase / "summary.json").read_text())["arms"]
    return sorted((arm for arm in found if arm["arm"] != "baseline"), key=lambda arm: arm["arm"])


class LastToken(nn.Module):
    """Guesses that the next token is the one before it."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot(idx, 8).float()


def test_the_metric_of_the_page_counts_right_guesses(tmp_path: Path) -> None:
    use_campaign_plugins([write(tmp_path, templates()["Metric"][0])])
    idx, targets = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 0, 0]])
    model: Any = LastToken()
    assert float(METRICS["accuracy"].compute(model, EvalSet([(idx, targets)], 4, None, ""))) == 0.5


def command(folder: Path, *arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, str(ROOT / "run_campaign.py"), *map(str, arguments), "--out", str(folder / "results")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "NGPT_PLUGINS": "none"}
    return subprocess.run(
        run, cwd=cwd or folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_plugin_reaches_workers_and_its_edit_is_noticed(tmp_path: Path, corpus: Path) -> None:
    """One story under Ray: trained in groups, resumed from another folder, without the plug-in, after edits."""
    text = "from .helper import SHARE\nprint('loaded')\n" + RULE.replace("0.9", "SHARE")
    mine, helper = (
        Path(write(tmp_path, text, "lib/my-rule.py")),
        Path(write(tmp_path, "SHARE = 0.9\n", "lib/helper.py")),
    )
    metric = write(tmp_path, templates()["Metric"][0], "accuracy.py")
    file = write_file(tmp_path, corpus, phases=RULES, vectorise=2)
    given = ("--plugin", "lib/my-rule.py", "--plugin", metric)
    first = command(tmp_path, file, *given, "--json")
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["status"] == "finished"
    rows = records(tmp_path / "results" / "tiny")
    marks = {row["config"]["model.residual"]: row["provenance"]["plugins"] for row in rows}
    assert [each["name"] for each in marks["mine"]] == ["my-rule.py", "accuracy.py"]
    assert [each["name"] for each in marks["lerp"]] == ["accuracy.py"]
    assert {row["metrics"]["accuracy"] is not None for row in rows} == {True}
    assert {row["provenance"].get("vectorised") for row in rows} == {2}
    assert verify(tmp_path / "results" / "tiny").intact

    without = command(tmp_path, file, "--inline", "--plugin", metric)
    needed = f"unknown residual rule 'mine': the plug-in my-rule.py (digest {marks['mine'][0]['digest'][:10]}) gave it"
    assert without.returncode == 2 and f"{needed}: pass --plugin {mine};" in without.stderr
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    again = command(tmp_path, file, "--inline", "--plugin", mine, "--plugin", metric, cwd=elsewhere)
    assert again.returncode == 0 and "4 of them already done" in again.stderr, again.stderr

    helper.write_text("SHARE = 0.8\n")
    edited = command(tmp_path, file, "--inline", *given)
    assert edited.returncode == 2 and "Traceback" not in edited.stderr
    assert "helper.py of my-rule.py (SHARE): 2 results of rule/residual=mine" in edited.stderr
    new = command(tmp_path, file, "--inline", *given, "--retrain")
    assert new.returncode == 0 and new.stderr.count("residual=mine seed") == 2, new.stderr
    versions = [event for event in read_journal(tmp_path / "results/tiny/journal.jsonl") if "files" in event]
    assert [sorted(set(event["files"]) - {*versions[0]["files"]}) for event in versions] == [[], []]
    assert {"my-rule.py", "helper.py of my-rule.py", "accuracy.py"} <= {*versions[0]["files"]}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_plugin_that_is_broken_while_a_campaign_runs_is_named_in_the_record(tmp_path: Path, corpus: Path) -> None:
    """Ray's workers import it after the first process has; there it is another file by then."""
    write(tmp_path, f"import sys\n{RULE}\nif 'ray' in sys.modules:\n    assert good\n")
    done = command(tmp_path, write_file(tmp_path, corpus, phases=RULES), "--plugin", "mine.py")
    assert done.returncode == 4, done.stderr
    (error,) = {row["error"] for row in records(tmp_path / "results" / "tiny")}
    assert error.startswith("PluginError: plug-in mine.py:") and "NameError: name 'good' is not defined" in error

"""A campaign takes plug-ins from the command line only, and says which one an earlier run used."""

from pathlib import Path

import pytest

import run_campaign
from ngpt.config.base import ConfigError
from ngpt.plugins.load import forget_plugins, load_plugins
from ngpt.plugins.tables import PluginError
from tests.helpers.plugin_files import RULE, no_plugins, write
from tests.helpers.tiny_campaign import begun, drive, session_on, write_file
from tune.campaign import load_campaign
from tune.spec.plugins import TABLES, use_campaign_plugins

__all__ = ["no_plugins"]
RULES = "\n  - name: rule\n    vary: {residual: [mine]}\n"
SWEEP = "from tune.spec.sweeps import SWEEPS\n\nSWEEPS['NAME'] = lambda axes: []\n"
RELATION = "from tune.claims.relations import RELATIONS, Relation\n\nRELATIONS['odd'] = JUDGE\n"


def test_an_unknown_name_suggests_those_of_plugins(tmp_path: Path, corpus: Path) -> None:
    load_plugins([write(tmp_path)], TABLES)
    file = write_file(tmp_path, corpus, phases=RULES.replace("mine", "mime"))
    with pytest.raises(ConfigError, match=r"unknown residual rule 'mime', did you mean 'mine'\?"):
        load_campaign(file)


def test_a_resumed_campaign_names_the_plugin_that_it_needs(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plugin, file = write(tmp_path), write_file(tmp_path, corpus, phases=RULES)
    use_campaign_plugins([plugin])
    with session_on(file, tmp_path / "results" / "tiny") as session:
        specs = drive(begun(session))
        session.end()
    assert {source.name for spec in specs for source in spec.plugins} == {"mine.py"}
    report = (tmp_path / "results" / "tiny" / "report.md").read_text()
    assert "| plugins | mine.py (digest " in report
    forget_plugins()
    capsys.readouterr()
    assert run_campaign.main([str(file), "--out", str(tmp_path / "results"), "--plan"]) == 2
    error = capsys.readouterr().err
    place = f"{file}:17:23: phases[0].vary.residual[0]: unknown residual rule 'mine': the plug-in mine.py (digest"
    assert place in error and f"pass --plugin {plugin}" in error and error.count("\n") == 1
    assert run_campaign.main([str(file), "--out", str(tmp_path / "results"), "--plan", "--plugin", plugin]) == 0
    done = capsys.readouterr()
    assert "plan of tiny" in done.out and "plug-in mine.py (digest" in done.err


@pytest.mark.parametrize("where", ["plugins: [mine.py]\n", "base: {plugin: mine.py}\n"])
def test_a_file_of_settings_cannot_name_a_plugin(tmp_path: Path, where: str) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(f"campaign: my\nvary: {{alpha: [0.1]}}\n{where}")
    with pytest.raises(ConfigError, match="a plug-in is code, so no file of settings can name it; give it on the com"):
        load_campaign(path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (SWEEP.replace("NAME", "phases"), r"SWEEPS\['phases'\]: the name phases means something else already"),
        (SWEEP.replace("NAME", "two words"), r"SWEEPS\['two words'\]: the name of a sweep starts with a letter"),
        (
            SWEEP.replace("axes", "axis, more").replace("NAME", "a"),
            r"a function \(axis, more\); it is called with \(",
        ),
        (RELATION.replace("JUDGE", "max"), "a relation is an object of Relation with a function \\(claim, evidence\\)"),
        (
            RELATION.replace("JUDGE", "Relation(int, ())"),
            r"RELATIONS\['odd'\] is the class int; a relation is",
        ),
    ],
)
def test_what_does_not_fit_a_table_of_campaigns_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(PluginError, match=problem):
        use_campaign_plugins([write(tmp_path, text)])


def test_help_and_settings_list_what_given_plugins_add(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plugin = write(tmp_path, RULE)
    assert run_campaign.main(["settings", "model.residual", "--plugin", plugin]) == 0
    assert "add, add_normalize, lerp, mine, slerp" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        run_campaign.main(["--help", "--plugin", plugin])
    assert ended.value.code == 0 and "residual rule mine" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        run_campaign.main(["--help", "--plugin", f"{plugin}.py"])
    assert ended.value.code == 2 and "no such file" in capsys.readouterr().err

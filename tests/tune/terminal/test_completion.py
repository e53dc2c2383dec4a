"""The completion scripts, each in its own shell: verbs, options, campaign files and names of experiments."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import run_campaign
from tests.helpers import ROOT
from tune.spec.shipped import shipped
from tune.terminal.completion import SHELLS

# What is typed, what completes it, and what does not.
CASES = [
    ("sta", {"status"}, {"compare"}),
    ("experiments/quick", {"experiments/quickstart.yaml"}, set()),
    ("status --", {"--json", "--help"}, {"--plan"}),
    ("experiments/quickstart.yaml --pl", {"--plan"}, {"--out"}),
    ("new quick", {"quickstart"}, {"phase1"}),
    ("new models/", {each.name for each in shipped() if not each.is_campaign}, {"quickstart"}),
    ("completion ", set(SHELLS), {"status"}),
    ("report x --claims experiments/qui", {"experiments/quickstart.yaml"}, set()),
]
BASH = """
source {script}
complete -p ngpt-campaign >&2
COMP_WORDS=({words}) COMP_CWORD={last} COMP_LINE={line} COMP_POINT=${{#COMP_LINE}}
$(complete -p ngpt-campaign | sed 's/.*-F \\([^ ]*\\).*/\\1/') ngpt-campaign
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the script of each shell."""
    folder = tmp_path_factory.mktemp("completion")
    for shell in SHELLS:
        text = subprocess.check_output([sys.executable, str(ROOT / "run_campaign.py"), "completion", shell], text=True)
        (folder / shell).write_text(text)
    return folder


def ask(shell: str, *arguments: str) -> list[str]:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    done = subprocess.run([shell, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(("typed", "offered", "not_offered"), CASES)
def test_bash_completes(typed: str, offered: set[str], not_offered: set[str], scripts: Path) -> None:
    words = ["ngpt-campaign", *typed.split(" ")]
    line = shlex.quote(f"ngpt-campaign {typed}")
    values = {"script": scripts / "bash", "words": shlex.join(words), "last": len(words) - 1, "line": line}
    found = set(ask("bash", "--norc", "-c", BASH.format(**values)))
    assert offered <= found and not found & not_offered


@pytest.mark.parametrize(("typed", "offered", "not_offered"), CASES)
def test_fish_completes(typed: str, offered: set[str], not_offered: set[str], scripts: Path) -> None:
    line = shlex.quote(f"ngpt-campaign {typed}")
    lines = ask("fish", "--no-config", "-c", f"source {scripts / 'fish'}; complete -C {line}")
    found = {line.partition("\t")[0] for line in lines}
    assert offered <= found and not found & not_offered


def test_zsh_registers_the_command_and_knows_every_verb(scripts: Path) -> None:
    """Without a terminal zsh completes nothing, so only what the script defines is looked at."""
    check = 'compdef() { print -l compdef $@ }; eval "$(<$1)"; print -l ${(ok)functions}'
    found = ask("zsh", "-f", "-c", check, "zsh", str(scripts / "zsh"))
    assert found[:4] == ["compdef", "_shtab_ngpt_campaign", "-N", "ngpt-campaign"]
    assert {"_shtab_ngpt_campaign_commands", "_shtab_ngpt_campaign_verbs"} <= set(found)
    text = (scripts / "zsh").read_text()
    assert [verb for verb in run_campaign.VERBS if f"_shtab_ngpt_campaign_{verb}_options" not in text] == []


def test_another_shell_is_refused_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_campaign.main(["completion", "ksh"])
    assert "unknown choice 'ksh', did you mean 'zsh'?" in capsys.readouterr().err

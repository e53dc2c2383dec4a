"""The inspect command, and the commands and scripts of docs/model-questions.md."""

import json
import math
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

import run_campaign
from ngpt.data.dataset import Dataset
from ngpt.inspect import main, table
from ngpt.model.trace import Stage
from ngpt.training.config import TrainConfig
from tests.helpers import ROOT
from tests.helpers.tiny_run import run

DOCUMENT = ROOT / "docs" / "model-questions.md"
TINY = ["model.n_layer=1", "model.n_embd=16", "model.n_head=2", "model.block_size=16", "batch_size=2", "eval_tokens=64"]


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def options(corpus: Path) -> list[str]:
    return [*TINY, f"data.corpus={corpus}", "data.tokenizer=sentencepiece:400"]


def test_table_fits_a_terminal_and_shows_the_cost_of_the_model(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--backward", "--set", *options, "residual=add_normalize", "norm_mode=dotprod"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    assert sum(line.startswith("0.mlp.stream") for line in lines) == 2
    figures = dict(line.split(maxsplit=1) for line in lines[-16:] if len(line.split()) == 2)
    # 16 * (2 * 400 + 4 * 16 + 3 * 64) and the scales: alpha 2 * 16, s_qk 16, s_uv 128, s_z 400
    assert figures["n_params"] == f"{16 * (800 + 64 + 192) + 32 + 16 + 128 + 400:,}"
    assert figures["flops_per_token"] == f"{6 * 16 * (400 + 64 + 192) + 12 * 16 * 16:,}"


def test_json_output_is_one_strict_object(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "--set", *options]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["summary"]["ln_V"] == pytest.approx(math.log(400))
    assert found["forward"][0]["shape"] == [2, 16, 16] and found["backward"] == []


def test_long_stage_name_keeps_the_columns_aligned() -> None:
    stage = Stage("11.attention.k rotated", (64, 1024, 50257), "float32", (1e-5, 1.23e-6, 0.123), "sqrt", 123.45)
    header, line = table([stage]).splitlines()
    assert header.index(" ms") + 3 == len(line) and len(line) < 90


def test_checkpoint_is_inspected_with_its_training_settings(
    tiny: TrainConfig, dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tiny, tmp_path, dataset)
    assert main(["--checkpoint", str(tmp_path), "--json"]) == 0
    trained = json.loads(capsys.readouterr().out)["summary"]["loss"]
    assert trained < math.log(400) - 0.05
    assert main(["--checkpoint", str(tmp_path), "--set", "rope_scaling=yarn", "rope_factor=2", "block_size=32"]) == 0
    assert "4x32x16" in capsys.readouterr().out
    assert main(["--checkpoint", str(tmp_path), "--set", "n_embd=32"]) == 2
    assert capsys.readouterr().err.startswith("n_embd=32 does not fit")
    assert main(["--checkpoint", str(tmp_path), "--set", "data.tokenizer=sentencepiece:380"]) == 2
    assert "tokenized with another sentencepiece:380" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "model.alhpa=1"], "did you mean 'model.alpha'?"),
        (["--checkpoint", "no/such/run"], "no/such/run: no such folder"),
        (["--config", "no/such/file.yaml"], "no/such/file.yaml"),
    ],
)
def test_user_error_gives_one_message(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) in (2, 74)
    assert message in capsys.readouterr().err


# ---- the document ----------------------------------------------------------------------------------------------------


def code_blocks(language: str) -> list[str]:
    text = DOCUMENT.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in code_blocks("bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line]


def files() -> dict[str, str]:
    """The files at the end of the document, each of which begins with `# name`."""
    named = [(re.match(r"# (\w+\.\w+)", block), block) for block in [*code_blocks("yaml"), *code_blocks("python")]]
    return {match[1]: block for match, block in named if match}


@pytest.fixture
def document_folder(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files of the document, for a smaller corpus, one seed and one step."""
    for name, text in files().items():
        short = text.replace("python-docs", str(corpus)).replace("sentencepiece:1024", "sentencepiece:400")
        (tmp_path / name).write_text(short.replace("seeds=(1, 2, 3), steps=150", "seeds=(1,), steps=1"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "lab", raising=False)
    return tmp_path


def test_document_answers_twelve_questions_and_its_files_are_tested() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert len(re.findall(r"^### .+\?$", text, flags=re.MULTILINE)) == 12
    assert files().keys() == {"questions.yaml", "sphere.yaml", "lab.py", "changes.py", "facts.py"}
    assert "seeds=(1, 2, 3), steps=150" in files()["lab.py"]
    assert {tuple(command[:3]) for command in commands()} == {
        ("python", "-m", "ngpt.inspect"), ("python", "run_campaign.py", "questions.yaml"),
        ("python", "run_campaign.py", "sphere.yaml"),
    }  # fmt: skip
    mentioned = set(re.findall(r"`(\w+\.(?:py|yaml))`", text))
    assert mentioned <= files().keys() | {"run_campaign.py"}


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_of_the_document_run(
    command: list[str], document_folder: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Campaigns are only planned, which trains nothing. All other commands run with two sequences."""
    if command[1] == "run_campaign.py":
        assert run_campaign.main([*command[2:], "--plan"]) == 0
    else:
        small = ["--set", f"data.corpus={corpus}", "data.tokenizer=sentencepiece:400", "batch_size=2"]
        assert main([*command[3:], *small]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", ["changes.py", "facts.py"])
def test_scripts_of_the_document_run(name: str, document_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(document_folder / name))
    printed = capsys.readouterr().out.splitlines()
    assert (
        len(printed) == files()[name].count("print(") + {"changes.py": 3, "facts.py": 4}[name]
    )  # loops print several times
    assert not any("nan" in line for line in printed)

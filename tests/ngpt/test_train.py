"""The command `python -m ngpt.train`: its output, its exit codes and its error messages."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from ngpt import evaluate
from ngpt.config.base import override
from ngpt.data.dataset import DataConfig, open_dataset
from ngpt.generate import main as generate
from ngpt.train import main
from ngpt.training.config import TrainConfig
from tests.helpers.tiny_run import untimed
from tests.helpers.vocabularies import ENGLISH, write_gpt2


def test_the_result_is_one_json_object_on_stdout(
    settings_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["--config", str(settings_file), "--set", "alpha=0.2", "steps=3", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    result = json.loads(printed.out, parse_constant=pytest.fail)
    assert result["status"] == "finished" and result["steps"] == 3 and 4 < result["val_loss"] < 8
    lines = [line for line in printed.err.splitlines() if not line.startswith("topics: ")]  # of its preparation
    warning, *steps = lines
    assert warning.startswith("warning: an evaluation scores 64 tokens")
    assert [line.split()[:2] for line in steps] == [["step", "0"], ["step", "2"], ["step", "3"]]
    manifest = json.loads((tmp_path / "out" / "checkpoints" / "step_0000003" / "MANIFEST.json").read_text())
    assert manifest["identity"]["model.alpha"] == 0.2 and manifest["identity"]["optim.betas"] == [0.9, 0.99]


def test_a_dtype_that_the_cpu_emulates_is_said_first(
    settings_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ngpt.system.timing.bfloat16_slowdown", lambda: 39.6)
    arguments = ["--config", str(settings_file), "--set", "dtype=bfloat16", "steps=1", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "bfloat16 is emulated on this CPU: 40 x slower than float32; set dtype: float32"


def test_resume_latest_continues_a_run(settings_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(settings_file), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    first = json.loads(capsys.readouterr().out)
    assert main(arguments) == 2
    assert "holds checkpoints of an earlier run" in capsys.readouterr().err
    assert main([*arguments, "--resume", "latest"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert untimed(again) == untimed(first)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "alhpa=1"], "alhpa: unknown setting, did you mean 'alpha'?"),
        (["--set", "alpha=-1"], "model.alpha: input should be greater than 0, got -1"),
        (["--set", "alpha"], "--set alpha: expected NAME=VALUE"),
        (["--set", "corpus=shakespear"], "unknown corpus 'shakespear', did you mean 'shakespeare'?"),
        (["--config", "missing.yaml"], "missing.yaml: No such file or directory"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and not (tmp_path / "out").exists()
    (line,) = printed.err.splitlines()
    assert line.startswith(message)


def test_a_wrong_setting_in_the_file_is_reported_with_its_position(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text("steps: 4\nsceptre: 4\n")
    assert main(["--config", str(file), "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and not (tmp_path / "out").exists()
    (line,) = printed.err.splitlines()
    assert line.startswith(f"{file}:2:1: sceptre: unknown setting")


def test_a_diverged_run_has_exit_code_4(
    settings_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["--config", str(settings_file), "--set", "residual=add", "lr=1e38", "--out", str(tmp_path / "out")])
    result = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert code == 4 and result["status"] == "diverged" and result["val_loss"] is None


def test_an_unusable_output_folder_has_exit_code_74(
    settings_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("a file")
    assert main(["--config", str(settings_file), "--out", str(tmp_path / "out")]) == 74
    assert capsys.readouterr().err.splitlines() == [f"{tmp_path / 'out'}: File exists"]


@pytest.mark.parametrize("name", ["--norm-mode", "--norm_mode"])
def test_norm_mode_has_an_option(
    name: str, settings_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(settings_file), name, "dotprod", "--out", str(tmp_path / "out")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["r_mean"] != 1 and result["r_replaced"] == 0
    (checkpoint,) = (tmp_path / "out" / "checkpoints").iterdir()
    assert json.loads((checkpoint / "MANIFEST.json").read_text())["identity"]["model.norm_mode"] == "dotprod"


def test_an_unknown_norm_mode_lists_the_choices(
    tiny: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = "unknown norm mode 'dotprd', did you mean 'dotprod'? Allowed: baseline, dotprod, ema"
    with pytest.raises(ValueError, match=re.escape(message)):
        override(tiny, {"norm_mode": "dotprd"})
    assert main(["--norm-mode", "dotprd", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"model.norm_mode: {message}\n"


@pytest.mark.slow
def test_a_vocabulary_of_128k_trains_resumes_evaluates_and_generates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = f"gpt2:{write_gpt2(tmp_path / 'bpe', vocab_size=1 << 17)}"
    (tmp_path / "corpus").mkdir()
    for split in ("train", "val", "test"):
        (tmp_path / "corpus" / f"{split}.txt").write_text(f"{split}: {ENGLISH}" + "tea\ntop\n" * 20)  # ids above 65,535
    data = [f"data.corpus={tmp_path / 'corpus'}", f"data.tokenizer={tokenizer}"]
    model = ["n_layer=1", "n_embd=8", "n_head=2", "block_size=16", "device=cpu"]
    run = ["steps=4", "batch_size=2", "eval_tokens=64", "checkpoint.every=2"]
    out = tmp_path / "out"
    assert main(["--set", *data, *model, *run, "--out", str(out)]) == 0
    whole = json.loads(capsys.readouterr().out)
    shutil.rmtree(out / "checkpoints" / "step_0000004")
    assert main(["--set", *data, *model, *run, "--out", str(out), "--resume", "latest"]) == 0
    assert untimed(json.loads(capsys.readouterr().out)) == untimed(whole)
    dataset = open_dataset(DataConfig(corpus=str(tmp_path / "corpus"), tokenizer=tokenizer))
    assert dataset.vocab_size == 1 << 17 and dataset.train[0].dtype == np.uint32 and dataset.train[0].max() > 1 << 16
    capsys.readouterr()
    scores = {}
    for split in ("val", "test"):
        assert evaluate.main([str(out), "--device", "cpu", "--split", split, "--json"]) == 0
        scores[split] = json.loads(capsys.readouterr().out)
    assert scores["val"]["val_loss"] == pytest.approx(whole["val_loss"]) and scores["val"]["split"] == "val"
    assert scores["test"]["eval_sha256"] != scores["val"]["eval_sha256"] and scores["test"]["val_loss"] > 0
    assert generate([str(out), "--device", "cpu", "--prompt", "the dog", "--max-tokens", "5"]) == 0
    assert "5 tokens in" in capsys.readouterr().err

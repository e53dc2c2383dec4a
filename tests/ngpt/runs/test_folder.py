"""A run resumes from its folder alone, from any of its checkpoints, and for more steps."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ngpt.config.base import ConfigError, build
from ngpt.plugins.load import forget_plugins, load_plugins
from ngpt.runs.folder import CONFIG_FILE, read_config_file, write_config_file
from ngpt.system.lock import FolderLock
from ngpt.train import main
from ngpt.training.checkpoint import checkpoint_folders
from ngpt.training.config import TrainConfig
from tests.helpers.plugin_files import no_plugins, write
from tests.helpers.tiny_run import assert_equal_weights, rows, weights

__all__ = ["no_plugins"]
STEPS = ["steps=8", "checkpoint.every=2", "checkpoint.keep_last=9", "tracker.log_every=1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A run of 8 steps with a checkpoint at every second one."""
    folder = tmp_path_factory.mktemp("folder")
    (folder / "tiny.yaml").write_text(
        f"data: {{corpus: {corpus}, tokenizer: 'sentencepiece:400'}}\n"
        "model: {n_layer: 1, n_head: 2, n_embd: 16, block_size: 16}\n"
        "device: cpu\nbatch_size: 2\neval_every: 2\neval_tokens: 64\noptim: {lr: 1e-2}\n"
    )
    arguments = ["--config", str(folder / "tiny.yaml"), "--set", *STEPS, "--out", str(folder / "out")]
    assert main(arguments) == 0
    return folder / "out"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def steps(out: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in checkpoint_folders(out / "checkpoints")]


def state(out: Path, step: int) -> dict[str, Any]:
    return torch.load(out / "checkpoints" / f"step_{step:07d}" / "state.pt", weights_only=True)["progress"]


def identity(out: Path, step: int) -> dict[str, Any]:
    return json.loads((out / "checkpoints" / f"step_{step:07d}" / "MANIFEST.json").read_text())["identity"]


@pytest.mark.parametrize("has_settings", [True, False], ids=["config.json", "a run of an older version"])
@pytest.mark.parametrize("elsewhere", [False, True], ids=["in its folder", "in a new folder"])
def test_a_run_resumes_from_an_earlier_checkpoint_without_its_settings(
    has_settings: bool, elsewhere: bool, run: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not has_settings:
        (run / "config.json").unlink()
    out = tmp_path / "other" if elsewhere else run
    log = [] if has_settings else ["--set", *STEPS[1:]]  # these change no result, so older checkpoints lack them
    arguments = ["--resume", str(run / "checkpoints" / "step_0000004"), *log]
    assert main([*arguments, *(["--out", str(out)] if elsewhere else [])]) == 0
    said = capsys.readouterr().err
    assert f"continuing {out} at step 4 of 8" in said
    assert rows(out) == rows(finished)
    assert_equal_weights(weights(out), weights(finished))
    assert steps(out) == ([4, 6, 8] if elsewhere else [2, 4, 6, 8])
    superseded = sorted(path.name[:23] for path in (out / "checkpoints").glob("superseded-*"))
    assert superseded == ([] if elsewhere else ["superseded-step_0000006", "superseded-step_0000008"])


def test_a_run_that_was_stopped_before_its_first_checkpoint_names_its_plugin(tmp_path: Path) -> None:
    load_plugins([write(tmp_path)])
    write_config_file(tmp_path, build(TrainConfig, {"model.residual": "mine"}))
    assert read_config_file(tmp_path / CONFIG_FILE).model.residual == "mine"
    forget_plugins()
    with pytest.raises(ConfigError, match=r"the plug-in mine\.py \(digest \w{10}\) gave it: pass --plugin .*mine\.py"):
        read_config_file(tmp_path / CONFIG_FILE)


def test_best_continues_from_the_lowest_validation_loss(run: Path, tmp_path: Path) -> None:
    losses = {step: json.loads(next(run.glob(f"checkpoints/*{step}/MANIFEST.json")).read_text()) for step in steps(run)}
    best = min(losses, key=lambda step: losses[step]["val_loss"])
    assert main(["--resume", "best", "--out", str(run), "--set", "steps=10"]) == 0
    assert state(run, 10)["extended"] == [(best, 8)]


def test_more_steps_stretch_the_schedule_and_say_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--resume", str(run), "--set", "steps=16"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"continuing {run} at step 8 of 16"
    rate = "at step 8 the learning rate goes from 0% to 50% of its peak"
    assert said[1] == f"16 steps instead of 8: the cosine schedule is stretched to them, so {rate}"
    assert steps(run) == [2, 4, 6, 8, 10, 12, 14, 16]
    assert identity(run, 8)["steps"] == 8 and "extended" not in identity(run, 8)
    assert identity(run, 16)["steps"] == 16 and identity(run, 16)["extended"] == [[8, 8]]
    logged = [row["lr"] for row in rows(run) if row["step"] == 9 and "lr" in row]
    assert logged == pytest.approx([0.01 * 0.5])
    assert main(["--resume", str(run)]) == 0  # config.json has the new steps, and there is nothing left to train
    assert steps(run)[-1] == 16


def test_an_extended_run_that_rolls_back_before_the_extension_goes_on(run: Path) -> None:
    from ngpt.runs.folder import read_config_file
    from ngpt.training.config import resolved
    from ngpt.training.recovery import rollback_to_checkpoint
    from ngpt.training.run import set_up

    config = read_config_file(run / "config.json").model_copy(update={"steps": 16})
    live = set_up(resolved(config), run, resume="extend", dataset=None)
    rollback_to_checkpoint(live)
    assert live.state.step == 8 and live.state.extended == [(8, 8)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "steps=8", "lr=0.02"], "was made with optim.lr = 0.01, this run has 0.02; to train its weights"),
        (["--set", "steps=6"], "has trained 8 steps already: give more than that, got steps=6"),
    ],
)
def test_other_settings_are_refused_before_anything_is_written(
    arguments: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert main(["--resume", str(run), *arguments]) == 2
    *advice, line = capsys.readouterr().err.splitlines()
    assert message in line and all(text.startswith(("warning: ", "topics: ")) or "emulated" in text for text in advice)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize(
    ("resume", "message"),
    [("lates", "lates: no such folder"), ("best", "empty has no checkpoints"), ("empty", "empty has no checkpoints")],
)
def test_without_a_checkpoint_there_is_one_line(
    resume: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert main(["--resume", resume, *(["--out", "empty"] if resume == "best" else [])]) == 2
    *advice, line = capsys.readouterr().err.splitlines()
    assert message in line and all(text.startswith(("warning: ", "topics: ")) or "emulated" in text for text in advice)


def test_latest_without_a_checkpoint_says_that_it_starts(
    settings_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", str(settings_file), "--out", str(tmp_path / "new"), "--resume", "latest"]
    assert main(arguments) == 0
    assert f"{tmp_path / 'new'} has no checkpoint yet: starting at step 0" in capsys.readouterr().err


@pytest.mark.parametrize("resume", [[], ["--resume", "latest"]])
def test_a_second_run_in_the_same_folder_is_refused(
    resume: list[str], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run if resume else tmp_path / "new"
    with FolderLock(out, "run"):
        assert main([*resume, "--out", str(out)]) == 3
    assert capsys.readouterr().err == f"{out} is in use by another run (process {os.getpid()})\n"
    assert not (out / "metrics.jsonl").exists() or rows(out)[-1]["step"] == 8


def test_a_trial_of_a_campaign_continues_in_a_new_folder_only(
    run: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trial = tmp_path / "results" / "trials" / "a-s1"
    shutil.copytree(run, trial)
    (tmp_path / "results" / "journal.jsonl").touch()
    assert main(["--resume", str(trial), "--set", "steps=10"]) == 2
    assert "is a trial of a campaign, which trains it itself: choose another --out" in capsys.readouterr().err
    assert main(["--resume", str(trial), "--set", "steps=10", "--out", str(tmp_path / "longer")]) == 0
    assert steps(tmp_path / "longer") == [8, 10]


# ---- new runs from the weights of others -----------------------------------------------------------------------------


def test_a_new_run_starts_from_the_weights_of_another(run: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    assert (
        main(
            [
                "--config",
                str(finished.parent / "tiny.yaml"),
                "--set",
                "lr=0.001",
                "steps=2",
                "--init-from",
                str(run),
                "--out",
                str(out),
            ]
        )
        == 0
    )
    first = rows(out)[0]
    last = rows(finished)[-1]
    assert first["step"] == 0 and first["val_loss"] == pytest.approx(last["val_loss"], abs=1e-6)
    sha256 = json.loads((run / "checkpoints" / "step_0000008" / "MANIFEST.json").read_text())["files"][
        "model.safetensors"
    ]["sha256"]
    assert identity(out, 2)["init_sha256"] == sha256 and "init_from" not in identity(out, 2)
    shutil.rmtree(run)  # a run that has begun does not need them any more
    assert main(["--resume", str(out), "--set", "steps=4"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["n_embd=32"], "the model does not fit"),
        (
            ["tokenizer=sentencepiece:390", "vocab_size=400"],
            "trained with another sentencepiece:400 than the sentencepiece:390 of the data",
        ),
        (["init_sha256=abc"], "has no weights with SHA-256 abc"),
    ],
)
def test_weights_that_do_not_fit_are_one_line(
    arguments: list[str], message: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "tuned")]
    config = ["--config", str(finished.parent / "tiny.yaml"), "--init-from", str(finished)]
    assert main([*config, "--set", *arguments, *out]) == 2
    *advice, line = capsys.readouterr().err.splitlines()
    assert message in line and all(text.startswith(("warning: ", "topics: ")) or "emulated" in text for text in advice)

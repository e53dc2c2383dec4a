"""Saves of a run: regular ones are skipped if they fail, required ones are retried once and then raise."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ngpt.training.saving
from ngpt.config.base import override
from ngpt.data.dataset import Dataset
from ngpt.training.config import TrainConfig
from tests.helpers.tiny_run import LimitedMemory, rows, run, untimed, weight_difference


@pytest.mark.parametrize("times", [1, 2])
def test_a_save_out_of_memory_is_retried_once_and_then_skipped(
    times: int, watched: TrainConfig, dataset: Dataset, tmp_path: Path
) -> None:
    run(watched, tmp_path / "plain", dataset)
    tries: list[int] = []

    def fails(*_: Any, step: int, **__: Any) -> bool:
        tries.append(step)
        return tries.count(4) <= times and step == 4

    with pytest.MonkeyPatch.context() as patch:
        full = LimitedMemory(ngpt.training.saving.save_checkpoint, fails=fails)
        patch.setattr(ngpt.training.saving, "save_checkpoint", full)
        result = run(watched, tmp_path / "full", dataset)
    assert result.status == "finished" and full.failures == times
    assert tries == [2, 4, 4, 6, 8]
    there = [path.name for path in sorted((tmp_path / "full" / "checkpoints").iterdir())]
    assert ("step_0000004" in there) == (times == 1)
    assert weight_difference(tmp_path / "full", tmp_path / "plain") == 0


def test_the_last_save_out_of_memory_raises(watched: TrainConfig, dataset: Dataset, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        full = LimitedMemory(ngpt.training.saving.save_checkpoint, fails=lambda *_, step, **__: step == 8)
        patch.setattr(ngpt.training.saving, "save_checkpoint", full)
        with pytest.raises(torch.OutOfMemoryError):
            run(watched, tmp_path, dataset)
    assert full.failures == 2


def refuse_saves(patch: pytest.MonkeyPatch, refuses: Callable[[int, int], bool]) -> list[int]:
    """Makes saving fail if `refuses(step, attempt)`; returns a list of the steps of all attempts."""
    real, attempts = ngpt.training.saving.save_checkpoint, []

    def save(*arguments: Any, **named: Any) -> Path:
        attempts.append(named["step"])
        if refuses(named["step"], attempts.count(named["step"])):
            raise OSError(28, "No space left on device")
        return real(*arguments, **named)

    patch.setattr(ngpt.training.saving, "save_checkpoint", save)
    return attempts


def test_a_save_that_the_disk_refuses_is_logged_and_skipped(
    watched: TrainConfig,
    dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = run(watched, tmp_path / "expected", dataset)
    attempts = refuse_saves(monkeypatch, lambda step, attempt: step in (2, 4))
    result = run(watched, tmp_path / "run", dataset)
    assert untimed(result.metrics) == untimed(expected.metrics) and rows(tmp_path / "run") == rows(
        tmp_path / "expected"
    )
    assert attempts == [2, 4, 6, 8]
    assert [path.name for path in sorted((tmp_path / "run/checkpoints").iterdir())] == ["step_0000006", "step_0000008"]
    messages = [record.getMessage() for record in caplog.records]
    text = "the checkpoint was not saved (No space left on device); the next one will be tried"
    assert messages == [f"step 2: {text}", f"step 4: {text}"]


@pytest.mark.parametrize("is_rollback", [False, True])
def test_a_required_checkpoint_is_retried_once_and_then_raises(
    watched: TrainConfig, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_rollback: bool
) -> None:
    """The last checkpoint is the model; those of a run that may roll back decide its results."""
    config = override(watched, {"nonfinite.policy": "rollback"}) if is_rollback else watched
    with monkeypatch.context() as patch:
        attempts = refuse_saves(patch, lambda step, attempt: attempt == 1)
        assert run(config, tmp_path / "once", dataset).status == "finished"
        assert attempts == ([2, 2, 4, 4, 6, 6, 8, 8] if is_rollback else [2, 4, 6, 8, 8])
    refuse_saves(monkeypatch, lambda step, attempt: step == (2 if is_rollback else 8))
    with pytest.raises(OSError, match="No space left"):
        run(config, tmp_path / "twice", dataset)

"""A run writes its heartbeat, saves when it is asked to stop, and loses nothing by it."""

import os
from pathlib import Path

import pytest

from ngpt.config.base import override
from ngpt.data.dataset import Dataset
from ngpt.system import heartbeat
from ngpt.system.heartbeat import (
    Heartbeat,
    HeartbeatWriter,
    clear_heartbeat,
    host_name,
    read_heartbeat,
    request_stop,
    stop_requested,
)
from ngpt.training.config import TrainConfig
from ngpt.training.loop import train
from tests.helpers.tiny_run import assert_equal_weights, rows, run, weights


@pytest.fixture(autouse=True)
def check_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs check for a stop request at every step instead of once a second."""
    monkeypatch.setattr(heartbeat, "CHECK_EVERY", 0.0)


def stop_at(step: int, config: TrainConfig, out: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains until `step`, where another process asks the run to stop, and closes it."""
    real = HeartbeatWriter.beat

    def beat(self: HeartbeatWriter, at: int) -> None:
        real(self, at)
        if at == step:
            request_stop(out)

    with monkeypatch.context() as patch:
        patch.setattr(HeartbeatWriter, "beat", beat)
        loop = train(config, out, resume="latest", dataset=dataset)
        while not stop_requested(out):
            if next(loop)["step"] == config.steps == step:  # the last step has no beat after it
                request_stop(out)
        loop.close()
    clear_heartbeat(out)


@pytest.mark.parametrize("step", [1, 3, 5, 8])
def test_a_stopped_run_saves_where_it_is_and_resumes_to_the_same_result(
    step: int, tiny: TrainConfig, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluations are at 3, 6 and 8; no checkpoint is due before the end."""
    config = override(tiny, {"tracker.log_every": 1})
    run(config, tmp_path / "undisturbed", dataset)
    stop_at(step, config, tmp_path / "stopped", dataset, monkeypatch)
    assert [path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir()] == [f"step_{step:07d}"]
    assert read_heartbeat(tmp_path / "stopped") is None
    run(config, tmp_path / "stopped", dataset, resume="latest")
    assert rows(tmp_path / "stopped") == rows(tmp_path / "undisturbed")
    assert_equal_weights(weights(tmp_path / "stopped"), weights(tmp_path / "undisturbed"))


def test_a_run_that_is_asked_to_stop_at_an_evaluation_saves_there(
    tiny: TrainConfig, dataset: Dataset, tmp_path: Path
) -> None:
    loop = train(tiny, tmp_path, dataset=dataset)
    while next(loop)["step"] != 6:
        pass
    request_stop(tmp_path)
    loop.close()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_0000006"]


def test_a_run_that_is_closed_without_a_stop_request_saves_nothing(
    tiny: TrainConfig, dataset: Dataset, tmp_path: Path
) -> None:
    """Early stopping closes trials that are not continued."""
    loop = train(tiny, tmp_path, dataset=dataset)
    next(loop)
    next(loop)
    loop.close()
    assert not (tmp_path / "checkpoints").exists()


def test_with_rollback_a_stopped_run_keeps_to_its_regular_checkpoints(
    tiny: TrainConfig, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = override(tiny, {"nonfinite.policy": "rollback", "checkpoint.every": 2})
    stop_at(5, config, tmp_path, dataset, monkeypatch)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_0000002", "step_0000004"]


def test_a_heartbeat_follows_the_run_and_stays_after_a_kill(tmp_path: Path) -> None:
    assert read_heartbeat(tmp_path) is None
    killed = HeartbeatWriter(tmp_path, began=7)
    assert read_heartbeat(tmp_path) == Heartbeat(os.getpid(), 7, 7, host_name())
    for step in (8, 123_456_789, 9):
        killed.beat(step)
        assert read_heartbeat(tmp_path) == Heartbeat(os.getpid(), 7, step, host_name())
    killed.close()
    assert read_heartbeat(tmp_path) == Heartbeat(os.getpid(), 7, 9, host_name())
    with HeartbeatWriter(tmp_path) as ended:
        ended.beat(3)
    assert read_heartbeat(tmp_path) is None


UNREADABLE = (
    *(b"", b"{", b'{"pid": 3}', b"[]", b"\xff\xfe", b'{"pid": 1, "x": 2}', b"[" * 100_000),
    b'{"pid": 1, "began": 0, "step": "3"}',
)


@pytest.mark.parametrize("content", UNREADABLE)
def test_an_unreadable_heartbeat_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "heartbeat").write_bytes(content)
    assert read_heartbeat(tmp_path) is None


def test_a_pipe_in_the_place_of_a_heartbeat_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "heartbeat")
    assert read_heartbeat(tmp_path) is None


def test_a_run_continues_when_its_heartbeat_cannot_be_written(tmp_path: Path) -> None:
    with HeartbeatWriter(tmp_path / "nowhere") as silent:
        silent.beat(1)
        assert not silent.stop_requested()


def test_stop_requests_are_checked_once_a_second_or_on_demand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "CHECK_EVERY", 1e9)
    with HeartbeatWriter(tmp_path) as rare:
        assert not rare.stop_requested()
        request_stop(tmp_path)
        assert not rare.stop_requested() and rare.stop_requested(now=True) and rare.stop_requested()
    clear_heartbeat(tmp_path)
    assert not stop_requested(tmp_path) and list(tmp_path.iterdir()) == []

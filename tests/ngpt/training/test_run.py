"""A run that is interrupted and resumed ends as an undisturbed one, and its result has all fields of a record."""

import contextlib
import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ngpt.ensemble.train
import ngpt.training.loop
import ngpt.training.run
import ngpt.training.saving
from ngpt.config.base import ConfigError, flatten, override
from ngpt.data.dataset import Dataset
from ngpt.data.loader import train_batch
from ngpt.ensemble.train import train_together
from ngpt.model.flops import flops_per_token
from ngpt.training.checkpoint import checkpoint_folders
from ngpt.training.config import TrainConfig, resolved
from ngpt.training.loop import train
from ngpt.training.run import Clock, RunResult
from ngpt.training.state import TrainState
from ngpt.training.tracker import read_metrics
from tests.helpers.tiny_run import AWKWARD, MODELS, assert_equal_weights, rows, run, untimed, watch, weights


class Killed(Exception):
    """Simulates the end of the process."""


def optimizer_states(out: Path, step: int) -> list[Any]:
    path = out / "checkpoints" / f"step_{step:07d}" / "state.pt"
    return torch.load(path, weights_only=True)["optimizers"]


def assert_equal_states(one: Any, other: Any) -> None:
    """Asserts that nested lists and dicts of tensors, numbers and strings are equal bit for bit."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_equal_states(left, right)
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.fixture
def awkward(tiny: TrainConfig) -> TrainConfig:
    return override(tiny, AWKWARD)


def test_a_result_holds_what_a_record_needs(tiny: TrainConfig, dataset: Dataset, tmp_path: Path) -> None:
    seen, result = watch(tiny, tmp_path, dataset)
    assert [row["step"] for row in seen] == [0, 3, 6, 8]
    metrics = result.metrics
    assert result.steps == metrics["steps"] == 8 and metrics["tokens"] == 8 * 4 * 16
    assert metrics["n_params"] == sum(tensor.size for tensor in weights(tmp_path, 8).values())
    assert all(isinstance(metrics[name], float) for name in ("val_loss", "val_bpb", "train_loss", "tokens_per_second"))
    assert (metrics["peak_memory_bytes"] or 0) > 50_000_000


def killed_after_save(step: int, patch: pytest.MonkeyPatch) -> None:
    """Ends the process as soon as the checkpoint of `step` is on disk."""
    real = ngpt.training.saving.save_checkpoint

    def save(*arguments: Any, **named: Any) -> Path:
        path = real(*arguments, **named)
        if named["step"] == step:
            raise Killed
        return path

    patch.setattr(ngpt.training.saving, "save_checkpoint", save)


def killed_in_step(step: int, patch: pytest.MonkeyPatch) -> None:
    """Ends the process in the middle of `step`, after rows that no checkpoint covers."""

    def batch(*arguments: Any, **named: Any) -> Any:
        if named["step"] == step - 1:
            raise Killed
        return train_batch(*arguments, **named)

    patch.setattr(ngpt.training.loop, "train_batch", batch)


@pytest.mark.parametrize(
    "kind", [kind if kind == "scheduled" else pytest.param(kind, marks=pytest.mark.slow) for kind in MODELS]
)
@pytest.mark.parametrize(
    ("kill", "every"), [(killed_after_save, 1), pytest.param(killed_in_step, 3, marks=pytest.mark.slow)]
)
def test_a_run_killed_at_any_step_and_resumed_ends_as_an_undisturbed_one(
    kind: str,
    kill: Callable[[int, pytest.MonkeyPatch], None],
    every: int,
    awkward: TrainConfig,
    dataset: Dataset,
    tmp_path: Path,
) -> None:
    config = override(awkward, MODELS[kind] | {"checkpoint.every": every})
    straight = run(config, tmp_path / "straight", dataset)
    expected = weights(tmp_path / "straight", 8)
    for step in range(1, 9):
        out = tmp_path / str(step)
        with pytest.MonkeyPatch.context() as patch:
            kill(step, patch)
            with pytest.raises(Killed):
                run(config, out, dataset)
        torch.manual_seed(step)  # a new process has another global RNG state
        resumed = run(config, out, dataset, resume="latest")
        assert resumed.status == "finished", step
        assert untimed(resumed.metrics) == untimed(straight.metrics), step
        assert rows(out) == rows(tmp_path / "straight"), step
        assert_equal_weights(weights(out, 8), expected)
        assert_equal_states(optimizer_states(out, 8), optimizer_states(tmp_path / "straight", 8))
        kept = [sorted(path.name for path in (one / "checkpoints").iterdir()) for one in (out, tmp_path / "straight")]
        assert kept[0] == kept[1]  # the last few and the best so far


@pytest.mark.slow
def test_a_process_killed_with_sigkill_loses_nothing(tiny: TrainConfig, tmp_path: Path) -> None:
    """It is killed once it has a checkpoint, and the resumed process again later."""
    steps = {"steps": 120, "eval_every": 40, "checkpoint.every": 9, "project_every": 7, "optim.name": "muon"}
    config = override(tiny, steps)
    code = (
        "import json, sys; from pathlib import Path; import torch; torch.set_num_threads(1);"
        "from ngpt.config.base import build; from ngpt.training.loop import TrainConfig, train;"
        "list(train(build(TrainConfig, json.loads(sys.argv[1])), Path(sys.argv[2]), resume='latest'))"
    )
    out = tmp_path / "killed"
    for at_least in (9, 45):
        with subprocess.Popen([sys.executable, "-c", code, json.dumps(flatten(config)), str(out)]) as process:
            while process.poll() is None:
                if any(int(path.name[5:]) >= at_least for path in checkpoint_folders(out / "checkpoints")):
                    process.kill()
                    process.wait()
                time.sleep(0.002)
        assert process.returncode == -signal.SIGKILL
        assert max(int(path.name[5:]) for path in checkpoint_folders(out / "checkpoints")) < 120
    list(train(config, out, resume="latest"))
    list(train(config, tmp_path / "straight"))
    assert rows(out) == rows(tmp_path / "straight")
    assert_equal_weights(weights(out, 120), weights(tmp_path / "straight", 120))
    assert_equal_states(optimizer_states(out, 120), optimizer_states(tmp_path / "straight", 120))


def test_a_run_closed_at_any_evaluation_and_resumed_ends_as_an_undisturbed_one(
    awkward: TrainConfig, dataset: Dataset, tmp_path: Path
) -> None:
    straight = run(awkward, tmp_path / "straight", dataset)
    for count in range(1, 5):
        loop = train(awkward, tmp_path / str(count), dataset=dataset)
        for _ in range(count):
            next(loop)
        loop.close()
        resumed = run(awkward, tmp_path / str(count), dataset, resume="latest")
        assert untimed(resumed.metrics) == untimed(straight.metrics)
        assert rows(tmp_path / str(count)) == rows(tmp_path / "straight")


def test_resuming_a_finished_run_returns_its_result(awkward: TrainConfig, dataset: Dataset, tmp_path: Path) -> None:
    first = run(awkward, tmp_path, dataset)
    before = (tmp_path / "metrics.jsonl").read_text()
    seen, second = watch(awkward, tmp_path, dataset, resume="latest")
    assert seen == [] and (tmp_path / "metrics.jsonl").read_text() == before
    assert {**second.metrics, "peak_memory_bytes": 0} == {**first.metrics, "peak_memory_bytes": 0}


def test_resuming_skips_a_damaged_checkpoint(awkward: TrainConfig, dataset: Dataset, tmp_path: Path) -> None:
    straight = run(awkward, tmp_path, dataset)
    (tmp_path / "checkpoints" / "step_0000008" / "state.pt").write_bytes(b"")
    resumed = run(awkward, tmp_path, dataset, resume="latest")
    assert untimed(resumed.metrics) == untimed(straight.metrics)


def test_resuming_without_checkpoints_starts_at_step_0(tiny: TrainConfig, dataset: Dataset, tmp_path: Path) -> None:
    seen, _ = watch(tiny, tmp_path, dataset, resume="latest")
    assert seen[0]["step"] == 0


def test_a_new_run_does_not_overwrite_an_earlier_one(tiny: TrainConfig, dataset: Dataset, tmp_path: Path) -> None:
    run(tiny, tmp_path, dataset)
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match="holds checkpoints of an earlier run: resume it, or choose another folder"):
        run(tiny, tmp_path, dataset)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_checkpoint_of_another_config_is_refused(tiny: TrainConfig, dataset: Dataset, tmp_path: Path) -> None:
    run(tiny, tmp_path, dataset)
    with pytest.raises(ConfigError, match=r"was made with optim\.lr = 0\.01, this run has 0\.02"):
        run(override(tiny, {"lr": 0.02}), tmp_path, dataset, resume="latest")
    with pytest.raises(ConfigError, match="resume must be 'latest' or 'extend', got 'best'"):
        run(tiny, tmp_path, dataset, resume="best")


def test_the_corpus_may_move_but_not_change(tiny: TrainConfig, corpus: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.txt"
    copy.write_bytes(corpus.read_bytes())
    list(train(tiny, tmp_path / "out"))
    moved = override(tiny, {"data.corpus": str(copy)})
    assert list(train(moved, tmp_path / "out", resume="latest")) == []
    copy.write_text(corpus.read_text()[:-1])
    with pytest.raises(ConfigError, match=r"was made with data\.fingerprint"):
        list(train(moved, tmp_path / "out", resume="latest"))


def test_a_checkpoint_has_the_validation_loss_of_its_own_weights(
    tiny: TrainConfig, dataset: Dataset, tmp_path: Path
) -> None:
    often = {"checkpoint.every": 1, "checkpoint.keep_last": 9}
    seen, _ = watch(override(tiny, often), tmp_path, dataset)
    saved = {}
    for path in (tmp_path / "checkpoints").iterdir():
        manifest = json.loads((path / "MANIFEST.json").read_text())
        saved[manifest["step"]] = manifest["val_loss"]
    assert {step: loss for step, loss in saved.items() if loss is not None} == {
        row["step"]: row["val_loss"] for row in seen if row["step"]
    }
    assert sorted(saved) == list(range(1, 9))


def test_the_clock_leaves_out_warmup_and_discarded_steps() -> None:
    state = TrainState()
    clock = Clock(state, torch.device("cpu"), warmup=2)
    for tokens in (1, 10, 100):
        with clock.step(tokens):
            pass
    with clock.step(1000):
        clock.discard_step()
    with clock.step(10_000):
        pass
    assert state.timed_tokens == 10_100 and state.timed_seconds > 0


def test_seconds_go_on_where_the_checkpoint_of_an_earlier_attempt_ended(
    tiny: TrainConfig, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look at this clock takes a second; the day between the attempts does not count."""
    ticks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: float(next(ticks)))
    monkeypatch.setattr(ngpt.training.run, "time", clock)
    config = override(tiny, {"tracker.log_every": 1, "eval_every": 4, "checkpoint.every": 4, "steps": 8})
    with contextlib.closing(train(config, tmp_path, resume="latest", dataset=dataset)) as killed:
        assert [next(killed)["step"] for _ in range(3)] == [0, 4, 8]  # step 8 is not saved
    before = [row for row in read_metrics(tmp_path / "metrics.jsonl") if row["step"] <= 4]
    for _ in range(86_400):
        next(ticks)
    for _ in train(config, tmp_path, resume="latest", dataset=dataset):
        pass
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[: len(before)] == before
    for name in ("seconds", "train_seconds"):
        times = [row[name] for row in rows]
        assert times == sorted(times) and times[-1] < 500
        assert times[len(before)] > before[-1][name]
    assert [row["flops"] for row in rows] == [row["tokens"] * flops_per_token(resolved(config).model) for row in rows]


class DeviceQueue:
    """A GPU whose kernels take seconds of a clock that stands still unless somebody waits for them."""

    def __init__(self) -> None:
        self.now = self.busy_until = 0.0

    def launch(self, seconds: float) -> None:
        self.busy_until = max(self.busy_until, self.now) + seconds

    def wait(self, *_: object) -> None:
        self.now = max(self.now, self.busy_until)


@pytest.mark.parametrize("together", [1, 2])
def test_throughput_includes_the_kernels_that_are_still_queued(
    tiny: TrainConfig, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    """A step waits for its gradients, 4 s, but not for its update, 2 s. An evaluation takes 100 s."""
    queue = DeviceQueue()

    def gradients(*arguments: Any) -> Any:
        queue.launch(4)
        queue.wait()
        return [(1.0, 1.0)] * together if together > 1 else (1.0, 1.0)

    def evaluate(run: Any, *, last: bool) -> Any:
        queue.launch(100)
        queue.wait()
        return real_evaluation(run, last=last)

    real_evaluation = ngpt.training.loop.evaluate_run
    monkeypatch.setattr(ngpt.training.loop, "evaluate_run", evaluate)
    for module in (ngpt.training.loop, ngpt.ensemble.train):
        monkeypatch.setattr(module, "update", lambda runs: queue.launch(2))
    monkeypatch.setattr(ngpt.training.loop, "gradients", gradients)
    monkeypatch.setattr(ngpt.ensemble.train, "_gradients", gradients)
    monkeypatch.setattr(ngpt.training.run, "time", SimpleNamespace(perf_counter=lambda: queue.now))
    monkeypatch.setattr(ngpt.training.run, "synchronize", queue.wait)
    config = override(tiny, {"tracker.log_every": 2, "eval_every": 3, "checkpoint.every": 5})
    folders = [tmp_path / str(i) for i in range(together)]
    if together == 1:
        results = [run(config, folders[0], dataset)]
    else:
        configs = [override(config, {"seed": seed}) for seed in range(together)]
        events = [event for update in train_together(configs, folders, dataset=dataset) for event in update.values()]
        results = [event for event in events if isinstance(event, RunResult)]
    assert [result.metrics["tokens_per_second"] for result in results] == [4 * 16 / 6] * together
    for folder in folders:
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        assert {line["tokens_per_second"] for line in lines} == {None, 4 * 16 / 6}

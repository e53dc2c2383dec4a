"""One run from start to end: errors appear before a trial starts, and the lock is released."""

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from ngpt.config.base import ConfigError
from ngpt.data.dataset import Dataset
from tests.helpers.tiny_campaign import write_file
from tests.helpers.wandb_file import python
from tune.campaign import load_campaign
from tune.executors.signals import StoppedEarly
from tune.launch import check_training, in_background, launch
from tune.report.wording import settings_advice
from tune.results.snapshot import Snapshot
from tune.session.datasets import check_bytes
from tune.storage.journal import read_journal

TINY = """
campaign: tiny
seeds: [1, 2]
base:
  model: {{n_layer: 1, n_head: 2, n_embd: 16, block_size: 16}}
  data: {{corpus: {corpus}, tokenizer: "sentencepiece:400"}}
  batch_size: 2
  steps: 2
  eval_tokens: 64
vary: {{alpha: [0.05, 0.2]}}
"""


@contextlib.contextmanager
def recorder(lines: list[str]) -> Iterator[Callable[[str], None]]:
    yield lines.append


def test_an_inline_run_trains_everything_and_reports_it_line_by_line(corpus: Path, tmp_path: Path) -> None:
    path, lines = tmp_path / "tiny.yaml", []
    path.write_text(TINY.format(corpus=corpus))

    def view(snapshot: Callable[[], Snapshot]) -> contextlib.AbstractContextManager[Callable[[str], None]]:
        assert snapshot().status == "running"
        return recorder(lines)

    summary, signal = launch(load_campaign(path), tmp_path / "out", command="again", inline=True, view=view)
    assert (summary.status, signal) == ("finished", 0)
    assert summary.trials.finished == 4
    assert summary.command == "again"
    assert sum("val_loss" in line and line.startswith("[") for line in lines) == 4


@pytest.mark.parametrize("reason", ["compile is on", None])
def test_a_run_reports_why_vectorise_has_no_effect(
    reason: str | None,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(corpus=corpus) + "resources: {vectorise: 2}\n")
    campaign = load_campaign(path, ["compile=true"] if reason else [])
    monkeypatch.setattr("tune.launch.run_inline", lambda session, **_: None)  # what comes before it is asked
    launch(campaign, tmp_path / "out", command="again", inline=True, view=lambda snapshot: recorder([]))
    said = capsys.readouterr().err
    assert ("vectorise: 2 has no effect, trials are trained one at a time: compile is on" in said) == bool(reason)


def test_a_run_says_that_a_dtype_is_only_emulated(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(corpus=corpus).replace("alpha: [0.05, 0.2]", "dtype: [bfloat16]"))
    monkeypatch.setattr("ngpt.system.timing.bfloat16_slowdown", lambda: 39.6)
    monkeypatch.setattr("tune.launch.run_inline", lambda session, **_: None)
    launch(load_campaign(path), tmp_path / "out", command="again", inline=True, view=lambda snapshot: recorder([]))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "bfloat16" in line]
    assert line == "bfloat16 is emulated on this CPU: 40 x slower than float32; set dtype: float32"


def test_a_likely_mistake_is_said_once_at_the_start_and_in_the_report(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(corpus=corpus).replace("vary: {", "vary: {schedule.warmup_steps: [7], "))
    for has_work in (True, False):
        summary, _ = launch(load_campaign(path), tmp_path / "out", command="", inline=True)
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
        assert sum("the warm-up of 7 steps" in line for line in said) == has_work
        assert sum("an evaluation scores 64 tokens" in line for line in said) == has_work
    warmup, few = sorted(settings_advice(summary), reverse=True)
    assert warmup.startswith("The warm-up of 7 steps is not shorter than the run of 2") and few.startswith("An evaluat")
    assert (tmp_path / "out" / "report.md").read_text().count("The warm-up of 7 steps") == 1


def test_a_corpus_that_cannot_be_prepared_is_an_error_before_any_trial(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(corpus=corpus))

    def fail(*_: object) -> None:
        raise ConfigError("no such text")

    monkeypatch.setattr("tune.launch.prepare_all", fail)
    with pytest.raises(ConfigError, match="no such text"):
        launch(load_campaign(path), tmp_path / "out", command="", inline=True)
    assert read_journal(tmp_path / "out" / "journal.jsonl") == []
    monkeypatch.undo()
    summary, _ = launch(load_campaign(path), tmp_path / "out", command="", inline=True)  # the lock is free again
    assert summary.status == "finished"


def test_arms_are_compared_by_bits_per_byte_only_where_bytes_can_be_counted(tmp_path: Path, dataset: Dataset) -> None:
    (tokens := tmp_path / "tokens").mkdir()
    for name in ("train", "val"):
        np.concatenate(dataset.val).astype("<u2").tofile(tokens / f"{name}.bin")
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(corpus=tokens) + "metric: {name: val_bpb}\n")
    with pytest.raises(
        ConfigError, match=r"metric\.name: val_bpb needs the bytes of each token, which the corpus .*tok"
    ):
        launch(load_campaign(path), tmp_path / "out", command="", inline=True)
    assert not (tmp_path / "out" / "trials").exists()
    check_bytes(load_campaign(path, [f"data.tokenizer={dataset.folder / 'tokenizer.model'}"]))


def test_a_campaign_that_compiles_needs_a_compiler_before_any_trial(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(device: object) -> None:
        raise ConfigError("compile: true needs a C++ compiler")

    monkeypatch.setattr("tune.launch.check_compiler", none)
    plain = load_campaign(write_file(tmp_path, corpus))
    compiled = load_campaign(write_file(tmp_path, corpus), ["compile=true"])
    check_training(plain, is_here=True)
    check_training(compiled, is_here=False)  # a cluster's nodes may have one
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler"):
        check_training(compiled, is_here=True)


def test_a_stop_before_the_first_trial_ends_the_wait_and_leaves_no_lock(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, stop, prepared = tmp_path / "tiny.yaml", threading.Event(), threading.Event()
    path.write_text(TINY.format(corpus=corpus))

    def prepare(*_: object) -> None:
        stop.set()
        prepared.wait(60)

    monkeypatch.setattr("tune.launch.prepare_all", prepare)
    with pytest.raises(StoppedEarly, match="run the same command again"):
        launch(load_campaign(path), tmp_path / "out", command="", inline=True, stop=stop)
    prepared.set()
    assert read_journal(tmp_path / "out" / "journal.jsonl") == []
    assert not (tmp_path / "out" / "campaign.pid").exists()


def test_a_background_call_returns_its_result_or_raises_its_error() -> None:
    assert in_background(lambda: 42).result() == 42
    with pytest.raises(ZeroDivisionError):
        in_background(lambda: 1 // 0).result()


def test_a_campaign_with_nothing_left_to_train_does_not_start_ray(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(corpus=corpus))
    first, _ = launch(load_campaign(path), tmp_path / "out", command="", inline=True)
    monkeypatch.setattr("tune.launch.RaySupervisor", None)  # to start it would now fail
    again, _ = launch(load_campaign(path), tmp_path / "out", command="")
    assert [arm.val_loss for arm in again.phases[0].arms] == [arm.val_loss for arm in first.phases[0].arms]
    path.write_text(TINY.format(corpus=corpus).replace("0.2]", "0.2, 0.3]"))
    with pytest.raises(TypeError):
        launch(load_campaign(path), tmp_path / "out", command="")


TRACKED = """
import contextlib, json, os
from pathlib import Path
from ngpt.config.base import ConfigError
from tune.campaign import load_campaign
from tune.storage.journal import read_journal
from tune.launch import launch
quiet = lambda snapshot: contextlib.nullcontext(lambda text: None)
for mode in ("online", "auto", "auto"):
    campaign = load_campaign(Path("tiny.yaml"), (f"tracker.wandb={mode}", "tracker.log_every=1"))
    try:
        launch(campaign, Path("out"), command="", inline=True, view=quiet)
    except ConfigError as error:
        print(error)
    journal = read_journal(Path("out", "journal.jsonl"))
    ends = [event for event in journal if event["event"] == "trial_finished"]
    print(json.dumps([[event["status"], event["config"]["tracker.wandb"]] for event in ends]))
"""


@pytest.mark.slow
def test_weights_and_biases_is_probed_once_per_campaign(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY.format(corpus=corpus).replace("seeds: [1, 2]", "seeds: [1]"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    key = {"WANDB_API_KEY": "0123456789abcdef" * 3, "WANDB_BASE_URL": url}
    done = python(TRACKED, tmp_path, NGPT_CACHE=str(tmp_path / "cache"), **key)
    refusal, before, first, second = done.stdout.splitlines()
    assert refusal.startswith("tracker.wandb is online, but 127.0.0.1 cannot be reached")
    assert json.loads(before) == []
    assert json.loads(first) == json.loads(second) == [["finished", "offline"]] * 2
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("W&B")]  # and not again for nothing to do
    assert said.startswith("W&B: offline, since 127.0.0.1 cannot be reached")
    assert said.endswith("upload later with: wandb sync out/trials/*/wandb/offline-run-*")
    assert len(list(tmp_path.glob("out/trials/*/wandb/offline-run-*/run-*.wandb"))) == 2

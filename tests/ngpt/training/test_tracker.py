"""Metrics are whole rows of strict JSON, and continuous however often a run was interrupted."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ngpt.config.base import ConfigError, build, content_hash, is_identity, settings
from ngpt.system.atomic_files import LineFile
from ngpt.trackers.base import HISTOGRAM_BINS, histogram
from ngpt.trackers.config import TrackerConfig
from ngpt.training.tracker import Tracker, finite_or_none, read_metrics, read_rows
from tests.helpers.wandb_file import named, python, records

PLAIN = TrackerConfig()


def rows(path: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def track(folder: Path, *steps: int, keep_until: int | None = None, **extra: Any) -> list[dict[str, Any]]:
    with Tracker(PLAIN, folder, settings={}, keep_until=keep_until) as tracker:
        for step in steps:
            tracker.log({"step": step, **extra})
    return rows(folder / "metrics.jsonl")


def test_a_row_is_a_line_of_strict_json_with_null_for_nan(tmp_path: Path) -> None:
    values = {"a": 0.1, "b": float("nan"), "c": float("inf"), "d": -float("inf"), "e": None, "f": 3}
    expected = {"step": 5, "a": 0.1, "b": None, "c": None, "d": None, "e": None, "f": 3}
    assert track(tmp_path / "new" / "folder", 5, **values) == [expected]


def test_a_float_survives_to_the_last_bit(tmp_path: Path) -> None:
    ((row,),) = [track(tmp_path, 1, loss=0.1 + 0.2)]
    assert row["loss"] == 0.1 + 0.2
    assert track(tmp_path, keep_until=1) == [row]


def test_a_reader_sees_each_row_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    with Tracker(PLAIN, tmp_path, settings={}) as tracker:
        for step in range(3):
            tracker.log({"step": step})
            assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == list(range(step + 1))


def test_a_new_run_starts_with_an_empty_file(tmp_path: Path) -> None:
    track(tmp_path, 1, 2, 3)
    assert track(tmp_path, 1) == [{"step": 1}]


def test_a_resumed_run_drops_the_rows_after_its_checkpoint(tmp_path: Path) -> None:
    track(tmp_path, 1, 2, 2, 3, 4, attempt=1)
    resumed = track(tmp_path, 3, keep_until=2, attempt=2)
    assert [(row["step"], row["attempt"]) for row in resumed] == [(1, 1), (2, 1), (2, 1), (3, 2)]


def test_a_half_written_last_line_is_ignored(tmp_path: Path) -> None:
    track(tmp_path, 1, 2)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    for torn in (b'{"step": 3, "loss"', b"{", b'{"step": 3}', b"\x00\x00", b"\x00\x00\n", b'\x00\x00": 3}\n'):
        path.write_bytes(whole + torn)
        assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    assert track(tmp_path, 3, keep_until=2) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_a_crash_while_resuming_loses_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    track(tmp_path, 1, 2, 3)

    def crash(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", crash)
        with pytest.raises(OSError, match="No space left"):
            track(tmp_path, keep_until=2)
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_rows_that_a_full_disk_refuses_are_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with Tracker(PLAIN, tmp_path, settings={}) as tracker:
        tracker.log({"step": 0})
        with monkeypatch.context() as patch:
            patch.setattr(LineFile, "append", refuse)
            for step in (1, 2, 3):
                tracker.log({"step": step})
                tracker.log_histograms(step, {"alpha": np.ones(2)})
            with pytest.raises(OSError, match="No space"):  # so no checkpoint is saved before its rows
                tracker.sync()
        assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [0]
        tracker.log({"step": 4})
        assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in rows(tmp_path / "histograms.jsonl")] == [1, 2, 3]
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"], "one for each file"
    assert "metrics.jsonl: No space left on device; its rows wait in memory" in caplog.text


def test_the_last_sync_is_retried_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, calls = LineFile.sync, []

    def sync(file: LineFile) -> None:
        calls.append(file)
        if len(calls) == 1:
            raise OSError(5, "Input/output error")
        real(file)

    monkeypatch.setattr(LineFile, "sync", sync)
    assert track(tmp_path, 1) == [{"step": 1}]
    assert len(calls) == 2 and "Input/output error" in caplog.text


def test_rows_that_never_reach_the_disk_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LineFile, "append", refuse)
    with pytest.raises(OSError, match="No space left"):
        track(tmp_path, 1)


@pytest.mark.parametrize(
    "rest", [b"\0" * 40 + b"\n", b'{"step": \0\0\n', b'\0"step": 4}\n{"step": 5}\n', b"[3]\n", b"\xff\n"]
)
def test_a_run_resumes_after_any_damage_a_power_loss_leaves(tmp_path: Path, rest: bytes) -> None:
    track(tmp_path, 1, 2, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + rest)
    assert track(tmp_path, 3, keep_until=2) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_a_missing_file_has_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("value", [0, 1.5, None, "text", True])
def test_values_that_json_can_hold_are_unchanged(value: object) -> None:
    assert finite_or_none(value) is value


def test_tracker_settings_are_not_part_of_the_identity() -> None:
    assert not any(is_identity(TrackerConfig, name) for name in settings(TrackerConfig))
    assert content_hash(TrackerConfig(wandb="offline", log_every=3)) == content_hash(PLAIN)


def test_an_unknown_wandb_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown wandb mode 'ofline', did you mean 'offline'"):
        build(TrackerConfig, {"wandb": "ofline"})


# ---- histograms ----------------------------------------------------------------------------------------------------


@given(arrays(np.float64, st.integers(0, 60), elements=st.floats(width=64)))
@example(np.array([0.05, 0.05]))
@example(np.array([0.0]))
@example(np.array([5e-324, -5e-324, 1e308]))
@example(np.array([3.4028234663852886e38, -3.4028234663852886e38, 3.5e38]))
def test_a_histogram_counts_every_finite_value_once(values: np.ndarray) -> None:
    found = histogram(values)
    kept = [value for value in values.tolist() if abs(value) <= float(np.finfo(np.float32).max)]  # false for NaN
    assert found.not_finite == len(values) - len(kept)
    assert sum(found.counts) == len(kept)
    if kept:
        assert len(found.edges) == len(found.counts) + 1 == HISTOGRAM_BINS + 1
        assert found.edges[0] <= min(kept) and max(kept) <= found.edges[-1]
        assert all(low < high for low, high in zip(found.edges, found.edges[1:], strict=False))
        # A value on an edge belongs to the bin above it; the last bin includes both edges.
        for low, high, count in zip(found.edges[:-1], found.edges[1:-1], found.counts[:-1], strict=False):
            assert count == sum(low <= value < high for value in kept)
    else:
        assert (found.edges, found.counts) == ([], [])


def test_a_histogram_spans_the_values() -> None:
    found = histogram(np.linspace(-1.0, 3.0, 32 * 5, dtype=np.float32))
    assert (found.edges[0], found.edges[-1]) == (-1.0, 3.0)
    assert min(found.counts) >= 4


def test_equal_values_fall_into_one_bin() -> None:
    found = histogram([0.05, 0.05, float("nan")])
    assert [count for count in found.counts if count] == [2]
    assert found.edges[0] == pytest.approx(0.05, rel=1e-3)
    assert found.edges[-1] == pytest.approx(0.05, rel=1e-3)
    assert found.not_finite == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_histogram_accepts_tensors(dtype: torch.dtype) -> None:
    values = torch.tensor([[0.25, 0.5, float("nan")], [1.0, 2.0, 3.0]], dtype=dtype, requires_grad=True)
    assert histogram(values) == histogram([0.25, 0.5, float("nan"), 1.0, 2.0, 3.0])


def test_histograms_have_their_own_file_and_are_dropped_like_rows(tmp_path: Path) -> None:
    path = tmp_path / "histograms.jsonl"
    with Tracker(PLAIN, tmp_path, settings={}) as tracker:
        tracker.log_histograms(0, {})
        assert not path.exists()  # without histograms there is no file
        for step in (2, 4, 6):
            tracker.log_histograms(step, {"alpha/attention.0": [0.0, 1.0], "r/mlp.0": [float("inf"), 1.0 + step]})
    first = rows(path)
    assert [(row["step"], row["name"]) for row in first] == [
        (step, name) for step in (2, 4, 6) for name in ("alpha/attention.0", "r/mlp.0")
    ]
    assert first[0] == {
        "step": 2,
        "name": "alpha/attention.0",
        "edges": np.linspace(0, 1, HISTOGRAM_BINS + 1).tolist(),
        "counts": [1] + [0] * (HISTOGRAM_BINS - 2) + [1],
        "not_finite": 0,
    }
    assert [row["not_finite"] for row in first] == [0, 1] * 3
    path.write_bytes(path.read_bytes() + b'{"step": 8, "na')
    with Tracker(PLAIN, tmp_path, settings={}, keep_until=4) as tracker:
        tracker.log_histograms(6, {"r/mlp.0": []})
    last = {"step": 6, "name": "r/mlp.0", "edges": [], "counts": [], "not_finite": 0}
    assert rows(path) == read_metrics(path) == [*first[:4], last]
    track(tmp_path, 1)  # a new run drops them
    assert rows(path) == []


def test_damaged_lines_are_counted_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    damaged = ("{", "[1]", "3", '{"step": "3"}', '{"step": true}', '{"step": -1}', '{"loss": 1}', "[" * 100_000, "\xff")
    text = "".join(f"{line}\n" for line in ('{"step": 1, "val_loss": NaN}', *damaged, '{"step": 2}', "\0\0"))
    path.write_bytes(text.encode("latin-1") + b'{"step": 3')
    assert read_rows(path) == ([{"step": 1, "val_loss": None}, {"step": 2}], len(damaged))
    assert read_metrics(path) == read_rows(path)[0]


# ---- Weights & Biases ----------------------------------------------------------------------------------------------

USE = """
import json, os, sys
from pathlib import Path
from ngpt.trackers.config import TrackerConfig
from ngpt.training.tracker import Tracker
cfg = TrackerConfig(**json.loads(os.environ["TRACKER"]), project="spheres", group="campaign", job_type="alpha")
for folder, keep_until in (Path("a", "0123456789"), None), (Path("b", "0123456789"), 1):
    if keep_until:
        folder.parent.mkdir()
        Path("a", "0123456789").rename(folder)
    with Tracker(cfg, folder.absolute(), settings={"optim.lr": 0.125}, keep_until=keep_until) as tracker:
        tracker.log({"step": (keep_until or 0) + 1, "val_loss": 4.5, "lr/matrices": 0.25})
        tracker.log({"step": 9, "val_loss": float("nan"), "grad_norm": 1.5})
        tracker.log_histograms(9, {"alpha/attention.0": [0.0, 1.0, float("nan")], "r/mlp.0": []})
        tracker.note({"skipped_shards": ["train_000003.bin"], "data_sha256": "abc", "spread": float("inf")})
print(*[name for name in ("numpy", "wandb", "tensorboard", "mlflow", "trackio", "torch") if name in sys.modules])
"""
RUN = Path("b", "0123456789")


def test_plain_tracking_imports_neither_wandb_nor_tensorboard(tmp_path: Path) -> None:
    done = python(USE, tmp_path, TRACKER="{}")
    assert (done.stdout.split(), done.stderr) == (["numpy"], "")  # for the histograms
    assert sorted(path.name for path in (tmp_path / RUN).iterdir()) == ["histograms.jsonl", "metrics.jsonl"]


@pytest.mark.slow
def test_an_offline_wandb_run_holds_what_was_logged_and_continues_in_another_folder(
    tmp_path: Path,
) -> None:
    key = "0123456789abcdef" * 3
    tracker = {"wandb": "offline", "run_name": "alpha=0.28 seed 1"}
    done = python(USE, tmp_path, TRACKER=json.dumps(tracker), WANDB_API_KEY=key)
    assert done.stderr == ""
    assert [row["step"] for row in rows(tmp_path / RUN / "metrics.jsonl")] == [1, 2, 9]
    attempts = [
        list(records(log))
        for log in sorted((tmp_path / RUN).glob("wandb/offline-run-*/run-*.wandb"), key=os.path.getmtime)
    ]
    runs = [record.run for attempt in attempts for record in attempt if record.HasField("run")]
    assert len(attempts) == len(runs) == 2
    for run in runs:
        shown = (run.project, run.run_group, run.job_type, run.display_name)
        assert shown == ("spheres", "campaign", "alpha", "alpha=0.28 seed 1")
        assert named(run.config.update)["optim.lr"] == 0.125
    assert runs[0].run_id == runs[1].run_id
    bins = {"_type": "histogram", "values": [1] + [0] * 30 + [1], "bins": np.linspace(0, 1, 33).tolist()}
    repeated = [
        {"step": 9, "grad_norm": 1.5},
        {"step": 9} | {f"alpha/attention.0.{name}": v for name, v in bins.items()},
    ]
    for attempt, step, again in zip(attempts, (1, 2), (repeated, []), strict=True):
        history = [named(record.history.item) for record in attempt if record.HasField("history")]
        ours = [{name: row[name] for name in row if not name.startswith("_")} for row in history]
        assert ours == [{"step": step, "val_loss": 4.5, "lr/matrices": 0.25}, *again]
        summary: dict[str, Any] = {}
        for record in attempt:
            summary |= named(record.summary.update) if record.HasField("summary") else {}
        assert summary["skipped_shards"] == ["train_000003.bin"]
        assert (summary["data_sha256"], summary["spread"]) == ("abc", None)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and key.encode() in path.read_bytes()]

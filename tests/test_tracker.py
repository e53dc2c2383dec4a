"""metrics.jsonl: strict JSON, whole rows, and one continuous story however often a run was interrupted."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ngpt.config import ConfigError, build, content_hash, is_identity, settings
from ngpt.tracker import Tracker, TrackerConfig, finite, read_metrics

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


def test_every_row_is_a_line_of_strict_json_and_what_is_not_finite_is_null(tmp_path: Path) -> None:
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


def test_a_fresh_run_starts_an_empty_file(tmp_path: Path) -> None:
    track(tmp_path, 1, 2, 3)
    assert track(tmp_path, 1) == [{"step": 1}]


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    track(tmp_path, 1, 2, 2, 3, 4, attempt=1)
    resumed = track(tmp_path, 3, keep_until=2, attempt=2)
    assert [(row["step"], row["attempt"]) for row in resumed] == [(1, 1), (2, 1), (2, 1), (3, 2)]


def test_a_line_that_a_killed_process_left_half_written_is_ignored(tmp_path: Path) -> None:
    track(tmp_path, 1, 2)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    for torn in (b'{"step": 3, "loss"', b"{", b'{"step": 3}', b"\x00\x00"):
        path.write_bytes(whole + torn)
        assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    assert track(tmp_path, 3, keep_until=2) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_a_crash_while_a_run_resumes_loses_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    track(tmp_path, 1, 2, 3)

    def crash(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", crash)
        with pytest.raises(OSError, match="No space left"):
            track(tmp_path, keep_until=2)
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_no_file_means_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("value", [0, 1.5, None, "text", True])
def test_what_json_can_say_is_left_as_it_is(value: object) -> None:
    assert finite(value) is value


def test_tracking_does_not_decide_what_is_computed() -> None:
    assert not any(is_identity(TrackerConfig, name) for name in settings(TrackerConfig))
    assert content_hash(TrackerConfig(wandb="offline", log_every=3)) == content_hash(PLAIN)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown wandb mode 'ofline', did you mean 'offline'"):
        build(TrackerConfig, {"wandb": "ofline"})


def python(code: str, folder: Path, **environment: str) -> str:
    """Runs `code` in a fresh interpreter that knows no home and no network."""
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ}
    root = str(Path(__file__).parents[1])
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [root, kept.get("PYTHONPATH")]))
    nowhere = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=folder,
        env=kept | nowhere | {"HOME": str(folder), "FOLDER": str(folder / "run")} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


USE = """
import os, sys
from pathlib import Path
from ngpt.tracker import Tracker, TrackerConfig
cfg = TrackerConfig(wandb=os.environ["MODE"], project="spheres", group="campaign", job_type="alpha")
with Tracker(cfg, Path(os.environ["FOLDER"]), settings={"optim.lr": 0.125}) as tracker:
    tracker.log({"step": 1, "val_loss": 4.5})
    tracker.log({"step": 2, "val_loss": float("nan")})
print("wandb" in sys.modules)
"""


def test_without_weights_and_biases_it_is_not_even_imported(tmp_path: Path) -> None:
    assert python(USE, tmp_path, MODE="disabled").split() == ["False"]
    assert rows(tmp_path / "run" / "metrics.jsonl") == [{"step": 1, "val_loss": 4.5}, {"step": 2, "val_loss": None}]


def test_an_offline_run_of_weights_and_biases_holds_settings_and_numbers(tmp_path: Path) -> None:
    assert python(USE, tmp_path, MODE="offline").split()[-1] == "True"
    assert len(rows(tmp_path / "run" / "metrics.jsonl")) == 2
    (log,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    content = log.read_bytes()
    for word in (b"optim.lr", b"0.125", b"val_loss", b"4.5", b"spheres", b"campaign", b"alpha"):
        assert word in content, word

"""trackio has each trial as one run in its local database, read back with trackio's own interface."""

import json
from pathlib import Path

import pytest

from ngpt.trackers.trackio_run import resolve_mode
from tests.helpers.wandb_file import python

USE = """
import json, sys
from pathlib import Path
from ngpt.trackers.config import TrackerConfig
from ngpt.training.tracker import Tracker
names = {"group": "tiny", "job_type": "alpha", "run_name": "alpha=0.2 seed 7", "varied": "model.alpha"}
settings = {"seed": 7, "model.alpha": 0.2, "steps": 9}
cfg = TrackerConfig(trackio="local", **names)
folder = Path("trials", "0123")
for keep_until, steps in ((None, (1, 2, 3)), (1, (2, 3, 4))):
    with Tracker(cfg, folder, settings=settings, keep_until=keep_until) as tracker:
        for step in steps:
            tracker.log({"step": step, "train_loss": 5.0 + step, "lr": None})
            tracker.log_histograms(step, {"r/mlp.0": [1.0, 2.0]})
        if keep_until:
            tracker.end("finished", {"val_loss": 4.5, "steps": 4, "n_params": None})
print("done")
"""

READ = """
import json
from trackio.sqlite_storage import SQLiteStorage
(run,) = SQLiteStorage.get_run_records("tiny")
print(json.dumps({"name": run["name"], "logs": SQLiteStorage.get_logs("tiny", run["name"], run_id=run["id"]),
                  "config": SQLiteStorage.get_run_config("tiny", run["name"], run_id=run["id"])}))
"""


@pytest.mark.slow
def test_a_resumed_trial_is_one_run_without_double_points(tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="needs pip install 'ngpt-campaign[trackio]'")
    folder = {"TRACKIO_DIR": str(tmp_path / "db")}
    done = python(USE, tmp_path, **folder)
    assert (done.stdout, done.stderr) == ("done\n", "")
    read = json.loads(python(READ, tmp_path, **folder).stdout.splitlines()[-1])
    assert read["name"] == "alpha/alpha=0.2/seed 7"
    rows = [(log["step"], log["train_loss"]) for log in read["logs"] if "train_loss" in log]
    assert rows == [(1, 6.0), (2, 7.0), (3, 8.0), (4, 9.0)]
    assert [log["step"] for log in read["logs"] if "r/mlp.0" in log] == [1, 2, 3, 4]
    assert [log["final/val_loss"] for log in read["logs"] if "final/val_loss" in log] == [4.5]
    assert {name: value for name, value in read["config"].items() if name[0] != "_"} == {"model.alpha": 0.2}


def test_without_a_server_trackio_is_local_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRACKIO_SERVER_URL", "TRACKIO_SPACE_ID"):
        monkeypatch.delenv(name, raising=False)
    said: list[str] = []
    assert (resolve_mode("auto", said.append), len(said)) == ("local", 1)
    monkeypatch.setenv("TRACKIO_SERVER_URL", "http://127.0.0.1:9/?write_token=0123456789abcdef")
    assert resolve_mode("auto", said.append) == "local"
    assert said[1].startswith("trackio: local, since 127.0.0.1 cannot be reached") and "0123456789abcdef" not in said[1]

"""TensorBoard shows runs by phase, arm and seed, with their hyper-parameters and without repeated steps."""

import json
from pathlib import Path
from typing import Any

import pytest

from ngpt.trackers.config import TrackerConfig
from ngpt.trackers.tensorboard_run import MAX_NAME, folder_name
from ngpt.training.tracker import Tracker
from tune.remote.parts import PartReader, write_parts

tensorboard = pytest.importorskip("tensorboard", reason="needs pip install 'ngpt-campaign[tensorboard]'")
NAMES = {"group": "tiny", "job_type": "alpha", "run_name": "alpha=0.2 seed 7"}
CAMPAIGN: dict[str, Any] = NAMES | {"varied": "model.alpha optim.name"}
SETTINGS = {"seed": 7, "model.alpha": 0.2, "optim.name": "muon", "compile": True, "steps": 9}


def accumulated(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    return events


def test_an_interrupted_run_has_no_repeated_steps(tmp_path: Path) -> None:
    cfg = TrackerConfig(tensorboard=True)
    for keep_until, steps in ((None, (1, 2, 3, 4)), (2, (3,))):
        with Tracker(cfg, tmp_path, settings={}, keep_until=keep_until) as tracker:
            for step in steps:
                tracker.log({"step": step, "loss": step + (keep_until or 0) / 8, "lr": None, "lr/matrices": 0.25})
                tracker.log_histograms(step, {"r/mlp.0": [1.0, 2.0, 2.0, float("nan")], "empty": []})
            tracker.note({"skipped_shards": ["train_000003.bin"]})
    events = accumulated(tmp_path / "tensorboard")
    tags = events.Tags()
    assert (tags["scalars"], tags["histograms"]) == (["loss", "lr/matrices"], ["r/mlp.0"])
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1), (2, 2), (3, 3.25)]
    shown = events.Histograms("r/mlp.0")
    assert [event.step for event in shown] == [1, 2, 3]
    value = shown[0].histogram_value
    assert (value.min, value.max, value.num, value.sum, value.sum_squares) == (1, 2, 3, 5, 9)
    assert dict(zip(value.bucket_limit, value.bucket, strict=True))[2.0] == 2
    note = events.Tensors("skipped_shards/text_summary")[-1]
    assert json.loads(note.tensor_proto.string_val[0]) == ["train_000003.bin"]


def test_a_campaign_has_runs_by_phase_arm_and_seed_with_hyper_parameters(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
    from tensorboard.plugins.hparams import metadata

    cfg = TrackerConfig(tensorboard=True, **CAMPAIGN)
    with Tracker(cfg, tmp_path / "trials" / "0123", settings=SETTINGS) as tracker:
        tracker.log({"step": 9, "val_loss": 4.5})
        tracker.end("finished", {"val_loss": 4.5, "steps": 9})
    runs = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "tensorboard"))
    runs.Reload()
    (name,) = runs.Runs()
    assert name == "alpha/alpha=0.2/seed 7"
    content = runs.SummaryMetadata(name, "_hparams_/session_start_info").plugin_data.content
    started = metadata.parse_session_start_info_plugin_data(content)
    shown = {key: value.number_value or value.string_value for key, value in started.hparams.items()}
    assert shown == {"model.alpha": 0.2, "optim.name": "muon"}
    content = runs.SummaryMetadata(name, "_hparams_/experiment").plugin_data.content
    experiment = metadata.parse_experiment_plugin_data(content)
    assert [info.name.tag for info in experiment.metric_infos] == ["val_loss", "train_loss"]
    content = runs.SummaryMetadata(name, "_hparams_/session_end_info").plugin_data.content
    assert metadata.parse_session_end_info_plugin_data(content).status == 1  # api_pb2.STATUS_SUCCESS


def test_events_of_a_trial_that_trains_elsewhere_come_with_its_other_files(tmp_path: Path) -> None:
    cfg, scratch, here = (
        TrackerConfig(tensorboard=True, **CAMPAIGN),
        tmp_path / "trials/0123/.worker",
        tmp_path / "here",
    )
    with Tracker(cfg, scratch, settings=SETTINGS) as tracker:
        tracker.log({"step": 9, "val_loss": 4.5})
    write_parts(here, PartReader(scratch).read(everything=True))
    events = accumulated(here / "tensorboard/alpha/alpha=0.2/seed 7")
    assert [(event.step, event.value) for event in events.Scalars("val_loss")] == [(9, 4.5)]


@pytest.mark.parametrize("name", ["../..", "a/b", "x" * 500, "", ".", "data.corpus=/tmp/x", "a\nb", "ж" * 300])
def test_every_arm_has_a_folder_of_its_own(name: str) -> None:
    folder = folder_name(name)
    assert folder not in (".", "..", "") and not {"/", "\n", "\0"} & set(folder)
    assert len(folder.encode()) < 255 or len(folder) <= MAX_NAME + 7
    assert folder_name(f"{name}/") != folder
    assert folder_name("alpha=0.2, project_every=10") == "alpha=0.2, project_every=10"

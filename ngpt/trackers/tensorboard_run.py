"""TensorBoard: event files of a run, with its hyper-parameters.

In a campaign they go to `tensorboard/PHASE/ARM/seed N` in the results directory, so that TensorBoard names the runs so.
A trial that trains in a folder which the results do not share has `tensorboard/` in that folder, and takes it along.
"""

import hashlib
import importlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ngpt.trackers.base import Ending, Histogram, TrackedRun, Writer

UNSAFE = re.compile(r"[^\w.,=+ ()\[\]{}-]")
TRIALS = "trials"  # the folder of the results directory that holds those of the trials
MAX_NAME = 120  # characters of a folder
HPARAM_METRICS = ("val_loss", "train_loss")  # shown beside the hyper-parameters
MAX_TEXT = 200  # characters of a hyper-parameter


def event_folder(run: TrackedRun) -> Path:
    """Where the events of a run go: its own folder, or in a campaign the one that all of its runs share."""
    if not run.group:
        return run.folder / "tensorboard"
    shared = run.folder.parents[1] if run.folder.parent.name == TRIALS else run.folder
    return Path(shared, "tensorboard", *map(folder_name, run.path))


def folder_name(name: str) -> str:
    """A name as a folder. One that is changed gets a digest, so that two names never share a folder."""
    safe = UNSAFE.sub("_", name)[:MAX_NAME].strip(" .") or "_"
    return safe if safe == name else f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


class TensorBoardRun(Writer):
    """Event files for `tensorboard --logdir`. Events of an interrupted attempt after its last checkpoint are purged."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.repeated = {}  # purged there, so they are written again
        folder, purge_step = event_folder(run), 0 if run.keep_until is None else run.keep_until + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge_step, flush_secs=10)
        if run.keep_until is None:
            self._write_parameters(run.parameters)

    def _write_parameters(self, parameters: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard.summary import hparams

        values = {name: _hparam(value) for name, value in parameters.items() if value is not None}
        experiment, start, _ = hparams(values, dict.fromkeys(HPARAM_METRICS, 0.0))
        self._add_summary(experiment)
        self._add_summary(start)

    def _add_summary(self, content: Any) -> None:
        self._writer._get_file_writer().add_summary(content)

    def log(self, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(row["step"]))

    def log_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Adds histograms with our own bins, which TensorBoard does not compute again."""
        for name, each in histograms.items():
            self._writer.add_histogram_raw(
                *(name, each.edges[0], each.edges[-1], sum(each.counts), each.total, each.squares),
                bucket_limits=each.edges[1:],
                bucket_counts=each.counts,
                global_step=step,
            )

    def note(self, facts: Mapping[str, Any]) -> None:
        for name, value in facts.items():
            self._writer.add_text(name, json.dumps(value, allow_nan=False))

    def end(self, ending: Ending, metrics: Mapping[str, Any]) -> None:
        """Adds the status of the run that the page of hyper-parameters shows."""
        if ending == "continues":
            return
        # Not with tensorboard.plugins.hparams.summary, which needs TensorFlow.
        plugin, api, meta = (_hparams_module(name) for name in ("plugin_data_pb2", "api_pb2", "metadata"))
        summary = importlib.import_module("tensorboard.compat.proto.summary_pb2")
        name = {"finished": "STATUS_SUCCESS", "stopped": "STATUS_UNKNOWN"}.get(ending, "STATUS_FAILURE")
        info = plugin.SessionEndInfo(status=api.Status.Value(name))
        content = plugin.HParamsPluginData(version=meta.PLUGIN_DATA_VERSION, session_end_info=info)
        data = summary.SummaryMetadata.PluginData(plugin_name=meta.PLUGIN_NAME, content=content.SerializeToString())
        marked = summary.SummaryMetadata(plugin_data=data)
        value = summary.Summary.Value(tag=meta.SESSION_END_INFO_TAG, metadata=marked)
        self._add_summary(summary.Summary(value=[value]))

    def __exit__(self, *_: object) -> None:
        self._writer.close()


def _hparams_module(name: str) -> Any:
    return importlib.import_module(f"tensorboard.plugins.hparams.{name}")  # it makes its classes when it is imported


def _hparam(value: Any) -> bool | float | str:
    if isinstance(value, bool | int | float):
        return value
    return (value if isinstance(value, str) else json.dumps(value))[:MAX_TEXT]

"""MLflow: experiment CAMPAIGN, run PHASE/ARM/seed N, settings as parameters, metrics by step.

A server that does not answer costs one line and no time: a campaign probes it once, before its first run, and the rows
of a run are sent from a thread (ngpt/trackers/sender.py). Rows that did not arrive are sent when the run is resumed.
Names and passwords of the server belong into MLflow's own variables, such as MLFLOW_TRACKING_PASSWORD.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ngpt.config.secrets import redact
from ngpt.system.cli import print_line
from ngpt.trackers.base import Ending, TrackedRun, Writer
from ngpt.trackers.run_id import read_run_id, run_id
from ngpt.trackers.sender import Sender
from ngpt.trackers.server import PROBE_TIMEOUT, server_problem

ADDRESS = "MLFLOW_TRACKING_URI"
# MLflow's own limits are 120 s for a request and 7 repetitions: a run could wait for minutes for a server that is away.
LIMITS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
QUIET = {"MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}  # it would print two lines for each run
ALLOW_FOLDER = "MLFLOW_ALLOW_FILE_STORE"  # without it MLflow refuses a folder; one that a user names is meant
ID_TAG = "ngpt.run_id"
STATUS = {"finished": "FINISHED", "diverged": "FAILED", "failed": "FAILED", "stopped": "KILLED"}
MAX_VALUE = 6000  # characters of a parameter


def resolve_address(address: str, report: Callable[[str], None] = print_line, *, experiment: str) -> str:
    """Returns the address to use, or `disabled`, and passes to `report` why a server is not used.

    `auto` means MLFLOW_TRACKING_URI; an address with a password stays `auto`, so that it is written nowhere. Creates
    the `experiment`, since several runs that create it at once could make several.
    """
    if address == "disabled":
        return address
    uri = os.environ.get(ADDRESS, "") if address == "auto" else address
    if not uri:
        report(f"MLflow: disabled, since {ADDRESS} is not set")
        return "disabled"
    uri = absolute(uri)
    problem = server_problem(uri, timeout=PROBE_TIMEOUT) if uri.startswith(("http://", "https://")) else None
    if problem is None:
        try:
            _experiment_id(_client(uri), experiment)
        except Exception as error:  # of the server, a database driver or the file system
            problem = _reason(error)
    if problem is not None:
        report(f"MLflow: disabled, since {problem}; metrics.jsonl of each run has all rows")
        return "disabled"
    report(f"MLflow: {_shown(uri)}, experiment {experiment}")
    return "auto" if address == "auto" and redact(uri) != uri else uri


def fail_lost_runs(
    address: str, experiment: str, folders: Iterable[Path], report: Callable[[str], None] = print_line
) -> int:
    """Marks the runs of these folders as failed that MLflow takes for running, since their process died without a word.

    Returns their number. An MLflow that does not answer is one line, passed to `report`.
    """
    uri = os.environ.get(ADDRESS, "") if address == "auto" else address
    ids = {read_run_id(folder) or "" for folder in folders} - {""}
    if not uri or address == "disabled" or not ids:
        return 0
    marked = 0
    try:
        client = _client(absolute(uri))
        if (found := client.get_experiment_by_name(experiment)) is None:
            return 0
        page = None
        while page is None or page.token:
            where = {"filter_string": "attributes.status = 'RUNNING'", "page_token": page.token if page else None}
            page = client.search_runs([found.experiment_id], **where)
            for run in page:
                if run.data.tags.get(ID_TAG) in ids:
                    client.set_terminated(run.info.run_id, STATUS["failed"])
                    marked += 1
    except Exception as error:  # of the server, a database driver or the file system
        report(f"MLflow: trials that failed may look as if they were running, since {_reason(error)}")
    return marked


def absolute(uri: str) -> str:
    """An address whose path does not depend on the working directory: of a folder, or a SQLite file."""
    if "://" not in uri and not uri.startswith(("file:", "databricks")):
        return Path(os.path.expanduser(uri)).absolute().as_uri()
    start = "sqlite:///"
    if uri.startswith(start) and not uri.startswith(f"{start}/"):
        return f"{start}{Path(uri.removeprefix(start)).absolute()}"
    return uri


class MlflowRun(Writer):
    """A run of MLflow. A resumed run gets the rows that MLflow lacks, and no row twice."""

    server_lost = False  # shared by all runs of the process, so that only one waits for the timeout

    def __init__(self, run: TrackedRun, address: str, rows: Callable[[], list[dict[str, Any]]]) -> None:
        """`rows` reads the rows that the run has logged before."""
        self.repeated, self._run_id = {}, ""
        self._client: Any = None
        self._sender = Sender(self._lose_server)
        self._sender.has_failed = MlflowRun.server_lost
        self._id, _ = run_id(run.folder)
        self._sender.send(lambda: self._begin(run, address, rows))

    def _begin(self, run: TrackedRun, address: str, rows: Callable[[], list[dict[str, Any]]]) -> None:
        """Creates the run, or continues the one that an earlier attempt has created."""
        self._client = _client(os.environ[ADDRESS] if address == "auto" else address)
        experiment = _experiment_id(self._client, run.group or run.project)
        found = self._client.search_runs([experiment], f"tags.`{ID_TAG}` = '{self._id}'", max_results=1)
        if found:
            self._run_id, names = found[0].info.run_id, found[0].data.metrics
            histories = {name: self._client.get_metric_history(self._run_id, name) for name in names}
            last = {name: max(point.step for point in points) for name, points in histories.items() if points}
            limit = (run.keep_until or 0) if run.rolled_back else max(last.values(), default=0)
            self.repeated = {name: min(step, limit) for name, step in last.items()}
            self._client.update_run(self._run_id, status="RUNNING")
        else:
            tags = {ID_TAG: self._id, "trial_id": run.folder.name, "seed": str(run.seed)}
            tags |= {"phase": run.phase, "arm": run.arm} if run.group else {}
            name = "/".join(run.path)
            self._run_id = self._client.create_run(experiment, run_name=name, tags=tags).info.run_id
            self._log_parameters(run.parameters)
        for row in rows():  # those that a server that was away did not get
            self._send_row(row)

    def _log_parameters(self, parameters: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in parameters.items()}
        self._client.log_batch(self._run_id, params=[Param(name, text[:MAX_VALUE]) for name, text in texts.items()])

    def log(self, row: Mapping[str, Any]) -> None:
        self._sender.send(lambda: self._send_row(dict(row)))

    def _send_row(self, row: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric

        step, now = int(row["step"]), int(time.time() * 1000)
        values = {name: value for name, value in self.new_values(step, row).items() if value is not None}
        if values:
            metrics = [Metric(name, float(value), now, step) for name, value in values.items()]
            self._client.log_batch(self._run_id, metrics=metrics)
            self.repeated |= dict.fromkeys(values, step)

    def note(self, facts: Mapping[str, Any]) -> None:
        for name, value in facts.items():
            text = json.dumps(value, allow_nan=False)[:MAX_VALUE]
            self._sender.send(lambda name=name, text=text: self._client.set_tag(self._run_id, name, text))

    def end(self, ending: Ending, metrics: Mapping[str, Any]) -> None:
        """Adds the final metrics, and sets the status that MLflow shows."""
        if ending == "continues":
            return
        if ending in ("finished", "diverged"):
            final = {name: value for name, value in metrics.items() if value is not None}
            self._sender.send(lambda: self._send_row({**final, "step": metrics.get("steps") or 0}))
            self._sender.send(lambda: self._client.set_tag(self._run_id, "status", ending))
        self._sender.send(lambda: self._client.set_terminated(self._run_id, STATUS[ending]))

    def __exit__(self, *_: object) -> None:
        self._sender.close()

    def _lose_server(self, error: Exception) -> None:
        if not MlflowRun.server_lost:
            MlflowRun.server_lost = True
            print_line(f"MLflow: no more rows from here on, since {_reason(error)}; metrics.jsonl has them all")


def _client(uri: str) -> Any:
    for name, value in (LIMITS | QUIET).items():
        os.environ.setdefault(name, value)
    if uri.startswith("file:"):
        os.environ.setdefault(ALLOW_FOLDER, "true")
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _experiment_id(client: Any, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name)
        except Exception:  # another process has just created it
            if (found := client.get_experiment_by_name(name)) is None:
                raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return found.experiment_id


def _shown(uri: str) -> str:
    """An address without a name or password."""
    parts = urlsplit(uri)
    return redact(parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl())


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return redact(lines[0])[:300]

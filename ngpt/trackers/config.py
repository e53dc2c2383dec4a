"""The settings of the tracking tools, and which of them can be used here."""

import importlib.util
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

from pydantic import Field

from ngpt.config.base import Config, ConfigError, one_of, runtime_setting
from ngpt.system.cli import print_line
from ngpt.trackers import mlflow_run, trackio_run
from ngpt.trackers.wandb_run import WANDB_MODES, resolve_mode

PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow", "trackio": "trackio"}  # by setting: what it imports


class TrackerConfig(Config):
    """Where metrics go apart from `metrics.jsonl`, and under which names."""

    wandb: Annotated[str, one_of(WANDB_MODES, "wandb mode")] = runtime_setting("disabled")
    """Mode of W&B; auto: online if there is a key and a server, otherwise offline."""
    tensorboard: bool = runtime_setting(False)
    """Whether to write event files for TensorBoard."""
    mlflow: str = runtime_setting("disabled", max_length=1000)
    """MLflow: auto (the server of MLFLOW_TRACKING_URI), an address such as http://host:5000, a folder, or disabled."""
    trackio: Annotated[str, one_of(trackio_run.TRACKIO_MODES, "trackio mode")] = runtime_setting("disabled")
    """Mode of trackio; auto: the server or Space in its variables if it answers, otherwise local."""
    project: str = runtime_setting("ngpt")
    """Project in W&B; outside of a campaign, also the project of trackio and the experiment of MLflow."""
    group: str = runtime_setting("")
    """Group in W&B, project of trackio, experiment of MLflow; a campaign sets its name."""
    job_type: str = runtime_setting("train")
    """Job type in W&B; a campaign sets the phase."""
    run_name: str = runtime_setting("")
    """Name of the run; a campaign sets arm and seed. Empty: the name of the folder."""
    varied: str = runtime_setting("")
    """Settings shown as hyper-parameters, with spaces between; a campaign sets those that it varies. Empty: all."""
    log_every: Annotated[int, Field(ge=1, le=10**9)] = runtime_setting(10)
    """Steps between logged rows."""
    sample_tokens: Annotated[int, Field(ge=0, le=10_000)] = runtime_setting(0)
    """Tokens of a text that the finished model writes without a prompt, into `sample.txt`; the report shows it."""

    @property
    def shows_parameters(self) -> bool:
        """Whether a tool is used that shows hyper-parameters."""
        return self.tensorboard or (self.mlflow, self.trackio) != ("disabled", "disabled")


def resolve_tracker(
    cfg: TrackerConfig, folder: Path, report: Callable[[str], None] = print_line, *, group: str = ""
) -> TrackerConfig:
    """Resolves each `auto` and probes the servers, once before the first run; says in one line what is not used.

    `folder` is that of the runs and may be a pattern; `group` is the name of the campaign.

    Raises:
        ConfigError: a tool is asked for whose package is not installed, or W&B cannot be used as configured.
    """
    for name, package in PACKAGES.items():
        if getattr(cfg, name) not in (False, "disabled") and importlib.util.find_spec(package) is None:
            raise ConfigError(f"tracker.{name} needs a package: pip install 'ngpt-campaign[{name}]'")
    resolved = {
        "wandb": resolve_mode(cfg.wandb, folder, report),
        "mlflow": mlflow_run.resolve_address(cfg.mlflow, report, experiment=group or cfg.project),
        "trackio": trackio_run.resolve_mode(cfg.trackio, report),
    }
    return cfg.model_copy(update=resolved)


def fail_lost_runs(cfg: TrackerConfig, folders: Iterable[Path], *, group: str = "") -> None:
    """Tells tracking tools that the runs of these folders have failed, whose processes died without doing so.

    W&B notices it by itself; TensorBoard and trackio know no status.
    """
    if cfg.mlflow != "disabled":
        mlflow_run.fail_lost_runs(cfg.mlflow, group or cfg.project, folders)


def absolute_address(value: object) -> object:
    """`tracker.mlflow` with an absolute path, if it is a folder: Ray changes the working directory."""
    is_path = isinstance(value, str) and value not in ("", "auto", "disabled", "databricks") and ":" not in value
    return str(Path(os.path.expanduser(value)).absolute()) if is_path and isinstance(value, str) else value

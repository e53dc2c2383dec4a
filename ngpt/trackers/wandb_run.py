"""Weights & Biases: chooses the mode, and logs a run.

wandb waits 15 to 90 s per run for a server that does not answer. So a campaign probes the server once, before its first
run. If the server fails later, new runs are logged offline and training continues.
"""

import hashlib
import json
import netrc
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from ngpt.config.base import ConfigError, dotted_name
from ngpt.system.atomic_files import write_atomic
from ngpt.system.cli import print_line
from ngpt.trackers.base import Ending, TrackedRun, Writer
from ngpt.trackers.server import PROBE_TIMEOUT, server_problem

WANDB_MODES = ("auto", "online", "offline", "disabled")
INIT_TIMEOUT = 20.0  # seconds to open a run; wandb's default is 90
UPLOAD_TIMEOUT = 60.0  # seconds for the last upload of a run; by default wandb waits forever
UPLOAD_HINT = "upload later with: wandb sync {}/wandb/offline-run-*"
# With these variables wandb ignores or refuses the id, project and mode that a run is started with.
OVERRULED = ("WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_LAUNCH", "WANDB_MODE")
PUBLIC_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")  # one service; a key may be stored under either name


def resolve_mode(mode: str, folder: Path, report: Callable[[str], None] = print_line) -> str:
    """Returns the mode to use: online, offline or disabled. For `auto`, passes the choice and its reason to `report`.

    WANDB_DISABLED=true disables every mode. Online needs an API key and a server that answers the probe. `folder`
    appears in messages and may be a pattern.

    Raises:
        ConfigError: `mode` is online and there is no key or no server, or wandb refuses its environment variables or
            settings files.
    """
    if mode != "disabled" and os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on"):
        report("W&B: disabled, as WANDB_DISABLED says")
        return "disabled"
    if mode not in ("auto", "online"):
        return mode
    import pydantic
    import wandb

    try:
        # Includes wandb's own settings files. The teardown drops its cache, which would hide later changes.
        settings = wandb.setup(settings=wandb.Settings(silent=True)).settings
    except pydantic.ValidationError as error:
        wrong = "; ".join(f"{dotted_name(item['loc'])} {item['input']!r}: {item['msg']}" for item in error.errors())
        text = f"wandb refuses its WANDB_ variables or its settings file: {wrong}"
        raise ConfigError(f"{text}; mend it, or set tracker.wandb to offline or disabled") from None
    url, default_mode, stored_key = settings.base_url, settings.mode, settings.api_key
    wandb.teardown()
    if mode == "auto" and default_mode in ("disabled", "offline", "dryrun"):
        chosen = "disabled" if default_mode == "disabled" else "offline"
        report(f"W&B: {chosen}, as WANDB_MODE or wandb's settings file says")
        return chosen
    problem = (None if stored_key else key_problem(url)) or server_problem(url, timeout=PROBE_TIMEOUT)
    if mode == "online" and problem is not None:
        raise ConfigError(f"tracker.wandb is online, but {problem}; set it to auto or offline")
    if problem is not None:
        report(f"W&B: offline, since {problem}; {UPLOAD_HINT.format(folder)}")
        return "offline"
    if mode == "auto":
        report(f"W&B: online, {urlsplit(url).hostname} answers")
    return "online"


def key_problem(url: str) -> str | None:
    """Why there is no API key for the server, or None if the environment or the netrc file has one."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return None
    named, host = os.environ.get("NETRC"), urlsplit(url).netloc
    hosts = PUBLIC_HOSTS if host in PUBLIC_HOSTS else (host,)
    # Not Path.expanduser, which raises without a home directory.
    for path in map(Path, map(os.path.expanduser, [named] if named else ["~/.netrc", "~/_netrc"])):
        try:
            entries = netrc.netrc(path)
        except FileNotFoundError:
            continue
        except (OSError, UnicodeError, netrc.NetrcParseError) as error:  # whose text may quote the key
            return f"{path} cannot be read ({type(error).__name__})"
        if any(entry[2] for entry in map(entries.authenticators, hosts) if entry):
            return None
    return f"no key for {urlsplit(url).hostname} is configured (wandb login, or WANDB_API_KEY)"


class WandbRun(Writer):
    """A run in W&B. Offline runs are stored in `folder/wandb`."""

    server_lost = False  # shared by all runs of the process, so that only one waits for the timeout

    def __init__(self, run: TrackedRun, *, mode: str, name: str, job_type: str) -> None:
        """`name` and `job_type` are shown as given."""
        import wandb

        self.repeated = dict(run.repeated)
        self._histogram: Any = wandb.Histogram
        self._known_metrics: set[str] = set()
        id = run_id(run.folder, project=run.project, group=run.group)
        options = {"id": id, "project": run.project, "group": run.group or None, "dir": run.folder}
        options |= {"name": name, "job_type": job_type, "config": dict(run.settings)}
        if mode == "online" and not WandbRun.server_lost:
            try:
                self._run = _start("online", options)
                return
            except wandb.Error as error:
                WandbRun.server_lost = True
                reason = str(error).splitlines()[0]
                print_line(f"W&B: offline from here on, since {reason}; {UPLOAD_HINT.format(run.folder)}")
                wandb.teardown()  # otherwise the failed run still holds the id
        self._run = _start("offline", options)

    def log(self, row: Mapping[str, Any]) -> None:
        """Logs metrics by name, and their `step`."""
        # wandb's own step only grows, while a resumed run repeats steps, so `step` is the axis of each metric. They are
        # defined one by one, since the pattern `*` does not match a slash.
        if not (values := self.new_values(int(row["step"]), row)):
            return
        for name in values.keys() - self._known_metrics:
            self._run.define_metric(name, step_metric="step")
        self._known_metrics |= values.keys()
        self._run.log({"step": row["step"], **values})

    def log_histograms(self, step: int, histograms: Mapping[str, Any]) -> None:
        """Logs histograms by name. Each has `counts`, and `edges` with one more entry."""
        row = {name: self._histogram(np_histogram=(each.counts, each.edges)) for name, each in histograms.items()}
        self.log({"step": step} | row)

    def note(self, facts: Mapping[str, Any]) -> None:
        """Adds facts to the run's summary."""
        self._run.summary.update(dict(facts))

    def end(self, ending: Ending, metrics: Mapping[str, Any]) -> None:
        """Adds the final metrics to the run's summary."""
        if ending in ("finished", "diverged"):
            self._run.summary.update({**metrics, "status": ending})

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._run.finish(exit_code=0 if kind is None else 1)


def _start(mode: Literal["online", "offline"], options: Mapping[str, Any]) -> Any:
    """Starts a run, or resumes the run of an earlier attempt, which has the same id."""
    import wandb

    overruled = {name: os.environ.pop(name) for name in OVERRULED if name in os.environ}
    try:
        wandb.setup(settings=wandb.Settings(silent=True))  # otherwise it prints where it found the API key
        limits: dict[str, Any] = {"init_timeout": INIT_TIMEOUT, "finish_timeout": UPLOAD_TIMEOUT}
        settings = wandb.Settings(silent=True, console="off", **limits)  # the campaign owns the terminal
        return wandb.init(mode=mode, resume="allow", reinit="create_new", settings=settings, **options)
    finally:
        os.environ.update(overruled)


def run_id(folder: Path, *, project: str, group: str) -> str:
    """Returns the W&B id of a run, which is the same for every attempt, on any machine and path.

    In a campaign (`group`), the folder is named after the trial. A trial can be shared by several campaigns, so project
    and group are hashed too. A run outside a campaign generates an id and stores it in its folder.
    """
    if group:
        return hashlib.sha256(json.dumps([project, group, folder.name]).encode()).hexdigest()[:16]
    path = folder / "wandb_id"
    if not path.exists():
        write_atomic(path, uuid.uuid4().hex[:16] + "\n")
    return path.read_text(encoding="utf-8").strip()

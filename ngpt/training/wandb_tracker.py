"""Weights & Biases: whether it can be used, and one run of it.

wandb without a server costs 15 to 90 s per run. So it is asked once whether there is one, and a server that goes away
later costs its runs their online log, never their training.
"""

import hashlib
import json
import netrc
import os
import sys
import threading
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from ngpt.config.base import ConfigError
from ngpt.system.atomic_files import write_atomic

WANDB_MODES = ("auto", "online", "offline", "disabled")
PATIENCE = 2.5  # seconds that a server has to answer the probe
INIT_PATIENCE = 20.0  # seconds that it has to open a run; wandb's own default is 90
UPLOAD_PATIENCE = 60.0  # seconds for the last upload of a run; by default wandb waits for ever
UPLOAD = "upload later with: wandb sync {}/wandb/offline-run-*"
HOSTED = ("api.wandb.ai", "api.forge.coreweave.com")  # names of the one public service; a key may be under either


def tell(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)


def choose_mode(wanted: str, folder: Path, say: Callable[[str], None] = tell) -> str:
    """Online, offline or disabled for what a config says; where it says `auto`, `say` is told the choice and why.

    Online needs a key and a server that answers within `PATIENCE` seconds; a status of 5xx is no answer.

    Args:
        wanted: one of `WANDB_MODES`.
        folder: of the runs, for people; it may be a pattern.
        say: takes a line of text.

    Raises:
        ConfigError: `online` is wanted and cannot be.
    """
    if wanted not in ("auto", "online"):
        return wanted
    import wandb

    # Reads wandb's own settings files, too. What it remembers is dropped again: it would hide later changes.
    settings = wandb.setup(settings=wandb.Settings(silent=True)).settings
    url, usual, stored_key = settings.base_url, settings.mode, settings.api_key
    wandb.teardown()
    if wanted == "auto" and usual in ("disabled", "offline", "dryrun"):
        mode = "disabled" if usual == "disabled" else "offline"
        say(f"W&B: {mode}, as WANDB_MODE or wandb's settings file says")
        return mode
    problem = (None if stored_key else no_key(url)) or no_answer(url, seconds=PATIENCE)
    if problem is None:
        if wanted == "auto":
            say(f"W&B: online, {urlsplit(url).hostname} answers")
        return "online"
    if wanted == "online":
        raise ConfigError(f"tracker.wandb is online, but {problem}; set it to auto or offline")
    say(f"W&B: offline, since {problem}; {UPLOAD.format(folder)}")
    return "offline"


def no_answer(url: str, *, seconds: float) -> str | None:
    """Why no web server answers at `url`, or None when one does. Returns after `seconds`, whatever the network does."""
    host = urlsplit(url).hostname  # the address may hold a password
    found: list[str | None] = []

    def ask() -> None:
        """Any status below 500 is an answer, also 403 or 404: somebody is there."""
        try:
            urllib.request.urlopen(url, timeout=seconds).close()
            found.append(None)
        except urllib.error.HTTPError as error:
            error.close()
            found.append(f"{host} answers with status {error.code}" if error.code >= 500 else None)
        except (OSError, HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            found.append(f"{host} cannot be reached ({reason or type(error).__name__})")

    # In a thread, since looking up a name has no time limit of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else f"{host} does not answer within {seconds:g} s"


def no_key(url: str) -> str | None:
    """Why there is no key for the server, or None when the environment or the netrc file has one."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return None
    given = os.environ.get("NETRC")
    paths = [Path(name).expanduser() for name in ([given] if given else ["~/.netrc", "~/_netrc"])]
    host = urlsplit(url).netloc
    hosts = HOSTED if host in HOSTED else (host,)
    for path in paths:
        try:
            entries = netrc.netrc(path)
        except FileNotFoundError:
            continue
        except (OSError, UnicodeError, netrc.NetrcParseError) as error:  # whose text may quote the key
            return f"{path} cannot be read ({type(error).__name__})"
        if any(entry[2] for entry in map(entries.authenticators, hosts) if entry):
            return None
    return f"no key for {urlsplit(url).hostname} is configured (wandb login, or WANDB_API_KEY)"


class WandbRun:
    """A run: numbers and histograms by step, and facts. Offline it lies in `folder/wandb`, for `wandb sync`.

    Raises:
        wandb.Error: an offline run cannot be opened.
    """

    gone = False  # the server, for this process: one wait is enough

    def __init__(
        self,
        folder: Path,
        *,
        mode: str,
        project: str,
        group: str,
        job_type: str,
        name: str,
        settings: Mapping[str, Any],
    ) -> None:
        import wandb

        def start(mode: str) -> Any:
            """A new run, or the one of an earlier attempt, which goes on under its id."""
            wandb.setup(settings=wandb.Settings(silent=True))  # else it tells stderr which key it has found
            return wandb.init(
                project=project,
                group=group or None,
                job_type=job_type,
                name=name,
                id=run_id(folder, project=project, group=group),
                resume="allow",
                reinit="create_new",
                dir=folder,
                mode="offline" if mode == "offline" else "online",
                config=dict(settings),
                settings=wandb.Settings(
                    silent=True,
                    console="off",  # the terminal is not ours alone
                    init_timeout=INIT_PATIENCE,
                    finish_timeout=UPLOAD_PATIENCE,
                ),
            )

        self._histogram: Any = wandb.Histogram
        self._known: set[str] = set()
        mode = "offline" if WandbRun.gone else mode
        try:
            self._run = start(mode)
        except wandb.Error as error:
            if mode == "offline":
                raise
            WandbRun.gone = True
            reason = str(error).splitlines()[0]
            tell(f"W&B: offline from here on, since {reason}; {UPLOAD.format(folder)}")
            wandb.teardown()  # else the failed run keeps the id in use
            self._run = start("offline")

    def log(self, row: Mapping[str, Any]) -> None:
        """Adds the numbers of one `step`."""
        # wandb's own steps only ever grow, and a resumed run repeats some. So ours is the axis; it is named metric by
        # metric, since a pattern of `*` does not match a slash.
        for name in row.keys() - self._known - {"step"}:
            self._run.define_metric(name, step_metric="step")
        self._known |= row.keys()
        self._run.log(dict(row))

    def log_histograms(self, step: int, histograms: Mapping[str, Any]) -> None:
        """Adds histograms by name: each has `counts` and `edges`, one edge more than counts."""
        shown = {name: self._histogram(np_histogram=(each.counts, each.edges)) for name, each in histograms.items()}
        self.log({"step": step} | shown)

    def note(self, facts: Mapping[str, Any]) -> None:
        """Puts facts into the run's summary."""
        self._run.summary.update(dict(facts))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._run.finish(exit_code=0 if kind is None else 1)


def run_id(folder: Path, *, project: str, group: str) -> str:
    """The same for every attempt at a run, on whatever machine and path.

    In a campaign (the `group`) the folder is named after the trial, which may be part of other campaigns, too. A run
    of its own draws an id once and keeps it in its folder.
    """
    if group:
        return hashlib.sha256(json.dumps([project, group, folder.name]).encode()).hexdigest()[:16]
    path = folder / "wandb_id"
    if not path.exists():
        write_atomic(path, uuid.uuid4().hex[:16] + "\n")
    return path.read_text(encoding="utf-8").strip()

"""The functions behind `from tune import ...` that plan, run and compare campaigns, for scripts and notebooks.

They do what the command line does, with exceptions in place of exit codes. docs/python.md shows how to use them.
"""

import contextlib
import os
import shlex
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ngpt.code.plugins import loaded_plugins
from ngpt.code.version import command as program
from ngpt.config.base import ConfigError
from ngpt.system.cli import print_line
from tune.campaign import load_campaign as read_campaign
from tune.campaign_results import CampaignResults, read_place
from tune.launch import exit_code, launch_at
from tune.machine.estimate import Estimate, PhaseEstimate, estimate
from tune.planning.smoke import shrink_campaign
from tune.remote.places import entry, local_results, place_of, recordable, results_name
from tune.results.compare import ArmComparison, Comparison
from tune.results.compare import compare as compare_results
from tune.rows import compared_table, planned_table
from tune.spec.plugins import use_campaign_plugins
from tune.spec.schema import Campaign
from tune.storage.summaries import CampaignSummary
from tune.terminal.comparison import comparison_view
from tune.terminal.plan_view import plan_notes, plan_rows, plan_view
from tune.terminal.table import Table, html_line, html_table, rendered

if TYPE_CHECKING:
    from tune.remote.uri import Uri

Overrides = Mapping[str, Any] | Sequence[str]  # see `load_campaign`
Results = str | os.PathLike[str]
Retrain = bool | str | Sequence[str]
Plugins = Results | Sequence[Results]


@dataclass(frozen=True, repr=False)
class Plan(Estimate):
    """What a campaign would train: `trials`, `to_run`, `tokens`, `disk_bytes`, and `seconds` with `seconds_source`."""

    phases: Table[PhaseEstimate]

    def __repr__(self) -> str:
        return rendered(plan_view(self))

    def _repr_html_(self) -> str:
        """The plan as a notebook shows it."""
        header, *rows = plan_rows(self)
        return html_table(header, rows) + "".join(map(html_line, plan_notes(self)))


@dataclass(frozen=True, repr=False)
class ComparedResults(Comparison):
    """Two results directories side by side; `arms` has a row for each arm that both have."""

    arms: Table[ArmComparison]

    def __repr__(self) -> str:
        return rendered(comparison_view(self))

    def _repr_html_(self) -> str:
        """The arms as a notebook shows them."""
        return self.arms._repr_html_()


@dataclass(frozen=True, repr=False)
class CampaignRun:
    """How a run of a campaign ended."""

    exit_code: int  # 0: every trial finished; 4: some failed, diverged or were left out by the budget; 130: stopped
    summary: CampaignSummary
    command: str  # that resumes the run in a terminal
    place: "Path | Uri"  # the results directory, or its address

    @property
    def path(self) -> str:
        """The results directory, or its address without credentials."""
        return str(self.place)

    @property
    def status(self) -> str:
        """`finished`, `interrupted`, `stopped by budget` or `incomplete`."""
        return self.summary.status

    @cached_property
    def results(self) -> CampaignResults:
        """The results, as `load_results` reads them when they are first asked for."""
        return read_place(self.place)

    def __fspath__(self) -> str:
        """The path, so that `load_results` and `compare` take a run."""
        return self.path

    def __repr__(self) -> str:
        return f"exit code {self.exit_code}\n{self.results!r}"

    def _repr_html_(self) -> str:
        """The results as a notebook shows them."""
        return self.results._repr_html_()


class CampaignInterrupted(KeyboardInterrupt):
    """Ctrl-C, or the stop button of a notebook, has ended a run; its trials are saved. `run` is what it has reached."""

    def __init__(self, run: CampaignRun) -> None:
        super().__init__(f"interrupted, and all trials are saved; to resume, {_again(run.command)}")
        self.run = run


def _again(command: str) -> str:
    return f"call run() with the same arguments, or in a terminal: {command}"


def load_campaign(file: Results, overrides: Overrides = (), *, plugins: Plugins = ()) -> Campaign:
    """Reads and checks a campaign file.

    Paths in the file are relative to the working directory and become absolute.

    Args:
        overrides: settings that change the `base:` of the file: a mapping such as `{"optim.lr": 1e-3}`, or texts as
            `--set` has them, `optim.lr=1e-3`.
        plugins: Python files, or modules of installed packages, that add rules, optimizers, metrics, ...; they stay
            loaded in this process.

    Raises:
        ConfigError: the file has mistakes; the message has one line for each, with path, line and column.
    """
    use_campaign_plugins(_texts(plugins))
    return read_campaign(file, overrides)


def plan(
    campaign: Results | Campaign,
    overrides: Overrides = (),
    *,
    plugins: Plugins = (),
    out: Results = "results",
    smoke: bool = False,
    measure: bool = False,
    retrain: Retrain = False,
    keep: bool = False,
) -> Plan:
    """Returns what `run` with the same arguments would train, and how long it would take; starts and writes nothing.

    Args:
        measure: whether to time a few real steps first, for a better `seconds`. Other arguments are as in `run`.

    Raises:
        ConfigError: the campaign file has mistakes.
    """
    loaded = _load(campaign, overrides, plugins=plugins, smoke=smoke)
    name = results_name(loaded.name, smoke=loaded.smoke)
    arms = _arms_to_retrain(retrain)
    estimated = estimate_at(loaded, name, place_of(out), measure=measure, retrain=arms, keep=keep)
    return Plan(**{**vars(estimated), "phases": planned_table(estimated.phases)})


def estimate_at(campaign: Campaign, name: str, out: "Path | Uri", **options: Any) -> Estimate:
    """Estimates what the campaign would train in the results directory `name` of `out`; see `estimate`."""
    with contextlib.ExitStack() as stack:
        root = local_results(entry(out, name), stack=stack, verb="plan")
        return replace(estimate(campaign, root, **options), results=str(entry(out, name)))


def run(
    campaign: Results | Campaign,
    overrides: Overrides = (),
    *,
    plugins: Plugins = (),
    out: Results = "results",
    inline: bool = False,
    smoke: bool = False,
    address: str | None = None,
    allow_change: bool = False,
    retrain: Retrain = False,
    keep: bool = False,
    stop: threading.Event | None = None,
) -> CampaignRun:
    """Runs a campaign, or resumes it, and returns how it ended. Progress goes to stderr.

    Works in a notebook and in any thread. In the main thread, a stop signal lets the running trials save; then SIGINT
    raises CampaignInterrupted, and other signals SystemExit. A second signal raises at once.

    Args:
        campaign: a campaign file, or what `load_campaign` returns.
        overrides, plugins: as in `load_campaign`.
        out: the folder for all results, or an address such as `s3://bucket/results`.
        inline: whether to train in this process, without Ray; the numbers are the same.
        smoke: whether to run the campaign with a tiny model and a few steps.
        address: of a running Ray cluster, or `auto`; None starts a private Ray.
        allow_change: whether to resume even if the file changes the meaning of existing results.
        retrain: the arms to train anew if other code trained them; True means all, an empty list none.
        keep: whether to reuse results although the code has changed since, marked in the report.
        stop: once another thread sets it, the running trials save, and the run returns with exit code 130.

    Raises:
        ConfigError: the campaign cannot be run as it is; the message says why.
        ResultsLocked: another run, perhaps of this process, uses the results.
        CampaignInterrupted: a KeyboardInterrupt; the message says how to resume.
        OSError: the disk is full or files are not accessible.
        ExecutorLost: Ray died too often.
    """
    loaded = _load(campaign, overrides, plugins=plugins, smoke=smoke)
    name, place = results_name(loaded.name, smoke=loaded.smoke), place_of(out)
    options = {"inline": inline, "address": address, "allow_change": allow_change, "keep": keep}
    options["retrain"] = _arms_to_retrain(retrain)
    command = _command(loaded, os.fspath(out), options)
    try:
        summary, signal_number = launch_at(loaded, name, place, stop=stop, command=command, **options)
    except KeyboardInterrupt:  # before the first trial, or a second signal
        raise KeyboardInterrupt(f"interrupted; to resume, {_again(command)}") from None
    ended = CampaignRun(exit_code(summary, signal_number), summary, command, entry(place, name))
    if signal_number == signal.SIGINT:
        raise CampaignInterrupted(ended)
    if signal_number:
        raise SystemExit(ended.exit_code)
    if summary.status == "interrupted":
        print_line(f"stopped; to resume, {_again(command)}")
    return ended


def compare(first: Results, second: Results, *, metric: str | None = None) -> ComparedResults:
    """Compares two results directories, or addresses; all differences are `second` minus `first`.

    Args:
        metric: None means the metric of the campaigns.

    Raises:
        ConfigError: there is no campaign, or the two cannot be compared; the message says why.
    """
    places = [place_of(first), place_of(second)]
    with contextlib.ExitStack() as stack:
        roots = [local_results(place, stack=stack, verb="compare") for place in places]
        found = compare_results(*roots, metric=metric)
    sides = [{**side, "results": str(place)} for side, place in zip((found.a, found.b), places, strict=True)]
    return ComparedResults(**{**vars(found), "a": sides[0], "b": sides[1], "arms": compared_table(found.arms)})


def _load(campaign: Results | Campaign, overrides: Overrides, *, plugins: Plugins, smoke: bool) -> Campaign:
    if not isinstance(campaign, Campaign):
        loaded = load_campaign(campaign, overrides, plugins=plugins)
    elif overrides:
        raise ConfigError("the campaign is loaded already: give the overrides to load_campaign")
    else:
        loaded = campaign
    return shrink_campaign(loaded) if smoke and not loaded.smoke else loaded


def _arms_to_retrain(retrain: Retrain) -> list[str] | None:
    """The arms as the command line has them: there an empty list means all, and None no arm."""
    if retrain is True:
        return []
    return _texts(retrain) if retrain else None


def _texts(given: Results | Sequence[Results]) -> list[str]:
    return [os.fspath(given)] if isinstance(given, str | os.PathLike) else [os.fspath(each) for each in given]


def _command(campaign: Campaign, out: str, options: Mapping[str, Any]) -> str:
    """The command that does the same in a terminal; it has no credentials."""
    words = [*program().split(), str(campaign.path)]
    for assignment in campaign.assignments:
        words += ["--set", assignment]
    for source in (plugin.source for plugin in loaded_plugins()):
        words += ["--plugin", str(source.file or source.module)]
    words += [] if out == "results" else ["--out", recordable(out)]
    words += ["--smoke"] if campaign.smoke else []
    for name, value in options.items():
        if value not in (False, None):
            words += [f"--{name.replace('_', '-')}", *(value if isinstance(value, list) else [])]
            words += [value] if isinstance(value, str) else []
    return shlex.join(words)

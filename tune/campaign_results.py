"""Reads what a campaign has recorded so far, as typed rows; writes nothing."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ngpt.config.base import ConfigError, unknown_message
from tune import format as fmt
from tune.remote.places import REPORT, local_results, place_of, report_path
from tune.report.wording import effect, mean_interval, verdict
from tune.results.phase_summary import phase_records, summarize_phase
from tune.results.snapshot import Progress
from tune.results.status import count_progress, take_snapshot
from tune.results.summary import curve_rows, file_warnings, summarize_campaign
from tune.rows import Arm, CurvePoint, arm_table, claim_table, curve_point, curve_table, trial_table
from tune.storage.journal import JOURNAL
from tune.storage.links import NOT_FOLLOWED, refuse_links
from tune.storage.lock import is_locked
from tune.storage.state import CampaignState, read_state
from tune.storage.summaries import (
    RUNNING,
    Answer,
    ArmSummary,
    CampaignSummary,
    ClaimResult,
    Objective,
    PhaseSummary,
    TrialRecord,
)
from tune.terminal.final_screen import final_screen
from tune.terminal.live import live_view
from tune.terminal.table import Table, html_line, html_table, rendered

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tune.remote.uri import Uri

NO_REPORT = "not written yet; `python run_campaign.py report DIR` writes it"


class CampaignResults:
    """What a campaign, or one phase of it, has recorded when it was read. A finished campaign does not change any more.

    Attributes:
        path: the results directory, or its address in an object store.
        phase: the phase, if only this one was read.
        campaign: the name of the campaign.
        status: `finished`, `running`, `interrupted`, `stopped by budget` or `incomplete`.
        metric: what ranks the arms.
        progress: how many trials have ended, and how many there are.
    """

    def __init__(self, root: Path, *, path: str, report: str, state: CampaignState, phase: str | None = None) -> None:
        self._root, self._state, self._report = root, state, report
        self._phases = [one for one in state.phases.values() if phase in (None, one.name)]
        self.path, self.phase = path, phase
        self.campaign: str = state.campaign["campaign"]
        self.status: str = RUNNING if is_locked(root) else state.status
        self.metric = Objective(**state.campaign["metric"])
        self.progress: Progress = count_progress(state)

    @cached_property
    def summary(self) -> CampaignSummary:
        """The campaign as in `summary.json`, judged when it is first asked for."""
        root, state = self._root, self._state
        phases = [summarize_phase(state, one) for one in state.phases.values()]
        summary = summarize_campaign(state, phases, file_warnings=file_warnings(root, state))
        summary = replace(summary, status=self.status)
        return summary if self.phase is None else _restricted(summary, self.phase)

    @property
    def answer(self) -> Answer:
        """The settings to use, with their effect."""
        return self.summary.answer

    @property
    def phases(self) -> Mapping[str, PhaseSummary]:
        """The phases by name, in order."""
        return {phase.phase: phase for phase in self.summary.phases}

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a careful reader would ask about."""
        return self.summary.warnings

    @cached_property
    def trials(self) -> Table[TrialRecord]:
        """The trials with a result, phase by phase."""
        return trial_table([record for phase in self._phases for record in phase_records(self._state, phase)])

    @cached_property
    def arms(self) -> Table[Arm]:
        """The arms, ranked within their phases."""
        return arm_table(self.summary.phases)

    @cached_property
    def curves(self) -> Table[CurvePoint]:
        """The logged steps of all trials that have started."""
        records = [record for phase in self._phases for record in phase_records(self._state, phase)]
        rows = curve_rows(self._root, [*records, *self._unfinished()])
        return curve_table(curve_point(row) for row in rows if row["step"] is not None)

    @cached_property
    def claims(self) -> Table[ClaimResult]:
        """The claims of the campaign, as far as its trials decide them."""
        return claim_table(self.summary.claims)

    def __fspath__(self) -> str:
        """The path, so that `compare` takes results."""
        return self.path

    def __repr__(self) -> str:
        return f"{self._headline()}\n{rendered(self._view())}"

    def _repr_html_(self) -> str:
        """The result as a notebook shows it: a table for each phase, and the answer."""
        parts = [html_line(self._headline(), "h4")]
        for phase in self.summary.phases:
            header = ["", "arm", "n", phase.metric.name, "against the baseline", "verdict"]
            rows = [[_mark(phase, arm), *_cells(arm)] for arm in phase.arms]
            parts += [html_line(fmt.plain(phase.phase), "h5"), html_table(header, rows)]
            parts.append(html_line(fmt.sentence(phase.why)))
        parts.append(html_line(fmt.plain(self.answer.sentence), "strong"))
        parts += [html_line(f"Warning: {fmt.sentence(warning)}") for warning in self.warnings]
        return f"<div>{''.join(parts)}</div>"

    def _view(self) -> "RenderableType":
        if self.status != RUNNING or self.phase:
            return final_screen(self.summary, report=self._report)
        finished = [phase for phase in self.summary.phases if phase.winner is not None]
        return live_view(take_snapshot(self._root, self._state, running=True, finished_phases=finished))

    def _headline(self) -> str:
        progress = self.progress
        total = f"{progress.total}{'' if progress.total_is_final else ' or more'}"
        title = f"{self.summary.title}{f' / {self.phase}' if self.phase else ''}: {self.status}"
        path = Path(self.path)
        where = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else self.path
        return fmt.plain(f"{title}, {progress.done} of {total} trials, in {where}")

    def _unfinished(self) -> list[TrialRecord]:
        """The planned trials without a result, of which some may have started."""
        unknown: Any = {"overrides": {}, "config": {}, "status": "unfinished", "metrics": {}}
        return [
            TrialRecord(self.campaign, phase.name, arm.name, trial_id, seed, **unknown)
            for phase in self._phases
            for arm in phase.arms
            for seed, trial_id in arm.trial_ids.items()
            if trial_id not in self._state.results
        ]


def _mark(phase: PhaseSummary, arm: ArmSummary) -> str:
    return "→" if arm.arm == phase.winner else ""


def _cells(arm: ArmSummary) -> list[str]:
    return [fmt.plain(arm.arm), str(arm.n), mean_interval(arm.score), effect(arm.delta), fmt.plain(verdict(arm))]


def _restricted(summary: CampaignSummary, phase: str) -> CampaignSummary:
    """The summary with one phase, and the claims that its trials decide."""
    phases = tuple(one for one in summary.phases if one.phase == phase)
    trials = {trial_id for one in phases for arm in one.arms for trial_id in arm.trial_ids}
    claims = tuple(claim for claim in summary.claims if trials & {*claim.trials})
    return replace(summary, phases=phases, claims=claims)


def load_results(results: "str | os.PathLike[str]") -> CampaignResults:
    """Reads a results directory, also while its campaign runs, and if it was interrupted; writes nothing into it.

    Args:
        results: the folder of a campaign or of one of its phases, such as `results/quickstart` or
            `results/quickstart/alpha`; or an address such as `s3://bucket/results/quickstart`.

    Raises:
        ConfigError: there is no campaign.
        OSError: a file cannot be read, a file of a trial is a link, or the journal is damaged.
    """
    return read_place(place_of(results))


def read_place(place: "Path | Uri") -> CampaignResults:
    """Does what `load_results` does, for a folder or an address."""
    if isinstance(place, Path):
        root, phase = _find(place.absolute())
        report = str(report_path(root)) if (root / REPORT).exists() else NO_REPORT
        return _read(root, str(root), report, phase)
    with _copy(place) as (root, uri, phase):
        read = _read(root, str(uri), str(report_path(uri)), phase)
        _ = read.summary, read.curves  # now, since the copy is removed
        return read


def _read(root: Path, path: str, report: str, phase: str | None) -> CampaignResults:
    refuse_links(root, NOT_FOLLOWED)
    state = read_state(root)
    if phase is not None and phase not in state.phases:
        raise ConfigError(f"{path}: {unknown_message('phase', phase, state.phases)}")
    return CampaignResults(root, path=path, report=report, state=state, phase=phase)


def _find(folder: Path) -> tuple[Path, str | None]:
    """The results directory in which a folder is, and the name of its phase, if it is that of a phase."""
    if (folder / JOURNAL).is_file():
        return folder, None
    if (folder.parent / JOURNAL).is_file():
        return folder.parent, folder.name
    if not folder.exists():
        raise ConfigError(f"{folder}: no such folder")
    if inside := sorted(path.parent.name for path in folder.glob(f"*/{JOURNAL}")):
        names = fmt.listing(map(fmt.plain, inside))
        raise ConfigError(f"{folder} has the results of {names}: give one of them, such as {folder / inside[0]}")
    return folder, None  # `read_state` says what is missing


@contextlib.contextmanager
def _copy(uri: "Uri") -> "Iterator[tuple[Path, Uri, str | None]]":
    """A local copy of the results at an address, which may be that of a phase."""
    from tune.remote.store import open_store, refusing
    from tune.remote.unit import ROOT, read_digests

    with refusing():
        here, above = (read_digests(open_store(one), ROOT) is not None for one in (uri, uri.parent))
    campaign, phase = (uri.parent, uri.name) if above and not here else (uri, None)
    with contextlib.ExitStack() as stack:
        yield local_results(campaign, stack=stack, verb="status"), campaign, phase

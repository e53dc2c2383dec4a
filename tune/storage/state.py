"""What a journal says: a fold over its events. The running campaign, `status` and `report` all read it from here.

It knows nothing of plans and configs: who only looks at a campaign does not wait for torch to be imported.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from ngpt.config.base import ConfigError
from tune.storage.journal import Event, read_journal
from tune.storage.records import BetterArm, TrialOutcome, TrialWork

Overrides = Mapping[str, Any]  # settings by dotted name

PACKING = (
    "trials_per_device",
    "why",
    "device",
    "curve",
    "measured_at",
)  # fields of tune/machine/gpu_sharing.py's `GpuSharing`
DONE = ("finished", "diverged", "stopped")  # statuses that are results: such a trial is not run again


@dataclass(frozen=True)
class ArmState:
    """An arm as the journal remembers it: its settings and the trial of each seed."""

    name: str
    overrides: Overrides  # relative to the phase's base
    trial_ids: Mapping[int, str]
    work: TrialWork | None = None  # of each trial; older journals do not say


@dataclass
class PhaseState:
    """A phase as the journal remembers it: what was planned, and what came of it once all its trials are over."""

    name: str
    inherit: str | None
    base: Overrides
    baseline: str
    arms: list[ArmState]
    seeds: list[int]
    swept: Mapping[str, list[Any]]
    winner: str | None = None  # known once the phase is finished
    winner_overrides: Overrides = field(default_factory=dict)
    better: list[BetterArm] = field(default_factory=list)  # the arms that were, known with the winner

    @property
    def trial_ids(self) -> list[str]:
        """Of all arms and seeds, in the order of the plan."""
        return [trial_id for arm in self.arms for trial_id in arm.trial_ids.values()]


@dataclass
class CampaignState:
    """A campaign so far."""

    campaign: dict[str, Any] = field(default_factory=dict)  # the newest `campaign_started`
    phases: dict[str, PhaseState] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)  # newest result by trial id
    running: dict[str, Event] = field(default_factory=dict)  # started and without a result, by trial id
    expected_stages: list[list[dict[str, Any]]] = field(default_factory=list)  # expected and not planned yet, in stages
    attempts: dict[str, int] = field(default_factory=dict)
    speeds: dict[str, float] = field(default_factory=dict)  # measured once, for `hold: seconds`
    gpu_sharing: dict[str, Any] = field(default_factory=dict)  # how many trials share a GPU, if that was ours to choose
    status: str = "incomplete"
    started: str = ""  # time of the first start
    trained_on: dict[str, Any] = field(default_factory=dict)  # environment of the newest session that began a trial
    seconds: float = 0.0  # of all sessions that are over
    slot_seconds: float = 0.0  # the same, each session times the trials that it had room for
    most_slots: int = 1  # of any session
    newest: str = ""  # time of the newest event; for people, since clocks jump
    elapsed: float | None = None  # seconds of the newest session up to that event; older journals have only the time
    left_out: dict[str, int] = field(default_factory=dict)  # trials by phase, where a budget stopped the campaign
    ended: bool = True  # whether the newest session has said so; one that was killed has not

    @property
    def environment(self) -> dict[str, Any]:
        """Where the results are from: a start that finds nothing left to train has no part in them."""
        return self.trained_on or self.campaign["environment"]

    def outcome(self, trial_id: str, metric: str | None = None) -> TrialOutcome:
        """What a trial contributes to a verdict by the campaign's metric, or by another one."""
        result = self.results.get(trial_id)
        if result is None:
            return TrialOutcome("missing", None)
        if result["status"] == "stopped":  # early: its values are of fewer steps than those of the others
            return TrialOutcome("stopped", None)
        return TrialOutcome(result["status"], result["metrics"].get(metric or self.campaign["metric"]["name"]))

    def session_seconds(self) -> float:
        """How long the newest session has journaled for, if it has not said that it is over."""
        if self.ended:
            return 0.0
        if self.elapsed is not None:
            return self.elapsed
        wall = datetime.fromisoformat(self.newest) - datetime.fromisoformat(self.campaign["time"])
        return max(0.0, wall.total_seconds())

    def _close(self, seconds: float) -> None:
        """Counts the time of a session that is over."""
        self.seconds += seconds
        self.slot_seconds += seconds * max(1, self.campaign.get("workers", 1))

    def copy(self) -> "CampaignState":
        """A state that later events do not change the extent of: safe to walk through in another thread."""
        return replace(self, phases=dict(self.phases), results=dict(self.results), running=dict(self.running))

    def apply(self, event: Event) -> None:
        """Takes one event into account."""
        match event["event"]:
            case "campaign_started":
                self._close(self.session_seconds())  # a session that was killed
                self.started = self.started or event["time"]
                self.most_slots = max(self.most_slots, event.get("workers", 1))
                self.campaign, self.phases, self.running, self.expected_stages = event, {}, {}, []
                self.status, self.ended, self.left_out = "incomplete", False, {}
                # A trial that failed is tried again when the command is given again; a diverged one is a result, and so
                # is one that was stopped early, as long as the campaign does that.
                kept = DONE if event.get("stops_early", True) else [status for status in DONE if status != "stopped"]
                self.results = {i: result for i, result in self.results.items() if result["status"] in kept}
            case "speeds_measured":
                self.speeds = self.speeds | event["speeds"]
            case "packing_chosen":
                self.gpu_sharing = {name: item for name, item in event.items() if name in PACKING}
            case "phase_planned":
                if event["phase"] not in self.phases:
                    rest = (
                        [some for some in stage if some["phase"] != event["phase"]] for stage in self.expected_stages
                    )
                    self.expected_stages = [stage for stage in rest if stage]
                self.phases[event["phase"]] = _phase(event)
            case "trials_expected":
                self.expected_stages = event["stages"]
            case "trial_started":
                self.running[event["trial_id"]] = event
                self.attempts[event["trial_id"]] = event["attempt"]
                self.trained_on = self.campaign.get("environment", {})
            case "trial_finished":
                self.running.pop(event["trial_id"], None)
                self.results[event["trial_id"]] = event
            case "worker_died":
                self.running.pop(event["trial_id"], None)
            case "phase_finished":
                phase = self.phases[event["phase"]]
                phase.winner, phase.winner_overrides = event["winner"], event["winner_overrides"]
                phase.better = [BetterArm(**arm) for arm in event.get("better", [])]
            case "campaign_ended":
                self.status, self.ended, self.running = event["status"], True, {}
                self._close(event["seconds"])
                self.left_out = event.get("left_out", {})
        self.newest, self.elapsed = event["time"], event.get("elapsed")


def replay(events: Iterable[Event]) -> CampaignState:
    """The state after all of `events`."""
    state = CampaignState()
    for event in events:
        state.apply(event)
    return state


def read_state(root: Path) -> CampaignState:
    """The state of the campaign in a results directory.

    Raises:
        ConfigError: there is no campaign in `root`.
    """
    state = replay(read_journal(root / "journal.jsonl"))
    if not state.campaign:
        raise ConfigError(f"{root} is not a results directory: it has no journal.jsonl with a campaign in it")
    return state


def _phase(event: Event) -> PhaseState:
    arms = [
        ArmState(
            arm["arm"],
            arm["overrides"],
            {seed: trial_id for seed, trial_id in arm["trials"]},
            TrialWork(**arm["work"]) if "work" in arm else None,
        )
        for arm in event["arms"]
    ]
    return PhaseState(
        name=event["phase"],
        inherit=event["inherit"],
        base=event["base"],
        baseline=event["baseline"],
        arms=arms,
        seeds=event["seeds"],
        swept=event["swept"],
    )

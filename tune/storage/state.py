"""State of a campaign, rebuilt from its journal. Imports neither plans nor configs, so `status` does not load torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from ngpt.code.digest import Meanings
from ngpt.config.base import ConfigError
from tune.storage.divergence import with_divergence
from tune.storage.journal import JOURNAL, Event, JournalError, read_journal
from tune.storage.records import BetterArm, FreshDraw, Look, SearchRecord, TrialOutcome, TrialWork
from tune.storage.seed_ledger import plan_content

Overrides = Mapping[str, Any]  # settings by dotted name

GPU_SHARING_FIELDS = ("trials_per_device", "why", "device", "curve", "measured_at", "together")  # of `GpuSharing`
MIN_OLD_FRESH_SEED = 100  # smallest fresh seed of the versions before the ledger
DONE = ("finished", "diverged", "stopped")  # statuses that count as results; such a trial is not run again
FINAL = ("finished", "diverged")  # of these, those that no later session continues; it may continue a stopped trial


@dataclass(frozen=True)
class ArmState:
    """An arm in the journal."""

    name: str
    overrides: Overrides  # relative to the phase's base
    trial_ids: Mapping[int, str]  # by seed
    work: TrialWork | None = None  # cost of each trial; missing in older journals
    sources: tuple[str, ...] = ()  # the phases that handed settings on to this arm alone; unknown in older journals


@dataclass
class PhaseState:
    """A phase in the journal: its plan, and its winner once all its trials have ended."""

    name: str
    inherit: str | None
    base: Overrides
    baseline: str
    arms: list[ArmState]
    seeds: list[int]
    swept: Mapping[str, list[Any]]
    space: Mapping[str, Any] = field(default_factory=dict)  # of a search, see `Search.question`; empty in old journals
    winner: str | None = None  # known once the phase is finished
    winner_overrides: Overrides = field(default_factory=dict)  # what later phases inherit
    better: list[BetterArm] = field(default_factory=list)  # known with the winner
    best: BetterArm | None = None  # of a search, known with the winner: the arm to confirm, if any
    confirms: str | None = None  # the search phase whose best arm it compares again on fresh seeds
    hands_on_best: bool = False  # later phases start from the arm with the best mean, even if none is better
    fresh: FreshDraw | None = None  # how `seeds: fresh` was drawn; None for other phases
    seen: tuple[int, ...] = ()  # listed seeds of a phase that confirms a winner, which were looked at before
    tells_fresh: bool = True  # False in journals that do not say how seeds were chosen
    most_seeds: int | None = None  # the largest number of seeds of an arm, with `until: decided`
    looks: list[Look] = field(default_factory=list)  # with `until: decided`: one after each complete round of seeds

    @classmethod
    def from_event(cls, event: Event) -> "PhaseState":
        """The phase that a `phase_planned` event describes."""
        arms = [
            ArmState(
                arm["arm"],
                arm["overrides"],
                dict(arm["trials"]),
                arm.get("work") and TrialWork(**arm["work"]),
                tuple(arm.get("sources", ())),
            )
            for arm in event["arms"]
        ]
        plan = {name: event[name] for name in ("inherit", "base", "baseline", "seeds", "swept")}
        space = ((event.get("search") or {}).get("question") or {}).get("space", {})
        fresh = event.get("fresh")
        if fresh is not None:
            prior = fresh.get("prior")
            lists = {"seeds": tuple(fresh.get("seeds", event["seeds"])), "confirms": tuple(fresh["confirms"])}
            fresh = FreshDraw(**{**fresh, **lists, "prior": tuple(prior) if prior else None})
        plan |= {"fresh": fresh, "seen": tuple(event.get("seen", ())), "tells_fresh": "fresh" in event}
        looks = [Look.from_json(look) for look in event.get("looks", [])]
        rounds = {"most_seeds": event.get("most_seeds"), "looks": looks}
        roles = {"confirms": event.get("confirms"), "hands_on_best": event.get("hands_on_best", False)}
        return cls(name=event["phase"], arms=arms, space=space, **roles, **plan, **rounds)

    @property
    def trial_ids(self) -> list[str]:
        """The trial ids of all arms and seeds, in planned order."""
        return [trial_id for arm in self.arms for trial_id in arm.trial_ids.values()]

    @property
    def n_trials(self) -> int:
        """The number of trials of all arms."""
        return sum(len(arm.trial_ids) for arm in self.arms)

    @property
    def most_trials(self) -> int:
        """The number of trials if no arm is decided before its seeds are used up."""
        if self.most_seeds is None:
            return len(self.trial_ids)
        runs_on = {arm.name for arm in self.arms} if not self.looks else self.looks[-1].runs_on
        return sum(self.most_seeds if arm.name in runs_on else len(arm.trial_ids) for arm in self.arms)


def added_trials(planned: Mapping[str, Iterable[str]]) -> dict[str, set[str]]:
    """Returns the trial ids of each phase that no phase before it has; `planned` maps phases, in order, to theirs."""
    seen: set[str] = set()
    added = {}
    for phase, trial_ids in planned.items():
        added[phase] = set(trial_ids) - seen
        seen |= added[phase]
    return added


@dataclass
class CampaignState:
    """Everything the journal says about a campaign so far."""

    campaign: dict[str, Any] = field(default_factory=dict)  # the newest `campaign_started`
    phases: dict[str, PhaseState] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # of all sessions, on where their trials trained
    results: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # newest result by trial id
    running: dict[str, Event] = field(default_factory=dict)  # `trial_started` of trials without a result, by trial id
    waiting: set[str] = field(default_factory=set)  # of `running`, those for which a cluster has no room yet
    workers: int = 1  # trials or groups that can run concurrently now
    expected_stages: list[list[dict[str, Any]]] = field(default_factory=list)  # trials still to be planned, per stage
    attempts: dict[str, int] = field(default_factory=dict)  # number of the newest attempt, by trial id
    draws: dict[tuple[str, str], FreshDraw] = field(default_factory=dict)  # of all sessions, by phase and content
    last_seeds: dict[str, list[int]] = field(default_factory=dict)  # of the newest plan of each phase
    speeds: dict[str, float] = field(default_factory=dict)  # measured once, for `hold: seconds`
    gpu_sharing: dict[str, Any] = field(default_factory=dict)  # empty unless the number of trials per GPU was chosen
    searches: dict[str, SearchRecord] = field(default_factory=dict)  # newest by phase, of earlier sessions too
    status: str = "incomplete"
    started: str = ""  # start of the first session
    trained_on: dict[str, Any] = field(default_factory=dict)  # environment of the newest session that started a trial
    seconds: float = 0.0  # total duration of all ended sessions
    slot_seconds: float = 0.0  # the same, multiplied by the number of workers, which may change during a session
    resized: tuple[float, float] = (0.0, 0.0)  # when `workers` last changed, and the slot seconds of the session before
    max_slots: int = 1  # largest number of workers in any session
    newest: str = ""  # time of the newest event; only for display, since clocks jump
    elapsed: float | None = None  # seconds from the session start to that event; missing in older journals
    left_out: dict[str, int] = field(default_factory=dict)  # number of trials that a budget left out, by phase
    ended: bool = True  # whether the newest session has ended; False if it was killed
    # The versions of the code (ngpt/code/digest.py): the digests of its definitions, by version.
    code_versions: dict[str, Meanings] = field(default_factory=dict)
    code_of_start: dict[str, str | None] = field(default_factory=dict)  # version that began the newest attempt
    # Trials that count although their code differs from that of the newest session: what differs, by trial id.
    kept_code: dict[str, list[str]] = field(default_factory=dict)
    mixed_code: dict[str, list[str]] = field(default_factory=dict)  # continued from a checkpoint of other code
    accepted_code: dict[tuple[str, str], str] = field(default_factory=dict)  # when --keep was given; (before, now)
    copied: dict[str, str] = field(default_factory=dict)  # trials begun from files of another campaign: its name, by id
    unscored: set[str] = field(default_factory=set)  # trials that this session could not evaluate
    discarded: dict[str, int] = field(default_factory=dict)  # trials to train anew; number of the event that said so

    @property
    def environment(self) -> dict[str, Any]:
        """The environment that the trials ran in. A session that starts no trial does not change it."""
        return self.trained_on or self.campaign["environment"]

    @property
    def is_smoke(self) -> bool:
        """Whether the campaign ran with `--smoke`; older journals say so only in the command."""
        return self.campaign.get("smoke", "--smoke" in self.campaign.get("command", "").split())

    def outcome(self, trial_id: str, metric: str | None = None) -> TrialOutcome:
        """The outcome of a trial, with the value of `metric` (by default the campaign's metric)."""
        result = self.results.get(trial_id)
        if result is None:
            return TrialOutcome("missing")
        if result["status"] != "finished":  # metrics of a stopped trial come from fewer steps, others mislead
            return TrialOutcome(result["status"])
        metric = metric or self.campaign.get("metric", {}).get("name")  # a cut journal may lack its first line
        return TrialOutcome(result["status"], result["metrics"].get(metric))

    def orphans(self) -> list[Mapping[str, Any]]:
        """The results of trials that no arm of the campaign has any more, so that no summary shows them.

        They are left over when the file drops an arm or changes its settings. A phase without a winner may still plan
        its trials, and so may a phase that is not planned yet.
        """
        planned = {trial_id for phase in self.phases.values() for trial_id in phase.trial_ids}
        is_open = {name for name in self.campaign.get("expected_trials", {}) if name not in self.phases}
        is_open |= {phase.name for phase in self.phases.values() if phase.winner is None}
        done = [result for result in self.results.values() if result["status"] in DONE]
        return [result for result in done if result["trial_id"] not in planned and result["phase"] not in is_open]

    def dropped_phases(self) -> list[str]:
        """The phases of earlier sessions that the campaign does not have any more."""
        return [name for name in self.last_seeds if name not in self.campaign.get("expected_trials", {})]

    def session_seconds(self) -> float:
        """Seconds from the start of the newest session to its newest event; 0 if the session has ended."""
        if self.ended:
            return 0.0
        if self.elapsed is not None:
            return self.elapsed
        wall = datetime.fromisoformat(self.newest) - datetime.fromisoformat(self.campaign["time"])
        return max(0.0, wall.total_seconds())

    def session_slot_seconds(self, seconds: float) -> float:
        """Of the newest session, up to that many seconds after its start: seconds times workers."""
        since, slot_seconds = self.resized
        return slot_seconds + max(0.0, seconds - since) * self.workers

    def copy(self) -> "CampaignState":
        """A copy whose collections later events do not change, so that another thread can iterate over them."""
        copies = {"phases": dict(self.phases), "results": dict(self.results), "running": dict(self.running)}
        return replace(self, **copies, waiting=set(self.waiting))

    def apply(self, event: Event) -> None:
        """Updates the state with one event."""
        match event["event"]:
            case "campaign_started":
                self._start_session(event)
            case "speeds_measured":
                self.speeds = self.speeds | event["speeds"]
            case "packing_chosen":
                self.gpu_sharing = {name: event[name] for name in GPU_SHARING_FIELDS if name in event}
            case "phase_planned":
                if event["phase"] not in self.phases:
                    rest = ([row for row in stage if row["phase"] != event["phase"]] for stage in self.expected_stages)
                    self.expected_stages = [stage for stage in rest if stage]
                self._add_phase(PhaseState.from_event(event))
                self._record_search(event)
            case "trials_expected":
                self.expected_stages = event["stages"]
            case "code_version":
                self.code_versions[event["code_sha256"]] = event["files"]
            case "code_kept":
                self._keep_code(event)
            case "trials_discarded":
                self._discard(event)
            case "trial_started":
                self.discarded.pop(event["trial_id"], None)
                self.code_of_start[event["trial_id"]] = event.get("code_sha256")
                self.running[event["trial_id"]] = event
                self.attempts[event["trial_id"]] = event["attempt"]
                if event.get("copied_from"):
                    self.copied[event["trial_id"]] = event["copied_from"]
                self.trained_on = self.campaign.get("environment", {})
            case "trial_waiting":
                self.waiting |= {event["trial_id"]} & self.running.keys()
            case "trial_placed":
                self.waiting.discard(event["trial_id"])
            case "workers_changed":
                self._resize(event)
            case "trial_finished":
                self.running.pop(event["trial_id"], None)
                self.waiting.discard(event["trial_id"])
                self.discarded.pop(event["trial_id"], None)
                self.results[event["trial_id"]] = with_divergence(event)
                if "error" in (event["provenance"].get("evaluation") or {}):
                    self.unscored.add(event["trial_id"])
            case "worker_died":
                self.running.pop(event["trial_id"], None)
                self.waiting.discard(event["trial_id"])
            case "phase_finished":
                phase = self.phases.get(event["phase"])
                if phase is None or event["winner"] not in {arm.name for arm in phase.arms}:
                    raise ValueError("phase_finished: there is no such phase, or it has no such arm")
                phase.winner, phase.winner_overrides = event["winner"], event["winner_overrides"]
                phase.better = [BetterArm(**arm) for arm in event.get("better", [])]
                phase.best = BetterArm(**event["best"]) if event.get("best") else None
            case "campaign_ended":
                self.status, self.ended, self.running, self.waiting = event["status"], True, {}, set()
                self._add_session(event["seconds"])
                self.resized = (0.0, 0.0)
                self.left_out = event.get("left_out", {})
        self.newest, self.elapsed = event["time"], event.get("elapsed")

    def _record_search(self, event: Event) -> None:
        proposed = [arm["overrides"] for arm in event["arms"] if arm["overrides"]]
        search = event.get("search", {"proposed": proposed})
        if search is None or "proposed" not in search:  # the file lists the arms, or draws them at random
            self.searches.pop(event["phase"], None)
        else:
            fields = SearchRecord.__dataclass_fields__
            self.searches[event["phase"]] = SearchRecord(**{name: x for name, x in search.items() if name in fields})

    def _add_phase(self, phase: PhaseState) -> None:
        others = {seed for other in self.phases.values() if other.name != phase.name for seed in other.seeds}
        self.phases[phase.name], self.last_seeds[phase.name] = phase, phase.seeds
        draw = phase.fresh
        if not phase.tells_fresh and min(phase.seeds) >= MIN_OLD_FRESH_SEED and not others & set(phase.seeds):
            # An older version did not say so, but these are its fresh seeds: the trials that used them still count.
            identities = [next(iter(arm.trial_ids.values())).rpartition("-s")[0] for arm in phase.arms]
            draw = FreshDraw(plan_content(identities, len(phase.seeds)), tuple(phase.seeds), recorded=False)
        if draw is not None:
            self.draws[phase.name, draw.content] = draw

    def _start_session(self, event: Event) -> None:
        self._add_session(self.session_seconds())  # nonzero if the previous session was killed
        self.started = self.started or event["time"]
        self.notes = tuple(dict.fromkeys([*self.notes, *event.get("notes", [])]))
        self.max_slots = max(self.max_slots, event.get("workers", 1))
        self.campaign, self.phases, self.running, self.expected_stages = event, {}, {}, []
        self.waiting, self.workers, self.resized = set(), max(1, event.get("workers", 1)), (0.0, 0.0)
        self.status, self.ended, self.left_out, self.unscored = "incomplete", False, {}, set()
        # Failed trials are retried. Trials that were stopped early only count if this session stops early too.
        counted = DONE if event.get("stops_early", True) else [status for status in DONE if status != "stopped"]
        self.results = {i: result for i, result in self.results.items() if result["status"] in counted}

    def _keep_code(self, event: Event) -> None:
        self.kept_code = event["trials"]
        self.mixed_code = self.mixed_code | event["continued"]
        for before in event["versions"]:
            self.accepted_code.setdefault((before, event["code_sha256"]), event["time"])

    def _discard(self, event: Event) -> None:
        """Forgets trials whose old results, checkpoints and attempts do not count any more."""
        code = (self.code_of_start, self.kept_code, self.mixed_code)
        for trial_id in event["trial_ids"]:
            for table in (self.results, self.attempts, self.copied, *code):
                table.pop(trial_id, None)
            self.discarded[trial_id] = event["seq"]

    def _add_session(self, seconds: float) -> None:
        self.seconds += seconds
        self.slot_seconds += self.session_slot_seconds(seconds)

    def _resize(self, event: Event) -> None:
        seconds = event.get("elapsed") or 0.0
        self.resized = (seconds, self.session_slot_seconds(seconds))
        self.workers = event["workers"]
        self.max_slots = max(self.max_slots, self.workers)


def replay(events: Iterable[Event], path: Path = Path(JOURNAL)) -> CampaignState:
    """Rebuilds the state from all events, which were read from the journal `path`.

    Raises:
        JournalError: an event does not fit those before it.
    """
    state = CampaignState()
    for event in events:
        try:
            state.apply(event)
        except ValueError as error:
            raise JournalError(f"{path}:{event['seq']}: this line does not fit those before it: {error}") from None
    return state


def read_replayed(root: Path) -> CampaignState:
    """The state that the journal in `root` describes; empty if there is none.

    Raises:
        JournalError: the journal is damaged, or holds what no campaign writes.
    """
    path = root / JOURNAL
    return replay(read_journal(path), path)


def read_state(root: Path) -> CampaignState:
    """The state of the campaign in a results directory.

    Raises:
        ConfigError: `root` has no campaign.
        JournalError: the journal is damaged, or holds what no campaign writes.
    """
    state = read_replayed(root)
    if not state.campaign:
        raise ConfigError(f"{root} is not a results directory: it has no journal.jsonl with a campaign in it")
    return state

"""`--plan`: estimates how many trials a campaign trains, the disk space they need and how long they take."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ngpt.code.digest import current_code
from ngpt.config.base import ConfigError
from ngpt.model.flops import matrix_params
from ngpt.system.device import DTYPES, pick_device
from ngpt.system.timing import gemm_flops, slow_dtype_note
from ngpt.training.config import TrainConfig
from tune import format as fmt
from tune.analysis.noise import Method
from tune.analysis.power import Design, smallest_detectable
from tune.analysis.verdicts import judge
from tune.machine.gpu_memory import memory_notes
from tune.machine.gpu_sharing import known_trials_per_device
from tune.machine.placement import Placement, device_notes, place, this_machine
from tune.machine.throughput import device_key, known_speeds, measure_rank_speeds, measure_speeds, ranks_key
from tune.planning.advice import advice_on_phases
from tune.planning.budget import describe_budget
from tune.planning.code_changes import decide, find_code_changes
from tune.planning.equal_time import step_time_key
from tune.planning.forecast import expected_phases, has_result, known_result
from tune.planning.plan import PlannedPhase, trial_flops, trial_tokens, trial_work
from tune.planning.seeds import describe_seeds
from tune.spec.schema import Campaign
from tune.storage.state import CampaignState, read_replayed
from tune.trials.trial_group import expected_groups

STARTUP_SECONDS = 8.0  # start of Python and Ray, and the first import of torch in the workers
SECONDS_PER_TRIAL = 0.1  # overhead besides training and evaluation
EFFICIENCY = 0.25  # assumed FLOP rate of an unmeasured small eager step, as a share of that of a large matrix product


@dataclass(frozen=True)
class Noise:
    """The spread of the metric between seeds, and its source."""

    sd: float
    method: Method
    source: str  # for display

    def smallest_effect(self, phase: PlannedPhase, campaign: Campaign) -> float | None:
        """The smallest effect that a phase detects with 80 % power; None if it cannot detect any."""
        design = Design(len(phase.arms), self.sd, self.method, campaign.confidence, campaign.min_effect)
        return smallest_detectable(phase.most_seeds or len(phase.seeds), design)


@dataclass(frozen=True)
class PhaseEstimate:
    """Estimate for one phase. `to_run`, `tokens`, `disk_bytes` and `seconds` only count trials without a result."""

    phase: str
    inherit: str | None
    arms: int
    seeds: int
    trials: int
    to_run: int
    tokens: int
    disk_bytes: int
    seconds: float
    smallest_detectable: float | None  # effect detected with 80 % power; None if there is none or the noise is unknown
    most_trials: int  # if no arm is decided early (`until: decided`); otherwise the same as `trials`
    guessed: bool  # whether the phase depends on a winner that is not known yet
    which_seeds: str = ""  # such as `1001, 1002 and 1003`, or that they are not drawn yet


@dataclass(frozen=True)
class Estimate:
    """Estimate for a whole campaign; `--plan --json` prints it."""

    campaign: str
    results: str
    phases: Sequence[PhaseEstimate]
    trials: int  # trials shared by several phases count once
    most_trials: int  # if no arm is decided early
    to_run: int
    tokens: int
    disk_bytes: int
    seconds: float
    workers: int
    together: int  # number of trials that train concurrently in one worker
    ranks: int  # processes that train one trial together
    strategy: str  # how they share its model
    noise: Noise | None
    budget: str
    seconds_source: str
    code: list[str]  # what is to be said about trials of other code
    devices: list[str]  # what is to be said about GPUs that are not used
    memory: list[str]  # what the largest trial needs, and whether GPUs hold it
    advice: list[str]  # settings of the trials that are likely to be a mistake
    slow_dtype: str | None = None  # a dtype that this machine only emulates
    evaluation: str | None = None  # which downstream tasks run after how many trials


class _Clock:
    """Predicts training times from measured speeds, or from a FLOP rate for shapes without one.

    `trials` pairs each config with the number of trials that train concurrently in its worker. `measure` first times a
    few real steps of each shape. `source` says where the times come from.
    """

    def __init__(self, trials: Sequence[tuple[TrainConfig, int]], campaign: Campaign, *, measure: bool = False) -> None:
        base, resources = campaign.base, campaign.resources
        threads, n_ranks = resources.cpus_per_rank, resources.ranks_per_trial
        measure = measure and not resources.across_nodes  # what goes between nodes cannot be timed on this one
        if measure and n_ranks > 1:
            measure_rank_speeds((config for config, _ in trials), resources)
        elif measure:
            measure_speeds(trials, threads)
        self._speeds = known_speeds(device_key(base, threads, ranks=ranks_key(resources))) if trials else {}
        self.source = "measured just now" if measure else "from steps measured earlier on this machine"
        if n_missing := sum(self._known_speed(*trial) is None for trial in trials):
            torch.set_num_threads(threads)
            self._flop_rate = n_ranks * EFFICIENCY * gemm_flops(pick_device(base.device), DTYPES[base.dtype])
            share = "" if n_missing == len(trials) else f" for {n_missing} of {len(trials)} trials"
            rate = f"{self._flop_rate / 1e9:.3g} GFLOP/s"
            advice = "--measure times real steps"
            if resources.across_nodes:
                advice = "what the ranks exchange is not counted, and --measure cannot time it between nodes"
            self.source = f"estimated from the FLOP count{share} at {rate}; {advice}"
        elif not all((step_time_key(config), n_concurrent) in self._speeds for config, n_concurrent in trials):
            self.source += ", treating concurrent trials as sequential; --measure times real steps"

    def seconds(self, config: TrainConfig, n_concurrent: int) -> float:
        """Estimated worker seconds per trial if `n_concurrent` trials share the worker."""
        speed = self._known_speed(config, n_concurrent)
        seconds = trial_flops(config) / self._flop_rate if speed is None else trial_work(config) / speed
        return SECONDS_PER_TRIAL + seconds

    def _known_speed(self, config: TrainConfig, n_concurrent: int) -> float | None:
        """Tokens per second of `n_concurrent` such trials, or of a single one if only that was measured."""
        key = step_time_key(config)
        return self._speeds.get((key, n_concurrent), self._speeds.get((key, 1)))


def estimate(
    campaign: Campaign, root: Path, *, measure: bool = False, retrain: Sequence[str] | None = None, keep: bool = False
) -> Estimate:
    """Estimates the tokens, disk space and time that a campaign needs for the trials without a result in `root`.

    If no speed was measured for a shape on this device, its time is estimated from the FLOP count and the timing of a
    matrix product. `measure` first times a few real steps of each shape. Trials that train concurrently in one worker
    (`vectorise`) have speeds of their own; without one, they are assumed to take as long as sequential trials.
    `retrain` and `keep` are the options of the run, which decide about trials of other code.
    """
    state = read_replayed(root)
    campaign = replace(campaign, speeds=state.speeds)
    discarded, code_lines = _code_decision(campaign, state, root, retrain=retrain, keep=keep)
    for trial_id in discarded:
        state.results.pop(trial_id, None)
    phases = expected_phases(campaign, state)
    guessed = _guessed_phases(campaign, state, phases)
    workers = expected_placement(campaign, state).workers
    left = _trials_left(replace(campaign, evaluation=None), state, phases)
    to_run = {name: _with_group_sizes(configs, campaign, workers) for name, configs in left.items()}
    clock = _Clock([trial for trials in to_run.values() for trial in trials], campaign, measure=measure)
    noise, of_file = _noise(campaign, state), {phase.name: phase for phase in campaign.phases}
    rows = [
        _phase_estimate(
            phase,
            to_run[phase.name],
            lambda trial: clock.seconds(*trial) / workers,
            smallest_detectable=noise and noise.smallest_effect(phase, campaign),
            guessed=phase.name in guessed,
            which_seeds=describe_seeds(of_file[phase.name], phase.seeds, is_drawn=phase.fresh is not None),
        )
        for phase in phases
    ]
    n_to_run = sum(row.to_run for row in rows)
    n_trials = len({trial.trial_id for phase in phases for trial in phase.trials})
    return Estimate(
        campaign=campaign.name,
        results=str(root),
        phases=rows,
        trials=n_trials,
        most_trials=n_trials + sum(row.most_trials - row.trials for row in rows),
        to_run=n_to_run,
        tokens=sum(row.tokens for row in rows),
        disk_bytes=sum(row.disk_bytes for row in rows),
        seconds=sum(row.seconds for row in rows) + (STARTUP_SECONDS if n_to_run else 0.0),
        workers=workers,
        together=max((n_concurrent for trials in to_run.values() for _, n_concurrent in trials), default=1),
        ranks=campaign.resources.ranks_per_trial,
        strategy=campaign.resources.strategy,
        noise=noise,
        budget=describe_budget(campaign.budget),
        seconds_source=clock.source,
        code=code_lines,
        devices=device_notes(campaign.resources, device=campaign.base.device),
        memory=memory_notes((config for trials in to_run.values() for config, _ in trials), campaign.resources),
        slow_dtype=slow_dtype(campaign, (config for trials in to_run.values() for config, _ in trials)),
        advice=[] if campaign.smoke else advice_on_phases(phases),
        evaluation=_describe_evaluation(campaign, state, phases),
    )


def _describe_evaluation(campaign: Campaign, state: CampaignState, phases: Sequence[PlannedPhase]) -> str | None:
    """A line about the downstream tasks, which the times leave out; None if there are none."""
    if (evaluation := campaign.evaluation) is None:
        return None
    asking = [phase for phase in phases if evaluation.asks(phase.name)]
    left = {trial.trial_id for phase in asking for trial in phase.trials}
    done = {i for i in left if all(has_result(campaign, state, phase.name, i) for phase in asking)}
    names = fmt.listing([*evaluation.tasks, *(["core"] if evaluation.core is not None else [])])
    examples = f", {fmt.counted(evaluation.limit, 'example')} of each" if evaluation.limit else ""
    where = fmt.listing([phase.name for phase in asking])
    return (
        f"{names}{examples} after {fmt.counted(len(left - done), 'trial')} of {where}; the time above leaves them out"
    )


def _phase_estimate(
    phase: PlannedPhase,
    to_run: Sequence[tuple[TrainConfig, int]],
    seconds: Callable[[tuple[TrainConfig, int]], float],
    **fields: Any,
) -> PhaseEstimate:
    return PhaseEstimate(
        phase=phase.name,
        inherit=phase.inherit,
        arms=len(phase.arms),
        seeds=len(phase.seeds),
        trials=len(list(phase.trials)),
        most_trials=phase.most_trials,
        to_run=len(to_run),
        tokens=sum(trial_tokens(config) for config, _ in to_run),
        disk_bytes=sum(_disk_bytes(config) for config, _ in to_run),
        seconds=sum(map(seconds, to_run)),
        **fields,
    )


def _code_decision(
    campaign: Campaign, state: CampaignState, root: Path, *, retrain: Sequence[str] | None, keep: bool
) -> tuple[Sequence[str], list[str]]:
    """The trials of other code that the run would train anew, and what it would say about such trials."""
    changes = find_code_changes(campaign, state, root, current_code())
    decision = decide(changes, retrain=retrain, keep=True)
    stops = decision.versions and not keep
    return decision.discarded, changes.lines() if stops else list(decision.lines)


def check_budget(campaign: Campaign, root: Path) -> None:
    """Raises ConfigError if even the campaign's shortest trial takes longer than the budget allows."""
    if (hours := campaign.budget.hours) is None:
        return
    state = read_replayed(root)
    campaign = replace(campaign, speeds=state.speeds)
    phases = expected_phases(campaign, state)
    configs = {trial.config for phase in phases for trial in phase.trials if trial.seed == phase.seeds[0]}
    clock = _Clock([(config, 1) for config in configs], campaign)
    seconds = min(clock.seconds(config, 1) for config in configs)
    if hours * 3600 < seconds:
        text = f"{hours:g} hours are {fmt.duration(hours * 3600)}, and one trial takes about {fmt.duration(seconds)}"
        advice = f"give at least {seconds / 3600:.2g}, or shorten the trials"
        raise ConfigError(f"budget.hours: {text} ({clock.source}); {advice}")


def slow_dtype(campaign: Campaign, configs: Iterable[TrainConfig]) -> str | None:
    """A line about a dtype of these trials that this machine only emulates, or None."""
    device = pick_device(campaign.base.device)
    notes = (slow_dtype_note(device, dtype) for dtype in {config.dtype for config in configs})
    return next(filter(None, notes), None)


def expected_placement(campaign: Campaign, state: CampaignState) -> Placement:
    """How many trials a private Ray on this machine would run at once, asked as the executor asks.

    Raises:
        ConfigError: this machine has no room for even one trial.
    """
    resources, device = campaign.resources, campaign.base.device
    node = this_machine(resources, device=device)
    is_measured = resources.gpus_per_trial == "auto" and resources.ranks_per_trial == 1 and node["GPU"]
    shared = known_trials_per_device(campaign, state) if is_measured else None
    return place(resources, [node], device=device, trials_per_gpu=shared)


def _guessed_phases(campaign: Campaign, state: CampaignState, phases: Sequence[PlannedPhase]) -> set[str]:
    """The names of phases that depend on a winner that is not known yet."""
    needs = {phase.name: phase.needs for phase in campaign.phases}
    decided, guessed = set[str](), set[str]()
    for phase in phases:  # a phase comes after those that it needs
        if not needs[phase.name] <= decided:
            guessed.add(phase.name)
        elif known_result(campaign, state, phase):
            decided.add(phase.name)
    return guessed


def _trials_left(campaign: Campaign, state: CampaignState, phases: list[PlannedPhase]) -> dict[str, list[TrainConfig]]:
    """Configs of trials without a result, by phase. A trial shared by several phases is listed in the first."""
    todo: dict[str, tuple[str, TrainConfig]] = {}  # first phase and config, by trial id
    for phase in phases:
        for trial in phase.trials:
            if not has_result(campaign, state, phase.name, trial.trial_id):
                todo.setdefault(trial.trial_id, (phase.name, trial.config))
    return {phase.name: [config for first, config in todo.values() if first == phase.name] for phase in phases}


def _with_group_sizes(configs: list[TrainConfig], campaign: Campaign, workers: int) -> list[tuple[TrainConfig, int]]:
    """Pairs each trial with the number of trials that train concurrently in its worker, including itself."""
    if campaign.resources.vectorise == 1:
        return [(config, 1) for config in configs]
    groups = expected_groups(configs, workers=workers, max_size=campaign.resources.vectorise)
    return [(configs[index], len(group)) for group in groups for index in group]


def _noise(campaign: Campaign, state: CampaignState) -> Noise | None:
    """The noise given in the campaign file, or measured in the last finished phase."""
    if campaign.noise is not None:
        return Noise(campaign.noise, "paired", "set by `noise:`")
    metric = campaign.metric.name
    for phase in (phase for phase in reversed(state.phases.values()) if phase.winner is not None):
        outcomes = {arm.name: {s: state.outcome(i, metric) for s, i in arm.trial_ids.items()} for arm in phase.arms}
        judgement = judge(outcomes, baseline=phase.baseline, confidence=campaign.confidence)
        if judgement.noise.sd and judgement.noise.method:
            return Noise(judgement.noise.sd, judgement.noise.method, f"measured in phase {phase.name}")
    return None


def _disk_bytes(config: TrainConfig) -> int:
    """Disk space of a trial: checkpoints (weights and up to two moments, float32) and metrics."""
    assert config.model.vocab_size is not None
    params = matrix_params(config.model) + config.model.vocab_size * config.model.n_embd
    saves = -(-config.steps // config.checkpoint.every)
    rows = config.steps // config.tracker.log_every + config.steps // config.eval_every
    return params * 12 * min(saves, config.checkpoint.keep_last + 1) + rows * 200

"""`--plan`: what a campaign would train, how much disk it takes and how long, before anything is started."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ngpt.config.base import ConfigError
from ngpt.model.flops import matrix_params
from ngpt.system.device import DTYPES, pick_device
from ngpt.training.config import TrainConfig
from tune import format as fmt
from tune.analysis.verdicts import Method, detectable, judge
from tune.machine.environment import usable_cpus
from tune.machine.gpu_sharing import known_trials_per_device
from tune.machine.throughput import device_key, known_speeds, measure_speeds
from tune.planning.budget import describe_budget
from tune.planning.forecast import expected_phases, has_result, known_result
from tune.planning.plan import PlannedPhase, trial_flops, trial_tokens, trial_work
from tune.planning.shape import shape_key
from tune.spec.schema import Campaign
from tune.storage.journal import read_journal
from tune.storage.state import CampaignState, replay

STARTUP = 8.0  # seconds: interpreter, Ray, first import of torch in the workers
PER_TRIAL = 0.1  # seconds besides training and evaluation
EFFICIENCY = 0.25  # share of the matrix-product rate that a small eager step reaches, where none was measured


def estimate(campaign: Campaign, root: Path, *, measure: bool = False) -> dict[str, Any]:
    """Trials, tokens, bytes on disk and seconds, per phase and in all.

    Tokens, disk and time are those of the trials that are left to run: not of those that the journal in `root` has
    results of. The time comes from the newest speed measured on this device for each shape of model and batch; where
    there is none, from the FLOP count and a matrix product timed now. `measure` times a few real steps of each shape
    first, and remembers them. Trials that are trained at once in one worker (`vectorise`) have speeds of their own;
    where none was measured, they are taken to be as slow as one after another.
    """
    state = replay(read_journal(root / "journal.jsonl"))
    campaign = replace(campaign, speeds=state.speeds)
    phases = expected_phases(campaign, state)
    known = _known(campaign, state, phases)
    everything = {trial.trial_id for phase in phases for trial in phase.trials}
    left = {
        trial.trial_id: trial.config
        for phase in phases
        for trial in phase.trials
        if not has_result(campaign, state, phase.name, trial.trial_id)
    }
    workers = expected_workers(campaign)
    to_run = {
        phase.name: _in_company(
            [left.pop(trial.trial_id) for trial in phase.trials if trial.trial_id in left], campaign
        )
        for phase in phases
    }
    trials = [trial for found in to_run.values() for trial in found]
    if measure:
        measure_speeds(trials, campaign)
    speeds = known_speeds(device_key(campaign)) if trials else {}
    n_missing = sum(_known_speed(speeds, *trial) is None for trial in trials)
    rate = _flop_rate(campaign) if n_missing else None
    noise = _noise(campaign, state)
    rows = []
    for phase in phases:
        seconds = sum(_seconds(*trial, speeds, rate) for trial in to_run[phase.name]) / workers
        finds = _smallest_effect(campaign, phase, noise)
        rows.append(
            _row(phase, [config for config, _ in to_run[phase.name]], seconds)
            | {"smallest_detectable": finds, "guessed": not phase_needs(campaign, phase) <= known}
        )
    totals = {name: sum(row[name] for row in rows) for name in ("to_run", "tokens", "disk_bytes", "seconds")}
    return {
        "campaign": campaign.name,
        "results": str(root),
        "phases": rows,
        "trials": len(everything),  # a trial that two phases share is one
        **totals,
        "workers": workers,
        "together": max((together for _, together in trials), default=1),  # in one worker
        "noise": asdict(noise) if noise else None,
        "budget": describe_budget(campaign.budget),
        "seconds": totals["seconds"] + (STARTUP if totals["to_run"] else 0.0),
        "seconds_source": _source(
            measure, n_missing, totals["to_run"], rate, all(shape_key(*trial) in speeds for trial in trials)
        ),
    }


def _known(campaign: Campaign, state: CampaignState, phases: Sequence[PlannedPhase]) -> set[str]:
    """The phases, in order of need, whose winners are known; what was planned from a guess is a guess itself."""
    found = set[str]()
    for phase in phases:
        if phase_needs(campaign, phase) <= found and known_result(campaign, state, phase):
            found.add(phase.name)
    return found


def _in_company(configs: list[TrainConfig], campaign: Campaign) -> list[tuple[TrainConfig, int]]:
    """Each trial with how many are trained at once with it in its worker, itself included."""
    if campaign.resources.vectorise == 1:
        return [(config, 1) for config in configs]
    from tune.trials.trial_group import expected_groups

    found = expected_groups(configs, workers=expected_workers(campaign), most=campaign.resources.vectorise)
    return [(configs[index], len(group)) for group in found for index in group]


@dataclass(frozen=True)
class Noise:
    """The spread of the metric between seeds, and where it is from."""

    sd: float
    method: Method
    source: str


def _noise(campaign: Campaign, state: CampaignState) -> Noise | None:
    """What the campaign says, or what its newest finished phase has measured."""
    if campaign.noise is not None:
        return Noise(campaign.noise, "paired", "as the campaign says")
    for phase in reversed(state.phases.values()):
        if phase.winner is None:
            continue
        metric = campaign.metric.name
        cells = {arm.name: {s: state.outcome(i, metric) for s, i in arm.trial_ids.items()} for arm in phase.arms}
        found = judge(cells, baseline=phase.baseline, confidence=campaign.confidence)
        if found.noise_sd and found.method:
            return Noise(found.noise_sd, found.method, f"measured in phase {phase.name}")
    return None


def _smallest_effect(campaign: Campaign, phase: PlannedPhase, noise: Noise | None) -> float | None:
    if noise is None:
        return None
    n_seeds, n_arms = len(phase.seeds), len(phase.arms)
    return detectable(n_seeds, n_arms, noise.sd, method=noise.method, confidence=campaign.confidence)


def check_budget(campaign: Campaign, root: Path) -> None:
    """Refuses a budget of hours in which not even the campaign's shortest trial would come to its end.

    Raises:
        ConfigError: with the time that a trial takes, and where that number is from.
    """
    hours = campaign.budget.hours
    if hours is None:
        return
    state = replay(read_journal(root / "journal.jsonl"))
    campaign = replace(campaign, speeds=state.speeds)
    phases = expected_phases(campaign, state)
    configs = {trial.config for phase in phases for trial in phase.trials if trial.seed == phase.seeds[0]}
    speeds = known_speeds(device_key(campaign))
    n_missing = sum(shape_key(config) not in speeds for config in configs)
    rate = _flop_rate(campaign) if n_missing else None
    seconds = min(_seconds(config, 1, speeds, rate) for config in configs)
    if hours * 3600 < seconds:
        source = _source(False, n_missing, len(configs), rate)
        needed = f"one trial takes about {fmt.duration(seconds)} ({source})"
        text = f"{hours:g} hours are {fmt.duration(hours * 3600)}, and {needed}"
        raise ConfigError(f"budget.hours: {text}; give at least {seconds / 3600:.2g}, or shorten the trials")


def _row(phase: PlannedPhase, to_run: list[TrainConfig], seconds: float) -> dict[str, Any]:
    """One phase of the estimate."""
    return {
        "phase": phase.name,
        "inherit": phase.inherit,
        "arms": len(phase.arms),
        "seeds": len(phase.seeds),
        "trials": len(phase.arms) * len(phase.seeds),
        "to_run": len(to_run),
        "tokens": sum(map(trial_tokens, to_run)),
        "disk_bytes": sum(map(_disk, to_run)),
        "seconds": seconds,
    }


def _source(measured: bool, n_missing: int, n: int, rate: float | None, is_own: bool = True) -> str:
    """Where the time comes from, in words; `is_own` says that trials at once have speeds that were measured at once."""
    text = "measured just now" if measured else "from steps measured here before"
    if rate is not None:
        share = "" if n_missing == n else f" for {n_missing} of {n} trials"
        text = f"estimated from the FLOP count{share} at {rate / 1e9:.0f} GFLOP/s"
    elif not is_own:
        text += ", for trials at once as if one came after the other"
    return text if rate is None and is_own else f"{text}; --measure times real steps"


def plan_view(estimated: Mapping[str, Any]) -> RenderableType:
    """The estimate as a table for people."""
    table = Table(title=f"plan of {fmt.plain(estimated['campaign'])}", title_justify="left", box=None, pad_edge=False)
    noise = estimated["noise"]
    for name in ("phase", "arms", "seeds", "trials", "to run", "tokens", "disk", "time", *(["finds"] if noise else [])):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for row in (*estimated["phases"], {"phase": "in all", "arms": "", "seeds": "", "guessed": False} | dict(estimated)):
        phase = fmt.plain(row["phase"]) + (" *" if row["guessed"] else "")
        numbers = (row["arms"], row["seeds"], row["trials"], row["to_run"])
        sizes = (fmt.count(row["tokens"]), fmt.size(row["disk_bytes"]), fmt.duration(row["seconds"]))
        least = row.get("smallest_detectable")
        finds = [fmt.MISSING if least is None else f"{least:.2g}"] if noise and "smallest_detectable" in row else []
        table.add_row(Text(phase), *map(str, numbers), *sizes, *finds)
    workers, together = estimated["workers"], estimated["together"]
    at_once = (
        f"{fmt.counted(workers, 'trial')} at once"
        if together == 1
        else f"{together} trials at once in each of {fmt.counted(workers, 'worker')}"
    )
    lines = [f"{at_once}; time {estimated['seconds_source']}"]
    if shared := sum(row["trials"] for row in estimated["phases"]) - estimated["trials"]:
        one = "1 trial of a later phase is the same as an earlier one and is trained once"
        many = f"{shared} trials of later phases are the same as earlier ones and are trained once"
        lines.append(one if shared == 1 else many)
    if noise:
        spread = f"a spread between seeds of {noise['sd']:.2g}, {noise['source']}"
        lines.append(f"finds: the smallest effect that 4 of 5 such phases would find, from {spread}")
    if estimated["budget"]:
        lines.append(f"budget: no trial begins after {estimated['budget']}; above is what there is without one")
    if any(row["guessed"] for row in estimated["phases"]):
        stands_in = "the first arm of that phase, or its winner of last time, stands in for it"
        lines.append(f"* starts from a winner that is not known yet; {stands_in}")
    lines.append(f"results in {estimated['results']}")
    return Group(table, Text(), *(Text(fmt.plain(line)) for line in lines))


def phase_needs(campaign: Campaign, phase: PlannedPhase) -> set[str]:
    """The phases whose winners a planned phase builds on."""
    return next(p.needs for p in campaign.phases if p.name == phase.name)


def expected_workers(campaign: Campaign) -> int:
    """How many trials this machine would run at once."""
    resources = campaign.resources
    rooms = [usable_cpus() // resources.cpus_per_trial]
    if pick_device(campaign.base.device).type == "cuda":
        import torch

        share, gpus = resources.gpus_per_trial, torch.cuda.device_count()
        packed = known_trials_per_device(campaign) if share == "auto" else int(1 / float(share) + 1e-9)
        rooms.append(gpus * packed if packed else int(gpus / float(share)))
    return max(1, resources.workers or min(rooms))


def _flop_rate(campaign: Campaign) -> float:
    import torch

    from ngpt.system.timing import gemm_flops

    torch.set_num_threads(campaign.resources.cpus_per_trial)
    return gemm_flops(pick_device(campaign.base.device), DTYPES[campaign.base.dtype]) * EFFICIENCY


def _known_speed(speeds: Mapping[str, float], config: TrainConfig, together: int) -> float | None:
    """Tokens per second of so many such trials at once, or of one, where that is all that is known."""
    return speeds.get(shape_key(config, together), speeds.get(shape_key(config)))


def _seconds(config: TrainConfig, together: int, speeds: Mapping[str, float], rate: float | None) -> float:
    """What a trial takes of its worker's time: of that of all that train at once, its share."""
    speed = _known_speed(speeds, config, together)
    if speed is not None:
        return PER_TRIAL + trial_work(config) / speed
    assert rate is not None
    return PER_TRIAL + trial_flops(config) / rate


def _disk(config: TrainConfig) -> int:
    """Bytes of a trial: checkpoints (weights and up to two moments, float32) and metrics."""
    assert config.model.vocab_size is not None
    params = matrix_params(config.model) + config.model.vocab_size * config.model.n_embd
    saves = -(-config.steps // config.checkpoint.every)
    rows = config.steps // config.tracker.log_every + config.steps // config.eval_every
    return params * 12 * min(saves, config.checkpoint.keep_last + 1) + rows * 200

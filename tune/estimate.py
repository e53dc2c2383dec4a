"""`--plan`: what a campaign would train, how much disk it takes and how long, before anything is started."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ngpt.config import content_hash, settings
from ngpt.flops import matrix_params
from ngpt.train import TrainConfig, pick_device
from tune import format as fmt
from tune.campaign import Campaign
from tune.environment import usable_cpus
from tune.plan import PlannedPhase, preview, trial_flops, trial_tokens
from tune.state import DONE, State, replay

STARTUP = 8.0  # seconds: interpreter, Ray, first import of torch in the workers
PER_TRIAL = 0.1  # seconds besides training and evaluation
EFFICIENCY = 0.25  # share of the matrix-product rate that a small eager step reaches, where none was measured
SPEED_SETTINGS = ("batch_size", "micro_batch_size", "dtype")  # besides all of `model.`
NOT_SPEED = ("model.alpha", "model.logit_scale", "model.rope_base")


def estimate(campaign: Campaign, root: Path, *, measure: bool = False) -> dict[str, Any]:
    """Trials, tokens, bytes on disk and seconds, per phase and in all.

    The time comes from the newest step measured on this device for each shape of model and batch; where there is none,
    from the FLOP count and a matrix product timed now. `measure` times a few real steps of each shape first.
    """
    phases = preview(campaign)
    device = device_key(campaign)
    configs = {trial.trial_id: trial.config for phase in phases for trial in phase.trials}
    speeds = _measure(configs.values(), campaign) if measure else known_speeds(device)
    missing = [config for config in configs.values() if shape_key(config) not in speeds]
    rate = _flop_rate(campaign) if missing else None
    workers = expected_workers(campaign)
    done = _done_ids(root)
    rows, seen = [], set()
    for phase in phases:
        fresh = [trial for trial in phase.trials if trial.trial_id not in seen]
        seen |= {trial.trial_id for trial in fresh}
        to_run = [trial.config for trial in fresh if trial.trial_id not in done]
        rows.append(
            {
                "phase": phase.name,
                "inherit": phase.inherit,
                "arms": len(phase.arms),
                "seeds": len(phase.seeds),
                "trials": len(list(phase.trials)),
                "to_run": len(to_run),
                "tokens": sum(map(trial_tokens, to_run)),
                "disk_bytes": sum(map(_disk, to_run)),
                "seconds": sum(_seconds(config, speeds, rate) for config in to_run) / workers,
                "guessed": bool(phase_needs(campaign, phase)),
            }
        )
    source = "measured just now" if measure else "from steps measured here before"
    if missing:
        share = "" if len(missing) == len(configs) else f" for {len(missing)} of {len(configs)} trials"
        source = f"estimated from the FLOP count{share} at {rate / 1e9:.0f} GFLOP/s; --measure times real steps"
    totals = {name: sum(row[name] for row in rows) for name in ("trials", "to_run", "tokens", "disk_bytes")}
    seconds = sum(row["seconds"] for row in rows)
    return {
        "campaign": campaign.name,
        "results": str(root),
        "phases": rows,
        **totals,
        "workers": workers,
        "seconds": seconds + (STARTUP if totals["to_run"] else 0.0),
        "seconds_source": source,
    }


def plan_view(estimated: Mapping[str, Any]) -> RenderableType:
    """The estimate as a table for people."""
    table = Table(title=f"plan of {fmt.plain(estimated['campaign'])}", title_justify="left", box=None, pad_edge=False)
    for name in ("phase", "arms", "seeds", "trials", "to run", "tokens", "disk", "time"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for row in (*estimated["phases"], {"phase": "in all", "arms": "", "seeds": "", "guessed": False} | dict(estimated)):
        phase = fmt.plain(row["phase"]) + (" *" if row["guessed"] else "")
        numbers = (row["arms"], row["seeds"], row["trials"], row["to_run"])
        sizes = (fmt.count(row["tokens"]), fmt.size(row["disk_bytes"]), fmt.duration(row["seconds"]))
        table.add_row(Text(phase), *map(str, numbers), *sizes)
    lines = [f"{estimated['workers']} trials at once; time {estimated['seconds_source']}"]
    if any(row["guessed"] for row in estimated["phases"]):
        lines.append("* starts from a winner that is not known yet; the first arm of that phase stands in for it")
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

        share = 1.0 if resources.gpus_per_trial == "auto" else float(resources.gpus_per_trial)
        rooms.append(int(torch.cuda.device_count() / share))
    return max(1, resources.workers or min(rooms))


def shape_key(config: TrainConfig) -> str:
    """Configs with the same key take equally long per step."""
    kept = {name for name in settings(TrainConfig) if name in SPEED_SETTINGS or name.startswith("model.")}
    left_out = set(settings(TrainConfig)) - kept | set(NOT_SPEED)
    return content_hash(config, leave_out=left_out)


def device_key(campaign: Campaign) -> str:
    """The device and the threads that a measured speed holds for."""
    from tune.trial import machine

    threads = campaign.resources.cpus_per_trial
    about = machine(campaign.base.device, threads)
    return f"{about['host']} {about['device']} {threads} threads"


def remember_speeds(campaign: Campaign, state: State, configs: Mapping[str, TrainConfig]) -> None:
    """Keeps the throughput of this campaign's trials for later plans on this machine."""
    path, device = _speeds_file(), device_key(campaign)
    rows = {}
    for trial_id, config in configs.items():
        result = state.results.get(trial_id)
        if result and result["status"] == "finished" and result["seconds"]:
            # With evaluation and checkpoints, since that is what a trial costs.
            rows[shape_key(config)] = result["metrics"]["tokens"] / result["seconds"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for shape, speed in rows.items():
            file.write(json.dumps({"device": device, "shape": shape, "tokens_per_second": speed}) + "\n")


def known_speeds(device: str) -> dict[str, float]:
    """Tokens per second by shape, the newest measured on this device."""
    path = _speeds_file()
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["shape"]: row["tokens_per_second"] for row in rows if row["device"] == device}


def _speeds_file() -> Path:
    return Path(os.environ.get("NGPT_CACHE") or "~/.cache/ngpt").expanduser() / "speeds.jsonl"


def _measure(configs: Iterable[TrainConfig], campaign: Campaign) -> dict[str, float]:
    import torch

    from ngpt.bench import step

    torch.set_num_threads(campaign.resources.cpus_per_trial)
    shapes = {shape_key(config): config for config in configs}
    return {shape: step(config, warmup=3, steps=10)["tokens_per_second"] for shape, config in shapes.items()}


def _flop_rate(campaign: Campaign) -> float:
    import torch

    from ngpt.bench import gemm_flops
    from ngpt.train import DTYPES

    torch.set_num_threads(campaign.resources.cpus_per_trial)
    return gemm_flops(pick_device(campaign.base.device), DTYPES[campaign.base.dtype]) * EFFICIENCY


def _seconds(config: TrainConfig, speeds: Mapping[str, float], rate: float | None) -> float:
    speed = speeds.get(shape_key(config))
    if speed is not None:
        return PER_TRIAL + trial_tokens(config) / speed
    assert rate is not None
    return PER_TRIAL + trial_flops(config) / rate


def _disk(config: TrainConfig) -> int:
    """Bytes of a trial: checkpoints (weights and up to two moments, float32) and metrics."""
    assert config.model.vocab_size is not None
    params = matrix_params(config.model) + config.model.vocab_size * config.model.n_embd
    saves = -(-config.steps // config.checkpoint.every)
    rows = config.steps // config.tracker.log_every + config.steps // config.eval_every
    return params * 12 * min(saves, config.checkpoint.keep_last + 1) + rows * 200


def _done_ids(root: Path) -> set[str]:
    from tune.journal import read_journal

    state = replay(read_journal(root / "journal.jsonl"))
    return {trial_id for trial_id, result in state.results.items() if result["status"] in DONE}

"""Two results directories side by side: what they share, what differs, and what that did to the same arms.

Arms are matched by what their trials compute, not by name: the settings of the records, without the seed. What is not
comparable is refused with the reason, since a difference of losses over different tokens says nothing about arms.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from ngpt.config.base import ConfigError, is_identity, settings, unknown_message
from ngpt.training.config import TrainConfig
from tune.analysis.verdicts import holm, judge
from tune.results.phase_summary import phase_records
from tune.storage.records import TrialOutcome
from tune.storage.state import CampaignState, read_state

Comparison = dict[str, Any]
Record = dict[str, Any]

GOALS = {"val_loss": "minimize", "val_bpb": "minimize", "train_loss": "minimize"}  # of metrics every trial has
LOSSES = ("val_loss", "train_loss")  # per token, so they mean something within one tokenizer only
EXACT = ("val_loss", "val_bpb", "train_loss")  # equal in all digits: the same computation


@dataclass
class Arm:
    """The trials of one configuration in one results directory, whatever phases they belong to."""

    names: list[str] = field(default_factory=list)  # phase/arm
    records: dict[int, Record] = field(default_factory=dict)  # by seed


@dataclass
class Side:
    """One results directory."""

    root: Path
    state: CampaignState
    base: Mapping[str, Any]

    @property
    def data(self) -> Mapping[str, Any]:
        """What its corpus is: hashes, tokenizer and counts, as `describe_data` has them."""
        return self.state.campaign["data"]

    @property
    def metric(self) -> Mapping[str, str]:
        """The `name` that its arms are ranked by, and the `goal`."""
        return self.state.campaign["metric"]


def compare(first: Path, second: Path, *, metric: str | None = None) -> Comparison:
    """What two results directories have in common, and the difference of each arm that both have (`second` - `first`).

    Differences are paired over the seeds that both have finished; without such seeds they are those of two samples.
    P-values are Holm-corrected over the arms that are compared. `metric` defaults to that of the campaigns.

    Raises:
        ConfigError: there is no campaign, or the two cannot be compared; the message says why and what can be.
        OSError: a file cannot be read.
    """
    a, b = _read(first), _read(second)
    name, goal = _metric(a, b, metric)
    _check_data(a, b, name)
    drop = _data_settings(a, b)
    left, right = _arms(a, drop), _arms(b, drop)
    rules = [side.state.campaign for side in (a, b)]
    confidence = max(rule["confidence"] for rule in rules)
    min_effect = max(rule["min_effect"] for rule in rules)
    timed = _throughput_note(a, b)
    rows = [_compare_arm(left[key], right[key], name, goal, confidence) for key in left if key in right]
    _judge_all(rows, goal, confidence, min_effect)
    for row in rows if timed else []:
        row["tokens_per_second"]["ratio"] = None
    return {
        "a": _about(a),
        "b": _about(b),
        "metric": {"name": name, "goal": goal},
        "confidence": confidence,
        "min_effect": min_effect,
        "environment": _differences(a.state.environment, b.state.environment),
        "data": _differences(a.data, b.data),
        "base": _differences(a.base, b.base),
        "code": _differences(_code(left), _code(right)),
        "arms": rows,
        "only_a": [arm.names for key, arm in left.items() if key not in right],
        "only_b": [arm.names for key, arm in right.items() if key not in left],
        "throughput_note": timed,
    }


def _read(root: Path) -> Side:
    state = read_state(root)
    manifest = json.loads((root / "manifest.json").read_text(encoding="utf-8"))
    return Side(root, state, manifest["base"])


def _metric(a: Side, b: Side, wanted: str | None) -> tuple[str, str]:
    """The metric to compare by and its goal, agreed on by both campaigns."""
    own = {side.metric["name"]: side.metric["goal"] for side in (a, b)}
    if wanted is not None and wanted not in GOALS | own:
        raise ConfigError(f"--metric {wanted}: {unknown_message('metric', wanted, GOALS | own)}")
    name = wanted or a.metric["name"]
    if wanted is None and len(own) > 1:
        raise ConfigError(
            f"not comparable: {a.root} ranks by {a.metric['name']} and {b.root} by {b.metric['name']}; "
            f"choose one with --metric, such as --metric val_bpb"
        )
    goals = [side.metric["goal"] for side in (a, b) if side.metric["name"] == name]
    if len(set(goals)) > 1:
        raise ConfigError(f"not comparable: {name} has the goal {goals[0]} in {a.root} and {goals[1]} in {b.root}")
    return name, goals[0] if goals else GOALS[name]


def _check_data(a: Side, b: Side, metric: str) -> None:
    """Refuses losses over different tokens.

    Bits per byte compare across tokenizers, on the same corpus: the tokens that they are measured on differ then.
    """
    if a.data["eval_sha256"] == b.data["eval_sha256"]:
        return
    tokenizers = [side.data["tokenizer_sha256"] or side.data["tokenizer"] for side in (a, b)]
    if a.data["corpus"] != b.data["corpus"]:
        reason = f"the corpora differ ({a.data['corpus']} and {b.data['corpus']}), no metric compares across them"
    elif tokenizers[0] == tokenizers[1]:
        counts = f"{a.data['eval_tokens']} ({_short(a)}) and {b.data['eval_tokens']} ({_short(b)})"
        reason = f"the evaluation tokens differ: {counts}; run one of them again with the data of the other"
    elif metric in LOSSES:
        names = f"{a.data['tokenizer']} and {b.data['tokenizer']}"
        both = all(_has(side, "val_bpb") for side in (a, b))
        advice = "; bits per byte can be compared: --metric val_bpb" if both else ""
        reason = f"the tokenizers differ ({names}), and {metric} is a loss per token{advice}"
    else:
        return
    raise ConfigError(f"not comparable: {reason}")


def _short(side: Side) -> str:
    return side.data["eval_sha256"][:12]


def _has(side: Side, metric: str) -> bool:
    return any(result["metrics"].get(metric) is not None for result in side.state.results.values())


def _data_settings(a: Side, b: Side) -> set[str]:
    """Settings that say where the data are and how they are tokenised, as far as the two campaigns differ in them.

    What the corpora hold is compared by its hashes.
    """
    differing = {name for name in a.base.keys() | b.base.keys() if a.base.get(name) != b.base.get(name)}
    drop = {name for name in differing if name.startswith("data.")} | {"data.path"}
    return drop if a.data["vocab_size"] == b.data["vocab_size"] else drop | {"model.vocab_size"}


def _arms(side: Side, drop: set[str]) -> dict[str, Arm]:
    """Arms by the settings of their trials: those that decide what is computed and are not the default."""
    defaults = {name: info.default for name, info in settings(TrainConfig).items()}
    identity = {name for name in defaults if is_identity(TrainConfig, name)}
    arms: dict[str, Arm] = {}
    for phase in side.state.phases.values():
        for record in phase_records(side.state, phase):
            config = {
                name: value
                for name, value in record["config"].items()
                if name != "seed"
                and name not in drop
                and (name not in defaults or (name in identity and value != _plain(defaults[name])))
            }
            arm = arms.setdefault(json.dumps(config, sort_keys=True), Arm())
            name = f"{phase.name}/{record['arm']}"
            arm.names += [] if name in arm.names else [name]
            arm.records.setdefault(record["seed"], record)
    return arms


def _plain(value: Any) -> Any:
    """As JSON reads it back."""
    return list(value) if isinstance(value, tuple) else value


def _compare_arm(a: Arm, b: Arm, metric: str, goal: Any, confidence: float) -> Comparison:
    """One arm that both have: its difference, and whether its trials agree in every digit."""
    shared = sorted(a.records.keys() & b.records.keys())
    sides = [arm.records if not shared else {seed: arm.records[seed] for seed in shared} for arm in (a, b)]
    cells = {name: _outcomes(records, metric) for name, records in zip("ab", sides, strict=True)}
    finished = {name: {s: c for s, c in row.items() if c.status == "finished"} for name, row in cells.items()}
    excluded = {name: sorted({c.status for c in row.values()} - {"finished"}) for name, row in cells.items()}
    judgement = judge(
        finished, baseline="a", goal=goal, confidence=confidence, metric=metric, method="paired" if shared else "pooled"
    )
    delta = next(arm.delta for arm in judgement.arms if arm.arm == "b")
    same = bool(shared) and all(_equal(a.records[seed], b.records[seed]) for seed in shared)
    lost = [f"{status} in {name.upper()}" for name, statuses in excluded.items() for status in statuses]
    return {
        "a": a.names,
        "b": b.names,
        "seeds": shared,
        "paired": bool(shared),
        "n": {name: len(row) for name, row in finished.items()},
        "score": {name: _mean([c.value for c in row.values()]) for name, row in finished.items()},
        "delta": asdict(delta) if delta and not lost else None,
        "identical": same,
        "lost": lost,
        "tokens_per_second": _speeds(a, b),
    }


def _outcomes(records: Mapping[int, Record], metric: str) -> dict[int, TrialOutcome]:
    return {seed: TrialOutcome(record["status"], record["metrics"].get(metric)) for seed, record in records.items()}


def _equal(a: Record, b: Record) -> bool:
    return a["status"] == b["status"] != "failed" and all(a["metrics"].get(m) == b["metrics"].get(m) for m in EXACT)


def _judge_all(rows: Sequence[Comparison], goal: str, confidence: float, min_effect: float) -> None:
    """Corrects the p-values over all rows and gives each its verdict, of B against A."""
    judged = [row["delta"] for row in rows if row["delta"] and row["delta"]["p"] is not None]
    for delta, adjusted in zip(judged, holm([delta["p"] for delta in judged]), strict=True):
        delta["p_holm"] = adjusted
    for row in rows:
        row["verdict"] = _verdict(row, goal, 1 - confidence, min_effect)


def _verdict(row: Comparison, goal: str, alpha: float, min_effect: float) -> str:
    delta = row["delta"]
    if row["identical"]:
        return "identical in every trial"
    if row["lost"]:
        return ", ".join(row["lost"])
    if delta is None or delta["p_holm"] is None:
        return "no claim"
    if delta["p_holm"] >= alpha or abs(delta["mean"]) < min_effect * (1 - 1e-9):
        return "tie"
    return "B better" if (delta["mean"] < 0) == (goal == "minimize") else "A better"


def _speeds(a: Arm, b: Arm) -> dict[str, float | None]:
    speeds = {
        name: _mean([record["metrics"].get("tokens_per_second") for record in arm.records.values()])
        for name, arm in (("a", a), ("b", b))
    }
    return speeds | {"ratio": speeds["b"] / speeds["a"] if speeds["a"] and speeds["b"] is not None else None}


def _throughput_note(a: Side, b: Side) -> str | None:
    """Why throughputs have no ratio: trials that share a device, or a process, are slower than those that do not."""
    results = [side.state.results.values() for side in (a, b)]
    workers = [side.state.campaign["workers"] for side in (a, b)]
    groups = [max((r["provenance"].get("vectorised", 1) for r in ended), default=1) for ended in results]
    if workers[0] == workers[1] and groups[0] == groups[1]:
        return None
    at_once = [f"{n} x {size}" if size > 1 else f"{n}" for n, size in zip(workers, groups, strict=True)]
    return f"no throughput ratio: {at_once[0]} trials ran at a time in A, {at_once[1]} in B"


def _about(side: Side) -> dict[str, Any]:
    campaign = side.state.campaign
    kept = ("campaign", "description", "metric", "data", "workers", "command")
    about = {"results": str(side.root), "status": side.state.status, "started_at": side.state.started}
    return about | {"environment": side.state.environment} | {name: campaign[name] for name in kept}


def _code(arms: Mapping[str, Arm]) -> dict[str, Any]:
    """The library versions that the trials themselves report."""
    records = [record for arm in arms.values() for record in arm.records.values()]
    return {
        name: ", ".join(sorted({str(record["provenance"][name]) for record in records if name in record["provenance"]}))
        for name in ("code_sha256", "threads")
    }


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]]:
    """What differs, as `name: [a, b]`; a name that one side lacks is null there."""
    names = dict.fromkeys([*a, *b])
    return {name: [a.get(name), b.get(name)] for name in names if a.get(name) != b.get(name)}


def _mean(values: Sequence[float | None]) -> float | None:
    return fmean(known) if (known := [value for value in values if value is not None]) else None

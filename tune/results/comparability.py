"""Decides whether two results directories can be compared, and by which metric."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ngpt.config.base import ConfigError, unknown_message
from ngpt.downstream.config import is_score
from ngpt.system.atomic_files import read_regular
from tune import format as fmt
from tune.spec.metrics import COST_GOALS, KNOWN_METRICS, metric_goal, score_goal
from tune.storage.state import CampaignState, read_state
from tune.storage.summaries import Objective

RULES = ("limit", "num_fewshot")  # what else scores depend on
ACROSS_TOKENIZERS = ("val_bpb", *COST_GOALS)  # other metrics are comparable only with the same tokenizer


@dataclass
class Results:
    """A results directory, with the contents of its journal and manifest."""

    root: Path
    state: CampaignState
    base: Mapping[str, Any]
    data: Mapping[str, Any]  # hashes, tokenizer and counts of the corpus, as `describe_data` returns them
    metric: Objective  # ranks its arms


def read_results(root: Path) -> Results:
    """Reads the journal of a results directory, and the manifest if the journal is of an old version."""
    state = read_state(root)
    base = state.campaign["base"] if "base" in state.campaign else _base_in_manifest(root / "manifest.json")
    return Results(root, state, base, state.campaign["data"], Objective(**state.campaign["metric"]))


def _base_in_manifest(path: Path) -> Mapping[str, Any]:
    try:
        base = json.loads(read_regular(path))["base"]
    except (ValueError, KeyError, TypeError, RecursionError):
        base = None
    if not isinstance(base, dict):
        raise ConfigError(f"{path}: it has no settings under `base`")
    return base


def choose_objective(a: Results, b: Results, wanted: str | None) -> Objective:
    """Returns the metric to compare by, with its goal.

    Raises:
        ConfigError: `wanted` is unknown, or the campaigns differ in their metrics or goals.
    """
    goals_by_metric = {side.metric.name: side.metric.goal for side in (a, b)}
    scores = {name for side in (a, b) for result in side.state.results.values() for name in result["metrics"]}
    scores = set(filter(is_score, scores))  # of the downstream tasks that trials have run
    if wanted is not None and wanted not in (known := {*KNOWN_METRICS, *goals_by_metric, *scores}):
        raise ConfigError(f"--metric {wanted}: {unknown_message('metric', wanted, known)}")
    if wanted is None and len(goals_by_metric) > 1:
        text = f"{a.root} ranks by {a.metric.name} and {b.root} by {b.metric.name}"
        raise ConfigError(f"not comparable: {text}; choose one with --metric, such as --metric val_bpb")
    name = wanted or a.metric.name
    goals = [side.metric.goal for side in (a, b) if side.metric.name == name]
    if len(set(goals)) > 1:
        raise ConfigError(f"not comparable: {name} has the goal {goals[0]} in {a.root} and {goals[1]} in {b.root}")
    goal = goals[0] if goals else score_goal(name) if name in scores else metric_goal(name) or "minimize"
    if goal is None:
        raise ConfigError(f"lm-eval does not say whether lower or higher {name} is better, and no campaign ranks by it")
    return Objective(name, goal)


def check_data(a: Results, b: Results, metric: str) -> None:
    """Rejects comparisons of losses over different evaluation tokens, and of scores over different examples.

    Bits per byte can be compared across tokenizers if the corpus is the same, scores of downstream tasks across both.

    Raises:
        ConfigError: the values of `metric` cannot be compared; the message gives the reason.
    """
    if is_score(metric):
        _check_asked(a, b, metric)
        return
    if a.data["eval_sha256"] == b.data["eval_sha256"]:
        return
    tokenizers = [side.data["tokenizer_sha256"] or side.data["tokenizer"] for side in (a, b)]
    if a.data["corpus"] != b.data["corpus"]:
        reason = f"the corpora differ ({a.data['corpus']} and {b.data['corpus']}), no metric compares across them"
    elif tokenizers[0] == tokenizers[1]:
        counts = [f"{side.data['eval_tokens']} ({side.data['eval_sha256'][:12]})" for side in (a, b)]
        reason = f"the evaluation tokens differ: {' and '.join(counts)}; run one of them again with the other's data"
    elif metric not in ACROSS_TOKENIZERS:
        names = f"{a.data['tokenizer']} and {b.data['tokenizer']}"
        logged = [[result["metrics"].get("val_bpb") for result in side.state.results.values()] for side in (a, b)]
        have_bits = all(any(value is not None for value in values) for values in logged)
        advice = "; bits per byte can be compared: --metric val_bpb" if have_bits else ""
        reason = f"the tokenizers differ ({names}), and {metric} depends on the tokens{advice}"
    else:
        return
    raise ConfigError(f"not comparable: {reason}")


def _check_asked(a: Results, b: Results, score: str) -> None:
    """Rejects scores of other examples, or with other numbers of examples before each one."""
    results = [result for side in (a, b) for result in side.state.results.values() if score in result["metrics"]]
    asked = [(result["provenance"].get("evaluation") or {}).get("asked") for result in results]
    rules = dict.fromkeys(", ".join(f"{name} {fmt.value(each.get(name))}" for name in RULES) for each in asked if each)
    if len(rules) > 1:
        raise ConfigError(f"not comparable: {score} was measured with {' and with '.join(rules)}")


def data_settings(a: Results, b: Results) -> set[str]:
    """Returns the data settings to ignore when arms are matched, since data are compared by their hashes."""
    differing = {name for name in a.base.keys() | b.base.keys() if a.base.get(name) != b.base.get(name)}
    ignored = {name for name in differing if name.startswith("data.")} | {"data.path"}
    return ignored if a.data["vocab_size"] == b.data["vocab_size"] else ignored | {"model.vocab_size"}

"""The data behind the page's table of trials."""

import json
from pathlib import Path
from typing import Any

import pytest

from tune.report.explorer import (
    ALL_METRIC_POINTS,
    ALL_TRIAL_POINTS,
    MAX_HISTOGRAMS,
    MAX_TRIAL_POINTS,
    MIN_TRIAL_POINTS,
    Details,
    explore,
    flops_per_token,
)
from tune.report.trial_logs import DETAILS, MAX_SAMPLE, curves_by_arm
from tune.storage.summaries import ArmSummary, CampaignSummary, PhaseSummary, TrialRecord

CONFIG = {"seed": 1, "steps": 10, "model.n_layer": 2, "model.n_head": 2, "model.n_embd": 8, "model.vocab_size": 100}
CONFIG |= {"model.block_size": 4, "model.alpha": 0.05, "model.mlp": "relu2", "tracker.run_name": "x"}


def record(arm: str, seed: int, **more: Any) -> TrialRecord:
    own = {"seed": seed, "tracker.run_name": f"{arm} seed {seed}", "model.alpha": 0.1 if arm == "b" else 0.05}
    facts: dict[str, Any] = {"status": "finished", "metrics": {"steps": 10, "val_loss": 4.0 + seed, "note": "text"}}
    facts |= more
    return TrialRecord("c", "p", arm, f"{arm}-{seed}", seed, {}, CONFIG | own, **facts)


def campaign(*arms: str) -> CampaignSummary:
    summaries = tuple(
        ArmSummary(arm, n, verdict="baseline" if arm == "a" else "worse") for n, arm in enumerate(arms, 1)
    )
    return CampaignSummary("c", phases=(PhaseSummary(phase="p", arms=summaries, baseline="a", winner="a"),))


def test_each_trial_has_its_numbers_under_the_names_of_the_metrics() -> None:
    failed = record("b", 2, status="failed", metrics={"val_loss": None}, error="OSError: no disk\n\nadvice")
    data = explore(campaign("a", "b"), {}, Details([record("a", 1), failed]))
    assert data["metrics"] == ["val_loss", "steps"]
    assert data["trials"][0][:8] == [0, 0, 1, "a-1", "finished", None, "", [5.0, 10.0]]
    assert data["trials"][1][:8] == [0, 1, 2, "b-2", "failed", None, "OSError: no disk", [None, None]]


def test_settings_that_vary_are_listed_without_seed_and_bookkeeping() -> None:
    data = explore(campaign("a", "b"), {}, Details([record("a", 1), record("a", 2), record("b", 1)]))
    assert data["settings"] == ["model.alpha"]
    assert [arm["settings"] for arm in data["phases"][0]["arms"]] == [["0.05"], ["0.1"]]
    assert [arm["diff"] for arm in data["phases"][0]["arms"]] == [[], [["model.alpha", "0.05", "0.1"]]]


def test_flops_of_a_token_follow_the_published_formula() -> None:
    # 6 per entry of the matrices (query, key, value, output: 4 d^2; two of the MLP: 8 d^2; head: V d), and
    # 12 layers * width * context for the attention scores.
    d, layers, vocabulary, context = 8, 2, 100, 4
    by_hand = 6 * (layers * 12 * d * d + vocabulary * d) + 12 * layers * d * context
    assert flops_per_token([record("a", 1)]) == {("p", "a"): by_hand}


def test_settings_of_another_version_have_no_flops() -> None:
    assert flops_per_token([TrialRecord("c", "p", "a", "t", 1, {}, {"model.gone": 1}, "finished", {})]) == {}


def test_curves_share_their_grids_and_are_thinned_honestly() -> None:
    trials = [record("a", seed) for seed in (1, 2)]
    rows = [
        {
            "phase": "p",
            "arm": "a",
            "trial_id": f"a-{seed}",
            "seed": seed,
            "step": step,
            "tokens": 10 * step,
            "val_loss": seed + step / 1e6,
        }
        for seed in (1, 2)
        for step in range(0, 5000, 10)
    ]
    data = explore(campaign("a"), curves_by_arm(rows), Details(trials))
    (grid,) = data["grids"]
    assert len(grid["steps"]) == data["points"] == MAX_TRIAL_POINTS
    assert (grid["steps"][0], grid["steps"][-1], grid["tokens"][-1]) == (0, 4990, 49900)
    for trial in data["trials"]:
        number, values = trial[8]["val_loss"]
        assert number == 0 and values[-1] == pytest.approx(trial[2] + 0.00499, abs=1e-4)


def test_trials_have_curves_of_all_that_they_log_unless_there_are_too_many() -> None:
    def data(seeds: int) -> dict[str, Any]:
        known = {"phase": "p", "arm": "a", "val_loss": 4.0, "grad_norm": 1 / 3, "lr": 1e-3, "accuracy": 0.5}
        steps = [{"step": step, "tokens": 10 * step} for step in range(20)]
        rows = [{**known, **step, "seed": n, "trial_id": f"a-{n}"} for n in range(seeds) for step in steps]
        logs = curves_by_arm(rows, ["accuracy", *DETAILS])
        return explore(campaign("a"), logs, Details([record("a", seed) for seed in range(seeds)]))

    few = data(2)
    assert few["curves"] == ["accuracy", "grad_norm", "lr"]  # not what nothing has logged
    assert few["trials"][0][8] == {
        "val_loss": [0, [4.0] * 20],
        "accuracy": [0, [0.5] * 20],
        "grad_norm": [0, [0.33333] * 20],
        "lr": [0, [0.001] * 20],
    }
    many = data(ALL_METRIC_POINTS // (3 * MIN_TRIAL_POINTS) + 1)
    assert many["curves"] == [] and set(many["trials"][0][8]) == {"val_loss"}


def test_thousands_of_trials_share_a_budget_of_points() -> None:
    trials = [record("a", seed) for seed in range(3000)]
    data = explore(campaign("a"), {}, Details(trials))
    assert len(data["trials"]) == 3000
    assert 10 <= data["points"] <= ALL_TRIAL_POINTS / 3000


def test_texts_are_read_from_the_folders_of_trials(tmp_path: Path) -> None:
    for seed, text in enumerate(("plain\n\ttext \n\n", "\x1b[31mred\u202e</script>", "x" * (MAX_SAMPLE + 1), "")):
        (tmp_path / "trials" / f"a-{seed}").mkdir(parents=True)
        (tmp_path / "trials" / f"a-{seed}" / "sample.txt").write_text(text)
    trials = [record("a", seed) for seed in range(5)]
    texts = explore(campaign("a"), {}, Details(trials, tmp_path))["samples"]
    assert (list(texts), texts["a-0"], texts["a-2"]) == (["a-0", "a-1", "a-2"], "plain\n\ttext", "x" * MAX_SAMPLE + "…")
    assert texts["a-1"].endswith("</script>") and not {"\x1b", "\u202e"} & set(texts["a-1"])


def test_histograms_are_read_from_the_folders_of_trials(tmp_path: Path) -> None:
    trials = [record("a", seed) for seed in range(MAX_HISTOGRAMS + 1)] + [record("b", 0)]
    for trial in trials:
        folder = tmp_path / "trials" / trial.trial_id
        folder.mkdir(parents=True)
        line = {"step": 0, "name": "r/mlp.0", "edges": [0.0, 1.0], "counts": [7]}
        (folder / "histograms.jsonl").write_text(json.dumps(line) + "\n")
    few = explore(campaign("a"), {}, Details(trials[:2], tmp_path))["histograms"]
    assert few == {f"a-{seed}": {"r/mlp.0": [[0, 0.0, 1.0, [7]]]} for seed in (0, 1)}
    assert set(explore(campaign("a", "b"), {}, Details(trials, tmp_path))["histograms"]) == {"a-0", "b-0"}

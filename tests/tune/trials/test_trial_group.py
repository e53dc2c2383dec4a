"""Trials at once: each has the record that it would have alone, and fails, stops and goes on by itself."""

import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ngpt.config.base import override
from ngpt.ensemble.stack import Stack
from ngpt.training.config import TrainConfig
from tests.helpers.tiny_run import finish
from tune.trials.trial import TrialResult, TrialSpec, run_trial
from tune.trials.trial_group import batchable, expected_groups, group_size, run_trials


def trial(name: str, folder: Path, config: TrainConfig, **changes: Any) -> TrialSpec:
    config = override(config, changes)
    return TrialSpec(name, "alpha", name, config.seed, config, folder / name, threads=1, attempt=1)


@pytest.fixture
def specs(tiny: TrainConfig, tmp_path: Path) -> list[TrialSpec]:
    varied = [{"seed": 1}, {"seed": 1, "model.alpha": 0.3}, {"seed": 2, "optim.name": "muon"}]
    return [trial(f"t{i}", tmp_path / "together", tiny, **changes) for i, changes in enumerate(varied)]


def ended(
    specs: Sequence[TrialSpec], *, stop: Collection[str] = ()
) -> tuple[dict[str, TrialResult], list[tuple[str, TrialResult]]]:
    """What became of each trial, and all that was said before; those in `stop` are stopped at their evaluation 2."""
    results: dict[str, TrialResult] = {}
    said: list[tuple[str, TrialResult]] = []
    loop, answer = run_trials(specs), None
    while True:
        try:
            news = loop.send(answer)
        except StopIteration:
            return results, said
        assert not results.keys() & (news.ended.keys() | news.interim.keys())
        results |= news.ended
        said += news.interim.items()
        answer = [name for name in stop if [who for who, _ in said].count(name) == 2]


def alone(spec: TrialSpec, folder: Path) -> TrialResult:
    return finish(run_trial(replace(spec, folder=folder / spec.trial_id)))


def test_every_trial_has_the_result_that_it_has_alone(specs: list[TrialSpec], tmp_path: Path) -> None:
    results, said = ended(specs)
    for spec in specs:
        single, many = alone(spec, tmp_path / "alone"), results[spec.trial_id]
        assert (many.status, many.error, many.metrics.keys()) == ("finished", None, single.metrics.keys())
        for name in ("val_loss", "val_bpb", "train_loss", "steps", "tokens", "n_params"):
            assert many.metrics[name] == pytest.approx(single.metrics[name], abs=1e-4)
        assert many.provenance == single.provenance | {"vectorised": 3}
        reached = [interim for who, interim in said if who == spec.trial_id]
        assert [interim.metrics["steps"] for interim in reached] == [0, 3, 6, 8]
        assert {interim.status for interim in reached} == {"stopped"}
        assert json.loads((spec.folder / "config.json").read_text())["seed"] == spec.seed


def test_a_trial_that_fails_is_one_record_among_others(specs: list[TrialSpec]) -> None:
    alone(replace(specs[1], config=override(specs[1].config, {"seed": 9})), specs[1].folder.parent)
    results, _ = ended(specs)
    assert [results[spec.trial_id].status for spec in specs] == ["finished", "failed", "finished"]
    assert "seed = 9" in (results["t1"].error or "")
    assert "seed = 9" in (specs[1].folder / "error.txt").read_text()


def test_a_trial_can_be_stopped_early(specs: list[TrialSpec]) -> None:
    results, said = ended(specs, stop=["t0"])
    assert results.keys() == {"t1", "t2"}
    assert [interim.metrics["steps"] for who, interim in said if who == "t0"] == [0, 3]


def test_a_lone_trial_is_an_ordinary_one(specs: list[TrialSpec]) -> None:
    results, _ = ended(specs[:1])
    assert results["t0"].status == "finished" and "vectorised" not in results["t0"].provenance


def test_what_fails_for_all_is_tried_one_by_one(
    specs: list[TrialSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, calls = Stack.losses, []

    def breaks(stack: Stack, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append(idx.shape)
        if len(calls) == 5:
            raise RuntimeError("no room for three")
        return losses(stack, idx, targets)

    monkeypatch.setattr(Stack, "losses", breaks)
    specs = [replace(spec, config=override(spec.config, {"checkpoint.every": 2})) for spec in specs]
    results, said = ended(specs, stop=["t2"])
    assert {name: result.status for name, result in results.items()} == {"t0": "finished", "t1": "finished"}
    assert len(calls) == 5
    assert results["t0"].metrics["val_loss"] == pytest.approx(
        alone(specs[0], tmp_path / "alone").metrics["val_loss"], abs=1e-4
    )
    assert [interim.metrics["steps"] for who, interim in said if who == "t0"] == [
        0,
        3,
        6,
        8,
    ]  # from the checkpoint at 4


def test_trials_of_one_graph_are_taken_together(specs: list[TrialSpec], tiny: TrainConfig, tmp_path: Path) -> None:
    other = trial("wide", tmp_path, tiny, **{"model.n_embd": 32})
    threads = replace(specs[1], threads=2)
    assert batchable(specs[0], [other, threads, *specs[1:]], most=8) == specs
    assert batchable(specs[0], [other, *specs[1:]], most=2) == specs[:2]
    assert batchable(other, specs, most=8) == [other]


@pytest.mark.parametrize(
    ("waiting", "workers", "most", "size"),
    [(8, 2, 8, 4), (9, 2, 8, 5), (24, 2, 8, 8), (8, 1, 8, 8), (3, 1, 8, 3), (1, 4, 8, 1), (3, 0, 8, 3)],
)
def test_what_waits_is_divided_among_the_workers(waiting: int, workers: int, most: int, size: int) -> None:
    assert group_size(waiting, workers, most=most) == size


def test_groups_are_foreseen_as_workers_that_keep_pace_would_take_them(tiny: TrainConfig) -> None:
    wide, compiled = override(tiny, {"model.n_embd": 32}), override(tiny, {"compile": True})
    seeds = [override(tiny, {"seed": seed}) for seed in range(9)]
    assert list(map(len, expected_groups(seeds, workers=2, most=8))) == [5, 4]
    assert list(map(len, expected_groups(seeds, workers=1, most=4))) == [4, 4, 1]
    assert expected_groups([tiny, wide, seeds[3], wide], workers=1, most=4) == [[0, 2], [1, 3]]
    assert expected_groups([compiled, compiled], workers=1, most=4) == [[0], [1]]
    assert expected_groups([], workers=2, most=4) == []

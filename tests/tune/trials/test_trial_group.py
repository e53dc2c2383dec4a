"""Trials that train together: each has the record that it has alone, and fails, stops and resumes on its own."""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ngpt.config.base import override
from ngpt.ensemble.stack import Stack
from ngpt.training.config import TrainConfig
from tests.helpers.fake_gpus import FakeGpus
from tests.helpers.tiny_run import finish
from tune.trials.trial import TrialResult, TrialSpec, run_trial
from tune.trials.trial_group import GpuUnusable, expected_groups, group_size, run_trials


def trial(name: str, folder: Path, config: TrainConfig, **changes: Any) -> TrialSpec:
    config = override(config, changes)
    return TrialSpec(name, "alpha", name, config.seed, config, folder / name, threads=1, attempt=1)


@pytest.fixture
def specs(tiny: TrainConfig, tmp_path: Path) -> list[TrialSpec]:
    varied = [{"seed": 1}, {"seed": 1, "model.alpha": 0.3}, {"seed": 2, "optim.name": "muon"}]
    return [trial(f"t{i}", tmp_path / "together", tiny, **changes) for i, changes in enumerate(varied)]


def run_all(
    specs: Sequence[TrialSpec], *, stop: Collection[str] = ()
) -> tuple[dict[str, TrialResult], dict[str, list[TrialResult]]]:
    """Final and interim results by trial; the trials in `stop` are stopped at their second evaluation."""
    results: dict[str, TrialResult] = {}
    interim: dict[str, list[TrialResult]] = {spec.trial_id: [] for spec in specs}
    loop, answer = run_trials(specs), None
    while True:
        try:
            updates = loop.send(answer)
        except StopIteration:
            return results, interim
        assert not results.keys() & (updates.ended.keys() | updates.interim.keys())
        results |= updates.ended
        for name, result in updates.interim.items():
            interim[name].append(result)
        answer = [name for name in stop if len(interim[name]) == 2]


def steps_of(results: list[TrialResult]) -> list[float | None]:
    return [result.metrics["steps"] for result in results]


def alone(spec: TrialSpec, folder: Path) -> TrialResult:
    return finish(run_trial(replace(spec, folder=folder / spec.trial_id)))


def test_every_trial_has_the_result_that_it_has_alone(specs: list[TrialSpec], tmp_path: Path) -> None:
    results, interim = run_all(specs)
    for spec in specs:
        single, many = alone(spec, tmp_path / "alone"), results[spec.trial_id]
        assert (many.status, many.error, many.metrics.keys()) == ("finished", None, single.metrics.keys())
        for name in ("val_loss", "val_bpb", "train_loss", "steps", "tokens", "n_params"):
            assert many.metrics[name] == pytest.approx(single.metrics[name], abs=1e-4)
        assert many.provenance == single.provenance | {"vectorised": 3}
        assert steps_of(interim[spec.trial_id]) == [0, 3, 6, 8]
        assert {result.status for result in interim[spec.trial_id]} == {"stopped"}
        assert json.loads((spec.folder / "config.json").read_text())["seed"] == spec.seed


def test_a_trial_that_fails_does_not_end_the_others(specs: list[TrialSpec]) -> None:
    alone(replace(specs[1], config=override(specs[1].config, {"seed": 9})), specs[1].folder.parent)
    results, _ = run_all(specs)
    assert [results[spec.trial_id].status for spec in specs] == ["finished", "failed", "finished"]
    assert "seed = 9" in (results["t1"].error or "")
    assert "seed = 9" in (specs[1].folder / "error.txt").read_text()


def test_trials_whose_gpu_becomes_unusable_do_not_fail_with_the_one_that_caused_it(
    specs: list[TrialSpec], monkeypatch: pytest.MonkeyPatch, fake_gpus: Callable[..., FakeGpus]
) -> None:
    """A failed assertion in a kernel stays in the process: whatever trained there next would fail, too."""
    fake = fake_gpus(count=1)
    monkeypatch.setattr(Stack, "losses", lambda *_: fake.break_context())
    on_gpu = [replace(spec, config=override(spec.config, {"device": "auto"})) for spec in specs]
    with pytest.raises(GpuUnusable):
        run_all(on_gpu)
    assert not any((spec.folder / "error.txt").exists() for spec in specs)


def test_a_trial_can_be_stopped_early(specs: list[TrialSpec]) -> None:
    results, interim = run_all(specs, stop=["t0"])
    assert results.keys() == {"t1", "t2"}
    assert steps_of(interim["t0"]) == [0, 3]


def test_a_group_of_one_is_an_ordinary_trial(specs: list[TrialSpec]) -> None:
    results, _ = run_all(specs[:1])
    assert results["t0"].status == "finished" and "vectorised" not in results["t0"].provenance


def test_trials_that_fail_together_continue_one_by_one(
    specs: list[TrialSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, calls = Stack.losses, []

    def fails_once(stack: Stack, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append(idx.shape)
        if len(calls) == 5:
            raise RuntimeError("no room for three")
        return losses(stack, idx, targets)

    monkeypatch.setattr(Stack, "losses", fails_once)
    specs = [replace(spec, config=override(spec.config, {"checkpoint.every": 2})) for spec in specs]
    results, interim = run_all(specs, stop=["t2"])
    assert {name: result.status for name, result in results.items()} == {"t0": "finished", "t1": "finished"}
    assert len(calls) == 5
    assert results["t0"].metrics["val_loss"] == pytest.approx(
        alone(specs[0], tmp_path / "alone").metrics["val_loss"], abs=1e-4
    )
    assert steps_of(interim["t0"]) == [0, 3, 6, 8]  # from the checkpoint at 4


@pytest.mark.parametrize(
    ("waiting", "workers", "max_size", "size"),
    [(8, 2, 8, 4), (9, 2, 8, 5), (24, 2, 8, 8), (8, 1, 8, 8), (3, 1, 8, 3), (1, 4, 8, 1), (3, 0, 8, 3)],
)
def test_waiting_trials_are_divided_among_the_workers(waiting: int, workers: int, max_size: int, size: int) -> None:
    assert group_size(waiting, workers, max_size=max_size) == size


def test_expected_groups_are_those_of_workers_that_keep_pace(tiny: TrainConfig) -> None:
    wide, compiled = override(tiny, {"model.n_embd": 32}), override(tiny, {"compile": True})
    seeds = [override(tiny, {"seed": seed}) for seed in range(9)]
    assert list(map(len, expected_groups(seeds, workers=2, max_size=8))) == [5, 4]
    assert list(map(len, expected_groups(seeds, workers=1, max_size=4))) == [4, 4, 1]
    assert expected_groups([tiny, wide, seeds[3], wide], workers=1, max_size=4) == [[0, 2], [1, 3]]
    assert expected_groups([compiled, compiled], workers=1, max_size=4) == [[0], [1]]
    assert expected_groups([], workers=2, max_size=4) == []

"""Updates of several runs: each has its own optimizers and projection period; all roll back if memory runs out."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ngpt.config.base import override
from ngpt.data.dataset import Dataset
from ngpt.ensemble.train import train_together
from ngpt.ensemble.update import update_together
from ngpt.model.diagnostics import weight_norm_error
from ngpt.training.config import TrainConfig, resolved
from ngpt.training.run import Run, RunResult, set_up
from tests.helpers.tiny_run import run


def run_with_gradients(config: TrainConfig, folder: Path, dataset: Dataset) -> Run:
    run = set_up(resolved(config), folder, resume=None, dataset=dataset)
    generator = torch.Generator().manual_seed(0)
    for parameter in run.model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    run.state.step = 2
    return run


def test_each_run_has_its_own_update_and_projection_period(tiny: TrainConfig, dataset: Dataset, tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {"project_every": 1, "optim.name": "muon"},
        {"project_every": 2, "optim.name": "muon", "optim.lr": 0.05},
        {"project_every": 3, "optim.name": "adamw"},
        {"project_every": 3, "optim.name": "muon", "optim.lr": 0.0},
    ]
    runs = [run_with_gradients(override(tiny, change), tmp_path, dataset) for change in changes]
    before = [[parameter.detach().clone() for parameter in run.model.parameters()] for run in runs]
    update_together(runs)
    assert [weight_norm_error(run.model) < 1e-5 for run in runs] == [True, True, False, True]
    moved = [
        max(float((new.detach() - old).abs().max()) for new, old in zip(run.model.parameters(), olds, strict=True))
        for run, olds in zip(runs, before, strict=True)
    ]
    assert min(moved[:3]) > 1e-3 and moved[3] == 0
    assert moved[0] < moved[1]


def test_an_optimizer_out_of_memory_rolls_all_runs_back(
    tiny: TrainConfig, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = override(tiny, {"checkpoint.every": 2, "eval_every": 4})
    configs = [override(config, {"seed": seed}) for seed in (0, 1)]
    step, calls = torch.optim.AdamW.step, []

    def step_out_of_memory(optimizer: torch.optim.AdamW, closure: None = None) -> Any:
        calls.append(optimizer)
        if len(calls) == 6:  # the third step has changed the first run's weights and not the second's
            raise MemoryError
        return step(optimizer, closure)

    results: dict[int, RunResult] = {}
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step_out_of_memory)
        for events in train_together(configs, [tmp_path / "a", tmp_path / "b"], dataset=dataset):
            results |= {index: event for index, event in events.items() if isinstance(event, RunResult)}
    for index, one in enumerate(configs):
        expected = run(one, tmp_path / f"alone{index}", dataset).metrics
        assert results[index].metrics["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-4)
        assert results[index].metrics["micro_batch_size"] == 2 and expected["micro_batch_size"] == 4


def test_no_runs_need_no_update() -> None:
    update_together([])

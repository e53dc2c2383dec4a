"""Runs trained together give the results of single runs, and do not affect each other."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ngpt.config.base import ConfigError, override
from ngpt.data.dataset import Dataset
from ngpt.ensemble.stack import Stack
from ngpt.ensemble.train import Event, ensemble_incompatibility, train_step_together, train_together
from ngpt.model.diagnostics import weight_norm_error
from ngpt.training.config import TrainConfig, resolved
from ngpt.training.loop import train, update
from ngpt.training.run import Run, RunResult, set_up
from tests.helpers.tiny_run import rows, run, weights

TOLERANCE = 1e-4  # nats of validation loss after 50 steps in float32
SHORT = {"model.n_layer": 1, "steps": 12, "eval_every": 6, "eval_tokens": 64}
SWEEP: list[dict[str, Any]] = [  # typical variations of a campaign
    {"seed": 1, "model.alpha": 0.05, "optim.lr": 0.01},
    {"seed": 1, "model.alpha": 0.3, "optim.lr": 0.02, "project_every": 3, "schedule.warmup_steps": 4},
    {"seed": 2, "model.logit_scale": 5.0, "optim.lr": 0.01, "optim.weight_decay": 0.1, "schedule.name": "trapezoid"},
]
MODELS: dict[str, dict[str, Any]] = {
    "official nGPT": {},
    "nGPT with Muon": SHORT | {"optim.name": "muon", "optim.lr_other": 0.02, "model.norm_mode": "ema"},
    "seed rule, dotprod": SHORT | {"model.residual": "seed", "model.norm_mode": "dotprod", "model.alpha_kind": "head"},
    "GPT": SHORT | {"model.residual": "add", "model.mlp": "relu2", "model.softcap": 15.0, "data.order": "reservoir"},
    "awkward": SHORT
    | {
        "optim.name": "geodesic_muon",
        "model.residual": "slerp",
        "model.n_kv_head": 1,
        "model.tied": True,
        "model.alpha_learned": False,
        "model.norm_probability": 0.5,
        "micro_batch_size": 2,
    },
}


def together(
    configs: Sequence[TrainConfig],
    folders: Sequence[Path],
    dataset: Dataset,
    *,
    resume: str | None = None,
    stop: Collection[int] = (),
) -> dict[int, list[Event]]:
    """Trains to the end; returns all events of each run. Runs in `stop` are stopped at their second evaluation."""
    found: dict[int, list[Event]] = {index: [] for index in range(len(configs))}
    loop = train_together(configs, folders, resume=resume, dataset=dataset)
    answer: list[int] | None = None
    while True:
        try:
            events = loop.send(answer)
        except StopIteration:
            return found
        for index, event in events.items():
            found[index].append(dict(event) if isinstance(event, dict) else event)
        answer = [index for index in stop if len(found[index]) == 2]


def result_of(events: list[Event]) -> RunResult:
    assert isinstance(events[-1], RunResult), events[-1]
    return events[-1]


def assert_same_run(config: TrainConfig, one: Path, other: Path) -> None:
    """Asserts that both folders hold the same rows and final weights."""
    for left, right in zip(rows(one), rows(other), strict=True):
        assert left.keys() == right.keys()
        for name in ("step", "train_loss", "val_loss", "lr"):
            assert left.get(name) == pytest.approx(right.get(name), abs=TOLERANCE)
    left, right = weights(one, config.steps), weights(other, config.steps)
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_allclose(left[name], right[name], atol=2e-3)


@pytest.mark.parametrize("kind", MODELS)
def test_runs_trained_together_equal_single_runs(
    kind: str, tiny: TrainConfig, dataset: Dataset, tmp_path: Path
) -> None:
    common = {"steps": 50, "eval_every": 25, "eval_tokens": 64, "tracker.log_every": 5} | MODELS[kind]
    configs = [override(tiny, common | changes) for changes in SWEEP]
    seen = together(configs, [tmp_path / f"together{i}" for i in range(3)], dataset)
    for i, config in enumerate(configs):
        alone, joint = run(config, tmp_path / f"alone{i}", dataset), result_of(seen[i])
        assert joint.status == alone.status == "finished" and joint.data == alone.data
        assert joint.metrics["val_loss"] == pytest.approx(alone.metrics["val_loss"], abs=TOLERANCE)
        assert joint.metrics["tokens"] == alone.metrics["tokens"] == config.steps * 4 * 16
        assert_same_run(config, tmp_path / f"together{i}", tmp_path / f"alone{i}")


def test_runs_of_different_lengths_and_optimizers_train_together(
    tiny: TrainConfig, dataset: Dataset, tmp_path: Path
) -> None:
    changes = [{"steps": 6}, {"steps": 9, "optim.name": "muon"}, {"steps": 12, "optim.name": "riemannian_adamw"}]
    configs = [override(tiny, {"eval_every": 4} | change) for change in changes]
    seen = together(configs, [tmp_path / f"together{i}" for i in range(3)], dataset)
    for i, config in enumerate(configs):
        assert result_of(seen[i]).steps == config.steps
        run(config, tmp_path / f"alone{i}", dataset)
        assert_same_run(config, tmp_path / f"together{i}", tmp_path / f"alone{i}")


def test_runs_trained_together_resume_alone_and_the_other_way_round(
    tiny: TrainConfig, dataset: Dataset, tmp_path: Path
) -> None:
    base = override(tiny, {"steps": 12, "eval_every": 2, "checkpoint.every": 2, "optim.name": "muon"})
    configs = [override(base, {"seed": seed, "model.alpha": 0.1 * (seed + 1)}) for seed in range(3)]
    folders = [tmp_path / f"resumed{i}" for i in range(3)]
    loop = train_together(configs[:2], folders[:2], dataset=dataset)
    for _ in range(4):  # evaluations at 0, 2, 4 and 6; saved up to 4
        next(loop)
    loop.close()
    third = train(configs[2], folders[2], dataset=dataset)
    for _ in range(6):  # up to 10, saved up to 8: runs may continue from different steps
        next(third)
    third.close()
    assert run(configs[0], folders[0], dataset, resume="latest").status == "finished"
    seen = together(configs[1:], folders[1:], dataset, resume="latest")
    assert [event["step"] for event in seen[0] if isinstance(event, dict)] == [6, 8, 10, 12]
    assert [event["step"] for event in seen[1] if isinstance(event, dict)] == [10, 12]
    for i, config in enumerate(configs):
        run(config, tmp_path / f"straight{i}", dataset)
        assert_same_run(config, folders[i], tmp_path / f"straight{i}")


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["fail", "skip", "rollback"])
def test_a_diverging_run_does_not_affect_the_others(
    policy: str, tiny: TrainConfig, dataset: Dataset, tmp_path: Path
) -> None:
    policies = {"nonfinite.policy": policy, "nonfinite.max": 2, "checkpoint.every": 2}
    base = override(tiny, {"model.residual": "add", "model.qk_norm": False} | policies)
    configs = [override(base, {"optim.lr": lr}) for lr in (0.01, 1e38, 0.02)]
    seen = together(configs, [tmp_path / f"together{i}" for i in range(3)], dataset)
    assert [result_of(events).status for events in seen.values()] == ["finished", "diverged", "finished"]
    lost = run(configs[1], tmp_path / "alone1", dataset)
    assert (lost.status, lost.steps) == ("diverged", result_of(seen[1]).steps)
    for name in ("val_loss", "skipped_steps", "rollbacks"):
        assert result_of(seen[1]).metrics[name] == lost.metrics[name]
    for i in (0, 2):
        run(configs[i], tmp_path / f"alone{i}", dataset)
        assert_same_run(configs[i], tmp_path / f"together{i}", tmp_path / f"alone{i}")


def test_a_run_that_cannot_start_does_not_affect_the_others(
    tiny: TrainConfig, dataset: Dataset, tmp_path: Path
) -> None:
    run(override(tiny, {"seed": 9}), tmp_path / "0", dataset)  # leaves checkpoints of another seed
    configs = [override(tiny, {"seed": seed}) for seed in (0, 1, 2)]
    seen = together(configs, [tmp_path / str(i) for i in range(3)], dataset, resume="latest")
    assert len(seen[0]) == 1 and isinstance(seen[0][0], ConfigError) and "seed = 9" in str(seen[0][0])
    assert [result_of(seen[i]).status for i in (1, 2)] == ["finished", "finished"]


def test_a_run_can_be_stopped_at_an_evaluation(tiny: TrainConfig, dataset: Dataset, tmp_path: Path) -> None:
    configs = [override(tiny, {"seed": seed}) for seed in (0, 1, 2)]
    folders = [tmp_path / f"together{i}" for i in range(3)]
    seen = together(configs, folders, dataset, stop=[1])
    assert [event["step"] for event in seen[1] if isinstance(event, dict)] == [0, 3] and len(seen[1]) == 2
    assert rows(folders[1])[-1]["step"] == 3
    assert [result_of(seen[i]).steps for i in (0, 2)] == [8, 8]
    run(configs[2], tmp_path / "alone", dataset)
    assert_same_run(configs[2], folders[2], tmp_path / "alone")


def test_all_runs_take_smaller_micro_batches_if_memory_runs_out(
    tiny: TrainConfig, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, sizes = Stack.losses, []

    def losses_of_one_sequence(stack: Stack, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        sizes.append(idx.shape[1])
        if idx.shape[1] > 1:
            raise MemoryError
        return losses(stack, idx, targets)

    configs = [override(tiny, {"seed": seed}) for seed in (0, 1)]
    for i, config in enumerate(configs):
        run(config, tmp_path / f"alone{i}", dataset)
    monkeypatch.setattr(Stack, "losses", losses_of_one_sequence)
    seen = together(configs, [tmp_path / f"together{i}" for i in range(2)], dataset)
    assert sizes[:6] == [4, 2, 1, 1, 1, 1]
    assert [result_of(seen[i]).metrics["micro_batch_size"] for i in (0, 1)] == [1, 1]
    for i, config in enumerate(configs):
        assert_same_run(config, tmp_path / f"together{i}", tmp_path / f"alone{i}")
    with pytest.raises(MemoryError):
        together([override(c, {"on_oom": "fail"}) for c in configs], [tmp_path / "a", tmp_path / "b"], dataset)


def test_a_step_waits_for_the_device_once_and_prefetches_the_next_batch(
    tiny: TrainConfig, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [resolved(override(tiny, {"seed": seed})) for seed in (0, 1)]
    runs = [set_up(config, tmp_path / f"{config.seed}", resume=None, dataset=dataset) for config in configs]
    stack, tolist, tensor, waits = Stack([run.model for run in runs]), torch.Tensor.tolist, torch.tensor, []

    def counted(self: torch.Tensor) -> Any:
        waits.append([run.upcoming and run.upcoming[0] for run in runs])
        return tolist(self)

    def from_host(*given: Any, **options: Any) -> torch.Tensor:  # a copy to the GPU would wait as well
        waits.append("torch.tensor")
        return tensor(*given, **options)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    monkeypatch.setattr(torch, "tensor", from_host)
    train_step_together(stack, runs)
    assert waits == [[1, 1]]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"seed": 3, "steps": 9, "optim.name": "muon", "model.alpha": 0.3, "model.logit_scale": 2.0}, None),
        ({"model.alpha": [0.1, 0.2], "schedule.name": "constant", "project_every": 7, "eval_every": 2}, None),
        ({"model.alpha_kind": "scalar"}, "model.alpha_kind differs, 'vector' and 'scalar'"),
        ({"model.n_layer": 3}, "model.n_layer differs, 2 and 3"),
        ({"batch_size": 8}, "batch_size differs"),
        ({"dtype": "bfloat16"}, "dtype differs"),
        ({"compile": True}, "compile is on"),
        ({"on_oom": "halve_batch"}, "on_oom is halve_batch"),
    ],
)
def test_runs_trained_together_must_share_one_graph(
    changes: dict[str, Any], reason: str | None, tiny: TrainConfig, dataset: Dataset, tmp_path: Path
) -> None:
    configs = [tiny, override(tiny, changes)]
    incompatibility = ensemble_incompatibility(configs)
    assert incompatibility is None if reason is None else reason in (incompatibility or "")
    if reason is not None:
        with pytest.raises(ConfigError, match=reason.partition(",")[0]):
            next(train_together(configs, [tmp_path / "a", tmp_path / "b"], dataset=dataset))


def test_two_runs_need_two_folders(tiny: TrainConfig, dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 runs need as many folders"):
        next(train_together([tiny, tiny], [tmp_path, tmp_path], dataset=dataset))


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
    update(runs)
    assert [weight_norm_error(run.model) < 1e-5 for run in runs] == [True, True, False, True]
    moved = [
        max(float((new.detach() - old).abs().max()) for new, old in zip(run.model.parameters(), olds, strict=True))
        for run, olds in zip(runs, before, strict=True)
    ]
    assert min(moved[:3]) > 1e-3 and moved[3] == 0
    assert moved[0] < moved[1]


@pytest.mark.slow
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
